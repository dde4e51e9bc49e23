"""What a planner and a denoiser learn from a batch of tokens (DDPD, arXiv:2410.06264).

A Task is made on the host, where shapes are known: no training step waits for the device.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.processes import Noise, corrupt


class Task(NamedTuple):
    """A network's input, the tokens that enter its loss, and the loss itself."""
    xt: Tensor                  # (B, N) int64
    t: Tensor                   # (B, 1) or (B, N) noise level
    label: Tensor               # (B,) int64
    sites: Tensor               # (n,) int64 into the flattened (B * N)
    target: Tensor              # (n,) is_noise (float) for a planner, x0 (int64) for a denoiser
    loss: Callable              # (logits (n,) or (n, V), target, *loss_args) -> (n,) nats
    loss_args: tuple[Tensor, ...] = ()      # what else the loss reads, each (n,)
    n_loss_tokens: int = 0      # the loss is divided by this; 0: by the number of sites

    def to(self, device: torch.device) -> "Task":
        if device.type == "cpu":
            return self

        def move(y: Tensor) -> Tensor:
            if device.type == "cuda":                   # copied while the host goes on
                return y.pin_memory().to(device, non_blocking=True)
            return y.to(device)

        xt, t, label, sites, target = (move(y) for y in self[:5])
        loss_args = tuple(map(move, self.loss_args))
        return Task(xt, t, label, sites, target, self.loss, loss_args, self.n_loss_tokens)


def planner_loss(logits: Tensor, is_noise: Tensor) -> Tensor:
    """Binary cross-entropy, nats.  (n,), (n,) -> (n,)"""
    return F.binary_cross_entropy_with_logits(logits, is_noise, reduction="none")


def denoiser_loss(logits: Tensor, x0: Tensor) -> Tensor:
    """Cross-entropy, nats.  (n, V), (n,) -> (n,)"""
    return F.cross_entropy(logits, x0, reduction="none")


def level_per_token(t: Tensor, x0: Tensor, known: Tensor | None) -> Tensor:
    """The noise level of each token, 0 where it is known.  t (B, 1) or (B, N) -> (B, N)"""
    t = t.expand(x0.shape)
    return t if known is None else t.masked_fill(known, 0)


def planner_task(
    x0: Tensor, t: Tensor, label: Tensor, noise: Noise, generator: torch.Generator,
    known: Tensor | None = None,
) -> Task:
    """Which tokens are noise?  The loss covers all unknown tokens (arXiv:2410.06264, eq. 8)."""
    xt, is_noise = corrupt(x0, level_per_token(t, x0, known), noise, generator)
    is_asked = torch.ones_like(is_noise) if known is None else ~known
    sites = is_asked.flatten().nonzero()[:, 0]
    return Task(xt, t, label, sites, is_noise.flatten()[sites].float(), planner_loss)


def denoiser_task(
    x0: Tensor, t: Tensor, label: Tensor, noise: Noise, generator: torch.Generator,
    known: Tensor | None = None, at: str = "noise",
) -> Task:
    """What was this token?  Asked at "noise" or at "all" tokens.

    At noise tokens it learns p(x0 | x_t, noise), a leave-one-out prediction; at all p(x0 | x_t).
    """
    xt, is_noise = corrupt(x0, level_per_token(t, x0, known), noise, generator)
    if at == "noise":
        is_asked = is_noise
    else:
        is_asked = torch.ones_like(is_noise) if known is None else ~known
    sites = is_asked.flatten().nonzero()[:, 0]
    return Task(xt, t, label, sites, x0.flatten()[sites], denoiser_loss)


def pair_tasks(
    x0: Tensor, t: Tensor, label: Tensor, noise: Noise, generator: torch.Generator,
    known: Tensor | None = None,
) -> dict[str, Task]:
    """Planned denoising: BCE of the planner, and CE of the denoiser on noise of its own.

    x0 (B, N), t (B, 1), label (B,); known (B, N) bool: tokens never corrupted nor asked for
    ->  {network: Task}.  `noise` is the denoiser's; where that is masks the planner sees uniform
    noise.
    """
    return {
        "planner": planner_task(x0, t, label, noise.without_masks(), generator, known),
        "denoiser": denoiser_task(x0, t, label, noise, generator, known),
    }


class Fill(NamedTuple):
    """Data of which some tokens were masked, and filled by a denoiser."""
    x: Tensor                   # (n, N) int64
    is_written: Tensor          # (n, N) bool: filled, be it with x0

    def wrong(self, x0: Tensor, label: str) -> Tensor:
        """What a planner is to find: tokens that "differs" from x0, or "written" ones.  (n, N)"""
        return self.x != x0 if label == "differs" else self.is_written


def with_fills(task: Task, x0: Tensor, fill: Fill, label: str) -> Task:
    """A planner's task whose first n rows are fills. Which of their tokens were masked is not
    shown.  x0 (B, N)"""
    n = len(fill.x)
    xt = torch.cat([fill.x, task.xt[n:]])
    wrong = torch.cat([fill.wrong(x0[:n], label), torch.zeros_like(xt[n:], dtype=torch.bool)])
    is_fill = task.sites < fill.x.numel()
    target = torch.where(is_fill, wrong.flatten()[task.sites].float(), task.target)
    return task._replace(xt=xt, target=target)


def fill_task(
    x0: Tensor, t: Tensor, label: Tensor, fill: Fill, fill_label: str, vocab: int,
    known: Tensor | None = None,
) -> Task:
    """A planner's task on a sampler's states: which visible tokens are wrong?  x0 (B, N)"""
    is_asked = fill.x != vocab
    if known is not None:
        is_asked &= ~known
    sites = is_asked.flatten().nonzero()[:, 0]
    target = fill.wrong(x0, fill_label).flatten()[sites].float()
    return Task(fill.x, t, label, sites, target, planner_loss)


def single_tasks(
    x0: Tensor, t: Tensor, label: Tensor, noise: Noise, generator: torch.Generator,
    known: Tensor | None = None,
) -> dict[str, Task]:
    """One network as both: an x0-prediction, from which sampling derives planner and denoiser."""
    return {"denoiser": denoiser_task(x0, t, label, noise, generator, known, at="all")}


def drop_labels(label: Tensor, null_label: int, rate: float, generator: torch.Generator) -> Tensor:
    """Replace a share of labels by the null class, for guidance (arXiv:2207.12598).  -> (B,)"""
    return torch.where(torch.rand(label.shape, generator=generator) < rate, null_label, label)
