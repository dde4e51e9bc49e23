"""Finished tokens: a safetensors file with `indices` (n, *grid) and `labels` (n,), beside a *_metadata.json.

python data.py tokens --file F.safetensors --name imagenet [--vocab V] [--tokenizer cosmos_di8x8]
"""

import json
from pathlib import Path

import numpy as np

MAKES_ITSELF = False
CODES = {"cosmos_di8x8": 8 * 8 * 8 * 5 * 5 * 5, "cosmos_di16x16": 8 * 8 * 8 * 5 * 5 * 5}    # ids a tokenizer can write
N_VAL, SPLIT_SEED = 10_000, 0
CHUNK = 2**22           # tokens read at a time
MAX_IDS, MAX_CLASSES = 2**31, 2**20


def folder_name(how):
    return Path(how.file).stem or "tokens"


def make(how):
    """-> meta, chunks (split, tokens (m, *grid), labels (m,)); the file is read twice, never whole"""
    if how.tokenizer and how.tokenizer not in CODES:
        raise SystemExit(f"tokenizer {how.tokenizer} is not one of {', '.join(CODES)}")
    path = Path(how.file)
    if not how.file or not path.is_file():
        raise SystemExit(f"no file {how.file!r}: name the tokens with --file F.safetensors")
    top, n_labels, n, grid = 0, 0, 0, None
    for start, tokens, labels in read(path):
        rows = tokens.reshape(len(tokens), -1)
        for what, values, limit in [("token", rows.min(1), how.vocab or MAX_IDS),
                                    ("token", rows.max(1), how.vocab or MAX_IDS), ("label", labels, MAX_CLASSES)]:
            is_bad = (values < 0) | (values >= limit)
            if is_bad.any():
                bad = int(np.argmax(is_bad))
                raise SystemExit(f"{path}, row {start + bad}: {what} {values[bad]} is not in [0, {limit})")
        top, n_labels, n = max(top, int(tokens.max())), max(n_labels, int(labels.max()) + 1), n + len(labels)
        grid = tokens.shape[1:]
    if grid is None:
        raise SystemExit(f"{path} holds no sequences")
    said = total_samples(path)
    if said not in (None, n):
        raise SystemExit(f"{path} holds {n} sequences, its metadata says {said}")
    if n < 2:
        raise SystemExit(f"{path}: one sequence is too few, one of them is held out")
    possible = CODES.get(how.tokenizer, top + 1)
    if top >= possible:
        print(f"warning: {path} holds id {top}, and {how.tokenizer} writes ids below {possible} only")
    if how.vocab > possible:
        print(f"warning: --vocab {how.vocab}, but {how.tokenizer} writes {possible} ids only")
    meta = dict(name=how.name or path.stem, vocab=how.vocab or max(2, top + 1), grid=list(grid), n_classes=n_labels,
                class_names=[str(c) for c in range(n_labels)], palette="any", given=[])
    is_val = np.zeros(n, bool)
    is_val[np.random.default_rng(SPLIT_SEED).permutation(n)[:min(N_VAL, max(1, n // 10))]] = True
    return meta, split(path, is_val)


def split(path, is_val):
    for start, tokens, labels in read(path):
        held = is_val[start:start + len(labels)]
        for name, rows in [("train", ~held), ("val", held)]:
            if rows.any():
                yield name, tokens[rows], labels[rows]


def read(path):
    """The file in chunks, opened anew for each so that no map of it grows.  yields start, tokens, labels"""
    from safetensors import safe_open

    start, n = 0, 1
    while start < n:
        try:
            with safe_open(path, "numpy") as file:
                indices, labels = file.get_slice("indices"), file.get_slice("labels")
                n, *grid = indices.get_shape()
                if len(grid) < 1 or labels.get_shape() != [n]:
                    raise ValueError(f"indices {indices.get_shape()} do not go with labels {labels.get_shape()}")
                stop = min(n, start + max(1, CHUNK // max(1, int(np.prod(grid)))))
                x, y = indices[start:stop], labels[start:stop]
        except Exception as error:                                      # SafetensorError and what spoiled headers raise
            raise SystemExit(f"{path} cannot be read: {error!r}") from None
        if x.dtype.kind not in "iu" or y.dtype.kind not in "iu":
            raise SystemExit(f"{path} holds {x.dtype} indices and {y.dtype} labels, not integers")
        if x.size == 0:
            return
        yield start, x.view(np.uint16) if x.dtype == np.int16 else x, y     # int16: bit patterns of ids to 65,535
        start = stop


def total_samples(path):
    """What the metadata file beside the tokens says; None where there is none."""
    found = sorted(path.parent.glob("*_metadata.json"))
    own = [f for f in found if f.name == f"{path.stem}_metadata.json"] or found
    if len(own) != 1:
        print(f"note: no single *_metadata.json beside {path}; its number of sequences is not checked")
        return None
    try:
        said = json.loads(own[0].read_text())["total_samples"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise SystemExit(f"{own[0]} cannot be read: it must be JSON with total_samples") from None
    return said
