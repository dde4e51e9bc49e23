"""What each network learns.   Tasks are made on the host, where shapes are known: no step waits for the device."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from diffusion.processes import corrupt, from_self, stratified_t


class Task(NamedTuple):
    """Inputs of a network, the tokens that enter its loss, and what it should say there."""
    xt: torch.Tensor        # (B, N) int64
    t: torch.Tensor         # (B, 1) noise level
    label: torch.Tensor     # (B,) int64
    sites: torch.Tensor     # (n,) int64 into the flattened (B * N)
    target: torch.Tensor    # (n,) is_noise (float) for a planner, x0 (int64) for a denoiser

    def to(self, device):
        if device.type != "cuda":
            return self
        return Task(*[y.pin_memory().to(device, non_blocking=True) for y in self])


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


def drop_labels(label, null_label, share, generator):
    """Replace a share of labels by the null class, for classifier-free guidance (arXiv:2207.12598).  (B,) -> (B,)"""
    return torch.where(torch.rand(label.shape, generator=generator) < share, null_label, label)


def planner_loss(logits, is_noise):
    """Binary cross-entropy, nats.  (n,), (n,) -> (n,)"""
    return F.binary_cross_entropy_with_logits(logits, is_noise, reduction="none")


def denoiser_loss(logits, x0):
    """Cross-entropy, nats.  (n, V), (n,) -> (n,)"""
    return F.cross_entropy(logits, x0, reduction="none")


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
def bits_per_token(nets, kind, x0, label, vocab, generator, most=2**24):
    """Upper bounds on -log2 p(x0) / N, one level for each sequence: t = u^2, u stratified on (0, 1), weight 2u.

    nets {name: net}, kind as in samplers.FITS, x0 (n, N), label (n,)  ->  {bound: (bits per token, standard error)}
    """
    n, n_tokens = x0.shape
    u = ((torch.arange(n) + torch.rand(n, generator=generator)) / n).to(x0.device, torch.float64)[:, None]
    order = torch.randperm(n, generator=generator)
    t, rows = (u**2).clamp(1e-8, 1 - 1e-8), {}
    for i in torch.arange(n).split(max(1, most // (n_tokens * vocab))):
        x0_, label_, t_ = x0[order[i]], label[order[i]], t[i]
        host = corrupt(x0_.cpu(), t_.cpu(), "mask" if kind == "maskd" else "uniform", vocab, generator)[0]
        x = host.to(x0.device)
        q = nets["denoiser"](x, t_.float(), label_).double().softmax(-1)
        if kind == "maskd":
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
