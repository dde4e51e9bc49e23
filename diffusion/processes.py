"""Forward processes: what noise does to tokens, and the posteriors that undo it.

The noise level t lies in [0, 1], 0 is data and 1 is noise; it has shape (B, 1) or (B, N).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.randomness import Random, integers, uniform

T_MIN = 1e-4            # networks are trained at levels in [T_MIN, T_MAX]
T_MAX = 1 - 1e-4


class Process(NamedTuple):
    """q(x_t | x_0) = P(keep) [x_0] + P(mask) [mask] + P(redraw) R(. | x_0), every token on its own.

    A new process is a row of PROCESSES, and its name among the choices of config.MethodOptions. At
    t = 1 all tokens must be masks, or all uniform. Planned denoising needs P(keep) = 1 - t.
    """
    weights: Callable                   # (t, p_uniform) -> weights of keep, mask, redraw; their sum
    # R: (x0, t, vocab, generator) -> ids; None: uniform over all ids
    redraw: Callable | None = None
    starts_masked: bool = False         # pure noise is all masks; otherwise uniform ids
    # redraw / keep is proportional to (t / (1 - t)) ** odds_power: read by gidd.token_weights
    odds_power: float = 1.0
    # samplers step through u ** level_power, u evenly spaced: finer near 0 where redraws grow fast
    level_power: float = 1.0


def mask_weights(t: Tensor, p_uniform: float):
    return 1 - t, t, torch.zeros_like(t), 1


def uniform_weights(t: Tensor, p_uniform: float):
    return 1 - t, torch.zeros_like(t), t, 1


def hybrid_weights(t: Tensor, p_uniform: float):
    """GIDD (arXiv:2503.04482) with gamma = 1: at t = 1/2 a token is redrawn with P = p_uniform."""
    redraw = 2 * p_uniform / (1 - p_uniform) * (t * (1 - t)).sqrt()
    return 1 - t, t, redraw, 1 + redraw


PROCESSES = {
    "mask": Process(mask_weights, starts_masked=True, odds_power=0.5),      # hybrid at p_uniform 0
    "uniform": Process(uniform_weights),
    "hybrid": Process(hybrid_weights, starts_masked=True, odds_power=0.5, level_power=2),
}


@dataclass(frozen=True)
class Noise:
    """A forward process on V data tokens. The mask id is V: an input, never an output class."""
    process: str                        # a row of PROCESSES
    vocab: int
    p_uniform: float = 0.0              # read by the weights of "hybrid"

    def __post_init__(self):
        if self.process not in PROCESSES:
            raise ValueError(f"process {self.process!r} is not one of {', '.join(PROCESSES)}")

    @property
    def row(self) -> Process:
        return PROCESSES[self.process]

    @property
    def only_masks(self) -> bool:
        """Is nothing ever redrawn?"""
        _, _, redraw, _ = self.row.weights(torch.tensor(0.5), self.p_uniform)
        return redraw.item() == 0

    @property
    def has_posterior(self) -> bool:
        """The closed forms below hold where a redrawn token is uniform."""
        return self.row.redraw is None

    def without_masks(self) -> "Noise":
        """What a planner sees: the same noise, or uniform noise in place of masks."""
        return replace(self, process="uniform", p_uniform=0.0) if self.row.starts_masked else self

    def sample_prior(self, shape: tuple, generator: Random, device="cpu") -> Tensor:
        """Pure noise, t = 1.  -> int64 of this shape"""
        if self.row.starts_masked:
            return torch.full(shape, self.vocab, device=device)
        return integers(self.vocab, shape, generator, device)

    def levels(self, n_steps: int) -> Tensor:
        """The levels of a sampler with n_steps steps, from 1 to 0.  -> (n_steps + 1,)"""
        return self.spaced(torch.tensor([1 - step / n_steps for step in range(n_steps + 1)]))

    def spaced(self, even: Tensor) -> Tensor:
        """Evenly spaced u in [0, 1]  ->  the levels at which samplers of this process step."""
        return even**self.row.level_power


def transition_probs(t: Tensor, noise: Noise) -> tuple[Tensor, Tensor, Tensor]:
    """P(keep), P(mask), P(redraw) of a token at level t; they sum to 1.  Each of t's shape."""
    keep, mask, redraw, total = noise.row.weights(t, noise.p_uniform)
    return keep / total, mask / total, redraw / total


def corrupt(
    x0: Tensor, t: Tensor, noise: Noise, generator: Random | None,
) -> tuple[Tensor, Tensor]:
    """Sample q(x_t | x_0), every token on its own.

    x0 (B, N) int64 in [0, V),  t (B, 1) or (B, N)  ->  xt (B, N) in [0, V],  is_noise (B, N) bool
    """
    keep, mask, _ = transition_probs(t, noise)
    u = uniform(x0.shape, generator, x0.device)
    if noise.row.redraw is None:                        # may redraw x0 itself: still noise
        redrawn = integers(noise.vocab, x0.shape, generator, x0.device)
    else:
        redrawn = noise.row.redraw(x0, t, noise.vocab, generator)
    noisy = torch.where(u < keep + mask, noise.vocab, redrawn)
    return torch.where(u < keep, x0, noisy), u >= keep


def stratified_t(n: int, generator: torch.Generator, device="cpu") -> Tensor:
    """n noise levels, one uniform draw in each of n equal intervals, shuffled.  -> (n, 1)"""
    u = torch.rand(n, 1, generator=generator, device=device)
    order = torch.randperm(n, generator=generator, device=device)[:, None]
    return ((order + u) / n).clamp(T_MIN, T_MAX)


def flip_rate_to_level(rate: float, noise: Noise) -> float:
    """The noise level at which this share of the visible tokens is wrong, rate < 1 - 1/V."""
    if noise.only_masks:
        raise ValueError(
            "with mask noise a visible token is certain at every level: there is no level to tell"
        )
    if not 0 <= rate < 1 - 1 / noise.vocab:
        raise ValueError(f"a rate of {rate} wrong tokens must lie in [0, 1 - 1/{noise.vocab})")
    low, high = 0.0, 1.0
    for _ in range(60):                                 # bisection: the rate rises with t
        middle = (low + high) / 2
        keep, _, redraw = transition_probs(torch.tensor(middle, dtype=torch.float64), noise)
        if redraw * (1 - 1 / noise.vocab) / (keep + redraw) < rate:
            low = middle
        else:
            high = middle
    return low


# The planner's losses that are known in advance, nats per token under uniform noise

PLANNER_BCE_CONSTANT = math.log(2)      # of a constant 1/2
PLANNER_BCE_LEVEL_ONLY = 0.5            # reading the level alone: mean entropy of a coin of bias t


def planner_bce_floor(vocab: int) -> float:
    """Least planner BCE even with x0 known: a token redrawn as itself looks kept."""
    t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    p_looks_clean = 1 - t + t / vocab
    p_noise = t / vocab / p_looks_clean                 # given that it looks clean
    entropy = -(p_noise * p_noise.log() + (1 - p_noise) * (1 - p_noise).log())
    return (p_looks_clean * entropy).mean().item()


# Predictions and posteriors
#
# There are two predictions of a token, not to be confused. An x0-prediction p(x0 | x_t) has seen
# the token itself. A leave-one-out prediction p(x0 | all other tokens) has not; under uniform noise
# it equals p(x0 | x_t, this token is noise). They agree at masks.


def require_posterior(noise: Noise) -> None:
    if not noise.has_posterior:
        raise ValueError(
            f"process {noise.process} redraws by x0 and has no closed-form posterior: it needs a "
            "planner, and sampler ddpd"
        )


def to_leave_one_out(probs: Tensor, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
    """Divide the token's own evidence out of an x0-prediction.

    probs (B, N, V) = p(x0 | x_t),  x (B, N),  t (B, 1) or (B, N)
    ->  (B, N, V) = p(x0 | x_t, noise here)
    """
    require_posterior(noise)
    keep, _, redraw = transition_probs(t, noise)
    vocab = probs.shape[-1]
    redraw = redraw / vocab
    ratio = (redraw / (keep + redraw))[..., None]       # p(x_t | x0 != x_t) / p(x_t | x0 = x_t)
    is_mask = (x == vocab)[..., None]
    ratio = torch.where(is_mask, 1.0, ratio)            # a mask is no evidence
    at_x = x.clamp_max(vocab - 1)[..., None]
    leave_one_out = probs.scatter(-1, at_x, ratio * probs.gather(-1, at_x))
    total = leave_one_out.sum(-1, keepdim=True)         # 0 where a visible token is certain
    return torch.where(total > 0, leave_one_out / total.clamp_min(1e-30), probs)


def split_planner_denoiser(
    probs: Tensor, x: Tensor, t: Tensor, noise: Noise,
) -> tuple[Tensor, Tensor]:
    """One network as both: the planner and denoiser behind an x0-prediction on uniform noise.

    probs (B, N, V) = p(x0 | x_t),  x (B, N),  t (B, 1)
    ->  p_noise (B, N),  (B, N, V) = p(x0 | x_t, noise here)
    """
    keep, _, redraw = transition_probs(t, noise)
    p_kept = keep / (keep + redraw / probs.shape[-1])   # P(kept | x_t, x0 = x_t)
    p_at_x = probs.gather(-1, x[..., None])[..., 0]
    return 1 - p_kept * p_at_x, to_leave_one_out(probs, x, t, noise)


def posterior_noise_prob(p_at_x: Tensor, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
    """p(noise | x_t), from the leave-one-out probability p_at_x of the current token.  -> (B, N)"""
    require_posterior(noise)
    keep, _, redraw = transition_probs(t, noise)
    redraw = (redraw / noise.vocab).expand(x.shape)
    p_noise = redraw / (keep * p_at_x + redraw).clamp_min(1e-30)
    return torch.where(x == noise.vocab, 1.0, p_noise)


def posterior_keep_prob(p_at_x: Tensor, x: Tensor, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
    """The weight w in q(x_s | x_t, p) = w [x_s = x_t] + (1 - w) q_s(x_s | p), for a level s < t.

    p_at_x (B, N): leave-one-out probability of x, anything at masks; t and s may differ by token
    ->  w (B, N)
    """
    require_posterior(noise)
    keep_t, mask_t, redraw_t = transition_probs(t, noise)
    keep_s, mask_s, redraw_s = transition_probs(s, noise)
    is_mask = x == noise.vocab
    keep_ts = torch.where(keep_s > 0, keep_t / keep_s.clamp_min(1e-30), 1.0)    # from s to t
    noise_t = torch.where(is_mask, mask_t, redraw_t / noise.vocab)              # P(x by noise) at t
    noise_s = torch.where(is_mask, mask_s, redraw_s / noise.vocab)
    clean_s = torch.where(is_mask, 0.0, keep_s * p_at_x)
    was_x = keep_ts * (clean_s + noise_s)                       # it was x at s already
    became_x = (noise_t - keep_ts * noise_s).clamp_min(0)      # it became x between s and t
    total = was_x + became_x
    return torch.where(total > 0, was_x / total.clamp_min(1e-30), 1.0)


def sample_posterior(
    draws: Tensor, p_at_x: Tensor, x: Tensor, t: Tensor, s: Tensor, noise: Noise,
    generator: Random,
) -> Tensor:
    """One draw of q(x_s | x_t, p) from draws (B, N) of p.  -> x_s (B, N)"""
    fresh, _ = corrupt(draws, s, noise, generator)
    u = uniform(x.shape, generator, x.device)
    return torch.where(u < posterior_keep_prob(p_at_x, x, t, s, noise), x, fresh)
