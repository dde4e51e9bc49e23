"""A folder of pictures, each pixel the nearest of K colours that k-means finds.

python data.py images --folder F [--image-size S] [--palette K] [--group-by TEXT] [--name NAME]
python data.py images --folder F [--image-size S] --encoder encoder.jit [--vocab V] [--name NAME]

With --encoder the tokens are those of an image tokenizer, a TorchScript module from images
(n, 3, S, S) in [-1, 1] to ids (n, h, w), or to a tuple that begins with them. A command that was
stopped resumes where it was.

F holds pictures, one folder of pictures per class, WebDataset tars, or what `save_to_disk` of the
library datasets wrote. A tenth is held out. Files whose names agree up to TEXT are held out
together: with --group-by _, 12_a.png and 12_b.png stay in one split.

Transparent pictures are put on white, animations give their first frame, and photographs are
turned as their EXIF data says. The central square is resized as in guided-diffusion
(arXiv:2105.05233). A picture whose shorter side is S pixels already is only cropped, so pixel art
stays exact; smaller pictures are refused rather than enlarged.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sources import _archives
from sources._pictures import ENDINGS, Picture, first_names

MAKES_ITSELF = False
SIZE = 32
N_COLOURS = 64
SEED = 0


def folder_name(options) -> str:
    if not options.folder:
        return "images"
    return os.path.basename(os.path.abspath(options.folder)) or "images"


def make(options) -> tuple[dict, Iterator]:
    """Choose colours from the training pictures, or load the encoder, then read all in chunks.

    ->  meta, chunks (split, tokens (m, *grid), labels (m,))
    """
    size = options.image_size or SIZE
    n_colours = options.palette or N_COLOURS
    for name, value in (("image_size", size), ("palette", n_colours)):
        if value < 2:
            raise SystemExit(f"{name} is {value}; it must be at least 2")
    if options.palette and options.encoder:
        raise SystemExit("--palette and --encoder exclude each other: choose one")
    splits, class_names, unreadable = find_splits(options.folder, size, options.group_by)
    meta = {
        "name": options.name or folder_name(options),
        "n_classes": len(class_names),
        "class_names": class_names,
        "given": [],
    }
    if options.encoder:
        from sources import _encoder

        encoder = _encoder.Encoder(options.encoder, size, options)
        if options.decoder:
            encoder.check_decoder(Path(options.decoder))
        meta |= {"vocab": encoder.vocab, "grid": list(encoder.grid), "palette": "any"}
        return meta, _encoder.token_chunks(splits, encoder, unreadable, meta["name"])
    from sources import _palette

    palette = _palette.find_palette(splits["train"], size, n_colours)
    meta |= {"vocab": len(palette), "grid": [size, size], "palette": palette.tolist()}
    return meta, _palette.token_chunks(splits, size, palette, unreadable)


# Finding pictures


def find_splits(
    path: str, size: int, separator: str
) -> tuple[dict[str, list[Picture]], list[str], list[str]]:
    """The pictures of a folder by split.

    ->  splits, names of the classes, names of unreadable files
    """
    if not os.path.isdir(path):
        raise SystemExit(f"no folder {path!r}: name a folder of pictures with --folder F")
    folder = Path(path)
    pictures, unreadable = check_headers(folder, find_pictures(folder), size)
    class_names = sorted({picture.class_name for picture in pictures} - {""}, key=natural)
    splits = split_pictures(folder, pictures, class_names, separator)
    return splits, class_names, unreadable


def natural(name: str) -> tuple[bool, int, str]:
    """The order of class names: whole numbers by their size, before words."""
    is_number = name.isascii() and name.isdecimal()
    return not is_number, int(name[:18]) if is_number else 0, name


def find_pictures(folder: Path) -> list[Picture]:
    """All pictures of a folder, or of the folders or tars in it, by class and name."""
    if _archives.is_dataset(folder):
        return from_entries(_archives.find_in_dataset(folder))
    tars = sorted(folder.glob("*.tar"))
    if tars:
        return from_entries(_archives.find_in_tars(tars, ENDINGS))
    pictures = pictures_in(folder)
    inner_pictures = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir() and not entry.name.startswith("."):
            inner_pictures += pictures_in(folder / entry.name, class_of(entry.name))
    if pictures and inner_pictures:
        raise SystemExit(f"{folder} holds {len(pictures)} pictures and also folders of pictures: "
                         "put each picture into the folder of its class, or all into one")
    if not pictures and not inner_pictures:
        endings = " ".join(sorted(ENDINGS))
        raise SystemExit(f"{folder} holds no pictures, nor do the folders in it ({endings})")
    return pictures or inner_pictures


def from_entries(entries: list[_archives.Entry]) -> list[Picture]:
    return [Picture(path, class_name, place=place) for path, class_name, place in entries]


def pictures_in(folder: Path, class_name: str = "") -> list[Picture]:
    """The files in a folder whose names end as those of pictures do, sorted."""
    names = []
    for entry in os.scandir(folder):
        ending = os.path.splitext(entry.name)[1].lower()
        if ending in ENDINGS and not entry.name.startswith(".") and entry.is_file():
            names.append(entry.name)
    return [Picture(folder / name, class_name) for name in sorted(names)]


def class_of(folder_name: str) -> str:
    """The name of a folder in valid Unicode."""
    return os.fsencode(folder_name).decode(errors="replace")


def check_headers(
    folder: Path, pictures: list[Picture], size: int
) -> tuple[list[Picture], list[str]]:
    """Require pictures of at least size x size pixels.  ->  pictures, names of other files"""
    readable = []
    unreadable = []
    small = []
    n_transparent = 0
    for picture in tqdm(pictures, "headers", unit=" pictures"):
        try:
            with picture.open() as image:
                n_transparent += image.has_transparency_data
                if min(image.size) < size:
                    small.append(f"{picture.name!r}, {image.width} x {image.height}")
        except Exception:       # corrupt files raise many kinds of exception
            unreadable.append(picture.name)
        else:
            readable.append(picture)
    if small:
        raise SystemExit(f"{folder}: {len(small)} of {len(readable)} pictures are smaller than "
                         f"{size} x {size} ({small[0]}): choose a smaller --image-size")
    if not readable:
        raise SystemExit(f"{folder}: no picture can be read ({first_names(unreadable)})")
    if n_transparent:
        print(f"{n_transparent} pictures have an alpha channel and are put on white")
    return readable, unreadable


# Splits


def split_pictures(
    folder: Path, pictures: list[Picture], class_names: list[str], separator: str
) -> dict[str, list[Picture]]:
    """Label the pictures, and hold out a tenth of their groups."""
    groups = [group_of(picture.path, separator) for picture in pictures]
    if len(set(groups)) < 2:
        raise SystemExit(f"{folder}: a single picture, or a single group of {len(pictures)}, is "
                         "too few, one is held out")
    val_groups = held_out(groups)
    label_of = {name: label for label, name in enumerate(class_names)}
    splits = {"train": [], "val": []}
    for picture, group in zip(pictures, groups, strict=True):
        label = label_of.get(picture.class_name, 0)
        split = "val" if group in val_groups else "train"
        splits[split].append(picture._replace(label=label))
    return splits


def group_of(path: Path, separator: str) -> str:
    """The name up to the separator; without a separator, each file is its own group."""
    return path.stem.split(separator)[0] if separator else str(path)


def held_out(groups: list[str]) -> set[str]:
    """A random tenth of the different groups, at least one."""
    names = sorted(set(groups))
    permutation = np.random.default_rng(SEED).permutation(len(names))
    n_val = max(1, len(names) // 10)
    return {names[i] for i in permutation[:n_val]}
