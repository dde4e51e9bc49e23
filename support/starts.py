"""What is known before sampling: labels, and tokens that are given."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
import methods
from formats.messages import nearest
from support import runtime
from support.checkpoint import Run
from support.text import load_text, place_prompt

N_SAMPLES = 8               # where no labels say how many
N_NAMES = 10                # classes in a message


class Start(NamedTuple):
    """What is known before sampling."""
    labels: list[int]
    grid: list[int]  # of the samples; a rollout may have more frames than the data
    known_tokens: Tensor | None = None      # (n, N)
    known: Tensor | None = None             # (n, N) bool, where known_tokens stay
    real: np.ndarray | None = None  # (n, *grid) held-out sequences that the samples go on from


def in_turn(labels: list[int], n: int) -> list[int]:
    """n labels, those given again and again; n = 0: each once."""
    return [labels[i % len(labels)] for i in range(n or len(labels))]


def label_of(word: str, meta: dict[str, Any]) -> int:
    """A class by its number or its name."""
    try:
        return int(word)
    except ValueError:
        pass
    names = meta["class_names"]
    if word not in names:
        classes = known_classes(word, names)
        raise SystemExit(f"--labels {word} names no class of {meta['name']}{classes}")
    return names.index(word)


def known_classes(word: str, names: list[str]) -> str:
    """For a refusal: the closest one and the first few."""
    if not names:
        return ", which has none"
    first = ", ".join(names[:N_NAMES]) + ", ..." * (len(names) > N_NAMES)
    return f"; {nearest(word, names)} There are {first}"


def load_known_tokens(
    path: str, meta: dict[str, Any], labels: list[int], n_samples: int = 0,
) -> tuple[Tensor, Tensor, list[int]]:
    """Tokens to keep: one sequence for each sample, or one for all.  -> tokens, mask (n, N),
    labels"""
    try:
        with np.load(path, allow_pickle=False) as file:
            tokens = file["tokens"]
            mask = file["mask"]
            own_labels = np.atleast_1d(file["labels"] if "labels" in file else []).astype(np.int64)
    except Exception as error:                          # np.load raises a dozen kinds
        reason = runtime.first_line(error)
        raise SystemExit(f"{path} cannot be read as tokens and mask: {reason}") from None
    grid = tuple(meta["grid"])
    if tokens.shape[-len(grid):] != grid or tokens.ndim > len(grid) + 1 or mask.dtype != bool:
        raise SystemExit(
            f"{path} holds tokens {tokens.shape} and a {mask.dtype} mask {mask.shape}, "
            "not tokens of grid "
            f"{grid} and a bool mask"
        )
    if not tokens.size or not mask.size or tokens.dtype.kind not in "iu":
        raise SystemExit(f"{path} holds {tokens.shape} tokens of {tokens.dtype}, not whole numbers")
    n = len(tokens) if tokens.ndim > len(grid) else 1
    if (len(own_labels) and len(own_labels) != n) or mask.shape not in (grid, (n, *grid)):
        raise SystemExit(
            f"{path}: {n} sequences of grid {grid} do not fit {len(own_labels)} labels and a mask "
            f"{mask.shape}"
        )
    labels = in_turn(labels or own_labels.tolist() or [meta["n_classes"]] * n, n_samples)
    try:
        tokens, mask = (
            np.broadcast_to(y, (len(labels), *grid)) for y in (tokens.astype(np.int64), mask)
        )
    except ValueError:
        raise SystemExit(
            f"{path}: tokens {tokens.shape} and mask {mask.shape} do not fit {len(labels)} "
            f"samples of grid {grid}"
        ) from None
    kept = tokens[mask]
    if kept.size and not 0 <= kept.min() <= kept.max() < meta["vocab"]:
        raise SystemExit(f"{path}: tokens that are kept must lie in [0, {meta['vocab']}), "
                         f"not {kept.min()} to {kept.max()}")
    tokens, mask = (torch.from_numpy(np.array(y).reshape(len(labels), -1)) for y in (tokens, mask))
    return tokens, mask, labels


def real_frames(real: np.ndarray, frames: int, meta: dict[str, Any]) -> np.ndarray:
    """Held-out videos (n, F, h, w), cut or continued to `frames`; zeros stand where there is no one
    truth."""
    n_missing = frames - real.shape[1]
    if n_missing <= 0:
        return real[:, :frames]
    if meta.get("is_certain", False):
        return data.import_source(meta["score"]).truth(real, frames)
    return np.pad(real, [(0, 0), (0, n_missing), (0, 0), (0, 0)])


def start_from_data(flags: Any, spec: methods.Spec, labels: list[int]) -> Start:
    """Held-out sequences to go on from: the first frames of videos, and the tokens that the data
    gives."""
    config_ = spec.config
    _, splits = data.load(config_["data"], config_["image_size"], config_["grey_levels"])
    n = len(labels) or N_SAMPLES
    x0, own_labels = splits["val"].spread_subset(n)
    real = x0.reshape(n, *spec.grid)
    if flags.frames:
        real = real_frames(real, flags.frames, spec.meta)
    known_tokens = torch.from_numpy(real.reshape(n, -1))
    known = data.context_mask(spec.meta, known_tokens, flags.n_given)
    if known is None:
        known = torch.zeros_like(known_tokens, dtype=torch.bool)
    grid = list(real.shape[1:])
    has_truth = grid[0] <= spec.grid[0] or spec.meta.get("is_certain", False)
    return Start(
        labels or own_labels.tolist(), grid, known_tokens, known, real if has_truth else None
    )


def tokens_of_prompt(flags: Any, run: Run, n: int) -> tuple[Tensor, Tensor]:
    """The prompt in n sequences.  -> tokens, mask (n, N)"""
    n_tokens = run.spec.shape.n_tokens
    tokens = torch.zeros(n, n_tokens, dtype=torch.long)
    mask = torch.zeros(n, n_tokens, dtype=torch.bool)
    with runtime.one_line_errors(ValueError):
        text = load_text(run.folder, run.spec.meta)
        placed = place_prompt(flags.prompt, flags.gap, n_tokens, text)
    for start, ids in placed.items():
        end = start + len(ids)
        tokens[:, start:end] = torch.tensor(ids, dtype=torch.long)
        mask[:, start:end] = True
    return tokens, mask


def starting_point(flags: Any, run: Run) -> Start:
    """Labels, and what is known by the flags and the data."""
    spec = run.spec
    n_classes = spec.n_classes
    labels = [label_of(word, spec.meta) for word in flags.labels]
    known_tokens = known = None
    if flags.known:
        known_tokens, known, labels = load_known_tokens(flags.known, spec.meta, labels, flags.n)
    for label in labels:
        if not 0 <= label <= n_classes:
            raise SystemExit(
                f"--labels {label}: {flags.run} knows 0 to {n_classes - 1}, "
                f"and {n_classes} for no label"
            )
    if labels:
        labels = in_turn(labels, flags.n)
    else:
        n = n_classes if 0 < n_classes <= 10 else N_SAMPLES
        labels = in_turn(list(range(max(1, n_classes))), flags.n or n)
    if flags.prompt:
        known_tokens, known = tokens_of_prompt(flags, run, len(labels))
        return Start(labels, list(spec.grid), known_tokens, known)
    if not flags.known and (spec.is_video or spec.meta["given"]):
        return start_from_data(flags, spec, labels)
    return Start(labels, list(spec.grid), known_tokens, known)
