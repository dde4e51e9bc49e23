"""What the tables say: each number against a case in which it is known."""

import contextlib
import csv
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, script

import config
import data
import evaluate
import judges
import train_ddpd


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """That of this file, for fixtures that are made once."""
    folder = tmp_path_factory.getbasetemp() / "test_evaluate"
    folder.mkdir(exist_ok=True)
    with contextlib.chdir(folder):
        yield folder


@pytest.fixture(scope="module")
def judge(folder):
    meta, splits = data.load("digits", 8)
    return judges.Pictures(meta, splits), splits


def test_frechet_distance_of_known_gaussians():
    """|mean difference|^2 + sum (sigma_a - sigma_b)^2 for independent axes."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(200_000, 3)) * [1, 2, 3] + [1, 0, 0]
    b = rng.normal(size=(200_000, 3)) * [2, 2, 1] - [1, 0, 0]
    assert judges.frechet(a, b) == pytest.approx(4 + 1 + 0 + 4, rel=0.02)
    assert judges.frechet(a, a) == pytest.approx(0, abs=1e-6)


def test_precision_and_recall_are_shares_inside_of_balls():
    """A ball reaches to the third neighbour: on a line of whole numbers, 2 inside and 3 at the ends."""
    line = np.arange(20.0)[:, None]
    radius = judges.radii(line)
    assert radius[10] == 2 and radius[0] == 3
    inside = judges.covered(np.array([[10.5], [-2.9], [22.1], [0.3]]), line, radius)
    assert inside.tolist() == [True, True, False, True]


def test_entropy_of_positions():
    tokens = np.stack([np.arange(800) % 8, np.arange(800) % 2, np.zeros(800, int), np.arange(800) % 4], 1)
    assert judges.entropy(tokens) == pytest.approx((3 + 1 + 0 + 2) / 4)


class Lines:
    """A split of one text."""

    def __init__(self, raw, length=40):
        raw = np.frombuffer(raw, np.uint8)
        self.tokens = raw[: len(raw) // length * length].reshape(-1, length).astype(np.int64)

    def __len__(self):
        return len(self.tokens)

    def rows(self, index):
        return self.tokens[index], np.zeros(len(index), np.int64)

    def some(self, n):
        return self.rows(np.arange(n))


def test_text_is_judged_by_its_n_grams():
    """Real lines are likely and their words known; shuffled bytes are neither; copies are found."""
    rng = np.random.default_rng(0)
    vocabulary = [b"planner", b"denoiser", b"token", b"noise", b"mask", b"step", b"level", b"grid"]
    draw = lambda n: b" ".join(vocabulary[i] for i in rng.integers(8, size=n))  # noqa: E731
    train, val = Lines(draw(6000)), Lines(draw(600))
    judge = judges.Text({"train": train, "val": val})
    real, _ = judge.scores(val.tokens, None)
    assert real == judge.val[0] and real["words"] > 0.99 and real["duplicates"] < 0.05
    assert real["ngram_bits"] < 1.0  # three bits choose a word of six letters
    shuffled, _ = judge.scores(rng.permuted(val.tokens, axis=1), None)
    assert shuffled["ngram_bits"] > 3 * real["ngram_bits"] and shuffled["words"] < 0.2
    assert shuffled["entropy"] == pytest.approx(real["entropy"])
    noise, _ = judge.scores(rng.integers(256, size=val.tokens.shape), None)
    assert noise["ngram_bits"] > 8 and noise["entropy"] > 7.9
    assert judge.scores(train.tokens[:9], None)[0]["duplicates"] == 1


def test_calibration_error():
    """A planner that is right on average everywhere has none; one that is .3 too sure has .3."""
    rng = np.random.default_rng(0)
    p = rng.random(400_000)
    assert evaluate.calibration(p, rng.random(p.shape) < p)[0] < 0.01
    p = np.full(100_000, 0.8)
    assert evaluate.calibration(p, rng.random(p.shape) < 0.5)[0] == pytest.approx(0.3, abs=0.01)


def test_scores_of_real_and_of_ruined_digits(judge):
    """Held-out digits are near the data; one digit repeated, wrong labels, noise and copies are each told apart."""
    judge, splits = judge
    real, per_class = judge.val
    assert real["judge_acc"] > 0.98 and real["lo"] < real["judge_acc"] <= real["hi"] and len(per_class) == 10
    assert real["duplicates"] == 0 and real["distinct"] == 1 and real["frechet"] < 0.3
    x, y = splits["val"].rows(np.arange(180))
    one, _ = judge.scores(np.repeat(x[:1], 180, 0), y)
    assert one["recall"] < 0.2 and one["frechet"] > 3 * real["frechet"] and one["entropy"] == one["class_entropy"] == 0
    assert 0.5 * real["entropy"] < real["class_entropy"] < 0.9 * real["entropy"]
    assert one["distinct"] == pytest.approx(1 / 180, abs=1e-4)
    assert judge.scores(x, (y + 1) % 10)[0]["judge_acc"] < 0.02
    noise, _ = judge.scores(np.random.default_rng(0).integers(17, size=x.shape), y)
    assert noise["precision"] == 0 and noise["frechet"] > 3 * real["frechet"]
    copies, _ = judge.scores(*splits["train"].rows(np.arange(180)))
    assert copies["duplicates"] == 1 and copies["precision"] == 1


@pytest.mark.parametrize(
    "name, kind, nfe, steps",
    [("ddpd", "maskd", 9, 4), ("ddpd", "single", 9, 9), ("remdm", "maskd", 8, 8), ("ancestral", "unid", 3, 3)],
)
def test_steps_for_a_number_of_calls(name, kind, nfe, steps):
    of = lambda kind: types.SimpleNamespace(kind=kind, is_video=False)  # noqa: E731
    flags = evaluate.Flags(runs=("x",))
    assert evaluate.n_steps_of(name, of(kind), nfe, flags) == steps
    guided = evaluate.Flags(runs=("x",), guidance=2.0)
    assert evaluate.n_steps_of("ddpd", of("maskd"), 9, guided) == 3
    assert evaluate.n_steps_of("remdm", of("maskd"), 9, guided) == 4
    with pytest.raises(SystemExit, match="--nfe 1 is too small for ddpd"):
        evaluate.n_steps_of("ddpd", of("unid"), 1, flags)


@pytest.mark.parametrize("name, lag, steps", [("rollout", -1, 4), ("rollout", 0, 24), ("ancestral", -1, 24)])
def test_calls_for_a_video_are_counted_per_frame_that_is_made(name, lag, steps):
    """8 frames of which 2 are given, 4 calls for each of the other 6: one by one, or all of them together."""
    run = types.SimpleNamespace(kind="forcing", is_video=True, meta=dict(grid=[8, 2, 2]), frames=lambda flags: 8)
    assert evaluate.n_steps_of(name, run, 4, evaluate.Flags(runs=("x",), lag=lag)) == steps


@pytest.fixture(scope="module")
def runs(folder):
    for name, flags in [("a", []), ("b", ["--nets", "single", "--denoiser-process", "uniform"])]:
        train_ddpd.main(config.load(argv=[*TINY, "--max-iters", "2", "--out-dir", f"out/{name}", *flags]))
    return "out/a", "out/b"


def test_one_table_over_runs(runs):
    """Rows for what fits, "n/a" for what does not; nfe is what was called; the plots are there."""
    done = script(
        "evaluate.py",
        *runs,
        "--samplers",
        "ddpd",
        "ancestral",
        "remdm",
        "--nfe",
        2,
        4,
        "--n-samples",
        20,
        "--batch-size",
        7,
        "--planner",
    )
    assert done.returncode == 0, done.stderr
    assert "remdm: n/a for a single run" in done.stdout and "in use: AUROC" in done.stdout
    rows = {run: list(csv.DictReader((Path(run) / "evaluate.csv").open())) for run in runs}
    assert [(r["sampler"], r["steps"]) for r in rows["out/a"]] == [
        ("ddpd", "1"),
        ("ddpd", "2"),
        ("ancestral", "2"),
        ("ancestral", "4"),
        ("remdm", "2"),
        ("remdm", "4"),
    ]
    assert [(r["sampler"], r["steps"]) for r in rows["out/b"]] == [
        ("ddpd", "2"),
        ("ddpd", "4"),
        ("ancestral", "2"),
        ("ancestral", "4"),
        ("remdm", "n/a"),
    ]
    for row in rows["out/a"] + rows["out/b"][:-1]:
        assert float(row["nfe"]) == pytest.approx(
            float(row["steps"]) * (2 if row["sampler"] == "ddpd" and row["run"] == "out/a" else 1), abs=1
        )
        wanted = (
            "run sampler steps nfe s_per_sample n seed judge_acc lo hi worst_class frechet precision recall entropy"
        )
        assert all(row[column] != "" for column in [*wanted.split(), "duplicates", "bits_per_token", "device"])
    assert (Path("out/a/evaluate.png")).stat().st_size > 1000 and Path("out/b/reliability.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--samplers", "confidence"], "sampler confidence does not fit a single run"),
        (["--samplers", "magic"], "--samplers magic is not one of ddpd"),
        (["--nfe", "0"], "must be at least 1"),
        (["--top-p", "1.5"], "top_p is 1.5; it must be in (0, 1]"),
        (["--guidance", "2", "--nfe", "1"], "--nfe 1 is too small"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(runs, flags, said):
    done = script("evaluate.py", "out/b", "--n-samples", 4, *flags)
    assert done.returncode != 0 and said in done.stderr and "Traceback" not in done.stderr


def test_correction_has_a_row_of_its_own(folder):
    """A gidd run, before and after: calls of both stages are counted; other runs have no such row."""
    flags = ["--method", "gidd", "--p-uniform", "0.2"]
    train_ddpd.main(config.load(argv=[*TINY, "--max-iters", "2", "--out-dir", "out/g", *flags]))
    done = script("evaluate.py", "out/g", "--nfe", 3, "--n-samples", 20, "--correct", 2)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(Path("out/g/evaluate.csv").open()))
    assert [(r["sampler"], r["nfe"]) for r in rows] == [("ancestral", "3.0"), ("ancestral+correct", "5.0")]


def test_images_for_outside_suites(runs):
    """--decoder writes uint8 (n, H, W, 3) under arr_0."""

    class Grey(torch.nn.Module):
        def forward(self, tokens):
            return (tokens / 8.0 - 1)[:, None].expand(-1, 3, -1, -1).clone()

    torch.jit.script(Grey()).save("grey.jit")
    done = script("evaluate.py", "out/a", "--nfe", 2, "--n-samples", 5, "--decoder", "grey.jit", "--batch-size", 2)
    assert done.returncode == 0, done.stderr
    images = np.load("out/a/ddpd_2_seed0_guidance1.npz")["arr_0"]
    assert images.shape == (5, 8, 8, 3) and images.dtype == np.uint8
