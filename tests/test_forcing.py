"""Diffusion Forcing (arXiv:2407.01392): a noise level for each frame, rollouts, caches, particles."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, script
from test_gidd import rows
from test_likelihood import entropy
from test_samplers import Truth
from world import Table, World, dense

import config
import data
import model
import train_ddpd
from diffusion import objectives, processes, samplers
from diffusion.objectives import gidd_loss, gidd_weight
from diffusion.rollouts import resample
from diffusion.samplers import last, rollout

V = 7


# Levels


@pytest.mark.parametrize(
    "steps, frames, lag, block", [(4, 3, 0, 1), (4, 3, 4, 1), (5, 4, 2, 1), (7, 5, 3, 2), (1, 1, 9, 1)]
)
def test_staircases(steps, frames, lag, block):
    """Every column starts at 1, ends at 0, never rises, and falls in steps of 1 / steps; later frames fall later."""
    levels = processes.staircase(steps, frames, lag, block)
    assert levels.shape == (steps + lag * ((frames - 1) // block) + 1, frames)
    assert (levels[0] == 1).all() and (levels[-1] == 0).all()
    falls = levels[:-1] - levels[1:]
    assert (falls >= 0).all() and (levels[:, 1:] >= levels[:, :-1]).all()
    assert torch.allclose(falls[falls > 0], torch.tensor(1 / steps)) and ((falls > 0).sum(0) == steps).all()
    if lag == 0:
        assert (levels == levels[:, :1]).all()
    if lag == steps and block == 1:
        assert (((0 < levels) & (levels < 1)).sum(1) <= 1).all()


def test_levels_of_a_rollout():
    """Context columns stay at 0; without lag as many frames as a window holds fall together."""
    levels = samplers.staircase_of([8, 2, 2], 4, context=2)
    assert levels.shape == (4 * 6 + 1, 8) and (levels[:, :2] == 0).all() and (levels[0, 2:] == 1).all()
    levels = samplers.staircase_of([8, 2, 2], 4, frames=20, lag=0, context=2)
    assert levels.shape == (4 * 3 + 1, 20) and (levels[:, 2:8] == levels[:, 2:3]).all()
    assert ((levels > 0) & (levels < 1)).sum(1).max() == 6
    assert samplers.staircase_of([9, 9], 4).shape == (5, 1)
    with pytest.raises(ValueError, match="no more than the 2"):
        samplers.staircase_of([8, 2, 2], 4, frames=2, context=2)


def staircase_rows(levels, waits, context):
    """Which rows are those of a staircase, by its start, the first frame that falls and 4 lag / steps.  -> {: (n,)}"""
    order, out = torch.arange(levels.shape[1]), {}
    for start, first, lag in itertools.product(range(levels.shape[1]), range(context, levels.shape[1]), range(5)):
        if start <= first - context:
            past = levels[:, start, None] if start < first else torch.zeros(len(levels), 1)
            fallen = 1 - levels[:, first, None] - lag / 4 * (order - first)
            row = torch.where(order < first, past, (1 - fallen).clamp(0, 1)).masked_fill(order < start, 1)
            fits = ((row - levels).abs() < 1e-6) & (((fallen < 0) | (order < first)) == waits)
            out[start, first, lag] = fits.all(1) & (past[:, 0] <= 0.1) & (levels[:, first] > 0)
    return out


def test_training_levels(rng):
    """Free levels are uniform and independent; all others are rows of staircases, as many of each kind as promised."""
    free, _ = processes.draw_levels(4000, 6, "frame", 0.0, rng)
    assert free.mean() == pytest.approx(0.5, abs=0.02) and (free.corrcoef().abs() < 1.01).all()
    assert (np.corrcoef(free.T.numpy()) - np.eye(6)).max() < 0.07
    for context, group in [(0, "frame"), (2, "frame"), (2, "next")]:
        levels, waits = processes.draw_levels(8000, 6, group, 1.0, rng, context)
        found = staircase_rows(levels, waits, context)
        assert torch.stack(list(found.values())).any(0).all()
        at = {key: torch.zeros(8000, dtype=torch.bool) for key in itertools.product("sfl", range(6))}
        for key, fits in found.items():
            for where in zip("sfl", key, strict=True):
                at[where] |= fits
        for first in range(context, 6) if group == "next" else ():  # noise in the past can look like a fall
            mine = at["f", first]
            assert mine.float().mean() == pytest.approx(1 / (6 - context), abs=0.03)
            assert (levels[mine, first] == 1).float().mean() == pytest.approx(0.5, abs=0.06)  # nothing of it is seen
            for start in range(first - context + 1):
                assert at["s", start][mine].float().mean() == pytest.approx(1 / (first - context + 1), abs=0.06)
        if context:
            mine = (levels[:, 0] == 0) & (0 < levels[:, 2]) & (levels[:, 2] < 0.25)  # each lag has other levels then
            shares = [at["l", lag][mine].float().mean().item() for lag in range(5)]
            wanted = [0, 0, 0, 0, 1] if group == "next" else [0.008, 0.056, 0.152, 0.296, 0.488]
            assert shares == pytest.approx(wanted, abs=0.08)
            past = levels[at["f", 5] & at["s", 3] & (levels[:, 5] == 1), 4]
            assert (past > 0).float().mean() == pytest.approx(0 if group == "next" else 0.1, abs=0.05)
    some, _ = processes.draw_levels(4000, 6, "frame", 0.25, rng)
    assert ((some == 0) | (some == 1)).any(1).float().mean() == pytest.approx(0.25, abs=0.03)  # free ones have neither
    for context in (0, 2):
        together, waits = processes.draw_levels(100, 6, "shared", 0.25, rng, context)
        assert (together[:, context:] == together[:, -1:]).all() and together[:, -1].unique().numel() == 100
        assert (together[:, :context] == 0).all() and waits.sum(1).eq(context).all() and waits[:, :context].all()
    tokens, _ = processes.draw_levels(4000, 6, "token", 0.5, rng)
    assert (tokens == tokens[:, :1]).all(1).float().mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("process, p_uniform", [("uniform", 0.0), ("hybrid", 0.2)])
def test_the_level_to_tell_of_flips(process, p_uniform):
    """At that level so many of the visible tokens are wrong."""
    t = processes.level_of_flips(0.05, V, process, p_uniform)
    x0 = torch.zeros(400_000, 1).long()
    x, _ = processes.corrupt(x0, torch.full_like(x0, t, dtype=torch.float), process, V, torch.Generator(), p_uniform)
    visible = x != V
    assert ((x != 0) & visible).sum() / visible.sum() == pytest.approx(0.05, abs=0.002)
    if process == "uniform":
        assert t == pytest.approx(0.05 * V / (V - 1))
    for noise in ("mask", "hybrid"):
        with pytest.raises(ValueError, match="certain at every level"):
            processes.level_of_flips(0.05, V, noise, 0.0)


# Learning


@pytest.mark.parametrize("weight", ["elbo", "clip", "dynamic", "none"])
def test_equal_levels_give_the_shared_loss(weight, rng):
    """Per-token levels all equal: gidd's loss exactly, task for task."""
    x0, t = torch.randint(V, (5, 12), generator=rng), torch.rand(5, 1, generator=rng)
    table, losses = torch.randn(V + 1, V, generator=rng), []
    for make, level in [(objectives.gidd, t), (objectives.forcing, t.expand(5, 4))]:
        noise = torch.Generator().manual_seed(3)
        task = make(x0, level, x0[:, 0], V, noise, 0.2, weight)["denoiser"]
        loss = objectives.plain_loss if weight == "none" else lambda *a: gidd_loss(*a, 0.2)
        losses.append((loss(table[task.more[0]], task.target, *task.more).sum() / (task.n or len(task.sites)), task.xt))
    assert torch.equal(losses[0][0], losses[1][0]) and torch.equal(losses[0][1], losses[1][1])


def test_finished_and_given_tokens_learn_nothing(rng):
    x0, levels = torch.randint(V, (40, 12), generator=rng), torch.tensor([[0.0, 0.5, 1.0]]).expand(40, 3)
    given = torch.zeros_like(x0, dtype=torch.bool)
    given[:, 5] = True
    for weight in ("dynamic", "none"):
        task = objectives.forcing(x0, levels, x0[:, 0], V, rng, 0.2, weight, given=given)["denoiser"]
        assert torch.equal(task.xt[:, :4], x0[:, :4]) and torch.equal(task.xt[:, 5], x0[:, 5])
        assert task.t.shape == x0.shape and (task.t[:, 5] == 0).all() and (task.t[:, 4] == 0.5).all()
        assert (task.sites % 12 >= 4).all() and (task.sites % 12 != 5).all() and (task.xt[:, 8:] == V).any()
        assert task.n == (40 * 7 if weight != "none" else 0)
        waits = torch.tensor([[False, False, True]]).expand(40, 3)
        task = objectives.forcing(x0, levels, x0[:, 0], V, rng, 0.2, weight, given=given, waits=waits)["denoiser"]
        assert (task.sites % 12 < 8).all() and (task.xt[:, 8:] == V).any() and len(task.sites) > 0
        assert task.n == (40 * 3 if weight != "none" else 0)
    for nets, process in [("pair", "mask"), ("pair", "uniform"), ("single", "uniform")]:
        for task in objectives.ddpd(x0, torch.full((40, 1), 0.9), x0[:, 0], V, rng, nets, process, given).values():
            assert torch.equal(task.xt[:, 5], x0[:, 5]) and (task.sites % 12 != 5).all()
            assert task.t.shape == (40, 1)


def test_plain_cross_entropy_sees_tokens_redrawn_as_themselves(rng):
    """Weight none is CE at noise, also where it looks clean: else a visible token would be known to be wrong."""
    x0 = torch.randint(2, (200, 50), generator=rng)
    task = objectives.gidd(x0, torch.full((200, 1), 0.5), x0[:, 0], 2, rng, 0.5, "none", process="uniform")["denoiser"]
    assert (task.xt.flatten()[task.sites] == task.target).float().mean() == pytest.approx(0.5, abs=0.03)


def test_the_loss_of_uniform_noise_is_its_formula():
    logits, x0, z, t = rows()
    z = torch.where(z == V, (x0 + 1) % V, z)
    weight = gidd_weight(x0, z, t, V, 0.0, "elbo", "uniform")
    assert torch.allclose(weight[z != x0], (1 / (t * (1 - t)))[z != x0])
    assert torch.allclose(weight[z == x0], (1 / (V * (1 - t) * (1 - t + t / V)))[z == x0])
    q = lambda p: processes.marginal(p[:, None], t[:, None], "uniform")[:, 0, :V]  # noqa: E731
    truth, mine = q(torch.nn.functional.one_hot(x0, V).double()), q(logits.softmax(-1))
    r = (truth / mine).gather(1, z[:, None])[:, 0]
    want = weight * ((truth * (truth / mine).log()).sum(-1) + r - r.log() - 1)
    assert torch.allclose(gidd_loss(logits, x0, z, t, weight, 0.0, "uniform"), want, rtol=1e-8)


@pytest.mark.parametrize("process, p_uniform", [("hybrid", 0.2), ("uniform", 0.0), ("mask", 0.0)])
def test_bounds_along_paths_are_tight(process, p_uniform):
    """All tokens together and frame by frame: the exact likelihood for the exact denoiser, more for a random one."""
    world, n = dense().under(process, p_uniform), 40_000

    def bits(net):
        rng = torch.Generator().manual_seed(0)
        x0 = world.points[torch.multinomial(world.q, n, replacement=True, generator=rng)]
        return objectives.bits_per_token(
            {"denoiser": net}, "forcing", x0, x0[:, 0], 3, rng, p_uniform, process=process, frames=3
        )

    found = bits(world.denoiser)
    assert set(found) == {"shared", "frames"}
    for exact, error in found.values():
        assert exact == pytest.approx(entropy(world), abs=3 * error) and error < 0.04
    table = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    for other, error in bits(lambda x, t, label, sites=None: table[x]).values():
        assert other > entropy(world) + 3 * error


def test_given_tokens_are_not_counted(rng):
    """Two random bits beside their sum, which is given: half a bit is left, a quarter for each."""
    points = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    points = torch.cat([points, points.sum(1, keepdim=True)], 1)
    world = World(points, torch.ones(4), 3).under("mask")
    x0 = points[torch.randint(4, (20_000,), generator=rng)]
    given = torch.zeros_like(x0, dtype=torch.bool)
    given[:, 2] = True
    for kind, net in [("maskd", world.denoiser), ("gidd", world.denoiser), ("forcing", world.denoiser)]:
        bits, error = objectives.bits_per_token(
            {"denoiser": net}, kind, x0, x0[:, 0], 3, rng, 0.0, process="mask", given=given
        ).popitem()[1]
        assert bits == pytest.approx(0.25, abs=4 * error) and error < 0.02


# Sampling


@pytest.mark.parametrize("lag", [0, 1, 3, 8])
@pytest.mark.parametrize("process", ["hybrid", "uniform", "mask"])
def test_an_oracle_is_followed_at_any_lag(process, lag, rng):
    """A denoiser that knows the truth reaches it; finished frames stay; known tokens are never written."""
    x0, label = torch.randint(V, (4, 20), generator=rng), torch.zeros(4).long()
    known = torch.zeros_like(x0, dtype=torch.bool)
    known[:, :4], known[0, 10] = True, True
    x = torch.full_like(x0, V) if process != "uniform" else torch.randint(V, x0.shape, generator=rng)
    levels = processes.staircase(8, 5, lag)
    told = []

    def denoiser(x, t, label, sites=None):
        told.append(t)
        return Truth(x0, V).denoiser(x, t, label)

    steps = rollout(
        denoiser,
        torch.where(known, x0, x),
        label,
        levels,
        generator=rng,
        process=process,
        vocab=V,
        p_uniform=0.2,
        known=known,
    )
    for i, state in enumerate(steps):
        first_falls = i + (lag and 1) * lag  # the row of the second frame's fall: the first is known
        done = levels[min(first_falls + 1, len(levels) - 1)].repeat_interleave(4) == 0
        assert torch.equal(state.x[:, done], x0[:, done]) and not (state.written & known).any()
        assert (told[-1][known] == 0).all() and (told[-1][:, ~known.any(0)] <= 1).all()
    assert torch.equal(state.x, x0) and (state.nfe == len(told)).all()
    assert len(told) == len(levels) - 1 - lag  # the rows in which only known frames fall cost nothing


@pytest.mark.parametrize("lag", [0, 20, 40])
@pytest.mark.parametrize("process, p_uniform", [("hybrid", 0.2), ("uniform", 0.0), ("mask", 0.0)])
def test_the_law_of_rollouts(process, p_uniform, lag, rng):
    """Full sequence, pyramid and frame by frame on the tiny world: total variation under 0.02."""
    world, n = dense().under(process, p_uniform), 60_000
    levels = processes.staircase(40, 3, lag) ** (2 if process == "hybrid" else 1)
    x = torch.full((n, 3), 3) if process != "uniform" else torch.randint(3, (n, 3), generator=rng)
    final = last(
        rollout(
            Table(world, world.denoiser),
            x,
            torch.zeros(n).long(),
            levels,
            generator=rng,
            process=process,
            vocab=3,
            p_uniform=p_uniform,
        )
    )
    assert world.distance(final.x) < 0.02


def test_the_window_slides(rng):
    """The denoiser sees so many frames, the falling one last; what left the window or is finished never changes."""
    x0, seen = torch.randint(V, (2, 24), generator=rng), []

    def denoiser(x, t, label, sites=None):
        seen.append((x.clone(), t.clone()))
        step = len(seen) - 1
        end = max(4, min(12, 2 + step // 3 + 1)) * 2
        return torch.nn.functional.one_hot(x0[:, end - 8 : end], V).float().log()

    known = torch.zeros_like(x0, dtype=torch.bool)
    known[:, :4] = True
    levels = samplers.staircase_of([4, 2, 1], 3, frames=12, context=2)
    x, before = torch.where(known, x0, V), torch.where(known, x0, V)
    for i, state in enumerate(
        rollout(denoiser, x, torch.zeros(2).long(), levels, generator=rng, vocab=V, known=known, window=4)
    ):
        frame = 2 + i // 3
        assert torch.equal(state.x[:, : 2 * frame], x0[:, : 2 * frame])
        changed = (state.x != before).any(0).nonzero()[:, 0] // 2
        assert (changed == frame).all()
        assert seen[-1][0].shape == (2, 8) and (seen[-1][1][:, -2:] > 0).all()
        before = state.x
    assert torch.equal(state.x, x0) and len(seen) == 30
    with pytest.raises(ValueError, match="too many for a window of 4"):
        last(
            rollout(denoiser, x, torch.zeros(2).long(), processes.staircase(3, 12, 0), generator=rng, vocab=V, window=4)
        )


def test_frames_beyond_the_end_are_noise_and_dropped(rng):
    """Two frames asked of a denoiser of four: it sees four, the last two at level 1, and two come back."""
    shapes = []

    def denoiser(x, t, label, sites=None):
        shapes.append(x.shape)
        assert (t[:, 4:] == 1).all() and (x[:, 4:] == V).all()
        return torch.zeros(*x.shape, V)

    final = last(
        rollout(
            denoiser,
            torch.full((3, 4), V),
            torch.zeros(3).long(),
            processes.staircase(2, 2, 2),
            generator=rng,
            vocab=V,
            window=4,
        )
    )
    assert final.x.shape == (3, 4) and final.x.max() < V and set(shapes) == {(3, 8)}


def test_stabilisation_is_told(rng):
    told = []

    def denoiser(x, t, label, sites=None):
        told.append(t)
        return torch.zeros(*x.shape, V)

    known = torch.zeros(1, 6, dtype=torch.bool)
    known[:, :2] = True
    levels = samplers.staircase_of([3, 2, 1], 2, context=1)

    def run(**options):
        x = torch.full((1, 6), V)
        last(rollout(denoiser, x, torch.zeros(1).long(), levels, generator=rng, vocab=V, known=known, **options))

    run(stabilise=0.1, context_level=0.2)
    assert torch.allclose(told[-1], torch.tensor([[0.2, 0.2, 0.1, 0.1, 0.5, 0.5]]))
    for noise in (dict(process="mask"), dict(process="hybrid", p_uniform=0.0)):
        for name in ("stabilise", "context_level"):
            with pytest.raises(ValueError, match="needs uniform noise"):
                run(**{name: 0.1}, **noise)


def causal(frames=4, seed=0):
    """A causal network on grids of (frames, 2, 2) with a head that says something."""
    torch.manual_seed(seed)
    net = model.Transformer(model.Shape((frames, 2, 2), V, 0, 2, 2, 32, 32, causal=True), "denoiser", is_told_t=True)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net.eval().requires_grad_(False)


def test_causal_frames_see_no_future(rng):
    net, x = causal(), torch.randint(V, (2, 16), generator=rng)
    other, t, label = x.clone(), torch.rand(2, 16, generator=rng), torch.zeros(2).long()
    other[:, 8:] = (x[:, 8:] + 1) % V
    a, b = net(x, t, label), net(other, t, label)
    assert torch.allclose(a[:, :8], b[:, :8], atol=1e-6) and not torch.allclose(a[:, 8:], b[:, 8:], atol=1e-2)
    other[:, :4] = (x[:, :4] + 1) % V
    assert not torch.allclose(net(other, t, label)[:, 4:8], a[:, 4:8], atol=1e-2)


def test_a_window_sees_the_same_wherever_it_stands(rng):
    """Frames have no absolute place: logits depend on the window's tokens alone, causal or not."""
    net, x = causal(), torch.randint(V, (2, 40), generator=rng)
    t, label = torch.zeros(2, 40), torch.zeros(2).long()
    far, near = net.turns(6, 4)[0], net.turns(0, 4)[0]
    q, k = torch.randn(2, 16, 16, generator=rng)
    scores = [model.rotate(q, *turn) @ model.rotate(k, *turn).T for turn in (far, near)]
    assert torch.allclose(*scores, atol=1e-4)
    first = model.rope_angles((4, 2, 2), 16)[:4].repeat(4, 1)
    assert all(torch.equal(y, z) for y, z in zip(net.turns(6, 4)[1], (first.cos(), first.sin()), strict=True))
    assert net(x, t, label).shape == (2, 40, V)


@pytest.mark.parametrize("n_frames", [4, 11])
def test_the_cache_is_no_cache(n_frames, rng):
    """Frame by frame with kept keys and values: the logits of one pass, with the sliding mask where it slides."""
    net, label = causal(), torch.zeros(3).long()
    x, t = torch.randint(V, (3, 4 * n_frames), generator=rng), torch.zeros(3, 4 * n_frames)
    whole, cache, parts = net(x, t, label), net.new_cache(), []
    for i in range(0, n_frames, 2):
        here = slice(4 * i, 4 * (i + 2))
        net(x[:, here], t[:, here], label, None, cache, 0)  # a look that keeps nothing changes nothing
        parts.append(net(x[:, here], t[:, here], label, None, cache, min(2, n_frames - i)))
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5
    assert cache.kept[0][0].shape[2] <= 4 * 3


def test_cached_rollouts_are_rollouts(rng):
    """Until the window slides the tokens are those without a cache, and finished frames are computed once."""
    net, known = causal(), torch.zeros(3, 16, dtype=torch.bool)
    known[:, :4] = True
    x = torch.where(known, torch.randint(V, (3, 16), generator=rng), V)
    levels, finals, sizes = samplers.staircase_of([4, 2, 2], 5, lag=2, context=1), [], []
    for cache in (None, net.new_cache()):
        watch = lambda x, *a: sizes.append(x.shape[1]) or net(x, *a)  # noqa: E731
        finals.append(
            last(
                rollout(
                    watch,
                    x,
                    torch.zeros(3).long(),
                    levels,
                    generator=torch.Generator().manual_seed(1),
                    vocab=V,
                    known=known,
                    window=4,
                    cache=cache,
                )
            )
        )
    assert torch.equal(finals[0].x, finals[1].x) and torch.equal(finals[0].nfe, finals[1].nfe)
    assert sizes[0] == 16 and sizes[-1] == 4 and sum(sizes[9:]) < 0.7 * sum(sizes[:9])
    levels = samplers.staircase_of([4, 2, 2], 5, frames=9, context=1)
    far = torch.cat([x, torch.full((3, 20), V)], 1)
    more = torch.cat([known, torch.zeros(3, 20, dtype=torch.bool)], 1)
    final = last(
        rollout(
            net, far, torch.zeros(3).long(), levels, generator=rng, vocab=V, known=more, window=4, cache=net.new_cache()
        )
    )
    assert final.x.max() < V and torch.equal(final.x[:, :4], x[:, :4])
    with pytest.raises(ValueError, match="without reward"):
        last(
            rollout(
                net,
                x,
                torch.zeros(3).long(),
                levels[:6, :4],
                generator=rng,
                vocab=V,
                cache=net.new_cache(),
                reward=lambda x: x,
            )
        )


# Particles


def test_reward_zero_changes_nothing(rng):
    world, levels = dense().under("hybrid", 0.2), processes.staircase(6, 3, 3)
    finals = [
        last(
            rollout(
                world.denoiser,
                torch.full((64, 3), 3),
                torch.zeros(64).long(),
                levels,
                vocab=3,
                generator=torch.Generator().manual_seed(5),
                p_uniform=0.2,
                **options,
            )
        ).x
        for options in ({}, dict(reward=lambda x: torch.zeros(len(x)), particles=8, n_draws=3))
    ]
    assert torch.equal(*finals)


@pytest.mark.parametrize("lag, n_draws", [(0, 1), (16, 4)])
def test_particles_reach_the_tilted_law(lag, n_draws, rng):
    """p(x) exp(w reward(x)) on the tiny world, within 0.03; what was predicted on the way leaves no trace."""
    world, n = dense().under("hybrid", 0.2), 2**16
    reward = lambda x: (x == 2).sum(1).float()  # noqa: E731
    tilted = World(world.points, world.q * torch.exp(0.8 * reward(world.points)), 3)
    final = last(
        rollout(
            Table(world, world.denoiser),
            torch.full((n, 3), 3),
            torch.zeros(n).long(),
            processes.staircase(32, 3, lag) ** 2,
            generator=rng,
            vocab=3,
            p_uniform=0.2,
            reward=reward,
            reward_weight=0.8,
            particles=2**12,
            n_draws=n_draws,
        )
    )
    assert tilted.distance(final.x) < 0.03 and world.distance(final.x) > 0.1


def test_resampling(rng):
    """Only groups of small effective size, each within itself, in proportion to the weights."""
    log_w = torch.tensor([0.0, 0.0, 0.1, 0.0, 5.0, 0.0, 0.0, 0.0])
    picked, left = resample(log_w, 4, rng)
    assert picked.tolist() == [0, 1, 2, 3, 4, 4, 4, 4] and left.tolist() == [*log_w[:4].tolist(), 0, 0, 0, 0]
    assert resample(torch.zeros(8), 4, rng, always=True)[0].tolist() == list(range(8))
    counts = torch.zeros(4)
    for _ in range(500):
        counts += torch.bincount(
            resample(torch.tensor([0.1, 0.2, 0.3, 0.4]).log(), 4, rng, always=True)[0], minlength=4
        )
    assert torch.allclose(counts / counts.sum(), torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.02)


# What is given


def test_given_ids_and_places():
    meta = dict(grid=[2, 3], given=[4, [1, 2]])
    tokens = torch.tensor([[0, 4, 1, 4, 2, 0]])
    assert data.given(meta, tokens).tolist() == [[False, True, False, True, False, True]]
    assert data.given(meta | dict(given=[]), tokens) is None
    video = dict(grid=[3, 1, 2], given=[])
    assert data.context(video, tokens, 2).tolist() == [[True] * 4 + [False] * 2]
    assert data.context(video, tokens, 0) is None


# Whole runs


@pytest.mark.parametrize("context", [0, 3])
def test_training_asks_for_frames_after_the_context(context, rng):
    """A run's `context` reaches its levels: nothing is learned of those frames, and of every later one something."""
    cfg = config.load(argv=["--method", "forcing", "--level-group", "next", "--context", str(context)])
    x0, meta = torch.randint(4, (200, 6 * 4), generator=rng), dict(grid=[6, 2, 2], vocab=4, given=[])
    task = train_ddpd.make_tasks(cfg, meta, x0, torch.rand(200, 1), torch.zeros(200).long(), rng)["denoiser"]
    assert (task.sites % 24 // 4).unique().tolist() == list(range(context, 6))


FORCING = [*TINY, "--method", "forcing", "--data", "bounce", "--batch-size", 2, "--eval-sequences", 4]


@pytest.mark.parametrize(
    "flags", [["--causal"], ["--level-group", "shared", "--process", "uniform", "--weight", "none"]]
)
def test_a_video_run_from_training_to_rollout(flags):
    out = f"out/{len(flags)}"
    done = script("train_ddpd.py", *FORCING, *flags, "--max-iters", 2, "--out-dir", out)
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    assert {"val_bits_shared", "val_bits_frames"} <= log[-1].keys()
    done = script("sample.py", out, "--n-steps", 2, "--labels", 0, 0, "--frames", 11, "--stabilise", 0.02)
    assert done.returncode == 0, done.stderr
    assert "2 samples, 18.0 NFE each" in done.stdout and "intact" in done.stdout and "right" in done.stdout
    tokens = np.load(f"{out}/samples.npz")["tokens"]
    assert tokens.shape == (2, 11, 8, 8) and tokens.max() < 4
    real = np.load("data/bounce/val_tokens.npy")
    assert (tokens[0, :2] == real[0, :2]).all() and Path(out, "rollout.gif").exists()
    done = script("sample.py", out, "--sampler", "ancestral", "--context", 0, "--n-video", 0)
    assert done.returncode == 0, done.stderr
    assert "8 samples, 4.0 NFE each" in done.stdout  # of each frame, together
    refused = script("train_ddpd.py", *TINY, "--method", "forcing", "--out-dir", "out/refused")
    assert refused.returncode != 0 and "digits is no video" in refused.stderr
    refused = script("sample.py", out, "--frames", 2)
    assert refused.returncode != 0 and "no more than the 2 that are given" in refused.stderr
