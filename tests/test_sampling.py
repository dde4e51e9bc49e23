"""Samples by the thousand: the same whatever draws them, and nothing drawn twice."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, meta_of, refusal, save_run, script, tiny_config
from world import tiny_spec

import train_ddpd
from support import runtime, sampling
from support.checkpoint import load_run, locked

ALONE = runtime.World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    save_run(folder, meta_of(5, [3, 3], 3))
    return load_run(folder)


def request(n, **options):
    labels = np.arange(n) % 3
    return sampling.Request("ddpd", {"n_steps": 3} | options, 0, labels)


def drawn(run, asked, folder, **options):
    """-> tokens (n, N), first indices of the batches that were drawn"""
    starts = []
    sampling.draw_all(
        run, asked, Path(folder), ALONE, on_batch=lambda start, tokens: starts.append(start),
        **options,
    )
    return sampling.load_tokens(Path(folder), asked.n), starts


def test_samples_do_not_depend_on_batches_and_kills(run, tmp_path):
    """In one batch; in batches of 7; killed three times, with another batch size each time."""
    whole, starts = drawn(run, request(40), tmp_path / "whole")
    assert starts == [0]
    assert len(np.unique(whole, axis=0)) > 30
    small, starts = drawn(run, request(40), tmp_path / "small", batch_size=7)
    assert starts == [0, 7, 14, 21, 28, 35]
    assert np.array_equal(whole, small)

    class Killed(BaseException):
        pass

    def kill_at_second_batch(start, tokens):
        seen.append(start)
        if len(seen) == 2:
            raise Killed

    starts = []
    for size in (3, 5, 4):
        seen = []
        with pytest.raises(Killed):
            sampling.draw_all(
                run, request(40), tmp_path / "killed", ALONE, size, on_batch=kill_at_second_batch
            )
        assert not (tmp_path / "killed/samples.npz").exists()
        starts.append(seen)
    assert starts == [[0, 3], [3, 8], [8, 12]]
    rest, starts = drawn(run, request(40), tmp_path / "killed", batch_size=28)
    assert starts == [12]
    assert np.array_equal(whole, rest)
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [
        ".lock", "identity", "samples.npz"
    ]


@pytest.mark.parametrize("device, grid, n_embd, patch, size", [
    ("cpu", (8, 8), 128, 1, 64), ("cpu", (32, 32), 128, 2, 16), ("cpu", (32, 32), 512, 1, 1),
    ("cpu", (3, 3), 16, 1, 250), ("cuda", (32, 32), 512, 1, 250),
])
def test_batches_are_small_on_a_cpu(device, grid, n_embd, patch, size):
    """A block's widest tensor, eight times the residual, has at most 2^22 numbers."""
    spec = tiny_spec("ddpd-mask", grid, n_embd=n_embd, patch=patch)
    assert sampling.usual_batch(spec.shape, torch.device(device)) == size
    if device == "cpu" and 1 < size < 250:
        assert size * spec.shape.n_patches * 8 * n_embd == 2**22


def test_more_of_the_same_are_added_and_nothing_is_drawn_twice(run, tmp_path, capsys):
    few, _ = drawn(run, request(10), tmp_path)
    many, starts = drawn(run, request(25), tmp_path, batch_size=10)
    assert starts == [10, 20]
    assert np.array_equal(many[:10], few)
    assert drawn(run, request(25), tmp_path)[1] == []
    again, starts = drawn(run, request(4), tmp_path)
    assert starts == [] and np.array_equal(again, many[:4])
    assert sampling.n_samples(tmp_path / "samples.npz") == 25


def test_other_settings_weights_and_labels_are_drawn_anew(run, tmp_path, capsys):
    drawn(run, request(10), tmp_path)
    assert drawn(run, request(10, temperature=0.5), tmp_path)[1] == [0]
    other_labels = request(10)._replace(labels=np.zeros(10, np.int64))
    assert drawn(run, other_labels, tmp_path)[1] == [0]
    assert drawn(run, other_labels, tmp_path)[1] == []
    other_weights = run._replace(digest="of other weights")
    assert drawn(other_weights, other_labels, tmp_path)[1] == [0]
    assert capsys.readouterr().out.count("drawn anew") == 3


def test_known_tokens_stay_and_are_part_of_what_samples_are(run, tmp_path):
    known_tokens = np.full((6, 9), 4)
    known = np.zeros((6, 9), bool)
    known[:, :5] = True
    asked = request(6)._replace(known_tokens=known_tokens, known=known)
    tokens, _ = drawn(run, asked, tmp_path, batch_size=4)
    assert (tokens[known] == 4).all() and (tokens[~known] != 4).any()
    known[0, 8] = True
    assert drawn(run, asked, tmp_path)[1] == [0]


def test_names_of_folders():
    """What is not the default, in words; long names are cut and stay apart."""
    asked = request(3, n_steps=64, guidance=2.0)
    assert sampling.folder_name(asked) == "ddpd_64_g2_seed0"
    assert sampling.folder_name(request(3, schedule="leap", stop=0.5), "labels3.5") == (
        "ddpd_3_scheduleleap_stop0.5_labels3.5_seed0"
    )
    long = [sampling.folder_name(asked, "x" * 150 + end) for end in "ab"]
    assert long[0] != long[1] and len(long[0]) < 120


def test_a_folder_in_use_is_refused(run, tmp_path):
    with locked(tmp_path):
        assert "is in use by process" in refusal(drawn, run, request(3), tmp_path)
    assert drawn(run, request(3), tmp_path)[1] == [0]


def test_gaps():
    done = [range(3, 5), range(5, 8), range(10, 20)]
    assert list(sampling.gaps(done, 25)) == [range(3), range(8, 10), range(20, 25)]
    assert list(sampling.gaps(done, 9)) == [range(3), range(8, 9)]
    assert list(sampling.gaps([], 2)) == [range(2)]


# Several processes


def torchrun(*command):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--"]
    command = [sys.executable, *launcher, ROOT / command[0], *command[1:]]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_draw_the_samples_of_one(tmp_path):
    """sample.py and evaluate.py: each batch once, files by one writer."""
    train_ddpd.main(tiny_config("pair", "--max-iters", 1, "--eval-samples", 0))
    draw = ["sample.py", "out/pair", "--n", 30, "--n-steps", 3, "--n-video", 2, "--png"]
    printed = torchrun(*draw, "--batch-size", 4, "--out", tmp_path / "two")
    assert printed.count("30 samples, 6.0 NFE each") == 1
    done = script(*draw, "--out", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    one, two = (np.load(tmp_path / name / "samples.npz") for name in ("one", "two"))
    for key in ("tokens", "labels", "nfe"):
        assert np.array_equal(one[key], two[key])
    for name in ("one", "two"):
        assert len(list((tmp_path / name / "png").iterdir())) == 30
        assert (tmp_path / name / "planner.gif").exists()

    evaluate = ["evaluate.py", "out/pair", "--nfe", 6, "--n", 30, "--batch-size", 4]
    printed = torchrun(*evaluate, "--no-bits")
    with open("out/pair/evaluate.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["n"] for row in rows] == ["30"]
    judged = np.load("out/pair/samples/ddpd_3_seed0/samples.npz")
    assert np.array_equal(judged["tokens"], one["tokens"])
    assert printed.count("held-out data") == 1
