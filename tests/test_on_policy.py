"""A planner that learns on its denoiser's fills: --on-policy."""

import pytest
import torch
import torch.nn.functional as F
from conftest import refusal, tiny_config
from test_train import assert_same, checkpoint_of, log_of
from world import Oracle, tiny_spec

import config
import methods
import train_ddpd
from diffusion import objectives
from support import training, validate
from support.checkpoint import digest

CPU = torch.device("cpu")
V = 7


def tiny(out, *flags):
    return tiny_config(out, "--dtype", "float32", *flags)


def batch(n, rng):
    """x0 (n, 16), t (n, 1), label (n,): the rows of x0, as an Oracle reads it."""
    x0 = torch.randint(V, (n, 16), generator=rng)
    return x0, torch.full((n, 1), 0.5), torch.arange(n)


def fill(denoiser, x0, t, label, rng, known=None):
    spec = tiny_spec("ddpd-mask", vocab=V)
    return methods.fill_masks(spec, denoiser, x0, t, label, known, rng, CPU).x


def as_fill(fills):
    """Of which nobody knows what was written."""
    return objectives.Fill(fills, torch.zeros_like(fills, dtype=torch.bool))


# Fills and their labels


def test_a_right_denoiser_leaves_no_token_to_find(rng):
    x0, t, label = batch(50, rng)
    fills = fill(Oracle(x0, V).denoiser, x0, t, label, rng)
    assert torch.equal(fills, x0)


def test_tokens_that_differ_are_noise_in_the_rows_of_fills(rng):
    """A denoiser that always says 0: what was masked is 0, and noise unless it was 0 before. The
    other rows stay as they were."""
    x0, t, label = batch(400, rng)

    def denoiser(x, t, label, sites=None):
        return F.one_hot(torch.zeros_like(sites), V).float().log()

    noise = tiny_spec("ddpd-mask", vocab=V).noise
    task = objectives.pair_tasks(x0, t, label, noise, rng)["planner"]
    fills = fill(denoiser, x0[:300], t[:300], label[:300], rng)
    assert (fills == torch.where(fills == 0, 0, x0[:300])).all()
    mixed = objectives.with_fills(task, x0, as_fill(fills), "differs")
    target = mixed.target.view(400, 16)
    assert torch.equal(target[:300], (fills != x0[:300]).float())
    assert target[:300].mean().item() == pytest.approx(0.5 * (1 - 1 / V), abs=0.02)
    assert torch.equal(mixed.xt[:300], fills)
    assert torch.equal(mixed.xt[300:], task.xt[300:])
    assert torch.equal(target[300:], task.target.view(400, 16)[300:])


def test_fills_take_one_to_four_steps(rng):
    """In each the denoiser sees what was drawn before, and masks; all are filled in the end."""
    x0, t, label = batch(200, rng)
    n_steps = set()
    for _ in range(40):
        n_masks = []

        def denoiser(x, t, label, sites, n_masks=n_masks):
            n_masks.append((x == V).sum().item())
            return torch.zeros(*sites.shape, V)

        fills = fill(denoiser, x0, t, label, rng)
        assert fills.max() < V
        assert n_masks == sorted(n_masks, reverse=True)
        assert n_masks[0] == pytest.approx(1600, abs=250)   # rows that uncover none are not asked
        n_steps.add(len(n_masks))
    assert n_steps == {1, 2, 3, 4}


def test_known_tokens_are_neither_filled_nor_asked_for(rng):
    x0, t, label = batch(60, rng)
    known = torch.rand(x0.shape, generator=rng) < 0.4

    def denoiser(x, t, label, sites):
        return torch.zeros(*sites.shape, V)

    fills = fill(denoiser, x0, t, label, rng, known)
    assert torch.equal(fills[known], x0[known])
    assert (fills != x0)[~known].any()
    noise = tiny_spec("ddpd-mask", vocab=V).noise
    task = objectives.pair_tasks(x0, t, label, noise, rng, known)["planner"]
    mixed = objectives.with_fills(task, x0, as_fill(fills), "differs")
    assert torch.equal(mixed.target, (fills != x0)[~known].float())


# Training


def batches_of(share, denoiser):
    cfg = tiny("batches", "--on-policy", share, "--batch-size", 16)
    spec, splits = training.open_data(cfg)
    return training.Batches(cfg, spec, splits["train"], 1, denoiser)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_the_rows_are_fills(share):
    """On average, whatever the batch; other rows and the denoiser's task are those without."""
    net = training.build_training(tiny("x"), tiny_spec("ddpd-mask", (8, 8), 17, 10), None, CPU)
    batches = batches_of(share, net.ema["denoiser"])
    without = batches_of(0.0, None)
    n_fills = []
    for it in range(30):
        tasks, plain = batches.tasks(it, 0), without.tasks(it, 0)
        changed = (tasks["planner"].xt != plain["planner"].xt).any(1)
        n_fills.append(changed.sum().item())
        for mine, its in zip(tasks["denoiser"][:5], plain["denoiser"][:5], strict=True):
            assert torch.equal(mine, its)
        assert torch.equal(tasks["planner"].sites, plain["planner"].sites)
    assert sum(n_fills) / 30 / 16 == pytest.approx(share, abs=0.02)
    again = batches.tasks(29, 0)["planner"]
    assert torch.equal(again.xt, tasks["planner"].xt)


def test_the_denoiser_learns_as_without_fills_and_the_planner_does_not():
    """No gradient reaches it: weights, averages and moments are the same to the bit."""
    states = {}
    for share in (0.0, 0.5):
        name = f"share{share}"
        train_ddpd.main(tiny(name, "--max-iters", 12, "--on-policy", share))
        states[share] = checkpoint_of(name)
    for part in ("nets", "ema", "optimizers"):
        plain, mixed = states[0.0][part], states[0.5][part]
        assert digest(plain["denoiser"]) == digest(mixed["denoiser"])
        assert digest(plain["planner"]) != digest(mixed["planner"])


def test_a_resumed_run_equals_one_that_was_not_stopped():
    """The fills are those of the averages in the checkpoint."""
    args = ["--max-iters", 12, "--lr-decay-iters", 12, "--on-policy", 0.5]
    train_ddpd.main(tiny("whole", *args))
    train_ddpd.main(tiny("parts", *args, "--max-iters", 5))
    train_ddpd.main(tiny("parts", *args))
    assert_same(checkpoint_of("whole"), checkpoint_of("parts"))


def test_validation_also_asks_about_fills():
    """An untrained planner has ln 2 on them, and all other scores are those without."""
    flags = ["--max-iters", 1, "--planner-lr", 0]
    train_ddpd.main(tiny("fills", *flags, "--on-policy", 0.5))
    train_ddpd.main(tiny("plain", *flags))
    with_fills, without = (
        [row for row in log_of(name) if "val_planner_bce" in row][-1] for name in ("fills", "plain")
    )
    assert with_fills["val_planner_fill_bce"] == pytest.approx(0.6931, abs=1e-3)
    assert with_fills["val_planner_fill_auroc"] == pytest.approx(0.5)
    assert len(with_fills["val_planner_fill_bce_bins"]) == validate.N_BINS
    scores = [name for name in without if name.startswith("val_") and name != "val_s"]
    assert scores and all(with_fills[name] == without[name] for name in scores)


@pytest.mark.parametrize("flags", [
    ["--nets", "single", "--denoiser-process", "uniform"], ["--denoiser-process", "uniform"],
])
def test_fills_need_a_planner_and_masks(flags):
    message = refusal(config.load, argv=["--on-policy", "0.5", *flags])
    assert message.startswith("on_policy = 0.5 needs nets = pair and denoiser_process = mask")
    assert "must lie in [0, 1]" in refusal(config.load, argv=["--on-policy", "1.5"])
