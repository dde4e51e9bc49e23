"""<split>_tokens.npy and <split>_labels.npy: read by rows, written by chunks."""

import io
import math
import os
from pathlib import Path

import numpy as np

from formats.meta_file import require_file


class Split:
    """One split on disk. Only the requested rows are read, and no memory map outlives a call."""

    def __init__(self, folder: Path, split: str, meta: dict) -> None:
        self.meta = meta
        self.tokens_file = folder / f"{split}_tokens.npy"
        tokens = read_npy(self.tokens_file)
        self.labels = read_labels(folder / f"{split}_labels.npy", len(tokens), meta["n_classes"])
        if not fits_grid(tokens.shape, tuple(meta["grid"])) or tokens.dtype.kind not in "iu":
            sizes = ", ".join(map(str, meta["grid"]))
            raise SystemExit(f"{self.tokens_file} holds {tokens.dtype} {tokens.shape}, "
                             f"not whole numbers (n, {sizes}) as meta.json says")
        if self.labels.shape != (len(tokens),) or self.labels.dtype.kind not in "iu":
            raise SystemExit(f"{folder}: {len(tokens)} {split} sequences, but labels of shape "
                             f"{self.labels.shape}, {self.labels.dtype}")
        if len(tokens) == 0:
            raise SystemExit(f"{self.tokens_file} is empty")
        self.memmap_options = {
            "dtype": tokens.dtype,
            "mode": "r",
            "offset": tokens.offset,
            "shape": tokens.shape,
            "order": "F" if tokens.flags.fnc else "C",
        }

    def __len__(self) -> int:
        return len(self.labels)

    def spread_subset(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """n evenly spaced rows, as a split may be sorted by label; if there are fewer, all of
        them, again and again.  ->  as rows()"""
        n_rows = len(self)
        if n > n_rows:
            return self.rows(np.arange(n) % n_rows)
        return self.rows(np.arange(n) * n_rows // n)

    def whole_repeats(self, n: int) -> int:
        """n, or if there are fewer rows, the next multiple of their number: spread_subset() then
        holds each row equally often."""
        return n if n <= len(self) else -(-n // len(self)) * len(self)

    def rows(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sequences and labels at the given rows, checked against meta.json.

        index (B,)  ->  tokens (B, N) int64, labels (B,) int64
        """
        tokens = np.memmap(self.tokens_file, **self.memmap_options)[index]
        tokens = tokens.reshape(len(index), -1).astype(np.int64)
        labels = self.labels[index].astype(np.int64)
        self.check_range("token", index, tokens.min(1), self.meta["vocab"])
        self.check_range("token", index, tokens.max(1), self.meta["vocab"])
        self.check_range("label", index, labels, max(1, self.meta["n_classes"]))
        return tokens, labels

    def check_range(self, kind: str, index: np.ndarray, values: np.ndarray, limit: int) -> None:
        """Require 0 <= values < limit.  index, values (B,)"""
        is_bad = (values >= limit) | (values < 0)
        if is_bad.any():
            bad = int(np.argmax(is_bad))
            raise SystemExit(f"{self.tokens_file}, row {index[bad]}: "
                             f"{kind} {values[bad]} is not in [0, {limit})")


def fits_grid(shape: tuple[int, ...], grid: tuple[int, ...]) -> bool:
    """Are these sequences of the grid? Those of a line may be flat: (n, 512) for [1, 512]."""
    is_line = max(grid) == math.prod(grid)
    return shape[1:] == grid or (is_line and shape[1:] == (max(grid),))


def read_labels(path: Path, n: int, n_classes: int) -> np.ndarray:
    """The labels of n sequences; zeros where there are no classes and no file.  ->  (n,)"""
    if n_classes == 0 and not os.path.lexists(path):
        return np.broadcast_to(np.int64(0), n)
    return np.array(read_npy(path))


def read_npy(path: Path) -> np.memmap:
    """Open an .npy file as a read-only memory map."""
    require_file(path)
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:      # a corrupt header raises many kinds of exception
        raise SystemExit(f"{path} cannot be read: {error!r}") from None


class SplitWriter:
    """Write <split>_tokens.npy chunk by chunk, and <split>_labels.npy at the end if there are
    classes."""

    def __init__(self, folder: Path, split: str, meta: dict) -> None:
        self.file = open(folder / f"{split}_tokens.npy", "wb")
        self.labels_file = folder / f"{split}_labels.npy"
        self.n = 0
        self.has_classes = meta["n_classes"] > 0
        self.labels = []
        self.dtype = np.dtype(np.uint16 if meta["vocab"] <= 2**16 else np.uint32)
        self.grid = tuple(meta["grid"])
        self.write_header()

    def write_header(self) -> None:
        """Called first with n = 0, and again once n is known: numpy pads it so that any n fits."""
        header = {
            "descr": self.dtype.str,
            "fortran_order": False,
            "shape": (self.n, *self.grid),
        }
        np.lib.format.write_array_header_1_0(self.file, header)

    def add(self, tokens: np.ndarray, labels: np.ndarray) -> None:
        """Append a chunk.  tokens (m, *grid), labels (m,)"""
        assert tokens.shape == (len(labels), *self.grid)
        self.file.write(tokens.astype(self.dtype).tobytes())
        if self.has_classes:
            self.labels.append(np.asarray(labels, np.int64))
        self.n += len(labels)

    def close(self) -> None:
        """Write the final header and the labels."""
        self.file.seek(0)
        self.write_header()
        header_bytes = self.file.tell()
        token_bytes = self.n * self.dtype.itemsize * math.prod(self.grid)
        assert self.file.seek(0, 2) == header_bytes + token_bytes
        self.file.close()
        if not self.has_classes:
            return
        labels = io.BytesIO()       # np.save to a full disk does not say that it is full
        np.save(labels, np.concatenate(self.labels))
        self.labels_file.write_bytes(labels.getvalue())
