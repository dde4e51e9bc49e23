"""Patches: the network on blocks of tokens, for every grid, method and sampler."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_model import wake
from world import tiny_spec

import methods
from diffusion import samplers
from model import (
    EMBED_STD,
    KVCache,
    Shape,
    Transformer,
    level_features,
    norm,
    param_groups,
    rope_angles,
)
from support.chunked_head import task_loss

GRIDS = {           # grid, with patches of 2
    (4, 4): (2, 2), (2, 6): (1, 3), (1, 6): (1, 3), (8,): (4,), (3, 2, 4): (3, 1, 2),
}


def shape_of(grid, patch=2, **more):
    return Shape(grid, 7, 3, n_layer=1, n_head=2, n_embd=32, base_width=32, patch=patch, **more)


def rotate_by_hand(y, angle):
    """y (d,) of one head, angle (d / 2,)."""
    a, b = y[: len(angle)], y[len(angle):]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()])


def network_by_hand(net, x, t, label):
    """One sequence of a 4x4 grid through a network of one layer, patch by patch and head by head.

    x (16,), t (16,), label ()  ->  (16, V)
    """
    p = {name: y.detach() for name, y in net.named_parameters()}
    d, heads = net.shape.n_embd, net.shape.n_head
    size = d // heads
    corners = [(row, column) for row in (0, 2) for column in (0, 2)]
    patches = [[4 * (r + i) + c + j for i in (0, 1) for j in (0, 1)] for r, c in corners]
    angles = rope_angles((2, 2), size)
    residual = []
    for n, tokens in enumerate(patches):
        parts = [p["tok_emb.weight"][x[i]] for i in tokens]
        levels = [p["t_proj.weight"] @ level_features(t[i].view(1, 1), net.frequency)[0, 0]
                  for i in tokens]
        residual.append(torch.cat(parts) + p["pos_emb.weight"][n] + torch.cat(levels))
    projected = [p["blocks.0.in_proj.weight"] @ norm(y) for y in residual]
    label_tokens = norm(p["label_emb.weight"][label].view(4, d))
    label_kv = [p["blocks.0.label_kv.weight"] @ y for y in label_tokens]
    out = torch.zeros(16, 7)
    for n, tokens in enumerate(patches):
        read, read_label = [], []
        for h in range(heads):
            here = slice(h * size, (h + 1) * size)

            def part(y, i, here=here):
                return y[i * d:(i + 1) * d][here]

            q = rotate_by_hand(norm(part(projected[n], 0)), angles[n])
            keys = [rotate_by_hand(norm(part(y, 1)), angles[m]) for m, y in enumerate(projected)]
            weights = torch.stack([q @ k for k in keys]).div(math.sqrt(size)).softmax(0)
            read.append(sum(w * part(y, 2) for w, y in zip(weights, projected, strict=True)))
            q = rotate_by_hand(norm(part(projected[n], 3)), angles[n])
            weights = torch.stack([q @ norm(part(y, 0)) for y in label_kv])
            weights = weights.div(math.sqrt(size)).softmax(0)
            read_label.append(sum(w * part(y, 1) for w, y in zip(weights, label_kv, strict=True)))
        mlp = F.relu(projected[n][4 * d:]).square()
        wide = torch.cat([*read, *read_label, mlp])
        h = norm(residual[n] + p["blocks.0.out_proj.weight"] @ wide)
        of_tokens = (p["unpatch.weight"] @ h).view(4, d)
        for i, y in zip(tokens, of_tokens, strict=True):
            out[i] = p["head.weight"] @ norm(y)
    return out


def test_a_network_of_patches_is_its_dense_computation(rng):
    """One layer on 4x4 tokens in patches of 2x2, each token with a level of its own."""
    net = wake(Transformer(shape_of((4, 4)), "denoiser", t_conditioned=True))
    x = torch.randint(8, (3, 16), generator=rng)
    t = torch.rand(3, 16, generator=rng)
    label = torch.tensor([0, 3, 1])
    out = net(x, t, label)
    for i in range(3):
        assert torch.allclose(out[i], network_by_hand(net, x[i], t[i], label[i]), atol=1e-4)
    sites = torch.tensor([[0, 5], [15, 2], [7, 7]])
    at_sites = out.gather(1, sites[..., None].expand(-1, -1, 7))
    assert torch.allclose(net(x, t, label, sites), at_sites, atol=1e-6)
    shared = t[:, :1]
    assert torch.allclose(net(x, shared, label), net(x, shared.expand(3, 16), label), atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS)
def test_patches_are_blocks_of_neighbours(grid):
    """Tokens of a patch lie side by side on each axis but that of frames, and come back in
    place."""
    shape = shape_of(grid)
    assert shape.coarse_grid == GRIDS[grid]
    net = Transformer(shape, "planner")
    place = torch.cartesian_prod(*[torch.arange(n) for n in grid]).view(1, -1, len(grid))
    patches = net.to_patches(place).view(shape.n_patches, shape.patch_size, len(grid))
    extent = patches.amax(1) - patches.amin(1)
    for axis, n in enumerate(grid):
        is_frames = len(grid) == 3 and axis == 0
        assert (extent[:, axis] == (0 if n == 1 or is_frames else 1)).all()
    assert torch.equal(net.to_tokens(patches.flatten(1)[None]), place)


def test_without_patches_nothing_is_added():
    """Patch 1 has the parameters of a network that knows no patches."""
    names = {name for name, _ in Transformer(shape_of((4, 4), 1), "planner").named_parameters()}
    more = {name for name, _ in Transformer(shape_of((4, 4)), "planner").named_parameters()}
    assert more - names == {"unpatch.weight"}


def test_the_matrix_back_to_tokens_scales_as_a_matrix():
    """muP: its lr and its start go by its width, and embeddings of tokens start as ever."""
    shape = Shape((4, 4), 7, 3, n_layer=1, n_head=2, n_embd=128, base_width=32, patch=2)
    net = Transformer(shape, "denoiser")
    groups = param_groups(net, 1.0, 0.1)
    [group] = [g for g in groups if any(p is net.unpatch.weight for p in g["params"])]
    assert group["kind"] == "matrix" and group["lr"] == 0.25
    assert net.unpatch.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
    assert net.tok_emb.weight.shape == (8, 32)
    assert net.tok_emb.weight.std().item() == pytest.approx(EMBED_STD, rel=0.2)


@pytest.mark.parametrize("grid, patch, word", [
    ((4, 6), 4, "patch 4 does not divide the axes"), ((5,), 2, "patch 2 does not divide"),
    ((4, 3, 2), 2, "patch 2 does not divide"), ((2, 2, 2, 2), 2, "patch 2 does not divide"),
    ((6, 6), 3, "n_embd 32 does not divide into the 9 tokens"),
])
def test_patches_that_do_not_fit_are_refused(grid, patch, word):
    with pytest.raises(ValueError, match=word):
        shape_of(grid, patch)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_trains_and_samples_on_patches(name, grid, rng):
    """A loss with gradients of all parameters, and every sampler, with known tokens and
    guidance."""
    flags = {}
    if name == "forcing":
        flags["noise_granularity"] = "frame" if len(grid) == 3 else "token"
        flags["causal"] = len(grid) == 3
    spec = tiny_spec(name, grid, n_embd=32, base_width=32, patch=2, **flags)
    nets = {role: wake(net) for role, net in methods.build(spec).items()}
    n_tokens = math.prod(grid)
    x0 = torch.randint(7, (3, n_tokens), generator=rng)
    label = torch.tensor([0, 3, 1])
    for role, task in methods.make_tasks(spec, x0, label, None, rng).items():
        task_loss(nets[role], task).backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in nets[role].parameters())
    known = torch.rand(3, n_tokens, generator=rng) < 0.3
    for sampler in spec.method.samplers:
        states = methods.sample(
            spec, nets, label, n_steps=4, generator=rng, sampler=sampler, known=known,
            known_tokens=x0, guidance=2.0,
        )
        final = samplers.last(states)
        assert torch.equal(final.x[known], x0[known])
        assert final.x.min() >= 0 and final.x.max() < 7


def test_a_causal_frame_of_patches_sees_no_later_one(rng):
    """And frames that follow those of a cache are seen as if all were there."""
    shape = shape_of((3, 2, 4), causal=True)
    net = wake(Transformer(shape, "denoiser", t_conditioned=True))
    x = torch.randint(7, (2, 24), generator=rng)
    t = torch.rand(2, 24, generator=rng)
    label = torch.tensor([0, 1])
    changed = x.clone()
    changed[:, 16:] = (x[:, 16:] + 1) % 7
    a, b = net(x, t, label), net(changed, t, label)
    assert torch.equal(a[:, :16], b[:, :16])
    assert not torch.equal(a[:, 16:], b[:, 16:])

    cache = KVCache(shape)
    first = net(x[:, :8], t[:, :8], label, None, cache, 1)
    rest = net(x[:, 8:], t[:, 8:], label, None, cache, 0)
    assert torch.allclose(torch.cat([first, rest], 1), a, atol=1e-5)
