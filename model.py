"""The network: one transformer with a head for a planner or a denoiser."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from support.attention import attend

ROPE_BASE = 100.0           # slowest wavelength 2 pi * 100 positions: longer than any axis here
N_LABEL_TOKENS = 4          # tokens per class label, read by cross-attention
N_LEVEL_FEATURES = 32
EMBED_STD = 0.5             # of tokens, positions, labels and level features, at every width


@dataclass(frozen=True)
class Shape:
    """What the weights depend on. Two runs with equal shapes can exchange checkpoints."""
    grid: tuple[int, ...]   # tokens per axis, (rows, columns) for images
    vocab: int              # V data tokens; the mask is one more input id
    n_classes: int          # the null class is one more label
    n_layer: int
    n_head: int
    n_embd: int
    base_width: int         # the width at which the lr on the command line is each group's lr
    base_head_dim: int = 0  # head_dim at base_width; 0: the same at every width
    causal: bool = False    # a frame attends to itself and those before it
    patch: int = 1          # the blocks see patches of this many tokens along rows and columns

    def __post_init__(self):
        self.check_patch()
        if self.n_embd % self.n_head or self.head_dim % 2:
            raise ValueError(
                f"n_embd {self.n_embd} does not divide into n_head {self.n_head} heads "
                "of even width"
            )
        if self.head_dim // 2 < len(used_axes(self.coarse_grid)):
            raise ValueError(
                f"head width {self.head_dim} has too few pairs for the axes of grid {self.grid}"
            )
        if self.causal and not self.is_video:
            raise ValueError(f"causal needs a grid of frames, rows and columns, not {self.grid}")

    def check_patch(self) -> None:
        if self.patch == 1:
            return
        if len(self.grid) > 3 or any(n % p for n, p in zip(self.grid, self.patches, strict=True)):
            raise ValueError(f"patch {self.patch} does not divide the axes of grid {self.grid}")
        if self.n_embd % self.patch_size:
            raise ValueError(
                f"n_embd {self.n_embd} does not divide into the {self.patch_size} tokens of a patch"
            )

    @property
    def patches(self) -> tuple[int, ...]:
        """Tokens of a patch along each axis; frames are never merged, nor an axis of length 1."""
        n_frame_axes = 1 if self.is_video else 0
        sizes = [self.patch if n > 1 else 1 for n in self.grid[n_frame_axes:]]
        return (*[1] * n_frame_axes, *sizes)

    @property
    def patch_size(self) -> int:
        """Tokens of a patch."""
        return math.prod(self.patches)

    @property
    def coarse_grid(self) -> tuple[int, ...]:
        """Patches per axis."""
        return tuple(n // p for n, p in zip(self.grid, self.patches, strict=True))

    @property
    def n_patches(self) -> int:
        return math.prod(self.coarse_grid)

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def n_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def is_video(self) -> bool:
        return len(self.grid) == 3

    @property
    def frame_size(self) -> int:
        """Tokens of a frame of a video; of anything else all of them."""
        return math.prod(self.grid[1:]) if self.is_video else self.n_tokens


def shape_of(config: dict[str, Any], meta: dict[str, Any]) -> Shape:
    """The shape of a run's networks, from its config and its data's meta."""
    names = ["n_layer", "n_head", "n_embd", "base_width", "base_head_dim", "causal", "patch"]
    sizes = {name: config[name] for name in names}
    return Shape(tuple(meta["grid"]), meta["vocab"], meta["n_classes"], **sizes)


# Rotary positions and attention


def used_axes(grid: tuple[int, ...]) -> list[int]:
    """The axes a token can move along: text on a (1, 128) grid spends no pairs on its one row."""
    return [axis for axis, n in enumerate(grid) if n > 1] or [0]


def rope_angles(grid: tuple[int, ...], head_dim: int) -> Tensor:
    """Rotation of each pair of a head at each token; the axes share the pairs evenly.

    ->  (N, head_dim / 2)
    """
    axes = used_axes(grid)
    positions = torch.cartesian_prod(*[torch.arange(n, dtype=torch.float32) for n in grid])
    positions = positions.view(-1, len(grid))                           # (N, axes of the grid)
    angles = []
    for i, axis in enumerate(axes):
        n_pairs = len(range(i, head_dim // 2, len(axes)))
        frequency = ROPE_BASE ** (-torch.arange(n_pairs) / n_pairs)
        angles.append(positions[:, axis, None] * frequency)
    return torch.cat(angles, -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pair (i, i + d/2) of every head by its angle.

    x (B, H, N, d), cos and sin (N, d/2)  ->  (B, H, N, d)
    """
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


class KVCache:
    """Frame-causal attention: a frame sees itself and the window - 1 frames before it.

    Frames are attended from one by one, so that no mask is needed, in training too. Keys and values
    of the first n_keep frames of a call are kept for later calls. A cache serves one batch of rows.
    """

    def __init__(self, shape: Shape):
        self.frame_size = shape.frame_size // shape.patch_size
        self.window = shape.grid[0]
        self.kept = [None] * shape.n_layer      # (k, v) of each layer
        self.n_kept = 0                         # frames
        self.n_keep = 0                         # of the call at hand

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """As attend(), for frames that follow the kept ones.

        q, k, v (B, H, frames * frame_size, d)  ->  the same shape
        """
        size = self.frame_size
        n_new = q.shape[2] // size
        if self.kept[layer] is not None:
            old_k, old_v = self.kept[layer]
            k = torch.cat([old_k, k], 2)
            v = torch.cat([old_v, v], 2)
        n_old = k.shape[2] // size - n_new
        out = []
        for i in range(n_new):
            end = n_old + i + 1
            seen = slice(max(0, end - self.window) * size, end * size)
            out.append(
                attend(q[:, :, i * size : (i + 1) * size], k[:, :, seen], v[:, :, seen], scale)
            )
        if self.n_keep:
            end = n_old + self.n_keep
            held = slice(max(0, end - self.window + 1) * size, end * size)
            self.kept[layer] = k[:, :, held], v[:, :, held]
        return torch.cat(out, 2)


# The network


class Block(nn.Module):
    """Self-attention, cross-attention to the label and an MLP in parallel, between one input and
    one output matrix."""

    def __init__(self, shape: Shape):
        super().__init__()
        d = shape.n_embd
        self.n_head = shape.n_head
        self.scale = math.sqrt(shape.base_head_dim or shape.head_dim) / shape.head_dim
        self.widths = [d, d, d, d, 4 * d]  # q, k, v, cross q, MLP hidden
        self.in_proj = nn.Linear(d, sum(self.widths), bias=False)
        self.label_kv = nn.Linear(d, 2 * d, bias=False)
        self.out_proj = nn.Linear(6 * d, d, bias=False)

    def forward(self, x, label_tokens, rope, kv_cache=None, layer=0):   # (B, n, D), (B, S, D)
        (cos, sin), (cos_label, sin_label) = rope
        *qkvc, hidden = self.in_proj(norm(x)).split(self.widths, -1)
        q, k, v, cross_q = (rearrange(y, "b n (h d) -> b h n d", h=self.n_head) for y in qkvc)
        label_kv = self.label_kv(label_tokens)
        label_k, label_v = rearrange(label_kv, "b s (two h d) -> two b h s d", two=2, h=self.n_head)

        q = rotate(norm(q), cos, sin).to(v.dtype)
        k = rotate(norm(k), cos, sin).to(v.dtype)
        if kv_cache is None:
            from_tokens = attend(q, k, v, self.scale)
        else:
            from_tokens = kv_cache.attend(layer, q, k, v, self.scale)
        # the label stands at the grid's origin
        cross_q = rotate(norm(cross_q), cos_label, sin_label).to(v.dtype)
        from_label = attend(cross_q, norm(label_k).to(v.dtype), label_v, self.scale)

        from_tokens = rearrange(from_tokens, "b h n d -> b n (h d)")
        from_label = rearrange(from_label, "b h n d -> b n (h d)")
        mlp = F.relu(hidden).square()
        return x + self.out_proj(torch.cat([from_tokens, from_label, mlp], -1))


class Transformer(nn.Module):
    """net(x, t, label, sites=None): planner -> (B, N) logits; denoiser -> (B, N, V), or (B, K, V)
    at sites (B, K).

    x (B, N) int64 in [0, V], V being the mask;  t (B, 1) or (B, N), read if t_conditioned;  label
    (B,) in [0, n_classes], n_classes being the null class. The blocks see n patches of p tokens: a
    patch is the concatenation of its tokens' embeddings, and one matrix leads back to tokens. n = N
    and p = 1 unless the shape says otherwise.
    """

    def __init__(self, shape: Shape, role: str, t_conditioned: bool = False):
        super().__init__()
        self.shape = shape
        self.role = role
        self.t_conditioned = t_conditioned
        self.recompute = False      # the blocks' activations, in the backward pass
        d = shape.n_embd
        d_token = d // shape.patch_size
        coarse = shape.coarse_grid
        n_positions = sum(coarse[1:]) if shape.is_video else shape.n_patches
        self.tok_emb = nn.Embedding(shape.vocab + 1, d_token)
        self.label_emb = nn.Embedding(shape.n_classes + 1, N_LABEL_TOKENS * d)
        self.pos_emb = nn.Embedding(n_positions, d)  # RoPE alone cannot find the border
        self.t_proj = nn.Linear(N_LEVEL_FEATURES, d_token, bias=False) if t_conditioned else None
        self.blocks = nn.ModuleList([Block(shape) for _ in range(shape.n_layer)])
        self.unpatch = nn.Linear(d, shape.patch_size * d, bias=False) if shape.patch > 1 else None
        self.head = nn.Linear(d, {"planner": 1, "denoiser": shape.vocab}[role], bias=False)
        angles = rope_angles(coarse, shape.head_dim)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        # a buffer, since Apple GPUs have no logspace
        frequency = torch.logspace(0, 1.5, N_LEVEL_FEATURES // 2)
        self.register_buffer("frequency", frequency, persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        """muP, arXiv:2203.03466, table 8."""
        for name, p in self.named_parameters():
            kind = mup_kind(name)
            if kind == "matrix" and not name.endswith("out_proj.weight"):
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
            elif kind == "embedding":
                nn.init.normal_(p, std=EMBED_STD)
            else:  # heads, and what is added to the residual
                nn.init.zeros_(p)
        if self.t_conditioned:  # of the tokens' size: the sines and cosines have norm sqrt(n / 2)
            nn.init.normal_(self.t_proj.weight, std=EMBED_STD / math.sqrt(N_LEVEL_FEATURES / 2))

    def hidden(
        self, x: Tensor, t: Tensor, label: Tensor, kv_cache: KVCache | None = None, n_keep: int = 0,
    ) -> Tensor:
        """What the head reads.  -> (B, N, D)

        kv_cache: x are then the frames after those that it holds, and it keeps the first n_keep
        """
        return self.of_tokens(self.residual(x, t, label, kv_cache, n_keep))

    def residual(
        self, x: Tensor, t: Tensor, label: Tensor, kv_cache: KVCache | None = None, n_keep: int = 0,
        below: Tensor | None = None,
    ) -> Tensor:
        """The last residual of the patches, normalised.  -> (B, n, D)

        below (B, n, D): the last residual of a trunk, which is added to the embeddings
        """
        n_frames = x.shape[1] // self.shape.frame_size  # 1 where the grid is no video
        h = self.to_patches(self.tok_emb(x)) + self.positions(n_frames)         # (B, n, D)
        if below is not None:
            h = h + below
        if self.t_conditioned:
            features = level_features(t, self.frequency)
            h = h + self.to_patches(self.t_proj(features))              # (B, 1, D) or (B, n, D)
        label_tokens = self.label_tokens(label)
        if self.shape.causal:
            kv_cache = kv_cache or KVCache(self.shape)
            kv_cache.n_keep = n_keep
        rope = self.rope(kv_cache.n_kept if kv_cache else 0, n_frames)
        for layer, block in enumerate(self.blocks):
            if self.recompute and torch.is_grad_enabled():
                block = functools.partial(checkpoint, block, use_reentrant=False)
            h = block(h, label_tokens, rope, kv_cache, layer)
        if kv_cache:
            kv_cache.n_kept += n_keep
        return norm(h)

    def of_tokens(self, h: Tensor) -> Tensor:
        """From patches back to tokens.  (B, n, D) -> (B, N, D)"""
        return h if self.unpatch is None else norm(self.to_tokens(self.unpatch(h)))

    def label_tokens(self, label: Tensor) -> Tensor:
        """(B,) -> (B, N_LABEL_TOKENS, D)"""
        return norm(self.label_emb(label).view(len(label), N_LABEL_TOKENS, self.shape.n_embd))

    def to_patches(self, y: Tensor) -> Tensor:
        """Concatenate the tokens of each patch; a level that all tokens share is repeated.

        (B, N, D / p) -> (B, n, D), or (B, 1, D / p) -> (B, 1, D)
        """
        if self.unpatch is None:
            return y
        if y.shape[1] == 1:
            return y.repeat(1, 1, self.shape.patch_size)
        return rearrange(y, "b (f r pr c pc) d -> b (f r c) (pr pc d)", **self.patch_axes())

    def to_tokens(self, y: Tensor) -> Tensor:
        """Undo to_patches.  (B, n, p D) -> (B, N, D)"""
        return rearrange(y, "b (f r c) (pr pc d) -> b (f r pr c pc) d", **self.patch_axes())

    def patch_axes(self) -> dict[str, int]:
        """Rows and columns of a frame's patches, and of a patch's tokens."""
        (r, c), (pr, pc) = (
            (1, *axes)[-2:] for axes in (self.shape.coarse_grid, self.shape.patches)
        )
        return dict(r=r, c=c, pr=pr, pc=pc)

    def positions(self, n_frames: int) -> Tensor:
        """Learned position embeddings, none in time: motion is the same at any time.  -> (n, D)"""
        if not self.shape.is_video:
            return self.pos_emb.weight
        rows, columns = self.pos_emb.weight.split(self.shape.coarse_grid[1:])
        return (rows[:, None] + columns).flatten(0, 1).repeat(n_frames, 1)

    def rope(
        self, first: int, n_frames: int,
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """RoPE of frames first, ..., first + n_frames - 1, in self- and in cross-attention.

        To the label every frame is the first one, so that a window can slide.
        ->  (cos, sin), (cos, sin), each (n, head_dim / 2)
        """
        if not self.shape.is_video:
            return (self.cos, self.sin), (self.cos, self.sin)
        cos, sin = self.cos, self.sin
        last = first + n_frames
        coarse = self.shape.coarse_grid
        if last > coarse[0]:  # frames past the training horizon
            angles = rope_angles((last, *coarse[1:]), self.shape.head_dim).to(cos.device)
            cos, sin = angles.cos(), angles.sin()
        size = math.prod(coarse[1:])
        here = slice(first * size, last * size)
        at_first = self.cos[:size].repeat(n_frames, 1), self.sin[:size].repeat(n_frames, 1)
        return (cos[here], sin[here]), at_first

    def logits(self, h: Tensor) -> Tensor:
        """The head: (..., D) -> (..., V), or (...,) for a planner."""
        y = self.head(h * (self.shape.base_width / self.shape.n_embd))
        return y if self.role == "denoiser" else y.squeeze(-1)

    def forward(self, x: Tensor, t: Tensor, label: Tensor, sites: Tensor | None = None,
                kv_cache: KVCache | None = None, n_keep: int = 0) -> Tensor:
        h = self.hidden(x, t, label, kv_cache, n_keep)
        if sites is not None:
            h = h.gather(1, sites[..., None].expand(-1, -1, h.shape[-1]))
        return self.logits(h).float()


class TrunkPlanner(Transformer):
    """A planner of a few blocks on a denoiser's last residual: one pass of the trunk serves both.

    net(x, t, label) -> (B, N) logits. The trunk, the denoiser's blocks, is no part of this module:
    it is neither saved nor moved with it, and gets no gradient from here unless hold() says so.
    """

    def __init__(self, shape: Shape, trunk: Transformer):
        super().__init__(shape, "planner")
        self.hold(trunk)

    def hold(self, trunk: Transformer, grad: float = 0.0) -> None:
        """Stand on this denoiser, which gets the planner's gradient times `grad`."""
        self.trunk_of = (trunk,)    # in a tuple, so that it is no submodule
        self.trunk_grad = grad

    def residual(self, x: Tensor, t: Tensor, label: Tensor, *_, below: Tensor | None = None):
        """As a Transformer's on the trunk's residual, asked for here unless it is given. There is
        no cache."""
        if below is None:
            below = self.trunk_residual(x, t, label)
        return super().residual(x, t, label, below=below)

    def trunk_residual(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """-> (B, n, D), through which the gradient flows times trunk_grad"""
        [trunk] = self.trunk_of
        if not self.trunk_grad:
            with torch.no_grad():
                return trunk.residual(x, t, label)
        below = trunk.residual(x, t, label)
        return below.detach().lerp(below, self.trunk_grad)

    def forward(self, x: Tensor, t: Tensor, label: Tensor, sites: Tensor | None = None,
                is_both: bool = False):
        if not is_both:
            return super().forward(x, t, label, sites)
        [trunk] = self.trunk_of
        below = trunk.residual(x, t, label)
        h = self.of_tokens(self.residual(x, t, label, below=below))
        return trunk.logits(trunk.of_tokens(below)).float(), self.logits(h).float()

    def both(self, x: Tensor, t: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Denoiser and planner in one call.  -> logits (B, N, V) and (B, N)"""
        return self(x, t, label, None, True)    # by __call__, for the hooks of runtime.place


def level_features(t: Tensor, frequency: Tensor) -> Tensor:
    """Sines and cosines of the noise level, the fastest of wavelength 0.2.

    t (B, 1 or N), frequency (features / 2,)  ->  (B, 1 or N, features)
    """
    angle = t[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], -1)


# muP: what scales with width


MUP_KINDS = {
    "in_proj": "matrix", "label_kv": "matrix", "out_proj": "matrix", "unpatch": "matrix",
    "tok_emb": "embedding", "label_emb": "embedding", "pos_emb": "embedding", "t_proj": "embedding",
    "head": "head",
}


def mup_kind(name: str) -> str:
    """The kind of a parameter: of a "matrix" both sides grow with width, of an "embedding" one
    does, and "head" is the output layer."""
    module = name.removesuffix(".weight").rsplit(".", 1)[-1]
    return MUP_KINDS[module]


def param_groups(net: Transformer, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups, each parameter in one: matrices train at lr * base_width / width, others at lr.

    Weight decay acts on matrices only and scales the other way, so that lr * decay is the same at
    every width.
    """
    ratio = net.shape.base_width / net.shape.n_embd
    lr_scale = {"matrix": ratio, "embedding": 1.0, "head": 1.0}
    decay = {"matrix": weight_decay / ratio, "embedding": 0.0, "head": 0.0}
    named = list(net.named_parameters())
    groups = []
    for kind, scale in lr_scale.items():
        params = [p for name, p in named if mup_kind(name) == kind]
        groups.append(
            dict(params=params, lr=lr * scale, lr_scale=scale, weight_decay=decay[kind], kind=kind)
        )
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for _, p in named)
    return groups
