"""A planner on the denoiser's trunk: --nets trunk, --freeze-denoiser, and the sampler `planned`."""

import pytest
import torch
import torch.nn.functional as F
from conftest import refusal, tiny_config
from test_samplers import any_level, no_label
from test_train import assert_same, checkpoint_of, log_of
from world import Oracle, at_sites, dense, tiny_spec

import config
import methods
import model
import train_ddpd
from diffusion import objectives, samplers
from diffusion.samplers import last, remdm
from diffusion.unmasking import draw_sites, remasking_counts, remasking_weight
from support import runtime, training
from support.checkpoint import digest, load_run
from support.chunked_head import task_loss

CPU = torch.device("cpu")
V = 7
N_LAW = 100_000


def tiny(out, *flags):
    return tiny_config(out, "--dtype", "float32", *flags)


def both_of(denoiser, plan_logits):
    """A net that is both: plan_logits(x, label) of the planner."""
    def net(x, t, label):
        return denoiser(x, t, label), plan_logits(x, label)
    return net


def at_any_site(denoiser):
    def net(x, t, label, sites=None):
        logits = denoiser(x, t, label)
        return logits if sites is None else at_sites(logits, sites)
    return net


def planned(net, x, label, **options):
    """Of a net that is both, whose denoiser can also be asked alone."""
    denoiser = at_any_site(lambda *seen: net(*seen)[0])
    return samplers.planned(denoiser, net, x, label, **options)


def zeros(vocab):
    return lambda x, t, label: torch.zeros(*x.shape, vocab)


# Which tokens are masked again


def test_sites_are_drawn_in_proportion_to_the_odds(rng):
    """One of three visible tokens with odds 1, 2 and 3; to the power of 2: 1, 4 and 9."""
    logits = torch.tensor([1.0, 2.0, 3.0, 9.0]).log().expand(60_000, 4)
    is_visible = torch.tensor([True, True, True, False]).expand(60_000, 4)
    one = torch.ones(60_000).long()
    for power, weight in ((1.0, [1, 2, 3, 0]), (2.0, [1, 4, 9, 0])):
        weights = remasking_weight(logits, torch.ones_like(logits), power, 0.0)
        sites = draw_sites(weights, is_visible, one, rng)
        assert (sites.sum(1) == 1).all()
        share = torch.tensor(weight) / sum(weight)
        torch.testing.assert_close(sites.float().mean(0), share, atol=0.01, rtol=0)


def test_surprise_weighs_what_has_become_doubtful():
    """Odds of being wrong 1, 2 and 3, of the token when it was written 3, 1 and 1/3."""
    logits = torch.tensor([[1.0, 2.0, 3.0]]).log()
    p_written = torch.tensor([[0.75, 0.5, 0.25]])
    weight = remasking_weight(logits, p_written, 1.0, 1.0)
    torch.testing.assert_close(weight, torch.tensor([[3.0, 2.0, 1.0]]).double())
    weight = remasking_weight(logits, p_written, 2.0, 0.5)
    expected = torch.tensor([[1.0, 4.0, 9.0]]) * torch.tensor([[3.0, 1.0, 1 / 3]]).sqrt()
    torch.testing.assert_close(weight, expected.double(), rtol=1e-6, atol=0)
    surest = remasking_weight(logits, torch.tensor([[1.0, 0.0, 0.5]]), 1.0, 1.0)
    torch.testing.assert_close(surest, torch.tensor([[99.0, 2 / 99, 3.0]]).double())


@pytest.mark.parametrize("surprise, is_remdm", [(1.0, True), (0.0, False)])
def test_a_planner_that_knows_what_the_denoiser_knew_makes_no_choice(surprise, is_remdm, rng):
    """Tokens are independent: that they were improbable is no evidence against them."""
    logits = torch.randn(9, 5, generator=rng)

    def denoiser(x, t, label):
        return logits.expand(len(x), 9, 5)

    def planner(x, label):
        p = denoiser(x, None, None).softmax(-1)
        p = p.gather(-1, x.clamp_max(4)[..., None])[..., 0]
        return torch.logit(1 - p)

    runs = []
    for options in (dict(surprise=surprise), dict(trust=0.0)):
        options |= dict(n_steps=6, generator=torch.Generator().manual_seed(3))
        x = torch.full((200, 9), 5)
        runs.append(last(planned(both_of(denoiser, planner), x, no_label(200), **options)))
    assert torch.equal(runs[0].x, runs[1].x) == is_remdm


def test_an_oracles_sites_come_first(rng):
    """Infinite logits are odds as well; there are never more sites than visible tokens."""
    logits = torch.full((500, 6), -torch.inf)
    logits[:, :2] = torch.inf
    is_visible = torch.arange(6).expand(500, 6) < 4
    for n, expected in ((1, [1]), (2, [2]), (3, [3]), (9, [4])):
        weights = remasking_weight(logits, torch.ones_like(logits), 1.0, 0.0)
        sites = draw_sites(weights, is_visible, torch.full((500,), n), rng)
        assert sites.sum(1).unique().tolist() == expected
        assert (sites[:, :2].sum(1) == min(n, 2)).all()


def test_counts_are_right_on_average_and_end_without_masks(rng):
    """Of 16 tokens 6 are masked; 2.5 of the other 10 are to be masked again, and 4 left masked."""
    is_masked = torch.arange(16).expand(4000, 16) < 6
    n_remasked, n_uncovered = remasking_counts(is_masked, ~is_masked, 0.25, 0.25, rng)
    assert n_remasked.unique().tolist() == [2, 3]
    assert n_remasked.double().mean() == pytest.approx(2.5, abs=0.05)
    assert (6 + n_remasked - n_uncovered == 4).all()
    n_remasked, n_uncovered = remasking_counts(is_masked, ~is_masked, 0.0, 0.0, rng)
    assert (n_remasked == 0).all() and (n_uncovered == 6).all()


# Planned remasking


def test_steps_mask_as_many_tokens_as_remdm(rng):
    """The same numbers on average, and a share s of the tokens masked after each step."""
    x = torch.full((2000, 40), 5)
    options = dict(n_steps=6, eta=0.7, generator=rng, order="random")
    net = both_of(zeros(5), lambda x, label: x.float())
    mine = list(planned(net, x, no_label(2000), **options))
    del options["order"]
    theirs = list(remdm(at_any_site(zeros(5)), x, no_label(2000), remask="rescale", **options))
    for step, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        s = 1 - (step + 1) / 6
        assert ((a.x == 5).sum(1) == int(40 * s + 1e-6)).float().mean() > 0.99
        n_remasked = [(y.written & (y.x == 5)).sum(1).float().mean().item() for y in (a, b)]
        assert n_remasked[0] == pytest.approx(n_remasked[1], abs=0.7)


def test_a_planner_that_says_the_same_of_all_is_not_trusted(rng):
    """The same samples, token by token, as with trust 0."""
    x = torch.full((20, 9), 5)
    net = both_of(zeros(5), lambda x, label: torch.full(x.shape, 2.0))
    runs = []
    for trust in (0.0, 1.0):
        generator = torch.Generator().manual_seed(3)
        options = dict(n_steps=6, eta=0.7, trust=trust, generator=generator)
        runs.append(last(planned(net, x, no_label(20), **options)))
    assert torch.equal(runs[0].x, runs[1].x)
    assert (runs[1].nfe >= runs[0].nfe).all()


def test_without_trust_it_has_the_law_of_the_data(rng):
    world = dense().under("mask")
    net = both_of(any_level(world), lambda x, label: x.float())
    x = world.noise.sample_prior((N_LAW, 3), rng)
    n_remasked = 0
    options = dict(n_steps=32, generator=rng, trust=0.0, eta=0.3, order="random")
    for state in planned(net, x, no_label(N_LAW), **options):
        n_remasked += (state.written & (state.x == 3)).sum().item()
    assert world.distance(state.x) < 0.02
    assert n_remasked > N_LAW / 2


def test_an_oracle_finds_mistakes_in_fewer_steps(rng):
    """A denoiser that is wrong one time in two: where wrong tokens are masked again only those of
    the last steps are left, where random ones are, half of all."""
    x0 = torch.randint(V, (200, 16), generator=rng)
    oracle = Oracle(x0, V)

    def denoiser(x, t, label):
        right = F.one_hot(x0[label], V)
        return (0.5 * right + 0.5 / V).log()

    def share_wrong(trust, n_steps):
        net = both_of(denoiser, lambda x, label: oracle.planner(x, None, label))
        x = torch.full((200, 16), V)
        options = dict(n_steps=n_steps, generator=rng, trust=trust, eta=1.0, order="random")
        final = last(planned(net, x, torch.arange(200), **options))
        return (final.x != x0).float().mean().item()

    assert share_wrong(0.0, 32) == pytest.approx(0.5 * (1 - 1 / V), abs=0.03)
    assert share_wrong(1.0, 32) < 0.12     # what the last steps wrote
    assert share_wrong(1.0, 8) < 0.6 * share_wrong(0.0, 8)


def test_confident_draws_are_uncovered_first(rng):
    """Without noise: tokens 0 to 3 are drawn at .9, the others at .5, and are masked no longer."""
    def denoiser(x, t, label):
        p = torch.where(torch.arange(8) < 4, 0.9, 0.5).expand(x.shape)
        return torch.stack([p, 1 - p], -1).log()

    net = both_of(denoiser, lambda x, label: torch.zeros(x.shape))
    x = torch.full((2000, 8), 2)
    options = dict(n_steps=4, generator=rng, eta=0.0, temperature=0.05)
    n_seen = torch.zeros(8)
    for state in planned(net, x, no_label(2000), order="confidence", noise=0.0, **options):
        n_seen += (state.x < 2).float().mean(0)
    assert n_seen[:4].min() > n_seen[4:].max()
    assert (state.x < 2).all()
    first = next(planned(net, x, no_label(2000), order="random", **options))
    assert (first.x < 2).float().mean(0) == pytest.approx([0.25] * 8, abs=0.04)


@pytest.mark.parametrize("options, n_asked", [
    (dict(eta=1.0), 3),                     # at t = 1/2, 3/8 and 1/4
    (dict(), 6),                            # all but the first and the last
    (dict(trust=0.0), 0),
])
def test_the_planner_is_asked_where_it_has_a_choice(options, n_asked, rng):
    """Not where all visible tokens are masked again, or none; the denoiser is, in each step."""
    asked = []

    def both(x, t, label):
        asked.append(t[0].item())
        return torch.zeros(*x.shape, 5), torch.zeros(x.shape)

    def denoiser(x, t, label, sites):
        return torch.zeros(*sites.shape, 5)

    x = torch.full((40, 16), 5)
    states = samplers.planned(
        denoiser, both, x, no_label(40), n_steps=8, generator=rng, **options
    )
    assert last(states).nfe.max() == 8
    assert len(asked) == n_asked


def test_p_noise_is_one_at_masks_and_the_planners_elsewhere(rng):
    known = torch.zeros(3, 6, dtype=torch.bool)
    known[:, 0] = True
    x = torch.where(known, 2, 5)
    net = both_of(zeros(5), lambda x, label: torch.ones(x.shape))
    before = x
    options = dict(n_steps=4, generator=rng, vocab=5, known=known, eta=0.5)
    for step, state in enumerate(planned(net, x, no_label(3), **options)):
        p_planner = torch.tensor(1.0).sigmoid() if step < 3 else torch.tensor(0.0)  # none masked
        expected = torch.where(before == 5, 1.0, p_planner).masked_fill(known, 0.0)
        torch.testing.assert_close(state.p_noise, expected)
        assert (state.x[known] == 2).all()
        before = state.x
    assert (state.x < 5).all()


def test_guidance_doubles_the_calls_and_leaves_the_planner_its_label(rng):
    """A denoiser that says the label, or nothing without one."""
    asked = []

    def net(x, t, label):
        asked.append(len(x))
        logits = F.one_hot(label, 5).float()[:, None].expand(*x.shape, 5)
        return logits, label[:, None].float().expand(x.shape)

    label = torch.arange(4)
    x = torch.full((4, 300), 5)
    options = dict(n_steps=3, generator=rng, guidance=20.0, null_label=4)
    state = last(planned(net, x, label, **options))
    assert asked == [8, 8, 8] and (state.nfe == 6).all()
    assert (state.x == label[:, None]).float().mean() > 0.99


@pytest.mark.parametrize("bad, name", [
    (dict(eta=-1.0), "eta"), (dict(trust=-1.0), "trust"), (dict(n_steps=0), "n_steps"),
    (dict(surprise=-1.0), "surprise"),
    (dict(x=torch.zeros(1, 3).long()), "start from masks"), (dict(order="left"), "order"),
])
def test_arguments_that_mean_nothing_are_refused_by_name(bad, name, rng):
    options = dict(x=torch.full((1, 3), 5), n_steps=2, generator=rng, vocab=5) | bad
    net = both_of(zeros(5), lambda x, label: x.float())
    with pytest.raises(ValueError, match=name):
        last(planned(net, label=no_label(1), **options))


# The network


@pytest.mark.parametrize("grid, patch", [((4, 4), 1), ((4, 4), 2)])
def test_both_in_one_pass_are_each_alone(grid, patch, monkeypatch):
    spec = tiny_spec("ddpd-trunk", grid, n_layer=2, patch=patch)
    nets = methods.build(spec)
    for net in nets.values():
        for weight in net.parameters():
            torch.nn.init.normal_(weight, std=0.5)
    x = torch.randint(V + 1, (3, 16))
    t, label = torch.full((3, 1), 0.5), torch.arange(3)
    n_passes = []
    residual = model.Transformer.residual

    def counted(self, *args, **options):
        n_passes.append(self.role)
        return residual(self, *args, **options)

    monkeypatch.setattr(model.Transformer, "residual", counted)
    tokens, plan = nets["planner"].both(x, t, label)
    assert n_passes == ["denoiser", "planner"]
    torch.testing.assert_close(tokens, nets["denoiser"](x, t, label))
    torch.testing.assert_close(plan, nets["planner"](x, t, label))
    assert plan.std() > 0


def test_the_planner_owns_its_blocks_alone():
    """It neither saves nor trains the trunk, and has as many blocks as asked for."""
    nets = methods.build(tiny_spec("ddpd-trunk", n_layer=3, planner_layers=1))
    assert len(nets["planner"].blocks) == 1 and len(nets["denoiser"].blocks) == 3
    mine = {id(p) for p in nets["planner"].parameters()}
    assert not mine & {id(p) for p in nets["denoiser"].parameters()}
    x, t, label = torch.zeros(2, 16).long(), torch.ones(2, 1), torch.zeros(2).long()
    nets["planner"](x, t, label).sum().backward()
    assert all(p.grad is None for p in nets["denoiser"].parameters())


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_trunk_gets_the_planners_gradient_times_a_weight(weight):
    """The denoiser's gradient is that of CE + weight * BCE, the planner's that of BCE."""
    cfg = tiny("grad", "--nets", "trunk", "--n-layer", 2, "--trunk-grad", weight)
    spec, splits = training.open_data(cfg)
    state = training.build_training(cfg, spec, None, CPU)
    for net in (*state.nets.values(), *state.ema.values()):
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    tasks = training.Batches(cfg, spec, splits["train"], 1, state.ema["denoiser"]).tasks(0, 0)

    def gradients(loss, net):
        return torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)

    denoiser, planner = state.nets["denoiser"], state.nets["planner"]
    ce = task_loss(denoiser, tasks["denoiser"])
    planner.hold(denoiser, 1.0)
    bce = task_loss(planner, tasks["planner"])
    expected = gradients(ce + weight * bce, denoiser)
    if weight:
        of_planner = gradients(bce, planner)
        planner.hold(denoiser, weight)
    else:                               # it stands on the averaged trunk then
        planner.hold(state.ema["denoiser"])
        of_planner = gradients(task_loss(planner, tasks["planner"]), planner)
    learners = training.learners_of(cfg, state, runtime.World(0, 1, CPU))
    training.backward(cfg, learners, tasks, CPU, is_last=True)
    for net, wanted in ((denoiser, expected), (planner, of_planner)):
        for parameter, gradient in zip(net.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_a_trunk_that_is_trained_for_its_planner_is_the_live_one():
    cfg = tiny("live", "--nets", "trunk", "--trunk-grad", 0.5)
    spec, _ = training.open_data(cfg)
    state = training.build_training(cfg, spec, None, CPU)
    assert state.nets["planner"].trunk_of == (state.nets["denoiser"],)
    assert state.nets["planner"].trunk_grad == 0.5
    assert state.ema["planner"].trunk_of == (state.ema["denoiser"],)
    assert state.ema["planner"].trunk_grad == 0


# What it learns


def test_labels_of_fills():
    """Token 0 was kept, 1 filled with x0, 2 filled wrongly, 3 is a mask still, 4 is known."""
    x0 = torch.tensor([[1, 2, 3, 4, 5]])
    fill = objectives.Fill(
        torch.tensor([[1, 2, 0, V, 5]]), torch.tensor([[False, True, True, False, False]])
    )
    known = torch.tensor([[False, False, False, False, True]])
    t, label = torch.ones(1, 1), torch.zeros(1).long()
    for kind, targets in (("differs", [0, 0, 1]), ("written", [0, 1, 1])):
        task = objectives.fill_task(x0, t, label, fill, kind, V, known)
        assert task.sites.tolist() == [0, 1, 2]
        assert task.target.tolist() == targets
        assert torch.equal(task.xt, fill.x)


def test_fills_stop_on_the_way(rng):
    """A planner that is asked beside masks learns beside masks: in some batches they are left."""
    spec = tiny_spec("ddpd-trunk", vocab=V)
    x0 = torch.randint(V, (64, 16), generator=rng)
    t, label = torch.full((64, 1), 0.8), torch.zeros(64).long()
    shares = []
    for _ in range(40):
        fill = methods.fill_masks(
            spec, lambda x, t, label, sites: torch.zeros(*sites.shape, V), x0, t, label, None, rng,
            CPU, to_the_end=False,
        )
        assert not (fill.is_written & (fill.x == V)).any()
        assert torch.equal(fill.x[~fill.is_written & (fill.x != V)],
                           x0[~fill.is_written & (fill.x != V)])
        shares.append((fill.x == V).float().mean().item())
    assert min(shares) == 0.0 and max(shares) == pytest.approx(0.6, abs=0.05)


def test_the_denoiser_learns_as_if_there_were_no_planner():
    """No gradient reaches it: the same to the bit, whether the planner learns or not."""
    states = {}
    for lr in (0.0, 1e-2):
        name = f"lr{lr}"
        train_ddpd.main(tiny(name, "--nets", "trunk", "--max-iters", 6, "--planner-lr", lr))
        states[lr] = checkpoint_of(name)
    for part in ("nets", "ema", "optimizers"):
        still, learning = states[0.0][part], states[1e-2][part]
        assert digest(still["denoiser"]) == digest(learning["denoiser"])
        assert digest(still["planner"]) != digest(learning["planner"])


@pytest.mark.parametrize("weight", [0, 0.5])
def test_a_resumed_run_equals_one_that_was_not_stopped(weight):
    args = ["--nets", "trunk", "--trunk-grad", weight, "--max-iters", 8, "--lr-decay-iters", 8]
    train_ddpd.main(tiny("whole", *args))
    train_ddpd.main(tiny("parts", *args, "--max-iters", 3))
    train_ddpd.main(tiny("parts", *args))
    assert_same(checkpoint_of("whole"), checkpoint_of("parts"))


def test_validation_asks_about_fills():
    """An untrained planner has ln 2 on them."""
    train_ddpd.main(tiny("fills", "--nets", "trunk", "--max-iters", 1, "--planner-lr", 0))
    [row] = [row for row in log_of("fills") if "val_planner_bce" in row]
    assert row["val_planner_bce"] == pytest.approx(0.6931, abs=1e-3)
    assert "val_planner_fill_bce" not in row


# A frozen denoiser


@pytest.mark.parametrize("name, flags, first_flags", [
    ("trunk", ("--nets", "trunk"), ()),
    ("after_masked", ("--nets", "trunk"), ("--nets", "denoiser")),
    ("pair", ("--on-policy", 0.5), ()),
])
def test_a_frozen_denoiser_does_not_move_by_a_bit(name, flags, first_flags):
    source = f"first_of_{name}"
    train_ddpd.main(tiny(source, "--max-iters", 4, *first_flags))
    first = checkpoint_of(source)["ema"]["denoiser"]
    args = [*flags, "--freeze-denoiser", f"out/{source}", "--max-iters", 6, "--lr-decay-iters", 6]
    train_ddpd.main(tiny(name, *args))
    second = checkpoint_of(name)
    for part in ("nets", "ema"):
        assert digest(second[part]["denoiser"]) == digest(first)
    assert digest(second["nets"]["planner"]) != digest(second["ema"]["planner"])
    assert not any("denoiser_loss" in row for row in log_of(name))
    train_ddpd.main(tiny(f"{name}_parts", *args, "--max-iters", 3))
    train_ddpd.main(tiny(f"{name}_parts", *args))
    assert_same(second, checkpoint_of(f"{name}_parts"))


def test_a_planner_learns_on_the_denoiser_that_it_is_sampled_with():
    train_ddpd.main(tiny("first", "--max-iters", 4))
    cfg = tiny("second", "--nets", "trunk", "--freeze-denoiser", "out/first")
    spec, _ = training.open_data(cfg)
    state = training.build_training(cfg, spec, None, CPU)
    assert state.trained == ["planner"]
    assert state.nets["planner"].trunk_of == (state.ema["denoiser"],)
    assert state.ema["planner"].trunk_of == (state.ema["denoiser"],)
    train_ddpd.main(tiny("second", "--nets", "trunk", "--freeze-denoiser", "out/first",
                         "--max-iters", 2))
    run = load_run("out/second")
    assert run.nets["planner"].trunk_of == (run.nets["denoiser"],)


def test_misfits_are_refused_by_name():
    train_ddpd.main(tiny("first", "--max-iters", 4))
    train_ddpd.main(tiny("uniform", "--max-iters", 1, "--denoiser-process", "uniform"))
    trunk = ["--nets", "trunk", "--freeze-denoiser"]
    said = refusal(train_ddpd.main, tiny("a", *trunk, "out/first", "--n-layer", 2))
    assert "--freeze-denoiser out/first has n_layer 1" in said
    said = refusal(train_ddpd.main, tiny("b", *trunk, "out/uniform"))
    assert "ddpd-uniform run, whose denoiser is not one of masks" in said


@pytest.mark.parametrize("flags, message", [
    (["--nets", "trunk", "--denoiser-process", "uniform"], "nets = trunk needs denoiser_process"),
    (["--nets", "trunk", "--on-policy", "0.5"], "on_policy = 0.5 needs nets = pair"),
    (["--planner-layers", "3"], "planner_layers = 3 needs nets = trunk"),
    (["--trunk-grad", "1"], "trunk_grad = 1 needs nets = trunk"),
    (["--nets", "trunk", "--trunk-grad", "0.5", "--freeze-denoiser", "x"], "no freeze_denoiser"),
    (["--nets", "trunk", "--trunk-grad", "-1"], "trunk_grad"),
    (["--fill-label", "written"], "fill_label = written needs fills"),
    (["--nets", "denoiser", "--denoiser-process", "uniform"], "nets = denoiser needs"),
    (["--nets", "denoiser", "--on-policy", "0.5"], "on_policy = 0.5 needs nets = pair"),
    (["--freeze-denoiser", "x", "--denoiser-process", "uniform"], "freeze_denoiser needs"),
    (["--freeze-denoiser", "x", "--nets", "denoiser"], "freeze_denoiser needs"),
    (["--freeze-denoiser", "x", "--init-from", "y"], "give one"),
    (["--method", "gidd", "--freeze-denoiser", "x"], "freeze_denoiser"),
])
def test_flags_that_do_not_fit(flags, message):
    assert message in refusal(config.load, argv=flags)
