"""Forward processes: what noise does to tokens.   t in [0, 1] is the noise level: 0 data, 1 noise; (B, 1) or (B, N)."""

import math

import torch


def fates(t, process, p_uniform=0.1):
    """P(keep), P(mask), P(redrawn uniformly) of a token at level t; they sum to 1.   hybrid: arXiv:2503.04482"""
    zero = torch.zeros_like(t)
    if process == "uniform":
        return 1 - t, zero, t
    if process == "mask":
        return 1 - t, t, zero
    if process == "hybrid":
        c = 2 * p_uniform / (1 - p_uniform) * (t * (1 - t)).sqrt()
        return (1 - t) / (1 + c), t / (1 + c), c / (1 + c)
    raise ValueError(f"process {process!r} is not one of uniform, mask, hybrid")


def corrupt(x0, t, process, vocab, generator, p_uniform=0.1):
    """Sample q(x_t | x_0), every token on its own.

    x0 (B, N) int64 in [0, V),  t (B, 1) or (B, N)  ->  xt (B, N) in [0, V],  is_noise (B, N) bool
    """
    keep, mask, _ = fates(t, process, p_uniform)
    u = torch.rand(x0.shape, generator=generator, device=x0.device)
    noise = torch.randint(vocab, x0.shape, generator=generator, device=x0.device)   # may redraw x0 itself: still noise
    return torch.where(u < keep, x0, torch.where(u < keep + mask, vocab, noise)), u >= keep


def stratified_t(n, generator, device="cpu"):
    """n noise levels, each uniform on [1e-4, 1 - 1e-4], one in every nth of it.  -> (n, 1)"""
    u = torch.rand(n, 1, generator=generator, device=device)
    order = torch.randperm(n, generator=generator, device=device)[:, None]
    return ((order + u) / n).clamp(1e-4, 1 - 1e-4)


def planner_floor(vocab):
    """Least planner BCE in nats, even with x0 known: a token redrawn as itself looks like one that was kept."""
    t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    looks_clean = 1 - t + t / vocab
    p = t / vocab / looks_clean                                         # P(noise | looks clean)
    entropy = -(p * p.log() + (1 - p) * (1 - p).log())
    return (looks_clean * entropy).mean().item()


BLIND = math.log(2)         # planner BCE in nats of a constant 1/2
LEVEL_ONLY = 0.5            # planner BCE in nats of one that reads only the level: mean entropy of a coin of bias t


def from_self(probs, x, t):
    """Split a self-prediction on uniform noise into planner and denoiser (design of one network as both).

    probs (B, N, V) = p(x0 | x_t), x (B, N), t (B, 1)  ->  p_noise (B, N), others (B, N, V) = p(x0 | x_t, noise here)
    """
    keep, _, uniform = fates(t, "uniform")
    c = (keep / (keep + uniform / probs.shape[-1]))                     # P(kept | x_t, x0 = x_t)
    at_x = probs.gather(-1, x[..., None])                               # (B, N, 1)
    p_noise = 1 - c * at_x[..., 0]
    others = probs.scatter(-1, x[..., None], (1 - c)[..., None] * at_x)
    return p_noise, others / others.sum(-1, keepdim=True).clamp_min(1e-30)
