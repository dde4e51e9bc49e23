"""Any file as sequences of bytes: --file F, cut into windows of --length bytes.

python data.py text --file F [--length 128] [--name NAME]

The windows do not overlap, and the last tenth of the file is held out. No classes.
"""

import os
from pathlib import Path

import numpy as np

MAKES_ITSELF = False
LENGTH = 128
MIN_SEQUENCES = 20
VAL_SHARE = 0.1


def folder_name(options) -> str:
    return Path(options.file).stem or "text"


def make(options) -> tuple[dict, list]:
    """Windows of bytes.  ->  meta, [(split, tokens (n, 1, length), labels (n,))]"""
    path = Path(options.file)
    length = options.length or LENGTH
    if not os.path.isfile(options.file):
        raise SystemExit(f"no file {options.file!r}: name a text with --file F")
    raw = np.fromfile(path, np.uint8)
    if len(raw) < MIN_SEQUENCES * length:
        raise SystemExit(f"{path}: {len(raw)} bytes are too few for sequences of {length}")
    n_train_bytes = int(len(raw) * (1 - VAL_SHARE))
    train = windows(raw[:n_train_bytes], length)
    val = windows(raw[n_train_bytes:], length)
    meta = {
        "name": options.name or path.stem,
        "vocab": 256,
        "grid": [1, length],
        "n_classes": 0,
        "class_names": [],
        "palette": "text",
        "given": [],
    }
    return meta, [("train", train, no_labels(train)), ("val", val, no_labels(val))]


def windows(raw: np.ndarray, length: int) -> np.ndarray:
    """Cut bytes into windows and drop the rest.  (n_bytes,)  ->  (n, 1, length)"""
    n = len(raw) // length
    return raw[:n * length].reshape(n, 1, length)


def no_labels(tokens: np.ndarray) -> np.ndarray:
    return np.zeros(len(tokens), np.int64)
