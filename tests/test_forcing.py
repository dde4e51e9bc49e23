"""Diffusion Forcing (arXiv:2407.01392): a noise level per frame, rollouts, caches, particles."""

import itertools
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, samples_of, script
from test_gidd import loss_by_hand, random_rows, seeded, succeed
from world import Oracle, Table, World, dense, tiny_spec

import config
import data
import evaluate
import methods
import model
import train_ddpd
from diffusion import likelihood, objectives, processes, samplers
from diffusion.forcing import draw_levels, forcing_tasks, rollout_levels, scheduling_matrix
from diffusion.gidd import gidd_loss, gidd_tasks, token_weights
from diffusion.particles import resample
from diffusion.processes import Noise, flip_rate_to_level

V = 7
HYBRID = Noise("hybrid", V, 0.2)


def rollout(net, x, levels, rng, **options):
    """A rollout of sequences without labels.  -> yields State"""
    label = torch.zeros(len(x)).long()
    return samplers.rollout(net, x, label, levels, generator=rng, **options)


def run(net, x, levels, rng, **options):
    """A rollout to its end.  -> the last State"""
    return samplers.last(rollout(net, x, levels, rng, **options))


def constant_denoiser(x, t, label, sites=None):
    """All ids are equally likely everywhere."""
    return torch.zeros(*x.shape, V)


# Levels


@pytest.mark.parametrize("n_steps, n_frames, lag, block", [
    (4, 3, 0, 1), (4, 3, 4, 1), (5, 4, 2, 1), (7, 5, 3, 2), (1, 1, 9, 1),
])
def test_scheduling_matrices(n_steps, n_frames, lag, block):
    """Every column falls from 1 to 0 in n_steps equal steps; later frames fall later."""
    levels = scheduling_matrix(n_steps, n_frames, lag, block)
    assert levels.shape == (n_steps + lag * ((n_frames - 1) // block) + 1, n_frames)
    assert (levels[0] == 1).all()
    assert (levels[-1] == 0).all()
    fall = levels[:-1] - levels[1:]
    assert (fall >= 0).all()
    assert (levels[:, 1:] >= levels[:, :-1]).all()
    assert torch.allclose(fall[fall > 0], torch.tensor(1 / n_steps))
    assert ((fall > 0).sum(0) == n_steps).all()
    if lag == 0:
        assert (levels == levels[:, :1]).all()
    if lag == n_steps and block == 1:
        is_between = (0 < levels) & (levels < 1)
        assert (is_between.sum(1) <= 1).all()


def test_levels_of_a_rollout():
    """Context columns stay at 0; without lag as many frames as a window holds fall together."""
    levels = rollout_levels([8, 2, 2], 4, context_frames=2)
    assert levels.shape == (4 * 6 + 1, 8)
    assert (levels[:, :2] == 0).all()
    assert (levels[0, 2:] == 1).all()

    levels = rollout_levels([8, 2, 2], 4, frames=20, lag=0, context_frames=2)
    assert levels.shape == (4 * 3 + 1, 20)
    assert (levels[:, 2:8] == levels[:, 2:3]).all()
    assert ((levels > 0) & (levels < 1)).sum(1).max() == 6

    assert rollout_levels([9, 9], 4).shape == (5, 1)
    with pytest.raises(ValueError, match="no more than the 2"):
        rollout_levels([8, 2, 2], 4, frames=2, context_frames=2)


def find_rollout_rows(levels, loss_mask, n_context):
    """Which rows belong to a rollout, by three numbers that tell rollouts apart.

    ->  {(where the past begins, the first frame that falls, 4 lag / n_steps): (n,) bool}
    """
    n, n_frames = levels.shape
    order = torch.arange(n_frames)
    found = {}
    keys = itertools.product(range(n_frames), range(n_context, n_frames), range(5))
    for start, first, lag in keys:
        if start > first - n_context:
            continue
        past = levels[:, start, None] if start < first else torch.zeros(n, 1)
        progress = 1 - levels[:, first, None] - lag / 4 * (order - first)   # of each frame's fall
        expected = torch.where(order < first, past, (1 - progress).clamp(0, 1))
        expected = expected.masked_fill(order < start, 1)
        enters_loss = (order >= first) & (progress >= 0)
        fits = ((expected - levels).abs() < 1e-6) & (enters_loss == loss_mask)
        found[start, first, lag] = fits.all(1) & (past[:, 0] <= 0.1) & (levels[:, first] > 0)
    return found


def share_of(event):
    return event.float().mean().item()


def test_levels_of_frames_are_independent(rng):
    """Without rollout rows: uniform, uncorrelated, and all frames enter the loss."""
    levels, loss_mask = draw_levels(4000, 6, "frame", 0.0, rng)
    assert levels.mean() == pytest.approx(0.5, abs=0.02)
    assert (np.corrcoef(levels.T.numpy()) - np.eye(6)).max() < 0.07
    assert loss_mask.all()


@pytest.mark.parametrize("n_context, granularity", [(0, "frame"), (2, "frame"), (2, "next")])
def test_training_levels_look_like_a_rollouts(n_context, granularity, rng):
    """All rows are those of scheduling matrices, as many of each kind as promised."""
    n, n_frames = 8000, 6
    is_next = granularity == "next"
    levels, loss_mask = draw_levels(n, n_frames, granularity, 1.0, rng, n_context)
    found = find_rollout_rows(levels, loss_mask, n_context)
    assert torch.stack(list(found.values())).any(0).all()

    def rows_with(start=None, first=None, lag=None):
        wanted = (start, first, lag)
        rows = [fits for key, fits in found.items()
                if all(w is None or w == value for w, value in zip(wanted, key, strict=True))]
        return torch.stack(rows).any(0) if rows else torch.zeros(n, dtype=torch.bool)

    if is_next:                         # with "frame", noise in the past can look like a fall
        for first in range(n_context, n_frames):
            rows = rows_with(first=first)
            assert share_of(rows) == pytest.approx(1 / (n_frames - n_context), abs=0.03)
            is_unseen = levels[rows, first] == 1
            assert share_of(is_unseen) == pytest.approx(0.5, abs=0.06)
            n_starts = first - n_context + 1
            for start in range(n_starts):
                share = share_of(rows_with(start=start)[rows])
                assert share == pytest.approx(1 / n_starts, abs=0.06)
    if n_context:
        # frame 2 falls after a clean past, so far that each lag has levels of its own
        rows = (levels[:, 0] == 0) & (0 < levels[:, 2]) & (levels[:, 2] < 0.25)
        shares = [share_of(rows_with(lag=lag)[rows]) for lag in range(5)]
        wanted = [0, 0, 0, 0, 1] if is_next else [0.008, 0.056, 0.152, 0.296, 0.488]
        assert shares == pytest.approx(wanted, abs=0.08)
        rows = rows_with(first=5) & rows_with(start=3) & (levels[:, 5] == 1)
        is_noisy = levels[rows, 4] > 0
        assert share_of(is_noisy) == pytest.approx(0 if is_next else 0.1, abs=0.05)


def test_a_share_of_rows_looks_like_a_rollouts(rng):
    """Exact zeros and ones, which independent levels do not have; with "token" equal levels."""
    levels, _ = draw_levels(4000, 6, "frame", 0.25, rng)
    has_ends = ((levels == 0) | (levels == 1)).any(1)
    assert share_of(has_ends) == pytest.approx(0.25, abs=0.03)
    levels, loss_mask = draw_levels(4000, 6, "token", 0.5, rng)
    assert share_of((levels == levels[:, :1]).all(1)) == pytest.approx(0.5, abs=0.03)
    assert loss_mask.all()


@pytest.mark.parametrize("n_context", [0, 2])
def test_shared_levels_follow_a_clean_context(n_context, rng):
    """One level for all later frames; the context is clean and excluded from the loss."""
    levels, loss_mask = draw_levels(100, 6, "shared", 0.25, rng, n_context)
    assert (levels[:, n_context:] == levels[:, -1:]).all()
    assert levels[:, -1].unique().numel() == 100
    assert (levels[:, :n_context] == 0).all()
    assert loss_mask[:, n_context:].all()
    assert not loss_mask[:, :n_context].any()


@pytest.mark.parametrize("process, p_uniform", [("uniform", 0.0), ("hybrid", 0.2)])
def test_a_flip_rate_has_its_level(process, p_uniform):
    """At that level this share of the visible tokens is wrong."""
    noise = Noise(process, V, p_uniform)
    t = flip_rate_to_level(0.05, noise)
    x0 = torch.zeros(400_000, 1).long()
    x, _ = processes.corrupt(x0, torch.full((len(x0), 1), t), noise, torch.Generator())
    is_visible = x != V
    assert share_of(x[is_visible] != 0) == pytest.approx(0.05, abs=0.002)
    if process == "uniform":
        assert t == pytest.approx(0.05 * V / (V - 1))


@pytest.mark.parametrize("process", ["mask", "hybrid"])
def test_masks_alone_have_no_level_for_a_flip_rate(process):
    with pytest.raises(ValueError, match="certain at every level"):
        flip_rate_to_level(0.05, Noise(process, V, 0.0))


# Training


@pytest.mark.parametrize("weight", ["elbo", "clip", "dynamic", "none"])
def test_equal_levels_give_the_loss_of_gidd(weight, rng):
    """Levels of frames that are all equal: the same noise and the same loss, exactly."""
    x0 = torch.randint(V, (5, 12), generator=rng)
    t = torch.rand(5, 1, generator=rng)
    table = torch.randn(V + 1, V, generator=rng)
    label = x0[:, 0]
    levels = t.expand(5, 4)
    tasks = gidd_tasks(x0, t, label, HYBRID, seeded(3), weight=weight)
    of_gidd = tasks["denoiser"]
    tasks = forcing_tasks(x0, levels, None, label, HYBRID, seeded(3), weight=weight)
    of_forcing = tasks["denoiser"]

    def loss(task):
        logits = table[task.xt.flatten()[task.sites]]
        per_site = task.loss(logits, task.target, *task.loss_args)
        return per_site.sum() / (task.n_loss_tokens or len(task.sites))

    assert torch.equal(of_gidd.xt, of_forcing.xt)
    assert torch.equal(loss(of_gidd), loss(of_forcing))
    assert loss(of_gidd) > 0


@pytest.mark.parametrize("weight", ["dynamic", "none"])
def test_finished_and_known_tokens_stay_clean_and_out_of_the_loss(weight, rng):
    """So do frames outside of the loss mask, but they keep their noise."""
    x0 = torch.randint(V, (40, 12), generator=rng)
    levels = torch.tensor([[0.0, 0.5, 1.0]]).expand(40, 3)
    known = torch.zeros_like(x0, dtype=torch.bool)
    known[:, 5] = True

    def task_of(loss_mask):
        options = dict(known=known, weight=weight)
        return forcing_tasks(x0, levels, loss_mask, x0[:, 0], HYBRID, rng, **options)["denoiser"]

    task = task_of(None)
    position = task.sites % 12
    assert torch.equal(task.xt[:, :4], x0[:, :4])
    assert torch.equal(task.xt[:, 5], x0[:, 5])
    assert task.t.shape == x0.shape
    assert (task.t[:, 5] == 0).all()
    assert (task.t[:, 4] == 0.5).all()
    assert (position >= 4).all()
    assert (position != 5).all()
    assert (task.xt[:, 8:] == V).any()
    assert task.n_loss_tokens == (0 if weight == "none" else 40 * 7)

    task = task_of(torch.tensor([[True, True, False]]).expand(40, 3))
    assert len(task.sites) > 0
    assert (task.sites % 12 < 8).all()
    assert (task.xt[:, 8:] == V).any()
    assert task.n_loss_tokens == (0 if weight == "none" else 40 * 3)


@pytest.mark.parametrize("make_tasks, process", [
    (objectives.pair_tasks, "mask"), (objectives.pair_tasks, "uniform"),
    (objectives.single_tasks, "uniform"),
])
def test_known_tokens_of_planned_denoising_stay_clean_and_out_of_the_loss(make_tasks, process, rng):
    x0 = torch.randint(V, (40, 12), generator=rng)
    known = torch.zeros_like(x0, dtype=torch.bool)
    known[:, 5] = True
    t = torch.full((40, 1), 0.9)
    for task in make_tasks(x0, t, x0[:, 0], Noise(process, V), rng, known).values():
        assert torch.equal(task.xt[:, 5], x0[:, 5])
        assert (task.sites % 12 != 5).all()
        assert task.t.shape == (40, 1)


def test_plain_cross_entropy_sees_tokens_redrawn_as_themselves(rng):
    """Weight "none" is CE at all noise: else visible tokens would always be wrong ones."""
    x0 = torch.randint(2, (200, 50), generator=rng)
    t = torch.full((200, 1), 0.5)
    task = gidd_tasks(x0, t, x0[:, 0], Noise("uniform", 2), rng, weight="none")["denoiser"]
    looks_clean = task.xt.flatten()[task.sites] == task.target
    assert share_of(looks_clean) == pytest.approx(0.5, abs=0.03)


def test_the_loss_of_uniform_noise_is_its_formula():
    noise = Noise("uniform", V)
    logits, x0, z, t = random_rows()
    z = torch.where(z == V, (x0 + 1) % V, z)
    is_clean = z == x0
    weight = token_weights(x0, z, t, noise, "elbo")
    at_clean = 1 / (V * (1 - t) * (1 - t + t / V))
    assert torch.allclose(weight[~is_clean], (1 / (t * (1 - t)))[~is_clean])
    assert torch.allclose(weight[is_clean], at_clean[is_clean])
    truth = loss_by_hand(logits, x0, z, t, weight, noise)
    assert torch.allclose(gidd_loss(logits, x0, z, t, weight, noise), truth, rtol=1e-8)


NOISES = [("hybrid", 0.2), ("uniform", 0.0), ("mask", 0.0)]


@pytest.mark.parametrize("process, p_uniform", NOISES)
def test_bounds_along_paths_are_tight(process, p_uniform):
    """All tokens together and frame by frame: the exact likelihood; more for a random denoiser."""
    world = dense().under(process, p_uniform)
    spec = tiny_spec("forcing", (3, 1, 1), vocab=3, process=process, p_uniform=p_uniform)
    assert spec.noise == world.noise

    def bits(denoiser):
        rng = seeded(0)
        x0 = world.sample(40_000, rng)
        return methods.bits_per_token(spec, {"denoiser": denoiser}, x0, x0[:, 0], None, rng)

    found = bits(world.denoiser)
    assert found.keys() == {"shared", "frames"}
    for exact, error in found.values():
        assert exact == pytest.approx(world.entropy(), abs=3 * error)
        assert error < 0.04
    table = torch.randn(4, 3, generator=seeded(1))
    found = bits(lambda x, t, label: table[x])
    assert found.keys() == {"shared", "frames"}
    for worse, error in found.values():
        assert worse > world.entropy() + 3 * error


@pytest.mark.parametrize("bounds", [
    likelihood.masked_bound, likelihood.gidd_bound, likelihood.forcing_bound,
])
def test_known_tokens_are_not_counted(bounds, rng):
    """Two random bits beside their sum, which is known: half a bit is left, a quarter for each."""
    bit = torch.arange(2)
    points = torch.cartesian_prod(bit, bit)
    points = torch.cat([points, points.sum(1, keepdim=True)], 1)
    world = World(points, torch.ones(4), 3).under("mask")
    x0 = world.sample(20_000, rng)
    known = torch.zeros_like(x0, dtype=torch.bool)
    known[:, 2] = True
    nets = {"denoiser": world.denoiser}
    found = likelihood.bits_per_token(nets, bounds, x0, x0[:, 0], world.noise, rng, known=known)
    (bits, error), = found.values()
    assert bits == pytest.approx(0.25, abs=4 * error)
    assert error < 0.02


# Rollouts


@pytest.mark.parametrize("lag", [0, 1, 3, 8])
@pytest.mark.parametrize("process", ["hybrid", "uniform", "mask"])
def test_an_oracle_is_followed_at_any_lag(process, lag, rng):
    """A denoiser that knows x0 reaches it; finished frames stay; known tokens are never written."""
    noise = Noise(process, V, 0.2)
    x0 = torch.randint(V, (4, 20), generator=rng)
    known = torch.zeros_like(x0, dtype=torch.bool)
    known[:, :4] = True                                     # the first of five frames
    known[0, 10] = True
    x = torch.where(known, x0, noise.sample_prior(x0.shape, rng))
    levels = scheduling_matrix(8, 5, lag)
    oracle = Oracle(x0, V)
    t_inputs = []

    def denoiser(x, t, label, sites=None):
        t_inputs.append(t)
        return oracle.denoiser(x, t, torch.arange(4))

    for i, state in enumerate(rollout(denoiser, x, levels, rng, known=known, **asdict(noise))):
        row = min(i + lag + 1, len(levels) - 1)             # the second frame is the first to fall
        is_finished = levels[row].repeat_interleave(4) == 0
        assert torch.equal(state.x[:, is_finished], x0[:, is_finished])
        assert not (state.written & known).any()
        assert (t_inputs[-1][known] == 0).all()
        assert (t_inputs[-1] <= 1).all()
    assert torch.equal(state.x, x0)
    assert (state.nfe == len(t_inputs)).all()
    assert len(t_inputs) == len(levels) - 1 - lag   # no call while only known frames fall


@pytest.mark.parametrize("lag", [0, 20, 40])
@pytest.mark.parametrize("process, p_uniform", NOISES)
def test_rollouts_have_the_law_of_the_data(process, p_uniform, lag, rng):
    """Full sequence, pyramid and frame by frame on the tiny world: total variation under 0.02."""
    world = dense().under(process, p_uniform)
    levels = scheduling_matrix(40, 3, lag) ** (2 if process == "hybrid" else 1)
    x = world.noise.sample_prior((60_000, 3), rng)
    final = run(Table(world, world.denoiser), x, levels, rng, **asdict(world.noise))
    assert world.distance(final.x) < 0.02


@pytest.mark.parametrize("vocab", [3, 17, 256])
@pytest.mark.parametrize("process, p_uniform, low, high", [
    ("mask", 0.0, 0.999, 1.001), ("hybrid", 0.05, 0.05, 0.13), ("hybrid", 0.2, 0.01, 0.05),
    ("uniform", 0.0, 0.0, 0.003),
])
def test_what_is_learned_at_level_1(process, p_uniform, low, high, vocab, rng):
    """Clamped to T_MAX, the bound's loss has this share of cross-entropy's gradient."""
    noise = Noise(process, vocab, p_uniform)
    x0 = torch.randint(vocab, (64,), generator=rng)
    z = (x0 + 1) % vocab if process == "uniform" else torch.full_like(x0, vocab)
    t = torch.full((64,), processes.T_MAX, dtype=torch.float64)
    logits = torch.randn(64, vocab, generator=rng, dtype=torch.float64).requires_grad_()
    weight = token_weights(x0, z, t, noise, "elbo")
    loss = gidd_loss(logits, x0, z, t, weight, noise).sum()
    ce = F.cross_entropy(logits, x0, reduction="sum")
    grad, = torch.autograd.grad(loss, logits)
    grad_of_ce, = torch.autograd.grad(ce, logits)
    assert low <= grad.norm() / grad_of_ce.norm() <= high


@pytest.mark.parametrize("sampler", ["rollout", "ancestral"])
def test_a_run_is_sampled_on_its_process_levels(sampler, rng):
    """Hybrid noise falls on squares, in rollouts too: at 8 steps .03 from the law, where an even
    grid is .07 from it."""
    spec = tiny_spec("forcing", grid=(1, 3), vocab=3, noise_granularity="token", p_uniform=0.2)
    world = dense().under("hybrid", 0.2)
    nets = {"denoiser": Table(world, world.denoiser)}
    label = torch.zeros(60_000).long()
    states = methods.sample(spec, nets, label, n_steps=8, generator=rng, sampler=sampler)
    assert world.distance(samplers.last(states).x) < 0.045


def test_the_window_slides(rng):
    """The denoiser sees so many frames, the falling one last; what is finished never changes."""
    x0 = torch.randint(V, (2, 24), generator=rng)           # 12 frames of 2 tokens
    known = torch.zeros_like(x0, dtype=torch.bool)
    known[:, :4] = True
    x = torch.where(known, x0, V)
    levels = rollout_levels([4, 2, 1], 3, frames=12, context_frames=2)
    inputs = []

    def denoiser(x, t, label, sites=None):
        falling = 2 + len(inputs) // 3
        inputs.append((x, t))
        end = max(4, falling + 1) * 2
        return F.one_hot(x0[:, end - 8:end], V).float().log()

    before = x.clone()
    for i, state in enumerate(rollout(denoiser, x, levels, rng, vocab=V, known=known, window=4)):
        frame = 2 + i // 3
        assert torch.equal(state.x[:, :2 * frame], x0[:, :2 * frame])
        changed = (state.x != before).any(0).nonzero()[:, 0] // 2
        assert (changed == frame).all()
        x_input, t_input = inputs[-1]
        assert x_input.shape == (2, 8)
        assert (t_input[:, -2:] > 0).all()
        before = state.x
    assert torch.equal(state.x, x0)
    assert len(inputs) == 30
    with pytest.raises(ValueError, match="too many for a window of 4"):
        run(denoiser, x, scheduling_matrix(3, 12, 0), rng, vocab=V, window=4)


def test_frames_beyond_the_end_are_noise_and_dropped(rng):
    """Two frames by a denoiser of four: it sees four, the last two at level 1; two come back."""
    shapes = []

    def denoiser(x, t, label, sites=None):
        shapes.append(x.shape)
        assert (t[:, 4:] == 1).all()
        assert (x[:, 4:] == V).all()
        return constant_denoiser(x, t, label)

    x = torch.full((3, 4), V)
    final = run(denoiser, x, scheduling_matrix(2, 2, 2), rng, vocab=V, window=4)
    assert final.x.shape == (3, 4)
    assert final.x.max() < V
    assert set(shapes) == {(3, 8)}


def test_the_denoiser_is_told_levels_of_stabilization_and_context(rng):
    """At finished and at known tokens; refused with masks alone, where they would mean nothing."""
    known = torch.zeros(1, 6, dtype=torch.bool)
    known[:, :2] = True
    levels = rollout_levels([3, 2, 1], 2, context_frames=1)
    t_inputs = []

    def denoiser(x, t, label, sites=None):
        t_inputs.append(t)
        return constant_denoiser(x, t, label)

    def start(**options):
        return run(denoiser, torch.full((1, 6), V), levels, rng, vocab=V, known=known, **options)

    start(stabilization_level=0.1, context_level=0.2)
    assert torch.allclose(t_inputs[-1], torch.tensor([[0.2, 0.2, 0.1, 0.1, 0.5, 0.5]]))
    for only_masks in (dict(process="mask"), dict(process="hybrid", p_uniform=0.0)):
        for name in ("stabilization_level", "context_level"):
            with pytest.raises(ValueError, match="needs uniform noise"):
                start(**{name: 0.1}, **only_masks)


# Causal networks and their cache


def causal_net(n_frames=4, seed=0):
    """On grids of (frames, 2, 2), with weights as if trained."""
    torch.manual_seed(seed)
    shape = model.Shape((n_frames, 2, 2), V, 0, 2, 2, 32, 32, causal=True)
    net = model.Transformer(shape, "denoiser", t_conditioned=True)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net.eval().requires_grad_(False)


def test_causal_frames_see_no_future(rng):
    net = causal_net()
    x = torch.randint(V, (2, 16), generator=rng)
    t = torch.rand(2, 16, generator=rng)
    label = torch.zeros(2).long()
    logits = net(x, t, label)

    new_future = x.clone()
    new_future[:, 8:] = (x[:, 8:] + 1) % V
    changed = net(new_future, t, label)
    assert torch.allclose(logits[:, :8], changed[:, :8], atol=1e-6)
    assert not torch.allclose(logits[:, 8:], changed[:, 8:], atol=1e-2)

    new_past = x.clone()
    new_past[:, :4] = (x[:, :4] + 1) % V
    changed = net(new_past, t, label)
    assert not torch.allclose(logits[:, 4:8], changed[:, 4:8], atol=1e-2)


def test_a_window_sees_the_same_wherever_it_stands(rng):
    """Scores depend on the displacement of frames, and the label sees each as the first."""
    net = causal_net()
    far, far_from_label = net.rope(6, 4)
    near, _ = net.rope(0, 4)
    q, k = torch.randn(2, 16, 16, generator=rng)
    scores = [model.rotate(q, *rope) @ model.rotate(k, *rope).T for rope in (far, near)]
    assert torch.allclose(*scores, atol=1e-4)

    angles = model.rope_angles((4, 2, 2), 16)[:4].repeat(4, 1)
    cos, sin = far_from_label
    assert torch.equal(cos, angles.cos())
    assert torch.equal(sin, angles.sin())

    x = torch.randint(V, (2, 40), generator=rng)
    assert net(x, torch.zeros(2, 40), torch.zeros(2).long()).shape == (2, 40, V)


@pytest.mark.parametrize("n_frames", [4, 11])
def test_cached_logits_are_those_of_one_pass(n_frames, rng):
    """Frame by frame with kept keys and values, also where the window of 4 slides."""
    net = causal_net()
    label = torch.zeros(3).long()
    x = torch.randint(V, (3, 4 * n_frames), generator=rng)
    t = torch.zeros(3, 4 * n_frames)
    kv_cache = model.KVCache(net.shape)
    parts = []
    for i in range(0, n_frames, 2):
        here = slice(4 * i, 4 * (i + 2))
        net(x[:, here], t[:, here], label, None, kv_cache, 0)   # keeps nothing, changes nothing
        n_keep = min(2, n_frames - i)
        parts.append(net(x[:, here], t[:, here], label, None, kv_cache, n_keep))
    assert (torch.cat(parts, 1) - net(x, t, label)).abs().max() < 1e-5
    assert kv_cache.kept[0][0].shape[2] <= 4 * 3


def test_cached_rollouts_are_rollouts(rng):
    """Until the window slides the samples are the same; finished frames are computed once."""
    net = causal_net()
    known = torch.zeros(3, 16, dtype=torch.bool)
    known[:, :4] = True
    x = torch.where(known, torch.randint(V, (3, 16), generator=rng), V)
    levels = rollout_levels([4, 2, 2], 5, lag=2, context_frames=1)

    def sample(kv_cache):
        n_tokens = []

        def watched(x, *args):
            n_tokens.append(x.shape[1])
            return net(x, *args)

        options = dict(vocab=V, known=known, window=4, kv_cache=kv_cache)
        return run(watched, x, levels, seeded(1), **options), n_tokens

    plain, n_tokens = sample(None)
    cached, n_tokens_cached = sample(model.KVCache(net.shape))
    assert torch.equal(plain.x, cached.x)
    assert torch.equal(plain.nfe, cached.nfe)
    assert n_tokens[0] == 16
    assert n_tokens_cached[-1] == 4
    assert len(n_tokens) == len(n_tokens_cached) == 9
    assert sum(n_tokens_cached) < 0.7 * sum(n_tokens)


def test_cached_rollouts_go_beyond_the_window(rng):
    """Nine frames with a window of four; the known frame stays."""
    net = causal_net()
    known = torch.zeros(3, 36, dtype=torch.bool)
    known[:, :4] = True
    x = torch.where(known, torch.randint(V, (3, 36), generator=rng), V)
    levels = rollout_levels([4, 2, 2], 5, frames=9, context_frames=1)
    options = dict(vocab=V, known=known, window=4, kv_cache=model.KVCache(net.shape))
    final = run(net, x, levels, rng, **options)
    assert final.x.max() < V
    assert torch.equal(final.x[:, :4], x[:, :4])


def test_a_cache_goes_without_reward(rng):
    net = causal_net()
    options = dict(vocab=V, kv_cache=model.KVCache(net.shape), reward=lambda x: x)
    with pytest.raises(ValueError, match="without reward"):
        run(net, torch.full((3, 16), V), scheduling_matrix(5, 4, 2), rng, **options)


# Particles


def test_a_reward_of_zero_changes_nothing():
    world = dense().under("hybrid", 0.2)
    levels = scheduling_matrix(6, 3, 3)
    x = torch.full((64, 3), 3)

    def sample(**options):
        return run(world.denoiser, x, levels, seeded(5), vocab=3, p_uniform=0.2, **options).x

    def no_reward(x):
        return torch.zeros(len(x))

    assert torch.equal(sample(), sample(reward=no_reward, particles=8, n_draws=3))


@pytest.mark.parametrize("lag, n_draws", [(0, 1), (16, 4)])
def test_particles_reach_the_tilted_law(lag, n_draws, rng):
    """p(x) exp(weight reward(x)) on the tiny world, within 0.03; predictions leave no trace."""
    world = dense().under("hybrid", 0.2)

    def reward(x):
        return (x == 2).sum(1).float()

    tilted = World(world.points, world.q * torch.exp(0.8 * reward(world.points)), 3)
    x = torch.full((2**16, 3), 3)
    levels = scheduling_matrix(32, 3, lag) ** 2
    options = dict(reward=reward, reward_weight=0.8, particles=2**12, n_draws=n_draws)
    final = run(Table(world, world.denoiser), x, levels, rng, vocab=3, p_uniform=0.2, **options)
    assert tilted.distance(final.x) < 0.03
    assert world.distance(final.x) > 0.1


def test_resampling(rng):
    """Only groups of small effective size, each within itself, in proportion to the weights."""
    log_weights = torch.tensor([0.0, 0.0, 0.1, 0.0, 5.0, 0.0, 0.0, 0.0])
    rows, is_resampled = resample(log_weights, 4, rng)
    assert rows.tolist() == [0, 1, 2, 3, 4, 4, 4, 4]
    assert is_resampled.tolist() == [False] * 4 + [True] * 4

    rows, _ = resample(torch.zeros(8), 4, rng, always=True)     # equal weights: nothing to do
    assert rows.tolist() == list(range(8))

    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    counts = torch.zeros(4)
    for _ in range(500):
        rows, _ = resample(weights.log(), 4, rng, always=True)
        counts += torch.bincount(rows, minlength=4)
    assert torch.allclose(counts / counts.sum(), weights, atol=0.02)


def test_a_hard_constraint_is_met(rng):
    """A reward of -inf rules sequences out; a group with nothing else is refused by name."""
    world = dense().under("hybrid", 0.2)
    levels = scheduling_matrix(16, 3, 0) ** 2
    x = torch.full((2**14, 3), 3)

    def no_twos(x):
        return torch.where((x == 2).any(1), -torch.inf, 0.0)

    options = dict(vocab=3, p_uniform=0.2, particles=2**12)
    final = run(world.denoiser, x, levels, rng, reward=no_twos, **options)
    assert not (final.x == 2).any()
    allowed = ~(world.points == 2).any(1)
    tilted = World(world.points, world.q * allowed, 3)
    assert tilted.distance(final.x) < 0.05

    def nothing(x):
        return torch.full((len(x),), -torch.inf)

    with pytest.raises(ValueError, match="every particle of group 0 has reward -inf"):
        run(world.denoiser, x, levels, rng, reward=nothing, **options)


def test_rewards_see_no_masks(rng):
    """Not even those of frames that the window has not reached."""
    seen = []

    def reward(x):
        seen.append(x.max().item())
        return torch.zeros(len(x))

    levels = rollout_levels([3, 2, 1], 2, frames=8)
    x = torch.full((4, 16), V)
    run(constant_denoiser, x, levels, rng, vocab=V, window=3, reward=reward, particles=2)
    assert max(seen) < V


# Known tokens and context frames


def test_where_all_is_known_one_state_comes_back(rng):
    """No network is called, and nothing is written."""
    def net(x, t, label, sites=None):
        raise AssertionError("called")

    x = torch.randint(V, (2, 8), generator=rng)
    known = torch.ones_like(x, dtype=torch.bool)
    states = list(rollout(net, x, rollout_levels([2, 2, 2], 4), rng, vocab=V, known=known))
    assert len(states) == 1
    assert torch.equal(states[0].x, x)
    assert not states[0].written.any() and not states[0].nfe.any()


@pytest.mark.parametrize("known_frames", [[], [0], [1, 2], [0, 1, 3], [0, 1, 2, 3]])
def test_levels_follow_what_is_known(known_frames, rng):
    """Any set of known frames, fewer than a run's context or others: no mask is left."""
    spec = tiny_spec("forcing", grid=(4, 2, 2), noise_granularity="frame", context_frames=2)
    x0 = torch.randint(7, (3, 16), generator=rng)
    known = torch.zeros(3, 4, 4, dtype=torch.bool)
    known[:, known_frames] = True
    known = known.view(3, 16)
    nets = {"denoiser": Oracle(x0, 7).denoiser}
    states = methods.sample(
        spec, nets, torch.arange(3), n_steps=3, generator=rng, known=known, known_tokens=x0
    )
    final = samplers.last(states)
    assert torch.equal(final.x, x0)
    assert (final.nfe == 3 * (4 - len(known_frames))).all()


def test_known_ids_and_positions():
    """meta["given"] holds ids and grid positions; a video's context frames are added to them."""
    tokens = torch.tensor([[0, 4, 1, 4, 2, 0]])
    meta = dict(grid=[2, 3], given=[4, [1, 2]])
    assert data.known_mask(meta, tokens).tolist() == [[False, True, False, True, False, True]]
    assert data.known_mask(dict(grid=[2, 3], given=[]), tokens) is None
    video = dict(grid=[3, 1, 2], given=[])
    assert data.context_mask(video, tokens, 2).tolist() == [[True] * 4 + [False] * 2]
    assert data.context_mask(video, tokens, 0) is None


@pytest.mark.parametrize("n_context", [0, 3])
def test_training_learns_frames_after_the_context(n_context, rng):
    """--context-frames: nothing is learned of those frames, something of every later one."""
    flags = ["--method", "forcing", "--noise-granularity", "next"]
    cfg = config.load(argv=[*flags, "--context-frames", str(n_context)])
    meta = dict(grid=[6, 2, 2], vocab=4, n_classes=0, given=[])
    spec = methods.spec_of(asdict(cfg), meta)
    x0 = torch.randint(4, (200, 6 * 4), generator=rng)
    task = methods.make_tasks(spec, x0, torch.zeros(200).long(), None, rng)["denoiser"]
    assert (task.sites % 24 // 4).unique().tolist() == list(range(n_context, 6))


# Whole runs

FORCING = [*TINY, "--method", "forcing", "--data", "bounce"]
FORCING += ["--batch-size", 2, "--eval-sequences", 4]


def test_bits_leave_the_given_frames_out(monkeypatch):
    """The context of a run is neither noised nor counted in its bounds; all of them are reported,
    by validation and evaluation alike."""
    asked = []

    def bits_per_token(spec, nets, x0, label, known, rng, n_distinct=0, progress=iter):
        asked.append(known.view(len(known), *spec.grid))
        return {"shared": (1.5, 0.1), "frames": (1.25, 0.2)}

    monkeypatch.setattr(methods, "bits_per_token", bits_per_token)
    flags = ["--context-frames", 2, "--max-iters", 1, "--out-dir", "out/given"]
    train_ddpd.main(config.load(argv=[*map(str, [*FORCING, *flags])]))
    bits = evaluate.Judged("out/given", torch.device("cpu")).bits()
    for known in asked:
        assert known[:, :2].all() and not known[:, 2:].any()
    assert len(asked) == 2
    columns = evaluate.bits_columns(bits)
    assert columns == dict(bits_per_token=1.5, bits_se=0.1, bits_frames=1.25, bits_frames_se=0.2)
    assert "1.250 +- 0.200 (frames)" in evaluate.describe_bits(bits)


@pytest.mark.parametrize("flags", [
    ["--causal"], ["--noise-granularity", "shared", "--process", "uniform", "--weight", "none"],
])
def test_a_video_run_from_training_to_rollout(flags):
    """Bounds logged; rollouts longer than the data; frames together; misuse refused by name."""
    out = f"out/{len(flags)}"
    succeed("train_ddpd.py", *FORCING, *flags, "--max-iters", 2, "--out-dir", out)
    log = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    assert {"val_bits_shared", "val_bits_frames"} <= log[-1].keys()

    longer = ["--frames", 11, "--stabilization-level", 0.02]
    printed = succeed("sample.py", out, "--n-steps", 2, "--labels", 0, 0, *longer)
    assert "2 samples, 18.0 NFE each" in printed
    assert "intact" in printed
    assert "right" in printed
    tokens = np.load(samples_of(out) / "samples.npz")["tokens"]
    assert tokens.shape == (2, 11, 8, 8)
    assert tokens.max() < 4
    real = np.load("data/bounce/val_tokens.npy")
    assert (tokens[0, :2] == real[0, :2]).all()
    assert (samples_of(out) / "rollout.gif").exists()

    together = ["--sampler", "ancestral", "--context-frames", 0, "--n-video", 0]
    printed = succeed("sample.py", out, *together)
    assert "8 samples, 4.0 NFE each" in printed             # of each frame, together

    refused = script("train_ddpd.py", *TINY, "--method", "forcing", "--out-dir", "out/refused")
    assert refused.returncode != 0
    assert "digits is no video" in refused.stderr
    refused = script("sample.py", out, "--frames", 2)
    assert refused.returncode != 0
    assert "no more than the 2 that are given" in refused.stderr
