"""Processes and their ends: agents, waiting, signals, refusals, tables that a kill cannot tear."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, TINY
from test_train import ONE_THREAD, checkpoint_of, torchrun, wait_for_lines

from support import logs, runtime


def is_alive(pid):
    """A process that is neither gone nor a zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rsplit(")")[-1].split()[0] != "Z"


def children_of(process):
    command = ["pgrep", "-P", str(process.pid)]
    return subprocess.run(command, capture_output=True, text=True).stdout.split()


def train(*args):
    """Start training in one process."""
    command = [sys.executable, ROOT / "train_ddpd.py", *TINY, *map(str, args)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ONE_THREAD
    )


# Processes


def test_processes_leave_with_their_agent():
    """torchrun is killed: its ranks end within a minute, without a save beside a successor's."""
    process = torchrun(*TINY, "--max-iters", 1_000_000, "--out-dir", "out/orphans")
    wait_for_lines("orphans", 5, process)
    ranks = children_of(process)
    assert len(ranks) == 2
    process.kill()
    deadline = time.monotonic() + 60
    while any(map(is_alive, ranks)):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert not Path("out/orphans/ckpt.pt").exists()


class TwoRanks:
    """main_alone() as two ranks see it, each in a thread of this process."""

    def __init__(self, monkeypatch, timeout_s):
        monkeypatch.setattr(runtime, "TURNS", itertools.repeat(0))
        monkeypatch.setattr(runtime, "BEAT_S", 0.05)
        store = dist.HashStore()
        self.worlds = [
            runtime.World(rank, 2, torch.device("cpu"), store, timeout_s) for rank in (0, 1)
        ]
        self.is_over = False

    def work(self, seconds):
        with runtime.main_alone(self.worlds[0]) as is_mine:
            assert is_mine
            time.sleep(seconds)
            self.is_over = True

    def wait(self):
        with runtime.main_alone(self.worlds[1]) as is_mine:
            assert not is_mine
        return self.is_over


def test_rank_0_takes_its_time(monkeypatch):
    """Work of five times the timeout is waited for, as long as rank 0 gives signs of life."""
    ranks = TwoRanks(monkeypatch, timeout_s=0.3)
    thread = threading.Thread(target=ranks.work, args=(1.5,))
    thread.start()
    assert ranks.wait()
    thread.join()


def test_a_silent_rank_0_is_not_waited_for(monkeypatch):
    ranks = TwoRanks(monkeypatch, timeout_s=0.3)
    with pytest.raises(SystemExit, match="rank 0 has been silent for"):
        ranks.wait()


def test_which_device_is_picked(monkeypatch):
    """CUDA before an Apple GPU before the CPU; several processes share no Apple GPU."""
    def type_for(n_gpus, has_apple_gpu, n_processes=1):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_apple_gpu)
        monkeypatch.setenv("WORLD_SIZE", str(n_processes))
        return runtime.pick_device().type

    assert type_for(0, False) == "cpu"
    assert type_for(1, True) == "cuda"
    assert type_for(0, True) == "mps"
    assert type_for(0, True, n_processes=2) == "cpu"
    monkeypatch.setenv("NANODDPD_DEVICE", "cpu")
    assert type_for(1, False) == type_for(0, True) == "cpu"
    monkeypatch.setenv("NANODDPD_DEVICE", "gpu")
    with pytest.raises(SystemExit, match="only cpu can be asked for"):
        runtime.pick_device()


def test_bfloat16_on_an_apple_gpu(monkeypatch):
    """From macOS 14 on, as PyTorch has it."""
    apple_gpu = torch.device("mps")
    for version, dtype in [((14, 0), torch.bfloat16), ((13, 3), torch.float32)]:
        monkeypatch.setattr(
            torch.backends.mps, "is_macos_or_newer",
            lambda *least, version=version: version >= least,
        )
        assert runtime.matmul_dtype(apple_gpu) == dtype


def test_float32_means_float32(monkeypatch):
    """TF32 is for bfloat16's sake: --dtype float32 has no part in it."""
    for dtype, precision in [("float32", "highest"), ("auto", "high"), ("bfloat16", "high")]:
        runtime.start(dtype)
        assert torch.get_float32_matmul_precision() == precision
    torch.set_float32_matmul_precision("highest")


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_long_validation(number):
    """Within seconds, saved; the same command would resume."""
    out = f"signal_{number}"
    flags = ["--eval-interval", 3, "--eval-sequences", 500_000, "--eval-samples", 0]
    process = train(*flags, "--max-iters", 100_000, "--out-dir", f"out/{out}")
    wait_for_lines(out, 3, process)                     # the start, and three iterations
    time.sleep(2)
    process.send_signal(number)
    began = time.monotonic()
    said = process.communicate()[0]
    assert time.monotonic() - began < 15
    assert process.returncode == 128 + number, said
    it = checkpoint_of(out)["it"]
    assert f"stopped by signal {number} at iteration {it}, saved" in said
    assert it <= 4                                      # the validation was under way


def test_a_signal_ends_the_last_validation():
    """All iterations are done and saved: what is left out is said."""
    flags = ["--eval-sequences", 500_000, "--eval-samples", 0]
    process = train(*flags, "--max-iters", 2, "--out-dir", "out/last")
    wait_for_lines("last", 2, process)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "at iteration 2, saved; the last validation is left out" in said
    assert checkpoint_of("last")["it"] == 2


# Refusals


def test_two_processes_refuse_with_one_voice():
    """Rank 0 says it, rank 1 is quiet, and torchrun's report ends with the same line."""
    process = torchrun(*TINY, "--n-embd", 20, "--n-head", 3, "--out-dir", "out/voice")
    said = process.communicate()[0]
    assert process.returncode != 0
    lines = [line.strip() for line in said.splitlines() if "does not divide" in line]
    assert len(lines) == 2, said
    assert lines[0].startswith("n_embd 20 does not divide into n_head 3 heads")
    assert lines[1].split()[0] == "traceback"           # torchrun's word for a message
    assert "File \"" not in said.split("does not divide")[0]


@pytest.mark.parametrize("error, said", [
    (OSError(28, "No space left on device", "out/x"), "OSError: [Errno 28] No space left"),
    (PermissionError(13, "Permission denied", "out/x"), "PermissionError: [Errno 13]"),
    (MemoryError(), "MemoryError"),
    (SystemExit("no such run"), "no such run"),
])
def test_what_the_system_refuses_is_one_line(error, said):
    with pytest.raises(SystemExit) as refusal, runtime.one_voice():
        raise error
    assert refusal.value.code.startswith(said)
    assert "\n" not in refusal.value.code


def test_programming_errors_keep_their_traceback():
    with pytest.raises(KeyError), runtime.one_voice():
        raise KeyError("x")
    with pytest.raises(SystemExit) as ended, runtime.one_voice():
        raise SystemExit(143)
    assert ended.value.code == 143


# Tables


def test_a_torn_row_is_left_out_and_overwritten():
    """A kill in the middle of a write, by an older version: the whole rows stay."""
    path = Path("rows.csv")
    logs.append_rows(path, dict(a=1, b="x,y"), dict(a=2, b="z"))
    path.write_text(path.read_text() + "3")
    assert [row["a"] for row in logs.read_rows(path)] == ["1", "2"]
    logs.append_rows(path, dict(a=4, b="", c=5))
    assert logs.read_rows(path) == [
        dict(a="1", b="x,y", c=""), dict(a="2", b="z", c=""), dict(a="4", b="", c="5"),
    ]


def test_rows_are_written_whole_or_not_at_all(monkeypatch):
    path = Path("whole.csv")
    logs.append_rows(path, dict(a=1))
    before = path.read_text()

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SystemExit, match="No space left"):
        logs.append_rows(path, dict(a=2))
    assert path.read_text() == before
