"""What each network learns.   Tasks are made on the host, where shapes are known: no step waits for the device."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from diffusion.processes import T_MAX, T_MIN, corrupt, from_self, stratified_t

CACHED = 2**18         # logits of GIDD's loss at once on a CPU: about nine passes are made over them


class Task(NamedTuple):
    """Inputs of a network, the tokens that enter its loss, and what it should say there."""
    xt: torch.Tensor        # (B, N) int64
    t: torch.Tensor         # (B, 1) noise level
    label: torch.Tensor     # (B,) int64
    sites: torch.Tensor     # (n,) int64 into the flattened (B * N)
    target: torch.Tensor    # (n,) is_noise (float) for a planner, x0 (int64) for a denoiser
    more: tuple = ()        # what else its loss reads, each (n,)
    n: int = 0              # losses are summed and divided by this; 0: by the number of sites

    def to(self, device):
        if device.type != "cuda":
            return self
        host = [*self[:5], *self.more]
        moved = [y.pin_memory().to(device, non_blocking=True) for y in host]
        return Task(*moved[:5], tuple(moved[5:]), self.n)


def level_at(t, x0, given):
    """The level of each token: 0 where it is given.  t (B, 1) or (B, N), given (B, N) bool or None -> (B, N)"""
    return t.expand(x0.shape) if given is None else t.expand(x0.shape).masked_fill(given, 0)


def planner_task(x0, t, label, vocab, generator, given=None):
    """Which tokens of a uniformly corrupted sequence are noise?   all tokens; arXiv:2410.06264, eq. 8"""
    xt, is_noise = corrupt(x0, level_at(t, x0, given), "uniform", vocab, generator)
    sites = (torch.ones_like(is_noise) if given is None else ~given).flatten().nonzero()[:, 0]
    return Task(xt, t, label, sites, is_noise.flatten()[sites].float())


def denoiser_task(x0, t, label, vocab, generator, process, tokens="noise", given=None):
    """What was this token?   tokens: "noise" predicts from the others, "all" from the token itself too"""
    xt, is_noise = corrupt(x0, level_at(t, x0, given), process, vocab, generator)
    is_asked = is_noise if tokens == "noise" else torch.ones_like(is_noise) if given is None else ~given
    sites = is_asked.flatten().nonzero()[:, 0]
    return Task(xt, t, label, sites, x0.flatten()[sites])


def ddpd(x0, t, label, vocab, generator, nets, denoiser_process, given=None):
    """Planned denoising: BCE of the planner + CE of the denoiser.  -> {name: Task}

    x0 (B, N), t (B, 1), label (B,), given (B, N) bool or None: tokens that are never corrupted and asked of nobody
    """
    if nets == "single":
        return {"denoiser": denoiser_task(x0, t, label, vocab, generator, "uniform", "all", given)}
    return {"planner": planner_task(x0, t, label, vocab, generator, given),
            "denoiser": denoiser_task(x0, t, label, vocab, generator, denoiser_process, "noise", given)}


def gidd(x0, t, label, vocab, generator, p_uniform, weight, clean_share=1.0, process="hybrid", given=None, waits=None):
    """GIDD (arXiv:2503.04482): one denoiser on hybrid noise, all tokens by the bound's loss.  -> {name: Task}

    weight: kind of gidd_weight; clean_share of the clean tokens enter, weighted up: the same on average, a cheaper
    head. Levels t (B, 1), or (B, N), each token's own. Nothing is learned of tokens at level 0, of those that are given
    and of those that wait, (B, N) bool.
    """
    level = level_at(t, x0, given)
    is_asked = level > 0 if waits is None else (level > 0) & ~waits
    xt, is_noise = corrupt(x0, level, process, vocab, generator, p_uniform)
    is_in = torch.rand(x0.shape, generator=generator) < clean_share
    if weight == "none" or is_masks(process, p_uniform):
        is_in = is_noise
    sites = (((xt != x0) | is_in) & is_asked).flatten().nonzero()[:, 0]
    target, z, at = (y.flatten()[sites] for y in (x0, xt, level.clamp(T_MIN, T_MAX)))
    w = gidd_weight(target, z, at, vocab, p_uniform, weight, process)
    w = torch.where(z == target, w / clean_share, w) if weight != "none" else w
    n_asked = is_asked.sum().item() if weight != "none" else 0
    return {"denoiser": Task(xt, t, label, sites, target, (z, at, w), n_asked)}


def forcing(x0, levels, label, vocab, generator, *how, given=None, waits=None):
    """Diffusion Forcing (arXiv:2407.01392): gidd's loss with a level for each frame, which the denoiser is told.

    levels (B, F), F frames of N / F tokens; waits (B, F) bool: frames of which nothing is learned; how: p_uniform,
    weight, clean_share and process of gidd  ->  {name: Task}
    """
    size = x0.shape[1] // levels.shape[1]
    t = level_at(levels.repeat_interleave(size, 1), x0, given)
    waits = None if waits is None else waits.repeat_interleave(size, 1)
    return gidd(x0, t, label, vocab, generator, *how, given=given, waits=waits)


def drop_labels(label, null_label, share, generator):
    """Replace a share of labels by the null class, for classifier-free guidance (arXiv:2207.12598).  (B,) -> (B,)"""
    return torch.where(torch.rand(label.shape, generator=generator) < share, null_label, label)


def planner_loss(logits, is_noise):
    """Binary cross-entropy, nats.  (n,), (n,) -> (n,)"""
    return F.binary_cross_entropy_with_logits(logits, is_noise, reduction="none")


def denoiser_loss(logits, x0):
    """Cross-entropy, nats.  (n, V), (n,) -> (n,)"""
    return F.cross_entropy(logits, x0, reduction="none")


def is_masks(process, p_uniform):
    return process == "mask" or (process == "hybrid" and p_uniform == 0)


def uniform_odds(t, process, p_uniform):
    """Fates in units in which P(keep) is 1 - t: that of falling to uniform noise, and their sum.  (n,), (n,)"""
    if process == "uniform":
        return t, torch.ones_like(t)
    c = 2 * p_uniform / (1 - p_uniform) * (t * (1 - t)).sqrt()
    return c, 1 + c


class GiddLoss(torch.autograd.Function):
    """KL(q_t(.|x0) || q_t(.|p)) + IS(q_t(z|x0) || q_t(z|p)) of each row, times a weight; arXiv:2503.04482, eq. 14.

    logits (n, V) of the others-prediction p, z (n,) in [0, V], t and weight (n,)  ->  (n,) nats. The gradient is formed
    in the forward pass: two sums over a row (its logsumexp, then S) and what stands at x0 and z make both.
    """

    @staticmethod
    def forward(ctx, logits, x0, z, t, weight, p_uniform, process):
        n, vocab = logits.shape
        block = max(1, CACHED // vocab) if logits.device.type == "cpu" else max(1, n)
        grad, losses = torch.empty_like(logits) if ctx.needs_input_grad[0] else None, []
        for i in range(0, n, block):
            rows = slice(i, i + block)
            into = None if grad is None else grad[rows]
            losses.append(gidd_rows(*(y[rows] for y in (logits, x0, z, t, weight)), p_uniform, process, into))
        ctx.save_for_backward(grad)
        return torch.cat(losses) if losses else weight

    @staticmethod
    def backward(ctx, upstream):
        return ctx.saved_tensors[0].mul_(upstream[:, None]), *[None] * 6                    # once: autograd checks


def gidd_rows(logits, x0, z, t, weight, p_uniform, process, grad=None):
    """The loss of some rows; its gradient is written to grad (n, V).  -> (n,)"""
    vocab = logits.shape[1]
    c, total = uniform_odds(t, process, p_uniform)
    a, b = 1 - t, c / vocab
    ratio = a / b.clamp_min(torch.finfo(logits.dtype).tiny)             # a / b
    probs = logits.softmax(-1)                                          # (n, V)
    at = torch.stack([x0, z.clamp_max(vocab - 1)], 1)                   # (n, 2)
    px, pz = probs.gather(1, at).unbind(1)
    is_mask, is_clean = z == vocab, z == x0
    q = (probs * ratio[:, None]).add_(1)                                # (n, V): q_t(j | p) / q_t(j | noise)
    kl = ((a + b) * ratio.log1p() - a * (ratio * px).log1p() - b * q.log().sum(-1)) / total
    r = torch.where(is_clean, 1 + ratio, 1.0) / (1 + ratio * pz)        # q_t(z | x0) / q_t(z | p)
    mismatch = torch.where(is_mask, 0.0, r - r.log() - 1)
    if grad is not None:
        h = torch.div((-weight * b / total * ratio)[:, None], q, out=q)                     # dL/dp, in place
        g = ratio[:, None] / (1 + ratio[:, None] * torch.stack([px, pz], 1))
        own = torch.stack([-weight * a / total, torch.where(is_mask, 0.0, weight * (1 - r))], 1)
        h.scatter_add_(1, at, own * g)
        torch.mul(probs, h.sub_(torch.linalg.vecdot(probs, h)[:, None]), out=grad)
    return weight * (kl + mismatch)


def gidd_weight(x0, z, t, vocab, p_uniform, kind, process="hybrid"):
    """Weight of each token's loss: "elbo" as the bound has it, "clip" that but at most 1, or "dynamic".  (n,) -> (n,)

    dynamic: mask 2, other token 1, clean token r / (1 + r), r the odds of noise that looks like it; elbo: that over
    2 t (1 - t), over t (1 - t) for uniform noise. "none", of plain cross-entropy: 1
    """
    r = uniform_odds(t, process, p_uniform)[0] / (vocab * (1 - t))
    weight = torch.where(z == vocab, 2.0, torch.where(z == x0, r / (1 + r), 1.0))
    if kind == "none":
        return torch.ones_like(weight)
    if kind == "dynamic":
        return weight
    weight = weight / (t * (1 - t)) / (1 if process == "uniform" else 2)
    return weight.clamp_max(1.0) if kind == "clip" else weight


def gidd_loss(logits, x0, z, t, weight, p_uniform, process="hybrid"):
    """The loss above; without uniform noise weight (1 - t) CE at masks and nothing elsewhere.  -> (n,)"""
    if is_masks(process, p_uniform):
        ce = F.cross_entropy(logits, x0, reduction="none")
        return torch.where(z == logits.shape[1], weight * (1 - t) * ce, 0.0)
    return GiddLoss.apply(logits, x0, z, t, weight, p_uniform, process)


def plain_loss(logits, x0, z, t, weight):
    """Cross-entropy, for weight "none": what the token looks like and its level play no part.  -> (n,)"""
    return denoiser_loss(logits, x0)


def floors(x0, label, vocab, nets, denoiser_process, generator, n_rows=2048):
    """Least losses on fresh noise over a few sequences that are known by heart: Bayes' rule over all of them.

    x0 (S, N), label (S,)  ->  {name: nats per token}, by n_rows draws of noise
    """
    row = torch.arange(n_rows) % len(x0)
    t = stratified_t(n_rows, generator)
    tasks = ddpd(x0[row], t, label[row], vocab, generator, nets, denoiser_process)
    is_peer = (label[row][:, None] == label).double().log()             # (R, S): the label rules the others out
    out = {}
    for name, task in tasks.items():
        hit = task.xt[:, None] == x0                                    # (R, S, N)
        if name == "planner":                                           # is told no t: the sum is over levels too
            u = (torch.arange(256, dtype=torch.float64) + 0.5) / 256
            match, miss, n_hit = (1 - u + u / vocab).log(), (u / vocab).log(), hit.sum(-1, keepdim=True)
            joint = is_peer[..., None] + n_hit * match + (x0.shape[1] - n_hit) * miss           # (R, S, levels)
            w = joint.flatten(1).softmax(1).view_as(joint)
            clean = torch.einsum("rsn,rs->rn", hit.double(), (w * (1 - (miss - match).exp())).sum(-1))
            p_true = torch.where(task.target.view_as(clean) > 0, 1 - clean, clean).flatten()
        else:
            level = t.double()[:, None]
            like = torch.where(hit, (1 - level + level / vocab).log(), (level / vocab).log())   # (R, S, N)
            like = torch.where(task.xt[:, None] == vocab, 0.0, like)
            if denoiser_process == "mask":
                like = torch.where(hit | (task.xt[:, None] == vocab), 0.0, -torch.inf)
            total = is_peer + like.sum(-1)                              # (R, S)
            w = (total if nets == "single" or denoiser_process == "mask" else total[..., None] - like).softmax(1)
            w = w.view(*w.shape[:2], -1)                                # masks have no evidence of their own
            p_true = (w * (x0 == x0[row][:, None])).sum(1).flatten()[task.sites]
        out[name] = -p_true.clamp_min(1e-12).log().mean().item()
    return out


LOSSES = {"planner": planner_loss, "denoiser": denoiser_loss}


# Likelihoods: bounds on -log p(x0). Each is E over t of what these functions return, nats of each token.


def masked_bound(q, x, x0, t):
    """Masked diffusion: (1/t) CE at masks. Tight for an exact q.  q (B, N, V) probabilities, t (B, 1) -> (B, N)"""
    ce = -q.gather(-1, x0[..., None])[..., 0].log()
    return torch.where(x == q.shape[-1], ce, 0.0) / t


def share_of_noise(x, x0, t, vocab):
    """P(noise | x_t, x0) under uniform noise.  -> (B, N)"""
    return torch.where(x != x0, 1.0, t / vocab / (1 - t + t / vocab))


def leap_bound(p, q, x, x0, t):
    """Planner p (B, N) and denoiser q (B, N, V) under the law of schedule leap; loose even where both are exact."""
    noise = share_of_noise(x, x0, t, q.shape[-1])
    q0 = q.gather(-1, x0[..., None])[..., 0]
    return (p - noise - noise * (p * q0).log()) / t


def renoise_bound(p, q, x, x0, t):
    """The same two in the chain that also re-noises, as ancestral sampling does; tight where both are exact."""
    redrawn = 1 / (q.shape[-1] * (1 - t))[..., None]                    # rate of falling to any one id
    noise = share_of_noise(x, x0, t, q.shape[-1])[..., None]
    is_x0 = torch.zeros_like(q).scatter(-1, x0[..., None], 1.0)
    model, truth = p[..., None] * (q / t[..., None] + redrawn), noise * (is_x0 / t[..., None] + redrawn)
    terms = model - truth + torch.special.xlogy(truth, truth / model)
    return terms.scatter(-1, x[..., None], 0.0).sum(-1)


def path(name, u, n_tokens, frames):
    """Levels along a path from data to noise, u (B, 1) in (0, 1), and how fast each rises: (B, N), (B, N).

    "shared": all tokens together, t = u^2; "frames": the last frame first, each from 0 to 1 as a square in its turn
    """
    count = 1 if name == "shared" else frames
    turn, own = (u * count).floor(), u * count % 1
    order = torch.arange(count - 1, -1, -1, device=u.device).repeat_interleave(n_tokens // count)
    t = torch.where(order == turn, own**2, (order < turn).to(u))
    return t, torch.where(order == turn, 2 * own * count, 0.0)


@torch.no_grad()
def bits_per_token(nets, kind, x0, label, vocab, generator, p_uniform=0.1, most=2**24, process=None, given=None,
                   frames=1):
    """Upper bounds on -log2 p(x0) / N, one level for each sequence: t = u^2, u stratified on (0, 1), weight 2u.

    nets {name: net}, kind as in samplers.FITS, x0 (n, N), label (n,), given (n, N) bool: tokens that are known and not
    counted; process: of a forcing run, which also has a bound frame by frame  ->  {bound: (bits, standard error)}
    """
    n, n_tokens = x0.shape
    u = ((torch.arange(n) + torch.rand(n, generator=generator)) / n).to(x0.device, torch.float64)[:, None]
    order, rows = torch.randperm(n, generator=generator), {}
    process = process or {"maskd": "mask", "gidd": "hybrid"}.get(kind, "uniform")
    free = torch.ones_like(x0, dtype=torch.bool) if given is None else ~given
    paths = ("shared", "frames") if kind == "forcing" and frames > 1 else ("shared",)
    for i in torch.arange(n).split(max(1, min(64, most // (n_tokens * vocab)))):
        x0_, label_, free_ = x0[order[i]], label[order[i]], free[order[i]]
        for name in paths:
            t, rise = path(name, u[i], n_tokens, frames)
            level = (t.clamp(1e-8, 1 - 1e-8) if name == "shared" else t) * free_
            x = corrupt(x0_.cpu(), level.cpu(), process, vocab, generator, p_uniform)[0].to(x0.device)
            t_ = t[:, :1].clamp(1e-8, 1 - 1e-8)
            logits = nets["denoiser"](x, (level if kind == "forcing" else t_).float(), label_).double()
            q = logits.softmax(-1)
            if kind in ("gidd", "forcing"):
                target, z, at = (y.flatten() for y in (x0_, x, level.clamp(1e-8, 1 - 1e-8)))
                weight = gidd_weight(target, z, at, vocab, p_uniform, "elbo", process)
                nats = gidd_loss(logits.flatten(0, 1), target, z, at, weight, p_uniform, process).view(x.shape)
                seen = {name if kind == "forcing" else "gidd": nats}
            elif kind == "maskd":
                seen = {"masked": masked_bound(q, x, x0_, t_)}
            else:
                if kind == "single":
                    p, q = from_self(q, x, t_)
                else:
                    p = nets["planner"](x, t_.float(), label_).double().sigmoid()
                seen = {"renoise": renoise_bound(p, q, x, x0_, t_), "leap": leap_bound(p, q, x, x0_, t_)}
            for bound, nats in seen.items():
                rows.setdefault(bound, []).append((rise * torch.where(free_, nats, 0.0)).sum(1))
    out, unit = {}, free.sum(1).double().mean() * math.log(2)
    for name, parts in rows.items():
        y = torch.cat(parts) / unit
        pairs = y[: n - n % 2].view(-1, 2).diff(dim=1)                  # neighbouring strata differ by noise alone
        out[name] = (y.mean().item(), pairs.square().sum().sqrt().item() / n)
    return out
