"""Losses without a (B, N, V) tensor: the head runs on chunks of the tokens that enter a loss."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOGITS_PER_CHUNK = 2**25    # 128 MB in float32
LOGITS_PER_BLOCK = 2**21    # a CPU forms losses and gradients of so many at a time, in its cache


def chunk_size(net: nn.Module) -> int:
    """Tokens whose logits make a chunk."""
    return max(1, LOGITS_PER_CHUNK // net.head.out_features)


def map_logits(
    net: nn.Module, hidden: Tensor, fn: Callable, *per_token: Tensor, chunk: int | None = None,
) -> Tensor:
    """fn(logits (n, V), *per_token (n,)) -> (n, ...), in chunks that are recomputed in the backward
    pass.

    hidden (n, D), per_token tensors of n rows  ->  (n, ...)
    """
    def of_chunk(h, *rest):
        return fn(net.logits(h).float(), *rest)

    chunk = chunk or chunk_size(net)
    if len(hidden) <= chunk:
        return of_chunk(hidden, *per_token)
    chunks = zip(*[y.split(chunk) for y in (hidden, *per_token)], strict=True)
    return torch.cat(
        [
            checkpoint(of_chunk, *rows, use_reentrant=False, preserve_rng_state=False)
            for rows in chunks
        ]
    )


class ChunkedLossSum(torch.autograd.Function):
    """A sum over tokens whose gradient is formed chunk by chunk in the forward pass: logits are
    made once."""

    @staticmethod
    def forward(ctx, hidden, weight, net, fn, per_token, chunk):
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = []
        grad_weight = torch.zeros_like(weight)
        for h, *rest in zip(*[y.split(chunk) for y in (hidden, *per_token)], strict=True):
            h = h.detach().requires_grad_()
            with torch.enable_grad():
                logits = net.logits(h)
            loss, grad_logits = loss_and_grad(logits.detach(), fn, rest)
            grad_h, grad_w = torch.autograd.grad(logits, [h, weight], grad_logits)
            total += loss
            grad_hidden.append(grad_h)
            grad_weight += grad_w
        ctx.save_for_backward(torch.cat(grad_hidden), grad_weight)
        return total

    @staticmethod
    def backward(ctx, upstream):
        grad_hidden, grad_weight = ctx.saved_tensors
        return upstream * grad_hidden, upstream * grad_weight, None, None, None, None


def loss_and_grad(logits: Tensor, fn: Callable, per_token: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The sum of fn(logits, *per_token), and its gradient, which overwrites the logits.

    logits (n, V) or (n,)  ->  (), (n, V) or (n,)
    """
    is_cpu = logits.device.type == "cpu"
    block = max(1, LOGITS_PER_BLOCK // logits[0].numel()) if is_cpu else len(logits)
    total = torch.zeros((), device=logits.device)
    for y, *rest in zip(*[y.split(block) for y in (logits, *per_token)], strict=True):
        leaf = y.float().requires_grad_()
        with torch.enable_grad():
            loss = fn(leaf, *rest).sum()
        y.copy_(torch.autograd.grad(loss, leaf)[0])
        total += loss.detach()
    return total, logits


def sum_logits(
    net: nn.Module, hidden: Tensor, fn: Callable, *per_token: Tensor, chunk: int | None = None,
) -> Tensor:
    """map_logits(...).sum() for training: one pass over the chunks instead of two.  -> ()"""
    chunk = chunk or chunk_size(net)
    if len(hidden) <= chunk or not torch.is_grad_enabled():
        return map_logits(net, hidden, fn, *per_token, chunk=chunk).sum()
    return ChunkedLossSum.apply(hidden, net.head.weight, net, fn, per_token, chunk)


def hidden_at_sites(net: nn.Module, task) -> Tensor:
    """The last residual of the tokens that enter a task's loss.  -> (n, D)"""
    return net.hidden(task.xt, task.t, task.label).flatten(0, 1).index_select(0, task.sites)


def task_loss(net: nn.Module, task) -> Tensor:
    """The loss of an objectives.Task, nats per token.  -> ()"""
    hidden = hidden_at_sites(net, task)
    total = sum_logits(net, hidden, task.loss, task.target, *task.loss_args)
    return total / max(1, task.n_loss_tokens or len(hidden))
