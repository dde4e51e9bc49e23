"""GIDD (arXiv:2503.04482): the likelihood bound of mixed mask and uniform noise as a training loss.

With a, m, c and C the weights of keep, mask, redraw and their sum (processes.Process), and
b = c / V, the distribution of the noisy token is q_t(j | p) = (a p_j + b) / C at a data token j and
m / C at the mask. The loss of a token is
    w [ KL(q_t(. | x0) || q_t(. | p)) + r - log r - 1 ],    r = q_t(x_t | x0) / q_t(x_t | p),
where p is the denoiser's leave-one-out prediction and w a weight of token_weights.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.objectives import Task, denoiser_loss, flat_sites, level_per_token
from diffusion.processes import T_MAX, T_MIN, Noise, corrupt, require_posterior

CPU_BLOCK_LOGITS = 2**18    # at a time on a CPU: nine passes run over them, so they fit its cache


def token_weights(x0: Tensor, z: Tensor, t: Tensor, noise: Noise, weight: str) -> Tensor:
    """The weight of each token's loss.  x0, z (noisy tokens) and t (n,) -> (n,)

    "elbo": the rate d log(odds) / dt at which noise gains on the clean token. For redraws this is
        odds_power / (t (1 - t)), for masks 1 / (t (1 - t)); where z = x0 it is multiplied by the
        probability that z is noise, o / (1 + o), with o the odds of noise that looks like x0
    "dynamic": elbo divided by its value at a wrong token, hence 1 there, 1 / odds_power at a mask
        (2 for hybrid noise) and o / (1 + o) at the clean token
    "clip": elbo, at most 1
    "none": 1
    """
    if weight == "none":
        return torch.ones_like(t)
    require_posterior(noise)
    _, _, redraw, _ = noise.row.weights(t, noise.p_uniform)
    odds = redraw / (noise.vocab * (1 - t))             # of noise that looks like x0
    visible = torch.where(z == x0, odds / (1 + odds), 1.0)
    dynamic = torch.where(z == noise.vocab, 1 / noise.row.odds_power, visible)
    if weight == "dynamic":
        return dynamic
    elbo = dynamic / (t * (1 - t)) * noise.row.odds_power
    return elbo.clamp_max(1.0) if weight == "clip" else elbo


def gidd_tasks(
    x0: Tensor, t: Tensor, label: Tensor, noise: Noise, generator: torch.Generator,
    known: Tensor | None = None, *, weight: str = "dynamic", clean_token_rate: float = 1.0,
    loss_mask: Tensor | None = None,
) -> dict[str, Task]:
    """One denoiser learns all tokens by the bound's loss, or noise tokens by CE (weight "none").

    x0 (B, N), label (B,), t (B, 1), or (B, N) with a level for each token  ->  {network: Task}
    clean_token_rate  share of the clean tokens that enter the loss, weighted by its inverse: the
                      same loss on average, at less cost of the head
    Tokens at level 0, known tokens and those outside of loss_mask (B, N) do not enter the loss.
    """
    level = level_per_token(t, x0, known)
    is_asked = level > 0
    if loss_mask is not None:
        is_asked &= loss_mask
    xt, is_noise = corrupt(x0, level, noise, generator)
    is_kept = torch.rand(x0.shape, generator=generator) < clean_token_rate
    if weight == "none" or noise.only_masks:            # clean tokens have no loss
        is_kept = is_noise
    sites = flat_sites(is_asked & ((xt != x0) | is_kept))
    target = x0.flatten()[sites]
    if weight == "none":
        return {"denoiser": Task(xt, t, label, sites, target, denoiser_loss)}

    z = xt.flatten()[sites]
    t_site = level.clamp(T_MIN, T_MAX).flatten()[sites]
    w = token_weights(target, z, t_site, noise, weight)
    w = torch.where(z == target, w / clean_token_rate, w)
    loss = functools.partial(gidd_loss, noise=noise)
    n_asked = is_asked.sum().item()
    return {"denoiser": Task(xt, t, label, sites, target, loss, (z, t_site, w), n_asked)}


def gidd_loss(
    logits: Tensor, x0: Tensor, z: Tensor, t: Tensor, weight: Tensor, noise: Noise,
) -> Tensor:
    """The weighted loss of each token, nats; with masks alone, weight * (1 - t) * CE at masks.

    logits (n, V), x0 (n,), z (n,) in [0, V], t and weight (n,)  ->  (n,)
    """
    if noise.only_masks:
        ce = F.cross_entropy(logits, x0, reduction="none")
        return torch.where(z == noise.vocab, weight * (1 - t) * ce, 0.0)
    require_posterior(noise)
    return GiddLoss.apply(logits, x0, z, t, weight, noise)


class GiddLoss(torch.autograd.Function):
    """gidd_loss with its gradient formed in the forward pass.

    The value needs the softmax p and S = sum_j log(1 + a p_j / b), a sum over the vocabulary; the
    gradient needs the same terms again. Formed together they share them, and the only (n, V) tensor
    kept for the backward pass is the gradient itself, one head chunk at a time.
    """

    @staticmethod
    def forward(ctx, logits, x0, z, t, weight, noise):
        n, vocab = logits.shape
        n_rows = max(1, n)                              # at a time: all, where there are any
        if logits.device.type == "cpu":
            n_rows = max(1, CPU_BLOCK_LOGITS // vocab)
        grad = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        losses = []
        for start in range(0, n, n_rows):
            rows = slice(start, start + n_rows)
            block = (logits[rows], x0[rows], z[rows], t[rows], weight[rows])
            grad_block = None if grad is None else grad[rows]
            with torch.autocast(logits.device.type, enabled=False):     # bfloat16 would spoil sums
                losses.append(loss_and_grad(*block, noise, grad_block))
        ctx.save_for_backward(grad)
        return torch.cat(losses) if losses else weight  # no tokens: weight is empty too

    @staticmethod
    def backward(ctx, upstream):
        grad, = ctx.saved_tensors
        grad = grad.mul_(upstream[:, None])             # in place: there is one backward pass
        return grad, None, None, None, None, None


def loss_and_grad(
    logits: Tensor, x0: Tensor, z: Tensor, t: Tensor, weight: Tensor, noise: Noise,
    grad: Tensor | None,
) -> Tensor:
    """The loss of some rows (n,); d loss / d logits is written to grad (n, V), if there is one."""
    terms = terms_of(logits, x0, z, t, noise)
    loss = weight * (kl_of(terms) + itakura_saito_of(terms))
    if grad is not None:
        write_grad(terms, weight, grad)
    return loss


class Terms(NamedTuple):
    """What loss and gradient share, for n tokens; letters as at the top of this file."""
    a: Tensor                   # (n,)
    b: Tensor                   # (n,)
    total: Tensor | float       # (n,) C
    ratio: Tensor               # (n,) a / b
    probs: Tensor               # (n, V) p
    q: Tensor                   # (n, V) 1 + ratio p_j, which is q_t(j | p) divided by b / C
    at_x0_and_z: Tensor         # (n, 2) ids
    p_x0: Tensor                # (n,)
    p_z: Tensor                 # (n,) anything at a mask
    r: Tensor                   # (n,) q_t(z | x0) / q_t(z | p)


def terms_of(logits: Tensor, x0: Tensor, z: Tensor, t: Tensor, noise: Noise) -> Terms:
    vocab = logits.shape[1]
    a, _, c, total = noise.row.weights(t, noise.p_uniform)
    b = c / vocab
    ratio = a / b.clamp_min(torch.finfo(logits.dtype).tiny)
    probs = logits.softmax(-1)
    q = (probs * ratio[:, None]).add_(1)
    at_x0_and_z = torch.stack([x0, z.clamp_max(vocab - 1)], 1)
    p_x0, p_z = probs.gather(1, at_x0_and_z).unbind(1)
    r = torch.where(z == x0, 1 + ratio, 1.0) / (1 + ratio * p_z)
    r = torch.where(z == vocab, 1.0, r)                 # masks are as likely in both
    return Terms(a, b, total, ratio, probs, q, at_x0_and_z, p_x0, p_z, r)


def kl_of(terms: Terms) -> Tensor:
    """KL(q_t(. | x0) || q_t(. | p)): divided by b / C, q_t(j | x0) is 1, but 1 + a / b at x0; the
    mask cancels.  -> (n,)"""
    a, b, ratio = terms.a, terms.b, terms.ratio
    sum_log_q = terms.q.log().sum(-1)                   # S
    at_x0 = (a + b) * ratio.log1p() - a * (ratio * terms.p_x0).log1p()
    return (at_x0 - b * sum_log_q) / terms.total


def itakura_saito_of(terms: Terms) -> Tensor:
    """r - log r - 1, which is 0 at a mask.  -> (n,)"""
    return terms.r - terms.r.log() - 1


def write_grad(terms: Terms, weight: Tensor, grad: Tensor) -> None:
    """d loss / d logits into grad (n, V); terms.q and terms.probs are used up."""
    # dL/dp_j: every j has -weight (b / C) ratio / q_j, by S
    of_all = -weight * terms.b / terms.total * terms.ratio
    d_probs = torch.div(of_all[:, None], terms.q, out=terms.q)
    # and x0 and z have more, by the KL's own term and by r, through log(1 + ratio p)
    p_at = torch.stack([terms.p_x0, terms.p_z], 1)
    ratio = terms.ratio[:, None]
    d_log = ratio / (1 + ratio * p_at)                                  # (n, 2)
    by_log = torch.stack([-weight * terms.a / terms.total, weight * (1 - terms.r)], 1)
    d_probs.scatter_add_(1, terms.at_x0_and_z, by_log * d_log)
    # through the softmax: dL/dlogit_j = p_j (dL/dp_j - sum_k p_k dL/dp_k)
    mean = torch.linalg.vecdot(terms.probs, d_probs)[:, None]
    torch.mul(terms.probs, d_probs.sub_(mean), out=grad)
