"""Streams of random numbers: uniform, independent, and each sequence's own."""

import pytest
import torch
from world import dense, tiny_spec

import methods
from diffusion import samplers
from diffusion.randomness import Streams, exponential, integers, of_rows, uniform


def streams(n, seed=0, first=0):
    return Streams(seed, torch.arange(first, first + n))


def test_known_answers_of_the_hash():
    """mix() is the finalizer of splitmix64: its generator's first outputs for seed 1234567."""
    from diffusion.randomness import GOLDEN, as_int64, mix

    states = torch.tensor([1234567]) + GOLDEN * torch.arange(1, 4)
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert mix(states).tolist() == [as_int64(number) for number in known]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_numbers_are_uniform(dtype):
    """Over rows, draws and positions: the largest gap of the empirical CDF, as Kolmogorov."""
    source = streams(100)
    u = torch.cat([uniform((100, 50), source, "cpu", dtype) for _ in range(40)]).flatten()
    assert u.dtype == dtype and 0 <= u.min() and u.max() < 1
    assert len(u.unique()) > 0.98 * len(u)
    gap = (u.double().sort().values - torch.arange(len(u)) / len(u)).abs().max()
    assert gap * len(u) ** 0.5 < 1.63               # 1 % of uniform samples are beyond


def test_rows_draws_positions_and_seeds_are_uncorrelated():
    a = streams(200)
    first, second = (uniform((200, 200), a, "cpu", torch.float64) - 0.5 for _ in range(2))
    other_seed = uniform((200, 200), streams(200, seed=1), "cpu", torch.float64) - 0.5
    pairs = [(first, second), (first, other_seed), (first[1:], first[:-1]),
             (first[:, 1:], first[:, :-1]), (first, first.T), (first[1:, :-1], first[:-1, 1:])]
    for x, y in pairs:
        correlation = 12 * (x * y).mean()
        assert abs(correlation) < 4 / x.numel() ** 0.5


def test_other_distributions():
    """Mean and variance of an exponential, and every integer as often as any other."""
    e = exponential((300, 300), streams(300), "cpu")
    assert e.min() > 0
    assert e.mean().item() == pytest.approx(1, abs=0.015)
    assert e.var().item() == pytest.approx(1, abs=0.05)
    counts = integers(7, (300, 300), streams(300), "cpu").flatten().bincount()
    assert len(counts) == 7
    assert ((counts - 90_000 / 7).abs() < 4 * (90_000 / 7) ** 0.5).all()


def test_a_row_draws_the_same_in_any_company():
    """Alone, in a batch, in another place of it, and after draws that it had no part in."""
    together = streams(6)
    a = uniform((6, 5), together, "cpu")
    rows = torch.tensor([1, 4])
    uniform((2, 3), of_rows(together, rows), "cpu")
    nested = of_rows(of_rows(together, torch.tensor([0, 3, 4, 5])), torch.tensor([1, 3]))
    b = uniform((2, 5), nested, "cpu")              # rows 3 and 5
    alone = streams(1, first=3)
    assert torch.equal(uniform((1, 5), alone, "cpu")[0], a[3])
    assert torch.equal(uniform((1, 5), alone, "cpu")[0], b[0])
    assert not torch.equal(a[3], b[0])


CASES = [(name, sampler) for name, row in {
    "ddpd-mask": ["ddpd", "ancestral", "confidence", "remdm", "p2"],
    "ddpd-trunk": ["planned", "p2"],
    "ddpd-uniform": ["ddpd", "ancestral"],
    "ddpd-single": ["ddpd", "ancestral"],
    "gidd": ["ancestral", "self_correct"],
    "forcing": ["rollout"],
}.items() for sampler in row]
SCHEDULES = [("ddpd", dict(schedule="leap")), ("ddpd", dict(stop=2.0, refine=2)),
             ("confidence", dict(order="random")), ("p2", dict(eta=3.0))]


@pytest.mark.parametrize(
    "name, sampler, options",
    [(*case, {}) for case in CASES] + [("ddpd-mask", *case) for case in SCHEDULES],
)
def test_samples_do_not_depend_on_their_batch(name, sampler, options):
    """Twelve at once are, bit for bit, those of batches of five and of single ones."""
    grid = (3, 2, 2) if name == "forcing" else (4, 4)
    spec = tiny_spec(name, grid=grid)
    torch.manual_seed(0)
    nets = methods.build(spec)
    for net in nets.values():
        for weight in net.parameters():             # heads begin at zero: all rows would agree
            torch.nn.init.normal_(weight, std=0.5)
    finished = torch.randint(7, (12, spec.shape.n_tokens))

    def draw(index):
        start = dict(known_tokens=finished[index]) if sampler == "self_correct" else {}
        states = methods.sample(
            spec, nets, index % 3, sampler=sampler, n_steps=5, generator=Streams(0, index),
            **start, **options,
        )
        final = samplers.last(states)
        return final.x, final.nfe

    index = torch.arange(12)
    whole = draw(index)
    for size in (5, 1):
        parts = [draw(part) for part in index.split(size)]
        for one, other in zip(whole, map(torch.cat, zip(*parts, strict=True)), strict=True):
            assert torch.equal(one, other)
    assert len(whole[0].unique(dim=0)) > 6


@pytest.mark.parametrize("sampler", ["ancestral", "ddpd"])
def test_the_law_of_samples_is_that_of_a_generator(sampler, rng):
    """On a world with exact networks: streams and a torch.Generator draw from one law."""
    world = dense()
    n = 20_000
    laws = []
    for source in (Streams(0, torch.arange(n)), rng):
        x = integers(3, (n, 3), source, "cpu")
        label = torch.zeros(n, dtype=torch.long)
        options = dict(n_steps=8, generator=source, vocab=3)
        if sampler == "ddpd":
            states = samplers.ddpd(world.planner, world.denoiser, x, label, **options)
        else:
            states = samplers.ancestral(world.denoiser, x, label, process="uniform", **options)
        final = samplers.last(states).x
        laws.append(final @ torch.tensor([9, 3, 1]))
    counts = [law.bincount(minlength=27).double() / n for law in laws]
    assert (counts[0] - counts[1]).abs().sum() / 2 < 0.025
    assert len(laws[0].unique()) > 20
