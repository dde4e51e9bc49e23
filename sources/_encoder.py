"""The TorchScript encoder of an image tokenizer. Such a file is code: use one that you trust."""

from pathlib import Path

import numpy as np
import torch

from sources import tokens as token_files

BATCH = 32


class Encoder:
    """Pictures to tokens, checked."""

    def __init__(self, path: str, size: int, options) -> None:
        self.path = Path(path)
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
