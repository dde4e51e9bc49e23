"""The network: one transformer with a planner's or a denoiser's head.   In order: shape, blocks, heads, muP."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

ROPE_BASE = 100.0           # slowest wavelength 2 pi * 100 positions: longer than any axis here
N_CONTEXT = 4               # context tokens per class label
N_LEVEL_FEATURES = 32
EMBED_STD = 0.5             # of tokens, places, context and level features: the same at every width
SHORT = 512                 # keys, on a CPU
LOGITS_PER_CHUNK = 2**25    # the head sees this many logits at once: 128 MB in float32


@dataclass(frozen=True)
class Shape:
    """What the weights depend on. Two runs with equal shapes can exchange checkpoints."""
    grid: tuple             # tokens per axis, (rows, columns) for images
    vocab: int              # V data tokens; the mask is one more input id
    n_classes: int          # the null class is one more label
    n_layer: int
    n_head: int
    n_embd: int
    base_width: int         # the width at which the lr on the command line is each group's lr
    base_head_dim: int = 0  # head_dim at base_width; 0: the same at every width
    causal: bool = False    # a frame sees itself and those before it

    def __post_init__(self):
        if self.n_embd % self.n_head or self.head_dim % 2:
            raise ValueError(f"n_embd {self.n_embd} does not divide into n_head {self.n_head} heads of even width")
        if self.head_dim // 2 < len(axes(self.grid)):
            raise ValueError(f"head width {self.head_dim} has too few pairs for the axes of grid {self.grid}")
        if self.causal and not self.is_video:
            raise ValueError(f"causal needs a grid of frames, rows and columns, not {self.grid}")

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def n_tokens(self):
        return math.prod(self.grid)

    @property
    def is_video(self):
        return len(self.grid) == 3

    @property
    def n_places(self):
        """Tokens that stand at different places: those of a frame of a video, in which a window may slide."""
        return math.prod(self.grid[1:]) if self.is_video else self.n_tokens


def axes(grid):
    """The axes a token can move along: text on a (1, 128) grid spends no pairs on its one row."""
    return [i for i, n in enumerate(grid) if n > 1] or [0]


def rope_angles(grid, head_dim):
    """Rotation of each pair of a head at each token; the axes share the pairs evenly.  -> (N, head_dim / 2)"""
    used = axes(grid)
    where = torch.cartesian_prod(*[torch.arange(n, dtype=torch.float32) for n in grid]).view(-1, len(grid))  # (N, axes)
    share = [len(range(i, head_dim // 2, len(used))) for i in range(len(used))]     # pairs per axis
    turn = [where[:, a, None] * ROPE_BASE ** (-torch.arange(n) / n) for a, n in zip(used, share, strict=True)]
    return torch.cat(turn, -1)


def rotate(x, cos, sin):
    """Turn pair (i, i + d/2) of every head by its angle.  x (B, H, N, d), cos and sin (N, d/2)  ->  (B, H, N, d)"""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def norm(x):
    return F.rms_norm(x, x.shape[-1:])


def attend(q, k, v, scale):
    """softmax(q k^T scale) v, heads apart.  q (B, H, N, d), k and v (B, H, S, d)  ->  (B, H, N, d)

    Short sequences on a CPU go through plain matrix products: 0.6 of the fused kernel's time in a step of digits.
    """
    if q.device.type == "cpu" and k.shape[2] <= SHORT:
        return (q * scale @ k.transpose(-1, -2)).softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


class Causal:
    """Frame-causal attention: a frame sees itself and the window - 1 frames before it, in products without a mask.

    Keys and values of the first `keep` frames of a call are kept for all later ones. A cache serves one set of rows.
    """

    def __init__(self, shape):
        self.size, self.window = shape.n_places, shape.grid[0]
        self.kept, self.n_kept, self.keep = [None] * shape.n_layer, 0, 0

    def attend(self, layer, q, k, v, scale):
        """As attend(), q, k and v (B, H, frames * size, d) of frames that follow the kept ones."""
        new, size = q.shape[2] // self.size, self.size
        if self.kept[layer] is not None:
            k, v = (torch.cat([old, y], 2) for old, y in zip(self.kept[layer], (k, v), strict=True))
        past, out = k.shape[2] // size - new, []
        for i in range(new):
            seen = slice(max(0, past + i + 1 - self.window) * size, (past + i + 1) * size)
            out.append(attend(q[:, :, i * size:(i + 1) * size], k[:, :, seen], v[:, :, seen], scale))
        if self.keep:
            held = slice(max(0, past + self.keep - self.window + 1) * size, (past + self.keep) * size)
            self.kept[layer] = k[:, :, held], v[:, :, held]
        return torch.cat(out, 2)


class Block(nn.Module):
    """Self-attention, cross-attention to the context and MLP side by side: one matrix in, one matrix out."""

    def __init__(self, shape):
        super().__init__()
        self.n_head, d = shape.n_head, shape.n_embd
        self.scale = math.sqrt(shape.base_head_dim or shape.head_dim) / shape.head_dim
        self.split = [d, d, d, d, 4 * d]                                # q, k, v, cross q, MLP hidden
        self.into = nn.Linear(d, sum(self.split), bias=False)
        self.context_kv = nn.Linear(d, 2 * d, bias=False)
        self.out = nn.Linear(6 * d, d, bias=False)

    def forward(self, x, context, turns, look=None, layer=0):           # (B, N, D), (B, S, D)
        (cos, sin), (cos_c, sin_c) = turns                              # of tokens, and as the context sees them
        *qkvc, hidden = self.into(norm(x)).split(self.split, -1)
        q, k, v, c = (rearrange(y, "b n (h d) -> b h n d", h=self.n_head) for y in qkvc)
        ck, cv = rearrange(self.context_kv(context), "b s (two h d) -> two b h s d", two=2, h=self.n_head)
        q, k = (rotate(norm(y), cos, sin).to(v.dtype) for y in (q, k))
        own = attend(q, k, v, self.scale) if look is None else look.attend(layer, q, k, v, self.scale)
        c = rotate(norm(c), cos_c, sin_c).to(v.dtype)                   # the context stands at the grid's origin
        given = attend(c, norm(ck).to(v.dtype), cv, self.scale)
        own, given = (rearrange(y, "b h n d -> b n (h d)") for y in (own, given))
        return x + self.out(torch.cat([own, given, F.relu(hidden).square()], -1))


class Transformer(nn.Module):
    """net(x, t, label, sites=None): planner -> (B, N) logits; denoiser -> (B, N, V), or (B, K, V) at sites.

    x (B, N) int64 in [0, V], the mask being V;  t (B, 1) or (B, N), read if is_told_t;  label (B,) in [0, n_classes]
    """

    def __init__(self, shape, head, is_told_t=False):
        super().__init__()
        self.shape, self.head, self.is_told_t = shape, head, is_told_t
        d = shape.n_embd
        self.embed = nn.Embedding(shape.vocab + 1, d)
        self.context = nn.Embedding(shape.n_classes + 1, N_CONTEXT * d)
        n_places = sum(shape.grid[1:]) if shape.is_video else shape.n_tokens
        self.place = nn.Embedding(n_places, d)                          # RoPE alone cannot find the border
        self.level = nn.Linear(N_LEVEL_FEATURES, d, bias=False) if is_told_t else None
        self.blocks = nn.ModuleList([Block(shape) for _ in range(shape.n_layer)])
        self.readout = nn.Linear(d, {"planner": 1, "denoiser": shape.vocab}[head], bias=False)
        angles = rope_angles(shape.grid, shape.head_dim)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, p in self.named_parameters():                         # muP, arXiv:2203.03466, table 8
            kind = role(name)
            if kind == "matrix" and not name.endswith("out.weight"):
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
            elif kind == "embedding":
                nn.init.normal_(p, std=EMBED_STD)
            else:                                                       # readouts, and what is added to the residual
                nn.init.zeros_(p)
        if is_told_t:                                                   # must not drown what each token is
            nn.init.normal_(self.level.weight, std=EMBED_STD / math.sqrt(N_LEVEL_FEATURES / 2))

    def hidden(self, x, t, label, cache=None, keep=0):
        """The last residual, normalised: what the head reads.  -> (B, N, D)

        cache: a Causal; x are then frames that follow those it holds, and it keeps the first `keep` of them
        """
        n_frames = x.shape[1] // self.shape.n_places                    # 1 where the grid is no video
        place = self.place.weight
        if self.shape.is_video:
            rows, columns = place.split(self.shape.grid[1:])            # frames have none: what moves, moves anywhen
            place = (rows[:, None] + columns).flatten(0, 1).repeat(n_frames, 1)
        h = self.embed(x) + place                                       # (B, N, D)
        if self.is_told_t:
            h = h + self.level(level_features(t))                       # (B, 1, D) or (B, N, D)
        context = norm(self.context(label).view(len(x), N_CONTEXT, -1))
        look = (cache or Causal(self.shape)) if self.shape.causal else None
        first = look.n_kept if look else 0
        turns = self.turns(first, n_frames)
        if look:
            look.keep = keep
        for i, block in enumerate(self.blocks):
            h = block(h, context, turns, look, i)
        if look:
            look.n_kept += keep
        return norm(h)

    @property
    def is_causal(self):
        return self.shape.causal

    def new_cache(self):
        return Causal(self.shape)

    def turns(self, first, n_frames):
        """Rotations of the tokens of some frames; the context sees each frame as the first, so that a window can slide.

        -> (cos, sin), (cos, sin), each (N, head_dim / 2)
        """
        size, last = self.shape.n_places, first + n_frames
        own, start = (self.cos, self.sin), (self.cos[:size].repeat(n_frames, 1), self.sin[:size].repeat(n_frames, 1))
        if not self.shape.is_video:
            return own, own
        if last > self.shape.grid[0]:                                   # frames past the training horizon
            angles = rope_angles((last, *self.shape.grid[1:]), self.shape.head_dim).to(self.cos.device)
            own = angles.cos(), angles.sin()
        return tuple(y[first * size:last * size] for y in own), start

    def logits(self, h):
        """The head: (..., D) -> (..., V), or (...,) for a planner."""
        y = self.readout(h) * (self.shape.base_width / self.shape.n_embd)
        return y if self.head == "denoiser" else y.squeeze(-1)

    def forward(self, x, t, label, sites=None, cache=None, keep=0):
        h = self.hidden(x, t, label, cache, keep)
        if sites is not None:
            h = h.gather(1, sites[..., None].expand(-1, -1, h.shape[-1]))
        return self.logits(h).float()


def level_features(t):
    """Sines and cosines of the noise level, the fastest of wavelength 0.2.  t (B, 1 or N) -> (B, 1 or N, features)"""
    freq = torch.logspace(0, 1.5, N_LEVEL_FEATURES // 2, device=t.device)
    angle = t[..., None] * freq
    return torch.cat([angle.sin(), angle.cos()], -1)


def map_logits(net, hidden, fn, *per_token, chunk=None):
    """fn(logits (n, V), *per_token (n,)) -> (n,) over rows of hidden; no more than a chunk of logits exists at a time.

    hidden (n, D), per_token tensors of n rows -> (n,). More than one chunk: each is recomputed in the backward pass.
    """
    def part(h, *rest):
        return fn(net.logits(h).float(), *rest)

    chunk = chunk or max(1, LOGITS_PER_CHUNK // net.readout.out_features)
    if len(hidden) <= chunk:
        return part(hidden, *per_token)
    rows = zip(*[y.split(chunk) for y in (hidden, *per_token)], strict=True)
    return torch.cat([checkpoint(part, *row, use_reentrant=False, preserve_rng_state=False) for row in rows])


class Summed(torch.autograd.Function):
    """A sum over tokens whose gradient is formed chunk by chunk in the forward pass: logits are made once."""

    @staticmethod
    def forward(ctx, hidden, weight, net, fn, per_token, chunk):
        total, grads_h, grad_w = hidden.new_zeros((), dtype=torch.float32), [], torch.zeros_like(weight)
        for h, *rest in zip(*[y.split(chunk) for y in (hidden, *per_token)], strict=True):
            h = h.detach().requires_grad_()
            with torch.enable_grad():
                part = fn(net.logits(h).float(), *rest).sum()
                grad_h, one = torch.autograd.grad(part, [h, weight])
            total += part.detach()
            grads_h.append(grad_h)
            grad_w += one
        ctx.save_for_backward(torch.cat(grads_h), grad_w)
        return total

    @staticmethod
    def backward(ctx, upstream):
        grad_h, grad_w = ctx.saved_tensors
        return upstream * grad_h, upstream * grad_w, None, None, None, None


def sum_logits(net, hidden, fn, *per_token, chunk=None):
    """map_logits(...).sum() for training: one pass over the chunks instead of two.  -> ()"""
    chunk = chunk or max(1, LOGITS_PER_CHUNK // net.readout.out_features)
    if len(hidden) <= chunk or not torch.is_grad_enabled():
        return map_logits(net, hidden, fn, *per_token, chunk=chunk).sum()
    return Summed.apply(hidden, net.readout.weight, net, fn, per_token, chunk)


def role(name):
    """What muP calls a parameter: "matrix" (both sides grow with width), "embedding" (one side) or "readout"."""
    module = name.removesuffix(".weight").rsplit(".", 1)[-1]
    return {"into": "matrix", "context_kv": "matrix", "out": "matrix", "embed": "embedding", "context": "embedding",
            "place": "embedding", "level": "embedding", "readout": "readout"}[module]


def param_groups(net, lr, weight_decay):
    """AdamW groups, each parameter in one: matrices at lr * base / width, the rest at lr; at base width all at lr.

    Decay acts on matrices only and scales the other way, so that lr * decay is the same at every width.
    """
    ratio = net.shape.base_width / net.shape.n_embd
    named = list(net.named_parameters())
    groups = []
    for kind, scale, decay in [("matrix", ratio, weight_decay / ratio), ("embedding", 1.0, 0.0), ("readout", 1.0, 0.0)]:
        params = [p for name, p in named if role(name) == kind]
        groups.append(dict(params=params, lr=lr * scale, lr_scale=scale, weight_decay=decay, role=kind))
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for _, p in named)
    return groups


def names_of(kind):
    return ("denoiser",) if kind in ("single", "gidd", "forcing") else ("planner", "denoiser")


def build_one(shape, name, kind, device="cpu"):
    with torch.device(device):
        return Transformer(shape, name, name == "denoiser" and kind != "maskd")


def build(shape, kind):
    """Nets of a run of this kind (config.kind_of); a mask denoiser counts masks, it is not told t.  -> {name: net}"""
    return {name: build_one(shape, name, kind) for name in names_of(kind)}


def shape_of(config, meta):
    """Shape from a run's config and its data's meta, both dicts."""
    names = ["n_layer", "n_head", "n_embd", "base_width", "base_head_dim"]
    return Shape(tuple(meta["grid"]), meta["vocab"], meta["n_classes"], **{k: config[k] for k in names},
                 causal=config.get("causal", False))


def from_checkpoint(state, kind, device):
    """The averaged (EMA) networks of a checkpoint, ready to sample.  -> {name: net}"""
    nets = build(shape_of(state["config"], state["meta"]), kind)
    for name, net in nets.items():
        net.load_state_dict(state["ema"][name])
        net.to(device).eval().requires_grad_(False)
    return nets
