"""A folder of pictures, each pixel the nearest of K colours that k-means finds.

python data.py images --folder F [--image-size S] [--palette K] [--group-by TEXT] [--name NAME]
python data.py images --folder F [--image-size S] --encoder encoder.jit [--vocab V] [--name NAME]

With --encoder the tokens are those of an image tokenizer, a TorchScript module from images
(n, 3, S, S) in [-1, 1] to ids (n, h, w), or to a tuple that begins with them.

F holds pictures, or one folder of pictures per class. A tenth is held out. Files whose names agree
up to TEXT are held out together: with --group-by _, 12_a.png and 12_b.png stay in one split.

Transparent pictures are put on white, animations give their first frame, and photographs are
turned as their EXIF data says. The central square is resized as in guided-diffusion
(arXiv:2105.05233). A picture whose shorter side is S pixels already is only cropped, so pixel art
stays exact; smaller pictures are refused rather than enlarged.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

MAKES_ITSELF = False
SIZE = 32
N_COLOURS = 64
ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
SEED = 0
N_SAMPLE_PICTURES = 10_000      # from which the colours are chosen
N_SAMPLE_PIXELS = 2**20
N_ROUNDS = 100                  # of k-means, at most
CHUNK = 2**20                   # pixels read at a time
N_SHOWN = 3                     # files named in a message
RADIX = np.array([2**16, 2**8, 1])


class Picture(NamedTuple):
    path: Path
    label: int


def folder_name(options) -> str:
    if not options.folder:
        return "images"
    return os.path.basename(os.path.abspath(options.folder)) or "images"


def make(options) -> tuple[dict, Iterator]:
    """Choose colours from the training pictures, then read all pictures in chunks.

    ->  meta, chunks (split, tokens (m, S, S), labels (m,))
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
        from sources._encoder import Encoder

        encoder = Encoder(options.encoder, size, options)
        if options.decoder:
            encoder.check_decoder(Path(options.decoder))
        meta |= {"vocab": encoder.vocab, "grid": list(encoder.grid), "palette": "any"}
        return meta, encoded_chunks(splits, size, encoder, unreadable)
    palette = find_palette(splits["train"], size, n_colours)
    meta |= {"vocab": len(palette), "grid": [size, size], "palette": palette.tolist()}
    return meta, token_chunks(splits, size, palette, unreadable)


# Files


def find_splits(
    path: str, size: int, separator: str
) -> tuple[dict[str, list[Picture]], list[str], list[Path]]:
    """The pictures of a folder by split.  ->  splits, names of the classes, unreadable files"""
    if not os.path.isdir(path):
        raise SystemExit(f"no folder {path!r}: name a folder of pictures with --folder F")
    folder = Path(path)
    paths, unreadable = check_headers(folder, find_pictures(folder), size)
    class_names = sorted({class_name(path) for path in paths if path.parent != folder})
    splits = split_pictures(folder, paths, class_names, separator)
    return splits, class_names, unreadable


def find_pictures(folder: Path) -> list[Path]:
    """All pictures of a folder, or of the folders in it, by class and name."""
    paths = pictures_in(folder)
    inner_paths = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir() and not entry.name.startswith("."):
            inner_paths += pictures_in(folder / entry.name)
    if paths and inner_paths:
        raise SystemExit(f"{folder} holds {len(paths)} pictures and also folders of pictures: "
                         "put each picture into the folder of its class, or all into one")
    if not paths and not inner_paths:
        endings = " ".join(sorted(ENDINGS))
        raise SystemExit(f"{folder} holds no pictures, nor do the folders in it ({endings})")
    return paths or inner_paths


def pictures_in(folder: Path) -> list[Path]:
    """The files in a folder whose names end as those of pictures do, sorted."""
    names = []
    for entry in os.scandir(folder):
        ending = os.path.splitext(entry.name)[1].lower()
        if ending in ENDINGS and not entry.name.startswith(".") and entry.is_file():
            names.append(entry.name)
    return [folder / name for name in sorted(names)]


def class_name(path: Path) -> str:
    """The name of a picture's folder, in valid Unicode."""
    return os.fsencode(path.parent.name).decode(errors="replace")


def check_headers(folder: Path, paths: list[Path], size: int) -> tuple[list[Path], list[Path]]:
    """Require pictures of at least size x size pixels.  ->  paths of pictures, of other files"""
    readable = []
    unreadable = []
    small = []
    n_transparent = 0
    for path in tqdm(paths, "headers", unit=" pictures"):
        try:
            with Image.open(path) as image:
                n_transparent += image.has_transparency_data
                if min(image.size) < size:
                    small.append(f"{path.name!r}, {image.width} x {image.height}")
        except Exception:       # corrupt files raise many kinds of exception
            unreadable.append(path)
        else:
            readable.append(path)
    if small:
        raise SystemExit(f"{folder}: {len(small)} of {len(readable)} pictures are smaller than "
                         f"{size} x {size} ({small[0]}): choose a smaller --image-size")
    if not readable:
        raise SystemExit(f"{folder}: no picture can be read ({first_names(unreadable)})")
    if n_transparent:
        print(f"{n_transparent} pictures have an alpha channel and are put on white")
    return readable, unreadable


def first_names(paths: list[Path]) -> str:
    names = ", ".join(repr(path.name) for path in paths[:N_SHOWN])
    return f"{names}, ..." if len(paths) > N_SHOWN else names


def split_pictures(
    folder: Path, paths: list[Path], class_names: list[str], separator: str
) -> dict[str, list[Picture]]:
    """Label the pictures, and hold out a tenth of their groups."""
    groups = [group_of(path, separator) for path in paths]
    if len(set(groups)) < 2:
        raise SystemExit(f"{folder}: a single picture, or a single group of {len(paths)}, is too "
                         "few, one is held out")
    val_groups = held_out(groups)
    label_of = {name: label for label, name in enumerate(class_names)}
    splits = {"train": [], "val": []}
    for path, group in zip(paths, groups, strict=True):
        label = label_of.get(class_name(path), 0)
        split = "val" if group in val_groups else "train"
        splits[split].append(Picture(path, label))
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


# Pictures


def load(path: Path, size: int) -> np.ndarray | None:
    """Read a picture.  ->  (S, S, 3) uint8, None if it cannot be read"""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            return central_square(on_white(upright), size)
    except Exception:       # corrupt files raise many kinds of exception
        return None


def on_white(image: Image.Image) -> Image.Image:
    """A picture of any kind as 8-bit RGB."""
    if image.mode == "F":
        raise ValueError("the range of floating-point pictures is not known")
    if image.mode.startswith("I"):      # 16 bits of grey, which convert() would clip to 8
        grey = np.asarray(image).clip(0, 65535) / 257
        image = Image.fromarray(grey.round().astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def central_square(image: Image.Image, size: int) -> np.ndarray:
    """Resize until the shorter side fits, then crop.  ->  (S, S, 3) uint8

    Averaging over 2x2 pixels while there are twice too many, then bicubic
    (center_crop_arr in image_datasets.py of guided-diffusion).
    """
    if min(image.size) < size:
        raise ValueError(f"{image.size} pixels are smaller than {size} x {size}")
    while min(image.size) >= 2 * size:
        half = (image.width // 2, image.height // 2)
        image = image.resize(half, Image.Resampling.BOX)
    if min(image.size) > size:
        scale = size / min(image.size)
        fitted = (round(image.width * scale), round(image.height * scale))
        image = image.resize(fitted, Image.Resampling.BICUBIC)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return np.asarray(image)[top:top + size, left:left + size]


# Colours


def find_palette(pictures: list[Picture], size: int, n_colours: int) -> np.ndarray:
    """The colours of the pictures, or K means of them if there are more.  ->  (K, 3) uint8, sorted

    The means are those of the different colours, weighted by how often they occur.
    """
    from sklearn.cluster import KMeans

    codes = sample_pixels(pictures, size).astype(np.int64) @ RADIX
    different, counts = np.unique(codes, return_counts=True)
    palette = different[:, None] // RADIX % 256
    if len(palette) > n_colours:
        kmeans = KMeans(n_colours, n_init=1, max_iter=N_ROUNDS, random_state=SEED)
        kmeans.fit(palette, sample_weight=counts)
        palette = np.unique(kmeans.cluster_centers_.round(), axis=0)
    if len(palette) < 2:
        raise SystemExit(f"the training pictures have no colour but {palette[0].tolist()}")
    if len(palette) < n_colours:
        print(f"the training pictures have {len(palette)} colours, "
              f"so the palette has {len(palette)}, not {n_colours}")
    return palette.astype(np.uint8)


def sample_pixels(pictures: list[Picture], size: int) -> np.ndarray:
    """Random pixels of random pictures, equally many of each; all of them if they are few.

    ->  (n, 3) uint8
    """
    rng = np.random.default_rng(SEED)
    n_pictures = min(len(pictures), N_SAMPLE_PICTURES)
    n_each = min(size**2, N_SAMPLE_PIXELS // n_pictures)
    chosen = rng.permutation(len(pictures))[:n_pictures]
    samples = []
    for i in tqdm(chosen, "colours", unit=" pictures"):
        pixels = load(pictures[i].path, size)
        if pixels is not None:
            some = rng.permutation(size**2)[:n_each]
            samples.append(pixels.reshape(-1, 3)[some])
    if not samples:
        raise SystemExit(f"none of {n_pictures} training pictures can be read")
    return np.concatenate(samples)


def nearest(pixels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """The id of the closest colour.  pixels (..., 3), palette (K, 3)  ->  (...) int64"""
    from sklearn.metrics import pairwise_distances_argmin

    rows = pixels.reshape(-1, 3).astype(np.float64)
    ids = pairwise_distances_argmin(rows, palette.astype(np.float64))
    return ids.reshape(pixels.shape[:-1])


def token_chunks(
    splits: dict[str, list[Picture]], size: int, palette: np.ndarray, unreadable: list[Path]
) -> Iterator[tuple]:
    """Read and quantise all pictures.  yields (split, tokens (m, S, S), labels (m,))"""
    unreadable = list(unreadable)
    squared_errors = 0.0
    n_values = 0
    n_pictures = sum(map(len, splits.values()))
    with tqdm(total=n_pictures, desc="pictures", unit=" pictures") as bar:
        for split, pictures in splits.items():
            n_before = n_values
            for pixels, labels in pixel_chunks(pictures, size, unreadable, bar):
                tokens = nearest(pixels, palette)
                errors = palette[tokens].astype(np.float64) - pixels
                squared_errors += np.square(errors).sum()
                n_values += errors.size
                yield split, tokens, labels
            if n_values == n_before:
                raise SystemExit(f"none of {len(pictures)} {split} pictures can be read")
    report_unreadable(unreadable)
    rms = (squared_errors / n_values) ** 0.5
    print(f"{len(palette)} colours, {rms:.1f} of 255 rms from those of the pictures")


def encoded_chunks(
    splits: dict[str, list[Picture]], size: int, encoder, unreadable: list[Path]
) -> Iterator[tuple]:
    """Read and encode all pictures.  yields (split, tokens (m, h, w), labels (m,))"""
    unreadable = list(unreadable)
    n_pictures = sum(map(len, splits.values()))
    with tqdm(total=n_pictures, desc="pictures", unit=" pictures") as bar:
        for split, pictures in splits.items():
            is_empty = True
            for pixels, labels in pixel_chunks(pictures, size, unreadable, bar):
                yield split, encoder.encode(pixels), labels
                is_empty = False
            if is_empty:
                raise SystemExit(f"none of {len(pictures)} {split} pictures can be read")
    report_unreadable(unreadable)
    if not encoder.has_decoder:
        print("no decoder.jit lies beside the encoder: tokens are shown in colours of no meaning, "
              "unless --decoder names one")


def report_unreadable(paths: list[Path]) -> None:
    if paths:
        print(f"{len(paths)} files cannot be read and are left out: {first_names(paths)}")


def pixel_chunks(
    pictures: list[Picture], size: int, unreadable: list[Path], bar: tqdm
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Read pictures in order.  yields pixels (m, S, S, 3) uint8, labels (m,)

    The paths of those that cannot be read are added to `unreadable`.
    """
    n_rows = max(1, CHUNK // size**2)
    for start in range(0, len(pictures), n_rows):
        pixels = []
        labels = []
        for picture in pictures[start:start + n_rows]:
            square = load(picture.path, size)
            bar.update()
            if square is None:
                unreadable.append(picture.path)
            else:
                pixels.append(square)
                labels.append(picture.label)
        if pixels:
            yield np.stack(pixels), np.array(labels)
