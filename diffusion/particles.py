"""Sequential Monte Carlo: groups of sequences that target p(x) exp(weight * reward(x))."""

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.decoding import sample_categorical


class Particles:
    """Groups of n consecutive rows, weighted by a reward that becomes clearer step by step.

    reward: clean tokens (B, N) -> (B,); its expectation is a mean over n_draws predictions
    """

    def __init__(
        self, reward: Callable, weight: float, n: int, n_draws: int, x: Tensor,
        generator: torch.Generator,
    ):
        self.reward = reward
        self.weight = weight
        self.n = n
        self.n_draws = n_draws
        # of each row, as it was when the row was last resampled
        self.counted_reward = torch.zeros(len(x), device=x.device)
        # a separate generator, so that SMC leaves the sampler's stream unchanged
        seed = generator.initial_seed() + 1
        self.generator = torch.Generator(x.device).manual_seed(seed)

    def expected_reward(
        self, x: Tensor, seen: slice, probs: Tensor, p_noise: Tensor, n_tokens: int,
    ) -> Tensor:
        """Mean reward of x with the tokens at `seen` replaced by predictions where they are noise.

        x (B, N), of which the first n_tokens are rewarded; probs (B, n, V) and p_noise (B, n) of
        the tokens seen  ->  (B,)
        """
        total = torch.zeros(len(x), device=x.device)
        for _ in range(self.n_draws):
            u = torch.rand(p_noise.shape, generator=self.generator, device=x.device)
            draws = sample_categorical(probs, self.generator)
            clean = torch.where(x < probs.shape[-1], x, self.uniform_ids(x, probs.shape[-1]))
            clean[:, seen] = torch.where(u < p_noise, draws, x[:, seen])
            total += self.reward(clean[:, :n_tokens])
        return total / self.n_draws

    def reweight_and_resample(self, reward: Tensor, always: bool = False) -> Tensor:
        """Weight rows by what their reward (B,) has gained since they were last resampled, and
        resample; the whole run then targets exp(weight * final reward).  -> rows (B,) to keep"""
        gain = reward - self.counted_reward
        log_weights = self.weight * gain if self.weight else torch.zeros_like(gain)  # 0 * inf: NaN
        rows, is_resampled = resample(log_weights, self.n, self.generator, always)
        self.counted_reward = torch.where(is_resampled, reward[rows], self.counted_reward)
        return rows

    def uniform_ids(self, x: Tensor, vocab: int) -> Tensor:
        """They stand for the masks of frames that are not seen yet: rewards take no masks."""
        return torch.randint(vocab, x.shape, generator=self.generator, device=x.device)


def resample(
    log_weights: Tensor, n_particles: int, generator: torch.Generator, always: bool = False,
) -> tuple[Tensor, Tensor]:
    """Systematic resampling of the groups whose effective sample size is under half.

    log_weights (B,), groups of n_particles rows; always: of all groups whose weights differ
    ->  rows (B,) to keep, is_resampled (B,) bool
    """
    groups = log_weights.view(-1, n_particles)
    if (groups.amax(1) == -torch.inf).any():
        group = int((groups.amax(1) == -torch.inf).nonzero()[0])
        raise ValueError(f"every particle of group {group} has reward -inf: nothing to go on from")
    w = groups.double().softmax(1)
    if always:
        is_resampled = groups.amax(1) > groups.amin(1)
    else:
        is_resampled = w.square().sum(1).reciprocal() < n_particles / 2
    own = torch.arange(n_particles, device=w.device)
    u = torch.rand(len(w), 1, dtype=torch.float64, generator=generator, device=w.device)
    points = (u + own) / n_particles
    chosen = torch.searchsorted(w.cumsum(1).clamp_max(1), points).clamp_max(n_particles - 1)
    start_of_group = torch.arange(len(w), device=w.device)[:, None] * n_particles
    rows = torch.where(is_resampled[:, None], chosen, own) + start_of_group
    return rows.flatten(), is_resampled.repeat_interleave(n_particles)
