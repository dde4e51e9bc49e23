"""Bounds on the likelihood against the exact one, on worlds where all is known."""

import math

import pytest
import torch
from world import World, dense

from diffusion import objectives

N = 60_000


def bounds(world, kind, nets, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x0 = world.points[torch.multinomial(world.q, N, replacement=True, generator=rng)]
    return objectives.bits_per_token(nets, kind, x0, torch.zeros(N).long(), world.vocab, rng, most=2**24)


def entropy(world):
    """Bits per token of the data: the exact negative log-likelihood of the exact networks."""
    return -(world.q * world.q.log2()).sum().item() / world.points.shape[1]


def any_level(net):
    return lambda x, t, label, sites=None: net(x, torch.full_like(t, 0.5), label)


def exact(world, kind):
    if kind == "maskd":
        return {"denoiser": any_level(world.under("mask").denoiser)}
    if kind == "single":
        return {"denoiser": world.self_denoiser}
    return {"planner": world.planner, "denoiser": world.denoiser}


def test_the_bounds_are_their_formulas(rng):
    """Term by term, in loops: the chain that re-noises has no rate from a token to itself."""
    vocab, t = 4, torch.tensor([[0.3], [0.8]], dtype=torch.float64)
    x, x0 = torch.tensor([[0, 1, 2], [3, 3, 0]]), torch.tensor([[0, 2, 2], [1, 3, 0]])
    p = torch.rand(2, 3, generator=rng, dtype=torch.float64)
    q = torch.rand(2, 3, vocab, generator=rng, dtype=torch.float64).softmax(-1)
    renoise, leap = [0.0, 0.0], [0.0, 0.0]
    for b in range(2):
        level = t[b].item()
        for d in range(3):
            noise = 1.0 if x[b, d] != x0[b, d] else level / vocab / (1 - level + level / vocab)
            mine, right = p[b, d].item(), q[b, d, x0[b, d]].item()
            leap[b] += (mine - noise - noise * math.log(mine) - noise * math.log(right)) / level
            for j in set(range(vocab)) - {x[b, d].item()}:
                redrawn = 1 / (vocab * (1 - level))
                rate = mine * (q[b, d, j].item() / level + redrawn)
                truth = noise * ((j == x0[b, d].item()) / level + redrawn)
                renoise[b] += rate - truth + truth * math.log(truth / rate)
    assert objectives.renoise_bound(p, q, x, x0, t).sum(1).tolist() == pytest.approx(renoise)
    assert objectives.leap_bound(p, q, x, x0, t).sum(1).tolist() == pytest.approx(leap)


@pytest.mark.parametrize("kind, bound", [("maskd", "masked"), ("unid", "renoise"), ("single", "renoise")])
def test_tight_with_exact_networks(kind, bound):
    world = dense()
    bits, error = bounds(world, kind, exact(world, kind))[bound]
    assert bits == pytest.approx(entropy(world), abs=3 * error) and error < 0.02


@pytest.mark.parametrize("kind", ["unid", "single"])
def test_the_leap_bound_is_loose(kind):
    """Rates that read x alone forget which tokens are done: above the truth even with exact networks."""
    world = dense()
    bits, error = bounds(world, kind, exact(world, kind))["leap"]
    assert entropy(world) + 0.05 < bits < 2.5 * entropy(world) and error < 0.02


@pytest.mark.parametrize("kind", ["maskd", "unid", "single"])
def test_wrong_networks_are_never_below_the_truth(kind):
    """Networks of another world, or fixed random ones: above the exact likelihood of this one, by a lot."""
    world, other = dense(), dense(seed=1)
    names = ("denoiser",) if kind != "unid" else ("planner", "denoiser")
    assert all(bits > entropy(world) + 3 * error for bits, error in bounds(world, kind, exact(other, kind)).values())
    for seed in (0, 1):
        table = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))

        def random(x, t, label, sites=None, table=table):
            return table[x]

        def random_planner(x, t, label, sites=None, table=table):
            return table[x, 0]

        nets = {name: random_planner if name == "planner" else random for name in names}
        assert all(bits > entropy(world) + 3 * error for bits, error in bounds(world, kind, nets).values())


def test_the_loss_of_the_planner_is_not_a_likelihood():
    """A planner that says 1/2 everywhere has the same BCE at any denoiser; the bounds tell denoisers apart."""
    world, half = dense(), lambda x, t, label, sites=None: torch.zeros(x.shape)
    flat = lambda x, t, label, sites=None: torch.zeros(*x.shape, 3)  # noqa: E731
    right = bounds(world, "unid", {"planner": half, "denoiser": world.denoiser})
    wrong = bounds(world, "unid", {"planner": half, "denoiser": flat})
    assert all(wrong[name][0] > right[name][0] + 0.1 for name in right)


def test_the_standard_error_is_the_spread_of_repeats():
    world = dense()
    repeats = [bounds(world, "maskd", exact(world, "maskd"), seed)["masked"] for seed in range(6)]
    spread = torch.tensor([bits for bits, _ in repeats]).std().item()
    assert repeats[0][1] == pytest.approx(spread, rel=0.6)


def test_uniform_ids_cost_their_logarithm():
    """Data without structure: a denoiser that says 1/V is exact, log2 V bits per token."""
    points = torch.cartesian_prod(*[torch.arange(4)] * 2)
    world = World(points, torch.ones(16), 4)
    for kind, bound in [("maskd", "masked"), ("unid", "renoise"), ("single", "renoise")]:
        bits, error = bounds(world, kind, exact(world, kind))[bound]
        assert bits == pytest.approx(math.log2(4), abs=max(3 * error, 1e-6))
