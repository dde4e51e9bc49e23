"""Samplers: oracles recover the data, exact networks sample its law, each keeps its own rules."""

import functools
import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from world import Oracle, Table, at_sites, dense, marginal, sparse, tiny_spec

import methods
from diffusion import decoding, processes, unmasking
from diffusion.decoding import Decoding, cfg_logits, sample_categorical, truncate_probs
from diffusion.processes import Noise, corrupt
from diffusion.samplers import ancestral, choose_sites, confidence, ddpd, last, p2, remdm

N_LAW = 100_000     # sampling alone puts the 27-state law this far: about .007


def no_label(n):
    return torch.zeros(n, dtype=torch.long)


def constant_denoiser(vocab):
    """All ids are equally likely everywhere."""
    def net(x, t, label, sites=None):
        return torch.zeros(*(x if sites is None else sites).shape, vocab)
    return net


def constant_planner(x, t, label, sites=None):
    """P(noise) is 1/2 everywhere."""
    return torch.zeros(x.shape)


# Planned denoising


def test_sites_are_picked_by_the_planner_or_without_it(rng):
    """In proportion to P(noise), to its odds, or at random; never where P(noise) is 0."""
    p_noise = torch.tensor([0.0, 0.1, 0.1, 0.4]).expand(20_000, 4)
    shares = {"proportional": [0, 1/6, 1/6, 2/3], "softmax": [0, 1/8, 1/8, 3/4],
              "random": [0, 1/3, 1/3, 1/3]}
    for pick, share in shares.items():
        sites = choose_sites(p_noise, p_noise > 1, "one", pick, 1, 1, rng)
        torch.testing.assert_close(sites.double().mean(0), torch.tensor(share).double(),
                                   atol=0.015, rtol=0)


@pytest.mark.parametrize("process", ["uniform", "mask"])
@pytest.mark.parametrize("options", [
    dict(schedule="one", n_steps=12),
    dict(schedule="fixed", k=5, n_steps=3),
    dict(schedule="spread", n_steps=5),
    dict(schedule="spread", n_steps=1),
    dict(schedule="leap", n_steps=7),
    dict(schedule="one", pick="softmax", n_steps=12),
])
def test_oracles_recover_x0(options, process, rng):
    """A planner that knows the noise and a denoiser that knows x0 reach x0 under any schedule."""
    x0 = torch.randint(50, (6, 12), generator=rng)
    x = torch.randint(50, (6, 12), generator=rng)
    start = x.clone()
    before = start
    oracle = Oracle(x0, 50)
    states = ddpd(oracle.planner, oracle.denoiser, x, torch.arange(6), generator=rng,
                  denoiser_process=process, vocab=50, **options)
    for state in states:
        assert torch.equal(state.x[~state.written], before[~state.written])     # only sites change
        assert not state.written[before == x0].any()                # and only noise is a site
        before = state.x
    assert torch.equal(state.x, x0)
    assert torch.equal(x, start)                        # the caller's tensor is left alone


@pytest.mark.parametrize("schedule", ["one", "fixed", "spread", "leap"])
def test_a_mask_denoiser_sees_what_it_was_trained_on(schedule, rng):
    """Masks where the planner's draw says noise and at the chosen sites, tokens elsewhere."""
    x = torch.randint(5, (400, 10), generator=rng)
    p_noise = torch.tensor([0.0] * 2 + [0.5] * 4 + [1.0] * 4).expand(400, 10)
    inputs = []

    def planner(x, t, label):
        return p_noise.logit()

    def denoiser(x, t, label, sites):
        inputs.append((x, sites))
        return torch.zeros(*sites.shape, 5)

    states = ddpd(planner, denoiser, x, no_label(400), n_steps=2, k=3, generator=rng,
                  schedule=schedule, denoiser_process="mask", vocab=5)
    before = x
    for step, state in enumerate(states):
        x_input, sites = inputs[step]
        rows = state.written.any(1)                     # a leap may leave a sequence as it is
        written = state.written[rows]
        is_masked = x_input == 5
        assert is_masked[:, 6:].all()
        assert not is_masked[:, :2].any()
        assert is_masked[written].all()
        assert torch.equal(x_input[~is_masked], before[rows][~is_masked])
        # a site is masked anyway; a leap has its sites among the tokens called noise
        is_drawn = ~written[:, 2:6] | (schedule == "leap")
        assert is_masked[:, 2:6][is_drawn].float().mean().item() == pytest.approx(0.5, abs=0.06)
        assert (sites.shape[1] > 1) == (schedule != "one")
        before = state.x
    assert len(inputs) == 2


@pytest.mark.parametrize("process", ["uniform", "mask"])
@pytest.mark.parametrize("options", [
    dict(schedule="spread"), dict(schedule="leap"), dict(schedule="fixed", k=9, refine=3),
])
def test_known_tokens_are_never_written(options, process, rng):
    """Not where the planner says noise, nor in refinement, nor where a whole sequence is known."""
    x = torch.randint(5, (4, 10), generator=rng)
    known = torch.rand(4, 10, generator=rng) < 0.5
    known[0] = True

    def planner(x, t, label, sites=None):
        return torch.full(x.shape, 3.0)

    states = ddpd(planner, constant_denoiser(5), x, no_label(4), n_steps=6, generator=rng,
                  known=known, vocab=5, denoiser_process=process, **options)
    for state in states:
        assert torch.equal(state.x[known], x[known])
        assert not (state.written & known).any()
        assert (state.p_noise[known] == 0).all()
        assert len(state.x) == 4
    assert (state.x != x)[1:].any()


def test_nfe_counts_every_call(rng):
    """Planner and denoiser count 1 each in every step, a guided call 2, one network as both 1."""
    x0 = torch.randint(50, (3, 12), generator=rng)
    x = torch.randint(50, (3, 12), generator=rng)
    label = torch.arange(3)
    oracle = Oracle(x0, 50)
    options = dict(n_steps=15, generator=rng, schedule="one")
    states = ddpd(oracle.planner, oracle.denoiser, x, label, **options)
    n_calls = torch.zeros(3).long()
    for state in states:
        n_calls += 1 + state.written.any(1)             # the denoiser where there is noise only
        assert torch.equal(state.nfe, n_calls)
    assert torch.equal(state.x, x0)
    assert n_calls.max() == 15 + 12

    def final_nfe(planner, **options):
        options |= dict(n_steps=4, generator=rng)
        return last(ddpd(planner, constant_denoiser(50), x, label, **options)).nfe.tolist()

    assert final_nfe(constant_planner, guidance=2.0, null_label=0) == [12] * 3
    assert final_nfe(constant_planner, planner_guidance=2.0, null_label=0) == [12] * 3
    assert final_nfe(constant_planner, refine=3, null_label=0) == [14] * 3
    assert final_nfe(None) == [4] * 3


CALLS = {       # sampler, its options, calls of a step that writes nothing
    "ddpd": (lambda denoiser, x, label, **options: ddpd(
        constant_planner, denoiser, x % 5, label, schedule="leap", vocab=5, **options), {}, 1),
    "ancestral": (ancestral, dict(process="mask"), 0),
    "confidence": (confidence, {}, 0),
    "random": (confidence, dict(order="random"), 0),
    "remdm": (remdm, dict(remask="rescale"), 0),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_row_pays_for_its_own_calls(name, guidance, rng):
    """A row's calls do not depend on the batch: the denoiser is asked for rows that write."""
    sampler, options, n_idle = CALLS[name]
    rows_asked = torch.zeros(200).long()

    def denoiser(x, t, label, sites=None):
        is_labelled = label < 200
        rows_asked[label[is_labelled]] += 1
        return torch.zeros(*sites.shape, 5)

    x = torch.full((200, 6), 5)
    known = torch.zeros_like(x, dtype=torch.bool)
    known[:50, 2:] = True                               # these have less to do
    x[known] = 1
    options |= dict(n_steps=9, guidance=guidance, null_label=200)
    n_writing = torch.zeros(200).long()
    n_states = 0
    for state in sampler(denoiser, x, torch.arange(200), generator=rng, known=known, **options):
        wrote = state.written if name != "remdm" else state.written & (state.x != 5)
        n_writing += wrote.any(1)
        n_states += 1
    assert torch.equal(rows_asked, n_writing)
    n_calls = 2 if guidance != 1 else 1
    assert torch.equal(state.nfe, n_calls * n_writing + n_idle * n_states)
    assert n_writing.min() < n_writing.max() <= 9


@pytest.mark.parametrize("process", ["uniform", "mask"])
def test_a_sequence_that_is_known_takes_no_calls(process, rng):
    """Planned denoising asks nothing about it, alone or in a batch."""
    x = torch.randint(5, (3, 4), generator=rng)
    known = torch.zeros_like(x, dtype=torch.bool)
    known[0] = True
    options = dict(n_steps=4, generator=rng, vocab=5, denoiser_process=process, refine=2)

    def planner(x, t, label, sites=None):
        assert len(x) > 0
        return constant_planner(x, t, label)

    def sample(known):
        nets = planner, constant_denoiser(5)
        return list(ddpd(*nets, x, no_label(len(x)), known=known, **options))

    states = sample(known)
    assert states[-1].nfe.tolist() == [0, 12, 12]
    assert torch.equal(states[-1].x[0], x[0])
    states = sample(torch.ones_like(known))
    assert len(states) == 1 and not states[0].nfe.any()


def test_a_sequence_that_is_done_leaves_the_computation(rng):
    """stop: rows under it reach no network again, but stay in the State; all done is the end."""
    x0 = torch.randint(50, (3, 12), generator=rng)
    x = torch.randint(50, (3, 12), generator=rng)
    x[0] = x0[0]
    x[1, 2:] = x0[1, 2:]                                # two noise tokens at most
    labels_seen = []

    def planner(x, t, label, sites=None):
        labels_seen.append(label.tolist())
        return torch.where(x != x0[label], torch.inf, -torch.inf)

    def denoiser(x, t, label, sites=None):
        return F.one_hot(x0[label].gather(1, sites), 50).float().log()

    options = dict(n_steps=99, generator=rng, schedule="one", stop=0.5)
    states = list(ddpd(planner, denoiser, x, torch.arange(3), **options))
    n_noise = (x != x0).sum(1)
    assert torch.equal(states[-1].nfe, 2 * n_noise + 1)     # the planner's last call finds none
    assert len(states) == n_noise.max() + 1
    assert all(state.x.shape == x.shape for state in states)
    assert labels_seen[0] == [0, 1, 2]
    assert labels_seen[1] == [1, 2]
    assert labels_seen[-1] == [2]
    assert torch.equal(states[-1].x, x0)


@pytest.mark.parametrize("process", ["uniform", "mask"])
def test_one_site_at_a_time_has_the_law_of_the_data(process, rng):
    """Where noise is recognisable: exact networks, stopped under 0.5 expected noise tokens."""
    world = sparse()
    options = dict(n_steps=4, generator=rng, schedule="one", stop=0.5)
    options |= dict(denoiser_process=process, vocab=2000)

    def distance(planner, n):
        samples = []
        for x in torch.randint(2000, (n, 3), generator=rng).split(5000):    # V = 2,000 is wide
            states = ddpd(planner, world.denoiser, x, no_label(len(x)), **options)
            samples.append(last(states).x)
        return world.distance(torch.cat(samples))

    assert distance(world.planner, N_LAW) < 0.05
    assert distance(constant_planner, 10_000) > 0.05


def test_leap_has_the_law_of_the_data(rng):
    """On a fixed clock planner times denoiser is the reverse process; a constant planner is not."""
    world = dense()
    denoiser = Table(world, world.denoiser)

    def distance(planner, n):
        x = torch.randint(3, (n, 3), generator=rng)
        options = dict(n_steps=512, generator=rng, schedule="leap")
        states = ddpd(planner, denoiser, x, no_label(n), **options)
        return world.distance(last(states).x)

    assert distance(Table(world, world.planner), N_LAW) < 0.02
    assert distance(constant_planner, 10_000) >= 0.05


# Ancestral sampling

NOISES = [("mask", 0.0), ("uniform", 0.0), ("hybrid", 0.1), ("hybrid", 0.2), ("hybrid", 0.0)]


@pytest.mark.parametrize("process, p_uniform", NOISES)
@pytest.mark.parametrize("kind", ["others", "self"])
def test_ancestral_has_the_law_of_the_data(process, p_uniform, kind, rng):
    """By the exact networks; the wrong kind counts a token's own evidence twice or never."""
    world = dense().under(process, p_uniform)
    leave_one_out = Table(world, world.denoiser)
    x0_prediction = Table(world, world.x0_denoiser)
    right = leave_one_out if kind == "others" else x0_prediction
    wrong = x0_prediction if kind == "others" else leave_one_out

    def distance(net, n_steps, n=N_LAW):
        x = world.noise.sample_prior((n, 3), rng)
        options = dict(n_steps=n_steps, generator=rng, kind=kind, **asdict(world.noise))
        return world.distance(last(ancestral(net, x, no_label(n), **options)).x)

    assert distance(right, 64 if process == "uniform" else 32) < 0.02
    if process == "uniform" or p_uniform:
        assert distance(wrong, 64, 20_000) > 0.05


@pytest.mark.parametrize("process, p_uniform", NOISES)
def test_posteriors_compose(process, p_uniform, rng):
    """From t to r and on to s is from t to s, and makes q_s(. | p) of q_t(. | p), by enumeration.

    With x0 known the posterior of a token is a Markov chain of its own (Chapman-Kolmogorov).
    """
    vocab = 3
    noise = Noise(process, vocab, p_uniform)
    t, r, s = 0.8, 0.5, 0.1
    x0 = F.one_hot(torch.tensor([[1]]), vocab).double()

    def level(y):
        return torch.tensor([[y]], dtype=torch.float64)

    def law(t):
        return marginal(x0, level(t), noise)[0, 0]                      # (V + 1,)

    def step(t, s):
        rows = []
        for z in range(vocab + 1):
            x = torch.tensor([[z]])
            p_at_x = (x == 1).double()
            p_keep = processes.posterior_keep_prob(p_at_x, x, level(t), level(s), noise)[0, 0]
            row = (1 - p_keep) * law(s)
            row[z] += p_keep
            rows.append(row)
        return torch.stack(rows)                                        # (V + 1, V + 1)

    identity = torch.eye(vocab + 1, dtype=torch.float64)
    assert torch.allclose(step(t, r) @ step(r, s), step(t, s), atol=1e-12)
    assert torch.allclose(law(t) @ step(t, s), law(s), atol=1e-12)
    assert torch.allclose(step(t, t), identity)
    pure_noise = 0 if process == "uniform" else vocab
    assert torch.allclose(step(1.0, 0.0)[pure_noise], identity[1])

    if process == "uniform" or p_uniform:
        draws = torch.ones(200_000, 1).long()                           # of x0
        x = torch.zeros_like(draws)
        p_at_x = torch.zeros_like(x).double()
        x_s = processes.sample_posterior(draws, p_at_x, x, level(t), level(s), noise, rng)
        frequency = torch.bincount(x_s[:, 0], minlength=vocab + 1) / len(x)
        assert torch.allclose(frequency.double(), step(t, s)[0], atol=0.005)


def test_a_finished_sequence_of_masks_leaves_the_computation(rng):
    """Ancestral sampling calls the net for rows with masks, if a token is to be uncovered."""
    n_rows = []

    def net(x, t, label, sites):
        n_rows.append(len(x))
        assert (x == 5).any(1).all()
        return torch.zeros(*sites.shape, 5)

    x = torch.full((8, 2), 5)
    state = last(ancestral(net, x, no_label(8), n_steps=50, generator=rng, process="mask"))
    assert min(n_rows) < 8
    assert len(n_rows) < 50
    assert state.nfe.sum() == sum(n_rows)


def test_posterior_noise_prob_is_the_exact_planner(rng):
    """By the exact leave-one-out prediction; masks are certainly noise, and so is all at t = 1."""
    world = dense()
    x = world.noise.sample_prior((40, 3), rng)
    states = ancestral(world.denoiser, x, no_label(40), n_steps=2, generator=rng, process="uniform")
    assert torch.allclose(next(states).p_noise, torch.ones(40, 3))

    x = torch.randint(3, (40, 3), generator=rng)
    t = torch.full((40, 1), 0.6)
    p_at_x = world.denoiser(x, t, None).softmax(-1).gather(-1, x[..., None])[..., 0]
    p_noise = processes.posterior_noise_prob(p_at_x, x, t.double(), world.noise)
    assert torch.allclose(p_noise, world.planner(x, t, None).sigmoid(), atol=1e-6)
    masks = torch.full_like(x, 3)
    assert processes.posterior_noise_prob(p_at_x, masks, t, Noise("hybrid", 3, 0.2)).min() == 1


def test_an_x0_prediction_splits_into_the_exact_planner_and_denoiser(rng):
    """split_planner_denoiser: the exact p(noise) and the exact leave-one-out prediction."""
    world = dense()
    t = torch.tensor([[0.3], [0.7], [0.9]])
    xt, _ = corrupt(world.points[[3, 11, 20]], t, world.noise, rng)
    t = t.double()
    probs = world.x0_denoiser(xt, t, None).exp()
    p_noise, leave_one_out = processes.split_planner_denoiser(probs, xt, t, world.noise)
    assert torch.allclose(p_noise, world.planner(xt, t, None).sigmoid())
    assert torch.allclose(leave_one_out, world.denoiser(xt, t, None).softmax(-1))


# Samplers that start from masks


def any_level(world):
    """A mask denoiser that needs no t."""
    def net(x, t, label, sites=None):
        return world.denoiser(x, torch.full_like(t, 0.5), label, sites)
    return Table(world, net)


def any_level_planner(world):
    """A planner that is told no t, as in training: its mean over levels, by Bayes' rule."""
    def net(x, t, label, sites=None):
        joint = []
        p_noise = []
        for level in (torch.arange(16, dtype=torch.float64) + 0.5) / 16:
            t = level.expand(len(x), 1)
            joint.append((world.likelihood(x, t).prod(-1) * world.q).sum(1, keepdim=True))
            p_noise.append(world.planner(x, t, label).sigmoid())
        weight = torch.stack(joint) / sum(joint)
        return (weight * torch.stack(p_noise)).sum(0).logit()
    return Table(world, net)


def test_maskgit_keeps_the_surest_on_its_schedule(rng):
    """Without noise the likeliest draws stay; after r of the steps arccos(r) / (pi/2) is masked."""
    p_of_0 = torch.rand(5, 16, generator=rng)
    x = torch.full((5, 16), 2)

    def denoiser(x, t, label, sites):
        p = p_of_0.gather(1, sites)[..., None]
        return torch.cat([p.log(), (1 - p).log()], -1)

    def sample(**options):
        return list(confidence(denoiser, x, no_label(5), generator=rng, **options))

    arccos = [int(16 * math.acos(r / 3) / (math.pi / 2)) for r in (1, 2, 3)]
    for schedule, n_left in [("arccos", arccos), ("cosine", [13, 8, 0]), ("linear", [10, 5, 0])]:
        states = sample(n_steps=3, noise=0.0, schedule=schedule)
        assert [(state.x == 2).sum(1).tolist() for state in states] == [[n] * 5 for n in n_left]
        assert states[-1].nfe.tolist() == [3] * 5

    first = states[0]                               # of "linear"
    p_drawn = torch.where(first.x == 0, p_of_0, 1 - p_of_0)
    assert (first.written.sum(1) == 6).all()
    assert (p_drawn[first.written] > 0.5).all()     # unlikely draws are not kept before surer ones

    states = sample(n_steps=40)
    assert all((state.written.sum(1) <= 1).all() for state in states)
    assert not (states[-1].x == 2).any()


@pytest.mark.parametrize("order", ["random", "halton"])
def test_a_blind_order_one_at_a_time_has_the_law_of_the_data(order, rng):
    """Each token from its exact law given those before it; all at once is another law."""
    world = dense().under("mask")

    def distance(n_steps):
        x = world.noise.sample_prior((N_LAW, 3), rng)
        options = dict(n_steps=n_steps, generator=rng, schedule="linear", vocab=3)
        options |= dict(order=order, grid=(3,))
        return world.distance(last(confidence(any_level(world), x, no_label(N_LAW), **options)).x)

    assert distance(n_steps=3) < 0.02
    assert distance(n_steps=1) > 0.05


def test_steps_share_the_entropy(rng):
    """Two of four tokens are certain: the first of two steps writes them and one coin."""
    p_of_0 = torch.tensor([1.0, 0.5, 1.0, 0.5])

    def denoiser(x, t, label, sites):
        p = p_of_0[sites][..., None]
        return torch.cat([p, 1 - p], -1).log()

    def n_written(n_steps):
        x = torch.full((50, 4), 2)
        options = dict(n_steps=n_steps, schedule="entropy", noise=0.0, vocab=2, generator=rng)
        states = list(confidence(denoiser, x, no_label(50), **options))
        assert not (states[-1].x == 2).any()
        assert (states[-1].x[:, [0, 2]] == 0).all()
        return [state.written.sum(1).unique().tolist() for state in states]

    assert n_written(1) == [[4]]
    assert n_written(2) == [[3], [1]]
    # a third of two coins is less than one: certain ones alone, then a coin each
    assert n_written(3) == [[2], [1], [1]]


def test_halton_order_leaves_no_token_out():
    """Points (0, 0), (1/2, 1/3), (1/4, 2/3), (3/4, 1/9) lie in cells of 4 rows and 3 columns."""
    rank = unmasking.halton_rank((4, 3)).view(4, 3)
    assert [rank[cell].item() for cell in [(0, 0), (2, 1), (1, 2), (3, 0)]] == [0, 1, 2, 3]
    for grid in [(4, 3), (7,), (2, 5, 3), (32, 32)]:
        assert sorted(unmasking.halton_rank(grid).tolist()) == list(range(math.prod(grid)))
    # a quarter of a picture has a token in 83 % of blocks of 2x2, where chance gives 68 %
    first = (unmasking.halton_rank((32, 32)) < 256).view(16, 2, 16, 2)
    assert first.any(3).any(1).float().mean() > 0.8


@pytest.mark.parametrize("options, said", [
    (dict(order="halton"), "needs the grid"), (dict(order="halton", grid=(2, 2)), "needs the grid"),
    (dict(order="random", schedule="entropy"), "order random has none"),
    (dict(schedule="spread"), "schedule is 'spread'"), (dict(order="raster"), "order is 'raster'"),
])
def test_maskgit_refuses(options, said, rng):
    x = torch.full((2, 9), 4)
    with pytest.raises(ValueError, match=said):
        last(confidence(constant_denoiser(4), x, no_label(2), n_steps=2, generator=rng, **options))


@pytest.mark.parametrize("kind", ["self", "others"])
def test_a_low_temperature_makes_samples_likelier(kind, rng):
    """Also with an x0-prediction: temperature acts on the leave-one-out prediction behind it."""
    world = dense().under("uniform")
    net = Table(world, world.x0_denoiser if kind == "self" else world.denoiser)
    log_q = world.q.log()
    means = []
    for temperature in (1.0, 0.25):
        x = torch.randint(3, (20_000, 3), generator=rng)
        options = dict(n_steps=64, process="uniform", kind=kind, vocab=3, temperature=temperature)
        final = last(ancestral(net, x, torch.zeros(len(x)).long(), generator=rng, **options))
        index = (final.x * torch.tensor([9, 3, 1])).sum(1)      # dense worlds hold all sequences
        means.append(log_q[index].mean().item())
    assert means[1] > means[0] + 0.3


def test_temperature_falls_evenly(monkeypatch, rng):
    temperatures = []

    def record(logits, options):
        temperatures.append(options.temperature)
        return logits.softmax(-1)

    monkeypatch.setattr(decoding, "truncate_probs", record)
    options = dict(n_steps=3, order="random", temperature=1.0, temperature_end=0.5, generator=rng)
    last(confidence(constant_denoiser(4), torch.full((2, 9), 4), no_label(2), **options))
    assert temperatures == pytest.approx([1.0, 0.75, 0.5])


@pytest.mark.parametrize("remask, eta", [("rescale", 0.3), ("cap", 0.05)])
def test_remasking_without_confidence_has_the_law_of_the_data(remask, eta, rng):
    """ReMDM keeps the marginals at every level; written tokens are masked again on the way."""
    world = dense().under("mask")
    x = world.noise.sample_prior((N_LAW, 3), rng)
    options = dict(n_steps=32, generator=rng, remask=remask, eta=eta)
    n_remasked = 0
    for state in remdm(any_level(world), x, no_label(N_LAW), **options):
        n_remasked += (state.written & (state.x == 3)).sum().item()
    assert world.distance(state.x) < 0.02
    assert n_remasked > N_LAW / 2


def test_remasking_by_confidence_masks_the_unsure(rng):
    """Tokens written at a small probability are masked again more often; none stays masked."""

    def denoiser(x, t, label, sites):
        p = torch.where(sites < 4, 0.999, 0.5)[..., None]
        return torch.cat([p.log(), (1 - p).log()], -1)

    n_remasked = torch.zeros(8)
    x = torch.full((4000, 8), 2)
    for state in remdm(denoiser, x, no_label(4000), n_steps=20, generator=rng, eta=0.1):
        n_remasked += (state.written & (state.x == 2)).sum(0)
    assert n_remasked[4:].sum() > 1.15 * n_remasked[:4].sum() > 0
    assert not (state.x == 2).any()


def test_remasking_by_confidence_masks_as_many_as_the_released_code(rng):
    """Where all tokens are alike a step shares min(1, s / (1 - t)) out among all of them: 20 of
    1,024 in 32 steps, in expectation."""
    x = torch.full((100, 1024), 2)
    n_remasked = 0
    for state in remdm(constant_denoiser(2), x, no_label(100), n_steps=32, generator=rng):
        n_remasked += (state.written & (state.x == 2)).sum().item() / len(x)
    expected = sum(min(1, (31 - i) / i) for i in range(1, 32))
    assert 20 < expected < 23
    assert n_remasked == pytest.approx(expected, rel=0.1)


# Path planning


@pytest.mark.parametrize("schedule, n_left", [
    ("linear", [9, 6, 3, 0]), ("cosine", [11, 8, 4, 0]), ("arccos", [10, 8, 5, 0]),
])
def test_p2_keeps_as_many_as_its_schedule(schedule, n_left, rng):
    """Two calls a step, the last one; by oracles one step suffices. Equal scores: any tokens."""
    x0 = torch.randint(5, (300, 12), generator=rng)
    x = torch.full((300, 12), 5)
    oracle = Oracle(x0, 5)
    label = torch.arange(300)
    options = dict(n_steps=4, generator=rng, schedule=schedule, vocab=5)
    states = list(p2(oracle.planner, oracle.denoiser, x, label, **options))
    assert [(state.x == 5).sum(1).unique().tolist() for state in states] == [[n] for n in n_left]
    assert [state.nfe.unique().tolist() for state in states] == [[2], [4], [6], [7]]
    assert torch.equal(states[-1].x, x0)
    kept = (states[0].x != 5).float().mean(0)
    assert (kept - (12 - n_left[0]) / 12).abs().max() < 0.12

    one = last(p2(oracle.planner, oracle.denoiser, x, label, n_steps=1, generator=rng))
    assert torch.equal(one.x, x0)
    assert one.nfe.unique().tolist() == [1]


def test_p2_keeps_what_its_planner_calls_clean(rng):
    """A denoiser that is right half the time: an oracle planner keeps the right draws, so that
    only the last token is at stake; a planner that knows nothing leaves half of them wrong. The
    planner sees no masks."""
    x0 = torch.randint(5, (300, 12), generator=rng)
    oracle = Oracle(x0, 5)

    def denoiser(x, t, label, sites):
        return (F.one_hot(x0[label].gather(1, sites), 5) * 0.375 + 0.125).log()

    def planner(x, t, label):
        assert (x < 5).all()
        return oracle.planner(x, t, label)

    def n_wrong(planner):
        x = torch.full_like(x0, 5)
        options = dict(n_steps=12, generator=rng, vocab=5)
        final = last(p2(planner, denoiser, x, torch.arange(300), **options))
        return (final.x != x0).sum(1).float().mean().item()

    assert n_wrong(planner) < 1
    assert n_wrong(constant_planner) == pytest.approx(6, abs=0.5)


@pytest.mark.parametrize("eta, share", [(0.0, 0.0), (1.0, 0.0), (2.0, 1.0)])
def test_eta_scales_how_readily_visible_tokens_are_masked_again(eta, share, rng):
    """log P(clean) is -.7 of visible tokens and -1.2 of fresh ones: twice -.7 is less than that.
    At eta 0 they stay even where the planner is sure that they are noise."""
    seen = {}

    def denoiser(x, t, label, sites):
        seen["is_masked"] = x == 5
        return torch.zeros(*sites.shape, 5)

    def planner(x, t, label):
        p_clean = torch.where(seen["is_masked"], 0.3, 0.0 if eta == 0 else 0.5)
        return -p_clean.logit()

    x = torch.full((50, 12), 5)
    states = p2(planner, denoiser, x, no_label(50), n_steps=4, generator=rng, eta=eta)
    visible = next(states).x != 5
    assert (visible.sum(1) == 3).all()
    second = next(states)
    assert second.p_noise.allclose(torch.where(visible, 0.7, 1.0))      # as they were kept
    is_masked_again = second.x[visible] == 5
    assert is_masked_again.float().mean().item() == share


def test_p2_by_a_planner_that_knows_nothing_has_the_law_of_the_data(rng):
    """Without masking again it is masked diffusion in random order, one token in a step; with it
    Gibbs sampling at a falling share of masks, which needs more steps."""
    world = dense().under("mask")
    denoiser = any_level(world)

    def distance(n_steps, eta):
        x = world.noise.sample_prior((N_LAW, 3), rng)
        options = dict(n_steps=n_steps, generator=rng, eta=eta, vocab=3)
        return world.distance(last(p2(constant_planner, denoiser, x, no_label(N_LAW), **options)).x)

    assert distance(3, eta=0.0) < 0.02
    assert distance(16, eta=1.0) < 0.02
    assert distance(3, eta=1.0) > 0.025


@pytest.mark.parametrize("eta, n_steps, tv, bits", [
    (0.0, 3, 0.34, 2.7), (1.0, 3, 0.38, 2.6), (1.0, 32, 0.70, 1.0),
])
def test_p2_by_an_exact_planner_sharpens(eta, n_steps, tv, bits, rng):
    """Keeping the likeliest draws favours likely sequences, with exact networks too: the data have
    3.94 bits."""
    world = dense()
    denoiser = any_level(world.under("mask"))
    planner = any_level_planner(world)
    n = 20_000
    x = torch.full((n, 3), 3)
    options = dict(n_steps=n_steps, generator=rng, eta=eta, vocab=3)
    final = last(p2(planner, denoiser, x, no_label(n), **options)).x
    index = final @ torch.tensor([9, 3, 1])
    share = index.bincount(minlength=27).double() / n
    assert world.distance(final) == pytest.approx(tv, abs=0.03)
    assert torch.special.entr(share).sum().item() / math.log(2) == pytest.approx(bits, abs=0.15)


@pytest.mark.parametrize("bad, name", [
    (dict(schedule="spread"), "schedule"), (dict(eta=-1.0), "eta"), (dict(n_steps=0), "n_steps"),
    (dict(x=torch.zeros(1, 3).long()), "start from masks"),
])
def test_arguments_of_p2_that_mean_nothing_are_refused_by_name(bad, name, rng):
    options = dict(x=torch.full((1, 3), 5), n_steps=2, generator=rng, vocab=5) | bad
    with pytest.raises(ValueError, match=name):
        last(p2(constant_planner, constant_denoiser(5), label=no_label(1), **options))


@pytest.mark.parametrize("sampler, more", [
    (ancestral, dict(process="mask")), (confidence, {}), (remdm, {}),
    (functools.partial(p2, constant_planner), {}),
])
def test_known_tokens_in_mask_samplers(sampler, more, rng):
    """Held fixed, also where all are known and the mask id must be guessed."""
    known = torch.rand(6, 10, generator=rng) < 0.4
    x = torch.where(known, torch.randint(5, (6, 10), generator=rng), 5)

    def sample(x, known, vocab):
        options = dict(n_steps=7, generator=rng, vocab=vocab, known=known, **more)
        return sampler(constant_denoiser(5), x, no_label(6), **options)

    for state in sample(x, known, vocab=5):
        assert torch.equal(state.x[known], x[known])
        assert not (state.written & known).any()
        assert (state.p_noise[known] == 0).all()
        assert len(state.x) == 6
    assert not (state.x == 5).any()
    final = last(sample(state.x, torch.ones_like(known), vocab=None))
    assert torch.equal(final.x, state.x)


# Decoding


def test_draws_keep_the_tails(rng):
    """Rare ids are drawn as often as they should, impossible ones never, also among a million."""
    probs = torch.tensor([0.0, 0.9999, 0.0, 1e-4, 0.0])
    draws = sample_categorical(probs.expand(2_000_000, 5), rng)
    counts = torch.bincount(draws, minlength=5)
    assert counts[[0, 2, 4]].sum() == 0
    assert counts[3].item() == pytest.approx(200, abs=60)

    n = 1_000_000
    wide = torch.cat([torch.full((n,), 0.5 / n), torch.tensor([0.5])])
    ids = torch.stack([sample_categorical(wide, rng) for _ in range(200)])
    assert 70 < (ids == n).sum() < 130
    assert 0.4 < ids[ids < n].double().mean() / n < 0.6


@pytest.mark.parametrize("options, expected", [
    (dict(top_k=2), [4 / 7, 3 / 7, 0, 0]),
    (dict(top_p=0.65), [4 / 7, 3 / 7, 0, 0]),
    (dict(top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0]),
    (dict(min_p=0.6), [4 / 7, 3 / 7, 0, 0]),
    (dict(temperature=0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
])
def test_truncation(options, expected):
    """top-k keeps k ids, top-p the fewest that reach it, min-p those near the likeliest."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert truncate_probs(logits, Decoding(**options)).tolist() == pytest.approx(expected)


def test_guidance_moves_along_the_difference_of_labelled_and_unlabelled():
    """unlabelled + guidance (labelled - unlabelled), at the sites asked for, in two calls."""

    def net(x, t, label, sites=None):
        logits = (10 * torch.arange(3) + label[:, None])[..., None].float().expand(*x.shape, 5)
        return logits if sites is None else at_sites(logits, sites)

    x = torch.zeros(2, 3, dtype=torch.long)
    t = torch.ones(2, 1)
    label = torch.tensor([4, 5])
    sites = torch.tensor([[2, 0], [1, 1]])
    for where, position in [(None, torch.arange(3).expand(2, 3)), (sites, sites)]:
        logits, calls = cfg_logits(net, x, t, label, Decoding(guidance=3.0, null_label=9), where)
        assert calls == 2
        by_hand = 10 * position + 9 + 3 * (label[:, None] - 9)
        assert torch.equal(logits, by_hand[..., None].float().expand_as(logits))
        logits, calls = cfg_logits(net, x, t, label, Decoding(), where)
        assert calls == 1
        by_hand = 10 * position + label[:, None]
        assert torch.equal(logits, by_hand[..., None].float().expand_as(logits))


# What is refused


@pytest.mark.parametrize("bad, name", [
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
    (dict(planner=None, denoiser_process="mask", vocab=3), "its own planner"),
])
def test_arguments_that_mean_nothing_are_refused_by_name(bad, name, rng):
    world = dense()
    x = torch.zeros(1, 3, dtype=torch.long)
    options = dict(planner=world.planner, n_steps=1, generator=rng) | bad
    with pytest.raises(ValueError, match=name):
        last(ddpd(denoiser=world.denoiser, x=x, label=no_label(1), **options))


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("sampler", [
    "ddpd", "ancestral", "confidence", "remdm", "p2", "planned", "self_correct", "rollout",
])
def test_a_misfit_of_sampler_and_method_is_refused(method, sampler):
    """The error names the sampler, the method, and samplers that fit."""
    fitting = {
        "ddpd-mask": ["ddpd", "ancestral", "confidence", "remdm", "p2"],
        "ddpd-trunk": ["planned", "ancestral", "confidence", "remdm", "p2"],
        "masked": ["ancestral", "confidence", "remdm"],
        "ddpd-uniform": ["ddpd", "ancestral"],
        "ddpd-single": ["ddpd", "ancestral"],
        "gidd": ["ancestral", "self_correct"],
        "forcing": ["rollout", "ancestral"],
    }[method]
    spec = tiny_spec(method, (3, 2, 2))
    if sampler in fitting:
        assert methods.find_sampler(spec, sampler) is spec.method.samplers[sampler]
    else:
        message = f"{sampler} does not fit a {method} run; one of {', '.join(fitting)} does"
        with pytest.raises(ValueError, match=message):
            methods.find_sampler(spec, sampler)


@pytest.mark.parametrize("name", [
    "ddpd-mask", "masked", "ddpd-uniform", "ddpd-single", "gidd", "forcing",
])
def test_networks_that_are_not_numbers_are_refused(name, rng):
    """NaN logits of any network end every sampler by name."""
    flags = dict(noise_granularity="token") if name == "forcing" else {}
    spec = tiny_spec(name, **flags)
    x = torch.zeros(2, 16).long()

    def broken(x, t, label, sites=None):
        return torch.full((*(x if sites is None else sites).shape, spec.vocab), torch.nan)

    def broken_planner(x, t, label, sites=None):
        return torch.full(x.shape, torch.nan)

    def fine_planner(x, t, label, sites=None):
        return torch.zeros(x.shape)

    for sampler in spec.method.samplers:
        for planner in (fine_planner, broken_planner):
            nets = {"denoiser": broken}
            if "planner" in spec.method.networks:
                nets["planner"] = planner
            states = methods.sample(
                spec, nets, torch.zeros(2).long(), n_steps=2, generator=rng, sampler=sampler,
                known_tokens=x,
            )
            with pytest.raises(ValueError, match="not numbers"):
                last(states)
