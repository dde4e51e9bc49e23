"""Process group, devices, randomness, signals, refusals."""

import datetime
import hashlib
import itertools
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

WATCH_S = 5             # seconds between looks whether torchrun's agent is alive
BEAT_S = 5              # seconds between signs of life of rank 0 while it works alone
POLL_S = 0.05           # seconds between looks whether it has finished


# Processes and devices


class World(NamedTuple):
    rank: int
    size: int
    device: torch.device
    store: dist.Store | None = None         # where processes leave words for each other
    timeout_s: float = 0                    # for which one waits for another

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(dtype: str = "auto", timeout_minutes: int = 30) -> World:
    """Join the processes that torchrun started, or be the only one; choose the device."""
    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "mps":
        print("an Apple GPU has no float64: samplers and bounds ask its networks from the CPU")
    elif device.type == "cpu" and torch.backends.mps.is_available() and rank == 0 < size - 1:
        print("several processes cannot share an Apple GPU: they run on the CPU")
    torch.set_float32_matmul_precision(float32_precision(dtype))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        leave_with_agent()
    store = None
    if size > 1:
        n_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if 0 < torch.cuda.device_count() < n_here:
            raise SystemExit(
                f"{n_here} processes, but {torch.cuda.device_count()} GPUs: one process per GPU"
            )
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = datetime.timedelta(minutes=timeout_minutes)
        store = store_of_attempt(rank, size, timeout)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    return World(rank, size, device, store, 60 * timeout_minutes)


def store_of_attempt(rank: int, size: int, timeout: datetime.timedelta) -> dist.Store:
    """The processes' store. On one machine with keys of this attempt only: torchrun's restarts
    keep theirs there, with old addresses."""
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        return dist.PrefixStore("run", store)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    return dist.PrefixStore(f"attempt_{attempt}", store)


def leave_with_agent() -> None:
    """End this process soon after the torchrun agent that started it: a successor would find it
    training in the same folder."""
    agent = os.getppid()

    def watch():
        while os.getppid() == agent:
            time.sleep(WATCH_S)
        print("torchrun's agent is gone: this process ends without a save", file=sys.stderr)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


TURNS = itertools.count()       # of rank 0, which all processes count alike


@contextmanager
def main_alone(world: World) -> Iterator[bool]:
    """Rank 0 alone does what is in the block, for as long as it takes; the others wait at its end.

    No collective waits meanwhile, so its timeout is for silence only: of rank 0 too, if it gives
    no sign of life. yields whether this is rank 0
    """
    if world.size == 1:
        yield True
        return
    turn = f"turn_{next(TURNS)}"
    if not world.is_main:
        yield False
        wait_for_main(world, turn)
        return
    is_over = threading.Event()

    def beat():
        while not is_over.wait(BEAT_S):
            world.store.add(f"{turn}_beats", 1)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    refusal = ""
    try:
        yield True
    except BaseException as error:
        refusal = f"rank 0: {first_line(error)}"
        raise
    finally:
        is_over.set()
        thread.join()
        world.store.set(f"{turn}_over", refusal)


def wait_for_main(world: World, turn: str) -> None:
    """Until rank 0 has finished its turn; leaves with it where it refused to go on, and where it
    is silent for the timeout."""
    beats = 0
    heard = time.monotonic()
    while not world.store.check([f"{turn}_over"]):
        now = time.monotonic()
        if (new_beats := world.store.add(f"{turn}_beats", 0)) != beats:
            beats = new_beats
            heard = now
        if now - heard > world.timeout_s:
            raise SystemExit(f"rank 0 has been silent for {world.timeout_s / 60:g} minutes")
        time.sleep(POLL_S)
    if refusal := world.store.get(f"{turn}_over").decode():
        raise SystemExit(refusal)


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


def leave_without_shutdown() -> None:
    """End a rank that has done its work, without the shutdown of Python.

    DDP keeps the threads of gloo alive. One that drops its last tensor while Python shuts down
    waits for an interpreter that is gone, and aborts the process (torch 2.13).
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def pick_device(local_rank: int = 0) -> torch.device:
    """A CUDA GPU of this process's own, else an Apple GPU for a process that is alone, else the
    CPU; NANODDPD_DEVICE=cpu in the environment asks for the CPU."""
    asked = os.environ.get("NANODDPD_DEVICE", "")
    if asked not in ("", "cpu"):
        raise SystemExit(f"NANODDPD_DEVICE is {asked}; only cpu can be asked for")
    if asked == "cpu":
        return torch.device("cpu")
    if torch.cuda.device_count() > local_rank:
        return torch.device("cuda", local_rank)
    is_alone = int(os.environ.get("WORLD_SIZE", 1)) == 1    # gloo moves no tensors of Apple GPUs
    if torch.backends.mps.is_available() and is_alone:
        return torch.device("mps")
    return torch.device("cpu")


def device_of_doubles(device: torch.device) -> torch.device:
    """Where samplers and bounds compute: the device of the networks, or the CPU where that has no
    float64."""
    return torch.device("cpu") if device.type == "mps" else device


def place(nets: dict[str, nn.Module], device: torch.device) -> None:
    """Move networks to a device. On one without float64 they are asked from the CPU, and answer
    there."""
    for net in nets.values():
        net.to(device)
        if device_of_doubles(device) != device:
            net.register_forward_pre_hook(move_inputs)
            net.register_forward_hook(move_output)


def move_inputs(net: nn.Module, inputs: tuple) -> tuple:
    device = next(net.parameters()).device
    return tuple(y.to(device) if isinstance(y, Tensor) else y for y in inputs)


def move_output(
    net: nn.Module, inputs: tuple, output: Tensor | tuple[Tensor, ...],
) -> Tensor | tuple[Tensor, ...]:
    if isinstance(output, tuple):
        return tuple(move_output(net, inputs, y) for y in output)
    return output.to(device_of_doubles(output.device))


def device_name(device: torch.device) -> str:
    """The device in words, for tables."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple GPU, {platform.machine()}"
    return f"cpu, {torch.get_num_threads()} threads"


def peak_bytes(device: torch.device) -> int:
    """Most memory that tensors took on a GPU, or that this process took on a CPU, so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    # Where Linux does not say it, and on macOS; on Linux it may be that of the parent process
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def has_bfloat16(device: torch.device) -> bool:
    """Does the device multiply bfloat16 natively? (Emulated, it is slower than float32.)"""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


def matmul_dtype(device: torch.device, dtype: str = "auto") -> torch.dtype:
    """What matrix products run in; "auto" is bfloat16 where the device has it."""
    is_bfloat16 = dtype == "bfloat16" or (dtype == "auto" and has_bfloat16(device))
    return torch.bfloat16 if is_bfloat16 else torch.float32


def float32_precision(dtype: str) -> str:
    """Of float32 matrix products on a GPU: with --dtype float32 in full, else in TF32."""
    return "highest" if dtype == "float32" else "high"


def autocast(device: torch.device, dtype: str = "auto") -> torch.autocast:
    """A context in which matrix products run in matmul_dtype."""
    is_on = matmul_dtype(device, dtype) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=is_on)


def freeze(nets: dict[str, nn.Module], device: torch.device, dtype: str = "auto") -> None:
    """Cast the weights of matrix products once, as autocast would in every call; from here on the
    networks run under autocast only."""
    for net in nets.values():
        for module in net.modules():
            if isinstance(module, nn.Linear):
                module.to(matmul_dtype(device, dtype))


def generator(stream: str, *key: int, device="cpu") -> torch.Generator:
    """Randomness as a function of a stream's name and a tuple of numbers: no state to save, the
    same on every machine. No two keys share a seed, whatever their lengths."""
    return torch.Generator(device).manual_seed(seed_of(stream, *key))


def seed_of(stream: str, *key: int) -> int:
    """-> a number in [0, 2^63)"""
    words = " ".join([stream, *(str(int(number)) for number in key)])
    seed = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "little")
    return seed >> 1


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


class Interrupted(BaseException):
    """A signal came in a block that it may interrupt."""


class Stop:
    """Turns Ctrl-C, SIGTERM or SIGHUP into a flag that the loop reads between steps; a second
    Ctrl-C ends at once."""

    def __init__(self, world: World):
        self.world = world
        self.signal = 0
        self.interrupts = False
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self.handlers = {number: signal.signal(number, self.note) for number in numbers}

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """A block that ends as soon as a signal comes, and may end anywhere."""
        self.interrupts = True
        try:
            yield
        except Interrupted:
            pass
        finally:
            self.interrupts = False

    def restore(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def note(self, number, frame) -> None:
        if self.signal and number == signal.SIGINT:  # SIGTERM comes twice from some schedulers
            raise KeyboardInterrupt
        self.signal = number
        if self.interrupts:
            self.interrupts = False
            raise Interrupted

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
        is_system = isinstance(error, OSError)
        raise SystemExit(named_line(error) if is_system else first_line(error)) from None


@contextmanager
def one_voice(stopped: str = "") -> Iterator[None]:
    """How a script ends: refusals in one line, said by one process of each machine; Ctrl-C with the
    line `stopped`, if there is one.

    What the system refuses (a full disk, no permission, too little memory) needs no traceback
    either. torchrun's own report ends with the same line.
    """
    try:
        yield
    except KeyboardInterrupt:
        if stopped and os.environ.get("LOCAL_RANK", "0") == "0":
            print(stopped, file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except (OSError, MemoryError, SystemExit) as error:
        message = error.code if isinstance(error, SystemExit) else named_line(error)
        if not isinstance(message, str):
            raise
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise SystemExit(1) from None
        if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            words = {"message": message, "timestamp": str(int(time.time()))}
            Path(report).write_text(json.dumps(words))
        raise SystemExit(message) from None


def named_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
