"""Tokens on disk: data/<name>/ holds meta.json and, per split, <split>_tokens.npy (n, *grid), <split>_labels.npy (n,).

python data.py NAME [--folder F | --file F] [--name FOLDER]     makes the folder from sources/NAME.py
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


@dataclass(frozen=True)
class Make:
    """Make data/<name>/ from one of sources/."""
    source: str             # file name in sources/, without .py
    name: str = ""          # folder under data/; "": the source's own
    folder: str = ""        # folder of the source's files, where it has several; "": downloaded
    file: str = ""          # the source's one file, where it needs one
    image_size: int = 0     # tokens per side, where the source makes tokens; 0: its own
    levels: int = 0         # grey levels, where the source makes tokens; 0: its own
    length: int = 0         # bytes per sequence, where the source is text; 0: its own
    vocab: int = 0          # ids, where the source's file holds tokens; 0: the largest and those below
    tokenizer: str = ""     # whose tokens they are: warns of ids that it never writes
    stochastic: bool = False    # bounce: a new velocity at every wall


class Split:
    """One split on disk: only the rows asked for are read, and no map of the file outlives the call."""

    def __init__(self, folder, split, meta):
        self.meta, self.tokens_file = meta, folder / f"{split}_tokens.npy"
        tokens, self.labels = read_npy(self.tokens_file), np.array(read_npy(folder / f"{split}_labels.npy"))
        if tokens.shape[1:] != tuple(meta["grid"]) or tokens.dtype not in (np.uint16, np.uint32):
            raise SystemExit(f"{self.tokens_file} holds {tokens.dtype} {tokens.shape}, not uint16 or uint32 "
                             f"(n, {', '.join(map(str, meta['grid']))}) as meta.json says")
        if self.labels.shape != (len(tokens),) or self.labels.dtype.kind not in "iu":
            raise SystemExit(f"{folder}: {len(tokens)} {split} sequences, but labels of shape {self.labels.shape}, "
                             f"{self.labels.dtype}")
        if len(tokens) == 0:
            raise SystemExit(f"{self.tokens_file} is empty")
        self.where = dict(dtype=tokens.dtype, mode="r", offset=tokens.offset, shape=tokens.shape,
                          order="F" if tokens.flags.fnc else "C")

    def __len__(self):
        return len(self.labels)

    def some(self, n):
        """n sequences spread over the split, again from the first where it has fewer.  -> as rows()"""
        return self.rows(np.arange(n) * max(1, len(self) // n) % len(self))

    def rows(self, index):
        """Sequences and labels by index, checked.  index (B,) -> tokens (B, N) int64, labels (B,) int64"""
        tokens = np.memmap(self.tokens_file, **self.where)[index].reshape(len(index), -1).astype(np.int64)
        labels = self.labels[index].astype(np.int64)
        for what, values, limit in [("token", tokens.max(1), self.meta["vocab"]),
                                    ("label", labels, max(1, self.meta["n_classes"]))]:
            if (values >= limit).any() or (values < 0).any():
                bad = int(np.argmax((values >= limit) | (values < 0)))
                raise SystemExit(f"{self.tokens_file}, row {index[bad]}: {what} {values[bad]} is not in [0, {limit})")
        return tokens, labels


def read_npy(path):
    """A memory-mapped array."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:                                          # a spoiled header raises many kinds
        raise SystemExit(f"{path} cannot be read: {error!r}") from None


def read_meta(folder):
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise SystemExit(f"{path} cannot be read: {error}") from None
    for key, kind in META.items():
        if not isinstance(meta, dict) or not isinstance(meta.get(key), kind):
            raise SystemExit(f"{path}: {key} is missing or of the wrong type")
    if meta["vocab"] < 2 or meta["n_classes"] < 0 or len(meta["class_names"]) != meta["n_classes"]:
        raise SystemExit(f"{path}: vocab must be at least 2, and class_names must name n_classes classes")
    if not meta["grid"] or not all(type(n) is int and n > 0 for n in meta["grid"]) or math.prod(meta["grid"]) < 2:
        raise SystemExit(f"{path}: grid {meta['grid']} is not a list of sizes that hold at least two tokens")
    if isinstance(meta["palette"], list) and not is_palette(meta["palette"], meta["vocab"]):
        raise SystemExit(f"{path}: palette must name a colour (r, g, b), 0 to 255, for each of {meta['vocab']} tokens")
    if not all(isinstance(name, str) for name in meta["class_names"]):
        raise SystemExit(f"{path}: class_names must be words")
    for key, value in meta.items():
        if isinstance(value, str) and (Path(value).is_absolute() or ".." in Path(value).parts):
            raise SystemExit(f"{path}: {key} {value!r} leaves the folder")
    for y in meta["given"]:
        is_place = isinstance(y, list) and len(y) == len(meta["grid"]) and all(map(is_index, y, meta["grid"]))
        if not is_place and not is_index(y, meta["vocab"]):
            raise SystemExit(f"{path}: given {y!r} is neither an id below {meta['vocab']} nor a place on the grid")
    if meta.get("score", "") not in ("", *source_names()):
        raise SystemExit(f"{path}: score {meta['score']!r} names no file in sources/")
    return meta


def is_index(y, limit):
    return type(y) is int and 0 <= y < limit


def given(meta, tokens):
    """What is always given: tokens of the ids and at the places that meta names.  (B, N) -> (B, N) bool or None"""
    import torch

    if not meta["given"]:
        return None
    ids = torch.tensor([y for y in meta["given"] if isinstance(y, int)], dtype=tokens.dtype, device=tokens.device)
    out = torch.isin(tokens, ids)
    for place in (y for y in meta["given"] if isinstance(y, list)):
        out[:, np.ravel_multi_index(place, meta["grid"])] = True
    return out


def context(meta, tokens, n_frames=2):
    """What a sampler is told of real tokens: those that are given, and the first frames of a video.  -> bool or None"""
    import torch

    out = given(meta, tokens)
    if len(meta["grid"]) == 3 and n_frames:
        out = torch.zeros_like(tokens, dtype=torch.bool) if out is None else out
        out[:, :n_frames * math.prod(meta["grid"][1:])] = True
    return out


def is_palette(colours, vocab):
    return len(colours) == vocab and all(isinstance(c, list) and len(c) == 3 and all(
        type(v) in (int, float) and 0 <= v <= 255 for v in c) for c in colours)


def source_names():
    return sorted(p.stem for p in SOURCES.glob("[a-z]*.py"))


def import_source(name):
    if name not in source_names():
        close = difflib.get_close_matches(name, source_names(), n=1, cutoff=0)
        raise SystemExit(f"no source {name}; there are {', '.join(source_names())}; did you mean {close[0]}?")
    return importlib.import_module(f"sources.{name}")


def load(name, image_size=0, levels=0):
    """Open data/<name>, made first where its source can make itself.  -> meta, {"train": Split, "val": Split}"""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise SystemExit(f"data {name} leaves the folder {ROOT}/")
    folder = ROOT / name
    if name in source_names():
        source, how = import_source(name), Make(name, image_size=image_size, levels=levels)
        folder = ROOT / source.folder_name(how)
        if not (folder / "meta.json").exists():
            if not source.MAKES_ITSELF:
                raise SystemExit(f"no data in {folder}: make it with `python data.py {name}` "
                                 f"(--image-size {image_size or 'S'} --levels {levels or 'L'} where not its own)")
            make(source, folder, how)
    elif not (folder / "meta.json").exists():
        close = difflib.get_close_matches(name, source_names(), n=1)
        raise SystemExit(f"no data in {folder} and no source of that name"
                         + (f"; did you mean {close[0]}?" if close else f"; sources: {', '.join(source_names())}"))
    meta = read_meta(folder)
    return meta, {split: Split(folder, split, meta) for split in ("train", "val")}


class Writer:
    """<split>_tokens.npy, written a chunk at a time."""

    def __init__(self, folder, split, meta):
        self.file, self.n, self.labels = open(folder / f"{split}_tokens.npy", "wb"), 0, []
        self.dtype, self.grid = np.dtype(np.uint16 if meta["vocab"] <= 2**16 else np.uint32), tuple(meta["grid"])
        self.labels_file = folder / f"{split}_labels.npy"
        self.write_header()

    def write_header(self):
        """At the start and again when n is known: numpy pads it so that any n fits."""
        np.lib.format.write_array_header_1_0(self.file, dict(descr=self.dtype.str, fortran_order=False,
                                                             shape=(self.n, *self.grid)))

    def add(self, tokens, labels):
        assert tokens.shape == (len(labels), *self.grid)
        self.file.write(tokens.astype(self.dtype).tobytes())
        self.labels.append(np.asarray(labels, np.int64))
        self.n += len(labels)

    def close(self):
        begin = self.file.seek(0)
        self.write_header()
        assert begin == 0 and self.file.tell() + self.n * self.dtype.itemsize * math.prod(self.grid) \
            == self.file.seek(0, 2)
        self.file.close()
        np.save(self.labels_file, np.concatenate(self.labels))


def make(source, folder, how):
    """Write a source's tokens to folder, whole or not at all, also where several runs make it at once."""
    meta, chunks = source.make(how)                                     # (split, tokens (m, *grid), labels (m,))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}_") as scratch:
        new, writers = Path(scratch) / folder.name, {}
        new.mkdir()
        for split, tokens, labels in chunks:
            if split not in writers:
                writers[split] = Writer(new, split, meta)
            writers[split].add(tokens, labels)
        for writer in writers.values():
            writer.close()
        (new / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        try:
            new.rename(folder)
        except OSError:                                                 # another run was first
            if not (folder / "meta.json").exists():
                raise SystemExit(f"{folder} is in the way and holds no data: remove it") from None
            print(f"{folder} was made meanwhile and is kept")
            return
    print(f"made {folder}: " + ", ".join(f"{writer.n} {split}" for split, writer in writers.items())
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


if __name__ == "__main__":
    import tyro

    how = tyro.cli(Make, config=(tyro.conf.PositionalRequiredArgs,))
    if "/" in how.name or how.name.startswith("."):
        raise SystemExit(f"--name {how.name} is not a plain folder name")
    source = import_source(how.source)
    folder = ROOT / (how.name or source.folder_name(how))
    if (folder / "meta.json").exists():
        raise SystemExit(f"{folder} is there already: remove it first, or choose another --name")
    make(source, folder, how)
