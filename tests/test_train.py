"""Training end to end, on networks small enough to start in a second."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, refusal, script, tiny_config

import config
import methods
import train_ddpd
from support import checkpoint, diagnostics, logs, pictures, runtime, training, validate
from support.checkpoint import digest, load_checkpoint

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}      # the order of sums is the same everywhere


def tiny(out, *flags):
    return tiny_config(out, "--dtype", "float32", *flags)


def spec_of(cfg, meta):
    return methods.spec_of(asdict(cfg), meta)


def checkpoint_of(out):
    return load_checkpoint(f"out/{out}")


def log_of(out):
    return [json.loads(line) for line in Path(f"out/{out}/log.jsonl").read_text().splitlines()]


def training_rows(out):
    """The rows of a log that hold training losses."""
    return [row for row in log_of(out) if "tokens_per_s" in row]


def losses_of(out):
    """All training losses in a run's log.  -> [{name: value}]"""
    return [{key: row[key] for key in row if "loss" in key} for row in training_rows(out)]


def assert_same(a, b):
    """Two checkpoints agree bit for bit."""
    assert a["it"] == b["it"]
    for part in ("nets", "ema", "optimizers"):
        assert digest(a[part]) == digest(b[part])


def wait_for_lines(out, n_lines, process):
    """Until the log of a running process has more than n_lines."""
    log = Path(f"out/{out}/log.jsonl")
    while not (log.exists() and log.read_text().count("\n") > n_lines):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)


# What is trained


@pytest.mark.parametrize("flags", [[], ["--nets", "single", "--denoiser-process", "uniform"]])
def test_a_run_that_is_stopped_and_resumed_equals_one_that_is_not(flags):
    """SIGTERM saves; the same command goes on; weights, averages and moments end bit for bit the
    same, and so do all losses in the log."""
    n = 150
    args = [*TINY, "--dtype", "float32", "--max-iters", n, *flags]
    assert script("train_ddpd.py", *args, "--out-dir", "out/whole").returncode == 0

    in_parts = ["train_ddpd.py", *map(str, args), "--out-dir", "out/parts"]
    command = [sys.executable, ROOT / in_parts[0], *in_parts[1:]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_lines("parts", 20, process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by signal 15" in said
    assert 20 <= checkpoint_of("parts")["it"] < n

    assert script(*in_parts).returncode == 0
    assert_same(checkpoint_of("whole"), checkpoint_of("parts"))
    assert len(losses_of("whole")) == n
    assert losses_of("parts") == losses_of("whole")

    again = script(*in_parts)
    assert again.returncode == 0
    assert "is finished" in again.stdout
    shutil.rmtree("out")


def test_one_batch_overfits():
    """With noise and levels held fixed, both losses on four sequences go to near zero."""
    size = ["--n-embd", 64, "--base-width", 64, "--n-layer", 2]
    rates = ["--planner-lr", 1e-2, "--denoiser-lr", 1e-2]
    length = ["--max-iters", 300, "--log-interval", 10]
    train_ddpd.main(tiny("overfit", "--overfit", 4, *size, *rates, *length))
    last = training_rows("overfit")[-1]
    assert last["planner_loss"] < 0.01
    assert last["denoiser_loss"] < 0.01


def test_randomness_is_a_function_of_seed_iteration_and_micro_batch():
    """Noise, levels, label dropout and data order are drawn anew from (seed, it, g), never from
    what came before."""
    cfg = tiny("micro", "--grad-accumulation-steps", 2)
    spec, splits = training.open_data(cfg)

    def new_batches(cfg=cfg):
        return train_ddpd.Batches(cfg, spec, splits["train"], n_groups=2)

    batches = new_batches()
    seen = {}
    for it, group in [(0, 0), (0, 1), (1, 0)]:
        task = seen[it, group] = batches.tasks(it, group)["planner"]
        alone = new_batches().tasks(it, group)["planner"]
        for name in ("xt", "t", "label", "sites", "target"):
            assert torch.equal(getattr(task, name), getattr(alone, name)), name
        other_seed = new_batches(replace(cfg, seed=1)).tasks(it, group)["planner"]
        assert not torch.equal(task.t, other_seed.t)
    assert not torch.equal(seen[0, 0].t, seen[0, 1].t)
    assert not torch.equal(seen[0, 0].t, seen[1, 0].t)

    order = batches.order
    n = len(splits["train"])
    epoch = order.take(0, n)
    assert np.array_equal(np.sort(epoch), np.arange(n))     # each sequence once
    assert np.array_equal(order.take(4, 4), epoch[4:8])
    assert not np.array_equal(order.take(n, n), epoch)


def test_streams_of_randomness_are_distinct():
    """Keys that differ in stream, length, order or by a trailing zero have seeds of their own."""
    keys = [("train", 1, 0, 0), ("train", 1, 0), ("train", 1), ("train", 0, 1), ("train", 0, 0, 1)]
    keys += [("train", 2**32, 0), ("train", 0, 2**32), ("train", 10, 1), ("train", 1, 1, 0)]
    keys += [("train", 1, 10), ("train", 11, 0), ("sample", 1), ("sample",), ("validation",)]
    seeds = {runtime.generator(*key).initial_seed() for key in keys}
    assert len(seeds) == len(keys)
    assert runtime.generator("train", np.int64(1)).initial_seed() in seeds


def test_the_average_follows_the_weights():
    """EMA with warm-up: after each iteration
    average += (1 - min(decay, (1 + it) / (10 + it))) (weights - average)."""
    for n in (1, 2, 3):
        train_ddpd.main(tiny(f"ema{n}", "--max-iters", n, "--lr-decay-iters", 3))
    first = checkpoint_of("ema1")
    torch.manual_seed(0)
    untrained = methods.build(methods.spec_of(first["config"], first["meta"]))
    start = untrained["planner"].state_dict()["tok_emb.weight"]
    average = start
    for it in range(3):
        state = checkpoint_of(f"ema{it + 1}")
        weight = state["nets"]["planner"]["tok_emb.weight"]
        average = average.lerp(weight, 1 - (1 + it) / (10 + it))
        saved = state["ema"]["planner"]["tok_emb.weight"]
        assert torch.allclose(saved, average, atol=1e-7)
        assert not saved.requires_grad
    assert not torch.equal(average, start)


def test_learning_rate_schedule():
    """Linear up over the warm-up, a cosine down to a tenth at lr_decay_iters, flat from there."""
    cfg = replace(tiny("lr"), warmup_iters=10, lr_decay_iters=110, max_iters=200)
    factors = [training.lr_factor(it, cfg) for it in range(200)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[60] == pytest.approx(0.55)
    assert factors[110:] == pytest.approx([0.1] * 90)
    until_the_end = replace(cfg, lr_decay_iters=0)
    assert training.lr_factor(200, until_the_end) == pytest.approx(0.1)


@pytest.mark.parametrize("grad_clip", [0, 1e-3, 1e9])
def test_gradient_norms_are_logged_before_clipping(grad_clip):
    """The first one is the norm of the gradient of the untrained networks, whatever it is clipped
    to."""
    name = f"norms{grad_clip}"
    cfg = tiny(name, "--max-iters", 1, "--grad-clip", grad_clip)
    train_ddpd.main(cfg)
    logged = training_rows(name)[0]
    spec, splits = training.open_data(cfg)
    nets = training.build_training(cfg, spec, None, torch.device("cpu")).nets
    tasks = training.Batches(cfg, spec, splits["train"], 1).tasks(0, 0)
    for name, net in nets.items():
        training.Learner({name: net})(tasks).backward()
        squares = [p.grad.double().square().sum() for p in net.parameters() if p.grad is not None]
        norm = sum(squares).sqrt().item()
        assert logged[f"{name}_grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_a_log_line_holds_means_since_the_one_before():
    """Losses and gradient norms; epochs count the sequences of the training split."""
    for interval in (1, 4):
        flags = ["--max-iters", 8, "--log-interval", interval]
        train_ddpd.main(tiny(f"every{interval}", *flags))
    each, fourth = training_rows("every1"), training_rows("every4")
    for name in ("planner_loss", "planner_grad_norm", "denoiser_grad_norm"):
        for i, row in enumerate(fourth):
            values = [row[name] for row in each[4 * i:4 * i + 4]]
            assert row[name] == pytest.approx(np.mean(values), abs=1e-5)
    n_train = len(training.open_data(tiny("every1"))[1]["train"])
    assert [row["epochs"] for row in fourth] == [round(it * 4 / n_train, 4) for it in (4, 8)]
    assert all(row["peak_mib"] > 50 for row in each)


def test_validation_is_the_loss_of_the_averaged_networks():
    """Untrained networks have ln 2, AUROC 1/2 and ln V in every bin of level."""
    train_ddpd.main(tiny("validate", "--max-iters", 1, "--planner-lr", 0, "--denoiser-lr", 0))
    scores = [row for row in log_of("validate") if "val_planner_bce" in row][-1]
    assert scores["val_planner_bce_bins"] == pytest.approx([np.log(2)] * 10, abs=1e-4)
    assert scores["val_denoiser_ce_bins"] == pytest.approx([np.log(17)] * 10, abs=1e-4)
    assert scores["val_planner_auroc"] == pytest.approx(0.5)
    assert Path("out/validate/samples.png").exists()


def test_validation_weighs_sequences_alike(monkeypatch):
    """Where more are asked for than are held out, each occurs equally often."""
    cfg = tiny("alike", "--eval-sequences", 200)
    spec, splits = training.open_data(cfg)
    n_val = len(splits["val"])
    assert n_val == 180
    assert [splits["val"].whole_repeats(n) for n in (20, 180, 181, 361)] == [20, 180, 360, 540]
    seen = []
    make_tasks = methods.make_tasks

    def spy(spec, x0, *args):
        seen.extend(map(tuple, x0.tolist()))
        return make_tasks(spec, x0, *args)

    monkeypatch.setattr(methods, "make_tasks", spy)
    nets = methods.build(spec)
    validate.validate(cfg, spec, nets, splits["val"], torch.device("cpu"), cfg.eval_sequences)
    assert len(seen) == 2 * n_val
    assert all(n % 2 == 0 for n in Counter(seen).values())


@pytest.mark.parametrize("seconds, size", [
    (103.0, (512, 10)), (102.0, (256, 10)), (2.9, (8, 10)), (1.3, (8, 2)), (0.0, (8, 1)),
])
def test_a_validation_costs_what_it_may(seconds, size, monkeypatch):
    """As many sequences as fit into a half, and pictures into the rest; always the least of both.
    Here a sequence takes .1 s, and a picture twice that."""
    now = [0.0]
    monkeypatch.setattr(validate.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(validate, "N_STEPS", 4)

    def spend(cfg, spec, nets, split, device, n):
        now[0] += 0.1 * n

    monkeypatch.setattr(validate, "validate", spend)
    spec = methods.spec_of(asdict(tiny("budget")), dict(grid=[4], vocab=3, n_classes=0, given=[]))
    cfg = replace(tiny("budget"), eval_sequences=0, eval_samples=10)
    assert validate.size_within(seconds, cfg, spec, {}, None, None) == size
    cfg = replace(cfg, eval_sequences=77)
    assert validate.size_within(seconds, cfg, spec, {}, None, None) == (77, 10)


def test_sequences_known_by_heart_reach_their_floor(capsys):
    """Under fresh noise both networks end within 5 % of the Bayes losses that were printed."""
    size = ["--n-embd", 64, "--base-width", 64, "--n-layer", 2, "--image-size", 4]
    data = ["--grey-levels", 4, "--batch-size", 64, "--label-dropout", 0]
    rates = ["--planner-lr", 5e-3, "--denoiser-lr", 5e-3]
    length = ["--max-iters", 400, "--log-interval", 50]
    overfit = ["--overfit", 4, "--overfit-noise", "fresh"]
    train_ddpd.main(tiny("heart", *overfit, *size, *data, *rates, *length))
    floors = log_of("heart")[0]["floors"]
    planner, denoiser = floors["planner_by_heart"], floors["denoiser_by_heart"]
    assert f"planner {planner:.4f}" in capsys.readouterr().out

    late = [row for row in training_rows("heart") if row["it"] > 250]
    assert np.mean([row["planner_loss"] for row in late]) == pytest.approx(planner, rel=0.05)
    reached = np.mean([row["denoiser_loss"] for row in late])
    assert reached == pytest.approx(denoiser, rel=0.05, abs=0.01)


def test_a_run_starts_from_anothers_averages():
    """--init-from takes the averaged weights, from iteration 0; a run that has its own goes on
    with those."""
    train_ddpd.main(tiny("first", "--max-iters", 3))
    no_learning = ["--planner-lr", 0, "--denoiser-lr", 0]
    from_first = ["--init-from", "out/first"]
    train_ddpd.main(tiny("second", "--max-iters", 1, *from_first, *no_learning))
    state = checkpoint_of("second")
    averages = digest(checkpoint_of("first")["ema"])
    assert state["it"] == 1
    assert digest(state["nets"]) == averages
    assert digest(state["ema"]) == averages
    train_ddpd.main(tiny("second", "--max-iters", 2, "--init-from", "out/none"))

    def refusal_of(*flags):
        return refusal(train_ddpd.main, tiny("third", *flags))

    said = refusal_of("--n-layer", 2, "--n-embd", 32, *from_first)
    assert said.endswith("has n_layer 1, not 2, n_embd 16, not 32: --n-layer 1 --n-embd 16")
    said = refusal_of("--grey-levels", 4, *from_first)
    assert said.endswith("has vocab 17, not 4: it was trained on other data")
    uniform = ["--denoiser-process", "uniform"]
    assert "ddpd-mask run, not ddpd-uniform" in refusal_of(*uniform, *from_first)
    assert "no run in out/none" in refusal_of("--init-from", "out/none")


def test_pictures_of_a_validation_show_classes_in_turn(monkeypatch):
    """Few ones are spread over the classes, and the next validation shows others."""
    shown = []
    monkeypatch.setattr(
        pictures, "samples_png", lambda path, tokens, labels, *rest: shown.append(labels)
    )
    intervals = ["--eval-interval", 1, "--max-iters", 3, "--eval-samples", 2]
    train_ddpd.main(tiny("turns", *intervals))
    assert shown == [[1, 6], [2, 7], [3, 8]]
    assert validate.labels_in_turn(12, 10, 5).tolist() == [*range(10), 0, 1]
    assert [validate.labels_in_turn(1, 3, number).item() for number in range(4)] == [0, 1, 2, 0]


# What is said at the start


@pytest.mark.parametrize("size, folder", [(8, "data/digits"), (16, "data/digits_16x16_17")])
def test_a_run_says_what_it_trains_on(size, folder, capsys):
    """Folders of data and run; that digits are enlarged, and what is better, where they are."""
    name = f"from_{size}"
    train_ddpd.main(tiny(name, "--image-size", size, "--max-iters", 1))
    said = capsys.readouterr().out
    where = f"training on {folder}, 1617 sequences; the run goes to out/{name}"
    line, = [line for line in said.splitlines() if line.startswith(where)]
    advice = "from 8x8 to 16x16; MNIST is better: python data.py mnist --image-size 16, then"
    assert (advice in line) == (size == 16)


# What a config takes


def test_a_dry_run_needs_no_data(capsys, tmp_path, monkeypatch):
    """Parameters as built, memory by purpose, time from a rate measured here; nothing is
    written."""
    monkeypatch.chdir(tmp_path)
    stated = ["--data", "imagenet", "--vocab", 1000, "--n-classes", 7, "--grid", 16, 16]
    cfg = tiny("dry", *stated, "--dry-run")
    train_ddpd.main(cfg)
    said = capsys.readouterr().out
    nets = methods.build(spec_of(cfg, training.stated_meta(cfg)))
    n_params = sum(p.numel() for net in nets.values() for p in net.parameters())
    assert f"{n_params / 1e6:.2f} M parameters" in said
    assert "16 x 16 tokens, V = 1000, 7 classes" in said
    for word in ("weights", "gradients", "optimizer", "EMA", "activations", "logits", "TFLOP/s"):
        assert word in said
    assert "time per iteration" in said
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("flags", [[], ["--nets", "trunk", "--trunk-grad", 1]])
def test_the_dry_runs_activations_are_those_of_a_step(flags, dtype):
    """Bytes that autograd keeps in a network's forward pass, but for weights and the head, agree
    with the estimate; in bfloat16 attention runs in blocks. With a trunk that learns from its
    planner both networks keep theirs."""
    sizes = ["--n-embd", 64, "--n-head", 2, "--n-layer", 3, "--vocab", 50, "--grid", 12, 12]
    cfg = tiny("bytes", *sizes, *flags)
    spec = spec_of(cfg, training.stated_meta(cfg))
    cpu = torch.device("cpu")
    cost = diagnostics.cost_of_step(spec, 4, cpu, runtime.autocast(cpu, dtype))
    nets = methods.build(spec)
    if flags:
        nets["planner"].hold(nets["denoiser"], 1.0)
    kept = {}

    def pack(y):
        storage = y.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return y

    x = torch.zeros(4, 144).long()
    t = torch.ones(4, 1)
    label = torch.zeros(4).long()
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y)
    with hooks, runtime.autocast(cpu, dtype):
        outputs = [nets["denoiser"].hidden(x, t, label)]                # alive while counted
        if flags:
            outputs.append(nets["planner"].hidden(x, t, label))
    assert all(output.shape == (4, 144, 64) for output in outputs)
    own = {p.untyped_storage().data_ptr() for net in nets.values() for p in net.parameters()}
    n_bytes = sum(size for where, size in kept.items() if where not in own)
    assert cost.bytes["activations"] == pytest.approx(n_bytes, rel=0.1)


def test_masked_diffusion_takes_a_pairs_work_but_the_planners():
    """The loss of a mask denoiser is on half of the tokens, with a planner beside it or without. A
    planner with a gradient into its trunk takes the trunk's backward pass more."""
    flops = {}
    for name, *flags in (["pair"], ["denoiser"], ["trunk"], ["trunk", "--trunk-grad", 1]):
        cfg = tiny("flops", "--nets", name, *flags, "--vocab", 50, "--grid", 8, 8)
        spec = spec_of(cfg, training.stated_meta(cfg))
        networks = methods.build(spec)
        nets = "joint" if flags else name
        flops[nets] = diagnostics.flops_of_step(spec, networks, 4)
        planner_head = 2 * 4 * spec.shape.n_tokens * spec.shape.n_embd
    blocks = 3 * 4 * spec.shape.n_layer * diagnostics.flops_of_block(spec.shape)
    assert flops["pair"] - flops["denoiser"] == blocks + 3 * planner_head
    assert flops["denoiser"] < flops["trunk"]
    assert flops["joint"] - flops["trunk"] == blocks * 2 / 3


def said_of_gpu(capsys, *flags):
    stated = ["--data", "imagenet", "--vocab", 1000, "--n-classes", 7, "--grid", 16, 16]
    train_ddpd.main(tiny_config("gpu", *stated, "--max-iters", 1000, "--dry-run", *flags))
    return capsys.readouterr().out


def test_the_time_on_a_gpu_is_estimated(capsys):
    """Work over the share of the peak that is assumed; GPUs add sequences and hours of GPU."""
    said = said_of_gpu(capsys, "--gpu", "h100")
    assert "estimate, not measured" in said
    pattern = r"measured: (\S+) s .* = (\S+) TFLOP at (\S+) TFLOP/s, (\d+)% .* the (\d+)"
    seconds, flops, rate, share, peak = map(float, re.search(pattern, said).groups())
    assert (share, peak) == (35, 989)
    assert rate == pytest.approx(0.35 * 989, rel=0.01)
    assert seconds == pytest.approx(flops / rate, rel=0.01)
    eight = said_of_gpu(capsys, "--gpu", "h100", "--n-gpus", 8, "--utilization", 0.7)
    half = float(re.search(r"measured: (\S+) s per", eight)[1])
    assert half == pytest.approx(seconds / 2, rel=0.01)
    assert "8 x h100, 32 sequences per iteration" in eight
    assert "fits" in said
    assert "does not fit" in said_of_gpu(capsys, "--gpu", "l4", "--batch-size", 10**6)


@pytest.mark.parametrize("flags, complaint", [
    (["--gpu", "h100"], "gpu = h100 is for --dry-run"),
    (["--dry-run", "--n-gpus", 2], "n_gpus belongs to --dry-run --gpu"),
    (["--utilization", 0.5], "utilization belongs to --dry-run --gpu"),
    (["--dry-run", "--gpu", "h100", "--utilization", 0], "must be above 0"),
    (["--dry-run", "--gpu", "h100", "--dtype", "float32"], "bfloat16"),
])
def test_flags_of_the_estimate_belong_to_it(flags, complaint):
    assert complaint in refusal(tiny_config, "estimate", *flags)


def test_headers_of_configs_say_what_the_dry_run_says():
    """GiB and TFLOP per iteration and process, of those that state their data; GiB in recipes.md
    too."""
    recipes = (ROOT / "docs" / "recipes.md").read_text()
    n_found = 0
    for path in sorted((ROOT / "configs").glob("*.py")):
        said = re.search(r"(\S+) GiB and (\S+) TFLOP per iteration", path.read_text())
        if not said:
            continue
        n_found += 1
        cfg = config.load(argv=[str(path)])
        spec = spec_of(cfg, training.stated_meta(cfg))
        cost = diagnostics.cost_on_gpu(spec, cfg.batch_size)
        assert said[1] == f"{sum(cost.bytes.values()) / 2**30:.1f}", path.stem
        assert said[2] == f"{cost.flops * cfg.grad_accumulation_steps / 1e12:.3g}", path.stem
        row = re.search(rf"\n\|.*configs/{path.stem}\.py.*\| (\S+) GiB \|", recipes)
        assert row[1] == said[1], path.stem
    assert n_found >= 3


def test_recomputed_activations_are_not_kept_and_change_nothing():
    """Gradients to the bit, and less than half of the bytes between forward and backward."""
    cfg = tiny("recompute", "--n-embd", 64, "--n-layer", 4, "--vocab", 50, "--grid", 12, 12)
    spec = spec_of(cfg, training.stated_meta(cfg))
    rng = torch.Generator().manual_seed(0)
    x0 = torch.randint(50, (4, 144), generator=rng)
    tasks = methods.make_tasks(spec, x0, torch.zeros(4).long(), None, rng)
    gradients = []
    sizes = []
    for recompute in (False, True):
        state = training.build_training(cfg, spec, None, torch.device("cpu"))
        learners = training.learners_of(
            replace(cfg, recompute=recompute), state, runtime.World(0, 1, torch.device("cpu"))
        )
        kept = {}

        def pack(y, kept=kept):
            kept[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
            return y

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
            loss = learners["denoiser",](tasks)
        loss.backward()
        sizes.append(sum(kept.values()))
        gradients.append([p.grad for p in state.nets["denoiser"].parameters()])
    assert sizes[1] < sizes[0] / 2
    assert all(map(torch.equal, *gradients))


def test_wandb_goes_on_under_its_id(monkeypatch):
    """Losses, floors, noise levels as a table, pictures and the planner's video, without a
    network; a resumed run keeps its id."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    flags = ["--wandb-project", "p", "--wandb-mode", "offline", "--max-iters"]
    train_ddpd.main(tiny("wandb", *flags, 1))
    run_id = Path("out/wandb/wandb_id.txt").read_text().strip()
    train_ddpd.main(tiny("wandb", *flags, 2))
    folders = [folder.name for folder in Path("out/wandb/wandb").glob("offline-run-*")]
    assert len(folders) == 2
    assert all(name.endswith(run_id) for name in folders)
    media = [file.suffix for file in Path("out/wandb/wandb").rglob("media/*/val/*")]
    assert media.count(".png") == 2
    assert media.count(".mp4") == 2
    files = Path("out/wandb/wandb").rglob("*.table.json")
    tables = [json.loads(file.read_text()) for file in files]
    assert len(tables) == 2
    assert tables[0]["columns"][:3] == ["level", "planner_bce", "planner_auroc"]
    assert [row[0] for row in tables[0]["data"]] == pytest.approx(np.arange(10) / 10 + 0.05)


def test_the_log_in_sections():
    """Weights & Biases gets numbers as train/ or val/, the bins of noise levels as one table."""
    values = dict(planner_loss=0.5, start=True, commit="a", val_denoiser_ce=1.5, floors={"x": 1.0})
    bins = dict(val_denoiser_ce_bins=[1.0, None], val_denoiser_accuracy_bins=[0.5, 0.25])
    sections = {"train/planner_loss": 0.5, "val/denoiser_ce": 1.5}
    assert logs.sections_of(values | bins) == sections
    columns, rows = logs.level_table(values | bins)
    assert columns == ["level", "denoiser_ce", "denoiser_accuracy"]
    assert rows == [[0.25, 1.0, 0.5], [0.75, None, 0.25]]
    assert logs.level_table(values) is None


# Several processes


def torchrun(*args, n=2, launcher=()):
    """Start n ranks, with one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", *launcher]
    return subprocess.Popen(
        [*command, ROOT / "train_ddpd.py", *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ONE_THREAD,
    )


def output_of(process):
    """What it printed, once it has ended well."""
    said = process.communicate()[0]
    assert process.returncode == 0, said
    return said


@pytest.mark.parametrize("nets", [[], ["--nets", "trunk", "--trunk-grad", 0.5]])
def test_two_processes_equal_one_with_two_micro_steps(nets):
    """Two gloo ranks and one process with two micro-steps: losses and weights to 1e-6 in float32
    after 10 steps.

    Then one process goes on where two stopped, as long as micro-batches per iteration stay the
    same.
    """
    ranks, one = (f"{name}_{len(nets)}" for name in ("ranks", "alone"))
    rates = ["--planner-lr", 1e-3, "--denoiser-lr", 1e-3]
    flags = ["--max-iters", 10, "--dtype", "float32", *rates, *nets]
    output_of(torchrun(*TINY, *flags, "--out-dir", f"out/{ranks}"))
    state = checkpoint_of(ranks)
    assert state["it"] == 10
    assert state["world_size"] == 2

    two_steps = ["--grad-accumulation-steps", 2]
    alone = script(
        "train_ddpd.py", *TINY, *flags, "--out-dir", f"out/{one}", *two_steps, env=ONE_THREAD
    )
    assert alone.returncode == 0, alone.stderr
    pairs = list(zip(losses_of(ranks), losses_of(one), strict=True))
    assert len(pairs) == 10
    for of_ranks, of_one in pairs:
        assert set(of_ranks) == {"planner_loss", "denoiser_loss"}
        for name, loss in of_ranks.items():
            assert abs(loss - of_one[name]) <= 1e-6 + 1e-5      # the log has five digits
    weights = checkpoint_of(one)["nets"]
    for name, net in state["nets"].items():
        for key, value in net.items():
            assert torch.allclose(value, weights[name][key], rtol=0, atol=1e-6), (name, key)

    longer = [*flags, "--max-iters", 12]
    message = refusal(train_ddpd.main, tiny(ranks, *longer))
    assert "--grad-accumulation-steps to 2" in message
    train_ddpd.main(tiny(ranks, *longer, *two_steps))
    state = checkpoint_of(ranks)
    assert state["it"] == 12
    assert state["world_size"] == 1


def test_two_processes_stop_together():
    """SIGTERM to torchrun: all ranks end at one iteration, and the run is saved there."""
    process = torchrun(*TINY, "--max-iters", 100_000, "--out-dir", "out/stopped")
    wait_for_lines("stopped", 5, process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[0]
    assert process.returncode != 0
    assert said.count("stopped by signal 15") == 1
    assert f"at iteration {checkpoint_of('stopped')['it']}, saved" in said


def test_a_killed_rank_is_started_again():
    """torchrun --max-restarts: a rank is killed, all start again from the last save, and end bit
    for bit the same."""
    args = [*TINY, "--max-iters", 120, "--dtype", "float32", "--save-interval", 10]
    output_of(torchrun(*args, "--out-dir", "out/quiet"))

    process = torchrun(*args, "--out-dir", "out/killed", launcher=["--max-restarts=1"])
    wait_for_lines("killed", 25, process)
    children = ["pgrep", "-P", str(process.pid)]
    ranks = subprocess.run(children, capture_output=True, text=True).stdout.split()
    assert len(ranks) == 2
    os.kill(int(ranks[1]), signal.SIGKILL)
    output_of(process)
    starts = [row["it"] for row in log_of("killed") if row.get("start")]
    assert len(starts) == 2
    assert starts[0] == 0
    assert starts[1] >= 20
    assert_same(checkpoint_of("killed"), checkpoint_of("quiet"))


def test_two_agents_meet_over_c10d():
    """The README's line for several machines, here two agents on one."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    endpoint = [f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=7"]
    launcher = ["--nnodes=2", "--rdzv_backend=c10d", *endpoint]
    args = [*TINY, "--max-iters", 2, "--out-dir", "out/nodes"]
    agents = [torchrun(*args, n=1, launcher=launcher) for _ in range(2)]
    assert sum("done: 2 iterations" in output_of(agent) for agent in agents) == 1
    assert checkpoint_of("nodes")["world_size"] == 2


# What is refused


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two iterations, to be copied and spoiled."""
    here = Path.cwd()
    folder = tmp_path_factory.mktemp("run")
    os.chdir(folder)
    train_ddpd.main(tiny("good", "--max-iters", 2, "--save-interval", 1))
    os.chdir(here)
    return folder / "out" / "good"


@pytest.fixture
def copy(run, request):
    """A copy of the run, under the name of the test."""
    target = Path("out") / request.node.name
    shutil.copytree(run, target)
    return target


def bytes_of(run):
    return (run / "ckpt.pt").read_bytes()


@pytest.mark.parametrize(
    "key, value",
    [
        ("n_embd", 32), ("n_layer", 2), ("patch", 2), ("image_size", 4), ("grey_levels", 5),
        ("seed", 1),
    ],
)
def test_another_shape_or_data_is_refused_by_name(copy, key, value):
    before = bytes_of(copy)
    cfg = replace(tiny(copy.name, "--max-iters", 9), **{key: value})
    message = refusal(train_ddpd.main, cfg)
    assert key in message and str(value) in message
    assert bytes_of(copy) == before


def test_other_lr_and_length_are_applied_and_said(copy, capsys):
    changed = ["--max-iters", 4, "--planner-lr", 1e-4, "--weight-decay", 0.5]
    train_ddpd.main(tiny(copy.name, *changed, "--eval-interval", 3))
    said = capsys.readouterr().out
    assert "planner_lr 0.001 -> 0.0001" in said
    assert "max_iters 2 -> 4" in said
    state = checkpoint_of(copy.name)
    assert state["it"] == 4
    assert state["optimizers"]["planner"]["param_groups"][0]["weight_decay"] == 0.5


@pytest.mark.parametrize(
    "spoil, word",
    [
        (lambda b: b[: len(b) // 2], "cannot be read"),
        (lambda b: b"", "cannot be read"),
        (lambda b: b"hello", "cannot be read"),
        (lambda b: b[:40_000] + bytes([b[40_000] ^ 1]) + b[40_001:], "ckpt.pt"),
    ],
    ids=["half", "empty", "text", "one bit"],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(copy, spoil, word, capsys):
    """Training goes on from ckpt_prev.pt, with a warning; where both are damaged both are named."""
    (copy / "ckpt.pt").write_bytes(spoil(bytes_of(copy)))
    train_ddpd.main(tiny(copy.name, "--max-iters", 3))
    warning = capsys.readouterr().err
    assert word in warning and "going on from" in warning and "ckpt_prev.pt" in warning
    assert checkpoint_of(copy.name)["it"] == 3
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        (copy / name).write_bytes(b"hello")
    message = refusal(train_ddpd.main, tiny(copy.name, "--max-iters", 9))
    assert "ckpt.pt cannot be read" in message and "ckpt_prev.pt cannot be read" in message


def test_a_save_reaches_the_disk_before_it_is_renamed(copy, monkeypatch):
    """File synced, renamed, folder synced: a power loss at any moment leaves a whole file."""
    events = []
    sync, rename = os.fsync, os.replace

    def note_sync(descriptor):
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        sync(descriptor)

    def note_rename(source, target):
        events.append(("rename", Path(source).name, Path(target).name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_rename)
    train_ddpd.main(tiny(copy.name, "--max-iters", 3))
    config_json = [("sync", "config.tmp"), ("rename", "config.tmp", "config.json")]
    renames = [("rename", "ckpt.pt", "ckpt_prev.pt"), ("rename", "ckpt.tmp", "ckpt.pt")]
    in_folder = ("sync", copy.name)
    assert events == [*config_json, in_folder, ("sync", "ckpt.tmp"), *renames, in_folder]


def test_a_start_that_was_killed_locks_nobody_out(copy):
    """A folder with a good ckpt.pt is a run, whatever config.json holds; left-over .tmp files count
    as nothing."""
    (copy / "config.json").write_text("")
    (copy / "config.tmp").write_text("{")
    train_ddpd.main(tiny(copy.name, "--max-iters", 3))
    assert json.loads((copy / "config.json").read_text())["max_iters"] == 3
    fresh = Path("out/killed_at_once")
    fresh.mkdir(parents=True)
    (fresh / "config.tmp").write_text("{")
    train_ddpd.main(tiny(fresh.name, "--max-iters", 1))
    assert checkpoint_of(fresh.name)["it"] == 1


def test_two_runs_in_one_folder_are_refused(copy):
    """The second is told who holds the folder; a process that was killed holds nothing."""
    with checkpoint.locked(copy):
        message = refusal(train_ddpd.main, tiny(copy.name, "--max-iters", 9))
        assert f"is in use by process {os.getpid()} on " in message
    train_ddpd.main(tiny(copy.name, "--max-iters", 3))
    assert checkpoint_of(copy.name)["it"] == 3


def test_logging_never_ends_a_run(copy, monkeypatch, capsys):
    """A full disk under log.jsonl and samples.png is said once each; a torn last line is cut."""
    log = copy / "log.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"it": 2, "planner_l')

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", lambda *args, **kwargs: full())
        patch.setattr("support.checkpoint.write_config", lambda *args: None)
        patch.setattr("support.pictures.samples_png", full)
        train_ddpd.main(tiny(copy.name, "--max-iters", 4, "--eval-interval", 1))
    said = capsys.readouterr().err
    assert said.count("log.jsonl: [Errno 28]") == said.count("samples.png: [Errno 28]") == 1
    assert checkpoint_of(copy.name)["it"] == 4
    assert log.read_text() == whole


def test_a_checkpoint_of_an_older_version_is_refused(copy):
    """One whose config has other names than today's."""
    state = checkpoint_of(copy.name)
    state["config"]["levels"] = state["config"].pop("grey_levels")
    torch.save({**state, "digest": digest(state)}, copy / "ckpt.pt")
    assert "an older version" in refusal(train_ddpd.main, tiny(copy.name, "--max-iters", 9))


def test_a_full_disk_leaves_the_checkpoint_and_is_said(copy, monkeypatch, capsys):
    """A failed write warns and training goes on; if the last one fails the run does not claim to
    be saved."""
    before = bytes_of(copy)
    save_whole = torch.save

    def save(state, path):
        save_whole(state, path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    cfg = tiny(copy.name, "--max-iters", 6, "--save-interval", 2)
    assert "iteration 6 could not be saved" in refusal(train_ddpd.main, cfg)
    assert capsys.readouterr().err.count("No space left on device") == 2    # iterations 4 and 6
    assert bytes_of(copy) == before
    assert not (copy / "ckpt.tmp").exists()


def test_interrupted_in_the_middle_of_a_save(copy, monkeypatch):
    """A second Ctrl-C ends the program at once, also while it writes: the checkpoint before is
    untouched."""
    before = bytes_of(copy)

    def save(state, path):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", save)
        train_ddpd.main(tiny(copy.name, "--max-iters", 3))
    assert bytes_of(copy) == before
    train_ddpd.main(tiny(copy.name, "--max-iters", 3))
    assert checkpoint_of(copy.name)["it"] == 3


class Hostile:
    """Unpickling it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_a_checkpoint_that_runs_code_is_refused(copy):
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        torch.save({"it": 1, "config": Hostile()}, copy / name)
    message = refusal(train_ddpd.main, tiny(copy.name, "--max-iters", 9))
    assert "cannot be read as a checkpoint" in message
    assert not Path("hacked").exists()


def test_data_must_be_what_the_config_states():
    stated = ["--vocab", 17, "--grid", 8, 8, "--n-classes", 10]
    train_ddpd.main(tiny("stated", "--max-iters", 1, *stated))

    def refusal_of(*flags):
        return refusal(train_ddpd.main, tiny("stated", *stated, *flags))

    assert "vocab is 17 in data digits, but 18" in refusal_of("--vocab", 18)
    assert "grid is [8, 8] in data digits, but [8, 9]" in refusal_of("--grid", 8, 9)
    assert "n_classes is 10" in refusal_of("--n-classes", 0)
    assert "stated together" in refusal(config.load, argv=[*TINY, "--vocab", "17"])


def test_a_foreign_folder_is_refused():
    foreign = Path("out/foreign")
    foreign.mkdir(parents=True)
    (foreign / "thesis.tex").write_text("x")
    assert "out/foreign" in refusal(train_ddpd.main, tiny("foreign"))
    (foreign / "config.json").write_text('{"architectures": ["Other"]}')
    assert "out/foreign" in refusal(train_ddpd.main, tiny("foreign"))
    assert sorted(os.listdir(foreign)) == ["config.json", "thesis.tex"]


def test_an_unwritable_folder_is_refused():
    Path("file").write_text("x")
    assert "file" in refusal(train_ddpd.main, replace(tiny("x"), out_dir="file/run"))


def test_nan_ends_the_run_and_leaves_the_checkpoint(copy):
    before = bytes_of(copy)
    diverging = ["--max-iters", 60, "--planner-lr", "1e30", "--grad-clip", 0]
    message = refusal(train_ddpd.main, tiny(copy.name, *diverging))
    assert "not finite at iteration" in message
    assert "planner" in message
    assert bytes_of(copy) == before


def test_micro_batches_of_few_sequences_are_warned_of(capsys):
    """A mean over the noise tokens of one sequence weighs low noise levels up."""
    for n, is_warned in [(1, True), (3, True), (4, False)]:
        train_ddpd.main(tiny(f"few_{n}", "--batch-size", n, "--max-iters", 1))
        assert ("under 4 sequences" in capsys.readouterr().out) == is_warned


def test_a_width_that_its_heads_do_not_divide_is_refused():
    assert "n_embd 16" in refusal(train_ddpd.main, tiny("heads", "--n-head", 3))


def test_unknown_data_names_the_nearest():
    message = refusal(train_ddpd.main, tiny("data", "--data", "digit"))
    assert "did you mean digits?" in message
