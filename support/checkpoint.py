"""Checkpoints of a run: written whole or not at all, read as plain tensors and numbers only."""

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import torch

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


def save_checkpoint(folder: str | Path, state: dict[str, Any]) -> bool:
    """Write ckpt.pt; the one before becomes ckpt_prev.pt. A failed write warns and leaves both.  ->
    is it written?"""
    new = Path(folder) / "ckpt.tmp"
    newest = Path(folder) / "ckpt.pt"
    previous = Path(folder) / "ckpt_prev.pt"
    try:
        torch.save({**state, "digest": digest(state)}, new)
        if newest.exists():
            os.replace(newest, previous)
        os.replace(new, newest)
        return True
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        new.unlink(missing_ok=True)
        print(
            f"warning: {newest} not written ({first_line(error)}); training goes on",
            file=sys.stderr,
        )
        return False


def load_checkpoint(folder: str | Path) -> dict[str, Any] | None:
    """The newest checkpoint of a run, on the CPU; None where there is none yet."""
    newest = Path(folder) / "ckpt.pt"
    previous = Path(folder) / "ckpt_prev.pt"
    if not newest.exists() and previous.exists():  # killed between the two renames of a save
        print(f"{newest} is missing; going on from {previous}", file=sys.stderr)
        newest = previous
    if not newest.exists():
        return None
    hint = (
        f" (the one before it is {previous}; rename it to ckpt.pt to use it)"
        if previous.exists()
        else ""
    )
    try:
        state = torch.load(newest, map_location="cpu", weights_only=True)
        is_whole = isinstance(state, dict) and state.pop("digest", None) == digest(state)
    except Exception as error:  # torch.load raises a dozen kinds
        raise SystemExit(
            f"{newest} cannot be read as a checkpoint: {first_line(error)}{hint}"
        ) from None
    if not is_whole:
        raise SystemExit(f"{newest} is damaged: its digest does not match{hint}")
    if "grey_levels" not in state.get("config", {}):
        raise SystemExit(
            f"{newest} was written by an older version of this program: train it again"
        )
    return state


def require_checkpoint(folder: str | Path) -> dict[str, Any]:
    """The newest checkpoint of a run that must have one."""
    state = load_checkpoint(folder)
    if state is None:
        raise SystemExit(f"no run in {folder}: there is no ckpt.pt")
    return state
