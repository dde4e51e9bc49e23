"""Single pictures: where they lie, and their pixels, read in processes of their own if many."""

import io
import os
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ContainerIO, Image, ImageOps
from tqdm import tqdm

from sources._archives import Place, row_bytes

ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
PARALLEL_FROM = 2000        # pictures; processes take seconds to start
MAX_WORKERS = 16
N_AHEAD = 256               # pictures that workers may be ahead of their reader
CHUNK = 2**20               # pixels read at a time
N_SHOWN = 3                 # files named in a message


class Picture(NamedTuple):
    path: Path              # in an archive: its path, then the name there
    class_name: str = ""
    label: int = 0
    place: Place | None = None      # None: in a file of its own

    @property
    def name(self) -> str:
        return self.path.name

    def open(self) -> Image.Image:
        """Read the header; the pixels follow when they are asked for."""
        if self.place is None:
            return Image.open(self.path)
        if not self.place.n_bytes:
            return Image.open(io.BytesIO(row_bytes(self.place)))
        file = open(self.place.file, "rb")
        return Image.open(ContainerIO.ContainerIO(file, self.place.start, self.place.n_bytes))


def load(picture: Picture, size: int) -> np.ndarray | None:
    """Read a picture.  ->  (S, S, 3) uint8, None if it cannot be read"""
    try:
        with picture.open() as image:
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


# Many of them


def load_all(pictures: list[Picture], size: int) -> Iterator[np.ndarray | None]:
    """Read pictures in order, ahead of the reader by a bounded number.  yields as load()"""
    n_workers = min(MAX_WORKERS, os.cpu_count() or 1)
    if len(pictures) < PARALLEL_FROM or n_workers < 2:
        for picture in pictures:
            yield load(picture, size)
        return
    pending = deque()
    try:
        with ProcessPoolExecutor(n_workers, get_context("spawn"), ignore_interrupts) as pool:
            for picture in pictures:
                pending.append(pool.submit(load, picture, size))
                if len(pending) > N_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    except BrokenProcessPool:
        raise SystemExit("a process that reads pictures was killed, perhaps for memory: "
                         "start again") from None


def ignore_interrupts() -> None:
    """Ctrl-C is for the process that started the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def pixel_chunks(
    pictures: list[Picture], size: int, unreadable: list[str], bar: tqdm
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Read pictures in order.  yields pixels (m, S, S, 3) uint8, labels (m,)

    The names of those that cannot be read are added to `unreadable`.
    """
    n_rows = max(1, CHUNK // size**2)
    pixels = []
    labels = []
    for picture, square in zip(pictures, load_all(pictures, size), strict=True):
        bar.update()
        if square is None:
            unreadable.append(picture.name)
            continue
        pixels.append(square)
        labels.append(picture.label)
        if len(pixels) == n_rows:
            yield np.stack(pixels), np.array(labels)
            pixels = []
            labels = []
    if pixels:
        yield np.stack(pixels), np.array(labels)


def report_unreadable(names: list[str]) -> None:
    if names:
        print(f"{len(names)} files cannot be read and are left out: {first_names(names)}")


def first_names(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:N_SHOWN]))
    return f"{shown}, ..." if len(names) > N_SHOWN else shown
