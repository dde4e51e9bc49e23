import math

import pytest
import torch
from world import Table, dense, sparse

from diffusion import draws, processes, samplers
from diffusion.processes import corrupt, from_self
from diffusion.samplers import ancestral, confidence, ddpd, remdm
from diffusion.samplers import last as finish

N_LAW = 100_000  # sampling alone puts the 27-state law this far: about .007


class Truth:
    """Oracles that know x0: the planner says where x differs from it, the denoiser says what it is."""

    def __init__(self, x0, vocab):
        self.x0, self.vocab, self.calls = x0, vocab, 0

    def planner(self, x, t, label, sites=None):
        self.calls += 1
        return torch.where(x != self.x0, torch.inf, -torch.inf)

    def denoiser(self, x, t, label, sites=None):
        self.calls += 1
        logits = torch.nn.functional.one_hot(self.x0, self.vocab).float().log()
        return logits if sites is None else logits.gather(1, sites[..., None].expand(-1, -1, self.vocab))


@pytest.mark.parametrize("process", ["uniform", "mask"])
@pytest.mark.parametrize(
    "options",
    [
        dict(schedule="one", n_steps=12),
        dict(schedule="fixed", k=5, n_steps=3),
        dict(schedule="spread", n_steps=5),
        dict(schedule="spread", n_steps=1),
        dict(schedule="leap", n_steps=7),
        dict(schedule="one", pick="softmax", n_steps=12),
    ],
)
def test_oracles_recover_x0(options, process, rng):
    """A planner that knows the noise and a denoiser that knows x0 reach x0; anything left is the sampler's fault."""
    x0, label = torch.randint(50, (6, 12), generator=rng), torch.arange(6)
    truth = Truth(x0, 50)
    x = torch.randint(50, (6, 12), generator=rng)
    before, start = x.clone(), x.clone()
    for state in ddpd(
        truth.planner, truth.denoiser, x, label, generator=rng, denoiser_process=process, vocab=50, **options
    ):
        assert torch.equal(state.x[~state.written], before[~state.written])  # only written sites change
        assert not state.written[before == x0].any()  # and only noise is written
        before = state.x
    assert torch.equal(state.x, x0)
    assert torch.equal(x, start)  # the caller's tensor is left alone


@pytest.mark.parametrize("schedule", ["one", "fixed", "spread", "leap"])
def test_a_mask_denoiser_sees_what_it_was_trained_on(schedule, rng):
    """Masks at every token that the planner's draw calls noise and at the chosen sites, tokens elsewhere."""
    x, label = torch.randint(5, (400, 10), generator=rng), torch.zeros(400).long()
    p_noise = torch.tensor([0.0, 0.0, 0.5, 0.5, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0]).expand(400, 10)
    seen = []

    def denoiser(x, t, label, sites):
        seen.append((x, sites))
        return torch.zeros(*sites.shape, 5)

    steps = ddpd(
        lambda x, t, label: p_noise.logit(),
        denoiser,
        x,
        label,
        n_steps=2,
        k=3,
        generator=rng,
        schedule=schedule,
        denoiser_process="mask",
        vocab=5,
    )
    before = x
    for state, (read, sites) in zip(steps, seen_as_it_grows(seen), strict=False):
        masked = read == 5
        assert masked[:, 6:].all() and not masked[:, :2].any() and masked[state.written].all()
        assert torch.equal(read[~masked], before[~masked])
        free = ~state.written[:, 2:6] | (schedule == "leap")  # a leap writes among the tokens called noise
        assert masked[:, 2:6][free].float().mean().item() == pytest.approx(0.5, abs=0.06)
        assert (sites.shape[1] > 1) == (schedule != "one")
        before = state.x


def seen_as_it_grows(seen):
    """Entries of a list that another iterator appends to."""
    i = 0
    while True:
        yield seen[i]
        i += 1


def test_known_tokens_are_never_written(rng):
    """Not even where the planner calls them noise, nor in refinement, nor where a sequence is known as a whole."""
    x = torch.randint(5, (4, 10), generator=rng)
    known = torch.rand(4, 10, generator=rng) < 0.5
    known[0] = True

    def planner(x, t, label, sites=None):
        return torch.full(x.shape, 3.0)

    def denoiser(x, t, label, sites=None):
        return torch.zeros(*(x if sites is None else sites).shape, 5)

    for options in (dict(schedule="spread"), dict(schedule="leap"), dict(schedule="fixed", k=9, refine=3)):
        for process in ("uniform", "mask"):
            for state in ddpd(
                planner,
                denoiser,
                x,
                torch.zeros(4).long(),
                n_steps=6,
                generator=rng,
                known=known,
                vocab=5,
                denoiser_process=process,
                **options,
            ):
                assert torch.equal(state.x[known], x[known]) and not (state.written & known).any()
                assert (state.p_noise[known] == 0).all() and len(state.x) == 4
        assert (state.x != x)[1:].any()


def test_nfe_counts_every_call(rng):
    """Planner and denoiser count 1 each in every step, a guided call 2, one network as both 1."""
    x0, label = torch.randint(50, (3, 12), generator=rng), torch.arange(3)
    x = torch.randint(50, (3, 12), generator=rng)
    truth = Truth(x0, 50)
    for step, state in enumerate(
        ddpd(truth.planner, truth.denoiser, x, label, n_steps=15, generator=rng, schedule="one")
    ):
        assert state.nfe.tolist() == [2 * step + 2] * 3 == [truth.calls] * 3
    assert torch.equal(state.x, x0)

    def flat(x, t, label, sites=None):
        return torch.zeros(*(x if sites is None else sites).shape, 50)

    for options, nfe in [(dict(guidance=2.0), 12), (dict(planner_guidance=2.0), 12), (dict(refine=3), 14)]:
        steps = ddpd(lambda *a: flat(*a)[..., 0], flat, x, label, n_steps=4, generator=rng, null_label=0, **options)
        assert finish(steps).nfe.tolist() == [nfe] * 3
    assert finish(ddpd(None, flat, x, label, n_steps=4, generator=rng)).nfe.tolist() == [4, 4, 4]


def test_a_sequence_that_is_done_leaves_the_computation(rng):
    """stop: rows under it are asked no more, keep their tokens, and stay in the State; all done ends the sampler."""
    x0 = torch.randint(50, (3, 12), generator=rng)
    x = torch.randint(50, (3, 12), generator=rng)
    x[0] = x0[0]
    x[1, 2:] = x0[1, 2:]  # two sites of noise at most
    asked = []

    def planner(x, t, label, sites=None):
        asked.append(label.tolist())
        return torch.where(x != x0[label], torch.inf, -torch.inf)

    def denoiser(x, t, label, sites=None):
        return torch.nn.functional.one_hot(x0[label].gather(1, sites), 50).float().log()

    states = list(ddpd(planner, denoiser, x, torch.arange(3), n_steps=99, generator=rng, schedule="one", stop=0.5))
    n_noise = (x != x0).sum(1)
    assert torch.equal(states[-1].nfe, 2 * n_noise + 1)  # the last look finds nothing
    assert len(states) == n_noise.max() + 1 and all(s.x.shape == x.shape for s in states)
    assert asked[0] == [0, 1, 2] and asked[1] == [1, 2] and asked[-1] == [2]
    assert torch.equal(states[-1].x, x0)


@pytest.mark.parametrize("process", ["uniform", "mask"])
def test_one_site_at_a_time_has_the_law_of_the_data(process, rng):
    """Where noise is recognisable, exact networks that stop under 0.5 expected noise tokens sample the data law."""
    world = sparse()

    def distance(planner, n=N_LAW):
        x = torch.randint(2000, (n, 3), generator=rng)
        batches = zip(x.split(5000), torch.zeros(n, dtype=torch.long).split(5000), strict=True)  # V = 2,000 is wide
        return world.distance(
            torch.cat(
                [
                    finish(
                        ddpd(
                            planner,
                            world.denoiser,
                            *batch,
                            n_steps=4,
                            generator=rng,
                            schedule="one",
                            stop=0.5,
                            denoiser_process=process,
                            vocab=2000,
                        )
                    ).x
                    for batch in batches
                ]
            )
        )

    assert distance(world.planner) < 0.05
    assert distance(lambda x, t, label, sites=None: torch.zeros(x.shape), 10_000) > 0.05


def test_leap_has_the_law_of_the_data(rng):
    """On a fixed clock planner times denoiser is the exact reverse process; a constant planner is not."""
    world = dense()
    constant = lambda x, t, label, sites=None: torch.zeros(x.shape)  # noqa: E731
    for planner, n, low, high in [(Table(world, world.planner), N_LAW, 0, 0.02), (constant, 10_000, 0.05, 1)]:
        x, label = torch.randint(3, (n, 3), generator=rng), torch.zeros(n, dtype=torch.long)
        options = dict(n_steps=512, generator=rng, schedule="leap")
        state = finish(ddpd(planner, Table(world, world.denoiser), x, label, **options))
        assert low <= world.distance(state.x) < high


PROCESSES = [("mask", 0.0), ("uniform", 0.0), ("hybrid", 0.1), ("hybrid", 0.2), ("hybrid", 0.0)]


def start(process, n, vocab, rng):
    return torch.randint(vocab, (n, 3), generator=rng) if process == "uniform" else torch.full((n, 3), vocab)


@pytest.mark.parametrize("process, p_uniform", PROCESSES)
@pytest.mark.parametrize("kind", ["others", "self"])
def test_ancestral_has_the_law_of_the_data(process, p_uniform, kind, rng):
    """32 or 64 steps with the exact networks; the wrong kind of prediction counts a token's own evidence twice."""
    world, n = dense().under(process, p_uniform), N_LAW
    nets = {"others": Table(world, world.denoiser), "self": Table(world, world.self_denoiser)}

    def distance(net, n_steps, n=n):
        x = start(process, n, 3, rng)
        options = dict(n_steps=n_steps, generator=rng, process=process, p_uniform=p_uniform, vocab=3)
        return world.distance(finish(ancestral(net, x, torch.zeros(n).long(), kind=kind, **options)).x)

    assert distance(nets[kind], 64 if process == "uniform" else 32) < 0.02
    if process == "uniform" or p_uniform:
        assert distance(nets["self" if kind == "others" else "others"], 64, 20_000) > 0.05


@pytest.mark.parametrize("process, p_uniform", PROCESSES)
def test_posteriors_compose(process, p_uniform, rng):
    """q_t(. | p) is what noise makes of p; from t to r and on to s is from t to s, by enumeration (Chapman-Kolmogorov).

    With x0 known the posterior of a token is a law of its own, so two steps in a row must be one.
    """
    vocab, t, r, s = 3, 0.8, 0.5, 0.1
    x0 = torch.nn.functional.one_hot(torch.tensor([[1]]), vocab).double()
    level = lambda y: torch.tensor([[y]], dtype=torch.float64)  # noqa: E731

    def step(t, s):
        rows = []
        for z in range(vocab + 1):
            x = torch.tensor([[z]])
            keeps = processes.stay((x == 1).double(), x, level(t), level(s), process, vocab, p_uniform)
            law = (1 - keeps[..., None]) * processes.marginal(x0, level(s), process, p_uniform)
            law[0, 0, z] += keeps[0, 0]
            rows.append(law[0, 0])
        return torch.stack(rows)  # (V + 1, V + 1)

    assert torch.allclose(step(t, r) @ step(r, s), step(t, s), atol=1e-12)
    there = processes.marginal(x0, level(t), process, p_uniform)[0, 0]
    assert torch.allclose(there @ step(t, s), processes.marginal(x0, level(s), process, p_uniform)[0, 0], atol=1e-12)
    assert torch.allclose(step(t, t), torch.eye(vocab + 1, dtype=torch.float64))
    assert torch.allclose(step(1.0, 0.0)[3 if process != "uniform" else 0], torch.eye(4, dtype=torch.float64)[1])
    draws = torch.ones(200_000, 1).long()
    x = torch.full_like(draws, 0)
    args = (torch.zeros_like(x).double(), x, level(t), level(s), process, vocab)
    if process == "uniform" or p_uniform:
        seen = torch.bincount(processes.draw_posterior(draws, *args, rng, p_uniform)[:, 0], minlength=4) / len(x)
        assert torch.allclose(seen.double(), step(t, s)[0], atol=0.005)


def test_maskgit_keeps_the_surest_on_its_schedule(rng):
    """Without noise the likeliest draws stay; after a share r of the steps arccos(r) / (pi/2) of all is masked."""
    sure = torch.rand(5, 16, generator=rng)

    def denoiser(x, t, label, sites):
        p = sure.gather(1, sites)[..., None]  # value 0 with this probability
        return torch.cat([p.log(), (1 - p).log()], -1)

    label, x = torch.zeros(5).long(), torch.full((5, 16), 2)
    for schedule, left in [("arccos", [9, 5, 0]), ("cosine", [13, 8, 0]), ("linear", [10, 5, 0])]:
        states = list(confidence(denoiser, x, label, n_steps=3, generator=rng, noise=0.0, schedule=schedule))
        if schedule == "arccos":
            left = [int(16 * math.acos(r / 3) / (math.pi / 2)) for r in (1, 2, 3)]
        assert [(s.x == 2).sum(1).tolist() for s in states] == [[n] * 5 for n in left]
        assert states[-1].nfe.tolist() == [3] * 5
    n_top = int(states[0].written.sum(1)[0])
    p_drawn = torch.where(states[0].x == 0, sure, 1 - sure)
    kept = torch.where(states[0].written, p_drawn, torch.inf).amin(1)
    assert n_top == 6 and (kept > 0.5).all()  # a draw of a small probability is not kept while surer ones wait
    many = list(confidence(denoiser, x, label, n_steps=40, generator=rng))
    assert all((s.written.sum(1) <= 1).all() for s in many) and not (many[-1].x == 2).any()


def test_random_order_one_at_a_time_has_the_law_of_the_data(rng):
    """Each token from its exact law given those before it, in any order."""
    world = dense().under("mask")
    options = dict(n_steps=3, generator=rng, order="random", schedule="linear", vocab=3)
    x, label = start("mask", N_LAW, 3, rng), torch.zeros(N_LAW).long()
    assert world.distance(finish(confidence(Table(world, any_level(world)), x, label, **options)).x) < 0.02
    options |= dict(n_steps=1)
    assert world.distance(finish(confidence(Table(world, any_level(world)), x, label, **options)).x) > 0.05


def any_level(world):
    """A mask denoiser: what masks are is no question of t."""
    return lambda x, t, label, sites=None: world.denoiser(x, torch.full_like(t, 0.5), label, sites)


def test_temperature_falls_evenly(monkeypatch, rng):
    seen = []
    monkeypatch.setattr(draws, "sharpen", lambda y, temperature, *rest: seen.append(temperature) or y.softmax(-1))
    net = lambda x, t, label, sites: torch.zeros(*sites.shape, 4)  # noqa: E731
    options = dict(n_steps=3, order="random", temperature=1.0, temperature_end=0.5, generator=rng)
    finish(confidence(net, torch.full((2, 9), 4), torch.zeros(2).long(), **options))
    assert seen == pytest.approx([1.0, 0.75, 0.5])


@pytest.mark.parametrize("remask, eta", [("rescale", 0.3), ("cap", 0.05)])
def test_remasking_free_of_confidence_has_the_law_of_the_data(remask, eta, rng):
    """ReMDM keeps the marginals at every level; written tokens are masked again on the way."""
    world = dense().under("mask")
    net, label = Table(world, any_level(world)), torch.zeros(N_LAW).long()
    n_again = 0
    for state in remdm(net, start("mask", N_LAW, 3, rng), label, n_steps=32, generator=rng, remask=remask, eta=eta):
        n_again += (state.written & (state.x == 3)).sum().item()
    assert world.distance(state.x) < 0.02 and n_again > N_LAW / 2


def test_remasking_by_confidence_masks_the_unsure(rng):
    """What was written at a small probability is masked again more often than what was certain; all ends unmasked."""

    def denoiser(x, t, label, sites):
        p = torch.where(sites < 4, 0.999, 0.5)[..., None]
        return torch.cat([p.log(), (1 - p).log()], -1)

    again = torch.zeros(8)
    x, label = torch.full((4000, 8), 2), torch.zeros(4000).long()
    for state in remdm(denoiser, x, label, n_steps=20, generator=rng, eta=0.1):
        again += (state.written & (state.x == 2)).sum(0)
    assert again[4:].sum() > 1.15 * again[:4].sum() > 0 and not (state.x == 2).any()


@pytest.mark.parametrize("sampler", ["ancestral", "confidence", "remdm"])
def test_known_tokens_in_mask_samplers(sampler, rng):
    """Held fixed, also where all are known and the mask id must be guessed."""
    x = torch.full((6, 10), 5)
    known = torch.rand(6, 10, generator=rng) < 0.4
    x = torch.where(known, torch.randint(5, x.shape, generator=rng), x)
    net = lambda x, t, label, sites=None: torch.zeros(*(x if sites is None else sites).shape, 5)  # noqa: E731
    options = dict(n_steps=7, generator=rng, vocab=5, known=known)
    options |= dict(process="mask") if sampler == "ancestral" else {}
    for state in getattr(samplers, sampler)(net, x, torch.zeros(6).long(), **options):
        assert torch.equal(state.x[known], x[known]) and not (state.written & known).any() and len(state.x) == 6
        assert (state.p_noise[known] == 0).all()
    assert not (state.x == 5).any()
    options |= dict(vocab=None, known=torch.ones_like(known))
    assert torch.equal(finish(getattr(samplers, sampler)(net, state.x, torch.zeros(6).long(), **options)).x, state.x)


def test_a_finished_sequence_of_masks_leaves_the_computation(rng):
    """Ancestral sampling asks for no row without masks, and for none at all where no token is uncovered."""
    rows = []

    def net(x, t, label, sites):
        rows.append(len(x))
        assert (x == 5).any(1).all()
        return torch.zeros(*sites.shape, 5)

    state = finish(
        ancestral(net, torch.full((8, 2), 5), torch.zeros(8).long(), n_steps=50, generator=rng, process="mask")
    )
    assert min(rows) < 8 and len(rows) < 50 and state.nfe.sum() == sum(rows)


def test_what_a_uniform_denoiser_says_of_noise(rng):
    """State.p_noise of ancestral sampling is the exact p(noise | x_t), with masks certain."""
    world = dense()
    state = next(
        iter(
            ancestral(
                world.denoiser,
                start("uniform", 40, 3, rng),
                torch.zeros(40).long(),
                n_steps=2,
                generator=torch.Generator().manual_seed(5),
                process="uniform",
            )
        )
    )
    assert torch.allclose(state.p_noise, torch.ones(40, 3))
    x, t = torch.randint(3, (40, 3), generator=rng), torch.full((40, 1), 0.6)
    p_at_x = world.denoiser(x, t, None).softmax(-1).gather(-1, x[..., None])[..., 0]
    assert torch.allclose(
        processes.noise_of(p_at_x, x, t.double(), "uniform", 3), world.planner(x, t, None).sigmoid(), atol=1e-6
    )
    assert processes.noise_of(p_at_x, torch.full_like(x, 3), t, "hybrid", 3, 0.2).min() == 1


def test_from_self_recovers_the_exact_planner_and_denoiser(rng):
    """Split of the exact self-prediction = the exact p(noise) and the exact prediction from the others."""
    world, t = dense(), torch.tensor([[0.3], [0.7], [0.9]])
    xt, _ = corrupt(world.points[[3, 11, 20]], t, "uniform", 3, rng)
    joint = world.likelihood(xt, t).prod(-1) * world.q
    joint = joint / joint.sum(1, keepdim=True)
    self_prediction = torch.einsum("bs,snv->bnv", joint, torch.nn.functional.one_hot(world.points, 3).double())
    p_noise, others = from_self(self_prediction, xt, t.double())
    assert torch.allclose(p_noise, world.planner(xt, t.double(), None).sigmoid())
    assert torch.allclose(others, world.denoiser(xt, t.double(), None).softmax(-1))


def test_draws_keep_the_tails(rng):
    """Ids of probability 1e-4 are drawn as often as that, impossible ones never, also among a million of others."""
    probs = torch.tensor([0.0, 0.9999, 0.0, 1e-4, 0.0])
    counts = torch.bincount(draws.draw(probs.expand(2_000_000, 5), rng), minlength=5)
    assert counts[[0, 2, 4]].sum() == 0 and counts[3].item() == pytest.approx(200, abs=60)
    n = 1_000_000
    wide = torch.cat([torch.full((n,), 0.5 / n), torch.tensor([0.5])])
    ids = torch.tensor([draws.draw(wide, rng).item() for _ in range(200)])
    assert 70 < (ids == n).sum() < 130 and 0.4 < ids[ids < n].double().mean() / n < 0.6


def test_truncation():
    """top-k keeps k ids; top-p the fewest that reach it; min-p those near the likeliest; temperature sharpens."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert draws.sharpen(logits, 1, 2, 1.0).tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert draws.sharpen(logits, 1, 0, 0.65).tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert draws.sharpen(logits, 1, 0, 0.75).tolist() == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0])
    assert draws.sharpen(logits, 1, 0, 1.0, 0.6).tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert draws.sharpen(logits, 0.5, 0, 1.0)[0] == pytest.approx(0.16 / 0.30)


def test_guidance_moves_along_the_difference_of_labelled_and_unlabelled(rng):
    """logits = unlabelled + guidance (labelled - unlabelled), at the sites asked for."""

    def net(x, t, label, sites=None):
        return label[:, None].float().expand(x.shape)

    x, t, label = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 1), torch.tensor([4, 5])
    logits, calls = draws.guided(net, x, t, label, None, 3.0, False, 10)
    assert calls == 2 and logits[:, 0].tolist() == [10 + 3 * (4 - 10), 10 + 3 * (5 - 10)]


@pytest.mark.parametrize("is_ramped", [False, True])
def test_guidance_ramps_with_the_share_of_noise_gone(is_ramped, rng):
    """Each row is guided by 1 + (guidance - 1) (1 - t) at its own t; unlabelled logits are 0 here, labelled ones 1."""
    x, t, label = torch.zeros(3, 4, dtype=torch.long), torch.tensor([[1.0], [0.5], [0.0]]), torch.zeros(3).long()

    def net(x, t, label, sites=None):
        out = (label != 9)[:, None].float().expand(x.shape)
        return out if sites is None else out.gather(1, sites)[..., None].expand(-1, -1, 5)

    want = [1.0, 2.0, 3.0] if is_ramped else [3.0, 3.0, 3.0]
    for sites in (None, torch.zeros(3, 2).long()):
        logits, calls = draws.guided(net, x, t, label, sites, 3.0, is_ramped, 9)
        assert calls == 2 and logits.flatten(1)[:, 0].tolist() == want
    assert draws.guided(net, x, t, label, None, 1.0, is_ramped, 9)[1] == 1


@pytest.mark.parametrize(
    "bad, name",
    [
        (dict(schedule="two"), "schedule"),
        (dict(pick="worst"), "pick"),
        (dict(n_steps=0), "n_steps"),
        (dict(top_p=0.0), "top_p"),
        (dict(temperature=0.0), "temperature"),
        (dict(guidance=2.0), "null_label"),
        (dict(denoiser_process="mask"), "vocab"),
        (dict(k=0), "k"),
        (dict(stop=-1.0), "stop"),
        (dict(refine=-1), "refine"),
        (dict(denoiser_process="hybrid"), "denoiser_process"),
        (dict(planner=None, planner_guidance=2.0, null_label=0), "planner_guidance needs a planner"),
    ],
)
def test_arguments_that_mean_nothing_are_refused_by_name(bad, name, rng):
    world, x = dense(), torch.zeros(1, 3, dtype=torch.long)
    options = dict(planner=world.planner, n_steps=1, generator=rng) | bad
    with pytest.raises(ValueError, match=name):
        finish(ddpd(denoiser=world.denoiser, x=x, label=torch.zeros(1).long(), **options))


def test_a_misfit_of_sampler_and_denoiser_is_refused(rng):
    with pytest.raises(ValueError, match="maskd"):
        samplers.check_fit("maskd", "self_correct")
    with pytest.raises(ValueError, match="its own planner"):
        finish(
            ddpd(
                None,
                dense().denoiser,
                torch.zeros(1, 3).long(),
                torch.zeros(1).long(),
                n_steps=1,
                vocab=3,
                generator=rng,
                denoiser_process="mask",
            )
        )
