"""The TorchScript encoder of an image tokenizer. Such a file is code: use one that you trust."""

import hashlib
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from sources import tokens as token_files
from sources._pictures import Picture, load_all, report_unreadable

BATCH = 32
N_CHUNK = 256               # pictures in a file of encoded ones


class Encoder:
    """Pictures to tokens, checked."""

    def __init__(self, path: str, size: int, options) -> None:
        self.path = Path(path)
        self.size = size
        self.has_decoder = False
        if not self.path.is_file():
            raise SystemExit(f"no file {path!r}: name a TorchScript file with --encoder")
        try:
            self.module = torch.jit.load(path, map_location="cpu").eval()
        except Exception as error:      # TorchScript raises many types
            raise SystemExit(f"--encoder {path} is not a TorchScript file: "
                             f"{first_line(error)}") from None
        self.vocab = vocabulary(self.module, options)
        self.dtype = next((p.dtype for p in self.module.parameters()), torch.float32)
        probe = self(np.zeros((1, size, size, 3), np.uint8))
        self.grid = probe.shape[1:]

    @torch.no_grad()
    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Encode one batch.  (n, S, S, 3) uint8 -> (n, h, w) int64"""
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        try:
            out = self.module(images.to(self.dtype))
        except Exception as error:      # TorchScript raises many types
            shape = tuple(images.shape)
            raise SystemExit(f"--encoder {self.path} cannot encode pictures of shape {shape}: "
                             f"{first_line(error)}") from None
        ids = out[0] if isinstance(out, tuple | list) else out
        self.check(ids, len(pixels))
        return ids.long().numpy()

    def check(self, ids: torch.Tensor, n: int) -> None:
        """Require integer ids (n, h, w) of the vocabulary."""
        shape = tuple(ids.shape)
        if ids.dim() != 3 or len(ids) != n:
            raise SystemExit(f"--encoder {self.path} gives {shape} for {n} pictures, "
                             "not (n, h, w)")
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise SystemExit(f"--encoder {self.path} gives {ids.dtype}, not integer ids")
        low = int(ids.min())
        high = int(ids.max())
        if low < 0 or high >= self.vocab:
            raise SystemExit(f"--encoder {self.path} gives ids {low} to {high}, "
                             f"but its vocabulary is {self.vocab}")

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Encode in batches.  (n, S, S, 3) uint8 -> (n, h, w) int64"""
        starts = range(0, len(pixels), BATCH)
        return np.concatenate([self(pixels[start:start + BATCH]) for start in starts])

    @torch.no_grad()
    def check_decoder(self, path: Path) -> None:
        """Require a decoder that makes a picture of the largest id."""
        ids = torch.full((1, *self.grid), self.vocab - 1)
        try:
            out = torch.jit.load(str(path), map_location="cpu")(ids)
        except Exception as error:      # TorchScript raises many types
            raise SystemExit(f"decoder {path} cannot decode tokens of vocabulary {self.vocab}: "
                             f"{first_line(error)}") from None
        if not isinstance(out, torch.Tensor) or out.dim() != 4 or out.shape[1] != 3:
            raise SystemExit(f"decoder {path} does not decode to images (n, 3, H, W)")
        if tuple(out.shape[2:]) != (self.size, self.size):
            raise SystemExit(f"decoder {path} makes pictures of {out.shape[2]} x {out.shape[3]} "
                             f"pixels from those of {self.size} x {self.size}")
        self.has_decoder = True


def vocabulary(module: torch.jit.ScriptModule, options) -> int:
    """The vocabulary that the encoder states, or else that of --vocab or --tokenizer."""
    stated = int(getattr(module, "vocab", 0))
    known = token_files.CODEBOOK_SIZES
    if options.tokenizer and options.tokenizer not in known:
        raise SystemExit(f"tokenizer {options.tokenizer} is not one of {', '.join(known)}")
    chosen = options.vocab or known.get(options.tokenizer, 0)
    if stated and chosen and stated != chosen:
        raise SystemExit(f"--encoder {options.encoder} has a vocabulary of {stated}, not {chosen}")
    if not stated and not chosen:
        raise SystemExit(f"--encoder {options.encoder} does not state its vocabulary: "
                         "name it with --vocab")
    return stated or chosen


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# All pictures


def token_chunks(
    splits: dict[str, list[Picture]], encoder: Encoder, unreadable: list[str], name: str
) -> Iterator[tuple]:
    """Read and encode all pictures.  yields (split, tokens (m, h, w), labels (m,))

    What is encoded is kept in data/.NAME.partial until all is, so that a start after a stop takes
    it from there.
    """
    unreadable = list(unreadable)
    folder = Path("data", f".{name}.partial")
    start_or_resume(folder, identity(splits, encoder))
    n_pictures = sum(map(len, splits.values()))
    with tqdm(total=n_pictures, desc="pictures", unit=" pictures") as bar:
        for split, pictures in splits.items():
            n_encoded = 0
            for chunk in encoded_chunks(folder, split, pictures, encoder, bar):
                unreadable += chunk["unreadable"].tolist()
                n_encoded += len(chunk["labels"])
                if len(chunk["labels"]):
                    yield split, chunk["tokens"], chunk["labels"]
            if not n_encoded:
                raise SystemExit(f"none of {len(pictures)} {split} pictures can be read")
    shutil.rmtree(folder)
    report_unreadable(unreadable)
    if not encoder.has_decoder:
        print("no decoder.jit lies beside the encoder: tokens are shown in colours of no meaning, "
              "unless --decoder names one")


def identity(splits: dict[str, list[Picture]], encoder: Encoder) -> str:
    """A digest of the encoder and of which pictures there are."""
    with open(encoder.path, "rb") as file:
        sha = hashlib.file_digest(file, "sha256")
    sha.update(repr((encoder.size, encoder.vocab)).encode())
    for split, pictures in splits.items():
        for picture in pictures:
            sha.update(repr((split, picture.path.parts, picture.label)).encode())
    return sha.hexdigest()


def start_or_resume(folder: Path, key: str) -> None:
    """An empty folder for encoded pictures, or what an earlier start of the same command left."""
    key_file = folder / "key"
    if folder.is_dir() and key_file.is_file() and key_file.read_text() == key:
        n_files = len(list(folder.glob("*.npz")))
        print(f"resuming after {n_files} files of {N_CHUNK} pictures in {folder}")
        return
    if folder.is_dir():
        print(f"{folder} is of other pictures or another encoder, and is made anew")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    key_file.write_text(key)


def encoded_chunks(
    folder: Path, split: str, pictures: list[Picture], encoder: Encoder, bar: tqdm
) -> Iterator[dict[str, np.ndarray]]:
    """Chunks of N_CHUNK pictures, read from the folder or encoded and written there.

    yields tokens (m, h, w), labels (m,), names of the unreadable
    """
    starts = range(0, len(pictures), N_CHUNK)
    files = [folder / f"{split}_{start}.npz" for start in starts]
    done = list(itertools.takewhile(Path.is_file, files))
    for file in done:
        yield read_chunk(file)
    n_done = min(len(done) * N_CHUNK, len(pictures))
    bar.update(n_done)
    squares = load_all(pictures[n_done:], encoder.size)
    for file, start in zip(files[len(done):], starts[len(done):], strict=True):
        chunk = encode_chunk(pictures[start:start + N_CHUNK], squares, encoder, bar)
        new = file.with_suffix(".tmp")
        with open(new, "wb") as opened:
            np.savez(opened, **chunk)
        os.replace(new, file)
        yield chunk


def read_chunk(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file) as chunk:
            return dict(chunk)
    except Exception as error:      # np.load raises many kinds
        raise SystemExit(f"{file} cannot be read ({first_line(error)}): "
                         f"remove {file.parent}") from None


def encode_chunk(
    pictures: list[Picture], squares: Iterator[np.ndarray | None], encoder: Encoder, bar: tqdm
) -> dict[str, np.ndarray]:
    """Encode as many of the squares as there are pictures."""
    pixels = []
    labels = []
    unreadable = []
    for picture in pictures:
        square = next(squares)
        bar.update()
        if square is None:
            unreadable.append(picture.name)
        else:
            pixels.append(square)
            labels.append(picture.label)
    tokens = encoder.encode(np.stack(pixels)) if pixels else np.empty((0, *encoder.grid), np.int64)
    return {
        "tokens": tokens.astype(np.uint32),
        "labels": np.array(labels, np.int64),
        "unreadable": np.array(unreadable, dtype=str),
    }
