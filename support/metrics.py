"""Quality of samples measured against real data; metrics_for chooses what suits the data.

Each class has scores(tokens, labels, real, context_frames) -> {column: value}, details. The details
are accuracies by class or means by video frame. `val` holds the scores of n_val held-out sequences
for comparison, or None where they would say nothing.
"""

import importlib
import math
import re
from collections import Counter
from typing import Any

import numpy as np

N_REAL = 10_000         # most real sequences that metrics are fitted to
N_VAL_TEXT = 500        # most held-out sequences that are scored as text
N_PCA = 64              # components of the Frechet distance, precision and recall
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
    "frechet": ("Frechet", ".3f"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "ngram_bits": ("bits per byte by n-gram", ".3f"),
    "words": ("known words", ".1%"),
    "entropy": ("entropy", ".3f"),
    "class_entropy": ("entropy in a class", ".3f"),
    "distinct": ("distinct", ".1%"),
    "duplicates": ("in the training set", ".1%"),
    "shortest": ("shortest paths", ".1%"),
    "valid": ("valid ones", ".1%"),
    "right": ("frames exactly right", ".1%"),
    "all_right": ("sequences exactly right", ".1%"),
    "intact": ("sprite intact", ".1%"),
    "pixels": ("wrong pixels", ".2%"),
}


class TokenMetrics:
    """For any data: the entropy of its tokens."""

    val = None
    n_val = 0

    def scores(
        self,
        tokens: np.ndarray,
        labels: np.ndarray,
        real: np.ndarray | None = None,
        context_frames: int = 0,
    ) -> Scores:
        """tokens (n, N) int  ->  {column: value}, {}"""
        return {"entropy": round(position_entropy(tokens), 4)}, {}


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
    """For grey pictures with classes: a classifier, and distances in PCA space.

    Both are fitted to the training split; further columns say how varied the samples are.
    """

    def __init__(self, meta: dict, splits: dict):
        from sklearn.decomposition import PCA
        from sklearn.svm import SVC

        self.max_level = meta["vocab"] - 1
        train_tokens, train_labels = subset(splits["train"], N_REAL)
        val_tokens, val_labels = subset(splits["val"], N_REAL)
        pixels = self.pixels(train_tokens)
        n_components = min(N_PCA, *pixels.shape)
        self.classifier = SVC(C=10.0).fit(pixels, train_labels)
        self.pca = PCA(n_components, random_state=0).fit(pixels)
        self.real_features = self.pca.transform(pixels)
        self.real_radii = knn_radii(self.real_features)
        self.train_hashes = sequence_hashes(splits["train"])
        self.val = self.scores(val_tokens, val_labels)
        self.n_val = len(val_tokens)

    def pixels(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens as grey levels in [0, 1]."""
        return tokens / self.max_level

    def scores(
        self,
        tokens: np.ndarray,
        labels: np.ndarray,
        real: np.ndarray | None = None,
        context_frames: int = 0,
    ) -> Scores:
        """tokens (n, N) int, the labels asked for (n,)  ->  {column: value}, {class: accuracy}"""
        pixels = self.pixels(tokens)
        is_right = self.classifier.predict(pixels) == labels
        lo, hi = bootstrap_interval(is_right)
        accuracy = {int(c): is_right[labels == c].mean() for c in np.unique(labels)}
        class_entropies = [position_entropy(tokens[labels == c]) for c in accuracy]

        features = self.pca.transform(pixels)
        is_precise = is_covered(features, self.real_features, self.real_radii)
        is_recalled = is_covered(self.real_features, features, knn_radii(features))
        columns = dict(
            judge_acc=is_right.mean(),
            lo=lo,
            hi=hi,
            worst_class=min(accuracy.values()),
            frechet=frechet_distance(features, self.real_features),
            precision=is_precise.mean(),
            recall=is_recalled.mean(),
            entropy=position_entropy(tokens),
            class_entropy=np.mean(class_entropies),
            distinct=len(np.unique(tokens, axis=0)) / len(tokens),
            duplicates=share_among(tokens, self.train_hashes),
        )
        return rounded(columns), accuracy


class TextMetrics:
    """For bytes: likelihood under an n-gram model of the training split, and known words."""

    def __init__(self, splits: dict):
        tokens, _ = subset(splits["train"], N_REAL)
        text = tokens.astype(np.uint8).tobytes()
        self.counts = [count_ngrams(text, n) for n in range(1, ORDER + 1)]
        self.n_bytes = len(text)
        self.words = set(WORD.findall(text))
        self.train_hashes = sequence_hashes(splits["train"])
        val_tokens, val_labels = subset(splits["val"], N_VAL_TEXT)
        self.val = self.scores(val_tokens, val_labels)
        self.n_val = len(val_tokens)

    def bits_per_byte(self, line: bytes) -> float:
        """Mean -log2 p of the bytes of one sequence, under the n-gram model."""
        sum_bits = 0.0
        for i in range(len(line)):
            sum_bits -= np.log2(self.probability(line, i))
        return sum_bits / len(line)

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
        """tokens (n, N) bytes  ->  {column: value}, {}"""
        lines = [row.astype(np.uint8).tobytes() for row in tokens]
        words = [word for line in lines for word in WHOLE_WORD.findall(line)]
        is_known = [word in self.words for word in words]
        columns = dict(
            ngram_bits=np.mean([self.bits_per_byte(line) for line in lines]),
            words=np.mean(is_known) if words else 0.0,
            entropy=token_entropy(tokens),
            distinct=len(set(lines)) / len(lines),
            duplicates=share_among(tokens, self.train_hashes),
        )
        return rounded(columns), {}


def metrics_for(
    meta: dict, splits: dict
) -> TokenMetrics | ExactMetrics | PictureMetrics | TextMetrics:
    """The metrics that suit the data: its own exact score, text, grey pictures, or any tokens."""
    if meta.get("score"):
        return ExactMetrics(meta)
    if meta["palette"] == "text":
        return TextMetrics(splits)
    if meta["palette"] == "grey" and meta["n_classes"] > 1:
        return PictureMetrics(meta, splits)
    return TokenMetrics()


def rounded(columns: dict) -> dict:
    return {name: round(float(value), 4) for name, value in columns.items()}


def subset(split: Any, n_max: int) -> tuple[np.ndarray, np.ndarray]:
    """At most n_max sequences of a data.Split.  -> tokens (n, N), labels (n,)"""
    return split.spread_subset(min(n_max, len(split)))


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
