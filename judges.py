"""What real data says of samples: judges.of(meta, splits).scores(tokens, labels) -> {column: value}, {class: share}"""

import importlib
import re
from collections import Counter

import numpy as np

N_REAL = 10_000         # real sequences that a judge is fitted on, at most
N_PCA, K_NEAREST = 64, 3
ORDER, SMOOTHING = 5, 2.0       # of the byte n-gram: bytes, and how many counts a shorter context is worth
COLUMNS = {             # column: (in words, format), in the order in which they are said
    "judge_acc": ("judge accuracy", ".1%"), "worst_class": ("worst class", ".1%"), "frechet": ("Frechet", ".3f"),
    "precision": ("precision", ".3f"), "recall": ("recall", ".3f"), "ngram_bits": ("bits per byte by n-gram", ".3f"),
    "words": ("known words", ".1%"), "entropy": ("entropy", ".3f"), "class_entropy": ("entropy in a class", ".3f"),
    "distinct": ("distinct", ".1%"), "duplicates": ("in the training set", ".1%"),
    "shortest": ("shortest paths", ".1%"), "valid": ("valid ones", ".1%"), "right": ("frames exactly right", ".1%"),
    "all_right": ("sequences exactly right", ".1%"), "intact": ("sprite intact", ".1%"),
    "pixels": ("wrong pixels", ".2%"),
}


def of(meta, splits):
    """The judge that fits the data."""
    if meta.get("score"):
        return Exact(meta)
    if meta["palette"] == "text":
        return Text(splits)
    return Pictures(meta, splits) if meta["palette"] == "grey" and meta["n_classes"] > 1 else Any()


class Any:
    """Data of which nothing is known but its tokens."""
    val = None

    def scores(self, tokens, labels, real=None):
        return {"entropy": round(entropy(tokens), 4)}, {}


class Exact:
    """Data whose source knows what is right: its score(tokens, real), of what was to be made alone."""
    val = None

    def __init__(self, meta):
        self.meta, self.source = meta, importlib.import_module(f"sources.{meta['score']}")

    def scores(self, tokens, labels, real=None, context=0):
        """tokens, real (n, N), the first `context` frames not counted  ->  {column: value}, {column: value by frame}

        A video's values are means over frames (all_right: the share of sequences without a wrong one)
        """
        grid = self.meta["grid"] if len(self.meta["grid"]) < 3 else [-1, *self.meta["grid"][1:]]
        shaped = [None if y is None else y.reshape(len(y), *grid) for y in (tokens, real)]
        each = self.source.score(*shaped)
        of_frames = {k: v[:, context:] for k, v in each.items() if v.ndim > 1}
        out = {k: v.mean() for k, v in (each | of_frames).items()}
        if "right" in of_frames:
            out["all_right"] = of_frames["right"].all(1).mean()
        by_frame = {k: v.mean(0) for k, v in each.items() if v.ndim > 1}
        return {k: round(float(v), 4) for k, v in out.items()}, by_frame


class Pictures:
    """Grey pictures with classes: a classifier, a Gaussian and nearest neighbours, fitted on the training split."""

    def __init__(self, meta, splits):
        from sklearn.decomposition import PCA
        from sklearn.svm import SVC

        self.meta = meta
        rows = {name: s.some(min(N_REAL, len(s))) for name, s in splits.items()}
        tokens, labels = rows["train"]
        x = self.features(tokens)
        self.svc = SVC(C=10.0).fit(x, labels)
        self.pca = PCA(min(N_PCA, *x.shape), random_state=0).fit(x)
        self.real = self.pca.transform(x)
        self.radius = radii(self.real)
        self.seen = hashes(splits["train"])
        self.val, self.n_val = self.scores(*rows["val"]), len(rows["val"][0])

    def features(self, tokens):
        return tokens / (self.meta["vocab"] - 1)

    def scores(self, tokens, labels, real=None):
        """What a table says of sequences (n, N) and the labels asked for.  -> {column: value}, {class: accuracy}"""
        right = self.svc.predict(self.features(tokens)) == labels
        per_class = {int(c): right[labels == c].mean() for c in np.unique(labels)}
        draws = np.random.default_rng(0).integers(len(right), size=(2000, len(right)))
        lo, hi = np.quantile(right[draws].mean(1), [0.025, 0.975])
        mine = self.pca.transform(self.features(tokens))
        out = dict(judge_acc=right.mean(), lo=lo, hi=hi, worst_class=min(per_class.values()),
                   frechet=frechet(mine, self.real), precision=covered(mine, self.real, self.radius).mean(),
                   recall=covered(self.real, mine, radii(mine)).mean(), entropy=entropy(tokens),
                   class_entropy=np.mean([entropy(tokens[labels == c]) for c in per_class]),
                   distinct=len(np.unique(tokens, axis=0)) / len(tokens),
                   duplicates=np.mean([hash(row.tobytes()) in self.seen for row in tokens]))
        return {k: round(float(v), 4) for k, v in out.items()}, per_class


class Text:
    """Bytes: an n-gram of the training split says how likely samples are, its vocabulary how many words are real."""

    def __init__(self, splits):
        tokens = splits["train"].some(min(N_REAL, len(splits["train"])))[0]
        raw = tokens.astype(np.uint8).tobytes()
        self.counts = [Counter(raw[i:i + k] for i in range(len(raw) - k + 1)) for k in range(1, ORDER + 1)]
        self.total, self.words = len(raw), set(re.findall(rb"[A-Za-z]+", raw))
        self.seen, rows = hashes(splits["train"]), splits["val"].some(min(500, len(splits["val"])))
        self.val, self.n_val = self.scores(*rows), len(rows[0])

    def bits(self, line):
        """Bits per byte of one sequence; each order falls back on the one below."""
        sum_bits = 0.0
        for i in range(len(line)):
            p = 1 / 256
            for k in range(min(i, ORDER - 1) + 1):                      # contexts of k bytes
                context = line[i - k:i]
                n = self.counts[k - 1][context] if k else self.total
                p = (self.counts[k][context + line[i:i + 1]] + SMOOTHING * p) / (n + SMOOTHING)
            sum_bits -= np.log2(p)
        return sum_bits / len(line)

    def scores(self, tokens, labels, real=None):
        lines = [row.astype(np.uint8).tobytes() for row in tokens]
        words = [w for line in lines for w in re.findall(rb"(?<=[^A-Za-z])[A-Za-z]+(?=[^A-Za-z])", line)]   # whole ones
        out = dict(ngram_bits=np.mean([self.bits(line) for line in lines]),
                   words=np.mean([w in self.words for w in words]) if words else 0.0, entropy=byte_entropy(tokens),
                   distinct=len(set(lines)) / len(lines),
                   duplicates=np.mean([hash(row.tobytes()) in self.seen for row in tokens]))
        return {k: round(float(v), 4) for k, v in out.items()}, {}


def hashes(split):
    """Of every sequence of a split, read in parts."""
    parts = np.array_split(np.arange(len(split)), -(-len(split) // N_REAL))
    return {hash(row.tobytes()) for i in parts for row in split.rows(i)[0]}


def byte_entropy(tokens):
    """Bits per token, wherever it stands."""
    p = np.unique(tokens, return_counts=True)[1] / tokens.size
    return -(p * np.log2(p)).sum()


def radii(points):
    """Distance of each point to its K_NEAREST-th neighbour: the ball that it covers (arXiv:1904.06991)."""
    from sklearn.neighbors import NearestNeighbors

    nearest = NearestNeighbors(n_neighbors=min(K_NEAREST + 1, len(points))).fit(points)
    return nearest.kneighbors(points)[0][:, -1]


def covered(points, centres, radius):
    """Does a point lie in any centre's ball?  (n, d), (m, d), (m,) -> (n,) bool"""
    from sklearn.metrics import pairwise_distances

    parts = np.array_split(points, -(-len(points) // 1000))
    return np.concatenate([(pairwise_distances(p, centres) <= radius).any(1) for p in parts])


def frechet(a, b):
    """Distance of two Gaussians fitted to (n, d) and (m, d)."""
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values = np.linalg.eigvals(ca @ cb).real.clip(0)
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * np.sqrt(values).sum()


def entropy(tokens):
    """Bits per token of independent positions: how varied sequences (n, N) are."""
    shares = [np.unique(column, return_counts=True)[1] / len(tokens) for column in tokens.T]
    return np.mean([-(p * np.log2(p)).sum() for p in shares])
