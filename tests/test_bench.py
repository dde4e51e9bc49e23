"""bench.py times both kinds of work, alone and beside a peer with minDDPD's names."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import script

import config
from support import timing

TINY = "--side 4 --vocab 5 --n-layer 1 --n-head 1 --n-embd 16 --batch-size 2 --n-sites 3".split()
# What bench.py asks of a peer, in a few lines of our own
PEER = '''
import types
import torch
from torch import nn

print("a peer may print")
DDPDConfig = types.SimpleNamespace

class DDPDModel(nn.Module):
    def __init__(self, config, role):
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, 1 if role == "planner" else config.vocab_size)

    def forward(self, x, t, label, targets=None, mask=None):
        y = self.table(x)
        return y, y.square().mean()

    def sample(self, denoiser, class_labels, batch_size, device, sequence_length, num_samples,
               infer_time_from_planner):
        assert num_samples == 3
        x = torch.zeros(batch_size, sequence_length).long()
        for _ in range(1000):
            self(x, None, class_labels)
            denoiser(x, None, class_labels)
        raise AssertionError("it was to be left after a step")
'''


@pytest.mark.parametrize("work", ["train", "sample"])
def test_each_side_has_its_row(work):
    Path("peer").mkdir(exist_ok=True)
    Path("peer/model.py").write_text(PEER)
    sides = ["--patches", 1, 2, "--peer", "peer"]
    done = script("bench.py", work, *TINY, *sides, "--rounds", 2, "--repeats", 2)
    assert done.returncode == 0, done.stderr
    row = r"\| (patch 1|patch 2|minDDPD) \| [\d.e-]+ \| [\d.e+]+ \| ([\d.]+) \("
    rows = re.findall(row, done.stdout)
    assert [name for name, _ in rows] == ["patch 1", "patch 2", "minDDPD"]
    assert rows[-1][1] == "1.00"
    assert ("by formula" in done.stdout) == (work == "train")


def test_a_side_that_fails_is_named():
    done = script("bench.py", "train", *TINY, "--patches", 3)
    assert done.returncode == 1
    assert done.stderr.startswith("patch 3: ") and "does not divide" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_folder_without_minddpd_is_refused_in_a_line():
    done = script("bench.py", "train", *TINY, "--peer", "nowhere")
    assert done.returncode == 1
    assert done.stderr.startswith("minDDPD: ") and done.stderr.count("\n") == 1


def test_a_config_is_timed_with_its_own_data():
    """Its sizes, but for those that are given; where the time goes; and loading beside a step."""
    flags = ["--config", "digits", "--n-embd", 32, "--n-layer", 1, "--rounds", 1]
    done = script("bench.py", "train", *flags, "--batch-size", 3, "--profile")
    assert done.returncode == 0, done.stderr
    assert "3 x 8x8 tokens, V = 17, 1 layers of width 32, 2 heads" in done.stdout
    assert re.search(r"patch 1: (.+? \d+%, ){9}", done.stdout)     # names may have spaces
    done = script("bench.py", "load", *flags)
    assert done.returncode == 0, done.stderr
    assert re.search(r"takes [\d.]+ \([\d.]+ to [\d.]+\) times as long", done.stdout)
    done = script("bench.py", "load")
    assert done.returncode == 1 and done.stderr == "load needs a --config, whose data is loaded\n"


def test_every_kernel_of_attention_has_its_column():
    done = script("bench.py", "attention", "--batch-size", 1, "--n-embd", 32, "--rounds", 1)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| (bfloat16|float32) \| (\d+) ((?:\| [\d.]+ ){4})", done.stdout, re.M)
    assert len(rows) == 8


def test_the_formula_for_flops_agrees_with_pytorchs_counter():
    """Where nothing is computed again, as in attention over few tokens."""
    sizes = dict(n_layer=2, n_head=2, n_embd=64, base_width=64, batch_size=4)
    cfg = config.Config(dtype="bfloat16", **sizes)
    meta = dict(name="bench", vocab=50, grid=[8, 8], n_classes=3, given=[])
    settings = dict(config=asdict(cfg), meta=meta)
    for patch in (1, 2):
        flops = timing.count_flops(settings, patch)
        assert flops["formula"] == pytest.approx(flops["counter"], rel=0.05)


def test_only_steps_of_training_are_compiled():
    done = script("bench.py", "sample", *TINY, "--compile")
    assert done.returncode == 1 and done.stderr == "--compile is for steps of training\n"
