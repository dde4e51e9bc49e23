import pytest
import torch
from world import Table, dense, sparse

from diffusion import samplers
from diffusion.processes import corrupt, from_self
from diffusion.samplers import ddpd
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
    world, label = dense(), torch.zeros(N_LAW, dtype=torch.long)
    x = torch.randint(3, (N_LAW, 3), generator=rng)
    constant = lambda x, t, label, sites=None: torch.zeros(x.shape)  # noqa: E731
    for planner, low, high in [(Table(world, world.planner), 0, 0.02), (constant, 0.05, 1)]:
        state = finish(
            ddpd(planner, Table(world, world.denoiser), x, label, n_steps=512, generator=rng, schedule="leap")
        )
        assert low <= world.distance(state.x) < high


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


def test_truncation():
    """top-k keeps k ids; top-p keeps the fewest that reach it; temperature sharpens."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert samplers.sharpen(logits, 1, 2, 1.0).tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert samplers.sharpen(logits, 1, 0, 0.65).tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert samplers.sharpen(logits, 1, 0, 0.75).tolist() == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0])
    assert samplers.sharpen(logits, 0.5, 0, 1.0)[0] == pytest.approx(0.16 / 0.30)


def test_guidance_moves_along_the_difference_of_labelled_and_unlabelled(rng):
    """logits = unlabelled + guidance (labelled - unlabelled), at the sites asked for."""

    def net(x, t, label, sites=None):
        return label[:, None].float().expand(x.shape)

    x, t, label = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 1), torch.tensor([4, 5])
    logits, calls = samplers.guided(net, x, t, label, None, 3.0, 10)
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
        logits, calls = samplers.guided(net, x, t, label, sites, samplers.ramp(3.0, t, is_ramped), 9)
        assert calls == 2 and logits.flatten(1)[:, 0].tolist() == want
    assert samplers.guided(net, x, t, label, None, samplers.ramp(1.0, t, is_ramped), 9)[1] == 1


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
    ],
)
def test_arguments_that_mean_nothing_are_refused_by_name(bad, name, rng):
    world, x = dense(), torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=name):
        finish(
            ddpd(world.planner, world.denoiser, x, torch.zeros(1).long(), **({"n_steps": 1, "generator": rng} | bad))
        )


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
