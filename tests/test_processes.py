import math

import pytest
import torch

from diffusion import objectives, processes
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
    t, x0 = torch.rand(2_000_000, 1).clamp(1e-6, 1 - 1e-6), torch.zeros(2_000_000, 1, dtype=torch.long)
    xt, is_noise = corrupt(x0, t, "uniform", 17, None)
    p = torch.where(xt == x0, t / 17 / (1 - t + t / 17), 1.0)
    bce = torch.nn.functional.binary_cross_entropy(p, is_noise.float()).item()
    assert processes.planner_floor(17) == pytest.approx(bce, abs=1e-3)
    assert processes.LEVEL_ONLY == pytest.approx(-(t * t.log() + (1 - t) * (1 - t).log()).mean().item(), abs=1e-3)


def floors_by_hand(x0, label, vocab, nets, process, rng, n_rows):
    """The same draws as objectives.floors, the sums over sequences and levels written out as loops."""
    row = torch.arange(n_rows) % len(x0)
    t = processes.stratified_t(n_rows, rng)
    tasks = objectives.ddpd(x0[row], t, label[row], vocab, rng, nets, process)
    levels = (torch.arange(256, dtype=torch.float64) + 0.5) / 256
    out = {}
    for name, task in tasks.items():
        losses = []
        for i, target in zip(task.sites.tolist(), task.target.tolist(), strict=True):
            r, d = divmod(i, x0.shape[1])
            x, peers = task.xt[r], [s for s in range(len(x0)) if label[s] == label[row[r]]]
            total = right = 0.0
            for s in peers:
                for u in levels if name == "planner" else [t[r, 0].double()]:
                    keep = 1 - u + u / vocab
                    others = [e for e in range(x0.shape[1]) if e != d or nets == "single" or name == "planner"]
                    if name == "denoiser" and process == "mask":
                        w = float(all(x[e] in (vocab, x0[s, e]) for e in others))
                    else:
                        w = math.prod(keep if x[e] == x0[s, e] else u / vocab for e in others)
                    if name == "planner":
                        p_noise = u / vocab / keep if x[d] == x0[s, d] else 1.0
                        right += w * (p_noise if target else 1 - p_noise)
                    else:
                        right += w * (x0[s, d] == target)
                    total += w
            losses.append(-math.log(right / total))
        out[name] = sum(losses) / len(losses)
    return out


@pytest.mark.parametrize("nets, process", [("pair", "mask"), ("pair", "uniform"), ("single", "uniform")])
def test_floors_of_sequences_known_by_heart(nets, process):
    """Bayes' rule over all sequences with the label, and over levels for a planner that is told none."""
    x0 = torch.randint(3, (5, 3), generator=torch.Generator().manual_seed(1))
    label = torch.tensor([0, 0, 0, 1, 1])
    args = (x0, label, 3, nets, process)
    got = objectives.floors(*args, torch.Generator().manual_seed(2), n_rows=12)
    assert got == pytest.approx(floors_by_hand(*args, torch.Generator().manual_seed(2), 12), abs=1e-6)


def test_the_floor_of_one_sequence_is_the_planners(rng):
    """One long sequence: its level can be read off it, and only tokens redrawn as themselves are left."""
    got = objectives.floors(torch.zeros(1, 400).long(), torch.zeros(1).long(), 17, "pair", "mask", rng)
    assert got["denoiser"] == pytest.approx(0, abs=1e-6)
    assert got["planner"] == pytest.approx(processes.planner_floor(17), rel=0.02)
