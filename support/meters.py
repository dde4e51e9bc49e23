"""What a training loop measures: losses, without waiting for the device, and its own speed."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from support.runtime import World


class LossMeter:
    """Mean losses of all processes and mean gradient norms, which DDP makes the same in all of
    them; nothing waits for the device until they are read."""

    def __init__(self, out_dir: str, names: list[str], world: World):
        self.out_dir = out_dir
        self.names = names
        self.world = world
        self.sum = torch.zeros(len(names), device=world.device)
        self.count = 0
        self.norms = torch.zeros(len(names), device=world.device)
        self.n_norms = 0
        self.first_bad = torch.full((), math.inf, device=world.device)      # iteration of a NaN

    def add(self, losses: Tensor, it: int) -> None:
        self.sum += losses.detach()
        self.count += 1
        is_good = self.sum.isfinite().all()
        self.first_bad = torch.where(is_good, self.first_bad, self.first_bad.clamp_max(it))

    def add_norms(self, norms: Tensor) -> None:
        """Gradient norms (n_nets,) of an iteration."""
        self.norms += norms
        self.n_norms += 1

    def mean_norms(self) -> dict[str, float]:
        """Means since the last call."""
        mean = self.norms / max(1, self.n_norms)
        self.norms.zero_()
        self.n_norms = 0
        return dict(zip(self.names, mean.tolist(), strict=True))

    def mean(self) -> dict[str, float]:
        """Means since the last call."""
        mean = self.sum / max(1, self.count)
        if self.world.size > 1:
            dist.all_reduce(mean)
            mean /= self.world.size
        means = dict(zip(self.names, mean.tolist(), strict=True))
        self.raise_if_nonfinite(means)
        self.sum.zero_()
        self.count = 0
        return means

    def raise_if_nonfinite(self, means: dict[str, float] | None = None) -> None:
        """A loss that was NaN or inf ends the run, its checkpoints untouched."""
        bad = self.first_bad.clone()
        if self.world.size > 1:
            dist.all_reduce(bad, dist.ReduceOp.MIN)
        if bad.isfinite():
            said = ", ".join(f"{name} {value:.4g}" for name, value in (means or {}).items())
            raise SystemExit(
                f"a loss of {self.out_dir} is not finite at iteration {int(bad)} ({said}): "
                "lower the lr; the last checkpoint is untouched"
            )


class Clock:
    """Seconds of training, pauses left out, and tokens per second since the last reading."""

    def __init__(self, it: int, tokens_per_it: int):
        self.tokens_per_it = tokens_per_it
        self.train_s = 0.0
        self.last = (time.perf_counter(), it)

    def tokens_per_s(self, it: int) -> float:
        now = time.perf_counter()
        then, then_it = self.last
        self.last = (now, it)
        self.train_s += now - then
        return (it - then_it) * self.tokens_per_it / (now - then)

    def seconds(self) -> float:
        """Of training, up to now."""
        return self.train_s + time.perf_counter() - self.last[0]

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        then, then_it = self.last
        self.last = (then + time.perf_counter() - began, then_it)
