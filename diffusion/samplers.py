"""Samplers: generators that yield a State after each step, so that a video is a `for`.

Any callable can stand in for a net: net(x, t, label, sites=None) -> (B, N) logits of a planner, or
(B, N, V) of a denoiser, (B, K, V) at sites (B, K). The keywords `decoding` (temperature, top_k,
top_p, min_p, guidance, null_label) are those of decoding.Decoding.
"""

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
    check_choice,
    editable_mask,
    gather_at,
    race_keys,
    refuse_nan,
    sample_at,
    sample_categorical,
    topk_mask,
    truncate_probs,
)
from diffusion.forcing import rollout as rollout
from diffusion.processes import (
    PROCESSES,
    T_MAX,
    T_MIN,
    Noise,
    posterior_noise_prob,
    sample_posterior,
    split_planner_denoiser,
    to_leave_one_out,
)
from diffusion.randomness import Random, of_rows, uniform
from diffusion.unmasking import confidence as confidence
from diffusion.unmasking import p2 as p2
from diffusion.unmasking import planned as planned
from diffusion.unmasking import remdm as remdm

# Planned denoising


@torch.no_grad()
def ddpd(
    planner: Callable | None, denoiser: Callable, x: Tensor, label: Tensor, *, n_steps: int,
    generator: Random, schedule: str = "spread", k: int = 1, pick: str = "proportional",
    denoiser_process: str = "uniform", vocab: int | None = None, known: Tensor | None = None,
    stop: float = 0.0, refine: int = 0, temperature: float = 1.0, top_k: int = 0,
    top_p: float = 1.0, guidance: float = 1.0, planner_guidance: float = 1.0,
    null_label: int | None = None,
) -> Iterator[State]:
    """Planned denoising (arXiv:2410.06264, alg. 1): a planner finds noise, a denoiser replaces it.

    x (B, N) int64 of uniform noise, label (B,)  ->  yields State, at most n_steps + refine of them
    planner    None: the denoiser is an x0-prediction on uniform noise, and one call serves as both
    schedule, k, pick   how many tokens a step writes, and which: choose_sites
    denoiser_process  "mask": the denoiser reads x with a mask (id vocab) at every site, and where
               a Bernoulli(p_noise) draw says noise; otherwise it reads x and is given t
    known      (B, N) bool, tokens that are never written, and excluded from the clock
    stop       a sequence is done when fewer noise tokens than this are expected; 0: never early
    refine     further steps of k sites, for all sequences; each makes samples less diverse
    """
    options = Decoding(temperature, top_k, top_p, guidance=guidance, null_label=null_label)
    check_ddpd(planner, schedule, pick, denoiser_process, vocab, planner_guidance, null_label)
    check_at_least(n_steps=(n_steps, 1), k=(k, 1), stop=(stop, 0), refine=(refine, 0))
    x = x.clone()
    editable = editable_mask(x, known)
    t = torch.full((len(x), 1), T_MAX, device=x.device)     # the clock: expected share of noise
    p_noise = torch.zeros(x.shape, device=x.device)
    done = ~editable.any(1)
    nfe = torch.zeros_like(label)
    if not editable.any():                                  # nothing to write: still one State
        yield State(x, p_noise, editable, t[:, 0], nfe)
    for step in range(n_steps + refine):
        is_refining = step >= n_steps
        rows = (editable.any(1) & (is_refining | ~done)).nonzero()[:, 0]        # (b,) at work
        if len(rows) == 0:                                  # refining steps may follow
            continue
        rule = "fixed" if is_refining else schedule
        if rule == "leap":
            t[rows] = 1 - step / n_steps

        # 1. plan: where is noise, and how much
        seen = (x[rows], t[rows], label[rows], editable[rows])
        plan = plan_noise(planner, denoiser, *seen, options, planner_guidance, denoiser_process)
        nfe[rows] += plan.calls
        p_noise[rows] = plan.p_noise
        if planner is not None and rule != "leap":          # one network has been told its t
            t[rows] = mean_level(plan.p_noise, editable[rows])
        if not is_refining:
            done[rows] = plan.p_noise.sum(1) < stop
            plan = plan.of_rows(~done[rows])
            rows = rows[~done[rows]]

        # 2. choose sites   3. mask what is noise   4. write
        streams = of_rows(generator, rows)
        is_noise = uniform(plan.p_noise.shape, streams, x.device) < plan.p_noise
        sites = choose_sites(plan.p_noise, is_noise, rule, pick, k, n_steps - step, streams)
        x_input = x[rows]
        if denoiser_process == "mask":                      # as in training: all noise is masked
            x_input = x_input.masked_fill(is_noise | sites, vocab)
        draw = sample_at(
            denoiser, x_input, t[rows], label[rows], sites, options, streams, plan.logits
        )
        nfe[rows] += draw.calls
        x[rows] = torch.where(sites, draw.x, x[rows])
        written = torch.zeros_like(editable).index_copy(0, rows, sites)
        yield State(x.clone(), p_noise.clone(), written, t[:, 0].clone(), nfe.clone())
        t[rows] = mean_level(plan.p_noise * ~sites, editable[rows])     # what is written is clean


class Plan(NamedTuple):
    p_noise: Tensor             # (b, N) P(noise), 0 at known tokens
    logits: Tensor | None       # (b, N, V) of the denoiser, where one network is both
    calls: int

    def of_rows(self, is_kept: Tensor) -> "Plan":
        logits = None if self.logits is None else self.logits[is_kept]
        return Plan(self.p_noise[is_kept], logits, self.calls)


def plan_noise(
    planner: Callable | None, denoiser: Callable, x: Tensor, t: Tensor, label: Tensor,
    editable: Tensor, options: Decoding, planner_guidance: float, process: str,
) -> Plan:
    """Ask which tokens are noise: the planner, or the one network that is both."""
    if planner is not None:
        planner_options = replace(options, guidance=planner_guidance)
        logits, calls = cfg_logits(planner, x, t, label, planner_options)
        refuse_nan(logits)
        return Plan(logits.float().sigmoid() * editable, None, calls)
    logits, calls = cfg_logits(denoiser, x, t, label, options)
    refuse_nan(logits)
    noise = Noise(process, logits.shape[-1])
    p_noise, leave_one_out = split_planner_denoiser(logits.float().softmax(-1), x, t, noise)
    return Plan(p_noise * editable, leave_one_out.log(), calls)


@torch.no_grad()
def p_noise_after(
    planner: Callable | None, denoiser: Callable, last: State, label: Tensor, *,
    denoiser_process: str, known: Tensor | None = None, guidance: float = 1.0,
    planner_guidance: float = 1.0, null_label: int | None = None,
) -> Tensor:
    """P(noise) of the tokens of a last State of ddpd or p2, by one more network call.  -> (B, N)"""
    options = Decoding(guidance=guidance, null_label=null_label)
    editable = editable_mask(last.x, known)
    t = mean_level(last.p_noise * ~last.written, editable)
    seen = (last.x, t, label, editable)
    plan = plan_noise(planner, denoiser, *seen, options, planner_guidance, denoiser_process)
    return plan.p_noise


def mean_level(p_noise: Tensor, editable: Tensor) -> Tensor:
    """The t that solves 1 - P(keep) = mean p_noise, where P(keep) = 1 - t.  (b, N) -> (b, 1)"""
    n_editable = editable.sum(1, keepdim=True).clamp_min(1)
    return (p_noise.sum(1, keepdim=True) / n_editable).clamp(T_MIN, T_MAX)


def choose_sites(
    p_noise: Tensor, is_noise: Tensor, schedule: str, pick: str, k: int, steps_left: int,
    generator: Random,
) -> Tensor:
    """The tokens to write in this step.

    p_noise (b, N), a Bernoulli draw is_noise (b, N) of it  ->  (b, N) bool
    schedule   how many: "one"; "fixed": k; "spread": the expected number of noise tokens divided by
               the steps left, rounded up; "leap": each token independently, with probability
               p_noise (t - s)/t on a fixed clock, which is exact for many steps
    pick       which: in proportion to p_noise ("proportional"), to its odds ("softmax" of the
               logits), or any that may be written ("random"), which ignores the planner
    """
    if schedule == "leap":
        return is_noise & (uniform(p_noise.shape, generator, p_noise.device) < 1 / steps_left)
    weight = p_noise
    if pick == "softmax":
        weight = p_noise / (1 - p_noise).clamp_min(1e-12)
    elif pick == "random":
        weight = (p_noise > 0).float()
    keys = race_keys(weight, generator)
    if schedule == "spread":
        expected = p_noise.sum(1) / steps_left
        n_sites = (expected - 1e-4).ceil().clamp_min(0).long()  # 1e-4: 2.0000001 sites are 2
    else:
        n_sites = torch.full((len(p_noise),), 1 if schedule == "one" else k, device=p_noise.device)
    return topk_mask(keys, n_sites) & (keys > 0)


def check_ddpd(
    planner, schedule, pick, denoiser_process, vocab, planner_guidance, null_label,
) -> None:
    """Refuse, by name, arguments that are unknown or exclude each other."""
    check_choice("schedule", schedule, ("one", "fixed", "spread", "leap"))
    check_choice("pick", pick, ("proportional", "softmax", "random"))
    fitting = [name for name, row in PROCESSES.items() if name == "mask" or not row.starts_masked]
    check_choice("denoiser_process", denoiser_process, fitting)
    if planner_guidance != 1 and null_label is None:
        raise ValueError("planner_guidance needs null_label, the class that stands for no label")
    if planner_guidance != 1 and planner is None:
        raise ValueError(
            "planner_guidance needs a planner: one network as both is guided by guidance"
        )
    if denoiser_process == "mask" and planner is None:
        raise ValueError(
            "a mask denoiser cannot be its own planner: it says nothing of visible tokens"
        )
    if denoiser_process == "mask" and vocab is None:
        raise ValueError("denoiser_process mask needs vocab: the mask id is the vocabulary's size")


def last(states: Iterator[State]) -> State:
    """The final State of a sampler; earlier ones are not kept."""
    for state in states:
        final = state
    return final


# Ancestral sampling


@torch.no_grad()
def ancestral(
    denoiser: Callable, x: Tensor, label: Tensor, *, n_steps: int, generator: Random,
    process: str, kind: str = "others", vocab: int | None = None, p_uniform: float = 0.1,
    known: Tensor | None = None, **decoding,
) -> Iterator[State]:
    """The reverse process: x_s from q(x_s | x_t, p), every token on its own.  -> yields State

    x (B, N) pure noise: masks (id vocab), or uniform noise for process "uniform". Exact as steps go
    to infinity. With mask noise a step costs no call for sequences in which it uncovers no token.
    process    "mask", "uniform" or "hybrid" with p_uniform (arXiv:2503.04482)
    kind       "others": the denoiser is a leave-one-out prediction; "self": an x0-prediction, from
               which each step derives one (to_leave_one_out)
    """
    options = Decoding(**decoding)
    check_choice("process", process, PROCESSES)
    check_choice("kind", kind, ("others", "self"))
    check_at_least(n_steps=(n_steps, 1))
    noise = Noise(process, int(x.max()) if vocab is None else vocab, p_uniform)
    levels = noise.levels(n_steps)
    editable = editable_mask(x, known)
    nfe = torch.zeros_like(label)
    x = x.clone()
    for step in range(n_steps):
        t = levels[step].expand(len(x), 1).to(x.device)
        s = levels[step + 1].expand(len(x), 1).to(x.device)
        before = x
        if noise.only_masks:
            x, p_noise, calls = unmask_step(
                denoiser, x, t, s, label, editable, noise, options, generator
            )
        else:
            t_input = t.clamp(T_MIN, T_MAX)
            logits, calls = cfg_logits(denoiser, x, t_input, label, options)
            noise = replace(noise, vocab=logits.shape[-1])
            if kind == "self":                          # before top-k cuts what is drawn from
                probs = to_leave_one_out(logits.float().softmax(-1), x, t, noise)
                logits = probs.log()
            probs = truncate_probs(logits.float(), options)
            p_at_x = gather_at(probs, x)                                # (B, N)
            p_noise = posterior_noise_prob(p_at_x, x, t, noise) * editable
            draws = sample_categorical(probs, generator)
            x = torch.where(editable, sample_posterior(draws, p_at_x, x, t, s, noise, generator), x)
        nfe = nfe + calls
        yield State(x.clone(), p_noise, x != before, t[:, 0], nfe)


def unmask_step(
    denoiser: Callable, x: Tensor, t: Tensor, s: Tensor, label: Tensor, editable: Tensor,
    noise: Noise, options: Decoding, generator: Random,
) -> tuple[Tensor, Tensor, Tensor]:
    """Uncover each mask with probability (t - s) / t.

    ->  x (B, N), 1 at what was masked (B, N), calls (B,)
    """
    is_masked = editable & (x == noise.vocab)
    sites = is_masked & (uniform(x.shape, generator, x.device) < (t - s) / t)
    t_input = t.clamp(T_MIN, T_MAX)
    draw = sample_at(denoiser, x, t_input, label, sites, options, generator)
    return draw.x, is_masked.float(), draw.calls


# Correction of finished sequences


@torch.no_grad()
def self_correct(
    denoiser: Callable, x: Tensor, label: Tensor, *, n_steps: int, generator: Random,
    k: int = 1, t: float = 0.01, temperature: float = 0.1, patience: int = 32,
    p_uniform: float = 0.1, known: Tensor | None = None, **decoding,
) -> Iterator[State]:
    """Correct finished sequences by a GIDD denoiser, which can doubt them (arXiv:2503.04482).

    x (B, N) without masks  ->  yields State. Each step draws every token anew at level t, and
    writes the k likeliest draws of those that differ. A sequence is done when no draw differs, or
    when its self-accuracy has not risen for more than `patience` steps, the last of which is not
    written. Self-accuracy is the share of tokens that are the likeliest ones where they stand.
    """
    options = Decoding(temperature, **decoding)
    check_at_least(n_steps=(n_steps, 1), k=(k, 1), patience=(patience, 1))
    x = x.clone()
    editable = editable_mask(x, known)
    p_noise = torch.zeros(x.shape, device=x.device)
    best_accuracy = torch.full((len(x),), -1.0, device=x.device)
    steps_since = torch.zeros_like(label)
    done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    nfe = torch.zeros_like(label)
    for _ in range(n_steps):
        rows = (~done).nonzero()[:, 0]                                  # (b,)
        level = torch.full((len(rows), 1), t, device=x.device)
        logits, calls = cfg_logits(denoiser, x[rows], level, label[rows], options)
        nfe[rows] += calls
        noise = Noise("hybrid", logits.shape[-1], p_uniform)
        p_at_x = gather_at(logits.float().softmax(-1), x[rows])
        p_noise[rows] = posterior_noise_prob(p_at_x, x[rows], level, noise) * editable[rows]

        probs = truncate_probs(logits.float(), options)
        draws = sample_categorical(probs, of_rows(generator, rows))     # (b, N)
        differs = (draws != x[rows]) & editable[rows]
        keys = torch.where(differs, gather_at(probs, draws).double(), -1.0)
        sites = topk_mask(keys, torch.full_like(label[rows], k)) & differs
        corrected = torch.where(sites, draws, x[rows])

        is_likeliest = (logits.argmax(-1) == corrected) | ~editable[rows]
        accuracy = is_likeliest.float().mean(1)
        steps_since[rows] = torch.where(accuracy > best_accuracy[rows], 0, steps_since[rows] + 1)
        best_accuracy[rows] = best_accuracy[rows].maximum(accuracy)
        stops = ~differs.any(1) | (steps_since[rows] > patience)
        sites &= ~stops[:, None]
        x[rows] = torch.where(sites, draws, x[rows])
        done[rows] = stops
        written = torch.zeros_like(editable).index_copy(0, rows, sites)
        t_state = torch.full_like(best_accuracy, t)
        yield State(x.clone(), p_noise.clone(), written, t_state, nfe.clone())
        if done.all():
            return
