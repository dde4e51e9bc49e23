"""Training end to end, on networks small enough to start in a second."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, script

import config
import data
import model
import runtime
import train_ddpd


def tiny(out, *flags):
    return config.load(argv=[*TINY, "--out-dir", f"out/{out}", "--dtype", "float32", *map(str, flags)])


def weights(out):
    return runtime.load_checkpoint(f"out/{out}")


def log_of(out):
    return [json.loads(line) for line in Path(f"out/{out}/log.jsonl").read_text().splitlines()]


def assert_same(a, b):
    assert a["it"] == b["it"]
    for part in ("nets", "ema", "optimizers"):
        assert runtime.digest(a[part]) == runtime.digest(b[part])


@pytest.mark.parametrize(
    "flags", [[], ["--nets", "single", "--denoiser-process", "uniform"], ["--denoiser-process", "uniform"]]
)
def test_interrupted_by_a_signal_is_not_interrupted_at_all(flags):
    """SIGTERM saves; the same command goes on; all that was trained equals the undisturbed run's, bit for bit."""
    n = 150
    args = [*TINY, "--dtype", "float32", "--max-iters", n, *flags]
    assert script("train_ddpd.py", *args, "--out-dir", "out/whole").returncode == 0
    command = [sys.executable, ROOT / "train_ddpd.py", *map(str, args), "--out-dir", "out/parts"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = Path("out/parts/log.jsonl")
    while not (log.exists() and log.read_text().count("\n") > 20):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM and "stopped by signal 15" in said
    assert 20 <= weights("parts")["it"] < n
    assert script("train_ddpd.py", *args, "--out-dir", "out/parts").returncode == 0
    assert_same(weights("whole"), weights("parts"))
    losses = [{k: v for k, v in row.items() if "loss" in k} for row in log_of("parts") if "tokens_per_s" in row]
    assert losses == [{k: v for k, v in row.items() if "loss" in k} for row in log_of("whole") if "tokens_per_s" in row]
    again = script("train_ddpd.py", *args, "--out-dir", "out/parts")
    assert again.returncode == 0 and "is finished" in again.stdout
    shutil.rmtree("out")


def test_one_batch_overfits(capsys):
    """With noise and levels held fixed, both losses on four sequences go to near zero."""
    train_ddpd.main(
        tiny(
            "overfit",
            "--overfit",
            4,
            "--max-iters",
            300,
            "--n-embd",
            64,
            "--base-width",
            64,
            "--n-layer",
            2,
            "--planner-lr",
            1e-2,
            "--denoiser-lr",
            1e-2,
            "--log-interval",
            10,
        )
    )
    last = [row for row in log_of("overfit") if "tokens_per_s" in row][-1]
    assert last["planner_loss"] < 0.01 and last["denoiser_loss"] < 0.01


def test_randomness_is_a_function_of_seed_iteration_and_micro_batch():
    """Noise, levels, label dropout and data order are drawn anew from (seed, it, g), never from what came before."""
    cfg = tiny("micro", "--grad-accumulation-steps", 2)
    meta, splits = data.load(cfg.data, cfg.image_size, cfg.levels)
    order = data.Order(len(splits["train"]), 0)

    def draw(it, g, order=order, cfg=cfg):
        return train_ddpd.draw_tasks(cfg, meta, splits["train"], order, it, g, 2)["planner"]

    seen = {key: draw(*key) for key in [(0, 0), (0, 1), (1, 0)]}
    for key, task in seen.items():
        fresh = data.Order(len(splits["train"]), 0)
        assert all(torch.equal(a, b) for a, b in zip(task, draw(*key, order=fresh), strict=True))
        assert not torch.equal(task.t, draw(*key, cfg=replace(cfg, seed=1)).t)
    assert not torch.equal(seen[0, 0].t, seen[0, 1].t) and not torch.equal(seen[0, 0].t, seen[1, 0].t)
    index = order.take(0, len(splits["train"]))
    assert np.array_equal(np.sort(index), np.arange(len(index)))  # an epoch visits each sequence once
    assert np.array_equal(order.take(4, 4), index[4:8])
    assert not np.array_equal(order.take(len(index), len(index)), index)


def test_the_average_follows_the_weights():
    """EMA with warm-up: after each iteration average += (1 - min(decay, (1 + it) / (10 + it))) (weights - average)."""
    for n in (1, 2, 3):
        train_ddpd.main(tiny(f"ema{n}", "--max-iters", n, "--lr-decay-iters", 3))
    torch.manual_seed(0)
    shape = model.shape_of(weights("ema1")["config"], weights("ema1")["meta"])
    start = model.build(shape, "maskd")["planner"].state_dict()
    average = start["embed.weight"]
    for it in range(3):
        state = weights(f"ema{it + 1}")
        average = average.lerp(state["nets"]["planner"]["embed.weight"], 1 - (1 + it) / (10 + it))
        assert torch.allclose(state["ema"]["planner"]["embed.weight"], average, atol=1e-7)
        assert not state["ema"]["planner"]["embed.weight"].requires_grad
    assert not torch.equal(average, start["embed.weight"])


def test_learning_rate_schedule():
    """Linear up over the warm-up, a cosine down to a tenth at lr_decay_iters, flat from there."""
    cfg = replace(tiny("lr"), warmup_iters=10, lr_decay_iters=110, max_iters=200)
    factors = [train_ddpd.lr_factor(it, cfg) for it in range(200)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[60] == pytest.approx(0.55) and factors[110:] == pytest.approx([0.1] * 90)
    assert train_ddpd.lr_factor(200, replace(cfg, lr_decay_iters=0)) == pytest.approx(0.1)


def test_validation_is_the_loss_of_the_averaged_networks():
    """At the start: ln 2, AUROC 1/2, ln V in every bin; the floors hold at any time."""
    cfg = tiny("validate", "--max-iters", 1, "--planner-lr", 0, "--denoiser-lr", 0)
    train_ddpd.main(cfg)
    scores = [row for row in log_of("validate") if "val_planner_bce" in row][-1]
    assert scores["val_planner_bce_bins"] == pytest.approx([np.log(2)] * 10, abs=1e-4)
    assert scores["val_denoiser_ce_bins"] == pytest.approx([np.log(17)] * 10, abs=1e-4)
    assert scores["val_planner_auroc"] == pytest.approx(0.5)
    assert Path("out/validate/samples.png").exists()


def torchrun(*args):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", ROOT / "train_ddpd.py", *args]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def test_two_processes_equal_one_with_two_micro_steps():
    """Two gloo ranks and one process with two micro-steps draw the same noise and end at the same weights."""
    args = [*TINY, "--max-iters", "3", "--dtype", "float32"]
    process = torchrun(*args, "--out-dir", "out/ranks")
    said = process.communicate()[0]
    assert process.returncode == 0, said
    state = weights("ranks")
    assert state["it"] == 3 and state["world_size"] == 2
    alone = script("train_ddpd.py", *args, "--out-dir", "out/alone", "--grad-accumulation-steps", 2)
    assert alone.returncode == 0, alone.stderr
    for name, net in state["nets"].items():
        for key, value in net.items():
            assert torch.allclose(value, weights("alone")["nets"][name][key], atol=1e-6)
    refused = script("train_ddpd.py", *args, "--out-dir", "out/ranks", "--max-iters", 4)
    assert refused.returncode != 0 and "--grad-accumulation-steps to 2" in refused.stderr


def test_two_processes_stop_together():
    """SIGTERM to torchrun: all ranks end at one iteration, and the run is saved there."""
    process = torchrun(*TINY, "--max-iters", "100000", "--out-dir", "out/stopped")
    log = Path("out/stopped/log.jsonl")
    while not (log.exists() and log.read_text().count("\n") > 5):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[0]
    assert process.returncode != 0 and said.count("stopped by signal 15") == 1
    assert f"at iteration {weights('stopped')['it']}, saved" in said


# Bad input


def refusal(cfg):
    with pytest.raises(SystemExit) as error:
        train_ddpd.main(cfg)
    message = str(error.value)
    assert "\n" not in message and len(message) > 10
    return message


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of one iteration, to be copied and spoiled."""
    here = Path.cwd()
    folder = tmp_path_factory.mktemp("run")
    os.chdir(folder)
    train_ddpd.main(tiny("good", "--max-iters", 2, "--save-interval", 1))
    os.chdir(here)
    return folder / "out" / "good"


@pytest.fixture
def copy(run, request):
    target = Path("out") / request.node.name
    shutil.copytree(run, target)
    return target


@pytest.mark.parametrize("flag, value", [("n_embd", 32), ("n_layer", 2), ("image_size", 4), ("levels", 5), ("seed", 1)])
def test_another_shape_or_data_is_refused_by_name(copy, flag, value):
    before = (copy / "ckpt.pt").read_bytes()
    message = refusal(replace(tiny(copy.name, "--max-iters", 9), **{flag: value}))
    assert flag in message and str(value) in message
    assert (copy / "ckpt.pt").read_bytes() == before


def test_other_lr_and_length_are_applied_and_said(copy, capsys):
    train_ddpd.main(
        tiny(copy.name, "--max-iters", 4, "--planner-lr", 1e-4, "--weight-decay", 0.5, "--eval-interval", 3)
    )
    said = capsys.readouterr().out
    assert "planner_lr 0.001 -> 0.0001" in said and "max_iters 2 -> 4" in said
    state = weights(copy.name)
    assert state["it"] == 4 and state["optimizers"]["planner"]["param_groups"][0]["weight_decay"] == 0.5


@pytest.mark.parametrize(
    "spoil, word",
    [
        (lambda b: b[: len(b) // 2], "cannot be read"),
        (lambda b: b"", "cannot be read"),
        (lambda b: b"hello", "cannot be read"),
        (lambda b: b[:40_000] + bytes([b[40_000] ^ 1]) + b[40_001:], "ckpt.pt"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_named(copy, spoil, word):
    path = copy / "ckpt.pt"
    path.write_bytes(spoil(path.read_bytes()))
    message = refusal(tiny(copy.name, "--max-iters", 9))
    assert word in message and "ckpt_prev.pt" in message
    assert runtime.load_checkpoint.__name__ and torch.load(copy / "ckpt_prev.pt", weights_only=True)["it"] == 1


def test_a_full_disk_leaves_the_checkpoint_and_is_said(copy, monkeypatch, capsys):
    """A failed write warns and training goes on; if the last one fails the run does not claim to be saved."""
    before = (copy / "ckpt.pt").read_bytes()
    real = torch.save

    def save(state, path):
        real(state, path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    message = refusal(tiny(copy.name, "--max-iters", 6, "--save-interval", 2))
    assert "iteration 6 could not be saved" in message
    assert capsys.readouterr().err.count("No space left on device") == 3 - 1
    assert (copy / "ckpt.pt").read_bytes() == before and not (copy / "ckpt.tmp").exists()


def test_a_foreign_folder_is_refused():
    Path("out/foreign").mkdir(parents=True)
    Path("out/foreign/thesis.tex").write_text("x")
    assert "out/foreign" in refusal(tiny("foreign"))
    Path("out/foreign/config.json").write_text('{"architectures": ["Other"]}')
    assert "out/foreign" in refusal(tiny("foreign"))
    assert sorted(os.listdir("out/foreign")) == ["config.json", "thesis.tex"]


def test_an_unwritable_folder_is_refused():
    Path("file").write_text("x")
    assert "file" in refusal(replace(tiny("x"), out_dir="file/run"))


def test_nan_ends_the_run_and_leaves_the_checkpoint(copy):
    before = (copy / "ckpt.pt").read_bytes()
    message = refusal(tiny(copy.name, "--max-iters", 60, "--planner-lr", "1e30", "--grad-clip", 0))
    assert "not finite at iteration" in message and "planner" in message
    assert (copy / "ckpt.pt").read_bytes() == before


def test_a_width_that_its_heads_do_not_divide():
    assert "n_embd 16" in refusal(tiny("heads", "--n-head", 3))


def test_unknown_data_names_the_nearest():
    assert "did you mean digits?" in refusal(tiny("data", "--data", "digit"))
