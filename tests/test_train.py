"""Training end to end, on networks small enough to start in a second."""

import json
import os
import shutil
import signal
import socket
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
import costs
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


@pytest.mark.parametrize("flags", [[], ["--nets", "single", "--denoiser-process", "uniform"]])
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
        assert all(torch.equal(a, b) for a, b in zip(task[:5], draw(*key, order=fresh)[:5], strict=True))
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


def test_sequences_known_by_heart_reach_their_floor(capsys):
    """Under fresh noise the planner ends within 5 % of the floor that was printed."""
    size = ["--n-embd", 64, "--base-width", 64, "--n-layer", 2, "--image-size", 4, "--levels", 4, "--batch-size", 64]
    rates = ["--planner-lr", 5e-3, "--denoiser-lr", 5e-3, "--log-interval", 50, "--label-dropout", 0]
    name = "heart"
    train_ddpd.main(tiny(name, "--overfit", 4, "--overfit-noise", "fresh", "--max-iters", 400, *size, *rates))
    log = log_of(name)
    assert f"planner {log[0]['floors']['planner_by_heart']:.4f}" in capsys.readouterr().out
    last = {
        k: np.mean([row[f"{k}_loss"] for row in log if row["it"] > 250 and "lr_factor" in row])
        for k in ("planner", "denoiser")
    }
    assert last["planner"] == pytest.approx(log[0]["floors"]["planner_by_heart"], rel=0.05)
    assert last["denoiser"] == pytest.approx(log[0]["floors"]["denoiser_by_heart"], rel=0.05, abs=0.01)


def test_a_run_starts_from_anothers_averages():
    """--init-from takes the averaged weights, from iteration 0; a run that has its own goes on with those."""
    train_ddpd.main(tiny("first", "--max-iters", 3))
    train_ddpd.main(tiny("second", "--max-iters", 1, "--init-from", "out/first", "--planner-lr", 0, "--denoiser-lr", 0))
    state, other = weights("second"), weights("first")
    assert state["it"] == 1
    assert runtime.digest(state["nets"]) == runtime.digest(other["ema"]) == runtime.digest(state["ema"])
    train_ddpd.main(tiny("second", "--max-iters", 2, "--init-from", "out/none"))
    assert "n_layer 1, not 2" in refusal(tiny("third", "--n-layer", 2, "--init-from", "out/first"))
    assert "maskd run, not unid" in refusal(tiny("third", "--denoiser-process", "uniform", "--init-from", "out/first"))
    assert "no run in out/none" in refusal(tiny("third", "--init-from", "out/none"))


def test_a_dry_run_needs_no_data(capsys, tmp_path, monkeypatch):
    """Parameters as built, memory by purpose, time from a rate measured here; nothing is written."""
    monkeypatch.chdir(tmp_path)
    flags = ["--data", "imagenet", "--vocab", 1000, "--n-classes", 7, "--grid", 16, 16, "--dry-run"]
    cfg = tiny("dry", *flags)
    train_ddpd.main(cfg)
    said = capsys.readouterr().out
    nets = model.build(model.shape_of(vars(cfg), train_ddpd.stated_meta(cfg)), "maskd")
    n_params = sum(p.numel() for net in nets.values() for p in net.parameters())
    assert f"{n_params / 1e6:.2f} M parameters" in said and "16 x 16 tokens, V = 1000, 7 classes" in said
    for word in ("weights", "gradients", "optimizer", "EMA", "activations", "logits", "TFLOP/s", "time per iteration"):
        assert word in said
    assert not any(tmp_path.iterdir())


def test_the_dry_runs_activations_are_those_of_a_step():
    """Bytes that autograd keeps in a whole forward pass, but for weights and the head, against the estimate."""
    cfg = tiny("bytes", "--n-embd", 64, "--n-layer", 3, "--vocab", 50, "--grid", 12, 12)
    shape = model.shape_of(vars(cfg), train_ddpd.stated_meta(cfg))
    _, size, _, _ = costs.of_step(
        shape, "maskd", 4, torch.device("cpu"), runtime.autocast(torch.device("cpu"), "float32")
    )
    kept, nets = {}, model.build(shape, "maskd")

    def pack(y):
        kept[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
        return y

    own = {p.untyped_storage().data_ptr() for net in nets.values() for p in net.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
        outs = [
            net.hidden(torch.zeros(4, 144).long(), torch.ones(4, 1), torch.zeros(4).long()) for net in nets.values()
        ]
    assert len(outs) == 2
    assert size["activations"] == pytest.approx(sum(n for where, n in kept.items() if where not in own), rel=0.1)


def test_wandb_goes_on_under_its_id(monkeypatch):
    """Losses, floors, bins, pictures and the planner's video, without a network; a resumed run keeps its id."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    flags = ["--wandb-project", "p", "--wandb-mode", "offline", "--max-iters"]
    train_ddpd.main(tiny("wandb", *flags, 1))
    kept = Path("out/wandb/wandb_id.txt").read_text().strip()
    train_ddpd.main(tiny("wandb", *flags, 2))
    folders = [f.name for f in Path("out/wandb/wandb").glob("offline-run-*")]
    assert len(folders) == 2 and all(f.endswith(kept) for f in folders)
    media = [f.suffix for f in Path("out/wandb/wandb").rglob("media/*/*")]
    assert media.count(".png") == media.count(".mp4") == 2


# Several processes


def torchrun(*args, n=2, rdzv=()):
    """One thread per process: the order of sums is the same everywhere."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", *rdzv]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, ROOT / "train_ddpd.py", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    )


def ended(process):
    said = process.communicate()[0]
    assert process.returncode == 0, said
    return said


def wait_for(out, n_lines, process):
    log = Path(f"out/{out}/log.jsonl")
    while not (log.exists() and log.read_text().count("\n") > n_lines):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)


def losses_of(out):
    return [[row["planner_loss"], row["denoiser_loss"]] for row in log_of(out) if "tokens_per_s" in row]


def test_two_processes_equal_one_with_two_micro_steps():
    """Two gloo ranks and one process with two micro-steps: losses and weights to 1e-6 in float32 after 10 steps.

    Then one process goes on where two stopped, as long as micro-batches per iteration stay the same.
    """
    args = [*TINY, "--max-iters", 10, "--dtype", "float32", "--planner-lr", 1e-3, "--denoiser-lr", 1e-3]
    ended(torchrun(*args, "--out-dir", "out/ranks"))
    state = weights("ranks")
    assert state["it"] == 10 and state["world_size"] == 2
    alone = script(
        "train_ddpd.py",
        *args,
        "--out-dir",
        "out/alone",
        "--grad-accumulation-steps",
        2,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert alone.returncode == 0, alone.stderr
    assert np.abs(np.array(losses_of("ranks")) - losses_of("alone")).max() <= 1e-6 + 1e-5  # the log has five digits
    for name, net in state["nets"].items():
        for key, value in net.items():
            assert torch.allclose(value, weights("alone")["nets"][name][key], rtol=0, atol=1e-6), (name, key)
    assert "--grad-accumulation-steps to 2" in refusal(tiny("ranks", *args[len(TINY) :], "--max-iters", 12))
    train_ddpd.main(tiny("ranks", *args[len(TINY) :], "--max-iters", 12, "--grad-accumulation-steps", 2))
    assert weights("ranks")["it"] == 12 and weights("ranks")["world_size"] == 1


def test_two_processes_stop_together():
    """SIGTERM to torchrun: all ranks end at one iteration, and the run is saved there."""
    process = torchrun(*TINY, "--max-iters", 100_000, "--out-dir", "out/stopped")
    wait_for("stopped", 5, process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[0]
    assert process.returncode != 0 and said.count("stopped by signal 15") == 1
    assert f"at iteration {weights('stopped')['it']}, saved" in said


def test_a_killed_rank_is_started_again():
    """torchrun --max-restarts: a rank is killed, all start again from the last save, and end bit for bit the same."""
    args = [*TINY, "--max-iters", 120, "--dtype", "float32", "--save-interval", 10]
    ended(torchrun(*args, "--out-dir", "out/quiet"))
    process = torchrun(*args, "--out-dir", "out/killed", rdzv=["--max-restarts=1"])
    wait_for("killed", 25, process)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(ranks) == 2
    os.kill(int(ranks[1]), signal.SIGKILL)
    ended(process)
    starts = [row["it"] for row in log_of("killed") if row.get("start")]
    assert len(starts) == 2 and starts[0] == 0 and starts[1] >= 20
    assert_same(weights("killed"), weights("quiet"))


def test_two_agents_meet_over_c10d():
    """The README's line for several machines, here two agents on one."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    rdzv = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=7"]
    agents = [torchrun(*TINY, "--max-iters", 2, "--out-dir", "out/nodes", n=1, rdzv=rdzv) for _ in range(2)]
    assert sum("done: 2 iterations" in ended(agent) for agent in agents) == 1
    assert weights("nodes")["world_size"] == 2


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


def test_interrupted_in_the_middle_of_a_save(copy, monkeypatch):
    """A second Ctrl-C ends the program at once, also while it writes: the checkpoint before is untouched."""
    before = (copy / "ckpt.pt").read_bytes()

    def save(state, path):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", save)
        train_ddpd.main(tiny(copy.name, "--max-iters", 3))
    assert (copy / "ckpt.pt").read_bytes() == before
    train_ddpd.main(tiny(copy.name, "--max-iters", 3))
    assert weights(copy.name)["it"] == 3


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_a_checkpoint_that_runs_code_is_refused(copy):
    torch.save({"it": 1, "config": Hostile()}, copy / "ckpt.pt")
    assert "cannot be read as a checkpoint" in refusal(tiny(copy.name, "--max-iters", 9))
    assert not Path("hacked").exists()


def test_data_must_be_what_the_config_states():
    stated = ["--vocab", 17, "--grid", 8, 8, "--n-classes", 10]
    train_ddpd.main(tiny("stated", "--max-iters", 1, *stated))
    assert "vocab is 17 in data digits, but 18" in refusal(tiny("stated", *stated, "--vocab", 18))
    assert "grid is [8, 8] in data digits, but [8, 9]" in refusal(tiny("stated", *stated, "--grid", 8, 9))
    assert "n_classes is 10" in refusal(tiny("stated", *stated, "--n-classes", 0))
    assert "stated together" in refusal_of_config(*TINY, "--vocab", 17)


def refusal_of_config(*argv):
    with pytest.raises(SystemExit) as error:
        config.load(argv=[str(a) for a in argv])
    return str(error.value)


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
