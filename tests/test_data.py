"""Data on disk and where it comes from: read right, or refused in one line."""

import gzip
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, meta_of, save_run, script, tiny_config
from safetensors.numpy import save_file

import data
from formats import meta_file
from sources import fashion_mnist, mnist, text, tokens
from support import checkpoint, runtime, starts, training


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data.load("digits", 8)
    return Path("data/digits")


def test_digits_are_split_once_and_for_all(folder):
    """1,797 real digits, a stratified tenth held out, memory-mapped; other sizes on request."""
    meta, splits = data.load("digits", 8)
    assert len(splits["train"]) == 1617
    assert len(splits["val"]) == 180
    assert meta["vocab"] == 17
    assert meta["grid"] == [8, 8]
    x, _ = splits["val"].rows([0, 1, 2])
    assert x.shape == (3, 64)
    counts = [int((splits["val"].labels == c).sum()) for c in range(10)]
    assert min(counts) >= 17 and max(counts) <= 19


def test_digits_of_another_size_are_the_same_digits(folder):
    """32x32 pixels of 4 grey levels, averaged over 4x4 blocks, look like the original."""
    meta, splits = data.load("digits", 32, 4)
    assert meta["grid"] == [32, 32]
    assert meta["vocab"] == 4
    assert splits["train"].rows(range(1617))[0].max() == 3
    native, _ = data.load("digits", 8)[1]["train"].rows([5])
    resized, _ = splits["train"].rows([5])
    blocks = resized.reshape(8, 4, 8, 4).mean((1, 3)) / 3
    assert abs(blocks - native.reshape(8, 8) / 16).mean() < 0.1


# Folders that others wrote


def write_folder(folder, tokens, labels=None, **meta):
    """tokens and labels as both splits, and a meta.json of these fields."""
    folder.mkdir(parents=True)
    for split in data.SPLITS:
        np.save(folder / f"{split}_tokens.npy", tokens)
        if labels is not None:
            np.save(folder / f"{split}_labels.npy", labels)
    (folder / "meta.json").write_text(json.dumps(meta))


LEAST = dict(name="mine", vocab=9, grid=[4, 4], palette="grey")     # that a meta.json must hold
IDS = np.arange(96).reshape(6, 4, 4) % 9


def test_a_folder_is_found_by_its_name_or_its_path(tmp_path, monkeypatch):
    """A slash makes a path, absolute or relative; without one it is a folder under data/."""
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "elsewhere" / "mine", IDS, **LEAST)
    write_folder(tmp_path / "data" / "mine", IDS[:3], **LEAST)
    for name, n in [("mine", 3), ("elsewhere/mine", 6), (f"{tmp_path}/elsewhere/mine", 6),
                    ("elsewhere/../data/mine", 3), ("./data/mine/", 3)]:
        assert len(data.load(name)[1]["train"]) == n


def test_a_run_trains_and_is_sampled_from_a_path(tmp_path, monkeypatch):
    """Its tokenizer or decoder comes from there too."""
    monkeypatch.chdir(tmp_path)
    kept = {"file": "decoder.jit", "sha256": hashlib.sha256(b"x").hexdigest()}
    write_folder(tmp_path / "elsewhere" / "mine", IDS, **LEAST, decoder=kept)
    Path("elsewhere/mine/decoder.jit").write_bytes(b"x")
    cfg = tiny_config("run", "--data", "elsewhere/mine")
    spec, _ = training.open_data(cfg)
    Path("out/run").mkdir(parents=True)
    training.open_run(cfg, spec, runtime.World(0, 1, "cpu"))
    assert Path("out/run/decoder.jit").read_bytes() == b"x"


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.uint32, np.uint64])
def test_tokens_are_integers_of_any_size(tmp_path, dtype):
    write_folder(tmp_path / "mine", IDS.astype(dtype), **LEAST)
    x, _ = data.load(f"{tmp_path}/mine")[1]["val"].rows(np.arange(6))
    assert x.dtype == np.int64
    assert np.array_equal(x, IDS.reshape(6, 16))


@pytest.mark.parametrize("bad", [-1, 9, 2**40, -2**40])
def test_integers_that_are_no_ids_are_refused(tmp_path, bad):
    ids = IDS.copy()
    ids[4, 2, 2] = bad
    write_folder(tmp_path / "mine", ids, **LEAST)
    said = refusal(data.load(f"{tmp_path}/mine")[1]["val"].rows, np.arange(6))
    assert f"row 4: token {bad} is not in [0, 9)" in said


@pytest.mark.parametrize("grid", [[1, 16], [16], [16, 1]])
def test_flat_tokens_fit_a_line(tmp_path, grid):
    write_folder(tmp_path / "mine", IDS.reshape(6, 16), **LEAST | dict(grid=grid))
    x, _ = data.load(f"{tmp_path}/mine")[1]["val"].rows(np.arange(6))
    assert np.array_equal(x, IDS.reshape(6, 16))


@pytest.mark.parametrize("grid", [[4, 4], [1, 15], [2, 8], [2, 16]])
def test_flat_tokens_fit_nothing_else(tmp_path, grid):
    write_folder(tmp_path / "mine", IDS.reshape(6, 16), **LEAST | dict(grid=grid))
    assert "holds int64 (6, 16), not whole numbers (n, " in refusal(data.load, f"{tmp_path}/mine")


def test_no_labels_are_no_classes(tmp_path):
    """`given`, `n_classes` and `class_names` may be left out of meta.json."""
    write_folder(tmp_path / "mine", IDS, **LEAST)
    meta, splits = data.load(f"{tmp_path}/mine")
    assert (meta["n_classes"], meta["class_names"], meta["given"]) == (0, [], [])
    _, labels = splits["train"].rows(np.arange(6))
    assert labels.tolist() == [0] * 6
    classes = dict(n_classes=2, class_names=["a", "b"])
    write_folder(tmp_path / "pets", IDS, **LEAST, **classes)
    assert "train_labels.npy cannot be read" in refusal(data.load, f"{tmp_path}/pets")
    write_folder(tmp_path / "labelled", IDS, np.arange(6) % 2, **LEAST)
    train = data.load(f"{tmp_path}/labelled")[1]["train"]
    assert "row 1: label 1 is not in [0, 1)" in refusal(train.rows, np.arange(6))


# The examples of docs/recipes.md


def recipe(title):
    """The Python block of a section of the recipes."""
    section = (ROOT / "docs" / "recipes.md").read_text().split(f"### {title}\n")[1]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


@pytest.fixture
def csv_rows(tmp_path, monkeypatch):
    """mine.csv: a label and 64 tokens a row."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    rows = np.column_stack([np.arange(30) % 10, rng.integers(0, 16, (30, 64))])
    np.savetxt("mine.csv", rows, fmt="%d", delimiter=",")
    return rows


def check_csv_data(rows):
    """data/mine holds every row of the file once, with its label."""
    meta, splits = data.load("mine")
    assert (meta["vocab"], meta["grid"], meta["n_classes"]) == (16, [8, 8], 10)
    found = []
    for split, n in (("train", 27), ("val", 3)):
        x, y = splits[split].rows(np.arange(n))
        found += np.column_stack([y, x]).tolist()
    assert sorted(found) == sorted(rows.tolist())


def test_own_tokens_as_in_the_recipes(csv_rows):
    exec(recipe("Your own tokens"), {})
    check_csv_data(csv_rows)


def test_own_source_as_in_the_recipes(csv_rows, tmp_path):
    """One file in sources/ is all that the command needs."""
    checkout = tmp_path / "checkout"
    for folder in ("sources", "configs", "formats"):
        shutil.copytree(ROOT / folder, checkout / folder)
    shutil.copy(ROOT / "data.py", checkout)
    (checkout / "sources" / "mine.py").write_text(recipe("A new source"))
    command = [sys.executable, checkout / "data.py"]
    listed = subprocess.run([*command, "--list"], capture_output=True, text=True)
    assert "mine           Sequences of a CSV file" in listed.stdout
    make = [*command, "mine", "--file", "mine.csv"]
    done = subprocess.run(make, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "Next: python train_ddpd.py --data mine"
    check_csv_data(csv_rows)


# What is spoiled


def edit_array(name, change):
    def spoil(folder):
        array = np.load(folder / name)
        np.save(folder / name, change(array))

    return spoil


def edit_meta(**change):
    def spoil(folder):
        path = folder / "meta.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return spoil


def overwrite(name, content):
    def spoil(folder):
        (folder / name).write_bytes(content)

    return spoil


def truncate(name, n_bytes):
    def spoil(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:n_bytes])

    return spoil


def delete(name):
    def spoil(folder):
        (folder / name).unlink()

    return spoil


def put(index, value):
    def change(array):
        array[index] = value
        return array

    return change


TRAIN = "train_tokens.npy"
VAL = "val_tokens.npy"
LABELS = "train_labels.npy"


@pytest.mark.parametrize("spoil, said", [
    (edit_array(TRAIN, put((7, 0, 0), 17)), f"{TRAIN}, row 7: token 17 is not in [0, 17)"),
    (edit_array(LABELS, put(7, 10)), "row 7: label 10 is not in [0, 10)"),
    (edit_array(LABELS, put(7, -1)), "row 7: label -1 is not in [0, 10)"),
    (edit_array(LABELS, lambda a: a[:-1]), "1617 train sequences, but labels of shape (1616,)"),
    (edit_array(TRAIN, lambda a: a[:, :7]), f"{TRAIN} holds uint16 (1617, 7, 8)"),
    (edit_array(TRAIN, lambda a: a.astype(float)), "float64"),
    (edit_array(VAL, lambda a: a[:0]), "labels"),
    (overwrite(VAL, b""), f"{VAL} cannot be read"),
    (truncate(VAL, 999), f"{VAL} cannot be read"),
    (delete(VAL), f"{VAL} cannot be read"),
    (overwrite("meta.json", b"{"), "meta.json cannot be read"),
    (overwrite("meta.json", b'{"name": "digits"}'), "meta.json: vocab is missing"),
    (edit_meta(name="../digits"), "meta.json: name '../digits' leaves the folder"),
    (edit_meta(palette="/etc/passwd"), "meta.json: palette '/etc/passwd' leaves the folder"),
    (edit_meta(class_names=[1] * 10), "class_names must be words"),
    (edit_meta(palette=[[0, 0, 256]] * 17), "palette must name a colour"),
    (edit_meta(n_classes=9), "class_names must name n_classes classes"),
    (edit_meta(grid=[8, 0]), "grid [8, 0]"),
])
def test_spoiled_data_is_refused_by_file_and_row(folder, spoil, said):
    spoil(folder)
    with pytest.raises(SystemExit) as error:
        data.load("digits", 8)[1]["train"].rows(range(20))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def refusal(call, *args):
    """The one-line message with which a call exits."""
    with pytest.raises(SystemExit) as error:
        call(*args)
    assert error.value.code not in (0, None)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_data_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hint = "no data in data/mnist: make it with `python data.py mnist`"
    assert hint in refusal(data.load, "mnist")
    assert "--image-size 16 --grey-levels 4" in refusal(data.load, "mnist", 16, 4)
    assert "no data in data/imagenet" in refusal(data.load, "imagenet")
    assert "no data in ../other: there is no meta.json" in refusal(data.load, "../other")
    assert "no data in /nowhere/other" in refusal(data.load, "/nowhere/other")
    assert "leaves the folder" in refusal(data.load, "..")
    (tmp_path / "data" / "birds").mkdir(parents=True)
    (tmp_path / "data" / "birds" / "meta.json").write_text("{}")
    said = refusal(data.load, "bird")
    assert f"there are {', '.join(data.source_names())}, data/birds; did you mean birds?" in said
    assert "did you mean" not in refusal(data.load, "qqqq")
    done = script("data.py", "mnst")
    assert done.returncode == 1
    assert done.stderr.strip().endswith("did you mean mnist?")


def test_how_to_train_on_what_was_made(tmp_path, monkeypatch):
    """By a config that reads this folder and whose stated shape it has, else by --data."""
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("to be or not to be, " * 200)
    for name, length, command in [
        ("digits", 0, "digits"), ("maze", 0, "maze_ddpd"), ("text", 128, "text_gidd"),
        ("text", 64, "--data text"),
    ]:
        shutil.rmtree("data", ignore_errors=True)
        done = script("data.py", name, "--length", length, "--file", "text" * bool(length))
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"Next: python train_ddpd.py {command}"


def test_a_subset_is_spread_over_the_whole_split():
    """A split may be sorted by label, as that of faces: all classes occur, and no row twice."""
    _, splits = data.load("avatars", 0, 0)
    split = splits["val"]
    rows, _ = split.spread_subset(len(split) - 1)
    assert len(np.unique(rows, axis=0)) == len(rows)
    found = np.bincount(split.spread_subset(500)[1])
    share = np.bincount(split.labels) / len(split)
    np.testing.assert_allclose(found, 500 * share, atol=1)
    again, _ = split.spread_subset(2 * len(split))
    assert np.array_equal(again[:len(split)], again[len(split):])


def test_sources_are_listed():
    """`data.py --list`: one line per source, its name and what it is."""
    done = script("data.py", "--list")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    names = data.source_names()
    column = max(map(len, names)) + 2
    for name, line in zip(names, lines, strict=True):
        assert line[:column].strip() == name
        assert line[column:] == data.import_source(name).__doc__.splitlines()[0]


def test_one_grey_level_is_refused():
    assert "grey_levels is 1; it must be at least 2" in refusal(data.load, "digits", 8, 1)


def test_data_that_is_there_is_never_replaced(tmp_path, monkeypatch):
    """Making a folder twice is refused."""
    monkeypatch.chdir(tmp_path)
    assert script("data.py", "digits").returncode == 0
    done = script("data.py", "digits", "--name", "digits", "--image-size", 4)
    assert done.returncode == 1
    assert "data/digits is there already" in done.stderr
    assert data.load("digits", 8)[0]["grid"] == [8, 8]


def test_text_is_bytes_in_windows(tmp_path, monkeypatch):
    """Windows side by side, the last tenth held out, every byte as its own id; no classes."""
    monkeypatch.chdir(tmp_path)
    raw = np.random.default_rng(0).integers(0, 256, 10_000).astype(np.uint8)
    Path("book.txt").write_bytes(raw.tobytes())
    meta, splits = made(text, file="book.txt", length=50)
    assert meta["vocab"] == 256
    assert meta["grid"] == [1, 50]
    assert meta["n_classes"] == 0
    assert meta["palette"] == "text"
    assert np.array_equal(splits["train"][0].ravel(), raw[:9000])
    assert np.array_equal(splits["val"][0].ravel(), raw[9000:])
    too_long = refusal(lambda: made(text, file="book.txt", length=5000, name="x"))
    assert "too few for sequences of 5000" in too_long
    assert "name a text with --file" in refusal(lambda: made(text, name="x"))


# IDX files


def idx(array):
    """The bytes of an IDX file."""
    magic = bytes([0, 0, 8, array.ndim])
    sizes = np.array(array.shape, ">u4").tobytes()
    return magic + sizes + array.astype(np.uint8).tobytes()


def write_mnist(folder, part, n, zipped=False, seed=0):
    """Write n random images with labels 0, 1, 2 ...  ->  images (n, 28, 28)"""
    folder.mkdir(exist_ok=True)
    images = np.random.default_rng(seed).integers(0, 256, (n, 28, 28))
    labels = np.arange(n) % 10
    for kind, array in [("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)]:
        raw = idx(array)
        if zipped:
            (folder / f"{part}-{kind}.gz").write_bytes(gzip.compress(raw))
        else:
            (folder / f"{part}-{kind}").write_bytes(raw)
    return images


def made(source, **options):
    """Make a source's folder and read it back.  ->  meta, {split: (tokens, labels)}"""
    options = data.Make(source.__name__.split(".")[-1], **options)
    folder = data.ROOT / (options.name or source.folder_name(options))
    data.make(source, folder, options)
    meta = meta_file.read_meta(folder)
    rows = {}
    for name in ("train", "val"):
        split = data.Split(folder, name, meta)
        rows[name] = split.rows(np.arange(len(split)))
    return meta, rows


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_become_padded_grey_levels(tmp_path, monkeypatch, zipped):
    """Of t10k alone the last 1,000 images are held out."""
    monkeypatch.chdir(tmp_path)
    images = write_mnist(tmp_path / "idx", "t10k", 1200, zipped)
    meta, splits = made(mnist, folder="idx")
    assert (meta["vocab"], meta["grid"], meta["n_classes"]) == (8, [32, 32], 10)
    x, y = splits["train"]
    assert len(x) == 200
    assert len(splits["val"][0]) == 1000
    square = x.reshape(-1, 32, 32)
    assert np.array_equal(square[:, 2:-2, 2:-2], np.round(images[:200] * 7 / 255))
    assert (y == np.arange(200) % 10).all()
    for border in (square[:, :2], square[:, -2:], square[:, :, :2], square[:, :, -2:]):
        assert border.max() == 0


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_are_resized(tmp_path, monkeypatch, zipped):
    """With both parts t10k is held out; 16x16 pixels are the means of 2x2 padded ones."""
    monkeypatch.chdir(tmp_path)
    images = write_mnist(tmp_path / "idx", "t10k", 1200, zipped)
    write_mnist(tmp_path / "idx", "train", 30, zipped, seed=1)
    meta, splits = made(fashion_mnist, folder="idx", image_size=16, grey_levels=256)
    assert len(splits["train"][0]) == 30
    assert len(splits["val"][0]) == 1200
    assert (meta["vocab"], meta["grid"]) == (256, [16, 16])
    assert meta["class_names"][9] == "ankle boot"
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    mean = padded.reshape(-1, 16, 2, 16, 2).mean((2, 4))
    assert abs(splits["val"][0].reshape(-1, 16, 16) - mean).max() <= 1


IMAGES = "t10k-images-idx3-ubyte"
IMAGE_LABELS = "t10k-labels-idx1-ubyte"


@pytest.mark.parametrize("spoil, said", [
    (delete(IMAGE_LABELS), f"{IMAGES} without its labels"),
    (delete(IMAGES), f"no {IMAGES}"),
    (overwrite(IMAGE_LABELS, idx(np.zeros(1199))), "1200 images"),
    (overwrite(IMAGE_LABELS, idx(np.full(1200, 11))), "row 0: label 11 is not in"),
    (overwrite(IMAGES, b""), "is no IDX file"),
    (overwrite(IMAGES, idx(np.zeros((9, 28, 28)))[:-1]), "has 7055 bytes"),
    (overwrite(IMAGES, idx(np.zeros((0, 28, 28)))), "says it holds (0, 28, 28)"),
])
def test_spoiled_idx_files_are_refused(tmp_path, monkeypatch, spoil, said):
    monkeypatch.chdir(tmp_path)
    write_mnist(tmp_path / "idx", "t10k", 1200)
    spoil(tmp_path / "idx")
    assert said in refusal(lambda: made(mnist, folder="idx"))
    assert not Path("data/mnist").exists()


def test_downloads_are_checked(tmp_path, monkeypatch):
    """Files come from the mirror once; a wrong checksum or a dead mirror is one line."""
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "mirror"
    for part, n in [("train", 20), ("t10k", 10)]:
        write_mnist(source, part, n, zipped=True)
    mirror = f"{source.as_uri()}/"
    nowhere = "file:///nowhere/"
    md5 = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in source.iterdir()}
    assert set(md5) == set(mnist.MD5) == set(fashion_mnist.MD5)
    folder = mnist.download("mnist", mirror, md5)
    assert len(mnist.read_pair(folder, "train")[0]) == 20
    mnist.download("mnist", nowhere, md5)       # nothing is fetched twice
    (folder / f"{IMAGES}.gz").unlink()
    wrong_md5 = md5 | {f"{IMAGES}.gz": "0" * 32}
    assert "is not the file expected" in refusal(mnist.download, "mnist", mirror, wrong_md5)
    assert "put the IDX files into a folder" in refusal(mnist.download, "mnist", nowhere, md5)
    assert sorted(file.suffix for file in folder.iterdir()) == [".gz"] * 3


# Finished tokens


def write_tokens(path, indices, labels=None, total=None):
    if labels is None:
        labels = np.arange(len(indices)) % 7
    if total is None:
        total = len(indices)
    save_file({"indices": indices, "labels": labels}, path)
    metadata = Path(str(path).replace(".safetensors", "_metadata.json"))
    metadata.write_text(json.dumps({"total_samples": total}))


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32, np.int64])
def test_token_files_are_read_as_ids(tmp_path, monkeypatch, dtype):
    """Ids up to 65,535, also as int16 bit patterns; a tenth held out, each row with its label."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokens, "CHUNK", 64 * 7)        # several chunks
    ids = np.random.default_rng(0).integers(0, 2**16, (50, 8, 8))
    ids[3, 0, 0] = 2**16 - 1
    if dtype == np.int16:
        write_tokens("t.safetensors", ids.astype(np.uint16).view(np.int16))
    else:
        write_tokens("t.safetensors", ids.astype(dtype))
    meta, splits = made(tokens, file="t.safetensors", name="mine")
    assert meta["vocab"] == 2**16
    assert meta["grid"] == [8, 8]
    assert meta["n_classes"] == 7
    assert meta["name"] == "mine"
    assert len(splits["train"][0]) == 45
    assert len(splits["val"][0]) == 5
    label_of = dict(zip(map(tuple, ids.reshape(50, 64)), np.arange(50) % 7, strict=True))
    for x, y in splits.values():
        assert all(label_of.pop(tuple(row)) == label for row, label in zip(x, y, strict=True))
    assert not label_of


def test_token_files_that_lie_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ids = np.full((20, 4, 4), 5, np.int32)
    ids[11, 2, 2] = 64_500

    def message(indices=ids, labels=None, total=None, **options):
        write_tokens("t.safetensors", indices, labels, total)
        return refusal(lambda: made(tokens, file="t.safetensors", **options))

    assert "20 sequences, its metadata says 21" in message(total=21)
    assert "row 11: token 64500 is not in [0, 64000)" in message(vocab=64_000)
    assert "row 0: token -1 is not in [0, " in message(-np.ones((3, 4, 4), np.int32))
    assert "do not go with labels" in message(labels=np.zeros(19, np.int64))
    assert "not integers" in message(ids.astype(np.float32))
    assert "tokenizer vqgan is not one of cosmos_di8x8" in message(tokenizer="vqgan")
    write_tokens("t.safetensors", ids)
    truncate("t.safetensors", -8)(Path())
    assert "t.safetensors cannot be read" in refusal(lambda: made(tokens, file="t.safetensors"))
    assert "name the tokens with --file" in refusal(lambda: made(tokens))


def test_ids_that_a_tokenizer_never_writes_are_warned_about(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ids = np.full((20, 4, 4), 5, np.int32)
    ids[11, 2, 2] = 64_500
    write_tokens("u.safetensors", ids)
    made(tokens, file="u.safetensors", tokenizer="cosmos_di8x8")
    warning = "holds id 64500, and cosmos_di8x8 writes ids below 64000 only"
    assert warning in capsys.readouterr().out


MEASURE_PEAK_MB = """
import resource
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, sys.argv[1])
import data
import sources.tokens


def peak_mb():
    if sys.platform == "linux":     # ru_maxrss would be the parent's
        status = Path("/proc/self/status").read_text().splitlines()
        line = next(row for row in status if row.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


np.zeros(2**20)
save_file({"x": np.zeros(3)}, "warm")
before = peak_mb()
options = data.Make("tokens", file="t.safetensors", name="big")
data.make(sources.tokens, data.ROOT / "big", options)
meta, splits = data.load("big")
for start in range(0, len(splits["train"]) - 512, 512):
    splits["train"].rows(np.arange(start, start + 512))
print(peak_mb() - before)
"""


def write_sparse_tokens(path, n):
    """A safetensors file of n zero sequences of 32x32 int16 that takes no space on disk."""
    token_bytes = n * 32 * 32 * 2
    label_bytes = n * 8
    end = token_bytes + label_bytes
    indices = {"dtype": "I16", "shape": [n, 32, 32], "data_offsets": [0, token_bytes]}
    labels = {"dtype": "I64", "shape": [n], "data_offsets": [token_bytes, end]}
    header = json.dumps({"indices": indices, "labels": labels}).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


def test_a_large_token_file_is_never_in_memory(tmp_path):
    """Making and reading 320 MB of tokens grows the process by a small part of that."""
    n = 160_000
    write_sparse_tokens(tmp_path / "t.safetensors", n)
    (tmp_path / "t_metadata.json").write_text(json.dumps({"total_samples": n}))
    command = [sys.executable, "-c", MEASURE_PEAK_MB, ROOT]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 100, done.stdout


# Anything at all


def mutate(raw, rng):
    """Change, cut out, repeat or cut off a few bytes."""
    raw = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(raw) if rng.random() < 0.3 else min(len(raw), 256))
        kind = rng.random()
        if kind < 0.5:
            raw[at] = rng.randrange(256)
        elif kind < 0.65:
            del raw[at:at + rng.choice([1, 4, 64])]
        elif kind < 0.8:
            raw[at:at] = raw[max(0, at - 16):at]
        elif kind < 0.9:
            raw[at:at + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"9999", b"null", b"[[[["])
        else:
            del raw[at:]
        if not raw:
            return b""
    return bytes(raw)


def check_tokens(x, y, grid, vocab):
    assert x.shape == (len(y), *grid)
    assert 0 <= x.min() <= x.max() < vocab


def read_folder(path):
    meta = meta_file.read_meta(path.parent)
    split = data.Split(path.parent, "val", meta)
    x, y = split.rows(np.arange(len(split)))
    check_tokens(x, y, [np.prod(meta["grid"])], meta["vocab"])


def read_idx(path):
    x, y = mnist.read_pair(path.parent, "t10k")
    assert x.ndim == 3
    assert len(x) == len(y)
    assert x.size


def read_tokens(path):
    options = data.Make("tokens", file=str(path.parent / "t.safetensors"))
    meta, chunks, _ = tokens.make(options)
    for _, x, y in chunks:
        check_tokens(x, y, meta["grid"], meta["vocab"])


def checkpoint_reader(path):
    """A function that reads a checkpoint as it is now, or refuses it."""
    whole = checkpoint.digest(checkpoint.load_checkpoint(path.parent))

    def read_checkpoint(path):
        assert checkpoint.digest(checkpoint.load_checkpoint(path.parent)) == whole

    return read_checkpoint


def read_known(path):
    meta = dict(grid=[4, 4], vocab=9, n_classes=3)
    x, mask, labels = starts.load_known_tokens(str(path), meta, [])
    assert x.shape == mask.shape == (len(labels), 16)
    assert (x[mask] < 9).all()
    assert (x[mask] >= 0).all()


def write_every_kind(folder):
    """One small valid file of each format.  ->  [(path, function that reads and checks it)]"""
    ids = np.random.default_rng(0).integers(0, 9, (6, 4, 4))
    labels = np.arange(6) % 3
    meta = meta_of(9, [4, 4], 3)
    npy = folder / "npy"
    npy.mkdir()
    np.save(npy / "val_tokens.npy", ids.astype(np.uint16))
    np.save(npy / "val_labels.npy", labels)
    (npy / "meta.json").write_text(json.dumps(meta))
    write_mnist(folder / "idx", "t10k", 3)
    write_mnist(folder / "gz", "t10k", 3, zipped=True)
    (folder / "st").mkdir()
    write_tokens(folder / "st" / "t.safetensors", ids.astype(np.int16))
    save_run(folder / "run", meta, "--n-embd", 4)
    ckpt = folder / "run" / "ckpt.pt"
    np.savez(folder / "known.npz", tokens=ids, mask=ids > 4, labels=labels)
    return [
        (npy / "val_tokens.npy", read_folder),
        (npy / "val_labels.npy", read_folder),
        (npy / "meta.json", read_folder),
        (folder / "idx" / IMAGES, read_idx),
        (folder / "gz" / f"{IMAGES}.gz", read_idx),
        (folder / "st" / "t.safetensors", read_tokens),
        (folder / "st" / "t_metadata.json", read_tokens),
        (ckpt, checkpoint_reader(ckpt)),
        (folder / "known.npz", read_known),
    ]


def test_two_thousand_spoiled_files(tmp_path, capsys):
    """Every loader reads a mutated file as what it says, or refuses it in one line."""
    targets = write_every_kind(tmp_path)
    for path, read in targets:
        read(path)      # unchanged, it can be read
    rng = random.Random(0)
    n_refused = {path: 0 for path, _ in targets}
    for i in range(2000):
        path, read = targets[i % len(targets)]
        whole = path.read_bytes()
        path.write_bytes(mutate(whole, rng))
        try:
            read(path)
        except SystemExit as error:
            assert isinstance(error.code, str)
            assert "\n" not in error.code
            assert path.parent.name in error.code
            n_refused[path] += 1
        path.write_bytes(whole)
    assert all(10 < n < 223 for n in n_refused.values()), n_refused
