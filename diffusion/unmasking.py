"""Samplers of a mask denoiser, which start from masks; samplers.py imports them too.

They uncover masks step by step; remdm, planned and p2 also mask tokens again.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.decoding import (
    Decoding,
    State,
    cfg_logits,
    check_at_least,
    check_choice,
    editable_mask,
    mask_id_of,
    race_keys,
    refuse_nan,
    sample_at,
    topk_mask,
)
from diffusion.processes import T_MAX, T_MIN
from diffusion.randomness import Random, exponential, of_rows, uniform

# p_written is clipped to [LEAST_DOUBT, 1 - LEAST_DOUBT], so that no odds are infinite
LEAST_DOUBT = 0.01
ORDERS = ("confidence", "random", "halton")
# schedule -> share of tokens that are masked after a share r of the steps
MASKED_SHARES = {
    "linear": lambda r: 1 - r,
    "arccos": lambda r: math.acos(r) / (math.pi / 2),
    "cosine": lambda r: math.cos(r * math.pi / 2),
}


@torch.no_grad()
def confidence(
    denoiser: Callable, x: Tensor, label: Tensor, *, n_steps: int, generator: Random,
    order: str = "confidence", schedule: str = "arccos", noise: float = 4.5,
    grid: Sequence[int] = (), vocab: int | None = None, known: Tensor | None = None,
    temperature: float = 1.0, temperature_end: float = 0.0, **decoding,
) -> Iterator[State]:
    """MaskGIT (arXiv:2202.04200): fill all masks, keep the most confident, mask the rest.

    x (B, N) masks (id vocab)  ->  yields State
    order      which draws are kept: by "confidence", the largest log-probability plus
               noise (1 - r) Gumbel after a share r of the steps; "random"; or "halton": of a grid,
               far from each other (halton_rank)
    schedule   how many: a name in MASKED_SHARES, or "entropy" (n_within_entropy); at least one
    noise      scale of that Gumbel noise
    temperature_end   the temperature falls linearly to this; 0: it is constant
    """
    options = Decoding(temperature, **decoding)
    check_confidence(order, schedule, grid, x.shape[1])
    check_at_least(n_steps=(n_steps, 1), noise=(noise, 0), temperature_end=(temperature_end, 0))
    editable = editable_mask(x, known)
    vocab = mask_id_of(x, editable, vocab)
    n_editable = editable.sum(1)
    is_by_entropy = schedule == "entropy"
    nfe = torch.zeros_like(label)
    x = x.clone()
    for step in range(n_steps):
        is_masked = editable & (x == vocab)
        n_masked = is_masked.sum(1)
        t = (n_masked / n_editable.clamp_min(1)).clamp(T_MIN, T_MAX)    # (B,)
        progress = (step + 1) / n_steps                                 # r of the docstring
        temperature_now = temperature_at(step, n_steps, temperature, temperature_end)
        options = replace(options, temperature=temperature_now)
        gumbel = -exponential(x.shape, generator, x.device).log()
        draw = None
        if order == "confidence":
            seen = (x, t[:, None], label, is_masked)
            draw = sample_at(denoiser, *seen, options, generator, want_entropy=is_by_entropy)
            keys = draw.p.double().log() + noise * (1 - progress) * gumbel
        elif order == "halton":
            keys = -halton_rank(tuple(grid)).double().to(x.device).expand(x.shape)
        else:
            keys = gumbel
        keys = keys.masked_fill(~is_masked, -torch.inf)
        if is_by_entropy:
            n_kept = n_within_entropy(keys, draw.entropy, n_steps - step)
        else:
            n_kept = n_masked - n_masks_left(schedule, progress, n_editable, n_masked)
        sites = topk_mask(keys, n_kept) & is_masked
        if draw is None:                                # only tokens that are kept are drawn
            draw = sample_at(denoiser, x, t[:, None], label, sites, options, generator)
        x = torch.where(sites, draw.x, x)
        nfe = nfe + draw.calls
        yield State(x.clone(), is_masked.float(), sites, t, nfe)


def check_confidence(order: str, schedule: str, grid: Sequence[int], n_tokens: int) -> None:
    """Refuse, by name, arguments that are unknown or exclude each other."""
    check_choice("order", order, ORDERS)
    check_choice("schedule", schedule, (*MASKED_SHARES, "entropy"))
    if schedule == "entropy" and order != "confidence":
        raise ValueError(f"schedule entropy keeps the most confident draws: order {order} has none")
    if order == "halton" and math.prod(grid) != n_tokens:
        raise ValueError(f"order halton needs the grid of the {n_tokens} tokens, not {list(grid)}")


def temperature_at(step: int, n_steps: int, start: float, end: float) -> float:
    """Linear from start, in step 0, to end, in the last; constant if end is 0."""
    if not end:
        return start
    return start + (end - start) * step / max(1, n_steps - 1)


def n_masks_left(schedule: str, progress: float, n_editable: Tensor, n_masked: Tensor) -> Tensor:
    """Masks left after a share `progress` of the steps; each step keeps at least one token.

    (B,) -> (B,)
    """
    if progress == 1:
        return torch.zeros_like(n_masked)
    n_left = (n_editable * MASKED_SHARES[schedule](progress) + 1e-6).long()
    return n_left.minimum(n_masked - 1).clamp_min(0)


def n_within_entropy(keys: Tensor, entropy: Tensor, steps_left: int) -> Tensor:
    """How many tokens, by falling keys, have together 1 / steps_left of the entropy of all masks.

    Rounded down, at least one. In the manner of EB-sampler (arXiv:2505.24857), whose bound is
    constant instead, so that its steps are as many as it needs.
    keys, entropy (B, N), which is 0 where nothing is masked  ->  (B,)
    """
    by_key = keys.argsort(1, descending=True)
    spent = entropy.double().gather(1, by_key).cumsum(1)
    limit = spent[:, -1:] / steps_left
    return (spent <= limit + 1e-9).sum(1).clamp_min(1)


@functools.cache
def halton_rank(grid: tuple[int, ...]) -> Tensor:
    """The place of each token of a grid in the Halton sequence, whose next points always lie far
    from the last ones (arXiv:2503.17076).  -> (N,) int64"""
    from scipy.stats import qmc

    sequence = qmc.Halton(len(grid), scramble=False)
    n_tokens = math.prod(grid)
    ranks = {}
    while len(ranks) < n_tokens:
        cells = (sequence.random(n_tokens) * grid).astype(int)          # (N, axes)
        for index in np.ravel_multi_index(cells.T, grid):
            ranks.setdefault(int(index), len(ranks))
    return torch.tensor([ranks[index] for index in range(n_tokens)])


@torch.no_grad()
def remdm(
    denoiser: Callable, x: Tensor, label: Tensor, *, n_steps: int, generator: Random,
    remask: str = "confidence", eta: float | None = None, vocab: int | None = None,
    known: Tensor | None = None, **decoding,
) -> Iterator[State]:
    """ReMDM (arXiv:2503.00307): masked diffusion that masks written tokens again, to correct them.

    x (B, N) masks (id vocab)  ->  yields State
    remask     the probability that a written token is masked from level t to s, which is at most
               m = min(1, s / (1 - t)). "rescale": eta m; "cap": min(eta, m); both keep the data
               distribution. "confidence", as in the released code: eta m is shared out among the
               written tokens by a softmax over minus the probability at which each was written, so
               that at most eta tokens a step are masked on average. No more masks are uncovered in
               return, so the last step has more to write
    eta        None: 1 for "confidence", as released, else 0.2
    """
    options = Decoding(**decoding)
    check_choice("remask", remask, ("confidence", "rescale", "cap"))
    if eta is None:
        eta = 1.0 if remask == "confidence" else 0.2
    check_at_least(n_steps=(n_steps, 1), eta=(eta, 0))
    editable = editable_mask(x, known)
    vocab = mask_id_of(x, editable, vocab)
    p_written = torch.zeros(x.shape, device=x.device)       # probability of each token when written
    nfe = torch.zeros_like(label)
    x = x.clone()
    for step in range(n_steps):
        t = 1 - step / n_steps
        s = 1 - (step + 1) / n_steps
        is_masked = editable & (x == vocab)
        u = uniform(x.shape, generator, x.device)
        limit = most_remasked(t, s)
        strength = min(eta, limit) if remask == "cap" else min(1.0, eta) * limit
        sigma = torch.full(x.shape, strength, device=x.device)
        if remask == "confidence":
            doubt = torch.where(editable & ~is_masked, -p_written, -torch.inf)
            sigma = sigma * doubt.softmax(1).nan_to_num(0)      # NaN where nothing is written yet
        # where sigma is the same for all, P(keep) grows from 1 - t to 1 - s
        p_uncover = (t - s + sigma * (1 - t)) / t
        uncovered = is_masked & (u < p_uncover)
        remasked = editable & ~is_masked & (u < sigma)
        t_input = torch.full((len(x), 1), t, device=x.device).clamp(T_MIN, T_MAX)
        draw = sample_at(denoiser, x, t_input, label, uncovered, options, generator)
        p_written = torch.where(uncovered, draw.p, p_written)
        nfe = nfe + draw.calls
        x = torch.where(remasked, vocab, draw.x)
        written = uncovered | remasked
        yield State(x.clone(), is_masked.float(), written, t_input[:, 0], nfe)


def most_remasked(t: float, s: float) -> float:
    """The largest probability of masking a written token again from level t to s."""
    return min(1.0, s / (1 - t)) if t < 1 else 1.0


@torch.no_grad()
def planned(
    denoiser: Callable, both: Callable, x: Tensor, label: Tensor, *, n_steps: int,
    generator: Random, eta: float = 0.5, trust: float = 1.0, surprise: float = 0.0,
    order: str = "confidence", noise: float = 4.5, vocab: int | None = None,
    known: Tensor | None = None, **decoding,
) -> Iterator[State]:
    """Planned remasking: ReMDM in which a planner chooses what is masked again, one call a step.

    x (B, N) masks (id vocab)  ->  yields State. From level t to s as many tokens are masked again
    as by remdm(remask="rescale") on average, and masks are uncovered until a share s is left.
    both(x, t, label)  ->  logits (B, N, V) of the denoiser, and (B, N) of a planner that says which
    visible tokens are wrong: State.p_noise. It is asked in steps that mask some of them again; in
    others, and without trust, the denoiser is asked alone, and p_noise is the share masked again.
    eta        share of what may be masked again that is; 0: nothing
    trust, surprise   which: remasking_weight; without trust all alike, as in remdm
    order      which masks are uncovered: by "confidence", log p plus noise s Gumbel, or "random"
    """
    options = Decoding(**decoding)
    check_choice("order", order, ("random", "confidence"))
    check_at_least(n_steps=(n_steps, 1), noise=(noise, 0))
    check_at_least(eta=(eta, 0), trust=(trust, 0), surprise=(surprise, 0))
    editable = editable_mask(x, known)
    vocab = mask_id_of(x, editable, vocab)
    p_written = torch.ones(x.shape, device=x.device)        # probability of each token when written
    nfe = torch.zeros_like(label)
    x = x.clone()
    for step in range(n_steps):
        t = 1 - step / n_steps
        s = 1 - (step + 1) / n_steps
        t_input = torch.full((len(x), 1), t, device=x.device).clamp(T_MIN, T_MAX)
        is_masked = editable & (x == vocab)
        is_visible = editable & ~is_masked
        sigma = min(1.0, eta) * most_remasked(t, s)
        n_remasked, n_uncovered = remasking_counts(is_masked, is_visible, sigma, s, generator)

        plan = Remasking(None, sigma * is_visible, None, 0)     # all visible tokens alike
        weight = torch.ones(x.shape, device=x.device)
        if 0 < sigma < 1 and t < 1 and trust > 0:
            plan = plan_remasking(both, x, t_input, label, options)
            weight = remasking_weight(plan.logits_wrong, p_written, trust, surprise)
        remasked = draw_sites(weight, is_visible, n_remasked, generator)

        drawn_at = is_masked                                    # of which the best are kept
        if order == "random":
            drawn_at = draw_sites(torch.ones_like(weight), is_masked, n_uncovered, generator)
        draw = sample_at(denoiser, x, t_input, label, drawn_at, options, generator, plan.logits)
        nfe = nfe + plan.calls + draw.calls
        uncovered = drawn_at
        if order == "confidence":
            uncovered = most_confident(draw.p, is_masked, n_uncovered, noise * s, generator)
        p_written = torch.where(uncovered, draw.p, p_written)
        x = torch.where(uncovered, draw.x, x)
        x = x.masked_fill(remasked, vocab)
        p_noise = torch.where(is_masked, 1.0, plan.p_wrong) * editable
        yield State(x.clone(), p_noise, uncovered | remasked, t_input[:, 0], nfe)


class Remasking(NamedTuple):
    """Which visible tokens look wrong in a step of planned()."""
    logits_wrong: Tensor | None     # (B, N) of the planner; None: it was not asked
    p_wrong: Tensor                 # (B, N)
    logits: Tensor | None           # (B, N, V) of the denoiser, guided; None: it was not asked
    calls: int


def plan_remasking(
    both: Callable, x: Tensor, t: Tensor, label: Tensor, options: Decoding,
) -> Remasking:
    """Ask denoiser and planner in one call."""
    plans = []          # cfg_logits is for nets with one output: the planner's is put aside

    def denoiser(x, t, label):
        logits, plan_logits = both(x, t, label)
        plans.append(plan_logits.float())
        return logits

    logits, calls = cfg_logits(denoiser, x, t, label, options)
    plan_logits = plans[0][:len(x)]                     # the labelled half of a guided batch
    refuse_nan(plan_logits)
    return Remasking(plan_logits, plan_logits.sigmoid(), logits, calls)


def remasking_weight(
    logits_wrong: Tensor, p_written: Tensor, trust: float, surprise: float,
) -> Tensor:
    """Weights in proportion to which visible tokens are masked again.  (B, N), (B, N) -> (B, N)

    odds(wrong)^trust, by the planner, times odds(p_written)^surprise, by the denoiser. With both
    powers 1 this is how much the odds of being wrong have grown since the token was written, so a
    planner that knows no more than the denoiser did then makes no choice.  float64, finite
    """
    logit_written = torch.logit(p_written.double(), eps=LEAST_DOUBT)
    log_weight = trust * logits_wrong.double() + surprise * logit_written
    return log_weight.clamp(-300, 300).exp()


def remasking_counts(
    is_masked: Tensor, is_visible: Tensor, sigma: float, s: float, generator: Random,
) -> tuple[Tensor, Tensor]:
    """How many tokens to mask again, sigma of the visible ones, and how many masks to uncover, so
    that a share s of all is masked.  (B, N) -> (B,), (B,)"""
    n_visible = is_visible.sum(1)
    n_masked = is_masked.sum(1)
    u = uniform((len(n_visible), 1), generator, n_visible.device, torch.float64)
    n_remasked = (sigma * n_visible.double() + u[:, 0]).long()      # rounded, right on average
    n_left = (s * (n_visible + n_masked) + 1e-6).long()
    n_uncovered = n_masked + n_remasked - n_left
    return n_remasked, n_uncovered.clamp_min(0)


def draw_sites(weight: Tensor, where: Tensor, n: Tensor, generator: Random) -> Tensor:
    """n (B,) positions at which `where` is true, drawn without replacement in proportion to weight.

    weight, where (B, N)  ->  (B, N) bool
    """
    keys = race_keys(weight, generator).masked_fill(~where, -1.0)
    return topk_mask(keys, n) & where


def most_confident(
    p: Tensor, is_masked: Tensor, n: Tensor, noise: float, generator: Random,
) -> Tensor:
    """The n (B,) masked tokens of each row whose draws have the largest log p + noise Gumbel.

    p, is_masked (B, N)  ->  (B, N) bool
    """
    gumbel = -exponential(p.shape, generator, p.device).log()
    keys = p.double().log() + noise * gumbel
    keys = keys.masked_fill(~is_masked, -torch.inf)
    is_chosen = topk_mask(keys, n)
    return is_chosen & is_masked


@torch.no_grad()
def p2(
    planner: Callable, denoiser: Callable, x: Tensor, label: Tensor, *, n_steps: int,
    generator: Random, eta: float = 1.0, schedule: str = "linear", vocab: int | None = None,
    known: Tensor | None = None, **decoding,
) -> Iterator[State]:
    """Path planning (P2, arXiv:2502.03540): fill all masks, keep what a planner calls clean.

    x (B, N) masks (id vocab)  ->  yields State, with the p_noise at which visible tokens were kept.
    A step takes two network calls, except the last, which keeps all tokens and takes one.
    eta        factor on log P(clean) of tokens that were visible before: 0 never masks them again,
               above 1 they are masked more readily than fresh ones
    schedule   a name in MASKED_SHARES
    As in the paper, the planner scores the filled sequence, which has no masks, and the largest
    scores are kept. Unlike there, the planner scores fresh and visible tokens alike, where the
    paper takes the denoiser's own probability for fresh ones; ties are broken at random.
    """
    options = Decoding(**decoding)
    check_choice("schedule", schedule, MASKED_SHARES)
    check_at_least(n_steps=(n_steps, 1), eta=(eta, 0))
    editable = editable_mask(x, known)
    vocab = mask_id_of(x, editable, vocab)
    n_editable = editable.sum(1)
    p_noise_kept = torch.zeros(x.shape, device=x.device)        # what the planner said last
    nfe = torch.zeros_like(label)
    x = x.clone()
    for step in range(n_steps):
        before = x
        is_masked = editable & (x == vocab)
        p_noise = torch.where(is_masked, 1.0, p_noise_kept)
        t = (is_masked.sum(1) / n_editable.clamp_min(1)).clamp(T_MIN, T_MAX)    # (B,)
        share = MASKED_SHARES[schedule]((step + 1) / n_steps)
        n_left = (n_editable * share + 1e-6).long()             # (B,) masks after this step
        fill = sample_at(denoiser, x, t[:, None], label, is_masked, options, generator)
        x = fill.x
        nfe = nfe + fill.calls

        rows = n_left.nonzero()[:, 0]                           # (b,) with tokens to be masked
        if len(rows) > 0:
            logits, calls = cfg_logits(planner, x[rows], t[rows, None], label[rows], Decoding())
            refuse_nan(logits)
            nfe[rows] += calls
            p_noise_kept[rows] = logits.float().sigmoid() * editable[rows]
            log_clean = F.logsigmoid(-logits.double()).clamp_min(-1e30)         # finite
            doubt = -torch.where(is_masked[rows], log_clean, eta * log_clean)
            doubt = doubt.masked_fill(~editable[rows], -torch.inf)
            x[rows] = x[rows].masked_fill(
                topk_random_ties(doubt, n_left[rows], of_rows(generator, rows)), vocab
            )
        yield State(x.clone(), p_noise, x != before, t, nfe)


def topk_random_ties(keys: Tensor, k: Tensor, generator: Random) -> Tensor:
    """The k (b,) largest keys of each row, ties broken at random.  (b, N) -> (b, N) bool"""
    order = uniform(keys.shape, generator, keys.device, torch.float64).argsort(1)
    is_chosen = topk_mask(keys.gather(1, order), k)
    return torch.zeros_like(is_chosen).scatter(1, order, is_chosen)
