import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")     # tests run side by side, and so do their scripts

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import config
import methods
from support import runtime, training

TINY = """
    --image-size 8 --n-layer 1 --n-head 1 --n-embd 16 --base-width 16 --batch-size 4
    --warmup-iters 2 --log-interval 1 --eval-interval 0 --save-interval 0 --eval-sequences 20
    --eval-samples 2
""".split()


@pytest.fixture(autouse=True)
def own_folder(tmp_path_factory, monkeypatch, request):
    """Each test file works in a folder of its own, so data/ and out/ never touch the checkout."""
    folder = tmp_path_factory.getbasetemp() / request.module.__name__
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def script(*args, **kwargs):
    """Run one of the repository's scripts as a user would.  -> CompletedProcess"""
    command = [sys.executable, ROOT / args[0], *map(str, args[1:])]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


def samples_of(run):
    """The folder of the run's newest samples."""
    return max((Path(run) / "samples").iterdir(), key=lambda path: path.stat().st_mtime_ns)


def tiny_config(out, *flags):
    """The Config of a run in out/<out> that trains within a second."""
    argv = [*TINY, "--out-dir", f"out/{out}", *map(str, flags)]
    return config.load(argv=argv)


def meta_of(vocab, grid, n_classes, **more):
    """A meta.json."""
    names = [str(i) for i in range(n_classes)]
    return dict(name="x", vocab=vocab, grid=grid, n_classes=n_classes, class_names=names,
                palette="grey", given=[]) | more


def save_run(folder, meta, *flags):
    """A run of one iteration on gradients of one, in a new folder.  -> cfg, spec"""
    argv = [*TINY, "--dtype", "float32", "--out-dir", folder, *flags]
    cfg = config.load(argv=list(map(str, argv)))
    spec = methods.spec_of(asdict(cfg), meta)
    world = runtime.World(0, 1, torch.device("cpu"))
    trained = training.build_training(cfg, spec, None, world.device)
    for name, net in trained.nets.items():
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        trained.optimizers[name].step()
    trained.it = 1
    Path(folder).mkdir(parents=True)
    assert training.save(cfg, spec, trained, world)
    return cfg, spec


def refusal(call, *args, **kwargs):
    """The one line with which a call ends the program."""
    with pytest.raises(SystemExit) as error:
        call(*args, **kwargs)
    message = error.value.code
    assert isinstance(message, str)
    assert len(message) > 10 and "\n" not in message
    return message
