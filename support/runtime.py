"""Process group, devices, randomness, signals, logs."""

import csv
import datetime
import functools
import hashlib
import json
import netrc
import os
import secrets
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import ParseResult, urlparse

import torch
import torch.distributed as dist

# of a collective: rank 0 may validate and draw pictures meanwhile
TIMEOUT = datetime.timedelta(hours=12)


# Processes and devices


class World(NamedTuple):
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start() -> World:
    """Join the processes that torchrun started, or be the only one; choose the device."""
    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if size > 1:
        if device.type == "cpu" and torch.cuda.is_available():
            raise SystemExit(
                f"{size} processes, but {torch.cuda.device_count()} GPUs: start one process per GPU"
            )
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT, **store_of_attempt(rank, size))
    return World(rank, size, device)


def store_of_attempt(rank: int, size: int) -> dict[str, Any]:
    """A store with keys of this attempt only: torchrun restarts on one machine keep theirs, with
    old addresses."""
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        return {}
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=TIMEOUT))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    return dict(store=dist.PrefixStore(f"attempt_{attempt}", store), rank=rank, world_size=size)


def require_same_everywhere(number: int, world: World, complaint: str) -> None:
    """Refuse numbers that differ between processes."""
    if world.size == 1:
        return
    low = torch.tensor(number)
    high = torch.tensor(number)
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    if low != high:
        raise SystemExit(f"{complaint} ({int(low)} to {int(high)})")


def end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def pick_device(local_rank: int = 0) -> torch.device:
    return (
        torch.device("cuda", local_rank)
        if torch.cuda.device_count() > local_rank
        else torch.device("cpu")
    )


def device_name(device: torch.device) -> str:
    """The device in words, for tables."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def has_bfloat16(device: torch.device) -> bool:
    """Does the device multiply bfloat16 natively? (Emulated, it is slower than float32.)"""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


def matmul_dtype(device: torch.device, dtype: str = "auto") -> torch.dtype:
    """What matrix products run in; "auto" is bfloat16 where the device has it."""
    is_bfloat16 = dtype == "bfloat16" or (dtype == "auto" and has_bfloat16(device))
    return torch.bfloat16 if is_bfloat16 else torch.float32


def autocast(device: torch.device, dtype: str = "auto") -> torch.autocast:
    """A context in which matrix products run in matmul_dtype."""
    is_on = matmul_dtype(device, dtype) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=is_on)


def generator(stream: str, *key: int, device="cpu") -> torch.Generator:
    """Randomness as a function of a stream's name and a tuple of numbers: no state to save, the
    same on every machine. No two keys share a seed, whatever their lengths."""
    words = " ".join([stream, *(str(int(number)) for number in key)])
    seed = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "little")
    return torch.Generator(device).manual_seed(seed >> 1)


def commit() -> str:
    """The commit of this checkout, with a + where files differ from it; "" outside of git."""
    root = Path(__file__).parent.parent

    def git(*args):
        return subprocess.run(
            ["git", *args], cwd=root, capture_output=True, text=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (
            "+" if git("status", "--porcelain", "-uno") else ""
        )
    except OSError:
        return ""


# Signals and errors


class Stop:
    """Turns Ctrl-C or SIGTERM into a flag that the loop reads between steps; a second Ctrl-C ends
    at once."""

    def __init__(self, world: World):
        self.world = world
        self.signal = 0
        self.handlers = {
            number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)
        }

    def restore(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def note(self, number, frame) -> None:
        if self.signal and number == signal.SIGINT:  # SIGTERM comes twice from some schedulers
            raise KeyboardInterrupt
        self.signal = number

    def requested(self) -> int:
        """The signal any rank got, 0 for none: all ranks stop at one step. No GPU is waited for."""
        if self.world.size == 1:
            return self.signal
        flag = torch.tensor(self.signal)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag)


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


@contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Show errors of these kinds as one line and exit 1: what a user can correct needs no
    traceback."""
    try:
        yield
    except kinds as error:
        name = f"{type(error).__name__}: " if isinstance(error, OSError) else ""
        raise SystemExit(name + first_line(error)) from None


# Logs


class Log:
    """log.jsonl always, Weights & Biases where a project is named. Rank 0 only.

    What cannot be logged is said once; it never ends a run.
    """

    def __init__(self, folder: str | Path, cfg, world: World):
        self.warned = set()
        self.file = None
        self.wandb = None
        if world.is_main:
            with self.never_fatal("log.jsonl"):
                self.file = open_log(Path(folder) / "log.jsonl")
        if world.is_main and cfg.wandb_project:
            with self.never_fatal("wandb", Exception):
                self.wandb = start_wandb(Path(folder), cfg)

    @contextmanager
    def never_fatal(self, what: str, *kinds: type[Exception]) -> Iterator[None]:
        """Errors of these kinds (OSError, if none is named) are said once."""
        try:
            yield
        except kinds or (OSError,) as error:  # noqa: B030
            if what not in self.warned:
                self.warned.add(what)
                print(f"warning: {what}: {first_line(error)}; training goes on", file=sys.stderr)

    def write(self, it: int, **values: Any) -> None:
        if self.file:
            with self.never_fatal("log.jsonl"):
                self.file.write(json.dumps({"it": it, **values}) + "\n")
                self.file.flush()
        if self.wandb:
            with self.never_fatal("wandb", Exception):
                self.wandb.log(numbers_of(values), step=it)

    def media(self, it: int, **paths: Path) -> None:
        """Pictures (.png) and videos."""
        with self.never_fatal("wandb", Exception):
            import wandb

            media = {}
            for name, path in paths.items():
                is_picture = path.suffix == ".png"
                kind = wandb.Image if is_picture else functools.partial(wandb.Video, format="mp4")
                media[name] = kind(str(path))
            self.wandb.log(media, step=it)

    def close(self) -> None:
        if self.file:
            with self.never_fatal("log.jsonl"):
                self.file.close()
        if self.wandb:
            with self.never_fatal("wandb", Exception):
                self.wandb.finish()


def open_log(path: Path):
    """To append to; a last line that a kill left torn is cut."""
    file = open(path, "ab+")
    file.seek(0)
    end = file.read().rfind(b"\n") + 1
    file.truncate(end)
    file.close()
    return open(path, "a")


def numbers_of(values: dict[str, Any]) -> dict[str, float]:
    """What Weights & Biases plots: numbers, and each entry of a list or of the floors."""
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
    for key, value in values.items():
        if isinstance(value, list):
            numbers |= {f"{key}/{i}": part for i, part in enumerate(value)}
    return numbers | {f"floor/{key}": value for key, value in values.get("floors", {}).items()}


def start_wandb(folder: Path, cfg):
    """A run that goes on under the same id when training does."""
    import wandb

    mode = wandb_mode(cfg.wandb_mode)
    if mode == "offline":
        print("wandb: offline, to be sent later with `wandb sync`")
    id_file = folder / "wandb_id.txt"
    if not id_file.exists() or not id_file.read_text().strip():
        id_file.write_text(secrets.token_hex(4) + "\n")
    return wandb.init(
        project=cfg.wandb_project, entity=cfg.wandb_entity or None, dir=folder, mode=mode,
        name=cfg.wandb_name or folder.name, config=vars(cfg), id=id_file.read_text().strip(),
        resume="allow",
    )


def wandb_mode(mode: str) -> str:
    """"auto" is offline where there is no key or no network; WANDB_MODE goes before all."""
    mode = os.environ.get("WANDB_MODE") or mode
    if mode != "auto":
        return mode
    url = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    return "online" if has_key(url.hostname) and is_reachable(url) else "offline"


def has_key(host: str) -> bool:
    """Is there a key that wandb would find? Asked here, because wandb itself would ask the user."""
    try:
        return bool(os.environ.get("WANDB_API_KEY") or netrc.netrc().authenticators(host))
    except (OSError, netrc.NetrcParseError):
        return False


def is_reachable(url: ParseResult, timeout_s: float = 3) -> bool:
    """Does the server answer? Behind a proxy it is taken to."""
    if urllib.request.getproxies().get(url.scheme):
        return True
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((url.hostname, port), timeout_s).close()
        return True
    except OSError:
        return False


def append_row(path: str | Path, row: dict[str, Any]) -> None:
    """Append to a CSV; where a column is new it is written anew, whole or not at all."""
    path = Path(path)
    with one_line_errors(OSError):
        rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
        old_columns = list(rows[0]) if rows else []
        columns = list(dict.fromkeys([*old_columns, *row]))
        if rows and columns == old_columns:
            with open(path, "a", newline="") as file:
                csv.DictWriter(file, columns).writerow(row)
            return
        new = path.with_suffix(".tmp")
        with open(new, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows([*rows, row])
        os.replace(new, path)
