"""Times a step of training, of planned denoising, of attention, or the loading of data.

python bench.py train --patches 1 2
python bench.py sample --patches 1 2 --batch-size 10 --peer FOLDER
python bench.py attention
python bench.py load --config digits
Each side runs in a process of its own, in turns: ratios hold on a busy machine, seconds do not.
"""

import typing
from dataclasses import dataclass

import config
from formats.flags import Positive


@dataclass(frozen=True)
class BenchOptions:
    """What is timed, and in which settings: those of a config, and what is given here."""
    work: typing.Literal["train", "sample", "attention", "load"]
    config: str = ""                        # a config whose data and networks are timed
    peer: str = ""                          # folder of a checkout of fal-ai-community/minDDPD
    patches: tuple[int, ...] = ()           # one side for each --patch; (): that of the config
    side: int | None = None                 # tokens per side of the grid; 32, all minDDPD knows
    vocab: int | None = None                # ids; 8
    n_layer: int | None = None              # blocks of each network; 4
    n_head: int | None = None               # heads; 4
    n_embd: int | None = None               # width; 128
    batch_size: int | None = None           # sequences; 16
    n_sites: Positive = 20           # tokens that a step of planned denoising writes
    rounds: Positive = 5             # turns of each side, after one that does not count
    repeats: Positive = 1            # steps in a turn
    compile: bool = False                   # train: a compiled side for each patch, too
    profile: bool = False                   # print where the time of each of our sides goes


@dataclass(frozen=True)
class Flags(BenchOptions):
    """Time a step in interleaved rounds: medians, ratios with their range, and peak memory."""

    GROUPS: typing.ClassVar = {"bench": BenchOptions}


if __name__ == "__main__":
    import sys

    if sys.argv[1:2] != ["worker"]:
        flags = config.load(Flags)

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from support import attention, runtime, timing, training

DEFAULTS = dict(n_layer=4, n_head=4, n_embd=128, batch_size=16)
SIDE = 32
VOCAB = 8
N_CLASSES = 10
N_OPERATORS = 10            # of a profile
LENGTHS = (64, 256, 1024, 4096)             # tokens of a sequence, for attention


def settings_of(flags: Flags) -> dict:
    """What a worker needs: the run as a config, and its data's meta."""
    sizes = {name: getattr(flags, name) for name in DEFAULTS}
    sizes = {name: value for name, value in sizes.items() if value is not None}
    if flags.config:
        stated = config.load(argv=[flags.config])
        meta = training.stated_meta(stated)
        if meta is None or flags.work == "load":
            meta = training.open_data(stated)[0].meta
        values = asdict(stated) | sizes
    else:
        sizes = DEFAULTS | sizes
        meta = dict(name="bench", vocab=VOCAB, grid=[SIDE, SIDE], n_classes=N_CLASSES)
        values = asdict(config.Config(base_width=sizes["n_embd"], **sizes))
    if flags.side:
        meta["grid"] = [flags.side, flags.side]
    if flags.vocab:
        meta["vocab"] = flags.vocab
    meta = dict(given=[]) | meta
    patches = list(flags.patches or (values["patch"],))
    return dict(
        config=values, meta=meta, patches=patches, n_sites=flags.n_sites, repeats=flags.repeats,
        work=flags.work, peer=flags.peer,
    )


# Workers: one process for each side, which answers each line that it reads


def step_of(settings: dict, side: str) -> Callable[[], None]:
    """side: "product", "load", "peer", a patch, or a patch and "compiled"."""
    if side == "product":
        return timing.multiply(settings)
    if side == "load":
        return timing.load_batches(settings)
    steps = {
        "train": (timing.train_ours, timing.train_peer),
        "sample": (timing.sample_ours, timing.sample_peer),
    }
    of_ours, of_peer = steps[settings["work"]]
    if side == "peer":
        return of_peer(settings, settings["peer"])
    patch, *compiled = side.split()
    if compiled:
        settings["config"]["compile"] = True
    return of_ours(settings, int(patch))


def work(settings: dict, side: str) -> None:
    """Answer "step" with seconds and bytes, "flops" and "profile" with what they say."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                                       # what a peer prints is no answer
    device = runtime.pick_device()
    before = 0 if device.type == "cuda" else runtime.peak_bytes(device)
    step = step_of(settings, side)
    for line in sys.stdin:
        if line.strip() == "step":
            seconds = seconds_of(step, settings["repeats"])
            answer = [seconds, runtime.peak_bytes(device) - before]
        elif line.strip() == "flops":
            answer = timing.count_flops(settings, int(side.split()[0]))
        else:
            answer = profile_of(step)
        print(json.dumps(answer), file=answers, flush=True)


def seconds_of(step: Callable[[], None], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - began) / repeats


def profile_of(step: Callable[[], None]) -> list[tuple[str, float]]:
    """The operators that take most of a step's time.  -> (name, share)"""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    with profile(activities=activities) as profiler:
        step()
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    times = {row.key: getattr(row, time_of) for row in profiler.key_averages()}
    total = sum(times.values())
    most = sorted(times, key=times.get, reverse=True)[:N_OPERATORS]
    return [(name, times[name] / total) for name in most]


class Worker:
    NAMES: typing.ClassVar = {"peer": "minDDPD", "product": "product", "load": "load"}

    def __init__(self, settings: dict, side: str):
        command = [sys.executable, __file__, "worker", json.dumps(settings), side]
        self.side = side
        self.name = self.NAMES.get(side, f"patch {side}")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )
        self.first_s = 0.0                  # of the first turn, which warms up and compiles
        self.seconds = []
        self.bytes = 0

    @property
    def is_ours(self) -> bool:
        return self.side not in self.NAMES

    def ask(self, question: str):
        with suppress(BrokenPipeError):
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            said = self.process.stderr.read().strip().splitlines()
            raise SystemExit(f"{self.name}: {said[-1] if said else 'it ended'}")
        return json.loads(answer)


def run_sides(settings: dict, sides: list[str], rounds: int) -> list[Worker]:
    """All sides in turns; the first turn warms up."""
    workers = [Worker(settings, side) for side in sides]
    for round_ in range(rounds + 1):
        for worker in workers:
            seconds, worker.bytes = worker.ask("step")
            if round_:
                worker.seconds.append(seconds)
            else:
                worker.first_s = seconds
    return workers


# Reports


def describe(settings: dict) -> str:
    values, meta = settings["config"], settings["meta"]
    grid = "x".join(map(str, meta["grid"]))
    return (
        f"{values['batch_size']} x {grid} tokens, V = {meta['vocab']}, {values['n_layer']} layers "
        f"of width {values['n_embd']}, {values['n_head']} heads; "
        f"{runtime.device_name(runtime.pick_device())}, torch {torch.__version__}, commit "
        f"{runtime.commit()}"
    )


def report_steps(settings: dict, workers: list[Worker]) -> None:
    """Medians, and ratios to the last side within each round."""
    work = "training" if settings["work"] == "train" else "the sampler"
    print(f"one step of {work}: {describe(settings)}")
    last = workers[-1]
    n_tokens = settings["config"]["batch_size"]
    for n in settings["meta"]["grid"]:
        n_tokens *= n
    is_training = settings["work"] == "train"
    rate_name = "tokens/s" if is_training else "samples/s at 128 NFE"
    print(
        f"| side | median seconds | {rate_name} | times faster (range of rounds) "
        "| peak memory, MB | ratio | first step, s |"
    )
    print("|---|---|---|---|---|---|---|")
    for worker in workers:
        seconds = statistics.median(worker.seconds)
        n_samples = settings["config"]["batch_size"] / 64       # two calls in each of 64 steps
        rate = (n_tokens if is_training else n_samples) / seconds
        print(
            f"| {worker.name} | {seconds:.3g} | {rate:.3g} | {ratio(last, worker)} "
            f"| {worker.bytes / 1e6:.0f} | {worker.bytes / last.bytes:.2f} "
            f"| {worker.first_s:.3g} |"
        )


def ratio(one: Worker, other: Worker) -> str:
    """How many times as long one takes as the other, within each round: median and range."""
    ratios = sorted(a / b for a, b in zip(one.seconds, other.seconds, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def report_flops(worker: Worker, product: Worker) -> None:
    """FLOPs of a step, and the share of a matrix product's rate that it reaches."""
    flops = worker.ask("flops")
    of_product = 2 * timing.PRODUCT**3
    shares = [
        flops["formula"] / step_s / (of_product / product_s)
        for step_s, product_s in zip(worker.seconds, product.seconds, strict=True)
    ]
    rate = of_product / statistics.median(product.seconds)
    print(
        f"{worker.name}: {flops['formula'] / 1e9:.1f} GFLOP by formula, "
        f"{flops['counter'] / 1e9:.1f} by PyTorch's counter; "
        f"{statistics.median(shares):.0%} of the rate of a matrix product, {rate / 1e9:.0f} GFLOP/s"
    )


def report_profile(worker: Worker) -> None:
    shares = [f"{name} {share:.0%}" for name, share in worker.ask("profile")]
    print(f"{worker.name}: " + ", ".join(shares))


def time_sides(flags: Flags) -> None:
    settings = settings_of(flags)
    is_training = flags.work == "train"
    if flags.compile and not is_training:
        raise SystemExit("--compile is for steps of training")
    sides = []
    for patch in settings["patches"]:
        sides += [str(patch), *[f"{patch} compiled"] * flags.compile]
    sides += ["peer"] * bool(flags.peer)
    workers = run_sides(settings, [*["product"] * is_training, *sides], flags.rounds)
    product = workers.pop(0) if is_training else None
    report_steps(settings, workers)
    for worker in workers:
        if worker.is_ours and product:
            report_flops(worker, product)
        if worker.is_ours and flags.profile:
            report_profile(worker)
    for worker in [*workers, *[product] * is_training]:
        worker.process.kill()


def time_loading(flags: Flags) -> None:
    if not flags.config:
        raise SystemExit("load needs a --config, whose data is loaded")
    settings = settings_of(flags) | dict(work="train")
    patch = str(settings["patches"][0])
    load, step = run_sides(settings, ["load", patch], flags.rounds)
    print(f"loading a batch: {describe(settings)}")
    print(
        f"{statistics.median(load.seconds):.3g} s for a batch, read, corrupted and moved to the "
        f"device; a step of training takes {ratio(step, load)} times as long"
    )
    for worker in (load, step):
        worker.process.kill()


# Attention


def time_attention(flags: Flags) -> None:
    """Forward and backward by each kernel, for all lengths and as many tokens in each batch."""
    settings = settings_of(flags)
    values = settings["config"]
    device = runtime.pick_device()
    head_dim = values["n_embd"] // values["n_head"]
    kernels = {
        "fused": attention.fused, "plain": attention.plain, "blockwise": attention.in_blocks,
        "by the rule": attention.attend,
    }
    n_tokens = values["batch_size"] * SIDE**2
    print(
        f"attention forward and backward: {n_tokens} tokens, {values['n_head']} heads of width "
        f"{head_dim}; {runtime.device_name(device)}, torch {torch.__version__}, commit "
        f"{runtime.commit()}; median milliseconds"
    )
    print("| dtype | tokens of a sequence | " + " | ".join(kernels) + " |")
    print("|---|---|" + "---|" * len(kernels))
    for dtype in (torch.bfloat16, torch.float32):
        for length in LENGTHS:
            shape = (max(1, n_tokens // length), values["n_head"], length, head_dim)
            inputs = [torch.randn(shape, device=device, dtype=dtype).requires_grad_()
                      for _ in range(3)]
            seconds = time_kernels(list(kernels.values()), inputs, flags.rounds)
            row = " | ".join(f"{1e3 * s:.1f}" for s in seconds)
            print(f"| {str(dtype).removeprefix('torch.')} | {length} | {row} |")


def time_kernels(kernels: list[Callable], inputs: list[Tensor], rounds: int) -> list[float]:
    """Medians of the rounds, after one that does not count, in seconds."""
    seconds = []
    for _ in range(rounds + 1):
        seconds.append([])
        for kernel in kernels:
            began = time.perf_counter()
            run_kernel(kernel, inputs)
            seconds[-1].append(time.perf_counter() - began)
    return [statistics.median(column) for column in zip(*seconds[1:], strict=True)]


def run_kernel(kernel: Callable, inputs: list[Tensor]) -> None:
    with runtime.autocast(inputs[0].device, str(inputs[0].dtype).removeprefix("torch.")):
        out = kernel(*inputs, inputs[0].shape[-1] ** -0.5)
    out.backward(torch.ones_like(out))
    inputs[0].grad[0, 0, 0, 0].item()                   # waits for the device


def main(flags: Flags) -> None:
    if flags.work == "attention":
        time_attention(flags)
    elif flags.work == "load":
        time_loading(flags)
    else:
        time_sides(flags)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        work(json.loads(sys.argv[2]), sys.argv[3])
    else:
        with runtime.one_voice():
            main(flags)
