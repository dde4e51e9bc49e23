"""Forward processes: what noise does to tokens.   t in [0, 1] is the noise level: 0 data, 1 noise; (B, 1) or (B, N)."""

import math

import torch

T_MIN, T_MAX = 1e-4, 1 - 1e-4   # the noise levels that networks are trained at


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
    """n noise levels, each uniform on [T_MIN, T_MAX], one in every nth of it.  -> (n, 1)"""
    u = torch.rand(n, 1, generator=generator, device=device)
    order = torch.randperm(n, generator=generator, device=device)[:, None]
    return ((order + u) / n).clamp(T_MIN, T_MAX)


def staircase(steps, frames, lag, block=1):
    """Noise levels of a rollout: blocks of frames fall from 1 to 0 in `steps` rows each, `lag` rows after one another.

    lag 0: the full sequence at once; lag = steps: autoregressive; between: the pyramid (arXiv:2407.01392, fig. 3).
    -> (steps + lag (blocks - 1) + 1, frames)
    """
    if min(steps, frames, block) < 1 or lag < 0:
        raise ValueError(f"steps {steps}, frames {frames}, block {block} must be at least 1, lag {lag} not negative")
    late = lag * (torch.arange(frames) // block)                        # the row at which a frame begins to fall
    row = torch.arange(steps + int(late[-1]) + 1)[:, None]
    return (1 - (row - late) / steps).clamp(0, 1)


def draw_levels(n, frames, group, staircase_share, generator, context=0):
    """Noise levels for training, and which frames wait: a rollout asks nothing of them.  -> (n, frames), bool of that

    group  "frame" or "token": each on its own, a share of rows as a rollout has them; "shared": one level for all but
           the `context` frames, which are clean; "next": frame by frame only
    Rows of tokens are flat. Rows of frames are those of staircases of any lag, mostly long ones, after `context` or
    more finished frames. What independent draws hardly ever have: in half of these rows the first frame that falls is
    unseen, in which what comes after is learned; the past may begin late, frames before it at level 1 as if unknown
    (histories of any length: arXiv:2502.06764); and for "frame" it is a little noisy in a tenth of them.
    """
    free, nobody = torch.rand(n, frames, generator=generator), torch.zeros(n, frames, dtype=torch.bool)
    order = torch.arange(frames)
    if group == "shared":
        is_given = (order < context).expand(n, frames)
        return stratified_t(n, generator).expand(n, frames).masked_fill(is_given, 0), is_given
    u, is_unseen, slope, first, start, past = torch.rand(6, n, 1, generator=generator)
    is_row = u < (1.0 if group == "next" else staircase_share)
    if group == "token":
        return torch.where(is_row, free[:, :1], free), nobody
    slope = torch.ones_like(slope) if group == "next" else (5 * slope ** (1 / 3)).floor() / 4  # lag / steps
    past = torch.zeros_like(past) if group == "next" else (past - 0.9).clamp_min(0)
    first = context + ((frames - context) * first).floor()              # the first that falls
    fallen = torch.where(is_unseen < 0.5, 0.0, free[:, :1]) - slope * (order - first)
    stairs = torch.where(order < first, past, (1 - fallen).clamp(0, 1))
    stairs = stairs.masked_fill(order < ((first - context + 1) * start).floor(), 1)
    return torch.where(is_row, stairs, free), is_row & ((order < first) | (fallen < 0))


def level_of_flips(share, vocab, process, p_uniform=0.1):
    """The noise level at which a share of the visible tokens is wrong: what to tell of such an observation."""
    if process == "mask" or (process == "hybrid" and p_uniform == 0):
        raise ValueError("with mask noise a visible token is certain at every level: there is no level to tell")
    if not 0 <= share < 1 - 1 / vocab:
        raise ValueError(f"{share} wrong tokens; it must lie in [0, 1 - 1/{vocab})")
    low, high = 0.0, 1.0
    for _ in range(60):                                                 # the share rises with t
        t = torch.tensor((low + high) / 2, dtype=torch.float64)
        keep, _, uniform = fates(t, process, p_uniform)
        is_low = uniform * (1 - 1 / vocab) / (keep + uniform) < share
        low, high = (t.item(), high) if is_low else (low, t.item())
    return low


def planner_floor(vocab):
    """Least planner BCE in nats, even with x0 known: a token redrawn as itself looks like one that was kept."""
    t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    looks_clean = 1 - t + t / vocab
    p = t / vocab / looks_clean                                         # P(noise | looks clean)
    entropy = -(p * p.log() + (1 - p) * (1 - p).log())
    return (looks_clean * entropy).mean().item()


BLIND = math.log(2)         # planner BCE in nats of a constant 1/2
LEVEL_ONLY = 0.5            # planner BCE in nats of one that reads only the level: mean entropy of a coin of bias t


# What a prediction p = p(x0 | ...) of a token says. p comes from the token itself ("self": p(x0 | x_t)) or from the
# others (p(x0 | all tokens but this) = p(x0 | x_t, noise here)); at masks they agree.


def from_others(probs, x, t, process="uniform", p_uniform=0.1):
    """The others-prediction behind a self-prediction: the token's own evidence is divided out.

    probs (B, N, V) = p(x0 | x_t), x (B, N), t (B, 1) or (B, N)  ->  (B, N, V) = p(x0 | x_t, noise here)
    """
    keep, _, uniform = fates(t, process, p_uniform)
    redrawn = uniform / probs.shape[-1]
    own = (redrawn / (keep + redrawn))[..., None]                       # evidence of x0 = other over x0 = x_t
    at_x = x.clamp_max(probs.shape[-1] - 1)[..., None]
    own = torch.where((x == probs.shape[-1])[..., None], 1.0, own)      # a mask says nothing
    others = probs.scatter(-1, at_x, own * probs.gather(-1, at_x))
    total = others.sum(-1, keepdim=True)
    return torch.where(total > 0, others / total.clamp_min(1e-30), probs)   # without uniform noise a token is certain


def from_self(probs, x, t):
    """Split a self-prediction on uniform noise into planner and denoiser: one network as both.

    probs (B, N, V) = p(x0 | x_t), x (B, N), t (B, 1)  ->  p_noise (B, N), others (B, N, V) = p(x0 | x_t, noise here)
    """
    keep, _, uniform = fates(t, "uniform")
    c = keep / (keep + uniform / probs.shape[-1])                       # P(kept | x_t, x0 = x_t)
    return 1 - c * probs.gather(-1, x[..., None])[..., 0], from_others(probs, x, t)


def noise_of(p_at_x, x, t, process, vocab, p_uniform=0.1):
    """p(noise | x_t) by an others-prediction whose probability of the token at hand is p_at_x (B, N).  -> (B, N)"""
    keep, _, uniform = fates(t, process, p_uniform)
    redrawn = (uniform / vocab).expand(x.shape)
    return torch.where(x == vocab, 1.0, redrawn / (keep * p_at_x + redrawn).clamp_min(1e-30))


def marginal(probs, t, process, p_uniform=0.1):
    """q_t(. | p) = P(keep) p + P(mask) [mask] + P(uniform) / V.  probs (B, N, V) -> (B, N, V + 1)"""
    keep, mask, uniform = (y[..., None] for y in fates(t, process, p_uniform))
    return torch.cat([keep * probs + uniform / probs.shape[-1], mask.expand(*probs.shape[:-1], 1)], -1)


def stay(p_at_x, x, t, s, process, vocab, p_uniform=0.1):
    """Posterior of a token at level s < t: q(x_s | x_t, p) = stay [x_s = x_t] + (1 - stay) q_s(x_s | p), p from others.

    p_at_x (B, N): its probability of x (anything at masks); t and s may differ from token to token  ->  stay (B, N)
    """
    (keep_t, mask_t, uniform_t), (keep_s, mask_s, uniform_s) = (fates(y, process, p_uniform) for y in (t, s))
    is_mask = x == vocab
    alpha = torch.where(keep_s > 0, keep_t / keep_s.clamp_min(1e-30), 1.0)              # P(keep) from s to t
    noise_t, noise_s = (torch.where(is_mask, m, u / vocab) for m, u in ((mask_t, uniform_t), (mask_s, uniform_s)))
    same = alpha * (torch.where(is_mask, 0.0, keep_s * p_at_x) + noise_s)               # it was x at s already
    other = (noise_t - alpha * noise_s).clamp_min(0)                                    # it fell to x since
    return torch.where(same + other > 0, same / (same + other).clamp_min(1e-30), 1.0)


def draw_posterior(draws, p_at_x, x, t, s, process, vocab, generator, p_uniform=0.1):
    """One draw of q(x_s | x_t, p), where draws (B, N) are of p.  -> x_s (B, N)"""
    fresh, _ = corrupt(draws, s, process, vocab, generator, p_uniform)
    keeps = torch.rand(x.shape, generator=generator, device=x.device) < stay(p_at_x, x, t, s, process, vocab, p_uniform)
    return torch.where(keeps, x, fresh)
