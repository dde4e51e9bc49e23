"""The commands that the README promises, as a user types them, cut to two iterations."""

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, script

import data
import sample

SHORT = ["--max-iters", "2", "--eval-sequences", "8"]


def commands():
    """The python commands of the README's first line."""
    line = next(
        row for row in (ROOT / "README.md").read_text().splitlines() if "train_ddpd.py configs/digits.py &&" in row
    )
    assert "pip install -r requirements.txt" in line
    return [shlex.split(part)[1:] for part in line.split("&&") if part.strip().startswith("python ")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What the first command prints, and its run in out/digits."""
    folder = tmp_path_factory.getbasetemp() / "test_readme"
    folder.mkdir(exist_ok=True)
    train = commands()[0]
    assert train[0] == "train_ddpd.py"
    done = script(*[str(ROOT / a) if a.startswith("configs") else a for a in train], *SHORT, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_main_job(trained):
    """train, sample, evaluate: every file of a run is there and says what it should."""
    for said in ("1.06 M", "4096 tokens per iteration", "2.8332", "0.6931", "0.5000", "0.0885", "sample.py out/digits"):
        assert said in trained, said
    _, draw, evaluate = commands()
    assert (draw[0], evaluate[0]) == ("sample.py", "evaluate.py")
    done = script(*draw, "--n-steps", 3, "--labels", 7, 7, 10)
    assert done.returncode == 0, done.stderr
    assert "3 samples, 6.0 NFE each" in done.stdout
    saved = np.load("out/digits/samples.npz")
    assert saved["tokens"].shape == (3, 8, 8) and saved["tokens"].max() < 17 and saved["labels"].tolist() == [7, 7, 10]
    assert json.loads(str(saved["settings"]))["n_steps"] == 3
    done = script(*evaluate, "--nfe", 4, "--n-samples", 20)
    assert done.returncode == 0, done.stderr
    row = list(csv.DictReader(Path("out/digits/evaluate.csv").open()))[-1]
    assert row["nfe"] == "4.0" and 0 <= float(row["judge_acc"]) <= 1 and float(row["bits_per_token"]) > 1
    for name in ("config.json", "ckpt.pt", "log.jsonl", "samples.png", "planner.mp4", "planner.gif"):
        assert (Path("out/digits") / name).stat().st_size > 100, name


def test_the_reference_setting_trains():
    """The torchrun line with its own flags, 32x32 tokens and width 512; here one sequence at a time."""
    line = next(row for row in (ROOT / "README.md").read_text().splitlines() if row.startswith("torchrun"))
    flags = re.sub(r".*train_ddpd.py", "", line).split()
    small = ["--batch-size", "1", "--eval-sequences", "1", "--eval-samples", "0", "--out-dir", "out/reference"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", ROOT / "train_ddpd.py", *flags]
    done = subprocess.run([*command, *SHORT, *small], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "32 x 32 tokens" in done.stdout and "hours on a CPU" in done.stdout
    rows = [json.loads(row) for row in Path("out/reference/log.jsonl").read_text().splitlines()]
    assert rows[0]["config"]["planner_lr"] == 2e-4 and rows[-1]["it"] == 2


def test_known_tokens_stay(trained):
    """--known: one half of real digits is kept, labels come from the file, the rest is filled in."""
    _, splits = data.load("digits", 8)
    tokens, labels = splits["val"].rows(np.arange(3))
    tokens, mask = tokens.reshape(3, 8, 8), np.zeros((8, 8), bool)
    mask[:4] = True
    np.savez("half.npz", tokens=tokens, mask=mask, labels=labels)
    done = script("sample.py", "out/digits", "--known", "half.npz", "--n-steps", 4)
    assert done.returncode == 0, done.stderr
    saved = np.load("out/digits/samples.npz")
    assert np.array_equal(saved["tokens"][:, :4], tokens[:, :4]) and saved["labels"].tolist() == labels.tolist()
    assert not np.array_equal(saved["tokens"][:, 4:], tokens[:, 4:])
    np.savez("one.npz", tokens=tokens[0], mask=mask)
    done = script("sample.py", "out/digits", "--known", "one.npz", "--labels", 1, 2, "--n-steps", 1, "--n-video", 0)
    assert done.returncode == 0, done.stderr
    assert (np.load("out/digits/samples.npz")["tokens"][:, :4] == tokens[0, :4]).all()


@pytest.mark.parametrize(
    "arrays, said",
    [
        (dict(tokens=np.zeros((2, 8, 8), int)), "mask"),
        (dict(tokens=np.zeros((2, 8, 7), int), mask=np.ones((8, 8), bool)), "tokens of grid (8, 8)"),
        (dict(tokens=np.full((8, 8), 17), mask=np.ones((8, 8), bool)), "must lie in [0, 17)"),
        (dict(tokens=np.zeros((8, 8)), mask=np.ones((8, 8), bool)), "not whole numbers"),
        (dict(tokens=np.zeros((8, 8), int), mask=np.ones((8, 8))), "float64 mask"),
        (dict(tokens=np.zeros((0, 8, 8), int), mask=np.ones((8, 8), bool)), "whole numbers"),
        (dict(tokens=np.zeros((3, 8, 8), int), mask=np.ones((2, 8, 8), bool)), "3 sequences of grid (8, 8) do not fit"),
    ],
)
def test_known_files_that_do_not_fit_are_refused(arrays, said):
    np.savez("bad.npz", **arrays)
    with pytest.raises(SystemExit) as error:
        sample.load_known("bad.npz", dict(grid=[8, 8], vocab=17, n_classes=10), [])
    assert "bad.npz" in str(error.value) and said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "args, said",
    [
        (["sample.py", "out/digits", "--labels", "12"], "--labels 12: out/digits knows 0 to 9"),
        (["sample.py", "out/digits", "--seed", "-1"], "--seed"),
        (["sample.py", "out/nothing"], "no run in out/nothing"),
        (["sample.py", "out/digits", "--top-p", "0"], "top_p is 0.0"),
        (["sample.py", "out/digits", "--n-steps", "0"], "n_steps is 0"),
        (["sample.py", "out/digits", "--decoder", "none.jit"], "none.jit cannot decode"),
        (["sample.py", "out/digits", "--known", "none.npz"], "none.npz cannot be read"),
        (["evaluate.py", "out/nothing"], "no run in out/nothing"),
    ],
)
def test_what_cannot_be_sampled_is_refused(args, said, trained):
    """One line on stderr, non-zero, no traceback."""
    done = script(*args)
    assert done.returncode != 0 and said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_decoder_shows_its_own_pictures(trained):
    """A TorchScript module from tokens to images in [-1, 1] replaces the palette."""
    import torch
    from PIL import Image

    class Red(torch.nn.Module):
        def forward(self, tokens):
            n, h, w = tokens.shape
            image = torch.full((n, 3, 4 * h, 4 * w), -1.0)
            image[:, 0] = 1.0
            return image

    torch.jit.script(Red()).save("decoder.jit")
    done = script("sample.py", "out/digits", "--n-steps", 1, "--labels", 3, "--decoder", "decoder.jit")
    assert done.returncode == 0, done.stderr
    assert Image.open("out/digits/samples.png").getpixel((20, 40)) == (255, 0, 0)
