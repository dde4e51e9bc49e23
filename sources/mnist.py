"""70,000 handwritten digits (LeCun, Cortes, Burges 1998), padded to 32x32, 8 grey levels.

python data.py mnist [--folder F] [--image-size S] [--grey-levels L]

F holds IDX files, plain or .gz; without it they are downloaded.
"""

import gzip
import hashlib
import http.client
import math
import os
import urllib.request
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

SIZE = 32
GREY_LEVELS = 8
N_VAL = 1000            # images held out if there are only the t10k files
MAX_BYTES = 2**31       # of a file, expanded
BLOCK = 2**20           # bytes read at a time
MAKES_ITSELF = False
MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb85e73",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
CLASSES = [str(digit) for digit in range(10)]


def folder_name(options, name: str = "mnist") -> str:
    size = options.image_size or SIZE
    grey_levels = options.grey_levels or GREY_LEVELS
    if (size, grey_levels) == (SIZE, GREY_LEVELS):
        return name
    return f"{name}_{size}x{size}_{grey_levels}"


def make(
    options,
    name: str = "mnist",
    mirror: str = MIRROR,
    md5: dict[str, str] = MD5,
    classes: list[str] = CLASSES,
) -> tuple[dict, list]:
    """Padded, resized and quantised images.  ->  meta, [(split, tokens (n, S, S), labels (n,))]"""
    size = options.image_size or SIZE
    grey_levels = options.grey_levels or GREY_LEVELS
    if grey_levels < 2:
        raise SystemExit(f"grey_levels is {grey_levels}; it must be at least 2")
    if options.folder:
        folder = Path(options.folder)
    else:
        folder = download(name, mirror, md5)
    chunks = []
    for split, images, labels in read_splits(folder):
        chunks.append((split, to_tokens(images, size, grey_levels), labels))
    meta = {
        "name": name,
        "vocab": grey_levels,
        "grid": [size, size],
        "n_classes": len(classes),
        "class_names": classes,
        "palette": "grey",
        "given": [],
    }
    return meta, chunks


def read_splits(folder: Path) -> list[tuple]:
    """Train on the train files and hold out t10k, or the last images of t10k if it is alone.

    ->  [(split, images (n, 28, 28) uint8, labels (n,) uint8)]
    """
    train = read_pair(folder, "train")
    t10k = read_pair(folder, "t10k")
    if t10k is None:
        raise SystemExit(f"{folder}: no t10k-images-idx3-ubyte, plain or .gz")
    if train is not None:
        return [("train", *train), ("val", *t10k)]
    images, labels = t10k
    if len(images) <= N_VAL:
        raise SystemExit(f"{folder}: {len(images)} images are too few, {N_VAL} are held out")
    return [
        ("train", images[:-N_VAL], labels[:-N_VAL]),
        ("val", images[-N_VAL:], labels[-N_VAL:]),
    ]


def to_tokens(images: np.ndarray, size: int, grey_levels: int) -> np.ndarray:
    """Pad to 32x32, resize, quantise.  (n, 28, 28) uint8  ->  (n, size, size) unsigned"""
    from PIL import Image

    padded = pad(images)
    if padded.shape[1:] != (size, size):
        padded_images = [Image.fromarray(image) for image in padded]
        resized = [image.resize((size, size), Image.Resampling.BOX) for image in padded_images]
        padded = np.stack(resized)
    dtype = np.min_scalar_type(grey_levels - 1)
    return np.round(padded * ((grey_levels - 1) / 255)).astype(dtype)


def pad(images: np.ndarray) -> np.ndarray:
    """Centre images on black, at least 32x32.  (n, h, w)  ->  (n, max(32, h), max(32, w)) uint8"""
    n, height, width = images.shape
    padded_height = max(SIZE, height)
    padded_width = max(SIZE, width)
    top = (padded_height - height) // 2
    left = (padded_width - width) // 2
    padded = np.zeros((n, padded_height, padded_width), np.uint8)
    padded[:, top:top + height, left:left + width] = images
    return padded


def read_pair(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Images (n, h, w) and labels (n,) of "train" or "t10k", None without an image file."""
    images_file = find_file(folder, f"{part}-images-idx3-ubyte")
    labels_file = find_file(folder, f"{part}-labels-idx1-ubyte")
    if images_file is None:
        return None
    if labels_file is None:
        raise SystemExit(f"{folder}: {images_file.name} without its labels")
    images = read_idx(images_file, 3)
    labels = read_idx(labels_file, 1)
    if len(images) != len(labels):
        raise SystemExit(f"{images_file} holds {len(images)} images, "
                         f"{labels_file} {len(labels)} labels")
    is_bad = labels >= len(CLASSES)
    if is_bad.any():
        bad = int(np.argmax(is_bad))
        raise SystemExit(f"{labels_file}, row {bad}: "
                         f"label {labels[bad]} is not in [0, {len(CLASSES)})")
    return images, labels


def find_file(folder: Path, stem: str) -> Path | None:
    """The file itself, else its .gz, else None."""
    for name in (stem, f"{stem}.gz"):
        if os.path.isfile(folder / name):
            return folder / name
    return None


def read_idx(path: Path, n_axes: int) -> np.ndarray:
    """An IDX file of bytes: 0 0 8 n_axes, big-endian sizes, data.  ->  uint8 array

    No more is expanded than the header announces.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            header = file.read(4 + 4 * n_axes)
            shape = idx_shape(path, header, n_axes)
            n_announced = math.prod(shape)
            raw = read_at_most(file, n_announced + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise SystemExit(f"{path} cannot be read: {error}") from None
    if len(raw) != n_announced:
        n_bytes = "more" if len(raw) > n_announced else len(raw)
        raise SystemExit(f"{path} says it holds {shape}, but has {n_bytes} bytes of data")
    return np.frombuffer(raw, np.uint8).reshape(shape)


def idx_shape(path: Path, header: bytes, n_axes: int) -> tuple[int, ...]:
    """The sizes that an IDX header announces, none of them 0."""
    if len(header) < 4 + 4 * n_axes or header[:4] != bytes([0, 0, 8, n_axes]):
        raise SystemExit(f"{path} is no IDX file of bytes with {n_axes} axes")
    shape = tuple(np.frombuffer(header, ">u4", offset=4).tolist())
    if not 0 < math.prod(shape) <= MAX_BYTES:
        raise SystemExit(f"{path} says it holds {shape}, not between 1 and {MAX_BYTES} bytes")
    return shape


def read_at_most(file: BinaryIO, n_bytes: int) -> bytearray:
    """The next n_bytes, or all up to the end. Memory grows with what is there only."""
    raw = bytearray()
    while block := file.read(min(BLOCK, n_bytes - len(raw))):
        raw += block
    return raw


def download(name: str, mirror: str, md5: dict[str, str]) -> Path:
    """Fetch those of a mirror's files that are missing in data/downloads/NAME.  ->  folder"""
    folder = Path("data/downloads") / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, digest in md5.items():
        if not (folder / file).exists():
            fetch(f"{mirror}{file}", folder / file, digest)
    return folder


def fetch(url: str, target: Path, digest: str) -> None:
    """Download a file and check its MD5 digest; target never holds an incomplete file."""
    part = target.with_name(f"{target.name}.part")
    try:
        found = copy_url(url, part)
    except (OSError, http.client.HTTPException) as error:
        part.unlink(missing_ok=True)
        raise SystemExit(f"{url} cannot be fetched ({error}): put the IDX files into a folder "
                         "and name it with --folder") from None
    if found != digest:
        part.unlink()
        raise SystemExit(f"{url} is not the file expected: md5 {found}, not {digest}")
    os.replace(part, target)


def copy_url(url: str, path: Path) -> str:
    """Download with a progress bar.  ->  MD5 digest, hexadecimal"""
    from tqdm import tqdm

    digest = hashlib.md5()
    with urllib.request.urlopen(url, timeout=30) as reply, open(path, "wb") as out:
        n_bytes = int(reply.headers.get("Content-Length") or 0)
        with tqdm(total=n_bytes, unit="B", unit_scale=True) as bar:
            while block := reply.read(1 << 16):
                digest.update(block)
                out.write(block)
                bar.update(len(block))
    return digest.hexdigest()
