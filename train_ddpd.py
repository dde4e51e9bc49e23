"""Train a planner and a denoiser, in one process or as many as torchrun starts.

python train_ddpd.py digits
The same command again resumes a run that was stopped: everything random is a function of (seed,
iteration, micro-batch).
"""

import config

if __name__ == "__main__":
    cfg = config.load()  # before torch: --help and typos answer at once

import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import data
import methods
from support import checkpoint, diagnostics, logs, runtime
from support.meters import Clock, LossMeter
from support.training import (
    Batches,
    Training,
    backward,
    build_training,
    learners_of,
    lr_factor,
    make_folder,
    open_data,
    open_run,
    save,
    stated_meta,
    update_weights,
)
from support.validate import validate_and_log

# The run


def main(cfg: config.Config) -> None:
    if cfg.dry_run:
        meta = stated_meta(cfg)
        spec = methods.spec_of(asdict(cfg), meta) if meta else open_data(cfg)[0]
        diagnostics.dry_run(cfg, spec)
        return
    world = runtime.start(cfg.dtype, cfg.timeout_minutes)
    stop = runtime.Stop(world)
    try:
        run(cfg, stop, world)
    finally:
        stop.restore()


def run(cfg: config.Config, stop: runtime.Stop, world: runtime.World) -> None:
    """Open or resume the run, and train."""
    with ExitStack() as lock:
        opened = None
        with runtime.main_alone(world) as is_mine:      # rank 0 makes the data and the folder
            if is_mine:
                with stop.interrupting():
                    opened = open_all(cfg, world, lock)
        if signal := stop.requested():
            raise SystemExit(128 + signal)
        if opened is None:                              # the other ranks find them made
            opened = open_all(cfg, world)
        spec, splits, state = opened
        build_and_train(cfg, spec, splits, state, stop, world)


def open_all(
    cfg: config.Config, world: runtime.World, lock: ExitStack | None = None,
) -> tuple[methods.Spec, dict[str, data.Split], dict[str, Any] | None]:
    """The data and the run's folder, which stays locked as long as `lock` does.

    ->  spec, splits, checkpoint or None
    """
    folder = Path(cfg.out_dir)
    spec, splits = open_data(cfg)
    make_folder(folder)
    if lock:
        lock.enter_context(checkpoint.locked(folder))
    return spec, splits, open_run(cfg, spec, world)


def build_and_train(
    cfg: config.Config, spec: methods.Spec, splits: dict[str, data.Split],
    state: dict[str, Any] | None, stop: runtime.Stop, world: runtime.World,
) -> None:
    """Train new networks, or those of a checkpoint, unless they are finished."""
    it = state["it"] if state else 0
    complaint = f"{cfg.out_dir} is at another iteration on another machine: all need one folder"
    runtime.require_same_everywhere(it, world, complaint)
    if it >= cfg.max_iters:
        if world.is_main:
            print(f"{cfg.out_dir} is finished: {it} iterations. Raise --max-iters to continue.")
        return
    training = build_training(cfg, spec, state, world.device)
    log = logs.Log(cfg.out_dir, cfg, world)
    if world.is_main:
        known_losses = diagnostics.print_summary(cfg, spec, splits["train"], training.nets, world)
        log.write(
            it, start=True, commit=runtime.commit(), torch=torch.__version__,
            device=str(world.device),
            floors={name: round(value, 5) for name, value in known_losses.items()},
            config=asdict(cfg),
        )
    train_s = train(cfg, spec, splits, training, log, stop, world)
    log.close()
    if world.is_main:
        print(
            f"done: {cfg.max_iters} iterations, {train_s / 60:.1f} minutes of training in this "
            f"start. Next: python sample.py {cfg.out_dir}"
        )


def train(
    cfg: config.Config, spec: methods.Spec, splits: dict[str, data.Split], training: Training,
    log: logs.Log, stop: runtime.Stop, world: runtime.World,
) -> float:
    """All iterations that are left.  -> seconds of training"""
    learners = learners_of(cfg, training, world)
    n_groups = cfg.grad_accumulation_steps * world.size
    batches = Batches(cfg, spec, splits["train"], n_groups, training.ema["denoiser"])
    meter = LossMeter(cfg.out_dir, training.trained, world)
    clock = Clock(training.it, n_groups * cfg.batch_size * spec.shape.n_tokens)
    validated_at_s = 0.0                                # seconds of training, at a validation
    bar = tqdm(
        total=cfg.max_iters, initial=training.it, disable=not world.is_main, dynamic_ncols=True,
        unit="it", mininterval=1,
    )
    while training.it < cfg.max_iters:
        for micro in range(cfg.grad_accumulation_steps):
            tasks = batches.tasks(training.it, micro * world.size + world.rank)
            is_last_micro = micro == cfg.grad_accumulation_steps - 1
            losses = backward(cfg, learners, tasks, world.device, is_last_micro)
            meter.add(losses, training.it)
        meter.add_norms(update_weights(cfg, training))
        training.it += 1
        bar.update()

        is_last = training.it == cfg.max_iters
        signal = stop.requested()
        if is_last or training.it % cfg.log_interval == 0:
            epochs = batches.epochs(training.it)
            # by all processes: means are over all of them
            words = log_losses(cfg, training.it, epochs, meter, clock, log)
            bar.set_postfix_str(words)
        if signal or is_last or is_due(training.it, cfg.save_interval):
            meter.raise_if_nonfinite()
            if not save(cfg, spec, training, world) and (signal or is_last):
                raise SystemExit(
                    f"{cfg.out_dir}: iteration {training.it} could not be saved; the one before "
                    "it is in place"
                )
        if signal:
            bar.close()
            leave(cfg, signal, training.it, log, world)
        if is_last or is_due(training.it, cfg.eval_interval):
            since_last_s = clock.seconds() - validated_at_s
            validated_at_s = clock.seconds()
            with clock.paused(), runtime.main_alone(world) as is_mine:
                if is_mine:
                    with stop.interrupting():
                        bar.write(validate_and_log(
                            cfg, spec, training.ema, splits["val"], training.it, log, world.device,
                            since_last_s,
                        ))
    bar.close()
    if signal := stop.requested():
        leave(cfg, signal, training.it, log, world)
    return clock.train_s


def leave(
    cfg: config.Config, signal: int, it: int, log: logs.Log, world: runtime.World,
) -> None:
    """Exit with the status of a signal, after a checkpoint."""
    if world.is_main:
        is_finished = it >= cfg.max_iters
        rest = "the last validation is left out" if is_finished else "the same command resumes"
        print(f"stopped by signal {signal} at iteration {it}, saved; {rest}")
    log.close()
    sys.exit(128 + signal)


def is_due(it: int, interval: int) -> bool:
    """Is `it` a multiple of the interval?  interval 0: never"""
    return interval > 0 and it % interval == 0


def log_losses(
    cfg: config.Config, it: int, epochs: float, meter: LossMeter, clock: Clock, log: logs.Log,
) -> str:
    """Write the means since the last call into log.jsonl; refuses NaN.  -> losses in words"""
    means = meter.mean()
    rate = clock.tokens_per_s(it)
    losses = {f"{name}_loss": round(value, 5) for name, value in means.items()}
    norms = {f"{name}_grad_norm": round(n, 5) for name, n in meter.mean_norms().items()}
    log.write(
        it, **losses, **norms, lr_factor=round(lr_factor(it - 1, cfg), 5), epochs=round(epochs, 4),
        tokens_per_s=round(rate), train_s=round(clock.train_s, 2),
        peak_mib=round(runtime.peak_bytes(meter.world.device) / 2**20),
    )
    words = [f"{name} {value:.3f}" for name, value in means.items()]
    return ", ".join([*words, f"{rate:.0f} tokens/s"])


if __name__ == "__main__":
    with runtime.one_voice():
        try:
            main(cfg)
        finally:
            runtime.end()
    runtime.leave_without_shutdown()
