"""Times a step of training, or of the sampler, beside a checkout of minDDPD in the same settings.

python bench.py train --patches 1 2
python bench.py sample --patches 1 2 --batch-size 10 --peer FOLDER
Each side runs in a process of its own, in turns: ratios hold on a busy machine, seconds do not.
"""

import typing
from dataclasses import dataclass

import config


@dataclass(frozen=True)
class BenchOptions:
    """What is timed, and in which settings."""
    work: typing.Literal["train", "sample"]     # a step of training, or of planned denoising
    peer: str = ""                          # folder of a checkout of fal-ai-community/minDDPD
    patches: tuple[int, ...] = (1,)         # one side for each --patch
    side: config.Positive = 32              # tokens per side of the grid; minDDPD knows 32 alone
    vocab: config.Positive = 8              # ids
    n_layer: config.Layers = 4              # blocks of each network
    n_head: config.Positive = 4             # heads
    n_embd: config.Positive = 128           # width
    batch_size: config.Positive = 16        # sequences
    n_sites: config.Positive = 20           # tokens that a step of the sampler writes
    rounds: config.Positive = 5             # turns of each side, after one that does not count
    repeats: config.Positive = 1            # steps in a turn


@dataclass(frozen=True)
class Flags(BenchOptions):
    """Time a step in interleaved rounds: medians, ratios with their range, and peak memory."""

    GROUPS: typing.ClassVar = {"bench": BenchOptions}


if __name__ == "__main__":
    import sys

    if sys.argv[1:2] != ["worker"]:
        flags = config.load(Flags)

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

import torch

N_CLASSES = 10

# A side is a function of the settings that returns a function of one step


def our_step(settings: dict, patch: int) -> Callable[[], None]:
    import methods
    from support import runtime

    names = ("n_layer", "n_head", "n_embd", "batch_size")
    sizes = {name: settings[name] for name in names}
    cfg = config.check(config.Config(patch=patch, base_width=settings["n_embd"], **sizes))
    grid = [settings["side"]] * 2
    meta = dict(name="bench", vocab=settings["vocab"], grid=grid, n_classes=N_CLASSES, given=[])
    spec = methods.spec_of(asdict(cfg), meta)
    device = runtime.pick_device()
    label = torch.arange(cfg.batch_size) % N_CLASSES
    if settings["work"] == "train":
        return train_ours(cfg, spec, label, device)
    return sample_ours(cfg, spec, label, device, settings["n_sites"])


def train_ours(cfg, spec, label, device) -> Callable[[], None]:
    import methods
    import train_ddpd
    from support import runtime, training

    state = training.build_training(cfg, spec, None, device)
    learners = train_ddpd.learners_of(cfg, state, runtime.World(0, 1, device))
    x0 = torch.randint(spec.vocab, (len(label), spec.shape.n_tokens))
    generator = torch.Generator().manual_seed(0)

    def step():
        tasks = methods.make_tasks(spec, x0, label, None, generator)
        losses = train_ddpd.backward(cfg, learners, tasks, device, is_last=True)
        training.update_weights(cfg, state)
        state.it += 1
        losses.tolist()                                 # waits for the device

    return step


def sample_ours(cfg, spec, label, device, n_sites) -> Callable[[], None]:
    import methods
    from support import runtime

    nets = {name: net.to(device).requires_grad_(False)
            for name, net in methods.build(spec).items()}
    label = label.to(device)
    generator = torch.Generator(device).manual_seed(0)

    def states():
        while True:
            yield from methods.sample(
                spec, nets, label, sampler="ddpd", n_steps=1000, schedule="fixed", k=n_sites,
                generator=generator,
            )

    endless = states()

    def step():
        with runtime.autocast(device, cfg.dtype):
            next(endless).x.sum().item()

    return step


def peer_step(settings: dict, folder: str) -> Callable[[], None]:
    """A step with the networks of a checkout of minDDPD."""
    sys.path.insert(0, folder)                          # before our own model.py
    import model as peer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = peer.DDPDConfig(
        block_size=settings["side"] ** 2, vocab_size=settings["vocab"] + 1, num_classes=N_CLASSES,
        n_layer=settings["n_layer"], n_head=settings["n_head"], n_embd=settings["n_embd"],
    )
    planner = peer.DDPDModel(shape, "planner").to(device)
    denoiser = peer.DDPDModel(shape, "denoiser").to(device)
    label = torch.arange(settings["batch_size"], device=device) % N_CLASSES
    step = train_peer if settings["work"] == "train" else sample_peer
    return step(settings, planner, denoiser, label)


def train_peer(settings, planner, denoiser, label) -> Callable[[], None]:
    device = label.device
    optimizers = [torch.optim.AdamW(net.parameters(), fused=True) for net in (planner, denoiser)]
    x0 = torch.randint(settings["vocab"], (len(label), settings["side"] ** 2), device=device)

    def step():
        t = torch.rand(len(label), device=device)
        is_noise = torch.rand(x0.shape, device=device) < t[:, None]
        x = torch.where(is_noise, torch.randint_like(x0, settings["vocab"]), x0)
        with torch.autocast(device.type, torch.bfloat16):
            _, planner_loss = planner(x, t, label, targets=is_noise)
            planner_loss.backward()
            _, denoiser_loss = denoiser(x, t, label, targets=x0, mask=is_noise)
            denoiser_loss.backward()
        for net, optimizer in zip((planner, denoiser), optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        planner_loss.item()

    return step


class Enough(Exception):
    """A sampler has made as many steps as are timed."""


def sample_peer(settings, planner, denoiser, label) -> Callable[[], None]:
    """The first step of its sampler, which asks the planner once in each."""
    n_calls = 0

    def count(*args):
        nonlocal n_calls
        n_calls += 1
        if n_calls > 1:
            raise Enough

    planner.register_forward_pre_hook(count)

    def step():
        nonlocal n_calls
        n_calls = 0
        with contextlib.suppress(Enough), torch.autocast(label.device.type, torch.bfloat16):
            planner.sample(
                denoiser, class_labels=label, batch_size=len(label), device=label.device,
                sequence_length=settings["side"] ** 2, num_samples=settings["n_sites"],
                infer_time_from_planner=False,
            )

    return step


# Workers: one process for each side, which takes a turn for each line that it reads


def peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(settings: dict, side: str) -> None:
    """side: "peer", or a patch."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                                       # what a peer prints is no answer
    is_peer = side == "peer"
    if not is_peer:
        import train_ddpd  # noqa: F401  (what is imported is not measured)
    before = 0 if torch.cuda.is_available() else peak_bytes()
    step = peer_step(settings, settings["peer"]) if is_peer else our_step(settings, int(side))
    for _ in sys.stdin:
        began = time.perf_counter()
        for _ in range(settings["repeats"]):
            step()
        seconds = (time.perf_counter() - began) / settings["repeats"]
        print(json.dumps([seconds, peak_bytes() - before]), file=answers, flush=True)


class Worker:
    def __init__(self, settings: dict, side: str):
        command = [sys.executable, __file__, "worker", json.dumps(settings), side]
        self.name = "minDDPD" if side == "peer" else f"patch {side}"
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )
        self.seconds = []
        self.bytes = 0

    def turn(self) -> float:
        """-> seconds of a step"""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            said = self.process.stderr.read().strip().splitlines()
            raise SystemExit(f"{self.name}: {said[-1] if said else 'it ended'}")
        seconds, self.bytes = json.loads(answer)
        return seconds


def main(flags: Flags) -> None:
    settings = asdict(flags)
    sides = [*map(str, flags.patches), *["peer"] * bool(flags.peer)]
    workers = [Worker(settings, side) for side in sides]
    for round_ in range(flags.rounds + 1):
        for worker in workers:
            seconds = worker.turn()
            if round_:                                  # the first turn warms up
                worker.seconds.append(seconds)
    for worker in workers:
        worker.process.kill()
    report(flags, workers)


def report(flags: Flags, workers: list[Worker]) -> None:
    """Medians, and ratios to the last side within each round."""
    last = workers[-1]
    n_calls = "one step of training" if flags.work == "train" else "one step of the sampler"
    print(
        f"{n_calls}: {flags.batch_size} x {flags.side}x{flags.side} tokens, V = {flags.vocab}, "
        f"{flags.n_layer} layers of width {flags.n_embd}, {flags.n_head} heads; "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print("| side | median seconds | times faster (range of rounds) | peak memory, MB | ratio |")
    print("|---|---|---|---|---|")
    for worker in workers:
        ratios = sorted(b / a for a, b in zip(worker.seconds, last.seconds, strict=True))
        median = statistics.median(ratios)
        print(
            f"| {worker.name} | {statistics.median(worker.seconds):.3g} "
            f"| {median:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) "
            f"| {worker.bytes / 1e6:.0f} | {worker.bytes / last.bytes:.2f} |"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        work(json.loads(sys.argv[2]), sys.argv[3])
    else:
        main(flags)
