"""Tokens on disk, and the command that makes them.

A folder, data/<name>/ or any other, holds meta.json and, for each split, <split>_tokens.npy
(n, *grid) and, where there are classes, <split>_labels.npy (n,).

python data.py NAME [--folder F | --file F] [--name FOLDER]     make the folder from sources/NAME.py
python data.py --list                                           list the sources
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import hashlib
import importlib
import io
import json
import math
import os
import re
import reprlib
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path("data")
SOURCES = Path(__file__).parent / "sources"
CONFIGS = Path(__file__).parent / "configs"
SPLITS = ("train", "val")
MAX_IDS = 2**31             # of a vocabulary, and classes
MAX_TOKENS = 2**24          # of a sequence
MAX_AXES = 8                # of its grid
MAX_COLOURS = 2**12         # that k-means chooses
META_TYPES = {
    "name": str,
    "vocab": int,
    "grid": list,
    "n_classes": int,
    "class_names": list,
    "palette": (str, list),
    "given": list,
}
META_DEFAULTS = {"n_classes": 0, "class_names": [], "given": []}
KEPT = ("decoder", "tokenizer")     # files that travel with the tokens, by their key in meta.json


@dataclass(frozen=True)
class Make:
    """Make data/<name>/ from one of sources/. `python data.py --list` lists them."""
    source: str             # file name in sources/, without .py
    name: str = ""          # folder under data/; "": chosen by the source
    folder: str = ""        # folder with the source's files, if it reads several; "": download them
    file: str = ""          # the source's file, if it reads one
    image_size: int = 0     # tokens per side, with --encoder pixels; 0: the source's default
    grey_levels: int = 0    # grey levels, if the source quantises images; 0: its default
    palette: int = 0        # colours, if the source reads pictures in colour; 0: its default
    encoder: str = ""       # pictures: TorchScript file of an image tokenizer's encoder; it is run
    decoder: str = ""       # with --encoder: its decoder; "": decoder.jit beside it, if any
    group_by: str = ""      # pictures: names that agree up to this text are held out together
    length: int = 0         # tokens per sequence, if the source is text; 0: its default
    vocab: int = 0          # vocabulary size of a token file or an encoder; 0: found in it
    # text: JSON file of the `tokenizers` library; "": bytes. Token file or encoder: what made the
    # tokens, such a JSON file or the name of an image tokenizer, which implies the vocabulary
    tokenizer: str = ""
    train_tokenizer: int = 0    # text: vocabulary of a byte-level BPE that is trained on the file
    stochastic: bool = False    # bounce: draw a new velocity at every wall


LARGEST = {                 # of the options that are sizes
    "image_size": math.isqrt(MAX_TOKENS),
    "grey_levels": MAX_IDS - 1,
    "palette": MAX_COLOURS,
    "length": MAX_TOKENS,
    "vocab": MAX_IDS - 1,
    "train_tokenizer": MAX_IDS - 1,
}
MAX_TEXT = 1000             # characters of the options that are texts
MAX_NAME = 200              # characters of a folder's name
MAX_SHOWN = 100             # characters of a value in a message
MAX_LISTED = 20             # folders in a message


# Reading


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


def require_file(path: Path) -> None:
    """Refuse what is missing, and what opening would wait for, as a pipe."""
    if not os.path.isfile(path):
        raise SystemExit(f"{path} cannot be read: it is missing or not a file")


# config.py has the same shown(), is_plain() and may_stop_reading(): neither imports a sibling


def shown(value: object) -> str:
    """A value in a message: on one line, cut short where it is long."""
    return " ".join(reprlib.repr(value).split())[:MAX_SHOWN]


def read_meta(folder: Path) -> dict:
    """Read and check a folder's meta.json."""
    path = folder / "meta.json"
    require_file(path)
    try:
        meta = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise SystemExit(f"{path} cannot be read: {error}") from None
    if isinstance(meta, dict):
        meta = META_DEFAULTS | meta
    message = meta_error(meta)
    if message:
        raise SystemExit(f"{path}: {message}")
    return meta


def meta_error(meta: object) -> str:
    """The first thing that is wrong with a meta.json, "" if nothing is."""
    for key, kind in META_TYPES.items():
        if not isinstance(meta, dict) or not has_type(meta.get(key), kind):
            return f"{key} is missing or of the wrong type"
    return size_error(meta) or display_error(meta) or score_error(meta) or kept_error(meta)


def has_type(value: object, kind: type | tuple[type, ...]) -> bool:
    """isinstance(), but True is no number."""
    return isinstance(value, kind) and not isinstance(value, bool)


def size_error(meta: dict) -> str:
    """What is wrong with the vocabulary, the grid, the classes or the known tokens."""
    vocab = meta["vocab"]
    grid = meta["grid"]
    n_classes = meta["n_classes"]
    if vocab < 2 or n_classes < 0 or len(meta["class_names"]) != n_classes:
        return "vocab must be at least 2, and class_names must name n_classes classes"
    if vocab >= MAX_IDS or n_classes >= MAX_IDS:
        return f"vocab and n_classes must be less than {MAX_IDS}"
    if not is_grid(grid):
        return f"grid {shown(grid)} is not a list of sizes that hold at least two tokens"
    if math.prod(grid) > MAX_TOKENS or len(grid) > MAX_AXES:
        return f"grid {shown(grid)} holds more than {MAX_TOKENS} tokens, or has too many axes"
    for entry in meta["given"]:
        if not is_index(entry, vocab) and not is_position(entry, grid):
            return (f"given {shown(entry)} is neither an id below {vocab} "
                    "nor a position on the grid")
    return ""


def display_error(meta: dict) -> str:
    """What is wrong with the colours or the words."""
    palette = meta["palette"]
    if isinstance(palette, list) and not is_palette(palette, meta["vocab"]):
        return f"palette must name a colour (r, g, b), 0 to 255, for each of {meta['vocab']} tokens"
    if palette == "text" and meta["vocab"] > 256 and "tokenizer" not in meta:
        return (f"palette text is for bytes; a vocabulary of {meta['vocab']} needs a tokenizer "
                "beside it")
    if not all(isinstance(name, str) for name in meta["class_names"]):
        return "class_names must be words"
    for key in ("name", "palette"):
        if isinstance(meta[key], str) and leaves_folder(meta[key]):
            return f"{key} {shown(meta[key])} leaves the folder"
    return ""


def score_error(meta: dict) -> str:
    """What is wrong with the source that judges samples."""
    score = meta.get("score", "")
    is_certain = meta.get("is_certain", False)
    if not isinstance(score, str) or (score and score not in source_names()):
        return f"score {shown(score)} names no file in sources/"
    if not isinstance(is_certain, bool) or (is_certain and not score):
        return f"is_certain is {shown(is_certain)}; it must be true or false, and needs a score"
    return ""


def kept_error(meta: dict) -> str:
    """What is wrong with the entries of decoder and tokenizer, which are optional."""
    for key in KEPT:
        if key in meta and (message := file_error(meta[key])):
            return f"{key} {message}"
    return ""


def file_error(entry: object) -> str:
    """What is wrong with the name and the digest of a file."""
    if not isinstance(entry, dict) or entry.keys() != {"file", "sha256"}:
        return f"{shown(entry)} is not a file and its sha256"
    name = entry["file"]
    if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*", name):
        return f"{shown(name)} is not a plain file name"
    if not isinstance(entry["sha256"], str) or not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
        return f"has the sha256 {shown(entry['sha256'])}, not 64 hex digits"
    return ""


def is_index(value: object, limit: int) -> bool:
    return type(value) is int and 0 <= value < limit


def is_grid(grid: list) -> bool:
    """Is this a list of positive sizes with at least two tokens in all?"""
    if not grid or not all(type(size) is int and size > 0 for size in grid):
        return False
    return math.prod(grid) >= 2


def is_position(entry: object, grid: list[int]) -> bool:
    """Is this one index per axis of the grid?"""
    if not isinstance(entry, list) or len(entry) != len(grid):
        return False
    return all(map(is_index, entry, grid))


def is_palette(colours: list, vocab: int) -> bool:
    """Is this one colour for each token?"""
    return len(colours) == vocab and all(map(is_colour, colours))


def is_colour(colour: object) -> bool:
    """Is this [r, g, b], each from 0 to 255?"""
    if not isinstance(colour, list) or len(colour) != 3:
        return False
    return all(type(value) in (int, float) and 0 <= value <= 255 for value in colour)


def leaves_folder(path: str) -> bool:
    return Path(path).is_absolute() or ".." in Path(path).parts


def load(name: str, image_size: int = 0, grey_levels: int = 0) -> tuple[dict, dict[str, Split]]:
    """Open data/<name>, or a folder by its path; sources that need no files are made on first use.

    ->  meta, {"train": Split, "val": Split}
    """
    folder = folder_of(name)
    if name in source_names():
        folder = make_if_missing(name, image_size, grey_levels)
    elif "/" in name and not has_data(folder):
        raise SystemExit(f"no data in {folder}: there is no meta.json")
    elif not has_data(folder):
        raise SystemExit(f"no data in {folder} and no source of that name; {suggestion(name)}")
    meta = read_meta(folder)
    return meta, {split: Split(folder, split, meta) for split in SPLITS}


def folder_of(name: str) -> Path:
    """A path where there is a slash, else a folder under data/."""
    if "/" in name:
        return Path(name)
    if leaves_folder(name):
        raise SystemExit(f"data {name} leaves the folder {ROOT}/")
    return ROOT / name


def has_data(folder: Path) -> bool:
    return os.path.isfile(folder / "meta.json")


def make_if_missing(name: str, image_size: int, grey_levels: int) -> Path:
    """The folder of a source's tokens, which is made first if it is missing.  ->  folder"""
    source = import_source(name)
    options = check_options(Make(name, image_size=image_size, grey_levels=grey_levels))
    folder = ROOT / source.folder_name(options)
    if has_data(folder):
        return folder
    if not source.MAKES_ITSELF:
        size = image_size or "S"
        n_levels = grey_levels or "L"
        raise SystemExit(f"no data in {folder}: make it with `python data.py {name}` "
                         f"(--image-size {size} --grey-levels {n_levels} unless its defaults)")
    make(source, folder, options)
    return folder


def suggestion(name: str) -> str:
    """All names there are, and the one closest to a misspelt one, if any is."""
    sources = source_names()
    made = sorted(path.parent.name for path in ROOT.glob("[!.]*/meta.json"))
    close = difflib.get_close_matches(name, sources + made, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    others = [f"{ROOT}/{folder}" for folder in made if folder not in sources]
    rest = ", ..." if len(others) > MAX_LISTED else ""
    return f"there are {', '.join(sources + others[:MAX_LISTED])}{rest}{hint}"


# Files that travel with the tokens


def decoder_beside(options: Make) -> Path | None:
    """The decoder to keep with the data: --decoder, or decoder.jit beside the encoder."""
    if options.decoder and not options.encoder:
        raise SystemExit("--decoder belongs to --encoder: name both")
    if options.decoder:
        require_file(Path(options.decoder))
        return Path(options.decoder)
    path = Path(options.encoder).with_name("decoder.jit") if options.encoder else None
    return path if path and path.is_file() else None


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kept_file(folder: Path, meta: dict, key: str) -> Path | None:
    """The decoder or tokenizer kept in a folder of data or of a run, refused if it has changed."""
    if key not in meta:
        return None
    path = folder / meta[key]["file"]
    require_file(path)
    if file_sha256(path) != meta[key]["sha256"]:
        raise SystemExit(f"{path} has changed: its sha256 is not that of meta.json")
    return path


def copy_kept_files(source: Path, folder: Path, meta: dict) -> None:
    """Copy decoder and tokenizer from one folder to another, unless they are there."""
    for key in KEPT:
        path = kept_file(source, meta, key)
        if path is None:
            continue
        target = folder / path.name
        if target.is_file() and file_sha256(target) == meta[key]["sha256"]:
            continue
        scratch = folder / f".{path.name}.tmp"
        shutil.copyfile(path, scratch)
        scratch.replace(target)


# Known tokens


def known_mask(meta: dict, tokens: Tensor) -> Tensor | None:
    """Tokens that are never corrupted: the ids and the grid positions in meta["given"].

    tokens (B, N)  ->  (B, N) bool, None if meta["given"] is empty
    """
    import torch

    if not meta["given"]:
        return None
    known_ids = [entry for entry in meta["given"] if isinstance(entry, int)]
    positions = [entry for entry in meta["given"] if isinstance(entry, list)]
    id_tensor = torch.tensor(known_ids, dtype=tokens.dtype, device=tokens.device)
    mask = torch.isin(tokens, id_tensor)
    for position in positions:
        mask[:, np.ravel_multi_index(position, meta["grid"])] = True
    return mask


def context_mask(meta: dict, tokens: Tensor, n_frames: int) -> Tensor | None:
    """Real tokens shown to a sampler: the known ones and the first n_frames of a video.

    tokens (B, N)  ->  (B, N) bool, None if there are none
    """
    import torch

    mask = known_mask(meta, tokens)
    is_video = len(meta["grid"]) == 3
    if not is_video or n_frames == 0:
        return mask
    if mask is None:
        mask = torch.zeros_like(tokens, dtype=torch.bool)
    tokens_per_frame = math.prod(meta["grid"][1:])
    mask[:, :n_frames * tokens_per_frame] = True
    return mask


# Order of training


class ShuffledIndices:
    """Row indices in training order: each epoch is a permutation drawn from (seed, epoch).

    The index at a position depends on that position alone, so a run resumes anywhere.
    With seed None every epoch is in file order.
    """

    def __init__(self, n: int, seed: int | None) -> None:
        self.n = n
        self.seed = seed
        self.epoch = -1     # the epoch whose permutation is kept
        self.permutation = np.arange(n)

    def take(self, start: int, count: int) -> np.ndarray:
        """Indices at positions start .. start + count - 1 of the endless order.

        ->  (count,) int64
        """
        indices = np.empty(count, np.int64)
        for i in range(count):
            epoch, position = divmod(start + i, self.n)
            if epoch != self.epoch:
                self.permutation = self.permute(epoch)
                self.epoch = epoch
            indices[i] = self.permutation[position]
        return indices

    def permute(self, epoch: int) -> np.ndarray:
        """All n indices in the order of one epoch.  ->  (n,) int64"""
        permutation = np.arange(self.n)
        if self.seed is not None:
            np.random.default_rng([self.seed, epoch]).shuffle(permutation)
        return permutation


# Sources


def source_names() -> list[str]:
    return sorted(path.stem for path in SOURCES.glob("[a-z]*.py"))


def import_source(name: str) -> ModuleType:
    """Import sources/<name>.py."""
    names = source_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1, cutoff=0)
        raise SystemExit(f"no source {name}; there are {', '.join(names)}; "
                         f"did you mean {close[0]}?")
    return importlib.import_module(f"sources.{name}")


def list_sources() -> str:
    """Every source with the first line of its docstring, read without importing it."""
    names = source_names()
    width = max(map(len, names))
    lines = []
    for name in names:
        tree = ast.parse((SOURCES / f"{name}.py").read_text())
        summary = ast.get_docstring(tree).splitlines()[0]
        lines.append(f"{name:<{width}}  {summary}")
    return "\n".join(lines)


# Writing


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


def make(source: ModuleType, folder: Path, options: Make) -> None:
    """Write a source's tokens to a folder.

    The folder appears complete or not at all, even if several runs make it at the same time.
    """
    try:
        make_folder(source, folder, options)
    except (OSError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        raise SystemExit(f"{folder} cannot be made: {reason}") from None


def make_folder(source: ModuleType, folder: Path, options: Make) -> None:
    """make(), except that an OSError is raised as it is."""
    decoder = decoder_beside(options)
    options = replace(options, decoder=str(decoder or ""))
    # chunks: (split, tokens (m, *grid), labels (m,)); kept: {file name: bytes}, if any
    meta, chunks, *kept = source.make(options)
    kept = kept[0] if kept else {}
    if decoder:
        kept["decoder.jit"] = decoder.read_bytes()
    for name, content in kept.items():
        sha256 = hashlib.sha256(content).hexdigest()
        meta[Path(name).stem] = {"file": name, "sha256": sha256}
    meta = META_DEFAULTS | meta
    message = meta_error(meta)
    if message:
        raise SystemExit(f"{folder} cannot be made: {message}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}_") as scratch:
        new_folder = Path(scratch) / folder.name
        n_rows = write_folder(new_folder, meta, chunks)
        for name, content in kept.items():
            (new_folder / name).write_bytes(content)
        try:
            new_folder.rename(folder)
        except OSError:
            if not has_data(folder):
                raise SystemExit(f"{folder} is in the way and holds no data: remove it") from None
            print(f"{folder} was made meanwhile and is kept")
            return
    counts = ", ".join(f"{n} {split}" for split, n in n_rows.items())
    shape = " x ".join(map(str, meta["grid"]))
    print(f"made {folder}: {counts} sequences of {shape} tokens, vocabulary {meta['vocab']}")


def write_folder(folder: Path, meta: dict, chunks: Iterable[tuple]) -> dict[str, int]:
    """Create a folder with all splits and meta.json.  ->  {split: number of sequences}"""
    folder.mkdir()
    writers = {}
    try:
        for split, tokens, labels in chunks:
            if split not in writers:
                writers[split] = SplitWriter(folder, split, meta)
            writers[split].add(tokens, labels)
        for writer in writers.values():
            writer.close()
    finally:
        for writer in writers.values():
            with contextlib.suppress(OSError):      # a full disk, which has been said
                writer.file.close()
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    return {split: writer.n for split, writer in writers.items()}


def check_options(options: Make) -> Make:
    """Refuse, by name, texts and sizes of no use."""
    for name, value in vars(options).items():
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise SystemExit(f"{name} is {len(value)} characters long; "
                             f"it must have at most {MAX_TEXT}")
        if isinstance(value, str) and not is_plain(value):
            raise SystemExit(f"{name} is {shown(value)}; it must be without control characters")
        high = LARGEST.get(name)
        if high and not 0 <= value <= high:
            raise SystemExit(f"{name} is {shown(value)}; it must lie in [0, {high}]")
    if "/" in options.name or options.name.startswith(".") or len(options.name) > MAX_NAME:
        raise SystemExit(f"--name {shown(options.name)} is not a plain folder name")
    return options


def is_plain(text: str) -> bool:
    """Is this one line of characters that a file can be named by?"""
    return not any(ord(char) < 32 or 0xD800 <= ord(char) < 0xE000 for char in text)


def train_command(folder: Path) -> str:
    """How to train on a folder: by a config for this data, preferably of its name, or by --data."""
    meta = read_meta(folder)
    for path in sorted(CONFIGS.glob("*.py"), key=lambda path: (path.stem != folder.name, path)):
        stated = literals_of(path)
        has_shape = all(stated.get(key, meta[key]) == meta[key] for key in ("vocab", "n_classes"))
        has_shape &= list(stated.get("grid", meta["grid"])) == meta["grid"]
        if has_shape and folder_of_config(stated) == folder:
            return f"python train_ddpd.py {path.stem}"
    return f"python train_ddpd.py --data {folder.name}"


def literals_of(path: Path) -> dict:
    """The assignments of literals in a config file; calculated values are left out."""
    values = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign):
            with contextlib.suppress(ValueError):
                values[node.targets[0].id] = ast.literal_eval(node.value)
    return values


def folder_of_config(values: dict) -> Path:
    """The data folder of a config file that assigns these values."""
    name = values.get("data", "digits")
    if name not in source_names():
        return folder_of(name)
    sizes = {key: values.get(key, 0) for key in ("image_size", "grey_levels")}
    return ROOT / import_source(name).folder_name(Make(name, **sizes))


@contextlib.contextmanager
def may_stop_reading() -> Iterator[None]:
    """For what is printed into a pipe such as `| head`, which may close before the end."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # flushed at exit
        raise SystemExit(0) from None


def main() -> None:
    if sys.argv[1:] == ["--list"]:
        with may_stop_reading():
            print(list_sources())
        return
    import tyro

    with may_stop_reading():
        options = check_options(tyro.cli(Make, config=(tyro.conf.PositionalRequiredArgs,)))
    source = import_source(options.source)
    folder = ROOT / (options.name or source.folder_name(options))
    if has_data(folder):
        raise SystemExit(f"{folder} is there already: remove it first, or choose another --name")
    make(source, folder, options)
    print(f"Next: {train_command(folder)}")


if __name__ == "__main__":
    main()
