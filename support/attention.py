"""Attention, by the kernel that is fastest on the device at hand.

In bfloat16 a CPU takes half the time of PyTorch's fused kernel if the matrix products run on
blocks of heads whose scores fit the cache. `python bench.py attention` compares them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

SCORES_PER_BLOCK = 2**21    # 4 MB in bfloat16: in the cache of a few cores
SHORT = 2**13               # scores of a head up to which blocks cost more than they save

is_as_on_gpu = False


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """A block in which a CPU runs a GPU's kernel, for what that keeps in memory."""
    global is_as_on_gpu
    is_as_on_gpu = True
    try:
        yield
    finally:
        is_as_on_gpu = False


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale) v, head by head.  q (B, H, N, d), k and v (B, H, S, d)  ->  (B, H, N, d)

    All of one dtype.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or is_as_on_gpu:
        return fused(q, k, v, scale)
    is_short = q.shape[2] * k.shape[2] <= SHORT
    kernel = plain if is_short else in_blocks
    return kernel(q, k, v, scale)


def fused(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    scores = q * scale @ k.mT
    probs = scores.softmax(-1)                          # float32 under autocast
    return probs.to(v.dtype) @ v


def in_blocks(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    scaled_q = q * scale
    out = blockwise(scaled_q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
    return out.view(q.shape)


# Attention in blocks, as operators whose loops torch.compile does not unroll


@torch.library.custom_op("nanoddpd::blockwise_attention", mutates_args=())
def blockwise(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T) v.  q (h, N, d), k and v (h, S, d)  ->  (h, N, d)"""
    out = q.new_empty(q.shape)
    for head, query in blocks(*q.shape[:2], k.shape[1]):
        probs = block_probs(q[head, query], k[head])
        out[head, query] = torch.bmm(probs, v[head])
    return out


@torch.library.custom_op("nanoddpd::blockwise_attention_backward", mutates_args=())
def blockwise_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; each block of scores is computed again."""
    grad_q = q.new_empty(q.shape)
    grad_k = k.new_zeros(k.shape, dtype=torch.float32)          # sums over blocks of queries
    grad_v = v.new_zeros(v.shape, dtype=torch.float32)
    for head, query in blocks(*q.shape[:2], k.shape[1]):
        block_q = q[head, query]
        block_grad = grad_out[head, query]
        probs = block_probs(block_q, k[head])
        grad_v[head] += torch.bmm(probs.mT, block_grad)
        grad_probs = torch.bmm(block_grad, v[head].mT)
        grad_scores = softmax_backward(grad_probs, probs)
        grad_q[head, query] = torch.bmm(grad_scores, k[head])
        grad_k[head] += torch.bmm(grad_scores.mT, block_q)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def blocks(n_heads: int, n_queries: int, n_keys: int) -> Iterator[tuple[slice, slice]]:
    """Heads and queries of each block of scores; several heads only with all their queries."""
    heads = max(1, SCORES_PER_BLOCK // (n_queries * n_keys))
    queries = max(1, SCORES_PER_BLOCK // n_keys)
    for head in range(0, n_heads, heads):
        for query in range(0, n_queries, queries):
            yield slice(head, head + heads), slice(query, query + queries)


def block_probs(q: Tensor, k: Tensor) -> Tensor:
    scores = torch.bmm(q, k.mT)
    return torch.softmax(scores, -1, out=scores)


def softmax_backward(grad: Tensor, probs: Tensor) -> Tensor:
    """The gradient of the scores, in place of that of the probabilities."""
    kernel = torch.ops.aten._softmax_backward_data.out
    return kernel(grad, probs, -1, grad.dtype, grad_input=grad)


def keep_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def backward(ctx, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return blockwise_backward(grad_out, *ctx.saved_tensors)


@blockwise.register_fake
def _(q, k, v):
    return q.new_empty(q.shape)


@blockwise_backward.register_fake
def _(grad_out, q, k, v):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


blockwise.register_autograd(backward, setup_context=keep_inputs)


# FLOPs for PyTorch's counter: two matrix products forward, five backward


def flops_of_product(q_shape, k_shape) -> int:
    n_heads, n_queries, width = q_shape
    n_keys = k_shape[1]
    return 2 * n_heads * n_queries * n_keys * width


@register_flop_formula(torch.ops.nanoddpd.blockwise_attention)
def _(q_shape, k_shape, v_shape, *args, **kwargs) -> int:
    return 2 * flops_of_product(q_shape, k_shape)


@register_flop_formula(torch.ops.nanoddpd.blockwise_attention_backward)
def _(grad_shape, q_shape, k_shape, v_shape, *args, **kwargs) -> int:
    return 5 * flops_of_product(q_shape, k_shape)
