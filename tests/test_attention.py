"""Every kernel of attention is the softmax that it says, in value and gradient."""

import pytest
import torch
from torch import Tensor

from support import attention

KERNELS = {"fused": attention.fused, "plain": attention.plain, "in_blocks": attention.in_blocks}


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """In float64, key by key."""
    weight = torch.stack([(q * k[:, :, s : s + 1]).sum(-1) for s in range(k.shape[2])], -1)
    weight = (scale * weight).exp()
    return (weight / weight.sum(-1, keepdim=True)) @ v


def value_and_gradients(kernel, inputs, dtype) -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    leaves = [y.to(dtype).requires_grad_() for y in inputs]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = kernel(*leaves, 0.3)
    grad = torch.randn(out.shape, generator=rng, dtype=torch.float64)
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("scores_per_block", [2**21, 5000, 1800, 70])
@pytest.mark.parametrize("name", KERNELS)
def test_value_and_gradient(name, scores_per_block, dtype, tolerance, monkeypatch):
    """In one block, in blocks of heads, of one head, and of some queries; as many keys as
    queries or not."""
    monkeypatch.setattr(attention, "SCORES_PER_BLOCK", scores_per_block)
    rng = torch.Generator().manual_seed(0)
    for n_keys in (40, 7):
        lengths = (40, n_keys, n_keys)
        inputs = [torch.randn(2, 3, n, 16, generator=rng, dtype=torch.float64) for n in lengths]
        expected = value_and_gradients(reference, inputs, torch.float64)
        got = value_and_gradients(KERNELS[name], inputs, dtype)
        for one, other in zip(expected, got, strict=True):
            assert other.dtype == dtype
            assert (one - other).norm() < tolerance * one.norm()


def test_blocks_cover_all_scores_once(monkeypatch):
    monkeypatch.setattr(attention, "SCORES_PER_BLOCK", 100)
    for n_heads, n_queries, n_keys in [(5, 4, 6), (3, 40, 7), (2, 3, 200), (1, 1, 1)]:
        seen = torch.zeros(n_heads, n_queries)
        for head, query in attention.blocks(n_heads, n_queries, n_keys):
            seen[head, query] += 1
            assert seen[head, query].numel() * n_keys <= max(100, n_keys)
        assert (seen == 1).all()


def test_the_rule(monkeypatch):
    """float32 goes to the fused kernel, bfloat16 to plain products as long as they are short."""
    used = []
    for name, kernel in KERNELS.items():
        def spy(*args, name=name, kernel=kernel):
            used.append(name)
            return kernel(*args)
        monkeypatch.setattr(attention, name, spy)
    monkeypatch.setattr(attention, "SHORT", 8 * 8)
    for n, dtype in [(8, torch.float32), (8, torch.bfloat16), (9, torch.bfloat16)]:
        q = torch.randn(2, 3, n, 4, dtype=dtype)
        attention.attend(q, q, q, 1.0)
    assert used == ["fused", "plain", "in_blocks"]


def test_the_operators_are_sound():
    """PyTorch's own checks: shapes without data, gradients, no hidden aliasing."""
    q, k, v = (torch.randn(3, n, 8, requires_grad=True) for n in (10, 6, 6))
    torch.library.opcheck(attention.blockwise, (q, k, v))
