"""Quality of samples measured against real data; metrics_for chooses what suits the data.

Each class has scores(tokens, labels, real, context_frames) -> {column: value}, details. The details
are accuracies by class or means by video frame. `val` holds the scores of n_val held-out sequences
for comparison, or None where they would say nothing. The column `features` names what the Frechet
distance, precision and recall are measured on.
"""

import importlib
import importlib.util
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from support import features

N_REAL = 10_000         # most real sequences that metrics are fitted to
N_TRAIN_TEXT = 1_280_000    # most training tokens whose text is counted
N_VAL_TEXT = 64_000     # most held-out tokens that are scored as text
N_RANDOM = 64           # directions onto which counts of tokens are projected
MAX_EMBEDDED = 2**16    # token ids with an embedding of their own there
N_NEAREST = 50_000      # most training pictures among which copies are looked for
N_VAL_NEAREST = 1000    # most held-out pictures behind the distance of a copy
COPY_QUANTILE = 0.01    # share of held-out pictures that are as near
K_NEAREST = 3           # neighbour that sets the radius of precision and recall
N_BOOTSTRAP = 2000
ORDER = 5               # of the byte n-gram
SMOOTHING = 2.0         # prior weight of the next shorter context, in counts
WORD = re.compile(rb"[A-Za-z]+")
WHOLE_WORD = re.compile(rb"(?<=[^A-Za-z])[A-Za-z]+(?=[^A-Za-z])")   # not cut by either end

Scores = tuple[dict[str, float], dict]      # {column: value}, details

# column: (in words, format), in the order in which they are printed
COLUMNS = {
    "judge_acc": ("judge accuracy", ".1%"),
    "worst_class": ("worst class", ".1%"),
    "features": ("features", ""),
    "frechet": ("Frechet", ".3f"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "ngram_bits": ("bits per byte by n-gram", ".3f"),
    "words": ("known words", ".1%"),
    "entropy": ("entropy", ".3f"),
    "class_entropy": ("entropy in a class", ".3f"),
    "distinct": ("distinct", ".1%"),
    "duplicates": ("in the training set", ".1%"),
    "copies": ("near copies", ".1%"),
    "shortest": ("shortest paths", ".1%"),
    "valid": ("valid ones", ".1%"),
    "parts": ("parts that occur", ".1%"),
    "novel": ("of the valid ones new", ".1%"),
    "right": ("frames exactly right", ".1%"),
    "all_right": ("sequences exactly right", ".1%"),
    "intact": ("sprite intact", ".1%"),
    "pixels": ("wrong pixels", ".2%"),
}


class TokenMetrics:
    """For any tokens: their entropy, and the Frechet distance between counts of tokens.

    The counts of a sequence are projected onto N_RANDOM random directions.
    """

    def __init__(self, meta: dict, splits: dict):
        rng = np.random.default_rng(0)
        n_rows = min(meta["vocab"], MAX_EMBEDDED)
        self.embedding = rng.normal(size=(n_rows, N_RANDOM)).astype(np.float32)
        train_tokens, _ = subset(splits["train"], N_REAL)
        val_tokens, val_labels = subset(splits["val"], N_REAL)
        self.real_features = self.count_features(train_tokens)
        self.train_hashes = sequence_hashes(splits["train"])
        self.val = self.scores(val_tokens, val_labels)
        self.n_val = len(val_tokens)

    def count_features(self, tokens: np.ndarray) -> np.ndarray:
        """The sum of the embeddings of a sequence, over the root of its length.  (n, N) -> (n, d)

        The ids of very large vocabularies share embeddings.
        """
        rows = [self.embedding[row % len(self.embedding)].sum(0) for row in tokens]
        return np.stack(rows) / math.sqrt(tokens.shape[1])

    def scores(
        self,
        tokens: np.ndarray,
        labels: np.ndarray,
        real: np.ndarray | None = None,
        context_frames: int = 0,
    ) -> Scores:
        """tokens (n, N) int  ->  {column: value}, {}"""
        columns = dict(
            frechet=frechet_distance(self.count_features(tokens), self.real_features),
            entropy=position_entropy(tokens),
            distinct=len(np.unique(tokens, axis=0)) / len(tokens),
            duplicates=share_among(tokens, self.train_hashes),
        )
        return rounded(columns) | {"features": "token counts"}, {}


class ExactMetrics:
    """For data with an exact criterion: the score(tokens, real) of its source module."""

    val = None
    n_val = 0

    def __init__(self, meta: dict):
        self.grid = meta["grid"]
        self.source = importlib.import_module(f"sources.{meta['score']}")

    def on_grid(self, tokens: np.ndarray) -> np.ndarray:
        """(n, N) -> (n, *grid); a video may have any number of frames"""
        is_video = len(self.grid) == 3
        grid = [-1, *self.grid[1:]] if is_video else self.grid
        return tokens.reshape(len(tokens), *grid)

    def scores(
        self,
        tokens: np.ndarray,
        labels: np.ndarray,
        real: np.ndarray | None = None,
        context_frames: int = 0,
    ) -> Scores:
        """Mean scores, without the first context_frames frames of a video, which were given.

        tokens and real (n, N) int  ->  {column: value}, {column: (F,) means by frame}
        For videos compared with real ones, all_right is the share without a wrong frame.
        """
        real_grid = None if real is None else self.on_grid(real)
        per_sequence = self.source.score(self.on_grid(tokens), real_grid)
        columns = {}
        by_frame = {}
        for name, values in per_sequence.items():           # (n,), or (n, F) for videos
            is_video = values.ndim > 1
            if is_video:
                by_frame[name] = values.mean(0)
                values = values[:, context_frames:]
            columns[name] = values.mean()
        if "right" in by_frame:
            is_right = per_sequence["right"][:, context_frames:]
            columns["all_right"] = is_right.all(1).mean()
        return rounded(columns), by_frame


class PictureMetrics:
    """For pictures: a classifier where there are classes, distances between features, copies.

    The judge is fitted to the training split: a support vector classifier and PCA for grey
    pictures with classes, a small CNN for those in colour, PCA alone where there are no classes.
    to_pixels decodes tokens (n, N) -> (n, H, W, 3) in [0, 1]; without it the palette does.
    """

    def __init__(
        self,
        meta: dict,
        splits: dict,
        to_pixels: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        self.meta = meta
        self.has_classes = meta["n_classes"] > 1
        self.to_pixels = to_pixels
        train_tokens, train_labels = subset(splits["train"], N_REAL)
        val_tokens, val_labels = subset(splits["val"], N_REAL)
        pixels = self.pixels(train_tokens)
        folder = splits["train"].tokens_file.parent
        self.judge = self.fit_judge(pixels, train_labels, folder)
        self.real_features = self.judge.features(pixels)
        self.real_radii = knn_radii(self.real_features)
        self.train_hashes = sequence_hashes(splits["train"])
        self.validity = find_validity(meta)
        self.train_tokens, _ = subset(splits["train"], N_NEAREST)
        self.train_bytes = self.bytes_of(self.train_tokens)
        self.copy_distance = self.find_copy_distance(splits["val"])
        self.val = self.scores(val_tokens, val_labels)
        self.n_val = len(val_tokens)

    def fit_judge(self, pixels: np.ndarray, labels: np.ndarray, folder: Path):
        if not self.has_classes:
            return features.PcaJudge(pixels)
        if self.is_grey():
            return features.SvcJudge(pixels, labels)
        return features.cnn_judge(pixels, labels, self.meta["n_classes"], folder)

    def is_grey(self) -> bool:
        return self.to_pixels is None and self.meta["palette"] == "grey"

    def pixels(self, tokens: np.ndarray) -> np.ndarray:
        """tokens (n, N)  ->  (n, N) grey levels or (n, H, W, 3), in [0, 1]"""
        if self.is_grey():
            return tokens / (self.meta["vocab"] - 1)
        if self.to_pixels is not None:
            return at_most_64(self.to_pixels(tokens))
        palette = np.array(self.meta["palette"], np.float32) / 255
        return palette[tokens.reshape(-1, *self.meta["grid"])]

    def bytes_of(self, tokens: np.ndarray) -> np.ndarray:
        """Pixels as bytes, which take an eighth of the memory.  (n, N) -> (n, d) uint8"""
        n_parts = math.ceil(len(tokens) / N_REAL)
        parts = [self.pixels(part) for part in np.array_split(tokens, n_parts)]
        return np.concatenate([features.as_bytes(features.as_rows(part)) for part in parts])

    def find_copy_distance(self, val: Any) -> float:
        """The distance to the nearest training picture below which 1 % of held-out ones are."""
        tokens, _ = subset(val, N_VAL_NEAREST)
        _, distances = self.nearest(tokens)
        return float(np.quantile(distances, COPY_QUANTILE))

    def nearest(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The nearest of at most N_NEAREST training pictures.

        tokens (n, N)  ->  their tokens (n, N), RMS distances of pixels (n,), of 255
        """
        index, distances = nearest_rows(self.bytes_of(tokens), self.train_bytes)
        return self.train_tokens[index], distances

    def scores(
        self,
        tokens: np.ndarray,
        labels: np.ndarray,
        real: np.ndarray | None = None,
        context_frames: int = 0,
    ) -> Scores:
        """tokens (n, N) int, the labels asked for (n,)  ->  {column: value}, {class: accuracy}"""
        pixels = self.pixels(tokens)
        columns = {}
        accuracy = {}
        if self.has_classes:
            columns, accuracy = class_scores(self.judge.predict(pixels), labels)
        columns |= self.feature_scores(self.judge.features(pixels))
        columns["entropy"] = position_entropy(tokens)
        if self.has_classes:
            entropies = [position_entropy(tokens[labels == c]) for c in accuracy]
            columns["class_entropy"] = np.mean(entropies)
        columns["distinct"] = len(np.unique(tokens, axis=0)) / len(tokens)
        columns["duplicates"] = share_among(tokens, self.train_hashes)
        _, distances = self.nearest(tokens)
        columns["copies"] = (distances <= self.copy_distance).mean()
        if self.validity is not None:
            grid = self.meta["grid"]
            train = self.train_tokens.reshape(-1, *grid)
            columns |= self.validity(tokens.reshape(-1, *grid), train)
        return rounded(columns) | {"features": self.judge.name}, accuracy

    def feature_scores(self, points: np.ndarray) -> dict[str, float]:
        """Frechet distance to the training pictures, precision and recall.  points (n, d)"""
        is_precise = is_covered(points, self.real_features, self.real_radii)
        is_recalled = is_covered(self.real_features, points, knn_radii(points))
        return dict(
            frechet=frechet_distance(points, self.real_features),
            precision=is_precise.mean(),
            recall=is_recalled.mean(),
        )


class TextMetrics:
    """For text: likelihood under a byte n-gram model of the training split, and known words.

    to_bytes decodes a sequence (N,); without it the tokens are bytes.
    """

    def __init__(self, splits: dict, to_bytes: Callable[[np.ndarray], bytes] | None = None):
        self.to_bytes = to_bytes or as_bytes
        tokens, _ = subset(splits["train"], N_REAL, N_TRAIN_TEXT)
        text = b"".join(map(self.to_bytes, tokens))
        self.counts = [count_ngrams(text, n) for n in range(1, ORDER + 1)]
        self.n_bytes = len(text)
        self.words = set(WORD.findall(text))
        self.train_hashes = sequence_hashes(splits["train"])
        val_tokens, val_labels = subset(splits["val"], N_REAL, N_VAL_TEXT)
        self.val = self.scores(val_tokens, val_labels)
        self.n_val = len(val_tokens)

    def bits_per_byte(self, lines: list[bytes]) -> float:
        """Mean -log2 p of the bytes of all sequences, under the n-gram model."""
        sum_bits = 0.0
        for line in lines:
            for i in range(len(line)):
                sum_bits -= math.log2(self.probability(line, i))
        return sum_bits / max(1, sum(map(len, lines)))

    def probability(self, line: bytes, i: int) -> float:
        """p(byte i | up to ORDER - 1 bytes before it), each order smoothed by the one below."""
        p = 1 / 256
        for k in range(min(i, ORDER - 1) + 1):              # contexts of k bytes
            context = line[i - k : i]
            n_context = self.counts[k - 1][context] if k else self.n_bytes
            n_both = self.counts[k][context + line[i : i + 1]]
            p = (n_both + SMOOTHING * p) / (n_context + SMOOTHING)
        return p

    def scores(
        self,
        tokens: np.ndarray,
        labels: np.ndarray,
        real: np.ndarray | None = None,
        context_frames: int = 0,
    ) -> Scores:
        """tokens (n, N)  ->  {column: value}, {}"""
        lines = list(map(self.to_bytes, tokens))
        words = [word for line in lines for word in WHOLE_WORD.findall(line)]
        is_known = [word in self.words for word in words]
        columns = dict(
            ngram_bits=self.bits_per_byte(lines),
            words=np.mean(is_known) if words else 0.0,
            entropy=token_entropy(tokens),
            distinct=len(set(lines)) / len(lines),
            duplicates=share_among(tokens, self.train_hashes),
        )
        return rounded(columns), {}


def metrics_for(
    meta: dict, splits: dict, to_pixels: Callable[[np.ndarray], np.ndarray] | None = None,
    to_bytes: Callable[[np.ndarray], bytes] | None = None,
) -> TokenMetrics | ExactMetrics | PictureMetrics | TextMetrics:
    """The metrics that suit the data: its own exact score, text, pictures, or any tokens.

    to_pixels (n, N) -> (n, H, W, 3) in [0, 1] makes pictures of tokens without a palette,
    to_bytes (N,) -> bytes makes text of the tokens of a tokenizer.
    """
    palette = meta["palette"]
    if meta.get("score"):
        return ExactMetrics(meta)
    if palette == "text":
        return TextMetrics(splits, to_bytes)
    is_flat = len(meta["grid"]) == 2
    if to_pixels or (is_flat and (palette == "grey" or isinstance(palette, list))):
        return PictureMetrics(meta, splits, to_pixels)
    return TokenMetrics(meta, splits)


def find_validity(meta: dict) -> Callable[[np.ndarray, np.ndarray], dict[str, float]] | None:
    """validity(tokens, train_tokens) of the source module that made the data, if it has one."""
    name = meta["name"]
    if not name.isidentifier() or importlib.util.find_spec(f"sources.{name}") is None:
        return None
    source = importlib.import_module(f"sources.{name}")
    is_made_there = getattr(source, "MAKES_ITSELF", False)
    if not is_made_there or meta["grid"] != [source.SIZE, source.SIZE]:
        return None
    return getattr(source, "validity", None)


def class_scores(predicted: np.ndarray, labels: np.ndarray) -> Scores:
    """How often the judge names the class asked for, with its 95 % interval.

    predicted and labels (n,)  ->  {column: value}, {class: accuracy}
    """
    is_right = predicted == labels
    lo, hi = bootstrap_interval(is_right)
    accuracy = {int(c): is_right[labels == c].mean() for c in np.unique(labels)}
    worst_class = min(accuracy.values())
    return dict(judge_acc=is_right.mean(), lo=lo, hi=hi, worst_class=worst_class), accuracy


def at_most_64(pixels: np.ndarray) -> np.ndarray:
    """Average over 2x2 pixels until both sides are at most 64.  (n, H, W, 3) -> (n, h, w, 3)"""
    while max(pixels.shape[1:3]) > 64:
        n, h, w, c = pixels.shape
        blocks = pixels[:, :h // 2 * 2, :w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c)
        pixels = blocks.mean((2, 4))
    return pixels


def nearest_rows(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest row of b for each of a.  (n, d), (m, d) -> index (n,), RMS distances (n,)"""
    from sklearn.metrics import pairwise_distances_argmin

    index = pairwise_distances_argmin(a.astype(np.float32), b.astype(np.float32))
    errors = a.astype(np.float64) - b[index]        # exact: a copy has distance 0
    return index, np.sqrt((errors**2).mean(1))


def rounded(columns: dict) -> dict:
    return {name: round(float(value), 4) for name, value in columns.items()}


def as_bytes(tokens: np.ndarray) -> bytes:
    """Tokens that are bytes.  (N,) -> N bytes"""
    return tokens.astype(np.uint8).tobytes()


def subset(
    split: Any, n_max: int, n_max_tokens: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """At most so many sequences, or tokens, of a data.Split.  -> tokens (n, N), labels (n,)"""
    n = min(n_max, len(split))
    if n_max_tokens:
        length = split.rows(np.arange(1))[0].size
        n = min(n, max(1, n_max_tokens // length))
    return split.spread_subset(n)


def sequence_hashes(split: Any) -> set[int]:
    """Hashes of all sequences of a data.Split, which is read in parts."""
    n_parts = math.ceil(len(split) / N_REAL)
    hashes = set()
    for index in np.array_split(np.arange(len(split)), n_parts):
        tokens, _ = split.rows(index)
        hashes.update(hash(row.tobytes()) for row in tokens)
    return hashes


def share_among(tokens: np.ndarray, hashes: set[int]) -> float:
    """Share of sequences (n, N) whose hash is in the set."""
    return np.mean([hash(row.tobytes()) in hashes for row in tokens])


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of n values, by resampling them.  (n,) -> low, high"""
    n = len(values)
    draws = np.random.default_rng(0).integers(n, size=(N_BOOTSTRAP, n))
    means = values[draws].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return low, high


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of points (n, d) and (m, d)."""
    if min(len(a), len(b)) < 2:         # no covariance
        return math.nan
    cov_a = np.cov(a, rowvar=False)
    cov_b = np.cov(b, rowvar=False)
    squared_shift = ((a.mean(0) - b.mean(0)) ** 2).sum()
    eigenvalues = np.linalg.eigvals(cov_a @ cov_b).real
    trace_of_root = np.sqrt(eigenvalues.clip(0)).sum()      # rounding can make them negative
    return squared_shift + np.trace(cov_a) + np.trace(cov_b) - 2 * trace_of_root


def knn_radii(points: np.ndarray) -> np.ndarray:
    """Distance of each point to its K_NEAREST-th neighbour (arXiv:1904.06991).  (n, d) -> (n,)"""
    from sklearn.neighbors import NearestNeighbors

    n_neighbors = min(K_NEAREST + 1, len(points))                   # each point is its own first
    distances, _ = NearestNeighbors(n_neighbors=n_neighbors).fit(points).kneighbors(points)
    return distances[:, -1]


def is_covered(points: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Is a point inside a ball around any centre?  (n, d), (m, d), (m,) -> (n,) bool"""
    from sklearn.metrics import pairwise_distances

    n_parts = math.ceil(len(points) / 1000)                         # bounds the memory
    parts = np.array_split(points, n_parts)
    return np.concatenate([(pairwise_distances(p, centres) <= radii).any(1) for p in parts])


def position_entropy(tokens: np.ndarray) -> float:
    """Mean entropy over positions, bits per token: how varied sequences (n, N) are."""
    return np.mean([token_entropy(column) for column in tokens.T])


def token_entropy(tokens: np.ndarray) -> float:
    """Entropy of all tokens pooled, bits per token.  (...) -> ()"""
    _, counts = np.unique(tokens, return_counts=True)
    p = counts / tokens.size
    return -(p * np.log2(p)).sum()


def count_ngrams(text: bytes, n: int) -> Counter:
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))
