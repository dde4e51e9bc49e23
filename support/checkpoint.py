"""A run on disk: checkpoints that are written whole or not at all, and loading a trained run."""

import fcntl
import hashlib
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

import methods
import model
from support.runtime import first_line


def digest(tree: Any) -> str:
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
            raw = node.detach().cpu().contiguous().view(-1).view(torch.uint8)
            sha.update(raw.numpy().data)
        else:
            sha.update(repr(node).encode())

    add(tree)
    return sha.hexdigest()


def sync_to_disk(path: Path) -> None:
    """What was written to a file, or renamed in a folder, survives a power loss from here on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """config.json, where it is not there already."""
    path = folder / "config.json"
    text = json.dumps(config, indent=1) + "\n"
    if path.exists() and path.read_text() == text:
        return
    new = folder / "config.tmp"
    new.write_text(text)
    sync_to_disk(new)
    os.replace(new, path)
    sync_to_disk(folder)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from training in the folder, until the block or this process ends."""
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise SystemExit(f"{folder} is in use by {file.read() or 'another process'}") from None
        except OSError:
            print(f"warning: {folder} cannot be locked; start one run in it only", file=sys.stderr)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def is_run(folder: Path) -> bool:
    """Does the folder hold a run, or nothing but what a killed start of one leaves behind?"""
    names = {path.name for path in folder.iterdir()} - {"config.tmp", "ckpt.tmp", ".lock"}
    if not names or names & {"ckpt.pt", "ckpt_prev.pt"}:
        return True
    try:
        return "denoiser_process" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False


def save_checkpoint(folder: str | Path, state: dict[str, Any]) -> bool:
    """Write ckpt.pt; the one before becomes ckpt_prev.pt. A failed write warns and leaves both.

    ->  is it written?
    """
    new = Path(folder) / "ckpt.tmp"
    newest = Path(folder) / "ckpt.pt"
    previous = Path(folder) / "ckpt_prev.pt"
    try:
        torch.save({**state, "digest": digest(state)}, new)
        sync_to_disk(new)
        if newest.exists():
            os.replace(newest, previous)
        os.replace(new, newest)
        sync_to_disk(newest.parent)
        return True
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        new.unlink(missing_ok=True)
        reason = first_line(error)
        print(f"warning: {newest} not written ({reason}); training goes on", file=sys.stderr)
        return False


class Unreadable(Exception):
    """A checkpoint that is damaged, or none of ours."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Plain tensors and numbers, on the CPU."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        is_whole = isinstance(state, dict) and state.pop("digest", None) == digest(state)
    except Exception as error:  # torch.load raises a dozen kinds
        raise Unreadable(f"{path} cannot be read as a checkpoint: {first_line(error)}") from None
    if not is_whole:
        raise Unreadable(f"{path} is damaged: its digest does not match")
    if "grey_levels" not in state.get("config", {}):
        raise SystemExit(f"{path} was written by an older version of this program: train it again")
    return state


def load_checkpoint(folder: str | Path) -> dict[str, Any] | None:
    """The newest checkpoint of a run that can be read; None where there is none yet.

    The newest is missing after a kill between the two renames of a save.
    """
    paths = [Path(folder) / name for name in ("ckpt.pt", "ckpt_prev.pt")]
    complaints = []
    for path in paths:
        if not path.exists():
            complaints.append(f"{path} is missing")
            continue
        try:
            state = read_checkpoint(path)
        except Unreadable as error:
            complaints.append(str(error))
            continue
        if complaints:
            print(f"warning: {complaints[0]}; going on from {path}", file=sys.stderr)
        return state
    if not any(path.exists() for path in paths):
        return None
    raise SystemExit("; ".join(complaints))


def require_checkpoint(folder: str | Path) -> dict[str, Any]:
    """The newest checkpoint of a run that must have one."""
    state = load_checkpoint(folder)
    if state is None:
        raise SystemExit(f"no run in {folder}: there is no ckpt.pt")
    return state


class Run(NamedTuple):
    """A trained run, ready to sample."""
    spec: methods.Spec
    nets: dict[str, model.Transformer]      # with averaged (EMA) weights
    folder: Path
    it: int
    device: torch.device


def load_run(folder: str | Path, device: str | torch.device = "cpu") -> Run:
    """The run in a folder, with the averaged weights of its newest checkpoint."""
    state = require_checkpoint(folder)
    spec = methods.spec_of(state["config"], state["meta"])
    nets = methods.build(spec)
    for name, net in nets.items():
        net.load_state_dict(state["ema"][name])
        net.to(device).eval().requires_grad_(False)
    return Run(spec, nets, Path(folder), state["it"], torch.device(device))
