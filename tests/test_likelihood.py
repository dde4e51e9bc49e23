"""Bounds on the likelihood against the exact one, on worlds where all is known."""

import math

import pytest
import torch
from world import World, dense

from diffusion import likelihood
from methods import METHODS

N_SEQUENCES = 60_000
TIGHT_BOUNDS = [("ddpd-mask", "masked"), ("ddpd-uniform", "renoise"), ("ddpd-single", "renoise")]


def bounds_of(world, method, nets, seed=0):
    """The bounds of a method's networks on a world's data.  -> {bound: (bits, standard error)}"""
    generator = torch.Generator().manual_seed(seed)
    noise = world.under("mask" if method == "ddpd-mask" else "uniform").noise
    x0 = world.sample(N_SEQUENCES, generator)
    label = torch.zeros(N_SEQUENCES).long()
    return likelihood.bits_per_token(nets, METHODS[method].bounds, x0, label, noise, generator)


def exact_nets(world, method):
    if method == "ddpd-mask":
        mask_denoiser = world.under("mask").denoiser    # which needs no t
        return {"denoiser": lambda x, t, label: mask_denoiser(x, torch.full_like(t, 0.5), label)}
    if method == "ddpd-single":
        return {"denoiser": world.x0_denoiser}
    return {"planner": world.planner, "denoiser": world.denoiser}


def test_the_bounds_are_their_formulas(rng):
    """Term by term, in loops: the chain that re-noises has no rate from a token to itself."""
    vocab = 4
    t = torch.tensor([[0.3], [0.8]], dtype=torch.float64)
    x = torch.tensor([[0, 1, 2], [3, 3, 0]])
    x0 = torch.tensor([[0, 2, 2], [1, 3, 0]])
    p_noise = torch.rand(2, 3, generator=rng, dtype=torch.float64)
    probs = torch.rand(2, 3, vocab, generator=rng, dtype=torch.float64).softmax(-1)
    renoising, tau_leaping = [0.0, 0.0], [0.0, 0.0]
    for b in range(2):
        level = t[b].item()
        redraw_rate = 1 / (vocab * (1 - level))
        for d in range(3):
            looks_clean = x[b, d] == x0[b, d]
            truth = level / vocab / (1 - level + level / vocab) if looks_clean else 1.0
            p, p_x0 = p_noise[b, d].item(), probs[b, d, x0[b, d]].item()
            tau_leaping[b] += (p - truth - truth * math.log(p) - truth * math.log(p_x0)) / level
            for j in set(range(vocab)) - {x[b, d].item()}:
                model_rate = p * (probs[b, d, j].item() / level + redraw_rate)
                true_rate = truth * ((j == x0[b, d].item()) / level + redraw_rate)
                renoising[b] += model_rate - true_rate
                renoising[b] += true_rate * math.log(true_rate / model_rate)
    args = (p_noise, probs, x, x0, t)
    assert likelihood.elbo_renoising(*args).sum(1).tolist() == pytest.approx(renoising)
    assert likelihood.elbo_tau_leaping(*args).sum(1).tolist() == pytest.approx(tau_leaping)


@pytest.mark.parametrize("method, bound", TIGHT_BOUNDS)
def test_exact_networks_have_tight_bounds(method, bound):
    world = dense()
    bits, error = bounds_of(world, method, exact_nets(world, method))[bound]
    assert bits == pytest.approx(world.entropy(), abs=3 * error)
    assert error < 0.02


@pytest.mark.parametrize("method", ["ddpd-uniform", "ddpd-single"])
def test_the_tau_leaping_bound_is_loose(method):
    """Rates that read x alone forget which tokens are done: too high even for exact networks."""
    world = dense()
    bits, error = bounds_of(world, method, exact_nets(world, method))["leap"]
    assert world.entropy() + 0.05 < bits < 2.5 * world.entropy()
    assert error < 0.02


@pytest.mark.parametrize("method", ["ddpd-mask", "ddpd-uniform", "ddpd-single"])
def test_wrong_networks_are_never_below_the_truth(method):
    """Networks of another world, or fixed random ones: above the exact likelihood of this one."""
    world = dense()

    def assert_above_truth(nets):
        for bits, error in bounds_of(world, method, nets).values():
            assert bits > world.entropy() + 3 * error

    assert_above_truth(exact_nets(dense(seed=1), method))
    for seed in (0, 1):
        table = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        nets = {
            "planner": lambda x, t, label, table=table: table[x, 0],
            "denoiser": lambda x, t, label, table=table: table[x],
        }
        assert_above_truth(nets)


def test_the_loss_of_the_planner_is_not_a_likelihood():
    """A planner of 1/2 has the same BCE beside any denoiser; the bounds tell denoisers apart."""
    world = dense()

    def half(x, t, label):
        return torch.zeros(x.shape)

    def flat(x, t, label):
        return torch.zeros(*x.shape, 3)

    right = bounds_of(world, "ddpd-uniform", {"planner": half, "denoiser": world.denoiser})
    wrong = bounds_of(world, "ddpd-uniform", {"planner": half, "denoiser": flat})
    assert right.keys() == wrong.keys() == {"renoise", "leap"}
    for name in right:
        assert wrong[name][0] > right[name][0] + 0.1


def test_the_standard_error_is_the_spread_of_repeats():
    world = dense()
    nets = exact_nets(world, "ddpd-mask")
    repeats = [bounds_of(world, "ddpd-mask", nets, seed)["masked"] for seed in range(6)]
    spread = torch.tensor([bits for bits, _ in repeats]).std().item()
    assert repeats[0][1] == pytest.approx(spread, rel=0.6)


def test_repeated_sequences_are_not_independent():
    """Sixty held-out sequences, each under twelve levels: the error is the spread over draws of
    sixty, which many levels do not reduce."""
    world = dense()
    nets = exact_nets(world, "ddpd-mask")
    noise = world.under("mask").noise
    label = torch.zeros(720).long()
    found = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        x0 = world.sample(60, generator).repeat(12, 1)
        bounds = METHODS["ddpd-mask"].bounds
        found.append(likelihood.bits_per_token(
            nets, bounds, x0, label, noise, generator, n_distinct=60
        )["masked"])
    bits, errors = torch.tensor(found).unbind(1)
    assert errors.mean().item() == pytest.approx(bits.std().item(), rel=0.3)


def test_what_all_sequences_share_is_no_error():
    """Values that depend steeply on the level, and on the sequence: only the latter is an error."""
    generator = torch.Generator().manual_seed(0)
    n, repeats = 200, 10
    sequence = torch.randperm(n * repeats, generator=generator) % n
    own = torch.randn(n, generator=generator, dtype=torch.float64)
    u = (torch.arange(n * repeats) + 0.5) / (n * repeats)
    y = 100 * u**2 + own[sequence]
    mean, error = likelihood.mean_and_clustered_error(y, sequence, n)
    assert mean == pytest.approx(100 / 3 + own.mean().item(), abs=1e-3)
    assert error == pytest.approx(own.std().item() / math.sqrt(n), rel=0.1)


def test_uniform_ids_cost_their_logarithm():
    """Data without structure: a denoiser that says 1/V is exact, log2 V bits per token."""
    points = torch.cartesian_prod(*[torch.arange(4)] * 2)
    world = World(points, torch.ones(16), 4)
    for method, bound in TIGHT_BOUNDS:
        bits, error = bounds_of(world, method, exact_nets(world, method))[bound]
        assert bits == pytest.approx(math.log2(4), abs=max(3 * error, 1e-6))
