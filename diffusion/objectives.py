"""What a planner and a denoiser learn from a batch of tokens (DDPD, arXiv:2410.06264).

A Task is made on the host, since the number of its sites depends on the noise: counted on the
device, it would make every training step wait.
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
            if device.type == "cuda":                   # copied while the host works on
                return y.pin_memory().to(device, non_blocking=True)
            return y.to(device)

        names = ("xt", "t", "label", "sites", "target")
        moved = {name: move(getattr(self, name)) for name in names}
        return self._replace(**moved, loss_args=tuple(map(move, self.loss_args)))


def planner_loss(logits: Tensor, is_noise: Tensor) -> Tensor:
    """Binary cross-entropy, nats.  (n,), (n,) -> (n,)"""
    return F.binary_cross_entropy_with_logits(logits, is_noise, reduction="none")


def denoiser_loss(logits: Tensor, x0: Tensor) -> Tensor:
    """Cross-entropy, nats.  (n, V), (n,) -> (n,)"""
    return F.cross_entropy(logits, x0, reduction="none")


def flat_sites(is_asked: Tensor) -> Tensor:
    """Where a bool tensor (B, N) is true, as indices into the flattened (B * N).  -> (n,)"""
    return is_asked.flatten().nonzero()[:, 0]


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
    sites = flat_sites(torch.ones_like(is_noise) if known is None else ~known)
    return Task(xt, t, label, sites, is_noise.flatten()[sites].float(), planner_loss)


def denoiser_task(
    x0: Tensor, t: Tensor, label: Tensor, noise: Noise, generator: torch.Generator,
    known: Tensor | None = None, at: str = "noise",
) -> Task:
    """What was this token?  The loss covers noise tokens (at "noise"), or unknown ones ("all").

    On noise tokens a network learns the leave-one-out prediction p(x0 | x_t, noise here), on all of
    them the x0-prediction p(x0 | x_t).
    """
    xt, is_noise = corrupt(x0, level_per_token(t, x0, known), noise, generator)
    if at == "noise":
        is_asked = is_noise
    else:
        is_asked = torch.ones_like(is_noise) if known is None else ~known
    sites = flat_sites(is_asked)
    return Task(xt, t, label, sites, x0.flatten()[sites], denoiser_loss)


def pair_tasks(
    x0: Tensor, t: Tensor, label: Tensor, noise: Noise, generator: torch.Generator,
    known: Tensor | None = None,
) -> dict[str, Task]:
    """Planned denoising: BCE of the planner, and CE of the denoiser on noise of its own.

    x0 (B, N), t (B, 1), label (B,); known (B, N) bool: tokens never corrupted nor asked for
    ->  {network: Task}.  `noise` is the denoiser's; if it has masks, the planner sees uniform noise
    instead.
    """
    return {
        "planner": planner_task(x0, t, label, noise.without_masks(), generator, known),
        "denoiser": denoiser_task(x0, t, label, noise, generator, known),
    }


def single_tasks(
    x0: Tensor, t: Tensor, label: Tensor, noise: Noise, generator: torch.Generator,
    known: Tensor | None = None,
) -> dict[str, Task]:
    """One network as both: an x0-prediction, from which sampling derives planner and denoiser."""
    return {"denoiser": denoiser_task(x0, t, label, noise, generator, known, at="all")}


# A planner that learns from the denoiser's own draws


class Fill(NamedTuple):
    """Sequences in which some tokens were masked, and then filled in by a denoiser."""
    x: Tensor                   # (n, N) int64
    is_written: Tensor          # (n, N) bool: filled in, even if with x0

    def wrong(self, x0: Tensor, fill_label: str) -> Tensor:
        """The planner's target: tokens that differ from x0 ("differs"), or all that were filled in
        ("written").  -> (n, N) bool"""
        return self.x != x0 if fill_label == "differs" else self.is_written


def with_fills(task: Task, x0: Tensor, fill: Fill, fill_label: str) -> Task:
    """A planner's task with its first n rows replaced by fills.  x0 (B, N)

    All their unknown tokens stay in the loss: the planner is not shown which were masked.
    """
    n = len(fill.x)
    xt = torch.cat([fill.x, task.xt[n:]])
    is_wrong = fill.wrong(x0[:n], fill_label).flatten()
    is_in_fill = task.sites < fill.x.numel()            # sites are flat, and the fills come first
    target = task.target.clone()
    target[is_in_fill] = is_wrong[task.sites[is_in_fill]].float()
    return task._replace(xt=xt, target=target)


def fill_task(
    x0: Tensor, t: Tensor, label: Tensor, fill: Fill, fill_label: str, vocab: int,
    known: Tensor | None = None,
) -> Task:
    """A planner's task on states that may hold masks: which visible tokens are wrong?

    x0 (B, N), a fill of each row, known (B, N) bool or None. Masks (id vocab) and known tokens are
    not asked about.
    """
    is_asked = fill.x != vocab
    if known is not None:
        is_asked &= ~known
    sites = flat_sites(is_asked)
    target = fill.wrong(x0, fill_label).flatten()[sites].float()
    return Task(fill.x, t, label, sites, target, planner_loss)


def drop_labels(label: Tensor, null_label: int, rate: float, generator: torch.Generator) -> Tensor:
    """Replace a share of labels by the null class, for guidance (arXiv:2207.12598).  -> (B,)"""
    return torch.where(torch.rand(label.shape, generator=generator) < rate, null_label, label)
