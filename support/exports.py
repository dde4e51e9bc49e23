"""A model's folder as it is shared: model.safetensors and config.json, which hold no code."""

import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from support.runtime import first_line

CONFIG = "config.json"      # {"it", "config", "meta", "digest"}
WEIGHTS = "model.safetensors"

Weights = dict[str, dict[str, Tensor]]      # network -> its state dict


def is_export(folder: Path) -> bool:
    """Does the folder hold these weights, and no run that goes on?"""
    return os.path.isfile(folder / WEIGHTS) and not os.path.exists(folder / "ckpt.pt")


def is_ours(folder: Path) -> bool:
    """Is its config.json that of an export?"""
    try:
        return read_values(folder).keys() >= {"it", "config", "meta", "digest"}
    except ValueError:
        return False


def write(folder: Path, values: dict[str, Any], weights: Weights) -> None:
    """All networks in one file, as they were trained together; the hub counts its parameters."""
    (folder / CONFIG).write_text(json.dumps(values, indent=1) + "\n")
    flat = {
        f"{network}.{key}": tensor.cpu().contiguous()
        for network, tensors in weights.items() for key, tensor in tensors.items()
    }
    content = safetensors.torch.save(flat, metadata={"format": "pt"})
    (folder / WEIGHTS).write_bytes(content)             # save_file makes it unreadable for others


def read(folder: Path) -> tuple[dict[str, Any], Weights]:
    """As they were written, unchecked. Raises ValueError, which names the file."""
    values = read_values(folder)
    try:
        flat = safetensors.torch.load_file(folder / WEIGHTS)
    except Exception as error:                          # torch and safetensors have many kinds
        raise ValueError(f"{WEIGHTS} cannot be read: {first_line(error)}") from None
    weights = {}
    for name, tensor in flat.items():
        network, _, key = name.partition(".")
        weights.setdefault(network, {})[key] = tensor
    return values, weights


def read_values(folder: Path) -> dict[str, Any]:
    """config.json. Raises ValueError"""
    path = folder / CONFIG
    if not os.path.isfile(path):
        raise ValueError(f"{CONFIG} is missing or not a file")
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{CONFIG} cannot be read: {first_line(error)}") from None
    if not isinstance(values, dict) or not isinstance(values.get("config"), dict):
        raise ValueError(f"{CONFIG} holds no config of a run and meta of its data")
    options = {
        key: tuple(value) if isinstance(value, list) else value     # JSON knows no tuples
        for key, value in values["config"].items()
    }
    return {**values, "config": options}
