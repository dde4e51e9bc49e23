"""What each network learns.   Tasks are made on the host, where shapes are known: no step waits for the device."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from diffusion.processes import corrupt


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


LOSSES = {"planner": planner_loss, "denoiser": denoiser_loss}
