"""bench.py times both kinds of work, alone and beside a peer with minDDPD's names."""

import re
from pathlib import Path

import pytest
from conftest import script

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
    rows = re.findall(r"\| (patch 1|patch 2|minDDPD) \| [\d.e-]+ \| ([\d.]+) \(", done.stdout)
    assert [name for name, _ in rows] == ["patch 1", "patch 2", "minDDPD"]
    assert rows[-1][1] == "1.00"


def test_a_side_that_fails_is_named():
    done = script("bench.py", "train", *TINY, "--patches", 3)
    assert done.returncode == 1
    assert done.stderr.startswith("patch 3: ") and "does not divide" in done.stderr
    assert done.stderr.count("\n") == 1
