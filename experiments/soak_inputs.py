"""Spoiled files, flags and option sets at random: the parts of experiments/soak.py that kill
nothing.

files    bytes of every kind of file that is read are spoiled, and values of checkpoints with their
         digest made right again: it must be read, or refused in one line, within seconds
flags    flags of train_ddpd.py, sample.py and evaluate.py with values that mean little or nothing
options  every sampler of every method, with options at random, on half of them a pretended device
"""

import contextlib
import copy
import gzip
import io
import json
import math
import random
import shutil
import signal
import sys
import traceback
import typing
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import common
import numpy as np
import torch

import config
import data
import evaluate
import methods
import sample
import train_ddpd
from formats import meta_file
from sources import mnist
from support import checkpoint, logs, runtime, starts, training

sys.path.insert(0, str(common.ROOT / "tests"))

from pretend import pretended_device
from world import tiny_spec

WORK = Path("out/soak/inputs")
PATIENCE_S = 20
STRANGE = [
    0, 1, -1, 2, 3, 17, 2**31, 2**63, 10**30, -(2**40), 0.5, -0.1, 1e-30, 1e30, math.nan, math.inf,
    True, None, "", "x", "\0", "a" * 5000, "../..", "/dev/full", [], [0], [8, 8], [-1], [[1, 2, 3]],
    {}, {"a": 1}, "digits", "mask", "nan",
]


class TooSlow(Exception):
    pass


def is_fine(action: Callable, *args) -> str:
    """"" if the action works or refuses in one line within seconds, else what happened."""
    def give_up(number, frame):
        raise TooSlow

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE_S)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            action(*args)
    except SystemExit as error:
        if isinstance(error.code, str) and "\n" in error.code.strip():
            return f"a refusal of several lines: {error.code[:80]}"
    except TooSlow:
        return f"no answer in {PATIENCE_S} s"
    except Exception:
        return traceback.format_exc().strip().splitlines()[-1]
    finally:
        signal.alarm(0)
    return ""


# Files


def spoil_bytes(raw: bytes, rng: random.Random) -> bytes:
    """One to three random changes."""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(raw) + 1)
        n = min(int(10 ** rng.uniform(0, 3)), len(raw) - at)
        change = rng.choice(["flip", "noise", "cut", "drop", "zero", "double", "insert"])
        if change == "flip" and n:
            raw[at] ^= 1 << rng.randrange(8)
        elif change == "noise":
            raw[at:at + n] = rng.randbytes(n)
        elif change == "cut":
            del raw[at:]
        elif change == "drop":
            del raw[at:at + n]
        elif change == "zero":
            raw[at:at + n] = bytes(n)
        elif change == "double":
            raw[at:at] = raw[at:at + n]
        elif change == "insert":
            raw[at:at] = str(rng.choice(STRANGE)).encode()[:200]
    return bytes(raw)


def spoil_tree(tree: typing.Any, rng: random.Random) -> typing.Any:
    """A random value of nested dicts and lists is replaced or left out."""
    tree = copy.deepcopy(tree)
    node = tree
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = rng.choice(keys)
        value = node[key]
        is_branch = isinstance(value, (dict, list)) and value
        if is_branch and rng.random() < 0.85:
            node = value
            continue
        if rng.random() < 0.2:
            del node[key]
        elif isinstance(value, torch.Tensor) and rng.random() < 0.7:
            node[key] = spoil_tensor(value, rng)
        else:
            node[key] = copy.deepcopy(rng.choice(STRANGE))
        return tree


def spoil_tensor(y: torch.Tensor, rng: random.Random) -> torch.Tensor:
    return rng.choice([
        y.flatten()[:-1], y[None], y.to(torch.int64), y.to(torch.float16), y * math.nan,
        torch.zeros(0), y.to(torch.complex64), torch.zeros(3, 3),
    ])


def make_originals() -> dict[str, Path]:
    """One good file of each kind."""
    folder = WORK / "good"
    shutil.rmtree(WORK, ignore_errors=True)
    folder.mkdir(parents=True)
    flags = """
        --image-size 8 --n-layer 1 --n-head 1 --n-embd 16 --batch-size 4 --max-iters 2
        --eval-sequences 4 --eval-samples 0 --planner-lr 1e-3 --weight-decay 0.02
    """.split()
    with contextlib.redirect_stdout(io.StringIO()):
        train_ddpd.main(config.load(argv=[*flags, "--out-dir", str(folder / "run")]))
    _, splits = data.load("digits", image_size=8)
    shutil.copytree(splits["val"].tokens_file.parent, folder / "data")
    (folder / "config.py").write_text((common.ROOT / "configs/text_gidd.py").read_text())
    tokens = np.ones((2, 8, 8), np.int64)
    np.savez(folder / "known.npz", tokens=tokens, mask=tokens > 0, labels=[1, 2])
    logs.append_rows(folder / "rows.csv", dict(run="a", nfe=3.5, settings="{}"), dict(run="b"))
    for name, array in mnist_arrays().items():
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        with gzip.open(folder / f"{name}.gz", "wb") as file:
            file.write(header + array.tobytes())
    names = ["config.py", "known.npz", "rows.csv", "run/ckpt.pt", "data/meta.json"]
    names += [f"data/{split}_{part}.npy" for split in data.SPLITS for part in ("tokens", "labels")]
    names += [f"{name}.gz" for name in mnist_arrays()]
    return {name: folder / name for name in names}


def mnist_arrays() -> dict[str, np.ndarray]:
    images = np.arange(12 * 28 * 28, dtype=np.uint8).reshape(12, 28, 28)
    return {"t10k-images-idx3-ubyte": images, "t10k-labels-idx1-ubyte": np.arange(12, dtype="u1")}


def read_data(folder: Path) -> None:
    meta = meta_file.read_meta(folder)
    for split in data.SPLITS:
        rows = data.Split(folder, split, meta)
        rows.rows(np.arange(len(rows)))


def read_run(folder: Path) -> None:
    """As sampling and as training would open it."""
    checkpoint.load_run(folder)
    state = checkpoint.require_checkpoint(folder)
    cfg = config.Config(**state["config"] | dict(out_dir=str(folder)))
    spec, _ = training.open_data(cfg)
    world = runtime.World(0, 1, torch.device("cpu"))
    training.build_training(cfg, spec, training.open_run(cfg, spec, world), world.device)


def forge(path: Path, rng: random.Random) -> None:
    """A checkpoint with a strange value, and the right digest."""
    state = torch.load(path, weights_only=True)
    state.pop("digest")
    state = spoil_tree(state, rng)
    torch.save({**state, "digest": checkpoint.digest(state)}, path)


def reader_of(name: str, path: Path) -> tuple[Callable, tuple]:
    """What reads a file of this name.  -> function, arguments"""
    folder = path.parent
    if name.startswith("data/"):
        return read_data, (folder,)
    if name.startswith("run/"):
        return read_run, (folder,)
    if name.endswith(".gz"):
        return mnist.read_splits, (folder,)
    if name == "config.py":
        return config.load, (config.Config, [str(path)])
    if name == "rows.csv":
        return logs.append_rows, (path, dict(run="c", nfe=1))
    meta = json.loads((WORK / "good/data/meta.json").read_text())
    return starts.load_known_tokens, (str(path), meta, [])


def files(n: int, rng: random.Random) -> tuple[int, str, list[str]]:
    originals = make_originals()
    failures = []
    n_forged = 0
    for i in range(n):
        name = "run/ckpt.pt" if rng.random() < 0.3 else rng.choice(list(originals))
        folder = WORK / "spoiled"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(originals[name].parent, folder)
        path = folder / originals[name].name
        if name == "run/ckpt.pt" and rng.random() < 0.7:
            forge(path, rng)
            n_forged += 1
        elif name == "data/meta.json" and rng.random() < 0.7:
            path.write_text(json.dumps(spoil_tree(json.loads(path.read_text()), rng)))
        else:
            path.write_bytes(spoil_bytes(path.read_bytes(), rng))
        action, args = reader_of(name, path)
        if problem := is_fine(action, *args):
            failures.append(f"file {i}, {name}: {problem}")
            shutil.copytree(folder, WORK / f"failure_{i}")
    return n, f"spoiled files, {n_forged} of them forged checkpoints", failures


# Flags


def strange_flag(name: str, rng: random.Random) -> list[str]:
    """A flag with a value that means nothing, or hardly anything."""
    value = rng.choice(STRANGE)
    values = value if isinstance(value, list) else [value]
    words = [str(part).replace("\0", "") for part in values]
    return [f"--{name.replace('_', '-')}", *words]


def flags(n: int, rng: random.Random) -> tuple[int, str, list[str]]:
    failures = []
    n_taken = 0
    for i in range(n):
        kind = rng.choice([config.Config, sample.Flags, evaluate.Flags])
        names = [field.name for field in fields(kind) if field.name not in ("run", "runs")]
        argv = [] if kind is config.Config else ["out/x"]
        for name in rng.sample(names, rng.randint(1, 4)):
            argv += strange_flag(name, rng)
        taken = []

        def read(kind=kind, argv=argv, taken=taken):
            found = config.load(kind, argv)
            taken.append(found)
            if kind is config.Config and found.n_layer <= 64:
                meta = dict(grid=[8, 8], vocab=17, n_classes=10, given=[])
                with torch.device("meta"), runtime.one_line_errors(ValueError):
                    methods.build(methods.spec_of(vars(found), meta))

        if problem := is_fine(read):
            failures.append(f"flags {i}, {kind.__module__} {argv}: {problem}")
        n_taken += bool(taken)
    return n, f"flag sets, {n_taken} of them taken", failures


# Options of samplers


def random_options(names: list[str], rng: random.Random) -> dict[str, typing.Any]:
    """Values that a user might give."""
    choices = {
        "schedule": ["spread", "fixed", "one", "leap", "arccos", "cosine", "linear"],
        "k": [1, 2, 5, 100], "pick": ["proportional", "softmax", "random"], "stop": [0.0, 0.5, 3.0],
        "refine": [0, 1, 3], "planner_guidance": [1.0, 0.0, 3.0], "order": ["confidence", "random"],
        "noise": [0.0, 4.5], "temperature_end": [0.0, 0.3], "eta": [0.0, 0.2, 1.0, 5.0],
        "remask": ["confidence", "rescale", "cap"], "stabilization_level": [0.0, 0.05],
        "context_level": [0.0, 0.05], "lag": [-1, 0, 1, 3], "temperature": [0.1, 1.0, 2.0],
        "top_k": [0, 1, 3, 99], "top_p": [0.1, 0.9, 1.0], "min_p": [0.0, 0.5, 1.0],
        "guidance": [1.0, 0.0, 4.0], "patience": [1, 4], "t": [0.01, 0.5],
    }
    fitting = [name for name in choices if name in names]
    chosen = rng.sample(fitting, min(len(fitting), rng.randint(0, 4)))
    return {name: rng.choice(choices[name]) for name in chosen}


def random_spec(rng: random.Random) -> methods.Spec:
    name = rng.choice(list(methods.METHODS))
    grid = rng.choice([(4, 4), (1, 6), (2, 3), (3, 2, 2), (5, 1, 2)])
    flags = {}
    if name == "forcing":
        flags = dict(process=rng.choice(["hybrid", "uniform", "mask"]), noise_granularity="token")
        flags["causal"] = len(grid) == 3 and rng.random() < 0.3
    if name == "gidd":
        flags = dict(p_uniform=rng.choice([0.0, 0.2, 0.9]))
    return tiny_spec(name, grid=grid, vocab=rng.choice([2, 7]), **flags)


def sample_once(seed: int, device: torch.device) -> None:
    """A random method, sampler and options: what a sampler promises is checked at every step."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    spec = random_spec(rng)
    nets = methods.build(spec)
    for net in nets.values():
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.5)
        net.to(device).requires_grad_(False)
    sampler = rng.choice(list(spec.method.samplers))
    names = methods.options_of(methods.find_sampler(spec, sampler))
    options = random_options(names, rng)
    n = rng.choice([1, 2, 4])
    frames = 0
    if spec.is_video and spec.method.has_own_levels:
        frames = rng.choice([0, 1, spec.grid[0], 9])
    grid = [frames or spec.grid[0], *spec.grid[1:]] if spec.is_video else spec.grid
    x0 = torch.randint(spec.vocab, (n, math.prod(grid)))
    known = torch.rand(x0.shape) < rng.choice([0.0, 0.3, 1.0])
    label = torch.randint(spec.n_classes + 1, (n,)).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    try:
        states = list(methods.sample(
            spec, nets, label, n_steps=rng.choice([1, 2, 7]), generator=generator, sampler=sampler,
            known=known.to(device), known_tokens=x0.to(device), frames=frames, **options,
        ))
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
        return
    check_states(states, x0, known, spec)


def check_states(states: list, x0: torch.Tensor, known: torch.Tensor, spec: methods.Spec) -> None:
    assert states, "no State"
    nfe = torch.zeros(len(x0))
    for state in states:
        x, p_noise, written, t = (y.cpu() for y in state[:4])
        assert x.shape == p_noise.shape == written.shape == x0.shape
        assert t.shape == state.nfe.shape == (len(x0),)
        assert torch.equal(x[known], x0[known]), "a known token was written"
        assert not (written & known).any(), "a known token is said to be written"
        assert 0 <= x.min() and x.max() <= spec.vocab
        assert (p_noise >= 0).all() and (p_noise <= 1).all(), "P(noise) is no probability"
        assert (t >= 0).all() and (t <= 1).all(), "t is no level"
        assert (state.nfe.cpu() >= nfe).all(), "fewer calls than before"
        nfe = state.nfe.cpu()
    assert x.max() < spec.vocab, "a mask is left"


def options(n: int, rng: random.Random) -> tuple[int, str, list[str]]:
    failures = []
    n_pretended = 0
    for i in range(n):
        seed = rng.randrange(2**31)
        is_pretended = rng.random() < 0.5
        n_pretended += is_pretended
        if is_pretended:
            with pretended_device() as device:
                problem = is_fine(sample_once, seed, device)
        else:
            problem = is_fine(sample_once, seed, torch.device("cpu"))
        if problem:
            failures.append(f"options {i}, seed {seed}, pretended {is_pretended}: {problem}")
    return n, f"option sets, {n_pretended} of them on a pretended device", failures
