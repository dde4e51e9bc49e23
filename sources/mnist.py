"""70,000 handwritten digits, 28x28 pixels (LeCun, Cortes, Burges 1998), padded to 32x32 and quantised to 8 grey levels.

python data.py mnist [--folder F] [--image-size S] [--levels L]      F: IDX files, plain or .gz; without it, downloaded
"""

import gzip
import hashlib
import os
import urllib.request
import zlib
from pathlib import Path

import numpy as np

SIZE, LEVELS = 32, 8
N_VAL = 1000            # of the t10k images, where those are all there is
MAKES_ITSELF = False
MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MD5 = {"train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb85e73",
       "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
       "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
       "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c"}
CLASSES = [str(d) for d in range(10)]


def folder_name(how, name="mnist"):
    size, levels = how.image_size or SIZE, how.levels or LEVELS
    return name if (size, levels) == (SIZE, LEVELS) else f"{name}_{size}x{size}_{levels}"


def make(how, name="mnist", mirror=None, md5=None, classes=CLASSES):
    """-> meta, [(split, tokens (n, S, S), labels (n,))]: train and t10k, or of t10k alone the last held out"""
    size, levels = how.image_size or SIZE, how.levels or LEVELS
    if levels < 2:
        raise SystemExit(f"levels is {levels}; it must be at least 2")
    folder = Path(how.folder) if how.folder else download(name, mirror or MIRROR, md5 or MD5)
    parts = {part: read_pair(folder, part) for part in ("train", "t10k")}
    if parts["t10k"] is None:
        raise SystemExit(f"{folder}: no t10k-images-idx3-ubyte, plain or .gz")
    images, labels = parts["t10k"]
    if parts["train"]:
        splits = [("train", *parts["train"]), ("val", images, labels)]
    elif len(images) <= N_VAL:
        raise SystemExit(f"{folder}: {len(images)} images are too few, {N_VAL} are held out")
    else:
        splits = [("train", images[:-N_VAL], labels[:-N_VAL]), ("val", images[-N_VAL:], labels[-N_VAL:])]
    meta = dict(name=name, vocab=levels, grid=[size, size], n_classes=10, class_names=classes, palette="grey", given=[])
    return meta, [(split, tokens(images, size, levels), labels) for split, images, labels in splits]


def tokens(images, size, levels):
    """Pad to a square of 32, resize, quantise.  (n, 28, 28) uint8 -> (n, size, size)"""
    from PIL import Image

    height, width = (max(SIZE, n) for n in images.shape[1:])
    square = np.zeros((len(images), height, width), np.uint8)
    top, left = (height - images.shape[1]) // 2, (width - images.shape[2]) // 2
    square[:, top:top + images.shape[1], left:left + images.shape[2]] = images
    if (height, width) != (size, size):
        square = np.stack([Image.fromarray(y).resize((size, size), Image.Resampling.BOX) for y in square])
    return np.round(square * ((levels - 1) / 255)).astype(np.uint16)


def read_pair(folder, part):
    """Images and labels of one part; None where its image file is missing."""
    images, labels = (find(folder, f"{part}-{what}") for what in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    if images is None:
        return None
    if labels is None:
        raise SystemExit(f"{folder}: {images.name} without its labels")
    x, y = read_idx(images, 3), read_idx(labels, 1)
    if len(x) != len(y):
        raise SystemExit(f"{images} holds {len(x)} images, {labels} {len(y)} labels")
    if (y >= len(CLASSES)).any():
        bad = int(np.argmax(y >= len(CLASSES)))
        raise SystemExit(f"{labels}, row {bad}: label {y[bad]} is not in [0, {len(CLASSES)})")
    return x, y


def find(folder, stem):
    return next((folder / f for f in (stem, stem + ".gz") if (folder / f).is_file()), None)


def read_idx(path, n_axes):
    """An IDX file of bytes: 0 0 8 axes, big-endian sizes, data.  -> uint8 array"""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            raw = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise SystemExit(f"{path} cannot be read: {error}") from None
    head = 4 + 4 * n_axes
    if len(raw) < head or raw[:4] != bytes([0, 0, 8, n_axes]):
        raise SystemExit(f"{path} is no IDX file of bytes with {n_axes} axes")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", n_axes, 4))
    if len(raw) - head != np.prod(shape, dtype=object) or 0 in shape:
        raise SystemExit(f"{path} says it holds {shape}, but has {len(raw) - head} bytes of data")
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)


def download(name, mirror, md5):
    """Fetch the files of a mirror into data/downloads/NAME, checked.  -> folder"""
    from tqdm import tqdm

    folder = Path("data/downloads") / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, digest in md5.items():
        target, part = folder / file, folder / (file + ".part")
        if target.exists():
            continue
        sha = hashlib.md5()
        try:
            with urllib.request.urlopen(mirror + file, timeout=30) as reply, open(part, "wb") as out, \
                    tqdm(total=int(reply.headers.get("Content-Length") or 0), unit="B", unit_scale=True) as bar:
                while block := reply.read(1 << 16):
                    sha.update(block)
                    out.write(block)
                    bar.update(len(block))
        except OSError as error:
            part.unlink(missing_ok=True)
            raise SystemExit(f"{mirror}{file} cannot be fetched ({error}): put the IDX files into a folder and name it "
                             "with --folder") from None
        if sha.hexdigest() != digest:
            part.unlink()
            raise SystemExit(f"{mirror}{file} is not the file expected: md5 {sha.hexdigest()}, not {digest}")
        os.replace(part, target)
    return folder
