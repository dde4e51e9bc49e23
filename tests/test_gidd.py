"""GIDD (arXiv:2503.04482): its loss against the formula, its bound against the exact likelihood."""

import functools
import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, samples_of, script
from world import dense, marginal, tiny_spec

import methods
import model
from diffusion import likelihood, processes, samplers
from diffusion.gidd import gidd_loss, gidd_tasks, token_weights
from diffusion.processes import Noise
from support.chunked_head import sum_logits

V = 7
HYBRID = Noise("hybrid", V, 0.2)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_rows(n=80, seed=0):
    """Random logits, x0, z (clean, another token, or mask) and t of n tokens."""
    rng = seeded(seed)
    logits = torch.randn(n, V, dtype=torch.float64, generator=rng)
    x0 = torch.randint(V, (n,), generator=rng)
    z = torch.randint(V + 1, (n,), generator=rng)
    z[: n // 3] = x0[: n // 3]
    t = torch.rand(n, dtype=torch.float64, generator=rng) * 0.98 + 0.01
    return logits, x0, z, t


def loss_by_hand(logits, x0, z, t, weight, noise):
    """w [KL(q(. | x0) || q(. | p)) + IS(q(z | x0) || q(z | p))], summed over all ids of x_t."""
    n_ids = V + 1 if noise.row.starts_masked else V

    def q(probs):
        return marginal(probs[:, None], t[:, None], noise)[:, 0, :n_ids]

    truth = q(F.one_hot(x0, V).double())
    mine = q(logits.softmax(-1))
    kl = torch.special.xlogy(truth, truth / mine).sum(-1)
    r = (truth / mine).gather(1, z[:, None])[:, 0]
    return weight * (kl + r - r.log() - 1)


@pytest.mark.parametrize("process, p_uniform", [
    ("hybrid", 0.2), ("hybrid", 0.1), ("hybrid", 1e-5), ("uniform", 0.0),
])
def test_the_streaming_loss_equals_the_dense_one(process, p_uniform):
    """Value and gradient, to 1e-8 in float64 and 1e-3 in float32."""
    noise = Noise(process, V, p_uniform)
    logits, x0, z, t = random_rows()
    if not noise.row.starts_masked:
        z = z % V
    weight = token_weights(x0, z, t, noise, "elbo")
    upstream = torch.rand(len(x0), dtype=torch.float64, generator=seeded(1))
    for dtype, tolerance in [(torch.float64, 1e-8), (torch.float32, 1e-3)]:
        streamed = logits.to(dtype).requires_grad_()
        full = logits.clone().requires_grad_()
        loss = gidd_loss(streamed, x0, z, t.to(dtype), weight.to(dtype), noise)
        truth = loss_by_hand(full, x0, z, t, weight, noise)
        assert torch.allclose(loss.double(), truth, rtol=tolerance)
        grad, = torch.autograd.grad((loss * upstream.to(dtype)).sum(), streamed)
        true_grad, = torch.autograd.grad((truth * upstream).sum(), full)
        assert (grad - true_grad).abs().max() < tolerance * true_grad.abs().max()


@pytest.mark.parametrize("vocab", [V, 50_000])
def test_the_loss_is_formed_in_float32_under_autocast(vocab):
    """Loss and gradient are those without autocast, and gradient rows sum to 0 (softmax)."""
    noise = Noise("hybrid", vocab, 0.2)
    rng = seeded(2)
    n = 24
    logits = 3 * torch.randn(n, vocab, generator=rng)
    x0 = torch.randint(vocab, (n,), generator=rng)
    z = torch.where(torch.rand(n, generator=rng) < 0.5, x0, vocab)
    t = torch.rand(n, generator=rng) * 0.9 + 0.05
    weight = token_weights(x0, z, t, noise, "elbo")
    found = []
    for is_on in (False, True):
        logits_ = logits.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
            loss = gidd_loss(logits_, x0, z, t, weight, noise)
        grad, = torch.autograd.grad(loss.sum(), logits_)
        found.append((loss, grad))
        assert (grad.sum(1).abs() < 1e-4 * grad.abs().sum(1)).all()
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_weights_are_those_of_the_paper():
    _, x0, z, t = random_rows()
    is_mask = z == V
    is_clean = z == x0
    is_other = ~is_mask & ~is_clean
    elbo = token_weights(x0, z, t, HYBRID, "elbo")
    b = 2 * 0.2 / (1 - 0.2) * (t * (1 - t)).sqrt() / V
    at_clean = b / (2 * t * (1 - t) * (1 - t + b))
    assert torch.allclose(elbo[is_mask], (1 / (t * (1 - t)))[is_mask])
    assert torch.allclose(elbo[is_other], (1 / (2 * t * (1 - t)))[is_other])
    assert torch.allclose(elbo[is_clean], at_clean[is_clean])

    clip = token_weights(x0, z, t, HYBRID, "clip")
    assert torch.equal(clip, elbo.clamp_max(1))
    assert clip.max() == 1

    dynamic = token_weights(x0, z, t, HYBRID, "dynamic")
    odds = 0.5 / V * (t / (1 - t)).sqrt()
    assert (dynamic[is_mask] == 2).all()
    assert (dynamic[is_other] == 1).all()
    assert torch.allclose(dynamic[is_clean], (odds / (1 + odds))[is_clean])


def bound_of_table(table, noise, n=20_001):
    """The bound of a denoiser that reads one token by table (V + 1, V), nats.

    The expectation over x0, the noisy token and t = u^2 is summed, not sampled.
    """
    u = ((torch.arange(n) + 0.5) / n).double()
    t = u**2
    keep, mask, redraw = processes.transition_probs(t, noise)
    total = torch.zeros(n).double()
    for clean, noisy in itertools.product(range(V), range(V + 1)):
        x0 = torch.full((n,), clean)
        z = torch.full((n,), noisy)
        p_z = (mask if noisy == V else redraw / V) + keep * (noisy == clean)
        weight = token_weights(x0, z, t, noise, "elbo")
        total += p_z / V * gidd_loss(table[noisy].expand(n, V), x0, z, t, weight, noise)
    return (2 * u * total).mean().item()


def test_without_uniform_noise_it_is_masked_diffusion():
    """p_uniform 0: (1/t) CE at masks, nothing elsewhere; p_uniform 1e-6: nearly the same bound."""
    only_masks = Noise("hybrid", V, 0.0)
    logits, x0, z, t = random_rows()
    ce = F.cross_entropy(logits, x0, reduction="none")
    weight = token_weights(x0, z, t, only_masks, "elbo")
    loss = gidd_loss(logits, x0, z, t, weight, only_masks)
    assert torch.allclose(loss, torch.where(z == V, ce / t, 0.0), atol=1e-6)

    table = torch.randn(V + 1, V, generator=seeded(3)).double()
    masked = -table[V].log_softmax(0).mean().item()
    assert bound_of_table(table, only_masks) == pytest.approx(masked, rel=1e-6)
    assert bound_of_table(table, Noise("hybrid", V, 1e-6)) == pytest.approx(masked, rel=1e-5)

    x = torch.randint(V, (4000, 5), generator=seeded(3))
    nets = {"denoiser": lambda x, t, label: table[x]}

    def bits(bounds, noise):
        found = likelihood.bits_per_token(nets, bounds, x, x[:, 0], noise, seeded(3))
        (value, _), = found.values()
        return value

    of_gidd = bits(likelihood.gidd_bound, only_masks)
    assert of_gidd == pytest.approx(bits(likelihood.masked_bound, Noise("mask", V)), abs=1e-6)


@pytest.mark.parametrize("p_uniform", [0.0, 0.1, 0.2])
def test_the_bound_is_tight_for_the_exact_leave_one_out_prediction(p_uniform):
    """Within three standard errors; an x0-prediction and a random net lie above."""
    world = dense().under("hybrid", p_uniform)

    def bits(denoiser):
        rng = seeded(0)
        x0 = world.sample(60_000, rng)
        nets = {"denoiser": denoiser}
        args = (likelihood.gidd_bound, x0, x0[:, 0], world.noise, rng)
        return likelihood.bits_per_token(nets, *args)["gidd"]

    exact, error = bits(world.denoiser)
    assert exact == pytest.approx(world.entropy(), abs=3 * error)
    assert error < 0.03

    table = torch.randn(4, 3, generator=seeded(1))
    worse, error = bits(lambda x, t, label: table[x])
    assert worse > world.entropy() + 3 * error
    if p_uniform:                       # else both predictions are the same at masks
        worse, error = bits(lambda *args: world.x0_denoiser(*args).clamp_min(-40))
        assert worse > world.entropy() + 3 * error


def test_thinned_clean_tokens_are_unbiased(rng):
    """A tenth of the clean tokens at ten times the weight: the same loss; all noise enters."""
    x0 = torch.randint(V, (3000, 16), generator=rng)
    t = processes.stratified_t(3000, rng)
    table = torch.randn(V + 1, V, generator=rng)
    means = []
    for rate in (1.0, 0.1):
        options = dict(weight="dynamic", clean_token_rate=rate)
        task = gidd_tasks(x0, t, x0[:, 0], HYBRID, seeded(1), **options)["denoiser"]
        z, t_site, _ = task.loss_args
        assert torch.equal(z, task.xt.flatten()[task.sites])
        assert torch.equal(task.target, x0.flatten()[task.sites])
        assert torch.equal(t_site, t.expand(x0.shape).flatten()[task.sites])
        assert task.n_loss_tokens == x0.numel()
        noisy = (task.xt != x0).flatten().nonzero()[:, 0]
        assert torch.isin(noisy, task.sites).all()
        is_clean = z == task.target
        assert is_clean.sum().item() == pytest.approx(rate * (x0.numel() - len(noisy)), rel=0.05)
        loss = task.loss(table[z], task.target, *task.loss_args)
        means.append(loss[is_clean].sum().item() / task.n_loss_tokens)
    assert means[1] == pytest.approx(means[0], rel=0.05)


def test_the_sum_of_chunks_is_the_plain_sum(rng):
    """sum_logits: value and gradients of hidden and head, its logits never whole."""
    shape = model.Shape((4, 4), V, 0, 1, 1, 16, 16)
    net = model.Transformer(shape, "denoiser", t_conditioned=True)
    torch.nn.init.normal_(net.head.weight, std=0.3, generator=rng)
    _, x0, z, t = random_rows(50)
    hidden = torch.randn(50, 16, generator=rng, requires_grad=True)
    weight = token_weights(x0, z, t, HYBRID, "dynamic").float()
    loss = functools.partial(gidd_loss, noise=HYBRID)

    def value_and_grads(chunk):
        total = 0.3 * sum_logits(net, hidden, loss, x0, z, t.float(), weight, chunk=chunk)
        return total, *torch.autograd.grad(total, [hidden, net.head.weight])

    for whole, chunked in zip(value_and_grads(1000), value_and_grads(7), strict=True):
        assert torch.allclose(whole, chunked, rtol=1e-4, atol=1e-6)


# Self-correction


def oracle_of_points(points):
    """Says of every token, from all others, what the one point that fits best has there."""
    one_hot = F.one_hot(points, V).float()

    def net(x, t, label, sites=None):
        is_hit = (x[:, None] == points).float()                         # (B, S, N)
        n_others = is_hit.sum(-1, keepdim=True) - is_hit
        weight = (4 * n_others).softmax(1)
        return torch.log_softmax(20 * torch.einsum("bsn,snv->bnv", weight, one_hot), -1)

    return net


def test_self_correction_mends_one_flipped_token(rng):
    """Where sequences differ in every token, k = 1: it writes the flipped token and no other."""
    points = torch.stack([(torch.arange(6) + i) % V for i in range(4)])
    x = points.repeat_interleave(6, 0)
    row = torch.arange(24)
    flipped = x.clone()
    flipped[row, row % 6] = (x[row, row % 6] + 4) % V
    net = oracle_of_points(points)

    def correct(start, **options):
        label = torch.zeros(24).long()
        return list(samplers.self_correct(net, start, label, n_steps=30, generator=rng, **options))

    states = correct(flipped, k=1)
    assert torch.equal(states[-1].x, x)
    assert sum(state.written for state in states).sum() == 24
    assert len(states) < 30
    assert (states[0].p_noise.argmax(1) == row % 6).all()

    states = correct(x, k=1)                                            # nothing to mend
    assert len(states) == 1
    assert torch.equal(states[0].x, x)
    assert not states[0].written.any()

    known = flipped != x
    states = correct(flipped, known=known)
    assert torch.equal(states[-1].x[known], flipped[known])


def test_self_correction_needs_finished_tokens(rng):
    spec = tiny_spec("gidd")
    with pytest.raises(ValueError, match="self_correct starts from finished tokens"):
        methods.sample(
            spec, methods.build(spec), torch.zeros(2).long(), n_steps=1, generator=rng,
            sampler="self_correct",
        )


def test_self_correction_stops_without_progress(rng):
    """A denoiser that always wants another token is given up after `patience` steps without
    progress, row by row; the step that gives up writes nothing (as in the released code)."""

    def restless(x, t, label, sites=None):
        wanted = torch.where(label[:, None] == 0, (x + 1) % V, x)
        return 50.0 * F.one_hot(wanted, V)

    x = torch.zeros(4, 5).long()
    label = torch.tensor([0, 1, 0, 1])
    states = list(samplers.self_correct(restless, x, label, n_steps=99, generator=rng, patience=6))
    assert len(states) == 8                             # the first of them made progress
    assert states[-1].nfe.tolist() == [8, 1, 8, 1]
    assert len(states[-1].x) == 4
    assert states[5].written[[0, 2]].sum(1).tolist() == [1, 1]
    assert not states[-1].written.any()


def test_self_accuracy_is_that_of_the_corrected_sequence(rng):
    """A row is given up when no corrected sequence of the last steps was a better one, as in the
    released code, whatever the sequences before their corrections were."""

    def denoiser(x, t, label, sites=None):              # id 0 is a little likelier than 1
        return torch.tensor([0.02, 0.0] + [-50.0] * (V - 2)).expand(*x.shape, V)

    x = torch.zeros(300, 6).long()
    label = torch.zeros(300).long()
    states = list(samplers.self_correct(denoiser, x, label, n_steps=99, generator=rng, patience=4))
    n_given_up = 0                                      # others end when no draw differs
    for row in range(300):
        best, steps_since = 0, 0
        for state in states[:states[-1].nfe[row] - 1]:  # what the last step drew is not written
            accuracy = (state.x[row] == 0).sum().item()
            steps_since = 0 if accuracy > best else steps_since + 1
            best = max(best, accuracy)
        assert steps_since <= 4
        n_given_up += steps_since == 4
    assert n_given_up > 200


# Whole runs


def succeed(*args):
    """Run a script to success.  -> its output"""
    done = script(*args)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("p_uniform", ["0.2", "0.0"])
def test_a_run_from_training_to_samples(p_uniform):
    """--method gidd: one network, losses and bits logged, sampled by ancestral."""
    out = f"out/gidd{p_uniform}"
    flags = ["--method", "gidd", "--p-uniform", p_uniform, "--max-iters", 3, "--out-dir", out]
    succeed("train_ddpd.py", *TINY, *flags)
    log = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    assert "val_bits_gidd" in log[-1]
    assert "planner_loss" not in log[1]

    printed = succeed("sample.py", out, "--n-steps", 3, "--labels", 1, 2)
    assert "3.0 NFE each" in printed
    if p_uniform == "0.2":
        correct = ["--correct", 3, "--k", 2]
        printed = succeed("sample.py", out, "--n-steps", 2, "--labels", 1, 2, *correct)
        assert "self-correction changed" in printed
        assert (samples_of(out) / "correct.gif").exists()

    refused = script("sample.py", out, "--sampler", "ddpd")
    assert refused.returncode != 0
    assert "does not fit a gidd run" in refused.stderr
    refused = script("sample.py", out, "--sampler", "self_correct")
    assert refused.stderr.startswith("self_correct corrects what another sampler made")
