"""What each sampler draws with exact networks: the part of its error that is its own.

The world is all sequences of 8 binary tokens with at most two changes between neighbours: 58 of
256. The denoiser's posteriors are exact, and so are those of the planner of uniform noise, which
like a trained one is not told its level, and those of the one network that is both. The planner on
the denoiser's trunk counts what it is to learn in a million fills by that denoiser.
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
from diffusion.processes import stratified_t
from support import runtime

sys.path.insert(0, str(common.ROOT / "tests"))

from world import World, at_sites, tiny_spec

N_TOKENS = 8
VOCAB = 2
MOST_CHANGES = 2
CHANGE_FACTOR = 0.3     # a sequence with one more change has this share of the probability
N_LEVELS = 4000         # noise levels over which the planner averages
N_SAMPLES = 100_000
N_FILLS = 1_000_000     # that the planner on the trunk counts
FILLS_AT_ONCE = 10_000  # in as many steps each
N_PRIOR = 4             # fills with the mean share of wrong tokens, added to those of each state
STEPS = (2, 4, 8)


class Row(NamedTuple):
    sampler: str
    options: dict[str, Any]
    planner: str = "uniform"    # what it has learned: noise, or a label of fills; or "single"
    is_refined: bool = False    # half of the steps rewrite half of the tokens


ROWS = {
    "ancestral": Row("ancestral", {}),
    "random order": Row("confidence", dict(order="random")),
    "random order, cooled to .6": Row(*evaluate.VARIANTS["random"]),
    "MaskGIT, noise 4.5": Row("confidence", {}),
    "MaskGIT, noise 0": Row("confidence", dict(noise=0.0)),
    "MaskGIT by entropy, noise 4.5": Row("confidence", dict(schedule="entropy")),
    "Halton order": Row("confidence", dict(order="halton")),
    "ReMDM, rescaled, eta .2": Row("remdm", dict(remask="rescale")),
    "ReMDM, rescaled, eta 1": Row("remdm", dict(remask="rescale", eta=1.0)),
    "ReMDM, capped, eta .2": Row("remdm", dict(remask="cap")),
    "ReMDM, confidence": Row("remdm", {}),
    "p2": Row("p2", {}),
    "p2, eta 0": Row("p2", dict(eta=0.0)),
    "ddpd": Row("ddpd", {}),
    "ddpd, leap": Row("ddpd", dict(schedule="leap")),
    "ReMDM, counts": Row("planned", dict(trust=0.0, eta=1.0, order="random"), "differs"),
    "planned, differs, eta 1": Row("planned", dict(eta=1.0, order="random"), "differs"),
    "planned, written, eta 1": Row("planned", dict(eta=1.0, order="random"), "written"),
    "planned, differs": Row("planned", dict(order="random"), "differs"),
    "planned, written": Row("planned", dict(order="random"), "written"),
    "planned, differs, surprise .5": Row("planned", dict(order="random", surprise=0.5), "differs"),
    "planned, differs, surprise 1": Row("planned", dict(order="random", surprise=1.0), "differs"),
    "planned, differs, by confidence": Row("planned", {}, "differs"),
    "planned, differs, by confidence, surprise 1": Row("planned", dict(surprise=1.0), "differs"),
    "planned, written, by confidence": Row("planned", {}, "written"),
    "uniform noise, ancestral": Row("ancestral", {}, "single"),
    "ddpd, one network": Row("ddpd", {}, "single"),
    "ddpd, one network, leap": Row("ddpd", dict(schedule="leap"), "single"),
    "ddpd, one network, refined": Row("ddpd", dict(schedule="leap"), "single", True),
    "ddpd, one network, refined at random": Row(
        "ddpd", dict(schedule="leap", pick="random"), "single", True
    ),
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
    """A network that is not told t: what it says of every sequence of tokens and masks."""

    def __init__(self, out: Tensor):
        self.out = out

    def __call__(self, x, t, label, sites=None):
        out = self.out[index_of(x)]
        return out if sites is None else at_sites(out, sites)

    @classmethod
    def of(cls, net: Callable) -> "Lookup":
        states = torch.cartesian_prod(*[torch.arange(VOCAB + 1)] * N_TOKENS)
        label = torch.zeros(len(states), dtype=torch.long)
        return cls(net(states, torch.full((len(states), 1), 0.5), label))


def index_of(x: Tensor) -> Tensor:
    """Place of a sequence of tokens and masks among all of them.  (B, N) -> (B,)"""
    return (x * (VOCAB + 1) ** torch.arange(N_TOKENS - 1, -1, -1)).sum(1)


class OnTrunk(NamedTuple):
    """As model.TrunkPlanner."""
    denoiser: Lookup
    planner: Lookup

    def __call__(self, x, t, label):
        return self.planner(x, t, label)

    def both(self, x, t, label):
        return self.denoiser(x, t, label), self.planner(x, t, label)


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


def spec_of(method: str) -> methods.Spec:
    return tiny_spec(method, grid=(N_TOKENS,), vocab=VOCAB, n_classes=0)


def planners_of_fills(world: World, denoiser: Lookup) -> dict[str, OnTrunk]:
    """{label of fills: planner}: the share of fills like x in which a visible token is wrong."""
    spec = spec_of("ddpd-trunk")
    n_states = (VOCAB + 1) ** N_TOKENS
    n_seen = torch.zeros(n_states, 1)
    n_wrong = {kind: torch.zeros(n_states, N_TOKENS) for kind in ("differs", "written")}
    for i in range(N_FILLS // FILLS_AT_ONCE):
        rng = runtime.generator("exact fills", i)
        x0 = world.sample(FILLS_AT_ONCE, rng)
        t = stratified_t(len(x0), rng)
        label = torch.zeros(len(x0), dtype=torch.long)
        fill = methods.fill_masks(
            spec, denoiser, x0, t, label, None, rng, x0.device, to_the_end=False
        )
        state = index_of(fill.x)
        n_seen.index_add_(0, state, torch.ones(len(x0), 1))
        for kind, count in n_wrong.items():
            count.index_add_(0, state, fill.wrong(x0, kind).float())
    planners = {}
    for kind, count in n_wrong.items():
        prior = count.sum() / (N_TOKENS * n_seen.sum())
        share = (count + N_PRIOR * prior) / (n_seen + N_PRIOR)
        planners[kind] = OnTrunk(denoiser, Lookup(torch.logit(share)))
    return planners


def exact_networks(world: World) -> dict[str, Callable]:
    """The denoiser, and planners by what they have learned."""
    denoiser = Lookup.of(world.under("mask").denoiser)
    planners = {"uniform": Lookup.of(blind_planner(world))} | planners_of_fills(world, denoiser)
    return {"denoiser": denoiser, "single": world.under("uniform").x0_denoiser} | planners


# Table


def draw(nets: dict[str, Callable], row: Row, n_steps: int, n: int, seed: int = 0) -> State:
    """n samples of a row of the table."""
    method = {"uniform": "ddpd-mask", "single": "ddpd-single"}.get(row.planner, "ddpd-trunk")
    own = {"denoiser": nets["denoiser"], "planner": nets[row.planner]}
    if row.planner == "single":
        own = {"denoiser": nets["single"]}
    options = dict(row.options)
    if row.is_refined:
        n_refine = n_steps // 2
        options |= dict(refine=n_refine, k=N_TOKENS // 2 // n_refine)
        n_steps -= n_refine
    states = methods.sample(
        spec_of(method), own, torch.zeros(n, dtype=torch.long), n_steps=n_steps,
        sampler=row.sampler, generator=torch.Generator().manual_seed(seed), **options,
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
