"""How many steps a sampler can take with a number of network calls. `flags` are evaluate.py's."""

import bisect
import functools
import inspect
from typing import Any

import torch

from diffusion import forcing, samplers
from support import runtime
from support.judged import Judged

N_PILOT = 64                # sequences on which a sampler's calls are counted beforehand
PACING = ("remask", "eta", "trust")      # options on which the number of calls depends
MAX_STEPS_PER_TOKEN = 16    # where more steps hardly make more calls
# Names of rows that are a sampler with options; temperature_end is a share of the temperature at
# the start
VARIANTS = {"random": ("confidence", {"order": "random", "temperature_end": 0.6})}


def sampler_of(row: str) -> str:
    """The sampler behind the name of a row."""
    return VARIANTS.get(row, (row, {}))[0]


def n_steps_of(row: str, judged: Judged, nfe: int, flags: Any) -> int:
    """The steps that a sampler can take with nfe network calls; refuses fewer than one step."""
    spec = judged.spec
    if spec.is_video and spec.method.has_own_levels:
        return n_steps_of_rollout(row, judged, nfe, flags)
    calls = 1 if flags.guidance in (None, 1) else 2
    if sampler_of(row) == "p2":
        calls += 1
    if sampler_of(row) == "ddpd" and "planner" in spec.method.networks:
        calls += 1 if flags.planner_guidance in (None, 1) else 2
    if nfe < calls:
        raise SystemExit(
            f"--nfe {nfe} is too small for {row}: a step of it takes {calls} network calls"
        )
    n_calls = nfe // calls
    is_unmasking = spec.noise.only_masks and not spec.method.has_own_levels
    if row in ("remdm", "planned") or (row == "ancestral" and is_unmasking):
        process = spec.noise.process
        return n_steps_of_unmasking(row, process, n_calls, judged.n_unknown(flags), flags)
    return n_calls


@functools.cache
def n_steps_of_unmasking(
    row: str, process: str, n_calls: int, n_tokens: int, flags: Any,
) -> int:
    """The fewest steps in which a sampler that uncovers masks makes n_calls on average, if any do.

    Steps and calls differ since a step costs no call for sequences in which it uncovers no token.
    Calls are counted by sampling n_tokens masks with a uniform denoiser.
    """
    def denoiser(x, t, label, sites):
        return torch.zeros(*sites.shape, 2)

    def both(x, t, label):
        return torch.zeros(*x.shape, 2), torch.zeros(x.shape)

    sampler = {
        "ancestral": functools.partial(
            samplers.ancestral, denoiser, process=process, p_uniform=0.0
        ),
        "remdm": functools.partial(samplers.remdm, denoiser),
        "planned": functools.partial(samplers.planned, denoiser, both),
    }[row]
    options = {}
    if row != "ancestral":
        names = [name for name in PACING if name in inspect.signature(sampler).parameters]
        options = {name: getattr(flags, name) for name in names}
        options = {name: value for name, value in options.items() if value is not None}

    def spends_budget(n_steps):
        x = torch.full((N_PILOT, n_tokens), 2)
        label = torch.zeros(N_PILOT, dtype=torch.long)
        rng = runtime.generator("pilot")
        states = sampler(x, label, n_steps=n_steps, generator=rng, **options)
        final = samplers.last(states)
        return final.nfe.double().mean() >= n_calls - 0.5

    low = n_calls
    high = n_calls
    while high < MAX_STEPS_PER_TOKEN * n_tokens and not spends_budget(high):
        low = high
        high = 2 * high
    return low + bisect.bisect_left(range(low, high), True, key=spends_budget)


def n_steps_of_rollout(row: str, judged: Judged, nfe: int, flags: Any) -> int:
    """The most steps of a frame at which a rollout makes nfe calls per frame on average."""
    n_frames = judged.n_frames(flags)
    lag = flags.lag
    if row == "ancestral":
        lag = 0
    elif lag is None:
        lag = -1
    budget = nfe * (n_frames - flags.n_given)
    fitting = 0
    for n_steps in range(1, budget + 1):
        levels = forcing.rollout_levels(
            judged.spec.grid, n_steps, n_frames, lag, flags.n_given
        )
        if len(levels) - 1 <= budget:
            fitting = n_steps
    if not fitting:
        raise SystemExit(f"--nfe is too small for --lag {lag}: {budget} network calls in all")
    return fitting
