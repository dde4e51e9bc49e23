"""Diffusion Forcing (arXiv:2407.01392): a noise level for each frame or token."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.decoding import (
    Decoding,
    State,
    cfg_logits,
    check_at_least,
    editable_mask,
    gather_at,
    sample_categorical,
    truncate_probs,
)
from diffusion.gidd import gidd_tasks
from diffusion.objectives import Task
from diffusion.particles import Particles
from diffusion.processes import Noise, posterior_noise_prob, sample_posterior, stratified_t
from diffusion.randomness import Random, integers

# Levels


def scheduling_matrix(n_steps: int, n_frames: int, lag: int, block: int = 1) -> Tensor:
    """Noise level of each frame before each step and at the end: blocks of frames fall from 1 to 0,
    each `lag` steps after the one before it.

    lag 0: the full sequence at once; lag = n_steps: autoregressive; between: the pyramid
    (arXiv:2407.01392, fig. 3)  ->  (n_steps + lag * (blocks - 1) + 1, n_frames)
    """
    if min(n_steps, n_frames, block) < 1 or lag < 0:
        raise ValueError(
            f"n_steps {n_steps}, n_frames {n_frames}, block {block} must be at least 1, "
            f"and lag {lag} not negative"
        )
    first_row = lag * (torch.arange(n_frames) // block)  # from which a frame falls
    row = torch.arange(n_steps + int(first_row[-1]) + 1)[:, None]
    return (1 - (row - first_row) / n_steps).clamp(0, 1)


def rollout_levels(
    grid: list[int], n_steps: int, frames: int = 0, lag: int = -1, context_frames: int = 0,
) -> Tensor:
    """The scheduling matrix of a rollout, with context frames at level 0.  -> (R, F)

    frames  in all, 0: as many as the grid has; a grid that is no video is one frame
    lag     -1: frame by frame; 0: all frames together, one window after another
    """
    if len(grid) != 3:
        return scheduling_matrix(n_steps, 1, 0)
    context_frames = min(context_frames, grid[0] - 1)
    n_made = (frames or grid[0]) - context_frames
    if n_made < 1:
        raise ValueError(f"{frames} frames are no more than the {context_frames} that are given")
    n_in_window = min(n_made, grid[0] - context_frames)
    block = n_in_window if lag == 0 else 1
    levels = scheduling_matrix(n_steps, n_made, n_steps if lag < 1 else lag, block)
    return torch.cat([levels.new_zeros(len(levels), context_frames), levels], 1)


def draw_levels(
    n: int, n_frames: int, granularity: str, rollout_share: float, generator: torch.Generator,
    context_frames: int = 0,
) -> tuple[Tensor, Tensor]:
    """Noise levels for training, and which frames enter the loss.  -> two (n, n_frames)

    granularity  "frame": independent levels, except in a share rollout_share of the rows, which are
                 like rows of a rollout; "token": the same, n_frames being the number of tokens, and
                 rollouts having one level for all; "shared": one level for all frames after the
                 context, which is clean; "next": rows of frame-by-frame rollouts only
    """
    independent = torch.rand(n, n_frames, generator=generator)
    order = torch.arange(n_frames)
    if granularity == "shared":
        is_context = (order < context_frames).expand(n, n_frames)
        levels = stratified_t(n, generator).expand(n, n_frames)
        return levels.masked_fill(is_context, 0), ~is_context

    u_rollout, *draws = torch.rand(6, n, 1, generator=generator)
    is_rollout = u_rollout < (1.0 if granularity == "next" else rollout_share)
    if granularity == "token":
        levels = torch.where(is_rollout, independent[:, :1], independent)
        return levels, torch.ones(n, n_frames, dtype=torch.bool)
    levels, enters_loss = draw_rollout_rows(
        independent[:, :1], draws, n_frames, granularity, context_frames
    )
    return torch.where(is_rollout, levels, independent), ~is_rollout | enters_loss


def draw_rollout_rows(
    u_progress: Tensor, draws: list[Tensor], n_frames: int, granularity: str, context_frames: int,
) -> tuple[Tensor, Tensor]:
    """Rows of scheduling matrices of any lag, from uniform draws (n, 1).  -> as draw_levels

    Independent levels hardly ever show what a rollout asks for: exact zeros and ones beside each
    other. Here frames fall after `context_frames` or more finished ones, the past. In half of the
    rows the first falling frame is still at level 1. The past may begin late, with the frames
    before it at level 1 as if unknown (histories of any length: arXiv:2502.06764), and for "frame"
    it is a little noisy in a tenth of the rows. Only frames that are falling, or about to, enter
    the loss.
    """
    u_unseen, u_lag, u_first, u_start, u_past = draws
    order = torch.arange(n_frames)
    if granularity == "next":
        lag = torch.ones_like(u_lag)
        past_level = torch.zeros_like(u_past)
    else:
        lag = (5 * u_lag ** (1 / 3)).floor() / 4        # over n_steps: 0, 1/4, ..., 1; 1 in half
        past_level = (u_past - 0.9).clamp_min(0)
    first_falling = context_frames + ((n_frames - context_frames) * u_first).floor()
    past_start = ((first_falling - context_frames + 1) * u_start).floor()
    progress_of_first = torch.where(u_unseen < 0.5, 0.0, u_progress)
    progress = progress_of_first - lag * (order - first_falling)
    levels = torch.where(order < first_falling, past_level, (1 - progress).clamp(0, 1))
    levels = levels.masked_fill(order < past_start, 1)
    return levels, (order >= first_falling) & (progress >= 0)


def forcing_tasks(
    x0: Tensor, levels: Tensor, loss_mask: Tensor | None, label: Tensor, noise: Noise,
    generator: torch.Generator, known: Tensor | None = None, *, weight: str = "none",
    clean_token_rate: float = 1.0,
) -> dict[str, Task]:
    """GIDD's loss with a level for each frame, which is an input of the denoiser.

    x0 (B, N), levels and loss_mask (B, F), F frames of N / F tokens  ->  {network: Task}
    """
    frame_size = x0.shape[1] // levels.shape[1]
    t = levels.repeat_interleave(frame_size, 1)
    if known is not None:
        t = t.masked_fill(known, 0)
    if loss_mask is not None:
        loss_mask = loss_mask.repeat_interleave(frame_size, 1)
    return gidd_tasks(
        x0, t, label, noise, generator, known, weight=weight, clean_token_rate=clean_token_rate,
        loss_mask=loss_mask,
    )


# Rollouts


@torch.no_grad()
def rollout(
    denoiser: Callable, x: Tensor, label: Tensor, levels: Tensor, *, generator: Random,
    process: str = "hybrid", vocab: int | None = None, p_uniform: float = 0.1,
    known: Tensor | None = None, window: int = 0, stabilization_level: float = 0.0,
    context_level: float = 0.0, kv_cache=None, reward: Callable | None = None,
    reward_weight: float = 1.0, particles: int = 1, n_draws: int = 1, **decoding,
) -> Iterator[State]:
    """Denoise frames along the rows of a scheduling matrix, by the posterior at each token's level.

    x (B, N) pure noise but for known tokens, levels (R, F) as of rollout_levels, F frames of N / F
    tokens  ->  yields State, one for each step in which frames fall
    window     frames that the denoiser sees, 0: all; it slides, with the latest falling frame at
               its end. If there are fewer frames, it is filled up with noise that is dropped again
    stabilization_level, context_level   noise levels that the denoiser is given for finished frames
               and for known tokens, so that it may distrust them
    kv_cache   of a causal denoiser: finished frames are computed once
    reward     clean tokens (B, N) -> (B,): sample p(x) exp(reward_weight reward(x)) by sequential
               Monte Carlo. Rows are groups of `particles` with one label and one `known` each; the
               reward is expected over n_draws predictions (particles.py)
    """
    options = Decoding(**decoding)
    noise = Noise(process, int(x.max()) if vocab is None else vocab, p_uniform)
    check_at_least(window=(window, 0), particles=(particles, 1), n_draws=(n_draws, 1))
    check_told_levels(noise, stabilization_level, context_level)
    check_rollout(x, levels, noise, vocab, window, particles)
    check_reward(reward, generator, kv_cache, options)

    n_tokens = x.shape[1]
    editable = editable_mask(x, known)
    x, editable, levels = pad_to_window(x, editable, levels, window, noise, generator)
    window = window or levels.shape[1]
    told = ToldLevels(stabilization_level, context_level)
    swarm = Particles(reward, reward_weight, particles, n_draws, x, generator) if reward else None
    steps = [i for i in range(len(levels) - 1) if (levels[i] > levels[i + 1]).any()]
    nfe = torch.zeros_like(label)
    if not steps:                                       # all is known
        nothing = torch.zeros(len(x), n_tokens, device=x.device)
        yield State(x[:, :n_tokens], nothing, nothing.bool(), nothing[:, 0], nfe)
    for i in steps:
        view = view_of_step(levels[i], levels[i + 1], window, kv_cache, editable, told)
        guess = predict(denoiser, x[:, view.seen], label, view, noise, options, kv_cache)
        nfe = nfe + guess.calls
        if swarm:
            expected = swarm.expected_reward(x, view.seen, guess.probs, guess.p_noise, n_tokens)
            rows = swarm.reweight_and_resample(expected)
            x = x[rows]
            guess = guess.of_rows(rows)

        before = x.clone()
        x[:, view.seen][:, view.falling] = draw_falling(x[:, view.seen], guess, view, generator)
        written = x != before
        p_noise = torch.zeros(x.shape, device=x.device)
        p_noise[:, view.seen] = guess.p_noise
        if swarm and i == steps[-1]:
            rows = swarm.reweight_and_resample(reward(x[:, :n_tokens]), always=True)
            x, p_noise, written = (y[rows] for y in (x, p_noise, written))
        mean_t = view.t.sum(1) / (view.t > 0).sum(1).clamp_min(1)           # of noisy tokens
        made = slice(n_tokens)                                              # without the padding
        yield State(x[:, made].clone(), p_noise[:, made], written[:, made], mean_t, nfe)


class ToldLevels(NamedTuple):
    """What the denoiser is told instead of level 0."""
    stabilization: float        # at finished tokens
    context: float              # at known ones


class View(NamedTuple):
    """What one step of a rollout sees: n tokens, those of the window's frames."""
    seen: slice                 # of all N tokens
    falling: slice              # of the n tokens: those of the frames that fall
    t: Tensor                   # (B, n) level before the step, 0 at known tokens
    s: Tensor                   # (B, n) level after it
    t_input: Tensor             # (B, n) level that the denoiser is told
    n_finished: int             # frames at the start of the window that are finished


def view_of_step(
    t: Tensor, s: Tensor, window: int, kv_cache, editable: Tensor, told: ToldLevels,
) -> View:
    """Frames at levels t (F,) that fall to s (F,), in a window of frames.  editable (B, N)"""
    size = editable.shape[1] // len(t)
    falling = (t > s).nonzero()[:, 0].tolist()
    first, end = visible_frames(falling, len(t), window, kv_cache)
    seen = slice(first * size, end * size)
    is_editable = editable[:, seen]
    t_seen = t[first:end].repeat_interleave(size) * is_editable
    s_seen = s[first:end].repeat_interleave(size) * is_editable
    t_input = torch.where(t_seen == 0, told.stabilization, t_seen)
    t_input = torch.where(is_editable, t_input, told.context)
    return View(
        seen, slice((falling[0] - first) * size, (falling[-1] + 1 - first) * size),
        t_seen, s_seen, t_input, n_finished=int((t[first:end] > 0).int().argmax()),
    )


def visible_frames(falling: list[int], n_frames: int, window: int, kv_cache) -> tuple[int, int]:
    """The frames that the denoiser sees while some fall: first, ..., end - 1.  -> first, end"""
    end = falling[-1] + 1
    if kv_cache is None:
        end = max(end, min(window, n_frames))
        first = max(0, end - window)
    else:
        first = kv_cache.n_kept
    if falling[0] < max(first, end - window):
        raise ValueError(
            f"frames {falling[0]} to {falling[-1]} fall together: too many for a window of {window}"
        )
    return first, end


class Prediction(NamedTuple):
    """What the denoiser says of the n tokens seen."""
    probs: Tensor               # (B, n, V)
    p_at_x: Tensor              # (B, n) of the tokens as they are
    p_noise: Tensor             # (B, n)
    noise: Noise                # with the vocabulary V
    calls: int

    def of_rows(self, rows: Tensor) -> "Prediction":
        return self._replace(
            probs=self.probs[rows], p_at_x=self.p_at_x[rows], p_noise=self.p_noise[rows]
        )


def predict(
    denoiser: Callable, x: Tensor, label: Tensor, view: View, noise: Noise, options: Decoding,
    kv_cache,
) -> Prediction:
    """Ask the denoiser about the tokens seen, x (B, n), through the cache or with guidance."""
    if kv_cache is not None:
        logits = denoiser(x, view.t_input, label, None, kv_cache, view.n_finished)
        calls = 1
    else:
        logits, calls = cfg_logits(denoiser, x, view.t_input, label, options)
    noise = replace(noise, vocab=logits.shape[-1])
    probs = truncate_probs(logits.float(), options)
    p_at_x = gather_at(probs, x)
    p_noise = posterior_noise_prob(p_at_x, x, view.t, noise) * (view.t > 0)
    return Prediction(probs, p_at_x, p_noise, noise, calls)


def draw_falling(x: Tensor, guess: Prediction, view: View, generator: Random) -> Tensor:
    """New tokens of the frames that fall, from the posterior at each token's own level.

    x (B, n)  ->  (B, tokens of view.falling)
    """
    at = view.falling
    x, t, s = x[:, at], view.t[:, at], view.s[:, at]
    draws = sample_categorical(guess.probs[:, at], generator)
    new = sample_posterior(draws, guess.p_at_x[:, at], x, t, s, guess.noise, generator)
    return torch.where(t > s, new, x)


def check_told_levels(noise: Noise, stabilization_level: float, context_level: float) -> None:
    """Refuse levels that mean nothing."""
    check_at_least(stabilization_level=(stabilization_level, 0), context_level=(context_level, 0))
    if (stabilization_level or context_level) and noise.only_masks:
        raise ValueError(
            "stabilization needs uniform noise: with masks a visible token is certain at any level"
        )


def check_reward(
    reward: Callable | None, generator: Random, kv_cache, options: Decoding,
) -> None:
    """Refuse what a reward, or a cache, excludes."""
    if reward and not isinstance(generator, torch.Generator):
        raise ValueError("particles are resampled from each other: they need a torch.Generator")
    if kv_cache is not None and (reward or options.guidance != 1):
        raise ValueError("a cache holds one set of rows: it goes without reward and guidance")


def check_rollout(
    x: Tensor, levels: Tensor, noise: Noise, vocab: int | None, window: int, particles: int,
) -> None:
    """Refuse shapes that do not fit each other."""
    if len(x) % particles or x.shape[1] % levels.shape[1]:
        raise ValueError(
            f"{len(x)} rows of {x.shape[1]} tokens are not groups of {particles} particles and "
            f"{levels.shape[1]} frames"
        )
    if vocab is None and not noise.row.starts_masked and window > levels.shape[1]:
        raise ValueError(f"a window of {window} frames around {levels.shape[1]} needs vocab")


def pad_to_window(
    x: Tensor, editable: Tensor, levels: Tensor, window: int, noise: Noise,
    generator: Random,
) -> tuple[Tensor, Tensor, Tensor]:
    """Append frames of noise up to the window's length, and put known frames at level 0.

    ->  x, editable, levels
    """
    frame_size = x.shape[1] // levels.shape[1]
    n_missing = max(0, window - levels.shape[1])
    if n_missing:
        shape = (len(x), n_missing * frame_size)
        padding = integers(noise.vocab, shape, generator, x.device)
        if noise.row.starts_masked:
            padding = torch.full_like(padding, noise.vocab)
        x = torch.cat([x, padding], 1)
        editable = torch.cat([editable, torch.ones_like(padding, dtype=torch.bool)], 1)
    levels = torch.cat([levels, levels.new_ones(len(levels), n_missing)], 1)
    levels = levels.to(x.device, torch.float32)
    is_known = ~editable.view(len(x), -1, frame_size).any(2).any(0)         # (F,)
    return x.clone(), editable, levels.masked_fill(is_known, 0)
