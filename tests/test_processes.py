import math

import pytest
import torch

from diffusion import processes
from diffusion.processes import corrupt, fates


@pytest.mark.parametrize(
    "process, expected",
    [
        ("uniform", lambda t: (1 - t, 0, t)),
        ("mask", lambda t: (1 - t, t, 0)),
        (
            "hybrid",
            lambda t: [y / (1 + 0.5 * math.sqrt(t * (1 - t))) for y in (1 - t, t, 0.5 * math.sqrt(t * (1 - t)))],
        ),
    ],
)
@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_rates(process, expected, t, rng):
    """Fates are those of the formula, sum to 1, and are the frequencies at which corrupt() keeps, masks and redraws."""
    n, vocab = 400_000, 7
    want = expected(t)  # hybrid at p_uniform .2: B = .5
    got = [y.item() for y in fates(torch.tensor(t, dtype=torch.float64), process, 0.2)]
    assert got == pytest.approx(want) and sum(got) == pytest.approx(1)
    x0 = torch.full((1, n), 3)
    xt, is_noise = corrupt(x0, torch.tensor([[t]]), process, vocab, rng, 0.2)
    keep, mask, uniform = want
    for event, p in [
        (is_noise, 1 - keep),
        (xt == vocab, mask),
        ((xt == 3) & is_noise, uniform / vocab),
        (xt == 3, keep + uniform / vocab),
        (xt == 6, uniform / vocab),
    ]:
        assert event.float().mean().item() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n) + 1e-9)
    assert ((xt != x0) <= is_noise).all()  # what changed is noise


def test_level_per_token(rng):
    """t (B, N): each token falls at its own level."""
    x0 = torch.zeros(200_000, 3, dtype=torch.long)
    _, is_noise = corrupt(x0, torch.tensor([0.0, 0.3, 1.0]).expand(len(x0), 3), "uniform", 5, rng)
    assert is_noise.float().mean(0).tolist() == pytest.approx([0, 0.3, 1], abs=0.005)


def test_stratified_levels_cover_the_range(rng):
    """One level in every nth of [0, 1], in random order."""
    t = processes.stratified_t(1000, rng)
    assert torch.equal((t[:, 0] * 1000).long().sort().values, torch.arange(1000)) and t.min() >= 1e-4
    assert not torch.equal(t.sort(0).values, t)


def test_planner_floor():
    """What the best planner that knows x0 still pays, against a Monte Carlo of corrupt()."""
    assert processes.planner_floor(17) == pytest.approx(0.089, abs=5e-4)
    t, x0 = torch.rand(2_000_000, 1), torch.zeros(2_000_000, 1, dtype=torch.long)
    xt, is_noise = corrupt(x0, t, "uniform", 17, None)
    p = torch.where(xt == x0, t / 17 / (1 - t + t / 17), 1.0)
    bce = torch.nn.functional.binary_cross_entropy(p, is_noise.float()).item()
    assert processes.planner_floor(17) == pytest.approx(bce, abs=1e-3)
    assert processes.LEVEL_ONLY == pytest.approx(-(t * t.log() + (1 - t) * (1 - t).log()).mean().item(), abs=1e-3)
