"""Process group, devices, randomness, checkpoints, logs."""

import datetime
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
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

import numpy as np
import torch
import torch.distributed as dist

WAIT = datetime.timedelta(hours=12)     # of a collective: rank 0 may validate and draw pictures meanwhile


class World(NamedTuple):
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0


def start():
    """Join the processes that torchrun started, or be the only one; choose the device.  -> World"""
    rank, size, local = (int(os.environ.get(k, d)) for k, d in [("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)])
    device = pick_device(local)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if size > 1:
        if device.type == "cpu" and torch.cuda.is_available():
            raise SystemExit(f"{size} processes, but {torch.cuda.device_count()} GPUs: start one process per GPU")
        backend, store = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", None
        if os.environ.get("GROUP_WORLD_SIZE") == "1":                   # restarted by torchrun, which keeps its store:
            store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=WAIT))     # old addresses are still in it
            store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        where = {} if store is None else dict(store=store, rank=rank, world_size=size)
        dist.init_process_group(backend, timeout=WAIT, **where)
    return World(rank, size, device)


def same_everywhere(number, world, complaint):
    """Refuse numbers that differ between processes."""
    if world.size > 1:
        low, high = torch.tensor(number), torch.tensor(number)
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
        if low != high:
            raise SystemExit(f"{complaint} ({int(low)} to {int(high)})")


def end():
    if dist.is_initialized():
        dist.destroy_process_group()


def pick_device(local=0):
    return torch.device("cuda", local) if torch.cuda.device_count() > local else torch.device("cpu")


def device_name(device):
    """The device in words, for tables."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def has_bfloat16(device):
    """Does the device multiply bfloat16 natively? (Emulated, it is slower than float32.)"""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


def autocast(device, dtype="auto"):
    """A context in which matrix products run in `dtype`; auto is bfloat16 where the device has it."""
    on = dtype == "bfloat16" or (dtype == "auto" and has_bfloat16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=on)


def generator(*key, device="cpu"):
    """Randomness as a function of a tuple of numbers: no state to save, the same on every machine."""
    state = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator(device).manual_seed(state)


def commit():
    """The commit of this checkout, with a + where files differ from it; "" outside of git."""
    def git(*args):
        return subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except OSError:
        return ""


# Stopping

class Stop:
    """Turns Ctrl-C or SIGTERM into a flag that the loop reads between steps; a second Ctrl-C ends at once."""

    def __init__(self, world):
        self.world, self.signal = world, 0
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}

    def restore(self):
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def note(self, number, frame):
        if self.signal and number == signal.SIGINT:                     # SIGTERM comes twice from some schedulers
            raise KeyboardInterrupt
        self.signal = number

    def asked(self):
        """The signal any rank got, 0 for none: all ranks stop at one step. No GPU is waited for."""
        if self.world.size == 1:
            return self.signal
        flag = torch.tensor(self.signal)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag)


# Checkpoints

def digest(tree):
    """sha256 over every key, tensor and plain value of nested dicts and lists."""
    sha = hashlib.sha256()

    def add(node):
        if isinstance(node, dict):
            for key in sorted(node, key=str):
                sha.update(f"{key}:".encode())
                add(node[key])
        elif isinstance(node, (list, tuple)):
            for item in node:
                add(item)
        elif isinstance(node, torch.Tensor):
            sha.update(f"{node.dtype}{tuple(node.shape)}".encode())
            sha.update(node.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        else:
            sha.update(repr(node).encode())
    add(tree)
    return sha.hexdigest()


def save_checkpoint(folder, state):
    """Write ckpt.pt whole or not at all; the one before becomes ckpt_prev.pt. A failed write warns.  -> bool"""
    new, last, prev = (Path(folder) / name for name in ("ckpt.tmp", "ckpt.pt", "ckpt_prev.pt"))
    try:
        torch.save({**state, "digest": digest(state)}, new)
        if last.exists():
            os.replace(last, prev)
        os.replace(new, last)
        return True
    except (OSError, RuntimeError) as error:                            # torch reports a full disk as RuntimeError
        new.unlink(missing_ok=True)
        print(f"warning: {last} not written ({first_line(error)}); training goes on", file=sys.stderr)
        return False


def load_checkpoint(folder):
    """The newest checkpoint of a run on the CPU, plain tensors and numbers only; None where there is none yet."""
    last, prev = Path(folder) / "ckpt.pt", Path(folder) / "ckpt_prev.pt"
    if not last.exists() and prev.exists():                             # killed between the two renames of a save
        print(f"{last} is missing; going on from {prev}", file=sys.stderr)
        last = prev
    if not last.exists():
        return None
    try:
        state = torch.load(last, map_location="cpu", weights_only=True)
        is_whole = isinstance(state, dict) and state.pop("digest", None) == digest(state)
    except Exception as error:                                          # torch.load raises a dozen kinds
        raise SystemExit(f"{last} cannot be read as a checkpoint: {first_line(error)}{hint(prev)}") from None
    if not is_whole:
        raise SystemExit(f"{last} is damaged: its digest does not match{hint(prev)}")
    return state


def load_run(folder):
    """The checkpoint of a run that must have one."""
    state = load_checkpoint(folder)
    if state is None:
        raise SystemExit(f"no run in {folder}: there is no ckpt.pt")
    return state


def hint(prev):
    return f" (the one before it is {prev}; rename it to ckpt.pt to use it)" if prev.exists() else ""


def first_line(error):
    return str(error).strip().split("\n")[0] or type(error).__name__


# Logs

class Log:
    """log.jsonl always, Weights & Biases where a project is named. Rank 0 only."""

    def __init__(self, folder, cfg, world):
        self.file = open(Path(folder) / "log.jsonl", "a") if world.is_main else None
        self.wandb = None
        if world.is_main and cfg.wandb_project:
            import wandb

            url = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
            mode = os.environ.get("WANDB_MODE") or cfg.wandb_mode
            if mode == "auto":
                mode = "online" if has_key(url.hostname) and is_reachable(url) else "offline"
            if mode == "offline":
                print("wandb: offline, to be sent later with `wandb sync`")
            kept = Path(folder) / "wandb_id.txt"                        # the same run goes on under the same id
            if not kept.exists():
                kept.write_text(secrets.token_hex(4) + "\n")
            self.wandb = wandb.init(project=cfg.wandb_project, entity=cfg.wandb_entity or None, dir=folder, mode=mode,
                                    name=cfg.wandb_name or Path(folder).name, config=vars(cfg),
                                    id=kept.read_text().strip(), resume="allow")

    def write(self, it, **values):
        if self.file:
            self.file.write(json.dumps({"it": it, **values}) + "\n")
            self.file.flush()
        if self.wandb:
            flat = {k: v for k, v in values.items() if isinstance(v, int | float)}
            flat |= {f"{k}/{i}": v for k, many in values.items() if isinstance(many, list) for i, v in enumerate(many)}
            self.wandb.log(flat | {f"floor/{k}": v for k, v in values.get("floors", {}).items()}, step=it)

    def media(self, it, **paths):
        """Pictures (.png) and videos."""
        import wandb

        self.wandb.log({name: wandb.Image(str(path)) if path.suffix == ".png" else wandb.Video(str(path), format="mp4")
                        for name, path in paths.items()}, step=it)

    def close(self):
        if self.file:
            self.file.close()
        if self.wandb:
            self.wandb.finish()


def has_key(host):
    """Is there a key that wandb would find? Asked here, because wandb itself would ask the user."""
    try:
        return bool(os.environ.get("WANDB_API_KEY") or netrc.netrc().authenticators(host))
    except (OSError, netrc.NetrcParseError):
        return False


def is_reachable(url, timeout_s=3):
    """Does the server answer? Behind a proxy it is taken to."""
    if urllib.request.getproxies().get(url.scheme):
        return True
    try:
        socket.create_connection((url.hostname, url.port or (80 if url.scheme == "http" else 443)), timeout_s).close()
        return True
    except OSError:
        return False


@contextmanager
def one_line_errors(*kinds):
    """Show errors of these kinds as one line and exit 1: what a user can mend needs no traceback."""
    try:
        yield
    except kinds as error:
        name = f"{type(error).__name__}: " if isinstance(error, OSError) else ""
        raise SystemExit(name + first_line(error)) from None
