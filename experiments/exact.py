"""The law of each sampler with exact networks: the part of its error that is its own.

The world is all sequences of 8 binary tokens with at most two changes between neighbours: 58 of
256. The denoiser's posteriors are exact, and so are the planner's, which like a trained one sees
uniform noise and is not told its level.
"""

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import common
import torch
from torch import Tensor

import evaluate
import methods
from diffusion import samplers
from diffusion.decoding import State
from support import runtime

sys.path.insert(0, str(common.ROOT / "tests"))

from world import World, at_sites, tiny_spec

N_TOKENS = 8
VOCAB = 2
MOST_CHANGES = 2
CHANGE_FACTOR = 0.3     # a sequence with one more change has this share of the probability
N_LEVELS = 4000         # noise levels over which the planner averages
N_SAMPLES = 100_000
STEPS = (2, 4, 8)


class Row(NamedTuple):
    sampler: str
    options: dict[str, Any]


ROWS = {
    "ancestral": Row("ancestral", {}),
    "random order": Row("confidence", dict(order="random")),
    "random order, cooled to .6": Row(*evaluate.VARIANTS["random"]),
    "MaskGIT, noise 4.5": Row("confidence", {}),
    "MaskGIT, noise 0": Row("confidence", dict(noise=0.0)),
    "ReMDM, rescaled, eta .2": Row("remdm", dict(remask="rescale")),
    "ReMDM, capped, eta .2": Row("remdm", dict(remask="cap")),
    "ReMDM, confidence": Row("remdm", {}),
    "p2": Row("p2", {}),
    "p2, eta 0": Row("p2", dict(eta=0.0)),
    "ddpd": Row("ddpd", {}),
    "ddpd, leap": Row("ddpd", dict(schedule="leap")),
}


# The world and its networks


def make_world() -> World:
    """Ones are likelier than zeros, so that no two laws agree by symmetry."""
    every = torch.cartesian_prod(*[torch.arange(VOCAB)] * N_TOKENS)
    n_changes = (every[:, 1:] != every[:, :-1]).sum(1)
    is_point = n_changes <= MOST_CHANGES
    q = CHANGE_FACTOR**n_changes.double() * (1 + every.sum(1))
    return World(every[is_point], q[is_point], VOCAB)


class Lookup:
    """A network that is not told t, run once on all sequences of tokens and masks."""

    def __init__(self, net: Callable):
        n_ids = VOCAB + 1
        states = torch.cartesian_prod(*[torch.arange(n_ids)] * N_TOKENS)
        label = torch.zeros(len(states), dtype=torch.long)
        self.place_value = n_ids ** torch.arange(N_TOKENS - 1, -1, -1)
        self.out = net(states, torch.full((len(states), 1), 0.5), label)

    def __call__(self, x, t, label, sites=None):
        out = self.out[(x * self.place_value).sum(1)]
        return out if sites is None else at_sites(out, sites)


def blind_planner(world: World) -> Callable:
    """Logits of p(noise | x) under uniform noise of a level that is uniform on (0, 1).

    q(x | x0, t) depends on the number m of tokens that agree: with a = 1 - t + t/V and b = t/V it
    is a^m b^(N - m), and (1 - t) a^(m - 1) b^(N - m) where a certain one of them was kept.
    """
    n_tokens = world.points.shape[1]
    t = (torch.arange(N_LEVELS, dtype=torch.float64) + 0.5) / N_LEVELS
    hit = 1 - t + t / world.vocab
    miss = t / world.vocab
    m = torch.arange(n_tokens + 1)[:, None]                             # (N + 1, 1)
    p_x = hit**m * miss ** (n_tokens - m)                               # (N + 1, levels)
    p_x_kept = p_x * (1 - t) / hit

    def planner(x: Tensor, t: Tensor, label: Tensor, sites=None) -> Tensor:
        is_hit = x[:, None] == world.points                             # (B, S, N)
        n_hits = is_hit.sum(-1)
        p = (world.q * p_x.mean(1)[n_hits]).sum(1, keepdim=True)
        joint = world.q * p_x_kept.mean(1)[n_hits]                      # (B, S)
        p_kept = torch.einsum("bs,bsn->bn", joint, is_hit.double()) / p
        return torch.logit(1 - p_kept)

    return planner


def exact_networks(world: World) -> dict[str, Callable]:
    return {
        "planner": Lookup(blind_planner(world)),
        "denoiser": Lookup(world.under("mask").denoiser),
    }


# Table


def draw(nets: dict[str, Callable], row: Row, n_steps: int, n: int, seed: int = 0) -> State:
    """n samples of a row of the table."""
    spec = tiny_spec("ddpd-mask", grid=(N_TOKENS,), vocab=VOCAB, n_classes=0)
    states = methods.sample(
        spec, nets, torch.zeros(n, dtype=torch.long), n_steps=n_steps, sampler=row.sampler,
        generator=torch.Generator().manual_seed(seed), **row.options,
    )
    return samplers.last(states)


def entropy(x: Tensor) -> float:
    """Of the law of samples, bits per sequence.  x (n, N)"""
    share = torch.unique(x, dim=0, return_counts=True)[1].double() / len(x)
    return torch.special.entr(share).sum().item() / math.log(2)


def table() -> None:
    """Print total variation to the data and entropy by sampler and number of steps."""
    world = make_world()
    nets = exact_networks(world)
    by_steps = [f"{n_steps} steps" for n_steps in STEPS]
    print(f"\nexact networks, {N_SAMPLES:,} samples; the data have {entropy_of(world):.2f} bits\n")
    common.print_header(
        "sampler", *[f"total variation, {words}" for words in by_steps],
        *[f"bits, {words}" for words in by_steps], f"calls, {by_steps[-1]}",
    )
    real = world.sample(N_SAMPLES, runtime.generator("exact"))
    print_laws("draws of the data", world, [real] * len(STEPS), "")
    for name, row in ROWS.items():
        states = [draw(nets, row, n_steps, N_SAMPLES) for n_steps in STEPS]
        n_calls = states[-1].nfe.double().mean()
        print_laws(name, world, [state.x for state in states], f"{n_calls:.1f}")


def entropy_of(world: World) -> float:
    return world.entropy() * world.points.shape[1]


def print_laws(name: str, world: World, samples: list[Tensor], calls: str) -> None:
    distances = [f"{world.distance(x):.3f}" for x in samples]
    bits = [f"{entropy(x):.2f}" for x in samples]
    common.print_row([name, *distances, *bits, calls])
