"""Attention, by the kernel that is fastest on the device at hand.

In bfloat16 a CPU takes half the time of PyTorch's fused kernel if the matrix products run on
blocks of heads whose scores fit the cache. `python bench.py attention` compares them.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

SCORES_PER_BLOCK = 2**21    # 4 MB in bfloat16: in the cache of a few cores
SHORT = 2**13               # scores of a head up to which blocks cost more than they save


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale) v, head by head.  q (B, H, N, d), k and v (B, H, S, d)  ->  (B, H, N, d)

    All of one dtype.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return fused(q, k, v, scale)
    is_short = q.shape[2] * k.shape[2] <= SHORT
    kernel = plain if is_short else in_blocks
    return kernel(q, k, v, scale)


def fused(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return (q * scale @ k.transpose(-1, -2)).softmax(-1).to(v.dtype) @ v


def in_blocks(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    heads = [y.flatten(0, 1) for y in (q * scale, k, v)]
    return blockwise(*heads).unflatten(0, q.shape[:2])


# Blockwise attention: operators of their own, which torch.compile need not unroll


@torch.library.custom_op("nanoddpd::blockwise_attention", mutates_args=())
def blockwise(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T) v.  q (h, N, d), k and v (h, S, d)  ->  (h, N, d)"""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for head, query in blocks(*q.shape[:2], k.shape[1]):
        probs = block_probs(q[head, query], k[head])
        out[head, query] = torch.bmm(probs, v[head])
    return out


@torch.library.custom_op("nanoddpd::blockwise_attention_backward", mutates_args=())
def blockwise_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; each block of scores is computed again."""
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k = torch.zeros(k.shape, device=k.device)      # sums over blocks of queries, in float32
    grad_v = torch.zeros(v.shape, device=v.device)
    for head, query in blocks(*q.shape[:2], k.shape[1]):
        probs = block_probs(q[head, query], k[head])
        grad = grad_out[head, query]
        grad_v[head] += torch.bmm(probs.transpose(1, 2), grad)
        scores = torch.bmm(grad, v[head].transpose(1, 2))       # gradient of probs, then of scores
        torch.ops.aten._softmax_backward_data.out(
            scores, probs, -1, scores.dtype, grad_input=scores
        )
        grad_q[head, query] = torch.bmm(scores, k[head])
        grad_k[head] += torch.bmm(scores.transpose(1, 2), q[head, query])
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def blocks(n_heads: int, n_queries: int, n_keys: int) -> Iterator[tuple[slice, slice]]:
    """Heads and queries of each block of scores; several heads only with all their queries."""
    heads = max(1, SCORES_PER_BLOCK // (n_queries * n_keys))
    queries = max(1, SCORES_PER_BLOCK // n_keys)
    for head in range(0, n_heads, heads):
        for query in range(0, n_queries, queries):
            yield slice(head, head + heads), slice(query, query + queries)


def block_probs(q: Tensor, k: Tensor) -> Tensor:
    scores = torch.bmm(q, k.transpose(1, 2))
    return torch.softmax(scores, -1, out=scores)


def keep_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def backward(ctx, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return blockwise_backward(grad_out, *ctx.saved_tensors)


@blockwise.register_fake
def _(q, k, v):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@blockwise_backward.register_fake
def _(grad_out, q, k, v):
    return tuple(torch.empty_like(y, memory_format=torch.contiguous_format) for y in (q, k, v))


blockwise.register_autograd(backward, setup_context=keep_inputs)


# What PyTorch's counter of FLOPs makes of them: two products forward, five backward


@register_flop_formula(torch.ops.nanoddpd.blockwise_attention)
def _(q_shape, k_shape, v_shape, *args, **kwargs) -> int:
    n_heads, n_queries, width = q_shape
    return 4 * n_heads * n_queries * k_shape[1] * width


@register_flop_formula(torch.ops.nanoddpd.blockwise_attention_backward)
def _(grad_shape, q_shape, k_shape, v_shape, *args, **kwargs) -> int:
    n_heads, n_queries, width = q_shape
    return 10 * n_heads * n_queries * k_shape[1] * width
