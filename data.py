"""Tokens on disk: data/<name>/ holds meta.json and, per split, <split>_tokens.npy (n, *grid), <split>_labels.npy (n,).

python data.py NAME [--name FOLDER] [--image-size S] [--levels L]     makes the folder from sources/NAME.py
"""

import difflib
import importlib
import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path("data")
SOURCES = Path(__file__).parent / "sources"
META = {"name": str, "vocab": int, "grid": list, "n_classes": int, "class_names": list, "palette": (str, list),
        "given": list}


class Split:
    """One split, memory-mapped: only the rows asked for are read."""

    def __init__(self, folder, split, meta):
        self.meta, self.tokens_file = meta, folder / f"{split}_tokens.npy"
        self.tokens, self.labels = read_npy(self.tokens_file), read_npy(folder / f"{split}_labels.npy")
        if self.tokens.shape[1:] != tuple(meta["grid"]) or self.tokens.dtype not in (np.uint16, np.uint32):
            raise SystemExit(f"{self.tokens_file} holds {self.tokens.dtype} {self.tokens.shape}, not uint16 or uint32 "
                             f"(n, {', '.join(map(str, meta['grid']))}) as meta.json says")
        if self.labels.shape != (len(self.tokens),):
            raise SystemExit(f"{folder}: {len(self.tokens)} {split} sequences, but labels of shape {self.labels.shape}")
        if len(self.tokens) == 0:
            raise SystemExit(f"{self.tokens_file} is empty")

    def __len__(self):
        return len(self.tokens)

    def rows(self, index):
        """Sequences and labels by index, checked.  index (B,) -> tokens (B, N) int64, labels (B,) int64"""
        tokens = self.tokens[index].reshape(len(index), -1).astype(np.int64)
        labels = self.labels[index].astype(np.int64)
        for what, values, limit in [("token", tokens.max(1), self.meta["vocab"]),
                                    ("label", labels, max(1, self.meta["n_classes"]))]:
            if (values >= limit).any() or (values < 0).any():
                bad = int(np.argmax((values >= limit) | (values < 0)))
                raise SystemExit(f"{self.tokens_file}, row {index[bad]}: {what} {values[bad]} is not in [0, {limit})")
        return tokens, labels


def read_npy(path):
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise SystemExit(f"{path} cannot be read: {error}") from None
    if not isinstance(array, np.ndarray):
        raise SystemExit(f"{path} is not one array")
    return array


def read_meta(folder):
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read: {error}") from None
    for key, kind in META.items():
        if not isinstance(meta, dict) or not isinstance(meta.get(key), kind):
            raise SystemExit(f"{path}: {key} is missing or of the wrong type")
    if meta["vocab"] < 2 or meta["n_classes"] < 0 or len(meta["class_names"]) != meta["n_classes"]:
        raise SystemExit(f"{path}: vocab must be at least 2, and class_names must name n_classes classes")
    if not meta["grid"] or not all(type(n) is int and n > 0 for n in meta["grid"]) or math.prod(meta["grid"]) < 2:
        raise SystemExit(f"{path}: grid {meta['grid']} is not a list of sizes that hold at least two tokens")
    if isinstance(meta["palette"], list) and np.shape(meta["palette"]) != (meta["vocab"], 3):
        raise SystemExit(f"{path}: palette must name a colour (r, g, b) for each of {meta['vocab']} tokens")
    if meta["given"]:
        raise SystemExit(f"{path}: tokens that are always given are not supported yet")
    return meta


def source_names():
    return sorted(p.stem for p in SOURCES.glob("[a-z]*.py"))


def load(name, image_size=0, levels=0):
    """Open data/<name>, made first where its source can make itself.  -> meta, {"train": Split, "val": Split}"""
    folder = ROOT / name
    if name in source_names():
        source = importlib.import_module(f"sources.{name}")
        folder = ROOT / source.folder_name(image_size, levels)
        if not (folder / "meta.json").exists():
            make(source, folder, image_size, levels)
    elif not (folder / "meta.json").exists():
        close = difflib.get_close_matches(name, source_names(), n=1)
        raise SystemExit(f"no data in {folder} and no source of that name"
                         + (f"; did you mean {close[0]}?" if close else f"; sources: {', '.join(source_names())}"))
    meta = read_meta(folder)
    return meta, {split: Split(folder, split, meta) for split in ("train", "val")}


def make(source, folder, image_size, levels):
    """Write a source's tokens to folder, whole or not at all, also where several runs make it at once."""
    meta, splits = source.make(image_size, levels)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}_") as scratch:
        new = Path(scratch) / folder.name
        new.mkdir()
        for split, (tokens, labels) in splits.items():
            np.save(new / f"{split}_tokens.npy", tokens.astype(np.uint16 if meta["vocab"] <= 2**16 else np.uint32))
            np.save(new / f"{split}_labels.npy", labels.astype(np.int64))
        (new / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        try:
            new.rename(folder)
        except OSError:                                                 # another run was first
            if not (folder / "meta.json").exists():
                raise SystemExit(f"{folder} is in the way and holds no data: remove it") from None
    print(f"made {folder}: " + ", ".join(f"{len(y)} {split}" for split, (_, y) in splits.items())
          + f" sequences of {' x '.join(map(str, meta['grid']))} tokens, vocabulary {meta['vocab']}")


class Order:
    """Indices in training order: one seeded permutation per epoch, a function of position alone. No seed: in order."""

    def __init__(self, n, seed):
        self.n, self.seed, self.epoch = n, seed, -1

    def take(self, start, count):
        """Indices at positions start .. start + count of the endless order.  -> (count,) int64"""
        out = np.empty(count, np.int64)
        for i in range(count):
            epoch, where = divmod(start + i, self.n)
            if epoch != self.epoch:
                self.epoch, self.order = epoch, np.arange(self.n)
                if self.seed is not None:
                    np.random.default_rng([self.seed, epoch]).shuffle(self.order)
            out[i] = self.order[where]
        return out


@dataclass(frozen=True)
class Make:
    """Make data/<name>/ from one of sources/."""
    source: str             # file name in sources/, without .py
    name: str = ""          # folder under data/; "": the source's own
    image_size: int = 0     # tokens per side; 0: the source's own
    levels: int = 0         # grey levels; 0: the source's own


if __name__ == "__main__":
    import tyro

    args = tyro.cli(Make, config=(tyro.conf.PositionalRequiredArgs,))
    if not (SOURCES / f"{args.source}.py").exists():
        raise SystemExit(f"no source {args.source}; there are {', '.join(source_names())}")
    chosen = importlib.import_module(f"sources.{args.source}")
    make(chosen, ROOT / (args.name or chosen.folder_name(args.image_size, args.levels)), args.image_size, args.levels)
