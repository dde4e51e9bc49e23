"""Metrics of samples, each compared with a case in which its value is known."""

import contextlib

import numpy as np
import pytest

import data
from support import metrics


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Metrics fitted to digits, and their splits, in the folder where these tests run."""
    folder = tmp_path_factory.getbasetemp() / "test_metrics"
    folder.mkdir(exist_ok=True)
    with contextlib.chdir(folder):
        meta, splits = data.load("digits", 8)
        return metrics.PictureMetrics(meta, splits), splits


def test_frechet_distance_of_known_gaussians():
    """|mean difference|^2 + sum (sigma_a - sigma_b)^2 for independent axes."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(200_000, 3)) * [1, 2, 3] + [1, 0, 0]
    b = rng.normal(size=(200_000, 3)) * [2, 2, 1] - [1, 0, 0]
    assert metrics.frechet_distance(a, b) == pytest.approx(4 + 1 + 0 + 4, rel=0.02)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_precision_and_recall_are_shares_inside_of_balls():
    """A ball reaches its third neighbour: among integers at distance 2, or 3 at the ends."""
    integers = np.arange(20.0)[:, None]
    radii = metrics.knn_radii(integers)
    assert radii[10] == 2 and radii[0] == 3
    points = np.array([[10.5], [-2.9], [22.1], [0.3]])
    assert metrics.is_covered(points, integers, radii).tolist() == [True, True, False, True]


def test_entropy_of_positions():
    """Uniform over 8, 2, 1 and 4 values: 3, 1, 0 and 2 bits."""
    i = np.arange(800)
    tokens = np.stack([i % 8, i % 2, np.zeros_like(i), i % 4], 1)
    assert metrics.position_entropy(tokens) == pytest.approx((3 + 1 + 0 + 2) / 4)


class Lines:
    """A split of one text, cut into lines of equal length."""

    def __init__(self, text, length=40):
        raw = np.frombuffer(text, np.uint8)
        n_bytes = len(raw) // length * length
        self.tokens = raw[:n_bytes].reshape(-1, length).astype(np.int64)

    def __len__(self):
        return len(self.tokens)

    def rows(self, index):
        return self.tokens[index], np.zeros(len(index), np.int64)

    def spread_subset(self, n):
        return self.rows(np.arange(n))


VOCABULARY = [b"planner", b"denoiser", b"token", b"noise", b"mask", b"step", b"level", b"grid"]


def random_words(n, rng):
    return b" ".join(VOCABULARY[i] for i in rng.integers(len(VOCABULARY), size=n))


def test_text_is_scored_by_its_n_grams():
    """Real lines are likely and their words known; shuffled bytes are neither; copies are found."""
    rng = np.random.default_rng(0)
    train = Lines(random_words(6000, rng))
    val = Lines(random_words(600, rng))
    text_metrics = metrics.TextMetrics({"train": train, "val": val})

    real, _ = text_metrics.scores(val.tokens, None)
    assert real == text_metrics.val[0]
    assert real["words"] > 0.99
    assert real["duplicates"] < 0.05
    assert real["ngram_bits"] < 1.0     # 3 bits choose a word of about six letters

    shuffled, _ = text_metrics.scores(rng.permuted(val.tokens, axis=1), None)
    assert shuffled["ngram_bits"] > 3 * real["ngram_bits"]
    assert shuffled["words"] < 0.2
    assert shuffled["entropy"] == pytest.approx(real["entropy"])

    noise, _ = text_metrics.scores(rng.integers(256, size=val.tokens.shape), None)
    assert noise["ngram_bits"] > 8
    assert noise["entropy"] > 7.9

    copies, _ = text_metrics.scores(train.tokens[:9], None)
    assert copies["duplicates"] == 1


def test_scores_of_real_digits(digits):
    """Held-out digits are near the training data and no copies of it."""
    real, accuracy = digits[0].val
    assert real["judge_acc"] > 0.98
    assert real["lo"] < real["judge_acc"] <= real["hi"]
    assert len(accuracy) == 10
    assert real["duplicates"] == 0
    assert real["distinct"] == 1
    assert real["frechet"] < 0.3
    assert 0.5 * real["entropy"] < real["class_entropy"] < 0.9 * real["entropy"]


def test_scores_of_ruined_digits(digits):
    """One digit repeated, wrong labels, noise and copies are each told apart."""
    digit_metrics, splits = digits
    real, _ = digit_metrics.val
    x, y = splits["val"].rows(np.arange(180))

    repeated, _ = digit_metrics.scores(np.repeat(x[:1], 180, 0), y)
    assert repeated["recall"] < 0.2
    assert repeated["frechet"] > 3 * real["frechet"]
    assert repeated["entropy"] == repeated["class_entropy"] == 0
    assert repeated["distinct"] == pytest.approx(1 / 180, abs=1e-4)

    mislabelled, _ = digit_metrics.scores(x, (y + 1) % 10)
    assert mislabelled["judge_acc"] < 0.02

    noise, _ = digit_metrics.scores(np.random.default_rng(0).integers(17, size=x.shape), y)
    assert noise["precision"] == 0
    assert noise["frechet"] > 3 * real["frechet"]

    copies, _ = digit_metrics.scores(*splits["train"].rows(np.arange(180)))
    assert copies["duplicates"] == 1
    assert copies["precision"] == 1
