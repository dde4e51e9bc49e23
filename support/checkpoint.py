"""A run on disk: checkpoints that are written whole or not at all, and loading a trained run."""

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import socket
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

import config
import methods
import model
from formats import meta_file
from formats.flags import LARGEST
from formats.messages import shown
from support import exports, hub
from support.runtime import first_line, one_line_errors, place

KEYS = ("it", "config", "meta", "world_size", "nets", "ema", "optimizers")
WEIGHT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)


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


def n_bytes(tree: Any, limit: float = math.inf) -> int:
    """Bytes of all tensors in nested dicts and lists, one for anything else. Stops counting past
    the limit, which lists that hold each other reach in no time."""
    total = 0
    nodes = [tree]
    while nodes and total <= limit:
        node = nodes.pop()
        if isinstance(node, torch.Tensor):
            total += node.numel() * node.element_size()
            continue
        total += 1
        if isinstance(node, dict):
            nodes.extend(node.values())
        elif isinstance(node, (list, tuple)):
            nodes.extend(node)
    return total


def sync_to_disk(path: Path) -> None:
    """What was written to a file, or renamed in a folder, survives a power loss from here on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_config(folder: Path, values: dict[str, Any]) -> None:
    """config.json, where it is not there already."""
    path = folder / "config.json"
    text = json.dumps(values, indent=1) + "\n"
    if os.path.isfile(path) and path.read_bytes() == text.encode():
        return
    new = folder / "config.tmp"
    new.unlink(missing_ok=True)
    new.write_text(text)
    sync_to_disk(new)
    os.replace(new, path)
    sync_to_disk(folder)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from training in the folder, until the block or this process ends."""
    with one_line_errors(OSError):
        file = open(folder / ".lock", "a+", errors="replace")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise SystemExit(f"{folder} is in use by {file.read() or 'another process'}") from None
        except OSError:
            print(f"warning: {folder} cannot be locked; start one run in it only", file=sys.stderr)
        with suppress(OSError):     # on a full disk the lock holds without a name
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def is_run(folder: Path) -> bool:
    """Does the folder hold a run, or nothing but what a killed start of one leaves behind?"""
    names = {path.name for path in folder.iterdir()} - {"config.tmp", "ckpt.tmp", ".lock"}
    if not names or names & {"ckpt.pt", "ckpt_prev.pt"}:
        return True
    if not os.path.isfile(folder / "config.json"):
        return False
    try:
        values = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and "denoiser_process" in values


def save_checkpoint(folder: str | Path, state: dict[str, Any]) -> bool:
    """Write ckpt.pt; the one before becomes ckpt_prev.pt. A failed write warns and leaves both.

    ->  is it written?
    """
    new = Path(folder) / "ckpt.tmp"
    newest = Path(folder) / "ckpt.pt"
    previous = Path(folder) / "ckpt_prev.pt"
    try:
        new.unlink(missing_ok=True)
        torch.save({**state, "digest": digest(state)}, new)
        sync_to_disk(new)
        if newest.exists():
            os.replace(newest, previous)
        os.replace(new, newest)
        sync_to_disk(newest.parent)
        return True
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        with suppress(OSError):
            new.unlink(missing_ok=True)
        reason = first_line(error)
        if is_disk_full(error, new.parent, n_bytes(state)):
            reason = f"the disk is full: {reason}"
        print(f"warning: {newest} not written ({reason}); training goes on", file=sys.stderr)
        return False


def is_disk_full(error: Exception, folder: Path, n_wanted: int) -> bool:
    """Says the error so, or is there less space than was wanted?"""
    if getattr(error, "errno", None) in DISK_IS_FULL:
        return True
    try:
        return shutil.disk_usage(folder).free < n_wanted
    except OSError:
        return False


# Reading


class Unreadable(Exception):
    """A checkpoint that is damaged, or none of ours."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Plain tensors and numbers, on the CPU, checked as what a user types is."""
    try:
        refuse_bombs(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        if n_bytes(state, path.stat().st_size) > path.stat().st_size:
            raise ValueError("it unpacks to more than the file holds")
        is_whole = isinstance(state, dict) and state.pop("digest", None) == digest(state)
    except Exception as error:  # torch.load raises a dozen kinds
        raise Unreadable(f"{path} cannot be read as a checkpoint: {first_line(error)}") from None
    if not is_whole:
        raise Unreadable(f"{path} is damaged: its digest does not match")
    saved = state.get("config")
    if isinstance(saved, dict) and "grey_levels" not in saved:
        raise SystemExit(f"{path} was written by an older version of this program: train it again")
    try:
        return check_state(state)
    except (ValueError, SystemExit) as error:
        reason = first_line(error)
        raise SystemExit(f"{path} is no checkpoint of this program: {reason}") from None


def refuse_bombs(path: Path) -> None:
    """Raises ValueError for an archive of more bytes than it is long."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(info.file_size for info in archive.infolist())
    if unpacked > path.stat().st_size:
        raise ValueError("it unpacks to more than the file holds")


def check_state(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint with all fields of the config. Raises ValueError or SystemExit, which say what
    is wrong."""
    for key in KEYS:
        if key not in state:
            raise ValueError(f"it has no {key}")
    check_count("world_size", state["world_size"], 1)
    spec = checked_spec(state)
    for part in ("nets", "ema", "optimizers"):
        check_names(part, state[part], spec)
    weights = {f"{part}.{name}": state[part][name]
               for part in ("nets", "ema") for name in spec.method.networks}
    nets = check_weights(weights, spec)
    for name, net in nets.items():
        check_moments(f"optimizers.{name}", state["optimizers"][name], net)
    return {**state, "config": spec.config}


def checked_spec(state: dict[str, Any]) -> methods.Spec:
    """What a run is, by its config and its data's meta. Raises as check_state does."""
    check_count("it", state["it"], 0)
    cfg = config.restore(state["config"])
    if message := meta_file.meta_error(state["meta"]):
        raise ValueError(f"meta: {message}")
    return methods.spec_of(asdict(cfg), state["meta"])


def check_names(part: str, saved: Any, spec: methods.Spec) -> None:
    """One entry for each network of the method."""
    if not isinstance(saved, dict) or set(saved) != set(spec.method.networks):
        raise ValueError(f"{part} must be of {', '.join(spec.method.networks)}")


def check_count(name: str, value: Any, low: int) -> None:
    if type(value) is not int or not low <= value <= LARGEST:
        raise ValueError(f"{name} is {shown(value)}, not a whole number from {low} on")


def check_weights(weights: dict[str, Any], spec: methods.Spec) -> dict[str, model.Transformer]:
    """Finite ones of the networks that the config describes.  {PART.NETWORK: tensors}  ->  those
    networks, without memory"""
    for where, saved in weights.items():
        shape = methods.shape_of_network(spec, where.split(".")[-1])
        check_size(where, saved, shape)                 # before anything of that size is built
    with torch.device("meta"):
        nets = methods.build(spec)
    for where, saved in weights.items():
        network = nets[where.split(".")[-1]]
        shapes = {key: like.shape for key, like in network.state_dict().items()}
        check_shapes(where, saved, shapes)
        for key, tensor in saved.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{where}.{key} is not finite")
    return nets


def check_size(where: str, saved: Any, shape: model.Shape) -> None:
    """As many blocks, of the same width, as the config says."""
    keys = [key for key in saved if isinstance(key, str)] if isinstance(saved, dict) else []
    n_blocks = len({key.split(".")[1] for key in keys if key.startswith("blocks.")})
    if n_blocks != shape.n_layer:
        raise ValueError(f"{where} has {n_blocks} blocks, n_layer is {shape.n_layer}")
    check_shapes(where, {"tok_emb.weight": saved.get("tok_emb.weight")},
                 {"tok_emb.weight": (shape.vocab + 1, shape.n_embd // shape.patch_size)})


def check_shapes(where: str, saved: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """These tensors of floating point numbers and no others."""
    if not isinstance(saved, dict) or set(saved) != set(shapes):
        raise ValueError(f"{where} must hold {shown(sorted(shapes))}")
    for key, shape in shapes.items():
        tensor = saved[key]
        is_weight = isinstance(tensor, torch.Tensor) and tensor.dtype in WEIGHT_DTYPES
        if not is_weight or tensor.shape != torch.Size(shape) or tensor.device.type != "cpu":
            raise ValueError(f"{where}.{key} is not of {tuple(shape)} floating point numbers")


def check_moments(where: str, saved: Any, net: model.Transformer) -> None:
    """Adam's moments of each parameter that has been trained."""
    params = [p for group in model.param_groups(net, 0.0, 0.0) for p in group["params"]]
    moments = saved.get("state") if isinstance(saved, dict) else None
    keys = moments if isinstance(moments, dict) else [None]
    if not all(type(i) is int and 0 <= i < len(params) for i in keys):
        raise ValueError(f"{where} must hold the moments of {len(params)} tensors")
    for i, of_one in moments.items():
        shape = params[i].shape
        shapes = {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
        check_shapes(f"{where}.{i}", of_one, shapes)


def load_checkpoint(folder: str | Path) -> dict[str, Any] | None:
    """The newest checkpoint of a run that can be read; None where there is none yet.

    The newest is missing after a kill between the two renames of a save.
    """
    paths = [Path(folder) / name for name in ("ckpt.pt", "ckpt_prev.pt")]
    complaints = []
    for path in paths:
        if not os.path.isfile(path):
            is_there = os.path.exists(path)
            complaints.append(f"{path} is {'no file' if is_there else 'missing'}")
            continue
        try:
            state = read_checkpoint(path)
        except Unreadable as error:
            complaints.append(str(error))
            continue
        if complaints:
            print(f"warning: {complaints[0]}; going on from {path}", file=sys.stderr)
        return state
    if not any(os.path.exists(path) for path in paths):
        return None
    raise SystemExit("; ".join(complaints))


def require_checkpoint(folder: str | Path) -> dict[str, Any]:
    """The newest checkpoint of a run that must have one."""
    state = load_checkpoint(folder)
    if state is None:
        raise SystemExit(f"no run in {folder}: there is no ckpt.pt and no {exports.WEIGHTS}")
    return state


def load_averages(folder: Path) -> dict[str, Any]:
    """it, config, meta and ema (averaged weights) of a run's newest checkpoint, or of an export."""
    return read_export(folder) if exports.is_export(folder) else require_checkpoint(folder)


class Run(NamedTuple):
    """A trained run, ready to sample."""
    spec: methods.Spec
    nets: dict[str, model.Transformer]      # with averaged (EMA) weights
    folder: Path
    it: int
    device: torch.device
    digest: str                             # of these weights


def load_run(folder: str | Path, device: str | torch.device = "cpu") -> Run:
    """The run in a folder, exported or not, or on the hub as hf://OWNER/NAME, with its averaged
    weights."""
    folder = hub.local_folder(folder)
    state = load_averages(folder)
    spec = methods.spec_of(state["config"], state["meta"])
    device = torch.device(device)
    nets = methods.build(spec)
    for name, net in nets.items():
        net.load_state_dict(state["ema"][name])
        net.eval().requires_grad_(False)
    place(nets, device)
    return Run(spec, nets, folder, state["it"], device, digest(state["ema"]))


# Exported runs

# What concerns nobody else: paths and accounts of whoever trained
PRIVATE = (
    "out_dir", "init_from", "freeze_denoiser", "wandb_project", "wandb_entity", "wandb_name",
    "wandb_mode",
)


def write_export(folder: Path, run: Run) -> None:
    """The run's averaged weights, with all that is needed to rebuild its networks."""
    options = {key: value for key, value in run.spec.config.items() if key not in PRIVATE}
    values = dict(it=run.it, config=options, meta=run.spec.meta)
    weights = {name: net.state_dict() for name, net in run.nets.items()}
    exports.write(folder, {**values, "digest": digest({**values, "ema": weights})}, weights)


def read_export(folder: Path) -> dict[str, Any]:
    """it, config, meta and ema of an exported folder, checked as a checkpoint is."""
    try:
        values, weights = exports.read(folder)
        for key in ("it", "meta", "digest"):
            if key not in values:
                raise ValueError(f"{exports.CONFIG} has no {key}")
        state = {key: values[key] for key in ("it", "config", "meta")} | {"ema": weights}
        spec = checked_spec(state)
        check_names(exports.WEIGHTS, weights, spec)
        check_weights({name: weights[name] for name in spec.method.networks}, spec)
        if values["digest"] != digest(state):
            files = f"{exports.CONFIG} or {exports.WEIGHTS}"
            raise ValueError(f"{files} has changed: the digest does not match")
    except (ValueError, SystemExit) as error:
        raise SystemExit(f"{folder} is no exported run: {first_line(error)}") from None
    return {**state, "config": spec.config}
