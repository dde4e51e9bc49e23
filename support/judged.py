"""A run that is judged: its networks, its held-out data, and what samples start from."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import data
import methods
from support import metrics, pictures, runtime
from support.checkpoint import load_run
from support.text import is_text, load_text
from support.validate import find_decoder

N_BITS = 2048               # sequences behind bits per token, at least
N_BITS_VIDEO = 512
DECODED = 100               # pictures that a decoder makes at a time

Bits = dict[str, tuple[float, float]]       # bound -> bits per token, standard error


class HeldOut(NamedTuple):
    """What samples start from."""
    labels: np.ndarray                      # (n,)
    real: np.ndarray | None = None          # (n, N) held-out sequences
    known_tokens: np.ndarray | None = None  # (n, N), real ones with flips
    known: np.ndarray | None = None         # (n, N) bool


class Judged:
    """A trained run, its data and the metrics that fit them; `flags` are those of evaluate.py."""

    def __init__(self, folder: str, device: torch.device, decoder: str = ""):
        self.run = load_run(folder, device)
        self.spec = self.run.spec
        config_ = self.spec.config
        runtime.freeze(self.run.nets, device, config_["dtype"])
        self.splits = data.load(config_["data"], config_["image_size"], config_["grey_levels"])[1]
        self.decoder = find_decoder(decoder, self.run.folder, self.spec.meta, device)
        self.files = {}         # name -> path of each file written beside the table

    def path_of(self, name: str) -> Path:
        """A file's path in the run's folder; remembered, to be listed at the end."""
        return self.files.setdefault(name, self.run.folder / name)

    @functools.cached_property
    def metrics(self):
        """The metrics for this data, made on first use, since that can train a judge."""
        to_pixels = self.decoded_pixels if self.decoder else None
        to_bytes = None
        if is_text(self.spec.meta):
            to_bytes = load_text(self.run.folder, self.spec.meta).to_bytes
        return metrics.metrics_for(self.spec.meta, self.splits, to_pixels, to_bytes)

    def decoded(self, tokens: np.ndarray) -> np.ndarray:
        """Pictures of the run's decoder, a few at a time.  (n, N) -> (n, H, W, 3) uint8"""
        grids = tokens.reshape(-1, *self.spec.grid)
        starts = range(0, len(grids), DECODED)
        return np.concatenate([
            pictures.decoded_pictures(grids[i:i + DECODED], self.spec.meta, self.decoder)
            for i in starts
        ])

    def decoded_pixels(self, tokens: np.ndarray) -> np.ndarray:
        """As decoded(), but float32 in [0, 1]."""
        return self.decoded(tokens).astype(np.float32) / 255

    def bits(self) -> Bits:
        """Bits per token of held-out data and its standard error, by each bound of the method, the
        tight one first. The noise is the same for all runs; tokens that are known to samplers are
        known here too."""
        val = self.splits["val"]
        n = N_BITS_VIDEO if self.spec.is_video else N_BITS
        n_repeated = -(-n // len(val)) * len(val)       # each sequence as often as any other
        home = runtime.device_of_doubles(self.run.device)
        x0, label = (torch.from_numpy(y).to(home) for y in val.spread_subset(n_repeated))
        with runtime.autocast(self.run.device, self.spec.config["dtype"]):
            known = data.context_mask(self.spec.meta, x0, self.spec.config["context_frames"])
            rng = runtime.generator("bits")
            return methods.bits_per_token(
                self.spec, self.run.nets, x0, label, known, rng, n_distinct=len(val),
                progress=functools.partial(tqdm, desc="bits per token", leave=False),
            )

    def n_frames(self, flags: Any) -> int:
        """Frames of a video: a rollout makes any number, other samplers as many as the data has."""
        own = self.spec.grid[0]
        if self.spec.method.has_own_levels:
            return flags.frames or 8 * own
        if flags.frames not in (0, own):
            raise SystemExit(f"--frames {flags.frames}: a {self.spec.name} run makes {own}")
        return own

    def n_unknown(self, flags: Any) -> int:
        """Tokens of a sequence that are sampled, on average."""
        known = self.held_out(flags).known
        n_tokens = self.spec.shape.n_tokens
        return n_tokens if known is None else round((~known).mean() * n_tokens)

    def held_out(self, flags: Any) -> HeldOut:
        """What samples start from: held-out sequences, n at most, or classes in turn."""
        spec = self.spec
        if not spec.is_video and not spec.meta["given"]:
            return HeldOut(np.arange(flags.n) % max(1, spec.n_classes))
        val = self.splits["val"]
        real, labels = val.spread_subset(min(flags.n, len(val)))
        if spec.is_video:
            real = self.real_frames(real.reshape(len(real), *spec.grid), self.n_frames(flags))
        known = data.context_mask(spec.meta, torch.from_numpy(real), flags.n_given)
        if known is None:
            return HeldOut(labels, real, real)
        known = known.numpy()
        return HeldOut(labels, real, flip_known(real, known, flags.flips, spec.vocab), known)

    def real_frames(self, videos: np.ndarray, n_frames: int) -> np.ndarray:
        """Videos (n, F, h, w), cut or continued to n_frames.  -> (n, N)"""
        if n_frames > videos.shape[1]:
            if not self.spec.meta.get("is_certain"):
                raise SystemExit(
                    f"{self.spec.meta['name']} has no one truth after its frames: "
                    f"--frames {videos.shape[1]}"
                )
            videos = self.metrics.source.truth(videos, n_frames)
        return videos[:, :n_frames].reshape(len(videos), -1)


def flip_known(real: np.ndarray, known: np.ndarray, rate: float, vocab: int) -> np.ndarray:
    """Redraw a share of the known tokens as another id.  (n, N) -> (n, N)"""
    if not rate:
        return real.copy()
    rng = np.random.default_rng(0)
    is_flipped = (rng.random(real.shape) < rate) & known
    other = (real + rng.integers(1, vocab, real.shape)) % vocab
    return np.where(is_flipped, other, real)
