import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from diffusion import objectives
from model import (
    EMBED_STD,
    Shape,
    Transformer,
    attend,
    build,
    build_one,
    level_features,
    map_logits,
    norm,
    param_groups,
    rope_angles,
    rotate,
)

SHAPE = Shape(grid=(4, 6), vocab=11, n_classes=3, n_layer=2, n_head=2, n_embd=32, base_width=32)


def awake(net, seed=0):
    """A network as after training: its zero-initialised matrices moved."""
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        if not p.any():
            p.data.normal_(std=0.1, generator=g)
    return net


def batch(rng, n=5):
    x = torch.randint(SHAPE.vocab, (n, SHAPE.n_tokens), generator=rng)
    return x, torch.rand(n, 1, generator=rng), torch.randint(SHAPE.n_classes + 1, (n,), generator=rng)


@pytest.mark.parametrize("kind", ["maskd", "unid", "single"])
def test_losses_at_initialisation(kind, rng):
    """The planner starts at ln 2, the denoiser at ln V: heads start at zero."""
    x0, t, label = batch(rng)
    tasks = objectives.ddpd(
        x0,
        t,
        label,
        SHAPE.vocab,
        rng,
        "single" if kind == "single" else "pair",
        "mask" if kind == "maskd" else "uniform",
    )
    nets = build(SHAPE, kind)
    assert nets.keys() == tasks.keys()
    for name, task in tasks.items():
        hidden = nets[name].hidden(task.xt, task.t, task.label).flatten(0, 1)[task.sites]
        loss = map_logits(nets[name], hidden, objectives.LOSSES[name], task.target).mean().item()
        assert loss == pytest.approx({"planner": math.log(2), "denoiser": math.log(SHAPE.vocab)}[name], abs=1e-5)


def test_forms_of_a_net(rng):
    """planner (B, N); denoiser (B, N, V), at sites the same rows; the mask is an input only."""
    x, t, label = batch(rng)
    x[:, 0] = SHAPE.vocab
    sites = torch.tensor([[3, 0, 23]]).expand(5, 3)
    assert awake(Transformer(SHAPE, "planner"))(x, t, label).shape == (5, 24)
    net = awake(Transformer(SHAPE, "denoiser", is_told_t=True))
    full = net(x, t, label)
    assert full.shape == (5, 24, 11)
    assert torch.allclose(net(x, t, label, sites), full[:, [3, 0, 23]], atol=1e-5)
    assert torch.allclose(net(x, t.expand(5, 24), label), full, atol=1e-5)  # one level per token, all equal
    assert not torch.allclose(net(x, 1 - t, label), full, atol=1e-3)
    assert not torch.allclose(net(x, t, (label + 1) % 3), full, atol=1e-3)
    blind = awake(Transformer(SHAPE, "denoiser"))
    assert torch.equal(blind(x, t, label), blind(x, 1 - t, label))


def test_levels_do_not_drown_tokens():
    """What is added for the level is as large as what is added for the token, and neighbouring levels look alike."""
    net = build_one(replace(SHAPE, n_embd=512, n_head=8), "denoiser", "gidd")
    t = torch.linspace(0, 1, 101)[:, None]
    level = net.level(level_features(t))
    assert level.square().mean().sqrt().item() == pytest.approx(EMBED_STD, rel=0.1)
    assert net.embed.weight.square().mean().sqrt().item() == pytest.approx(EMBED_STD, rel=0.1)
    assert torch.cosine_similarity(level[1:], level[:-1], -1).min() > 0.95


@pytest.mark.parametrize("grid", [(8, 8), (4, 10), (1, 24), (3, 5, 7)])
def test_rope_scores_depend_on_displacement_only(grid, rng):
    """<rotate(q, p), rotate(k, p')> is a function of p' - p on any grid, and tells every axis apart."""
    angles = rope_angles(grid, 32).double()
    q, k = torch.randn(2, 32, generator=rng, dtype=torch.float64)
    n = math.prod(grid)
    turned_q, turned_k = (rotate(y.expand(1, 1, n, 32), angles.cos(), angles.sin())[0, 0] for y in (q, k))
    scores = turned_q @ turned_k.T  # (N, N)
    where = torch.cartesian_prod(*[torch.arange(s) for s in grid])
    moves = (where[None] - where[:, None]).flatten(0, 1)  # (N * N, axes)
    _, kind = moves.unique(dim=0, return_inverse=True)
    first = torch.zeros(int(kind.max()) + 1, dtype=torch.float64).scatter(0, kind, scores.flatten())
    assert torch.allclose(first[kind], scores.flatten(), atol=1e-4)
    for axis in range(len(grid)):
        one = moves.abs().sum(1).eq(1) & moves[:, axis].eq(1)  # a step along this axis
        if one.any():
            assert (scores.flatten()[one][0] - scores[0, 0]).abs() > 1e-3


def test_a_head_can_look_at_one_key_of_1024(rng):
    """QK-norm bounds the logits; the scale must leave room for more than half the weight on one key."""
    shape = replace(SHAPE, n_head=1, n_embd=64, base_width=64)
    scale = Transformer(shape, "planner").blocks[0].scale
    keys = norm(torch.randn(1, 1, 1024, 64, generator=rng))
    weights = attend(keys[:, :, 7:8], keys, torch.eye(1024)[None, None], scale)
    assert weights[0, 0, 0, 7] > 0.5
    assert attend(keys[:, :, 7:8], keys, torch.eye(1024)[None, None], 1 / 64)[0, 0, 0, 7] < 0.5


@pytest.mark.parametrize("n_keys", [64, 1024])
def test_both_attentions_are_one_function(n_keys, rng):
    q, k, v = torch.randn(3, 2, 2, n_keys, 16, generator=rng)
    assert torch.allclose(attend(q, k, v, 0.3), F.scaled_dot_product_attention(q, k, v, scale=0.3), atol=1e-5)


def test_every_parameter_is_in_one_group(rng):
    """At base width every group's lr is the flag; at twice the width matrices train at half; lr * decay is the same."""
    for kind in ("planner", "denoiser"):
        for width in (32, 64):
            net = Transformer(replace(SHAPE, n_embd=width), kind, is_told_t=True)
            groups = param_groups(net, 0.1, 0.5)
            assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in net.parameters())
            for g in groups:
                is_matrix = all(width <= min(p.shape) for p in g["params"]) and g["role"] != "readout"
                assert g["lr"] == pytest.approx(0.1 * (32 / width if g["role"] == "matrix" else 1))
                assert (g["weight_decay"] > 0) == is_matrix == (g["role"] == "matrix")
                assert g["lr"] * g["weight_decay"] == pytest.approx(0.05 if is_matrix else 0)


@pytest.mark.parametrize("chunk", [None, 7])
def test_map_logits_is_the_plain_head(chunk, rng):
    """In value to 1e-5 and in gradient to 1e-4, in one chunk or recomputed in many."""
    x, t, label = batch(rng)
    target = torch.randint(SHAPE.vocab, (x.numel(),), generator=rng)
    weight = torch.rand(x.numel(), generator=rng)
    net = awake(Transformer(SHAPE, "denoiser", is_told_t=True))
    plain = F.cross_entropy(net(x, t, label).flatten(0, 1), target, reduction="none")
    expected = torch.autograd.grad((plain * weight).sum(), list(net.parameters()))
    mapped = map_logits(net, net.hidden(x, t, label).flatten(0, 1), objectives.denoiser_loss, target, chunk=chunk)
    found = torch.autograd.grad((mapped * weight).sum(), list(net.parameters()))
    assert torch.allclose(mapped, plain, atol=1e-5)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_a_width_that_its_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"n_embd 30.*n_head 4"):
        replace(SHAPE, n_embd=30, n_head=4)


@pytest.mark.parametrize("process", ["mask", "uniform"])
def test_tasks_ask_what_they_should(process, rng):
    """Planner: is_noise of every token. Denoiser: x0 at the noise tokens, and nowhere else; single: x0 everywhere."""
    x0, label = torch.randint(SHAPE.vocab, (400, 24), generator=rng), torch.zeros(400, dtype=torch.long)
    t = torch.full((400, 1), 0.3)
    tasks = objectives.ddpd(x0, t, label, SHAPE.vocab, rng, "pair", process)
    planner, denoiser = tasks["planner"], tasks["denoiser"]
    assert torch.equal(planner.sites, torch.arange(x0.numel())) and planner.xt.max() < SHAPE.vocab
    changed = (planner.xt != x0).flatten()
    assert planner.target[changed].all() and planner.target.mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(denoiser.target, x0.flatten()[denoiser.sites])
    is_site = torch.zeros(x0.numel(), dtype=torch.bool).index_fill(0, denoiser.sites, True)
    assert is_site[(denoiser.xt != x0).flatten()].all() and is_site.float().mean().item() == pytest.approx(
        0.3, abs=0.02
    )
    if process == "mask":
        assert torch.equal(is_site, (denoiser.xt == SHAPE.vocab).flatten())
    single = objectives.ddpd(x0, t, label, SHAPE.vocab, rng, "single", "uniform")["denoiser"]
    assert torch.equal(single.target, x0.flatten())


def test_dropped_labels_are_the_null_class(rng):
    label = torch.randint(3, (100_000,), generator=rng)
    dropped = objectives.drop_labels(label, 3, 0.1, rng)
    assert (dropped == 3).float().mean().item() == pytest.approx(0.1, abs=0.005)
    assert torch.equal(dropped[dropped < 3], label[dropped < 3])
