"""What each network learns.   Tasks are made on the host, where shapes are known: no step waits for the device."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from diffusion.processes import corrupt, from_self, stratified_t

CACHED = 2**18         # logits of GIDD's loss at once on a CPU: about nine passes are made over them


class Task(NamedTuple):
    """Inputs of a network, the tokens that enter its loss, and what it should say there."""
    xt: torch.Tensor        # (B, N) int64
    t: torch.Tensor         # (B, 1) noise level
    label: torch.Tensor     # (B,) int64
    sites: torch.Tensor     # (n,) int64 into the flattened (B * N)
    target: torch.Tensor    # (n,) is_noise (float) for a planner, x0 (int64) for a denoiser
    more: tuple = ()        # what else its loss reads, each (n,)
    n: int = 0              # losses are summed and divided by this; 0: by the number of sites

    def to(self, device):
        if device.type != "cuda":
            return self
        host = [*self[:5], *self.more]
        moved = [y.pin_memory().to(device, non_blocking=True) for y in host]
        return Task(*moved[:5], tuple(moved[5:]), self.n)


def planner_task(x0, t, label, vocab, generator):
    """Which tokens of a uniformly corrupted sequence are noise?   all tokens; arXiv:2410.06264, eq. 8"""
    xt, is_noise = corrupt(x0, t, "uniform", vocab, generator)
    return Task(xt, t, label, torch.arange(x0.numel()), is_noise.flatten().float())


def denoiser_task(x0, t, label, vocab, generator, process, tokens="noise"):
    """What was this token?   tokens: "noise" predicts from the others, "all" from the token itself too"""
    xt, is_noise = corrupt(x0, t, process, vocab, generator)
    sites = is_noise.flatten().nonzero()[:, 0] if tokens == "noise" else torch.arange(x0.numel())
    return Task(xt, t, label, sites, x0.flatten()[sites])


def ddpd(x0, t, label, vocab, generator, nets, denoiser_process):
    """Planned denoising: BCE of the planner + CE of the denoiser.  x0 (B, N), t (B, 1), label (B,)  ->  {name: Task}"""
    if nets == "single":
        return {"denoiser": denoiser_task(x0, t, label, vocab, generator, "uniform", "all")}
    return {"planner": planner_task(x0, t, label, vocab, generator),
            "denoiser": denoiser_task(x0, t, label, vocab, generator, denoiser_process)}


def gidd(x0, t, label, vocab, generator, p_uniform, weight, clean_share=1.0):
    """GIDD (arXiv:2503.04482): one denoiser on hybrid noise, all tokens by the bound's loss.  -> {name: Task}

    weight: kind of gidd_weight; clean_share of the clean tokens enter, weighted up: the same on average, a cheaper head
    """
    xt, _ = corrupt(x0, t, "hybrid", vocab, generator, p_uniform)
    level = t.expand(x0.shape)
    is_in = xt == vocab if p_uniform == 0 else (xt != x0) | (torch.rand(x0.shape, generator=generator) < clean_share)
    sites = is_in.flatten().nonzero()[:, 0]
    target, z, at = (y.flatten()[sites] for y in (x0, xt, level))
    w = gidd_weight(target, z, at, vocab, p_uniform, weight)
    w = torch.where(z == target, w / clean_share, w)
    return {"denoiser": Task(xt, t, label, sites, target, (z, at, w), x0.numel())}


def drop_labels(label, null_label, share, generator):
    """Replace a share of labels by the null class, for classifier-free guidance (arXiv:2207.12598).  (B,) -> (B,)"""
    return torch.where(torch.rand(label.shape, generator=generator) < share, null_label, label)


def planner_loss(logits, is_noise):
    """Binary cross-entropy, nats.  (n,), (n,) -> (n,)"""
    return F.binary_cross_entropy_with_logits(logits, is_noise, reduction="none")


def denoiser_loss(logits, x0):
    """Cross-entropy, nats.  (n, V), (n,) -> (n,)"""
    return F.cross_entropy(logits, x0, reduction="none")


class GiddLoss(torch.autograd.Function):
    """KL(q_t(.|x0) || q_t(.|p)) + IS(q_t(z|x0) || q_t(z|p)) of each row, times a weight; arXiv:2503.04482, eq. 14.

    logits (n, V) of the others-prediction p, z (n,) in [0, V], t and weight (n,)  ->  (n,) nats. The gradient is formed
    in the forward pass: two sums over a row (its logsumexp, then S) and what stands at x0 and z make both.
    """

    @staticmethod
    def forward(ctx, logits, x0, z, t, weight, p_uniform):
        n, vocab = logits.shape
        block = max(1, CACHED // vocab) if logits.device.type == "cpu" else n
        grad, losses = torch.empty_like(logits) if ctx.needs_input_grad[0] else None, []
        for i in range(0, n, block):
            rows = slice(i, i + block)
            into = None if grad is None else grad[rows]
            losses.append(gidd_rows(*(y[rows] for y in (logits, x0, z, t, weight)), p_uniform, into))
        ctx.save_for_backward(grad)
        return torch.cat(losses) if losses else weight

    @staticmethod
    def backward(ctx, upstream):
        return ctx.saved_tensors[0].mul_(upstream[:, None]), None, None, None, None, None   # once: autograd checks


def gidd_rows(logits, x0, z, t, weight, p_uniform, grad=None):
    """The loss of some rows; its gradient is written to grad (n, V).  -> (n,)"""
    vocab = logits.shape[1]
    c = 2 * p_uniform / (1 - p_uniform) * (t * (1 - t)).sqrt()
    a, b, total = 1 - t, c / vocab, 1 + c
    ratio = a / b.clamp_min(torch.finfo(logits.dtype).tiny)             # a / b
    probs = logits.softmax(-1)                                          # (n, V)
    at = torch.stack([x0, z.clamp_max(vocab - 1)], 1)                   # (n, 2)
    px, pz = probs.gather(1, at).unbind(1)
    is_mask, is_clean = z == vocab, z == x0
    q = (probs * ratio[:, None]).add_(1)                                # (n, V): q_t(j | p) / q_t(j | noise)
    kl = ((a + b) * ratio.log1p() - a * (ratio * px).log1p() - b * q.log().sum(-1)) / total
    r = torch.where(is_clean, 1 + ratio, 1.0) / (1 + ratio * pz)        # q_t(z | x0) / q_t(z | p)
    mismatch = torch.where(is_mask, 0.0, r - r.log() - 1)
    if grad is not None:
        h = torch.div((-weight * b / total * ratio)[:, None], q, out=q)                     # dL/dp, in place
        g = ratio[:, None] / (1 + ratio[:, None] * torch.stack([px, pz], 1))
        own = torch.stack([-weight * a / total, torch.where(is_mask, 0.0, weight * (1 - r))], 1)
        h.scatter_add_(1, at, own * g)
        torch.mul(probs, h.sub_(torch.linalg.vecdot(probs, h)[:, None]), out=grad)
    return weight * (kl + mismatch)


def gidd_weight(x0, z, t, vocab, p_uniform, kind):
    """Weight of each token's loss: "elbo" as the bound has it, "clip" that but at most 1, or "dynamic".  (n,) -> (n,)

    dynamic: mask 2, other token 1, clean token r / (1 + r), r = (B / V) sqrt(t / (1 - t))
    """
    is_mask, is_clean = z == vocab, z == x0
    strength = 2 * p_uniform / (1 - p_uniform)
    if kind == "dynamic":
        r = strength / vocab * (t / (1 - t)).sqrt()
        return torch.where(is_mask, 2.0, torch.where(is_clean, r / (1 + r), 1.0))
    b = strength * (t * (1 - t)).sqrt() / vocab
    odds = 1 / (t * (1 - t))
    weight = torch.where(is_mask, odds, torch.where(is_clean, odds / 2 * b / (1 - t + b), odds / 2))
    return weight.clamp_max(1.0) if kind == "clip" else weight


def gidd_loss(logits, x0, z, t, weight, p_uniform):
    """The loss above; without uniform noise weight (1 - t) CE at masks and nothing elsewhere.  -> (n,)"""
    if p_uniform == 0:
        ce = F.cross_entropy(logits, x0, reduction="none")
        return torch.where(z == logits.shape[1], weight * (1 - t) * ce, 0.0)
    return GiddLoss.apply(logits, x0, z, t, weight, p_uniform)


def floors(x0, label, vocab, nets, denoiser_process, generator, n_rows=2048):
    """Least losses on fresh noise over a few sequences that are known by heart: Bayes' rule over all of them.

    x0 (S, N), label (S,)  ->  {name: nats per token}, by n_rows draws of noise
    """
    row = torch.arange(n_rows) % len(x0)
    t = stratified_t(n_rows, generator)
    tasks = ddpd(x0[row], t, label[row], vocab, generator, nets, denoiser_process)
    is_peer = (label[row][:, None] == label).double().log()             # (R, S): the label rules the others out
    out = {}
    for name, task in tasks.items():
        hit = task.xt[:, None] == x0                                    # (R, S, N)
        if name == "planner":                                           # is told no t: the sum is over levels too
            u = (torch.arange(256, dtype=torch.float64) + 0.5) / 256
            match, miss, n_hit = (1 - u + u / vocab).log(), (u / vocab).log(), hit.sum(-1, keepdim=True)
            joint = is_peer[..., None] + n_hit * match + (x0.shape[1] - n_hit) * miss           # (R, S, levels)
            w = joint.flatten(1).softmax(1).view_as(joint)
            clean = torch.einsum("rsn,rs->rn", hit.double(), (w * (1 - (miss - match).exp())).sum(-1))
            p_true = torch.where(task.target.view_as(clean) > 0, 1 - clean, clean).flatten()
        else:
            level = t.double()[:, None]
            like = torch.where(hit, (1 - level + level / vocab).log(), (level / vocab).log())   # (R, S, N)
            like = torch.where(task.xt[:, None] == vocab, 0.0, like)
            if denoiser_process == "mask":
                like = torch.where(hit | (task.xt[:, None] == vocab), 0.0, -torch.inf)
            total = is_peer + like.sum(-1)                              # (R, S)
            w = (total if nets == "single" or denoiser_process == "mask" else total[..., None] - like).softmax(1)
            w = w.view(*w.shape[:2], -1)                                # masks have no evidence of their own
            p_true = (w * (x0 == x0[row][:, None])).sum(1).flatten()[task.sites]
        out[name] = -p_true.clamp_min(1e-12).log().mean().item()
    return out


LOSSES = {"planner": planner_loss, "denoiser": denoiser_loss}


# Likelihoods: bounds on -log p(x0). Each is E over t of what these functions return, nats per sequence.


def masked_bound(q, x, x0, t):
    """Masked diffusion: (1/t) CE at masks. Tight for an exact q.  q (B, N, V) probabilities, t (B, 1) -> (B,)"""
    ce = -q.gather(-1, x0[..., None])[..., 0].log()
    return (torch.where(x == q.shape[-1], ce, 0.0) / t).sum(1)


def share_of_noise(x, x0, t, vocab):
    """P(noise | x_t, x0) under uniform noise.  -> (B, N)"""
    return torch.where(x != x0, 1.0, t / vocab / (1 - t + t / vocab))


def leap_bound(p, q, x, x0, t):
    """Planner p (B, N) and denoiser q (B, N, V) under the law of schedule leap; loose even where both are exact."""
    noise = share_of_noise(x, x0, t, q.shape[-1])
    q0 = q.gather(-1, x0[..., None])[..., 0]
    return ((p - noise - noise * (p * q0).log()) / t).sum(1)


def renoise_bound(p, q, x, x0, t):
    """The same two in the chain that also re-noises, as ancestral sampling does; tight where both are exact."""
    redrawn = 1 / (q.shape[-1] * (1 - t))[..., None]                    # rate of falling to any one id
    noise = share_of_noise(x, x0, t, q.shape[-1])[..., None]
    is_x0 = torch.zeros_like(q).scatter(-1, x0[..., None], 1.0)
    model, truth = p[..., None] * (q / t[..., None] + redrawn), noise * (is_x0 / t[..., None] + redrawn)
    terms = model - truth + torch.special.xlogy(truth, truth / model)
    return terms.scatter(-1, x[..., None], 0.0).sum((1, 2))


@torch.no_grad()
def bits_per_token(nets, kind, x0, label, vocab, generator, p_uniform=0.1, most=2**24):
    """Upper bounds on -log2 p(x0) / N, one level for each sequence: t = u^2, u stratified on (0, 1), weight 2u.

    nets {name: net}, kind as in samplers.FITS, x0 (n, N), label (n,)  ->  {bound: (bits per token, standard error)}
    """
    n, n_tokens = x0.shape
    u = ((torch.arange(n) + torch.rand(n, generator=generator)) / n).to(x0.device, torch.float64)[:, None]
    order = torch.randperm(n, generator=generator)
    t, rows = (u**2).clamp(1e-8, 1 - 1e-8), {}
    for i in torch.arange(n).split(max(1, min(64, most // (n_tokens * vocab)))):
        x0_, label_, t_ = x0[order[i]], label[order[i]], t[i]
        process = {"maskd": "mask", "gidd": "hybrid"}.get(kind, "uniform")
        x = corrupt(x0_.cpu(), t_.cpu(), process, vocab, generator, p_uniform)[0].to(x0.device)
        logits = nets["denoiser"](x, t_.float(), label_).double()
        q = logits.softmax(-1)
        if kind == "gidd":
            target, z, at = (y.flatten() for y in (x0_, x, t_.expand(x.shape)))
            weight = gidd_weight(target, z, at, vocab, p_uniform, "elbo")
            seen = {"gidd": gidd_loss(logits.flatten(0, 1), target, z, at, weight, p_uniform).view(x.shape).sum(1)}
        elif kind == "maskd":
            seen = {"masked": masked_bound(q, x, x0_, t_)}
        else:
            if kind == "single":
                p, q = from_self(q, x, t_)
            else:
                p = nets["planner"](x, t_.float(), label_).double().sigmoid()
            seen = {"renoise": renoise_bound(p, q, x, x0_, t_), "leap": leap_bound(p, q, x, x0_, t_)}
        for name, nats in seen.items():
            rows.setdefault(name, []).append(2 * u[i, 0] * nats / (n_tokens * math.log(2)))
    out = {}
    for name, parts in rows.items():
        y = torch.cat(parts)
        pairs = y[: n - n % 2].view(-1, 2).diff(dim=1)                  # neighbouring strata differ by noise alone
        out[name] = (y.mean().item(), pairs.square().sum().sqrt().item() / n)
    return out
