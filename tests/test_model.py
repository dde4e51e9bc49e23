"""The network: its forms, positions, attention and muP; its chunked head; what its losses are."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from world import tiny_spec

import methods
from diffusion import objectives
from diffusion.processes import Noise
from model import (
    EMBED_STD,
    Shape,
    Transformer,
    attend,
    level_features,
    norm,
    param_groups,
    rope_angles,
    rotate,
)
from support import chunked_head
from support.chunked_head import hidden_at_sites, map_logits, task_loss

SHAPE = Shape(grid=(4, 6), vocab=11, n_classes=3, n_layer=2, n_head=2, n_embd=32, base_width=32)


def wake(net, seed=0):
    """The network as after training: its zero-initialised matrices moved."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        if not p.any():
            p.data.normal_(std=0.1, generator=generator)
    return net


def random_batch(rng, n=5):
    x = torch.randint(SHAPE.vocab, (n, SHAPE.n_tokens), generator=rng)
    t = torch.rand(n, 1, generator=rng)
    label = torch.randint(SHAPE.n_classes + 1, (n,), generator=rng)
    return x, t, label


# Losses


@pytest.mark.parametrize("method", ["ddpd-mask", "ddpd-uniform", "ddpd-single"])
def test_losses_at_initialisation(method, rng):
    """The planner starts at ln 2, the denoiser at ln V: heads start at zero."""
    x0, t, label = random_batch(rng)
    spec = tiny_spec(method, SHAPE.grid, SHAPE.vocab)
    tasks = methods.make_tasks(spec, x0, label, None, rng, t)
    nets = methods.build(spec)
    assert nets.keys() == tasks.keys()
    start = {"planner": math.log(2), "denoiser": math.log(SHAPE.vocab)}
    for name, task in tasks.items():
        hidden = hidden_at_sites(nets[name], task)
        loss = map_logits(nets[name], hidden, task.loss, task.target, *task.loss_args).mean()
        assert loss.item() == pytest.approx(start[name], abs=1e-5)
        assert task_loss(nets[name], task).item() == pytest.approx(start[name], abs=1e-5)


@pytest.mark.parametrize("in_chunks", [False, True])
@pytest.mark.parametrize("method", methods.METHODS)
def test_task_loss_is_the_mean_over_the_sites(method, in_chunks, monkeypatch, rng):
    """The mean of task.loss of the whole network's logits at task.sites, in value and gradient."""
    if in_chunks:
        monkeypatch.setattr(chunked_head, "LOGITS_PER_CHUNK", 20)
    grid, vocab = ((3, 2, 2), 7) if method == "forcing" else ((3, 4), 7)
    spec = tiny_spec(method, grid, vocab, clean_token_rate=0.5)
    x0 = torch.randint(vocab, (6, 12), generator=rng)
    label = torch.randint(4, (6,), generator=rng)
    tasks = methods.make_tasks(spec, x0, label, None, rng)
    nets = methods.build(spec)
    if methods.learns_on_fills(spec):
        t = tasks["denoiser"].t
        tasks = methods.with_planner_on_fills(
            spec, tasks, nets["denoiser"], x0, t, label, None, rng, x0.device
        )
    assert tasks.keys() == nets.keys()
    for name, task in tasks.items():
        net = wake(nets[name])
        if in_chunks:
            assert chunked_head.chunk_size(net) < len(task.sites)
        logits = net(task.xt, task.t, task.label).flatten(0, 1)[task.sites]
        per_site = task.loss(logits, task.target, *task.loss_args)
        assert per_site.shape == task.sites.shape
        mean = per_site.mean()
        if task.n_loss_tokens:              # some clean tokens are thinned out, and still counted
            assert method in ("gidd", "forcing")
            assert len(task.sites) < task.n_loss_tokens <= x0.numel()
            mean = mean * len(task.sites) / task.n_loss_tokens
        params = list(net.parameters())
        wanted = torch.autograd.grad(mean, params)
        loss = task_loss(net, task)
        found = torch.autograd.grad(loss, params)
        assert loss.item() == pytest.approx(mean.item(), rel=1e-5)
        for a, b in zip(found, wanted, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk", [None, 7])
def test_map_logits_is_the_plain_head(chunk, rng):
    """In value to 1e-5 and in gradient to 1e-4, in one chunk or recomputed in many."""
    x, t, label = random_batch(rng)
    target = torch.randint(SHAPE.vocab, (x.numel(),), generator=rng)
    weight = torch.rand(x.numel(), generator=rng)
    net = wake(Transformer(SHAPE, "denoiser", t_conditioned=True))
    params = list(net.parameters())
    plain = F.cross_entropy(net(x, t, label).flatten(0, 1), target, reduction="none")
    wanted = torch.autograd.grad((plain * weight).sum(), params)
    hidden = net.hidden(x, t, label).flatten(0, 1)
    mapped = map_logits(net, hidden, objectives.denoiser_loss, target, chunk=chunk)
    assert torch.allclose(mapped, plain, atol=1e-5)
    found = torch.autograd.grad((mapped * weight).sum(), params)
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("process", ["mask", "uniform"])
def test_tasks_ask_what_they_should(process, rng):
    """Planner: is_noise of all tokens. Denoiser: x0 at noise only; single: x0 of all tokens."""
    x0 = torch.randint(SHAPE.vocab, (400, 24), generator=rng)
    label = torch.zeros(400, dtype=torch.long)
    t = torch.full((400, 1), 0.3)
    noise = Noise(process, SHAPE.vocab)
    tasks = objectives.pair_tasks(x0, t, label, noise, rng)

    planner = tasks["planner"]
    assert torch.equal(planner.sites, torch.arange(x0.numel()))
    assert planner.xt.max() < SHAPE.vocab
    assert planner.target[(planner.xt != x0).flatten()].all()
    assert planner.target.mean().item() == pytest.approx(0.3, abs=0.02)

    denoiser = tasks["denoiser"]
    assert torch.equal(denoiser.target, x0.flatten()[denoiser.sites])
    is_site = torch.zeros(x0.numel(), dtype=torch.bool).index_fill(0, denoiser.sites, True)
    assert is_site[(denoiser.xt != x0).flatten()].all()
    assert is_site.float().mean().item() == pytest.approx(0.3, abs=0.02)
    if process == "mask":
        assert torch.equal(is_site, (denoiser.xt == SHAPE.vocab).flatten())

    single = objectives.single_tasks(x0, t, label, Noise("uniform", SHAPE.vocab), rng)["denoiser"]
    assert torch.equal(single.target, x0.flatten())


def test_dropped_labels_are_the_null_class(rng):
    label = torch.randint(3, (100_000,), generator=rng)
    dropped = objectives.drop_labels(label, 3, 0.1, rng)
    assert (dropped == 3).float().mean().item() == pytest.approx(0.1, abs=0.005)
    assert torch.equal(dropped[dropped < 3], label[dropped < 3])


# The network


def test_forms_of_a_net(rng):
    """planner (B, N); denoiser (B, N, V), at sites the same rows; the mask is an input only."""
    x, t, label = random_batch(rng)
    x[:, 0] = SHAPE.vocab
    sites = torch.tensor([[3, 0, 23]]).expand(5, 3)
    assert wake(Transformer(SHAPE, "planner"))(x, t, label).shape == (5, 24)

    net = wake(Transformer(SHAPE, "denoiser", t_conditioned=True))
    full = net(x, t, label)
    assert full.shape == (5, 24, 11)
    assert torch.allclose(net(x, t, label, sites), full[:, [3, 0, 23]], atol=1e-5)
    level_per_token = t.expand(5, 24)
    assert torch.allclose(net(x, level_per_token, label), full, atol=1e-5)
    assert not torch.allclose(net(x, 1 - t, label), full, atol=1e-3)
    assert not torch.allclose(net(x, t, (label + 1) % 3), full, atol=1e-3)

    not_told = wake(Transformer(SHAPE, "denoiser"))
    assert torch.equal(not_told(x, t, label), not_told(x, 1 - t, label))


def test_levels_do_not_drown_tokens():
    """The embeddings of level and token have one size, and neighbouring levels look alike."""
    spec = tiny_spec("gidd", SHAPE.grid, SHAPE.vocab, n_embd=512, n_head=8, base_width=32)
    net = methods.build(spec)["denoiser"]
    t = torch.linspace(0, 1, 101)[:, None]
    level = net.t_proj(level_features(t, net.frequency))
    assert level.square().mean().sqrt().item() == pytest.approx(EMBED_STD, rel=0.1)
    assert net.tok_emb.weight.square().mean().sqrt().item() == pytest.approx(EMBED_STD, rel=0.1)
    assert torch.cosine_similarity(level[1:], level[:-1], -1).min() > 0.95


@pytest.mark.parametrize("grid", [(8, 8), (4, 10), (1, 24), (3, 5, 7)])
def test_rope_scores_depend_on_displacement_only(grid, rng):
    """<rotate(q, p), rotate(k, p')> is a function of p' - p on any grid, and tells axes apart."""
    angles = rope_angles(grid, 32).double()
    cos, sin = angles.cos(), angles.sin()
    n = math.prod(grid)
    q, k = torch.randn(2, 32, generator=rng, dtype=torch.float64)
    rotated_q = rotate(q.expand(1, 1, n, 32), cos, sin)[0, 0]
    rotated_k = rotate(k.expand(1, 1, n, 32), cos, sin)[0, 0]
    scores = (rotated_q @ rotated_k.T).flatten()                        # (N * N,)
    positions = torch.cartesian_prod(*[torch.arange(s) for s in grid])
    moves = (positions[None] - positions[:, None]).flatten(0, 1)        # (N * N, axes)
    _, move = moves.unique(dim=0, return_inverse=True)
    score_of_move = torch.zeros(int(move.max()) + 1, dtype=torch.float64).scatter(0, move, scores)
    assert torch.allclose(score_of_move[move], scores, atol=1e-4)
    for axis in range(len(grid)):
        is_step = moves.abs().sum(1).eq(1) & moves[:, axis].eq(1)       # one step along this axis
        if is_step.any():
            assert (scores[is_step][0] - scores[0]).abs() > 1e-3


def test_a_head_can_look_at_one_key_of_1024(rng):
    """QK-norm bounds the logits; the scale must allow more than half the weight on one key."""
    shape = replace(SHAPE, n_head=1, n_embd=64, base_width=64)
    scale = Transformer(shape, "planner").blocks[0].scale
    keys = norm(torch.randn(1, 1, 1024, 64, generator=rng))
    query = keys[:, :, 7:8]
    identity = torch.eye(1024)[None, None]          # as values: the weights come out
    assert attend(query, keys, identity, scale)[0, 0, 0, 7] > 0.5
    assert attend(query, keys, identity, 1 / 64)[0, 0, 0, 7] < 0.5


@pytest.mark.parametrize("n_keys", [64, 1024])
def test_both_attentions_are_one_function(n_keys, rng):
    q, k, v = torch.randn(3, 2, 2, n_keys, 16, generator=rng)
    fused = F.scaled_dot_product_attention(q, k, v, scale=0.3)
    assert torch.allclose(attend(q, k, v, 0.3), fused, atol=1e-5)


@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("role", ["planner", "denoiser"])
def test_every_parameter_is_in_one_group(role, width):
    """At twice the base width matrices have half the lr; lr * decay is the same at any width."""
    net = Transformer(replace(SHAPE, n_embd=width), role, t_conditioned=True)
    groups = param_groups(net, 0.1, 0.5)
    in_groups = sorted(id(p) for g in groups for p in g["params"])
    assert in_groups == sorted(id(p) for p in net.parameters())
    for g in groups:
        is_wide = all(width <= min(p.shape) for p in g["params"])       # both sides grow with width
        is_matrix = is_wide and g["kind"] != "head"
        assert is_matrix == (g["kind"] == "matrix")
        assert g["lr"] == pytest.approx(0.1 * (32 / width if is_matrix else 1))
        assert (g["weight_decay"] > 0) == is_matrix
        assert g["lr"] * g["weight_decay"] == pytest.approx(0.05 if is_matrix else 0)


def test_a_width_that_its_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"n_embd 30.*n_head 4"):
        replace(SHAPE, n_embd=30, n_head=4)
