"""Bad input of every kind ends a program in one line: no traceback, no hang, nothing half-made."""

import copy
import errno
import gzip
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tracemalloc
import typing
import zipfile
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, meta_of, refusal, save_run
from test_config import comments_of
from test_data import idx, write_tokens
from test_layout import commands_in, texts

import config
import data
from formats import meta_file, token_files
from sources import mnist, tokens
from support import checkpoint, runtime, training

CPU = torch.device("cpu")


class Hangs(BaseException):
    """Nothing but a test catches it."""


@pytest.fixture(autouse=True)
def limit_of_a_minute():
    def complain(*_):
        raise Hangs

    before = signal.signal(signal.SIGALRM, complain)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# Config files


def config_refusal(content):
    Path("mine.py").write_text(content)
    return refusal(config.load, argv=["mine.py"])


@pytest.mark.parametrize("key, value", [
    ("seed", "9**9**9"),
    ("seed", "2 ** 63 * 2"),
    ("seed", "0x" + "f" * 10_000),
    ("seed", "1 << 10**10"),
    ("planner_lr", "1e308 * 10"),
    ("planner_lr", "2.0 ** 99_999"),
    ("data", '"a" * 10**9'),
    ("data", '"a" + "b"'),
    ("grid", "(1,) * 10**9"),
    ("seed", "True + 1"),
    ("seed", "(-8) ** 0.5"),
    ("seed", "+".join("1" * 700)),
])
def test_values_that_are_too_large_or_no_arithmetic_are_refused(key, value):
    """By file, line and key, before anything of that size is computed."""
    said = config_refusal(f"n_layer = 2\n{key} = {value}")
    assert said.startswith(f"mine.py, line 2: {key}")
    assert len(said) < 2000


@pytest.mark.parametrize("nested", [
    "(" * 300 + "1" + ")" * 300, "-" * 100_000 + "1", "+".join("1" * 50_000),
])
def test_files_that_cannot_be_parsed_are_refused(nested):
    assert config_refusal(f"seed = {nested}").startswith("mine.py: ")


def test_files_that_are_no_text_are_refused():
    for content in (b"\xff\xfe", b"seed = 1\0", b"seed = '\xe9'"):
        Path("mine.py").write_bytes(content)
        assert refusal(config.load, argv=["mine.py"]).startswith("mine.py: ")


def test_statements_are_shown_in_one_line():
    assert "not `if 1:`" in config_refusal("if 1:\n    seed = 3\n")


def test_arithmetic_that_is_meant_still_works():
    content = "seed = -(-7 // 2) + 9 % 5 - 2**3 // 2\nplanner_lr = 1 / 2**2\ncompile = True\n"
    Path("mine.py").write_text(content + "n_head = seed * 2\nvocab = 8\ngrid = (n_head, 2 * 4)\n")
    cfg = config.load(argv=["mine.py"])
    assert (cfg.seed, cfg.planner_lr, cfg.compile, cfg.grid) == (4, 0.25, True, (8, 8))


@pytest.mark.parametrize("name", ["out_dir", "data", "init_from", "wandb_project", "wandb_name"])
@pytest.mark.parametrize("value", ["a\0b", "a\nb", "\udcff", "a" * 1001])
def test_texts_that_name_nothing_are_refused(name, value):
    assert config_refusal(f"{name} = {value!r}").startswith(f"{name} is ")


@pytest.mark.parametrize("argv", [
    ["a" * 300], ["a" * 3000], ["a\0b"], ["--n-embd", "1" + "0" * 400], ["--n-layer", 10**9],
    ["--vocab", 10**12, "--grid", 8, 8], ["--vocab", 9, "--grid", 10**9, 10**9],
])
def test_flags_beyond_all_bounds_are_refused(argv):
    refusal(config.load, argv=list(map(str, argv)))


def test_names_too_long_for_a_file_system_are_refused():
    long = "a" * 300
    assert "no data in data/aaa" in refusal(data.load, long)
    assert "no run in" in refusal(checkpoint.load_run, long)
    with runtime.one_line_errors(OSError):
        refusal(training.make_folder, Path(long))


# Flags of other methods


@pytest.mark.parametrize("method, flag, value", [
    ("ddpd", "p_uniform", 0.2),
    ("ddpd", "process", "mask"),
    ("ddpd", "weight", "elbo"),
    ("ddpd", "context_frames", 2),
    ("gidd", "denoiser_process", "uniform"),
    ("gidd", "on_policy", 0.5),
    ("gidd", "rollout_share", 0.5),
    ("forcing", "denoiser_process", "uniform"),
])
def test_flags_that_a_method_does_not_read_are_refused(method, flag, value):
    argv = ["--method", method, "--" + flag.replace("_", "-"), str(value)]
    assert f"{flag} is not read by method {method}" in refusal(config.load, argv=argv)
    assert config.load(argv=["--method", method])


def test_the_comment_of_a_flag_names_the_methods_that_read_it():
    kind = typing.get_type_hints(config.Config)["method"]
    assert set(config.READS) == set(typing.get_args(kind))
    for name, comment in comments_of(config.MethodOptions).items():
        readers = [method for method, names in config.READS.items() if name in names]
        if name != "method":
            assert comment.startswith(", ".join(readers) + ":"), name


def test_recipes_set_only_flags_that_are_read():
    """Commands of the texts, and the flags of experiments/gidd.py."""
    config.load(argv=["text_gidd", "--method", "ddpd", "--n-layer", "2"])
    n_read = 0
    for content in texts().values():
        for script, words in commands_in(content):
            is_whole = not any(word.isupper() or "[" in word for word in words)
            if script == "train_ddpd.py" and words and is_whole:
                names = {f"configs/{path.name}": str(path) for path in config.CONFIGS.glob("*.py")}
                argv = [names.get(word, word).rstrip(".") for word in words]
                if "--list" not in argv and "--help" not in argv:
                    config.load(argv=argv)
                    n_read += 1
    assert n_read > 10


# Making data


def run_data(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, argv)])
    return refusal(data.main)


@pytest.mark.parametrize("flag, value", [
    ("image-size", -1), ("image-size", 2**20 + 1), ("grey-levels", -1), ("grey-levels", 2**31),
    ("length", -1), ("length", 2**31 + 1), ("vocab", -1), ("vocab", 2**62),
])
def test_sizes_that_no_data_has_are_refused(monkeypatch, flag, value):
    said = run_data(monkeypatch, "digits", f"--{flag}={value}")
    assert said.startswith(f"{flag.replace('-', '_')} is ")
    assert "it must lie in [0, " in said
    assert "vocab is too large" in run_data(monkeypatch, "digits", "--vocab=1" + 30 * "0")


def test_training_makes_no_data_of_such_sizes():
    assert "image_size is 1048577" in refusal(data.load, "digits", 2**20 + 1)


@pytest.mark.parametrize("flag", ["name", "file", "folder", "tokenizer"])
@pytest.mark.parametrize("value", ["a\0b", "\udcff", "a" * 1001])
def test_options_that_name_nothing_are_refused(monkeypatch, flag, value):
    assert run_data(monkeypatch, "text", f"--{flag}", value).startswith(f"{flag} is ")


def test_names_of_folders_are_plain(monkeypatch):
    for name in ("a/b", ".a", "a" * 250):
        assert "is not a plain folder name" in run_data(monkeypatch, "digits", "--name", name)


@pytest.fixture
def pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_a_file_to_read_is_a_file(monkeypatch, pipe):
    """Opening a pipe would wait for ever."""
    for path in (pipe, pipe.parent, "nothing", "a" * 300):
        assert "no file" in run_data(monkeypatch, "text", "--file", path)
        assert "no file" in run_data(monkeypatch, "tokens", "--file", path)
        said = run_data(monkeypatch, "mnist", "--folder", path)
        assert said.startswith(f"{path}: no t10k-images-idx3-ubyte")
    os.mkfifo(pipe.parent / mnist_file("images"))
    assert "no t10k-images" in run_data(monkeypatch, "mnist", "--folder", pipe.parent)


def mnist_file(kind):
    return f"t10k-{kind}-idx{3 if kind == 'images' else 1}-ubyte"


def test_pipes_among_the_data_are_refused(pipe):
    """In place of arrays, of meta.json, and of the metadata beside a token file."""
    with pytest.raises(SystemExit):
        token_files.read_npy(pipe)
    os.mkfifo(pipe.parent / "meta.json")
    assert "not a file" in refusal(meta_file.read_meta, pipe.parent)
    assert not data.has_data(pipe.parent)
    os.mkfifo(pipe.parent / "t_metadata.json")
    assert tokens.total_samples(pipe.parent / "t.safetensors") is None


# IDX files


def peak_mb(call, *args):
    tracemalloc.start()
    try:
        said = refusal(call, *args)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return said, peak / 2**20


def test_an_idx_file_is_expanded_as_far_as_its_header_says(tmp_path):
    """A hundred megabytes of zeros follow ten images."""
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(idx(np.zeros((10, 28, 28))))
        for _ in range(100):
            file.write(bytes(2**20))
    said, peak = peak_mb(mnist.read_idx, path, 3)
    assert "has more bytes of data" in said
    assert peak < 5


@pytest.mark.parametrize("sizes", [(2**32 - 1,) * 3, (2**20, 2**5, 2**5)])
def test_memory_is_not_taken_at_the_word_of_a_header(tmp_path, sizes):
    """Images are announced that are not there."""
    path = tmp_path / "images"
    path.write_bytes(bytes([0, 0, 8, 3]) + np.array(sizes, ">u4").tobytes() + bytes(784))
    said, peak = peak_mb(mnist.read_idx, path, 3)
    assert "says it holds" in said
    assert peak < 5


# Writing


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["tokens", "labels", "meta.json", "folder"])
def test_a_full_disk_leaves_no_data_half_made(tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    owner, name = {
        "tokens": (token_files.SplitWriter, "add"),
        "labels": (Path, "write_bytes"),
        "meta.json": (Path, "write_text"),
        "folder": (data.tempfile, "mkdtemp"),
    }[where]
    monkeypatch.setattr(owner, name, no_space)
    said = refusal(data.load, "digits", 8)
    assert said == "data/digits cannot be made: [Errno 28] No space left on device"
    assert os.listdir("data") == []


@pytest.mark.parametrize("limit", [10_000, 20_000, 100_000])
def test_a_file_that_cannot_be_written_whole_is_refused(tmp_path, limit):
    """The system lets no file grow past the limit."""
    done = subprocess.run(
        [sys.executable, ROOT / "data.py", "digits"], cwd=tmp_path, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 1
    assert done.stderr == "data/digits cannot be made: [Errno 27] File too large\n"
    assert os.listdir(tmp_path / "data") == []


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").write_text("in the way")
    assert "data/digits cannot be made: " in refusal(data.load, "digits", 8)


def test_data_that_could_not_be_read_is_not_made(tmp_path, monkeypatch):
    """What source.make returns is checked as meta.json is."""
    monkeypatch.chdir(tmp_path)
    write_tokens("t.safetensors", np.zeros((20, 1), np.int32))
    options = data.Make("tokens", file="t.safetensors")
    assert "grid [1, 1]" in refusal(data.make, tokens, data.ROOT / "t", options)
    assert not Path("data").exists()


# meta.json


@pytest.mark.parametrize("change", [
    dict(grid=[10**9, 10**9]),
    dict(grid=[2**12, 2**12 + 1]),
    dict(grid=[1] * 1000 + [2]),
    dict(grid=[True, 8]),
    dict(vocab=10**30),
    dict(vocab=2**31),
    dict(vocab=True),
    dict(n_classes=10**9),
    dict(n_classes=True, class_names=["a"]),
    dict(given=[[[[["deep"] * 99] * 99] * 99]]),
    dict(given=["long" * 10**6]),
    dict(palette="text"),
    dict(score=["maze"]),
    dict(is_certain=True),
    dict(is_certain=[]),
])
def test_a_meta_json_beyond_all_bounds_is_refused(change):
    assert meta_file.meta_error(meta_of(300, [8, 8], 2)) == ""
    said = meta_file.meta_error(meta_of(300, [8, 8], 2) | change)
    assert said and len(said) < 200 and "\n" not in said


# Checkpoints that are whole, but wrong


RUNS = {
    "ddpd": (meta_of(9, [4, 4], 3), []),
    "forcing": (meta_of(4, [3, 2, 2], 0), ["--method", "forcing", "--causal"]),
}


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """name -> its folder, cfg, spec and checkpoint"""
    made = {}
    for name, (meta, flags) in RUNS.items():
        folder = tmp_path_factory.mktemp("runs") / name
        cfg, spec = save_run(folder, meta, "--n-embd", 16, *flags)
        state = checkpoint.load_checkpoint(folder)
        made[name] = SimpleNamespace(folder=folder, cfg=cfg, spec=spec, state=state)
    return made


@pytest.fixture
def runs(whole_runs):
    """Their checkpoints may be spoiled."""
    yield whole_runs
    for run in whole_runs.values():
        write_state(run, run.state)


def write_state(run, state):
    """As whoever forges a checkpoint would: with a digest that fits."""
    digest = checkpoint.digest(state)
    torch.save({**state, "digest": digest}, run.folder / "ckpt.pt")


def sample_from(run):
    return checkpoint.load_run(run.folder)


def resume(run):
    state = training.open_run(run.cfg, run.spec, runtime.World(0, 1, CPU))
    return training.build_training(run.cfg, run.spec, state, CPU)


def result(call, run):
    """-> the one line of a refusal, or "" """
    try:
        call(run)
    except SystemExit as error:
        assert isinstance(error.code, str)
        assert "\n" not in error.code
        assert 20 < len(error.code) < 1000
        return error.code
    return ""


PLAIN_VALUES = [
    None, True, -1, 0, 1, 2, 3, 10**9, 2**62, 2**64, 10**30, 0.5, 1.5, math.nan, math.inf, "", "x",
    "\0", "a\nb", "mask", "uniform", "gidd", "a" * 2000, [], [1, 2], [2, 2, 2], (), (8, 8), {},
    {"x": 1}, {1.0: 2}, {"state": {}}, [[]],
]
TENSORS = [
    lambda: torch.zeros(()), lambda: torch.zeros(3, 5), lambda: torch.zeros(4, 4).long(),
    lambda: torch.full((2,), math.nan), lambda: torch.zeros(0),
]
SPOILED = [
    lambda y: y[None], lambda y: y.double(), lambda y: y.to(torch.complex64), lambda y: y > 0,
    lambda y: y.flatten()[:-1].clone(), lambda y: y * math.nan, lambda y: y.long(),
    lambda y: y.half(), lambda y: y.new_zeros(()),
]


def places(tree, path=()):
    """Where the nodes of nested dicts and lists are.  yields keys from the root on"""
    if path:
        yield path
    children = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, node in children:
        if isinstance(node, (dict, list, tuple)):
            yield from places(node, (*path, key))
        else:
            yield (*path, key)


def mutate(state, rng):
    """Replace, delete, rename or spoil one node."""
    part = rng.choice(list(state))
    inside = state[part]
    below = list(places(inside)) if isinstance(inside, (dict, list)) and rng.random() < 0.9 else []
    *path, key = (part, *rng.choice(below)) if below else (part,)
    owner = state
    for step in path:
        if isinstance(owner[step], tuple):
            owner[step] = list(owner[step])
        owner = owner[step]
    node = owner[key]
    kind = rng.random()
    if kind < 0.1:
        del owner[key]
    elif kind < 0.2 and isinstance(owner, dict):
        owner[rng.choice(["x", 7, 0.0, None, "blocks.9.x"])] = owner.pop(key)
    elif isinstance(node, torch.Tensor) and kind < 0.7:
        owner[key] = rng.choice(SPOILED)(node)
    elif kind < 0.8:
        owner[key] = copy.deepcopy(rng.choice(PLAIN_VALUES))
    else:
        owner[key] = rng.choice(TENSORS)()


@pytest.mark.parametrize("name, n", [("ddpd", 120), ("forcing", 60)])
def test_forged_checkpoints_are_refused_in_one_line(runs, name, n):
    """A spoiled value under a digest that fits: what is read works, or is refused by name."""
    run = runs[name]
    rng = random.Random(0)
    n_refused = 0
    for _ in range(n):
        state = copy.deepcopy(run.state)
        mutate(state, rng)
        write_state(run, state)
        said = result(sample_from, run)
        said_in_training = result(resume, run)
        if said:
            assert said.startswith(f"{run.folder}/ckpt.pt ")
            assert said_in_training == said
            n_refused += 1
    write_state(run, run.state)
    assert result(sample_from, run) == result(resume, run) == ""
    assert n / 2 < n_refused < n


def put(*path):
    """Puts the last of the path where the rest of it leads."""
    *keys, key, value = path

    def change(state):
        for step in keys:
            state = state[step]
        state[key] = value

    return change


@pytest.mark.parametrize("change, said", [
    (put("config", 5), "config is 5, not a dict"),
    (put("config", "colour", "red"), "config has an unknown key 'colour'"),
    (put("config", "n_layer", 10**4), "nets.planner has 1 blocks, n_layer is 10000"),
    (put("config", "n_layer", 10**9), "n_layer is 1000000000; it must lie in"),
    (put("config", "n_embd", 2**40), "nets.planner.tok_emb.weight is not of (10, 1099511627776)"),
    (put("config", "n_head", 3), "n_embd 16 does not divide into n_head 3"),
    (put("config", "base_width", 10**400), "base_width is too large"),
    (put("config", "weight_decay", 10**400), "weight_decay is "),
    (put("config", "batch_size", True), "batch_size is True, not int"),
    (put("config", "method", torch.zeros(2, 2)), "method is tensor("),
    (put("config", "p_uniform", 1.0), "p_uniform is 1.0"),
    (put("config", "method", "gidd"), "nets must be of denoiser"),
    (put("it", -1), "it is -1, not a whole number"),
    (put("it", 1.0), "it is 1.0, not a whole number"),
    (put("world_size", 0), "world_size is 0, not a whole number"),
    (put("meta", "grid", [10**9, 10**9]), "meta: grid [1000000000, 1000000000] holds more"),
    (put("meta", "vocab", 10**30), "meta: vocab and n_classes must be less than"),
    (put("meta", "vocab", 10), "nets.planner.tok_emb.weight is not of (11, 16)"),
    (put("meta", "class_names", ["a", "b"]), "meta: vocab must be at least 2, and class_names"),
    (put("nets", "denoiser", "head.weight", torch.zeros(8, 16)), "nets.denoiser.head.weight"),
    (put("ema", "planner", {}), "ema.planner has 0 blocks"),
    (put("optimizers", "planner", "state", 0.5, {}), "optimizers.planner must hold the moments"),
    (put("optimizers", "planner", "state", 0, "step", torch.zeros(3)), "optimizers.planner.0.step"),
    (lambda state: state.pop("ema"), "it has no ema"),
])
def test_what_is_wrong_with_a_checkpoint_is_said(runs, change, said):
    run = runs["ddpd"]
    state = copy.deepcopy(run.state)
    change(state)
    write_state(run, state)
    line = refusal(checkpoint.load_run, run.folder)
    assert line.startswith(f"{run.folder}/ckpt.pt is no checkpoint of this program: {said}"), line


def test_a_flag_younger_than_a_run_has_its_default(runs):
    """A run without it is sampled and resumed; flags that a method does not read do no harm."""
    run = runs["ddpd"]
    state = copy.deepcopy(run.state)
    for key in ("causal", "base_head_dim", "seed", "grad_accumulation_steps", "dtype"):
        del state["config"][key]
    state["config"]["weight"] = "elbo"
    write_state(run, state)
    expected = asdict(run.cfg) | {"dtype": "auto", "weight": "elbo"}
    assert checkpoint.load_run(run.folder).spec.config == expected
    assert resume(run).it == 1


def test_checkpoints_that_unpack_to_more_than_they_hold_are_refused(runs, tmp_path):
    """A tensor of one number repeated, lists that hold each other, compressed zeros."""
    folder = tmp_path / "bomb"
    folder.mkdir()
    path = folder / "ckpt.pt"
    torch.save({"x": torch.zeros(1).expand(2**20, 2**20)}, path)
    assert "unpacks to more" in refusal(checkpoint.load_run, folder)
    nested = [0]
    for _ in range(100):
        nested = [nested] * 10
    torch.save({"x": nested}, path)
    assert "unpacks to more" in refusal(checkpoint.load_run, folder)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(2**24))
    assert "unpacks to more" in refusal(checkpoint.load_run, folder)


# The folder of a run


def test_pipes_in_the_folder_of_a_run_make_nobody_wait(tmp_path, capsys):
    """In place of the checkpoint, its lock, config.json or files to be written."""
    folder = tmp_path / "run"
    folder.mkdir()
    os.mkfifo(folder / "config.json")
    assert not checkpoint.is_run(folder)
    os.mkfifo(folder / "ckpt.pt")
    assert "ckpt.pt is no file" in refusal(checkpoint.load_run, folder)
    os.mkfifo(folder / "config.tmp")
    checkpoint.write_config(folder, {"a": 1})
    assert json.loads((folder / "config.json").read_text()) == {"a": 1}
    os.mkfifo(folder / "ckpt.tmp")
    assert checkpoint.save_checkpoint(folder, {"it": 1})
    os.mkfifo(folder / ".lock")
    refusal(checkpoint.locked(folder).__enter__)


@pytest.mark.parametrize("content", [b"3", b"\xff", b"[" * 100_000, b"[1]", b""])
def test_any_config_json_is_read(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    assert not checkpoint.is_run(tmp_path)
    checkpoint.write_config(tmp_path, {"denoiser_process": "mask"})
    assert checkpoint.is_run(tmp_path)


def test_a_lock_needs_no_space(tmp_path, monkeypatch):
    """On a full disk the folder is locked as well, only that nobody is named."""
    monkeypatch.setattr(os, "write", no_space)
    with checkpoint.locked(tmp_path):
        assert "is in use by another process" in refusal(checkpoint.locked(tmp_path).__enter__)


@pytest.mark.parametrize("free, error, is_full", [
    (2**60, OSError(errno.ENOSPC, "No space left on device"), True),
    (10, RuntimeError("PytorchStreamWriter failed writing file"), True),
    (2**60, RuntimeError("PytorchStreamWriter failed writing file"), False),
])
def test_a_full_disk_is_called_so(whole_runs, tmp_path, monkeypatch, capsys, free, error, is_full):
    """torch says of a full disk only that it failed writing."""
    def fail(*args):
        raise error

    monkeypatch.setattr(torch, "save", fail)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    assert not checkpoint.save_checkpoint(tmp_path, whole_runs["ddpd"].state)
    said = capsys.readouterr().err
    assert ("the disk is full" in said) == is_full
    assert str(error) in said
    assert said.count("\n") == 1
