"""Many samples of a run: drawn in batches by any number of processes, and kept on disk.

A sample depends on the seed and its own index alone, so that processes, batch sizes and
interruptions leave no trace in it. A folder of samples holds samples.npz (tokens, labels, nfe,
settings), and until that is complete the batches that are finished, in parts/.
"""

import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import methods
import model
from diffusion.randomness import Streams
from support import runtime, videos
from support.checkpoint import Run, digest, locked, sync_to_disk

BATCH = 250                 # sequences at a time, where their logits are not too many
# Numbers of the residual in a batch, on a CPU: the widest tensor of a block, eight times that, then
# has 16 MiB, and larger ones are slower (LOG.md, "Batches of samples on a CPU")
CPU_RESIDUAL = 2**19
MAX_LOGITS = 2**27          # at once: samplers hold about six numbers for each
POLL_S = 0.2                # seconds between looks at what other processes have finished
HASH_CHARS = 6              # of a digest, in the name of a folder
MAX_NAME = 100              # characters of that name
SHORT = {"guidance": "g", "planner_guidance": "pg", "temperature": "t"}     # in that name
# What samples depend on, beside the weights
CODE = ("model.py", "methods.py", "diffusion", "support/attention.py", "support/sampling.py")


class Request(NamedTuple):
    """What is sampled."""
    sampler: str
    options: dict[str, Any]     # of methods.sample: n_steps, guidance, ...
    seed: int
    labels: np.ndarray                      # (n,)
    known_tokens: np.ndarray | None = None  # (n, N) what samples start from
    known: np.ndarray | None = None         # (n, N) bool, where that stays

    @property
    def n(self) -> int:
        return len(self.labels)


class Batch(NamedTuple):
    tokens: np.ndarray          # (b, N) int64
    nfe: np.ndarray             # (b,) network calls
    seconds: float              # for each sample
    moments: list[videos.Moment]


class Costs(NamedTuple):
    nfe: np.ndarray             # (n,) network calls
    seconds: float              # for each sample, on one process


# Drawing


def batch_limit(spec: methods.Spec, sampler: str, n_steps: int) -> int:
    """Sequences whose logits a sampler may hold at once: of all tokens, or of those that a step
    writes, with room for four times their share."""
    n_tokens = spec.shape.n_tokens
    is_unmasking = spec.noise.only_masks and not spec.method.has_own_levels
    asks_few = {"ddpd": "planner" in spec.method.networks, "ancestral": is_unmasking}
    if asks_few.get(sampler):
        n_tokens = min(n_tokens, 4 * math.ceil(n_tokens / max(1, n_steps)))
    return max(1, MAX_LOGITS // (n_tokens * spec.vocab))


def usual_batch(shape: model.Shape, device: torch.device) -> int:
    """Sequences at a time, where nothing else is asked for."""
    if device.type != "cpu":
        return BATCH
    return min(BATCH, max(1, CPU_RESIDUAL // (shape.n_patches * shape.n_embd)))


def refuse_idle_guidance(flags: Any, spec: methods.Spec, run_name: str | Path) -> None:
    """Guidance needs a network that has learned without labels, too."""
    is_guided = any(scale not in (None, 1) for scale in (flags.guidance, flags.planner_guidance))
    if is_guided and not (spec.config["label_dropout"] and spec.n_classes):
        raise SystemExit(
            f"{run_name} was trained without labels or their dropout: nothing to guide away from"
        )


def grid_of(spec: methods.Spec, request: Request) -> list[int]:
    """The samples' grid: a rollout may have more frames than the data."""
    frames = request.options.get("frames", 0)
    return [frames, *spec.grid[1:]] if frames else list(spec.grid)


def draw_batch(
    run: Run, request: Request, rows: range, n_recorded: int = 0,
    on_step: Callable[[], None] = lambda: None,
) -> Batch:
    """The samples of some indices, the first n_recorded of them step by step.

    on_step is called after each step
    """
    device = runtime.device_of_doubles(run.device)
    index = torch.arange(rows.start, rows.stop, device=device)
    label, known_tokens, known = (
        None if y is None else torch.as_tensor(y[rows.start:rows.stop]).to(device)
        for y in (request.labels, request.known_tokens, request.known)
    )
    stream = "correct" if request.sampler == "self_correct" else "sample"
    streams = Streams(runtime.seed_of(stream, request.seed), index)
    options = dict(request.options)
    n_frames = options.pop("frames", 0)
    moments = []
    began = time.perf_counter()
    with (
        runtime.one_line_errors(ValueError),
        runtime.autocast(run.device, run.spec.config["dtype"]),
    ):
        x = methods.starting_tokens(
            run.spec, label, streams, request.sampler, known, known_tokens, n_frames
        )
        recording = videos.Recording(x, grid_of(run.spec, request), n_recorded)
        states = methods.sample(
            run.spec, run.nets, label, sampler=request.sampler, generator=streams, known=known,
            frames=n_frames, x=x, **options,
        )
        for state in states:
            if n_recorded:
                recording.add(state)
            on_step()
        seconds = (time.perf_counter() - began) / len(rows)
        if n_recorded:
            options.pop("n_steps")
            p_noise = methods.p_noise_after(
                run.spec, run.nets, state, label, sampler=request.sampler, known=known, **options
            )
            moments = recording.finish(p_noise)
    return Batch(state.x.cpu().numpy(), state.nfe.float().cpu().numpy(), seconds, moments)


# Folders


def folder_name(request: Request, *more: str) -> str:
    """The name of a folder for a request: what is not the default, and `more`, in words."""
    options = {name: value for name, value in request.options.items() if name != "n_steps"}
    words = [request.sampler, str(request.options["n_steps"])]
    for name, value in options.items():
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        words.append(SHORT.get(name, name.replace("_", "-")) + shown)
    if request.known_tokens is not None:                # other numbers start from others
        words.append(f"n{request.n}")
    name = "_".join([*words, *more, f"seed{request.seed}"])
    if len(name) <= MAX_NAME:
        return name
    return f"{name[:MAX_NAME]}_{hashlib.sha256(name.encode()).hexdigest()[:HASH_CHARS]}"


def identity(run: Run, request: Request) -> str:
    """A digest of all that samples depend on: weights, code, settings, and what they start from.

    Their number is part of it only where they have labels or starts of their own.
    """
    in_turn = np.arange(request.n) % max(1, run.spec.n_classes)
    own = [None if np.array_equal(request.labels, in_turn) else request.labels]
    own += [request.known_tokens, request.known]
    return digest({
        "weights": run.digest,
        "code": code_digest(),
        "settings": [request.sampler, sorted(request.options.items()), request.seed],
        "own": [None if y is None else torch.as_tensor(y) for y in own],
        "dtype": [str(run.device.type), run.spec.config["dtype"]],
    })


@functools.cache
def code_digest() -> str:
    sha = hashlib.sha256()
    root = Path(__file__).parent.parent
    for name in CODE:
        path = root / name
        files = sorted(path.glob("*.py")) if path.is_dir() else [path]
        for file in files:
            sha.update(file.read_bytes())
    return sha.hexdigest()


def draw_all(
    run: Run, request: Request, folder: Path, world: runtime.World, batch_size: int = 0,
    n_recorded: int = 0, on_batch: Callable[[int, np.ndarray], None] | None = None,
) -> list[videos.Moment]:
    """Draw what a folder lacks of a request; all processes take part, and all return when it is
    complete. A folder that another command draws into is refused.

    on_batch is called with the first index and the tokens (b, N) of each batch that this process
    draws  ->  the first n_recorded samples step by step, on rank 0
    """
    limit = batch_limit(run.spec, request.sampler, request.options["n_steps"])
    size = min(batch_size or max(n_recorded, usual_batch(run.spec.shape, run.device)), limit)
    todo = None
    moments = []
    with ExitStack() as stack, runtime.one_line_errors(OSError):
        with runtime.main_alone(world) as is_main:
            if is_main:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(folder))
                todo = prepare(folder, request, identity(run, request), size)
        todo = from_main(todo, world)
        if todo is not None:
            moments = draw_missing(run, request, folder, world, todo, n_recorded, on_batch)
    is_recorded = moments and len(moments[0].x) == n_recorded
    if world.is_main and n_recorded and not is_recorded:    # drawn before, or in small batches
        moments = draw_batch(run, request, range(n_recorded), n_recorded).moments
    return moments


def draw_missing(
    run: Run, request: Request, folder: Path, world: runtime.World, todo: list[range],
    n_recorded: int, on_batch: Callable[[int, np.ndarray], None] | None,
) -> list[videos.Moment]:
    """Draw these batches, in turn by all processes, and complete the folder.

    ->  the samples of the first batch step by step, if this process draws it, n_recorded at most
    """
    moments = []
    with Progress(request, world) as bar:
        for rows in todo[world.rank::world.size]:
            on_step = step_of(bar, folder, len(rows) * world.size, request)
            n_now = min(n_recorded, len(rows)) if rows.start == 0 else 0
            batch = draw_batch(run, request, rows, n_now, on_step)
            moments = moments or batch.moments
            if on_batch:
                on_batch(rows.start, batch.tokens)
            write_part(folder, rows, request, batch, run.spec)
        with runtime.main_alone(world) as is_main:
            if is_main:
                wait_for_parts(folder, todo, bar)
                settings = {"sampler": request.sampler, "seed": request.seed}
                settings |= request.options | {"it": run.it, "commit": runtime.commit()}
                merge(folder, settings)
    return moments


class Progress:
    """A bar of the samples of all processes, shown by rank 0 from the first step on, which is when
    nothing can be refused any more."""

    def __init__(self, request: Request, world: runtime.World):
        self.n = request.n
        self.is_shown = world.is_main
        self.bar = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        if self.bar:
            self.bar.close()

    def show(self, n_done: float) -> None:
        if self.bar is None:
            bar_format = (
                "{percentage:3.0f}%|{bar}| {n:.0f}/{total} samples [{elapsed}<{remaining}]"
            )
            self.bar = tqdm(
                total=self.n, leave=False, disable=not self.is_shown, bar_format=bar_format
            )
        self.bar.update(min(n_done, self.n) - self.bar.n)


def step_of(bar: Progress, folder: Path, n: int, request: Request) -> Callable[[], None]:
    """What moves the bar after each step of n samples that are drawn at a time."""
    n_finished = n_in_parts(folder)
    n_steps = request.options["n_steps"]
    steps = itertools.count(1)
    return lambda: bar.show(n_finished + min(1, next(steps) / n_steps) * n)


def from_main(value: Any, world: runtime.World) -> Any:
    """What rank 0 has."""
    if world.size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def prepare(folder: Path, request: Request, key: str, size: int) -> list[range] | None:
    """Make room for a request in a folder; what it holds of the same request stays.

    ->  the indices that are missing, in batches of `size`; None if it is complete
    """
    key_file = folder / "identity"
    complete = folder / "samples.npz"
    parts = folder / "parts"
    is_same = key_file.is_file() and key_file.read_text() == key
    if is_same and complete.is_file() and n_samples(complete) >= request.n:
        return None
    if not is_same:
        if complete.is_file() or parts.is_dir():
            print(f"{folder} holds samples of other weights, code or settings: drawn anew")
        shutil.rmtree(parts, ignore_errors=True)
        complete.unlink(missing_ok=True)
    parts.mkdir(parents=True, exist_ok=True)
    key_file.write_text(key)
    if complete.is_file():                              # fewer than are asked for now
        n_old = n_samples(complete)
        os.replace(complete, parts / part_name(range(n_old)))
    done = finished_parts(folder)
    if done:
        print(f"{folder} holds {n_in_parts(folder)} samples: the others are drawn now")
    return [batch for gap in gaps(done, request.n) for batch in in_batches(gap, size)]


def gaps(done: list[range], n: int) -> Iterator[range]:
    """What is missing of range(n), done being in order."""
    end = 0
    for rows in [*done, range(n, n)]:
        if end < min(rows.start, n):
            yield range(end, min(rows.start, n))
        end = max(end, rows.stop)


def in_batches(rows: range, size: int) -> list[range]:
    return [rows[i:i + size] for i in range(0, len(rows), size)]


def part_name(rows: range) -> str:
    return f"{rows.start:08}_{rows.stop:08}.npz"


def finished_parts(folder: Path) -> list[range]:
    """The indices of the finished batches, in order."""
    bounds = [path.stem.split("_") for path in sorted((folder / "parts").glob("*_*.npz"))]
    return [range(int(start), int(stop)) for start, stop in bounds]


def write_part(
    folder: Path, rows: range, request: Request, batch: Batch, spec: methods.Spec,
) -> None:
    grid = grid_of(spec, request)
    dtype = np.uint16 if spec.vocab < 2**16 else np.uint32      # the mask's id, V, fits too
    path = folder / "parts" / part_name(rows)
    new = path.with_suffix(".tmp")
    with open(new, "wb") as file:
        np.savez(
            file,
            tokens=batch.tokens.reshape(-1, *grid).astype(dtype),
            labels=request.labels[rows.start:rows.stop],
            nfe=batch.nfe,
            seconds=np.full(len(rows), batch.seconds, np.float32),
        )
    sync_to_disk(new)
    os.replace(new, path)


def n_in_parts(folder: Path) -> int:
    return sum(map(len, finished_parts(folder)))


def wait_for_parts(folder: Path, todo: list[range], bar: Progress) -> None:
    """Until other processes have finished theirs. If one fails, torchrun ends them all."""
    missing = {part_name(rows) for rows in todo}
    while missing:
        missing -= {path.name for path in (folder / "parts").glob("*.npz")}
        bar.show(n_in_parts(folder))
        if missing:
            time.sleep(POLL_S)


def merge(folder: Path, settings: dict[str, Any]) -> None:
    """samples.npz of the parts, one after the other, so that memory does not grow with n."""
    done = finished_parts(folder)
    n = done[-1].stop
    parts = [folder / "parts" / part_name(rows) for rows in done]
    small = {}
    new = folder / "samples.tmp"
    with zipfile.ZipFile(new, "w") as archive:
        with archive.open("tokens.npy", "w", force_zip64=True) as file:
            for i, path in enumerate(parts):
                with np.load(path) as part:
                    tokens = part["tokens"]
                    for name in ("labels", "nfe", "seconds"):
                        small.setdefault(name, []).append(part[name])
                if i == 0:
                    write_header(file, tokens.dtype, (n, *tokens.shape[1:]))
                file.write(tokens.tobytes())
        arrays = {name: np.concatenate(values) for name, values in small.items()}
        assert len(arrays["labels"]) == n
        arrays["settings"] = np.array(json.dumps(settings))
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array)
    os.replace(new, folder / "samples.npz")
    shutil.rmtree(folder / "parts")


def write_header(file, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


# Reading


def n_samples(path: Path) -> int:
    with np.load(path) as file:
        return len(file["labels"])


def load_costs(folder: Path, n: int) -> Costs:
    """Of the first n samples of a complete folder."""
    with np.load(folder / "samples.npz") as file:
        return Costs(file["nfe"][:n], float(file["seconds"][:n].mean()))


def load_tokens(folder: Path, n: int) -> np.ndarray:
    """Those of the first n samples of a complete folder; no more are read.  -> (n, N) int64"""
    path = folder / "samples.npz"
    with zipfile.ZipFile(path) as archive, archive.open("tokens.npy") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        row = math.prod(shape[1:])
        raw = file.read(n * row * dtype.itemsize)
    return np.frombuffer(raw, dtype).reshape(n, row).astype(np.int64)
