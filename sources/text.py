"""Any file as sequences of bytes.   python data.py text --file F [--length 128] [--name NAME]

Windows of --length bytes, side by side; the last tenth of the file is held out. No classes.
"""

from pathlib import Path

import numpy as np

MAKES_ITSELF = False
LENGTH, VAL_SHARE = 128, 0.1


def folder_name(how):
    return Path(how.file).stem or "text"


def make(how):
    """-> meta, [(split, tokens (n, 1, length), labels (n,))]"""
    path, length = Path(how.file), how.length or LENGTH
    if not how.file or not path.is_file():
        raise SystemExit(f"no file {how.file!r}: name a text with --file F")
    raw = np.fromfile(path, np.uint8)
    if len(raw) < 20 * length:
        raise SystemExit(f"{path}: {len(raw)} bytes are too few for sequences of {length}")
    cut = int(len(raw) * (1 - VAL_SHARE))
    parts = {"train": raw[:cut], "val": raw[cut:]}
    meta = dict(name=how.name or path.stem, vocab=256, grid=[1, length], n_classes=0, class_names=[], palette="text",
                given=[])
    return meta, [(split, y[:len(y) // length * length].reshape(-1, 1, length), np.zeros(len(y) // length, np.int64))
                  for split, y in parts.items()]
