"""GIDD (arXiv:2503.04482): its loss against the formula written out, its bound against the exact likelihood."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import TINY, script
from test_likelihood import entropy
from world import dense

import model
from diffusion import objectives, processes, samplers
from diffusion.objectives import gidd_loss, gidd_weight

V = 7


def rows(n=80, seed=0):
    """Random logits and tokens in all three states: clean, another token, mask."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, V, dtype=torch.float64, generator=rng)
    x0, z = (torch.randint(V + i, (n,), generator=rng) for i in (0, 1))
    z[: n // 3] = x0[: n // 3]
    return logits, x0, z, torch.rand(n, dtype=torch.float64, generator=rng) * 0.98 + 0.01


def written_out(logits, x0, z, t, weight, p_uniform):
    """w [KL(q(.|x0) || q(.|p)) + IS(q(z|x0) || q(z|p))] over all V + 1 ids."""
    q = lambda p: processes.marginal(p[:, None], t[:, None], "hybrid", p_uniform)[:, 0]  # noqa: E731
    truth, mine = q(torch.nn.functional.one_hot(x0, V).double()), q(logits.softmax(-1))
    kl = torch.special.xlogy(truth, truth / mine).sum(-1)
    r = (truth / mine).gather(1, z[:, None])[:, 0]
    return weight * (kl + r - r.log() - 1)


@pytest.mark.parametrize("p_uniform", [0.2, 0.1, 1e-5])
def test_streaming_equals_dense(p_uniform):
    """Value and gradient, to 1e-8 in float64 and 1e-3 in float32."""
    logits, x0, z, t = rows()
    weight = gidd_weight(x0, z, t, V, p_uniform, "elbo")
    for dtype, tolerance in [(torch.float64, 1e-8), (torch.float32, 1e-3)]:
        mine, full = (logits.to(kind).requires_grad_() for kind in (dtype, torch.float64))
        args = [x0, z, t.to(dtype), weight.to(dtype)]
        loss, truth = gidd_loss(mine, *args, p_uniform), written_out(full, x0, z, t, weight, p_uniform)
        assert torch.allclose(loss.double(), truth, rtol=tolerance)
        upstream = torch.rand(len(x0), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        got = torch.autograd.grad((loss * upstream.to(dtype)).sum(), mine)[0]
        want = torch.autograd.grad((truth * upstream).sum(), full)[0]
        assert (got - want).abs().max() < tolerance * want.abs().max()


def test_weights_are_those_of_the_paper():
    _, x0, z, t = rows()
    b = lambda p: 2 * p / (1 - p) * (t * (1 - t)).sqrt() / V  # noqa: E731
    weight = gidd_weight(x0, z, t, V, 0.2, "elbo")
    is_mask, is_clean = z == V, z == x0
    assert torch.allclose(weight[is_mask], (1 / (t * (1 - t)))[is_mask])
    assert torch.allclose(weight[~is_mask & ~is_clean], (1 / (2 * t * (1 - t)))[~is_mask & ~is_clean])
    clean = b(0.2) / (2 * t * (1 - t) * (1 - t + b(0.2)))
    assert torch.allclose(weight[is_clean], clean[is_clean])
    clipped = gidd_weight(x0, z, t, V, 0.2, "clip")
    assert torch.equal(clipped, weight.clamp_max(1)) and clipped.max() == 1
    dynamic = gidd_weight(x0, z, t, V, 0.2, "dynamic")
    r = 0.5 / V * (t / (1 - t)).sqrt()
    assert (dynamic[is_mask] == 2).all() and (dynamic[~is_mask & ~is_clean] == 1).all()
    assert torch.allclose(dynamic[is_clean], (r / (1 + r))[is_clean])


def expected(table, p_uniform, n=20_001):
    """The bound of a denoiser that reads one token by table (V + 1, V), nats: sums over tokens and fates, t = u^2."""
    u = ((torch.arange(n) + 0.5) / n).double()
    t, total = u**2, torch.zeros(n).double()
    keep, mask, uniform = processes.fates(t, "hybrid", p_uniform)
    for x, z in itertools.product(range(V), range(V + 1)):
        x0, at = torch.full((n,), x), torch.full((n,), z)
        chance = (mask if z == V else uniform / V) + keep * (z == x)
        weight = gidd_weight(x0, at, t, V, p_uniform, "elbo")
        total += chance / V * gidd_loss(table[z].expand(n, V), x0, at, t, weight, p_uniform)
    return (2 * u * total).mean().item()


def test_without_uniform_noise_it_is_masked_diffusion():
    """p_uniform 0: (1/t) CE at masks to 1e-6, nothing elsewhere; p_uniform 1e-6: the same bound to 1e-5."""
    logits, x0, z, t = rows()
    ce = torch.nn.functional.cross_entropy(logits, x0, reduction="none")
    want = torch.where(z == V, ce / t, 0.0)
    weight = gidd_weight(x0, z, t, V, 0.0, "elbo")
    assert torch.allclose(gidd_loss(logits, x0, z, t, weight, 0.0), want, atol=1e-6)
    rng = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    table = torch.randn(V + 1, V, generator=rng()).double()
    masked = -table[V].log_softmax(0).mean().item()
    assert expected(table, 0.0) == pytest.approx(masked, rel=1e-6)
    assert expected(table, 1e-6) == pytest.approx(masked, rel=1e-5)
    x = torch.randint(V, (4000, 5), generator=rng())
    net = {"denoiser": lambda x, t, label, sites=None: table[x]}
    bits = objectives.bits_per_token(net, "gidd", x, x[:, 0], V, rng(), 0.0)["gidd"][0]
    assert bits == pytest.approx(objectives.bits_per_token(net, "maskd", x, x[:, 0], V, rng())["masked"][0], abs=1e-6)


@pytest.mark.parametrize("p_uniform", [0.0, 0.1, 0.2])
def test_the_bound_is_tight_for_the_exact_others_prediction(p_uniform):
    """Equal to the exact likelihood within three standard errors; a self-prediction and a random net lie above."""
    world, n = dense().under("hybrid", p_uniform), 60_000

    def bits(net):
        rng = torch.Generator().manual_seed(0)
        x0 = world.points[torch.multinomial(world.q, n, replacement=True, generator=rng)]
        return objectives.bits_per_token({"denoiser": net}, "gidd", x0, x0[:, 0], 3, rng, p_uniform)["gidd"]

    exact, error = bits(world.denoiser)
    assert exact == pytest.approx(entropy(world), abs=3 * error) and error < 0.03
    table = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    worse = [lambda x, t, label, sites=None: table[x]]
    worse += [lambda *a: world.self_denoiser(*a).clamp_min(-40)] if p_uniform else []
    for net in worse:
        other, error = bits(net)
        assert other > entropy(world) + 3 * error


def test_thinned_clean_tokens_are_unbiased(rng):
    """A tenth of the clean tokens at ten times the weight: the same loss on average; masks and noise always enter."""
    x0, t = torch.randint(V, (3000, 16), generator=rng), processes.stratified_t(3000, rng)
    table = torch.randn(V + 1, V, generator=rng)
    means = []
    for share in (1.0, 0.1):
        task = objectives.gidd(x0, t, x0[:, 0], V, torch.Generator().manual_seed(1), 0.2, "dynamic", share)["denoiser"]
        z, at, weight = task.more
        assert torch.equal(z, task.xt.flatten()[task.sites]) and torch.equal(task.target, x0.flatten()[task.sites])
        assert torch.equal(at, t.expand(x0.shape).flatten()[task.sites]) and task.n == x0.numel()
        noisy = (task.xt != x0).flatten().nonzero()[:, 0]
        assert torch.isin(noisy, task.sites).all()
        n_clean = (z == task.target).sum().item()
        assert n_clean == pytest.approx(share * (x0.numel() - len(noisy)), rel=0.05)
        clean = z == task.target
        means.append((gidd_loss(table[z], task.target, z, at, weight, 0.2)[clean]).sum().item() / task.n)
    assert means[1] == pytest.approx(means[0], rel=0.05)


def test_the_sum_of_chunks_is_the_plain_sum(rng):
    """sum_logits: value and gradients of hidden and head, its logits never whole."""
    net = model.Transformer(model.Shape((4, 4), V, 0, 1, 1, 16, 16), "denoiser", is_told_t=True)
    torch.nn.init.normal_(net.readout.weight, std=0.3, generator=rng)
    _, x0, z, t = rows(50)
    hidden = torch.randn(50, 16, generator=rng, requires_grad=True)
    more = [x0, z, t.float(), gidd_weight(x0, z, t, V, 0.2, "dynamic").float()]
    fn = lambda *a: gidd_loss(*a, 0.2)  # noqa: E731
    grads = []
    for chunk in (1000, 7):
        total = 0.3 * model.sum_logits(net, hidden, fn, *more, chunk=chunk)
        grads.append([total, *torch.autograd.grad(total, [hidden, net.readout.weight])])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


# Self-correction


def truth_denoiser(points):
    """Says of every place, from all others, what the one point that fits best has there."""

    def net(x, t, label, sites=None):
        hits = (x[:, None] == points).float()  # (B, S, N)
        others = hits.sum(-1, keepdim=True) - hits
        return torch.log_softmax(20 * torch.einsum("bsn,snv->bnv", (4 * others).softmax(1), hot), -1)

    hot = torch.nn.functional.one_hot(points, V).float()
    return net


def test_self_correction_mends_one_flipped_token(rng):
    """On a world whose points differ everywhere, K = 1: the flipped token is written and nothing else is."""
    points = torch.stack([(torch.arange(6) + i) % V for i in range(4)])
    x = points.repeat_interleave(6, 0)
    flipped = x.clone()
    for i in range(24):
        flipped[i, i % 6] = (x[i, i % 6] + 4) % V
    label = torch.zeros(24).long()
    net = truth_denoiser(points)
    states = list(samplers.self_correct(net, flipped, label, n_steps=30, generator=rng, k=1))
    assert torch.equal(states[-1].x, x) and sum(s.written for s in states).sum() == 24
    assert len(states) < 30 and (states[0].p_noise.argmax(1) == torch.arange(24) % 6).all()
    clean = list(samplers.self_correct(net, x, label, n_steps=30, generator=rng, k=1))
    assert torch.equal(clean[-1].x, x) and not any(s.written.any() for s in clean) and len(clean) == 1
    known = flipped != x
    kept = samplers.last(samplers.self_correct(net, flipped, label, n_steps=30, generator=rng, known=known))
    assert torch.equal(kept.x[known], flipped[known])


def test_self_correction_stops_without_progress(rng):
    """A denoiser that always wants something else: given up after `patience` steps, rows by themselves."""

    def restless(x, t, label, sites=None):
        wants = torch.where(label[:, None] == 0, (x + 1) % V, x)
        return 50.0 * torch.nn.functional.one_hot(wants, V)

    x, label = torch.zeros(4, 5).long(), torch.tensor([0, 1, 0, 1])
    states = list(samplers.self_correct(restless, x, label, n_steps=99, generator=rng, patience=6))
    assert len(states) == 7 and states[-1].nfe.tolist() == [7, 1, 7, 1] and len(states[-1].x) == 4


@pytest.mark.parametrize("p_uniform", ["0.2", "0.0"])
def test_a_run_from_training_to_samples(p_uniform):
    """--method gidd: one network, losses and bits logged, sampled by ancestral."""
    out = f"out/gidd{p_uniform}"
    done = script(
        "train_ddpd.py", *TINY, "--method", "gidd", "--p-uniform", p_uniform, "--max-iters", 3, "--out-dir", out
    )
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    assert "val_bits_gidd" in log[-1] and "planner_loss" not in log[1]
    done = script("sample.py", out, "--n-steps", 3, "--labels", 1, 2)
    assert done.returncode == 0, done.stderr
    assert "3.0 NFE each" in done.stdout
    if p_uniform == "0.2":
        done = script("sample.py", out, "--n-steps", 2, "--labels", 1, 2, "--correct", 3, "--k", 2)
        assert done.returncode == 0, done.stderr
        assert "self-correction changed" in done.stdout and Path(out, "correct.gif").exists()
    refused = script("sample.py", out, "--sampler", "ddpd")
    assert refused.returncode != 0 and "does not fit a gidd run" in refused.stderr
