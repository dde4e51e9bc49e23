"""Forward processes: frequencies, losses known in advance, and noise that depends on x0."""

import math
import typing

import pytest
import torch
import torch.nn.functional as F
from world import Oracle, tiny_spec

import config
import methods
from diffusion import gidd, objectives, processes, samplers
from diffusion.processes import PROCESSES, Noise, corrupt, transition_probs
from support import diagnostics
from support.chunked_head import task_loss


def uniform_by_hand(t):
    return 1 - t, 0, t


def mask_by_hand(t):
    return 1 - t, t, 0


def hybrid_by_hand(t):
    """At p_uniform 0.2, where 2 p_uniform / (1 - p_uniform) = 0.5."""
    redraw = 0.5 * math.sqrt(t * (1 - t))
    total = 1 + redraw
    return (1 - t) / total, t / total, redraw / total


def assert_frequency(event, p):
    """The mean of independent events is p, within four standard errors."""
    error = math.sqrt(p * (1 - p) / event.numel())
    assert event.float().mean().item() == pytest.approx(p, abs=4 * error + 1e-9)


@pytest.mark.parametrize("process, by_hand", [
    ("uniform", uniform_by_hand), ("mask", mask_by_hand), ("hybrid", hybrid_by_hand),
])
@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_tokens_are_kept_masked_and_redrawn_as_often_as_the_formula_says(process, by_hand, t, rng):
    """transition_probs is the formula, sums to 1, and gives the frequencies of corrupt()."""
    n, vocab = 400_000, 7
    noise = Noise(process, vocab, 0.2)
    keep, mask, redraw = by_hand(t)
    probs = [p.item() for p in transition_probs(torch.tensor(t, dtype=torch.float64), noise)]
    assert probs == pytest.approx((keep, mask, redraw))
    assert sum(probs) == pytest.approx(1)

    x0 = torch.full((1, n), 3)
    xt, is_noise = corrupt(x0, torch.tensor([[t]]), noise, rng)
    assert_frequency(is_noise, 1 - keep)
    assert_frequency(xt == vocab, mask)
    assert_frequency((xt == 3) & is_noise, redraw / vocab)
    assert_frequency(xt == 3, keep + redraw / vocab)
    assert_frequency(xt == 6, redraw / vocab)
    assert is_noise[xt != x0].all()


def test_each_token_is_corrupted_at_its_own_level(rng):
    """t (B, N) is a level for each token."""
    x0 = torch.zeros(200_000, 3, dtype=torch.long)
    t = torch.tensor([0.0, 0.3, 1.0]).expand(len(x0), 3)
    _, is_noise = corrupt(x0, t, Noise("uniform", 5), rng)
    assert is_noise.float().mean(0).tolist() == pytest.approx([0, 0.3, 1], abs=0.005)


def test_stratified_levels_cover_the_range(rng):
    """One level in every nth of [0, 1], in random order."""
    t = processes.stratified_t(1000, rng)
    assert torch.equal((t[:, 0] * 1000).long().sort().values, torch.arange(1000))
    assert t.min() >= 1e-4
    assert not torch.equal(t.sort(0).values, t)


def test_unknown_processes_are_refused_by_name():
    with pytest.raises(ValueError, match="'blur' is not one of mask, uniform, hybrid"):
        Noise("blur", 7)


def test_config_offers_every_process():
    """Choices of the flags are rows of PROCESSES, and every row is a choice of `process`."""
    types = typing.get_type_hints(config.Config)
    assert set(typing.get_args(types["process"])) == set(PROCESSES)
    assert set(typing.get_args(types["denoiser_process"])) <= set(PROCESSES)


# Losses that are known in advance


def test_planner_bce_floor():
    """What the best planner that knows x0 still pays, against a Monte Carlo of corrupt()."""
    assert processes.planner_bce_floor(17) == pytest.approx(0.089, abs=5e-4)
    t = torch.rand(2_000_000, 1).clamp(1e-6, 1 - 1e-6)
    x0 = torch.zeros(2_000_000, 1, dtype=torch.long)
    xt, is_noise = corrupt(x0, t, Noise("uniform", 17), None)
    p_noise = torch.where(xt == x0, t / 17 / (1 - t + t / 17), 1.0)
    bce = F.binary_cross_entropy(p_noise, is_noise.float()).item()
    assert processes.planner_bce_floor(17) == pytest.approx(bce, abs=1e-3)
    entropy_of_level = -(t * t.log() + (1 - t) * (1 - t).log()).mean().item()
    assert processes.PLANNER_BCE_LEVEL_ONLY == pytest.approx(entropy_of_level, abs=1e-3)
    half = torch.full_like(p_noise, 0.5)
    bce_of_half = F.binary_cross_entropy(half, is_noise.float()).item()
    assert processes.PLANNER_BCE_CONSTANT == pytest.approx(bce_of_half, abs=1e-6)


def p_target_by_hand(question, x, d, target, sequences, levels, vocab):
    """Bayes' rule in loops: the probability of the right answer about token d of x (N,).

    question   "is noise?", or what the token is: "x0", "leave-one-out" or "behind the mask"
    """
    total = right = 0.0
    for x0 in sequences:
        for t in levels:
            p_hit = 1 - t + t / vocab
            p_miss = t / vocab
            evidence = [e for e in range(len(x0)) if e != d or question in ("x0", "is noise?")]
            if question == "behind the mask":
                weight = float(all(x[e] in (vocab, x0[e]) for e in evidence))
            else:
                weight = math.prod(p_hit if x[e] == x0[e] else p_miss for e in evidence)
            if question == "is noise?":
                p_noise = p_miss / p_hit if x[d] == x0[d] else 1.0
                p_right = p_noise if target else 1 - p_noise
            else:
                p_right = x0[d] == target
            right += weight * p_right
            total += weight
    return right / total


def bayes_losses_by_hand(spec, x0, label, generator, n_rows):
    """The same draws of noise as diagnostics.bayes_losses, each answered in loops."""
    row = torch.arange(n_rows) % len(x0)
    t = processes.stratified_t(n_rows, generator)
    tasks = methods.make_tasks(spec, x0[row], label[row], None, generator, t)
    all_levels = (torch.arange(256, dtype=torch.float64) + 0.5) / 256
    of_denoiser = {
        "ddpd-mask": "behind the mask", "ddpd-uniform": "leave-one-out", "ddpd-single": "x0",
    }[spec.name]
    mean_losses = {}
    for name, task in tasks.items():
        losses = []
        for site, target in zip(task.sites.tolist(), task.target.tolist(), strict=True):
            r, d = divmod(site, x0.shape[1])
            sequences = x0[label == label[row[r]]]
            is_planner = name == "planner"
            question = "is noise?" if is_planner else of_denoiser
            levels = all_levels if is_planner else t[r].double()
            p = p_target_by_hand(question, task.xt[r], d, target, sequences, levels, spec.vocab)
            losses.append(-math.log(p))
        mean_losses[name] = sum(losses) / len(losses)
    return mean_losses


@pytest.mark.parametrize("method", ["ddpd-mask", "ddpd-uniform", "ddpd-single"])
def test_bayes_losses_of_sequences_known_by_heart(method):
    """Bayes' rule over all sequences with the label, and over levels for the planner."""
    x0 = torch.randint(3, (5, 3), generator=torch.Generator().manual_seed(1))
    label = torch.tensor([0, 0, 0, 1, 1])
    spec = tiny_spec(method, (1, 3), vocab=3)

    def seeded():
        return torch.Generator().manual_seed(2)

    losses = diagnostics.bayes_losses(spec, x0, label, seeded(), n_rows=12)
    assert losses == pytest.approx(bayes_losses_by_hand(spec, x0, label, seeded(), 12), abs=1e-6)


def test_the_bayes_loss_of_one_long_sequence_is_the_planners_floor(rng):
    """Its level can be read off it, and only tokens redrawn as themselves are left in doubt."""
    spec = tiny_spec("ddpd-mask", (20, 20), vocab=17)
    x0 = torch.zeros(1, 400).long()
    losses = diagnostics.bayes_losses(spec, x0, torch.zeros(1).long(), rng)
    assert losses["denoiser"] == pytest.approx(0, abs=1e-6)
    assert losses["planner"] == pytest.approx(processes.planner_bce_floor(17), rel=0.02)


# A new process: a row of PROCESSES, with noise that depends on x0

V = 7


def fall_to_neighbour(x0, t, vocab, generator):
    """Noise at level t is a neighbour of x0 with probability 1 - t, else uniform."""
    step = 2 * torch.randint(2, x0.shape, generator=generator) - 1
    uniform = torch.randint(vocab, x0.shape, generator=generator)
    is_near = torch.rand(x0.shape, generator=generator) < 1 - t
    return torch.where(is_near, (x0 + step) % vocab, uniform)


@pytest.fixture
def neighbour(monkeypatch):
    row = processes.Process(processes.uniform_weights, redraw=fall_to_neighbour)
    monkeypatch.setitem(PROCESSES, "neighbour", row)
    return Noise("neighbour", V)


def assert_neighbour_frequencies(xt, x0, t):
    """Frequencies of x0 itself, of either neighbour and of the others, at one level t."""
    away = (xt - x0) % V
    p_other = t * t / V
    p_neighbour = t * (1 - t) / 2 + p_other
    assert_frequency(away == 0, 1 - t + p_other)
    assert_frequency(away == 1, p_neighbour)
    assert_frequency(away == V - 1, p_neighbour)
    assert_frequency(away == 3, p_other)
    assert xt.max() < V


@pytest.mark.parametrize("t", [0.0, 0.2, 0.7, 1.0])
def test_noise_may_depend_on_x0(neighbour, t, rng):
    """corrupt() draws noise from the redraw function of the process."""
    x0 = torch.randint(V, (400_000, 2), generator=rng)
    xt, is_noise = corrupt(x0, torch.full((len(x0), 1), t), neighbour, rng)
    assert_frequency(is_noise, t)
    assert_neighbour_frequencies(xt, x0, t)
    assert is_noise[xt != x0].all()


def test_planner_and_denoiser_see_the_noise_of_the_new_process(neighbour, rng):
    """Neither of them sees uniform noise instead; they learn where noise is and what was there."""
    t = 0.4
    x0 = torch.randint(V, (100_000, 4), generator=rng)
    label = torch.zeros(len(x0)).long()
    tasks = objectives.pair_tasks(x0, torch.full((len(x0), 1), t), label, neighbour, rng)
    for task in tasks.values():
        assert_neighbour_frequencies(task.xt, x0, t)
    planner, denoiser = tasks["planner"], tasks["denoiser"]
    assert_frequency(planner.target, t)
    assert planner.target[(planner.xt != x0).flatten()].all()
    is_site = torch.zeros(x0.numel(), dtype=torch.bool).index_fill(0, denoiser.sites, True)
    assert_frequency(is_site, t)
    assert is_site[(denoiser.xt != x0).flatten()].all()
    assert torch.equal(denoiser.target, x0.flatten()[denoiser.sites])


def test_networks_learn_under_the_new_process(neighbour, rng):
    """The whole way from a Spec: both losses fall well below where they start, ln 2 and ln V."""
    torch.manual_seed(0)
    spec = tiny_spec("ddpd-uniform", (1, 8), V, denoiser_process="neighbour")
    assert (spec.noise.process, spec.noise.vocab) == ("neighbour", V)
    nets = methods.build(spec)
    params = [p for net in nets.values() for p in net.parameters()]
    optimizer = torch.optim.Adam(params, lr=1e-2)
    x0 = torch.arange(8).expand(64, 8) % V
    label = torch.zeros(64).long()
    history = []
    for _ in range(40):
        tasks = methods.make_tasks(spec, x0, label, None, rng)
        losses = {name: task_loss(nets[name], task) for name, task in tasks.items()}
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    assert history[0] == pytest.approx(dict(planner=math.log(2), denoiser=math.log(V)), abs=1e-5)
    assert history[-1]["planner"] < 0.75 * history[0]["planner"]
    assert history[-1]["denoiser"] < 0.25 * history[0]["denoiser"]
    bits = methods.bits_per_token(spec, nets, x0, label, None, rng)
    assert bits == {}                               # no closed form, no bound


@pytest.mark.parametrize("schedule", ["one", "fixed", "spread", "leap"])
def test_oracles_sample_under_the_new_process(neighbour, schedule, rng):
    """samplers.ddpd takes the new process by name; oracles reach x0."""
    x0 = torch.randint(V, (6, 12), generator=rng)
    label = torch.arange(6)
    x = neighbour.sample_prior(x0.shape, rng)
    assert x.max() < V
    oracle = Oracle(x0, V)
    states = samplers.ddpd(oracle.planner, oracle.denoiser, x, label, n_steps=12, generator=rng,
                           schedule=schedule, denoiser_process="neighbour", vocab=V)
    assert torch.equal(samplers.last(states).x, x0)

    spec = tiny_spec("ddpd-uniform", (3, 4), V, denoiser_process="neighbour")
    nets = dict(planner=oracle.planner, denoiser=oracle.denoiser)
    states = methods.sample(spec, nets, label, n_steps=12, generator=rng, schedule=schedule)
    assert torch.equal(samplers.last(states).x, x0)


def closed_forms():
    """All that needs the closed form of a posterior.  -> {name: function (noise, rng)}"""
    x = torch.zeros(2, 3).long()
    t, s = torch.full((2, 1), 0.8), torch.full((2, 1), 0.4)
    p_at_x = torch.full((2, 3), 0.5)
    probs = torch.full((2, 3, V), 1 / V)
    rows, level, weight = x[:, 0], t[:, 0], torch.ones(2)

    def flat(x, t, label, sites=None):
        return torch.zeros(*x.shape, V)

    def sample(sampler, noise, rng, *args, **options):
        label = torch.zeros(2).long()
        options |= dict(process=noise.process, vocab=V, generator=rng)
        return samplers.last(sampler(flat, x, label, *args, **options))

    return {
        "posterior_noise_prob":
            lambda noise, rng: processes.posterior_noise_prob(p_at_x, x, t, noise),
        "posterior_keep_prob":
            lambda noise, rng: processes.posterior_keep_prob(p_at_x, x, t, s, noise),
        "sample_posterior":
            lambda noise, rng: processes.sample_posterior(x, p_at_x, x, t, s, noise, rng),
        "to_leave_one_out":
            lambda noise, rng: processes.to_leave_one_out(probs, x, t, noise),
        "split_planner_denoiser":
            lambda noise, rng: processes.split_planner_denoiser(probs, x, t, noise),
        "token_weights":
            lambda noise, rng: gidd.token_weights(rows, rows, level, noise, "elbo"),
        "gidd_loss":
            lambda noise, rng: gidd.gidd_loss(probs[:, 0], rows, rows, level, weight, noise),
        "ancestral":
            lambda noise, rng: sample(samplers.ancestral, noise, rng, n_steps=2),
        "rollout":
            lambda noise, rng: sample(samplers.rollout, noise, rng, torch.tensor([[1.0], [0.0]])),
    }


@pytest.mark.parametrize("name", closed_forms())
def test_closed_forms_refuse_the_new_process_by_name(neighbour, name, rng):
    closed_form = closed_forms()[name]
    closed_form(Noise("uniform", V), rng)           # fine where redrawn tokens are uniform
    with pytest.raises(ValueError, match=r"process neighbour .* no closed-form posterior"):
        closed_form(neighbour, rng)


def test_one_network_as_both_refuses_the_new_process(neighbour):
    """Its planner is derived from the closed form; the Spec is refused before any training."""
    with pytest.raises(ValueError, match=r"process neighbour .* no closed-form posterior"):
        tiny_spec("ddpd-single", denoiser_process="neighbour")
