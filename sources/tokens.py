"""Finished tokens: a safetensors file with `indices` (n, *grid) and `labels` (n,), if any.

python data.py tokens --file F.safetensors --name imagenet [--vocab V] [--tokenizer cosmos_di8x8]

Tokens of text are (n, length), and --tokenizer names the JSON file of their tokenizer. If a
*_metadata.json lies beside the file, its total_samples must agree.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sources import _tokenizer

MAKES_ITSELF = False
CODEBOOK_SIZES = {      # ids that a tokenizer can produce
    "cosmos_di8x8": 8 * 8 * 8 * 5 * 5 * 5,
    "cosmos_di16x16": 8 * 8 * 8 * 5 * 5 * 5,
}
N_VAL = 10_000          # at most, of a tenth
SPLIT_SEED = 0
CHUNK = 2**22           # tokens read at a time
MAX_IDS = 2**31
MAX_CLASSES = 2**20


class Contents(NamedTuple):
    """What one pass over a token file finds."""
    n: int                      # sequences
    grid: tuple[int, ...]
    max_id: int
    n_classes: int              # 0: the file has no labels


def folder_name(options) -> str:
    return Path(options.file).stem or "tokens"


def make(options) -> tuple[dict, Iterable, dict]:
    """Check the file in a first pass, split it in a second; it is never in memory as a whole.

    ->  meta, chunks (split, tokens (m, *grid), labels (m,)), {"tokenizer.json": its bytes}
    """
    of_text = None
    if options.tokenizer.endswith(".json"):
        of_text = _tokenizer.load(options.tokenizer)
    elif options.tokenizer and options.tokenizer not in CODEBOOK_SIZES:
        known = ", ".join(CODEBOOK_SIZES)
        raise SystemExit(f"tokenizer {options.tokenizer} is not one of {known}, and no .json file")
    path = Path(options.file)
    if not os.path.isfile(options.file):
        raise SystemExit(f"no file {options.file!r}: name the tokens with --file F.safetensors")
    vocab = options.vocab or (_tokenizer.vocabulary(of_text) if of_text else 0)
    contents = scan(path, vocab or MAX_IDS)
    check_count(path, contents.n)
    warn_about_ids(path, contents.max_id, options)
    meta = {
        "name": options.name or path.stem,
        "vocab": vocab or max(2, contents.max_id + 1),
        "grid": list(contents.grid),
        "n_classes": contents.n_classes,
        "class_names": [str(label) for label in range(contents.n_classes)],
        "palette": "text" if of_text else "any",
        "given": [],
    }
    kept = {"tokenizer.json": _tokenizer.as_json(of_text)} if of_text else {}
    return meta, split_chunks(path, held_out(contents.n)), kept


def scan(path: Path, vocab: int) -> Contents:
    """Read the whole file and check that every token and label is in range."""
    n = 0
    max_id = 0
    n_classes = 0
    grid = None
    for start, tokens, labels in read_chunks(path):
        rows = tokens.reshape(len(tokens), -1)
        check_range(path, start, "token", rows.min(1), vocab)
        check_range(path, start, "token", rows.max(1), vocab)
        check_range(path, start, "label", labels, MAX_CLASSES)
        n += len(labels)
        max_id = max(max_id, int(tokens.max()))
        n_classes = max(n_classes, int(labels.max()) + 1)
        grid = tokens.shape[1:]
    if grid is None:
        raise SystemExit(f"{path} holds no sequences")
    return Contents(n, grid, max_id, n_classes if has_labels(path) else 0)


def check_range(path: Path, start: int, kind: str, values: np.ndarray, limit: int) -> None:
    """Require 0 <= values < limit.  values (m,) of rows start .. start + m - 1"""
    is_bad = (values < 0) | (values >= limit)
    if is_bad.any():
        bad = int(np.argmax(is_bad))
        raise SystemExit(f"{path}, row {start + bad}: {kind} {values[bad]} is not in [0, {limit})")


def check_count(path: Path, n: int) -> None:
    """Require as many sequences as the metadata says, and two at least."""
    total = total_samples(path)
    if total is not None and total != n:
        raise SystemExit(f"{path} holds {n} sequences, its metadata says {total}")
    if n < 2:
        raise SystemExit(f"{path}: one sequence is too few, one of them is held out")


def warn_about_ids(path: Path, max_id: int, options) -> None:
    """Warn if the file or --vocab exceeds what the tokenizer can produce."""
    n_ids = CODEBOOK_SIZES.get(options.tokenizer, max_id + 1)
    if max_id >= n_ids:
        print(f"warning: {path} holds id {max_id}, and {options.tokenizer} "
              f"writes ids below {n_ids} only")
    if options.vocab > n_ids:
        print(f"warning: --vocab {options.vocab}, but {options.tokenizer} writes {n_ids} ids only")


def held_out(n: int) -> np.ndarray:
    """Which sequences are held out: a random tenth, N_VAL at most.  ->  (n,) bool"""
    n_val = min(N_VAL, max(1, n // 10))
    permutation = np.random.default_rng(SPLIT_SEED).permutation(n)
    is_val = np.zeros(n, bool)
    is_val[permutation[:n_val]] = True
    return is_val


def split_chunks(path: Path, is_val: np.ndarray) -> Iterator[tuple]:
    """Read the file again and split it.  yields (split, tokens (m, *grid), labels (m,))"""
    for start, tokens, labels in read_chunks(path):
        is_val_here = is_val[start:start + len(labels)]
        for split, rows in (("train", ~is_val_here), ("val", is_val_here)):
            if rows.any():
                yield split, tokens[rows], labels[rows]


def read_chunks(path: Path) -> Iterator[tuple]:
    """The file in order.  yields (first row, tokens (m, *grid), labels (m,))"""
    start = 0
    n = 1       # known after the first chunk
    while start < n:
        n, tokens, labels = read_chunk(path, start)
        if tokens.dtype.kind not in "iu" or labels.dtype.kind not in "iu":
            raise SystemExit(f"{path} holds {tokens.dtype} indices and {labels.dtype} labels, "
                             "not integers")
        if tokens.size == 0:
            return
        if tokens.dtype == np.int16:
            tokens = tokens.view(np.uint16)     # bit patterns of ids up to 65,535
        yield start, tokens, labels
        start += len(tokens)


def read_chunk(path: Path, start: int) -> tuple[int, np.ndarray, np.ndarray]:
    """About CHUNK tokens from a row on.  ->  n of the whole file, tokens (m, *grid), labels (m,)

    The file is opened for each chunk: a memory map that stays open would grow to its full size.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, "numpy") as file:
            indices = file.get_slice("indices")
            labels = file.get_slice("labels") if "labels" in file.keys() else None
            n, *grid = indices.get_shape()
            if len(grid) < 1:
                raise ValueError(f"indices {indices.get_shape()} are no sequences")
            if labels is not None and labels.get_shape() != [n]:
                raise ValueError(f"indices {indices.get_shape()} do not go with "
                                 f"labels {labels.get_shape()}")
            n_rows = max(1, CHUNK // max(1, int(np.prod(grid))))
            stop = min(n, start + n_rows)
            tokens = indices[start:stop]
            if len(grid) == 1:
                tokens = tokens[:, None]        # a line is a grid of one row
            if labels is None:
                return n, tokens, np.zeros(len(tokens), np.int64)
            return n, tokens, labels[start:stop]
    except Exception as error:      # SafetensorError, and what corrupt headers raise
        raise SystemExit(f"{path} cannot be read: {error!r}") from None


def has_labels(path: Path) -> bool:
    """Of a file that can be read."""
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        return "labels" in file.keys()


def total_samples(path: Path) -> int | None:
    """Number of sequences according to the metadata beside the file, None without metadata."""
    found = [file for file in path.parent.glob("*_metadata.json") if file.is_file()]
    same_stem = [file for file in found if file.name == f"{path.stem}_metadata.json"]
    candidates = same_stem or found
    if len(candidates) != 1:
        print(f"note: no single *_metadata.json beside {path}; "
              "its number of sequences is not checked")
        return None
    metadata = candidates[0]
    try:
        return json.loads(metadata.read_text())["total_samples"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise SystemExit(f"{metadata} cannot be read: it must be JSON with total_samples") from None
