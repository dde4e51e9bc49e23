"""Tokens on disk, and the command that makes them.

A folder, data/<name>/ or any other, holds meta.json and, for each split, <split>_tokens.npy
(n, *grid) and, where there are classes, <split>_labels.npy (n,).

python data.py NAME [--folder F | --file F] [--name FOLDER]     make the folder from sources/NAME.py
python data.py --list                                           list the sources
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import numpy as np

from formats.config_files import literals_of, summary_of
from formats.flags import Bound, check_bounds
from formats.messages import may_stop_reading, nearest, shown
from formats.meta_file import (
    MAX_IDS,
    MAX_TOKENS,
    META_DEFAULTS,
    SOURCES,
    leaves_folder,
    meta_error,
    read_meta,
    require_file,
    source_names,
)
from formats.token_files import Split, SplitWriter

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path("data")
CONFIGS = Path(__file__).parent / "configs"
SPLITS = ("train", "val")
MAX_NAME = 200              # characters of a folder's name
MAX_LISTED = 20             # folders in a message

Side = Annotated[int, Bound(0, math.isqrt(MAX_TOKENS))]
Length = Annotated[int, Bound(0, MAX_TOKENS)]
Ids = Annotated[int, Bound(0, MAX_IDS - 1)]
Colours = Annotated[int, Bound(0, 2**12)]       # that k-means chooses


@dataclass(frozen=True)
class Make:
    """Make data/<name>/ from one of sources/. `python data.py --list` lists them."""
    source: str             # file name in sources/, without .py
    name: str = ""          # folder under data/; "": chosen by the source
    folder: str = ""        # folder with the source's files, if it reads several; "": download them
    file: str = ""          # the source's file, if it reads one
    image_size: Side = 0    # tokens per side, with --encoder pixels; 0: the source's default
    grey_levels: Ids = 0    # grey levels, if the source quantises images; 0: its default
    palette: Colours = 0    # colours, if the source reads pictures in colour; 0: its default
    encoder: str = ""       # pictures: TorchScript file of an image tokenizer's encoder; it is run
    decoder: str = ""       # with --encoder: its decoder; "": decoder.jit beside it, if any
    group_by: str = ""      # pictures: names that agree up to this text are held out together
    length: Length = 0      # tokens per sequence, if the source is text; 0: its default
    vocab: Ids = 0          # vocabulary size of a token file or an encoder; 0: found in it
    # text: JSON file of the `tokenizers` library; "": bytes. Token file or encoder: what made the
    # tokens, such a JSON file or the name of an image tokenizer; an encoder's tells its vocabulary
    tokenizer: str = ""
    train_tokenizer: Ids = 0    # text: vocabulary of a byte-level BPE that is trained on the file
    stochastic: bool = False    # bounce: draw a new velocity at every wall


# Reading


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


def import_source(name: str) -> ModuleType:
    """Import sources/<name>.py."""
    names = source_names()
    if name not in names:
        raise SystemExit(f"no source {name}; there are {', '.join(names)}; {nearest(name, names)}")
    return importlib.import_module(f"sources.{name}")


def list_sources() -> str:
    """Every source with the first line of its docstring, read without importing it."""
    names = source_names()
    width = max(map(len, names))
    lines = []
    for name in names:
        summary = summary_of(SOURCES / f"{name}.py")
        lines.append(f"{name:<{width}}  {summary}")
    return "\n".join(lines)


# Writing


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
    check_bounds(options)
    if "/" in options.name or options.name.startswith(".") or len(options.name) > MAX_NAME:
        raise SystemExit(f"--name {shown(options.name)} is not a plain folder name")
    return options


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


def folder_of_config(values: dict) -> Path:
    """The data folder of a config file that assigns these values."""
    name = values.get("data", "digits")
    if name not in source_names():
        return folder_of(name)
    sizes = {key: values.get(key, 0) for key in ("image_size", "grey_levels")}
    return ROOT / import_source(name).folder_name(Make(name, **sizes))


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
