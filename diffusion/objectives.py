"""What each network learns.   Tasks are made on the host, where shapes are known: no step waits for the device."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from diffusion.processes import corrupt, stratified_t


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
