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
import torch
from conftest import ROOT, refusal, samples_of, script
from PIL import Image

import data
from support import pictures, starts

SHORT = ["--max-iters", "2", "--eval-sequences", "8"]
README = (ROOT / "README.md").read_text()


def first_commands():
    """The three python commands of the README's first line."""
    start = re.compile(r"train_ddpd\.py (configs/digits\.py|digits) &&")
    line = next(line for line in README.splitlines() if start.search(line))
    assert line.startswith("python3 -m venv .venv && . .venv/bin/activate && ")
    assert "pip install -r requirements.txt" in line
    parts = [part.strip() for part in line.split("&&")]
    return [shlex.split(part)[1:] for part in parts if part.startswith("python ")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What the first command prints, and its run in out/digits."""
    folder = tmp_path_factory.getbasetemp() / "test_readme"
    folder.mkdir(exist_ok=True)
    train = first_commands()[0]
    assert train[0] == "train_ddpd.py"
    argv = [str(ROOT / arg) if arg.startswith("configs/") else arg for arg in train]
    done = script(*argv, *SHORT, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


# The commands


def test_training_prints_what_a_reader_needs(trained):
    """Parameters, tokens, the losses to compare with, and the next command."""
    for said in ("1.06 M", "4096 tokens per iteration", "2.8332", "0.6931", "0.5000", "0.0885"):
        assert said in trained, said
    assert "sample.py out/digits" in trained


def test_the_first_line(trained):
    """Train, sample, evaluate: every file of a run is there and says what it should."""
    _, draw, evaluate = first_commands()
    assert draw == ["sample.py", "out/digits"]
    assert evaluate == ["evaluate.py", "out/digits"]

    done = script(*draw, "--n-steps", 3, "--labels", 7, 7, 10)
    assert done.returncode == 0, done.stderr
    assert "3 samples, 6.0 NFE each" in done.stdout
    saved = np.load(samples_of("out/digits") / "samples.npz")
    assert saved["tokens"].shape == (3, 8, 8)
    assert saved["tokens"].max() < 17
    assert saved["labels"].tolist() == [7, 7, 10]
    assert json.loads(str(saved["settings"]))["n_steps"] == 3

    done = script(*evaluate, "--nfe", 4, "--n", 20)
    assert done.returncode == 0, done.stderr
    with open("out/digits/evaluate.csv") as file:
        row = list(csv.DictReader(file))[-1]
    assert row["nfe"] == "4.0"
    assert 0 <= float(row["judge_acc"]) <= 1
    assert float(row["bits_per_token"]) > 1

    for name in "config.json ckpt.pt log.jsonl samples.png evaluate.png".split():
        assert (Path("out/digits") / name).stat().st_size > 100, name
    samples = Path("out/digits/samples/ddpd_3_labels7.7.10_seed0")
    for name in "samples.png planner.mp4 planner.gif".split():
        assert (samples / name).stat().st_size > 100, name


def test_the_reference_setting_trains():
    """The torchrun line with its own flags, 32x32 tokens and width 512; here one sequence at a
    time."""
    line = next(line for line in README.splitlines() if line.startswith("torchrun"))
    flags = re.sub(r".*train_ddpd.py", "", line).split()
    small = ["--batch-size", "1", "--eval-sequences", "1", "--eval-samples", "0"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1"]
    command = [*launcher, ROOT / "train_ddpd.py", *flags, *SHORT, *small]
    command += ["--out-dir", "out/reference"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "32 x 32 tokens" in done.stdout
    assert "hours on a CPU" in done.stdout
    log = [json.loads(line) for line in Path("out/reference/log.jsonl").read_text().splitlines()]
    assert log[0]["config"]["planner_lr"] == 2e-4
    assert log[-1]["it"] == 2


def test_the_python_of_the_readme_runs(trained):
    """The README's Python blocks, one after the other, beside the run of its first line."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks and 'load_run("out/digits")' in blocks[0]
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["tokens"].shape == (2, 8, 8)


# Inpainting


def half_of_real_digits():
    """Three held-out digits (3, 8, 8), a mask of their upper halves, and their labels."""
    _, splits = data.load("digits", 8)
    tokens, labels = splits["val"].rows(np.arange(3))
    mask = np.zeros((8, 8), bool)
    mask[:4] = True
    return tokens.reshape(3, 8, 8), mask, labels


def test_known_tokens_stay(trained):
    """--known: a half of real digits is kept, labels come from the file, the rest is filled in."""
    tokens, mask, labels = half_of_real_digits()
    np.savez("half.npz", tokens=tokens, mask=mask, labels=labels)
    done = script("sample.py", "out/digits", "--known", "half.npz", "--n-steps", 4)
    assert done.returncode == 0, done.stderr
    saved = np.load(samples_of("out/digits") / "samples.npz")
    assert np.array_equal(saved["tokens"][:, :4], tokens[:, :4])
    assert not np.array_equal(saved["tokens"][:, 4:], tokens[:, 4:])
    assert saved["labels"].tolist() == labels.tolist()
    assert "without a label" not in done.stdout
    picture = np.asarray(Image.open(samples_of("out/digits") / "samples.png"))
    is_blue = (picture == pictures.KNOWN).all(-1)
    assert is_blue.sum() > 3 * 2 * 100              # the outlines of three upper halves

    np.savez("half.npz", tokens=tokens, mask=mask)
    done = script("sample.py", "out/digits", "--known", "half.npz", "--n-steps", 2)
    assert done.stdout.startswith("samples without a label: neither half.npz nor --labels has one")


def test_one_known_sequence_serves_all_labels(trained):
    tokens, mask, _ = half_of_real_digits()
    np.savez("one.npz", tokens=tokens[0], mask=mask)
    flags = ["--labels", 1, 2, "--n-steps", 1, "--n-video", 0]
    done = script("sample.py", "out/digits", "--known", "one.npz", *flags)
    assert done.returncode == 0, done.stderr
    saved = np.load(samples_of("out/digits") / "samples.npz")
    assert len(saved["tokens"]) == 2
    assert "without a label" not in done.stdout
    assert (saved["tokens"][:, :4] == tokens[0, :4]).all()


def zeros(*shape, dtype=int):
    return np.zeros(shape, dtype)


def all_known(*shape):
    return np.ones(shape, bool)


@pytest.mark.parametrize(
    "arrays, said",
    [
        (dict(tokens=zeros(2, 8, 8)), "mask"),
        (dict(tokens=zeros(2, 8, 7), mask=all_known(8, 8)), "tokens of grid (8, 8)"),
        (dict(tokens=zeros(8, 8) + 17, mask=all_known(8, 8)), "must lie in [0, 17)"),
        (dict(tokens=zeros(8, 8, dtype=float), mask=all_known(8, 8)), "not whole numbers"),
        (dict(tokens=zeros(8, 8), mask=np.ones((8, 8))), "float64 mask"),
        (dict(tokens=zeros(0, 8, 8), mask=all_known(8, 8)), "whole numbers"),
        (
            dict(tokens=zeros(3, 8, 8), mask=all_known(2, 8, 8)),
            "3 sequences of grid (8, 8) do not fit",
        ),
    ],
)
def test_known_files_that_do_not_fit_are_refused(arrays, said):
    np.savez("bad.npz", **arrays)
    meta = dict(grid=[8, 8], vocab=17, n_classes=10)
    message = refusal(starts.load_known_tokens, "bad.npz", meta, [])
    assert "bad.npz" in message and said in message


# What is refused


def test_an_unknown_class_names_the_closest():
    """And the first few of those there are."""
    meta = dict(name="x", class_names=["cats", "dogs", *map(str, range(20))])
    assert starts.label_of("dogs", meta) == 1
    classes = "did you mean cats? There are cats, dogs, 0, 1, 2, 3, 4, 5, 6, 7, ..."
    assert refusal(starts.label_of, "cat", meta) == f"--labels cat names no class of x; {classes}"
    said = refusal(starts.label_of, "cat", dict(name="x", class_names=[]))
    assert said == "--labels cat names no class of x, which has none"


@pytest.mark.parametrize(
    "args, said",
    [
        (["sample.py", "out/digits", "--labels", "12"], "--labels 12: out/digits knows 0 to 9"),
        (["sample.py", "out/digits", "--seed", "-1"], "seed is -1; it must lie in [0, 4294967295]"),
        (["sample.py", "out/nothing"], "no run in out/nothing"),
        (["sample.py", "out/digits", "--top-p", "0"], "top_p is 0.0"),
        (["sample.py", "out/digits", "--n-steps", "0"], "n_steps is 0"),
        (["sample.py", "out/digits", "--eta", "0.2"], "--eta is no option of sampler ddpd"),
        (["sample.py", "out/digits", "--decoder", "none.jit"], "none.jit cannot decode"),
        (["sample.py", "out/digits", "--known", "none.npz"], "none.npz cannot be read"),
        (["evaluate.py", "out/nothing"], "no run in out/nothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_sampled_is_refused(args, said, trained):
    """One line on stderr, non-zero, no traceback."""
    done = script(*args)
    assert done.returncode != 0
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


# Pictures of a decoder


def test_a_decoder_shows_its_own_pictures(trained):
    """A TorchScript module from tokens to images in [-1, 1] replaces the palette."""

    class Red(torch.nn.Module):
        def forward(self, tokens):
            n, h, w = tokens.shape
            image = torch.full((n, 3, 4 * h, 4 * w), -1.0)
            image[:, 0] = 1.0
            return image

    torch.jit.script(Red()).save("decoder.jit")
    flags = ["--n-steps", 1, "--labels", 3, "--decoder", "decoder.jit"]
    done = script("sample.py", "out/digits", *flags)
    assert done.returncode == 0, done.stderr
    assert Image.open(samples_of("out/digits") / "samples.png").getpixel((40, 100)) == (255, 0, 0)
