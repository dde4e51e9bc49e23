"""Data on disk and where it comes from: read right, or refused in one line."""

import gzip
import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, script
from safetensors.numpy import save_file

import data
import runtime
import sample
from sources import fashion_mnist, mnist, text, tokens


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data.load("digits", 8)
    return Path("data/digits")


def test_digits_are_split_once_and_for_all(folder):
    """1,797 real digits, a stratified tenth held out, memory-mapped; any other size and depth on request."""
    meta, splits = data.load("digits", 8)
    assert (len(splits["train"]), len(splits["val"]), meta["vocab"], meta["grid"]) == (1617, 180, 17, [8, 8])
    tokens, _ = splits["val"].rows([0, 1, 2])
    assert tokens.shape == (3, 64)
    counts = [int((splits["val"].labels == c).sum()) for c in range(10)]
    assert min(counts) >= 17 and max(counts) <= 19
    meta, splits = data.load("digits", 32, 4)
    assert meta["grid"] == [32, 32] and meta["vocab"] == 4 and splits["train"].rows(range(1617))[0].max() == 3
    native, _ = data.load("digits", 8)[1]["train"].rows([5])
    resized, _ = splits["train"].rows([5])
    blocks = resized.reshape(8, 4, 8, 4).mean((1, 3)) / 3
    assert abs(blocks - native.reshape(8, 8) / 16).mean() < 0.1  # the same digit


def spoil_array(name, change):
    def spoil(folder):
        array = np.load(folder / name)
        np.save(folder / name, change(array))

    return spoil


def spoil_meta(**change):
    def spoil(folder):
        path = folder / "meta.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return spoil


def put(array, index, value):
    array[index] = value
    return array


@pytest.mark.parametrize(
    "spoil, said",
    [
        (
            spoil_array("train_tokens.npy", lambda a: put(a, (7, 0, 0), 17)),
            "train_tokens.npy, row 7: token 17 is not in [0, 17)",
        ),
        (spoil_array("train_labels.npy", lambda a: put(a, 7, 10)), "row 7: label 10 is not in [0, 10)"),
        (spoil_array("train_labels.npy", lambda a: put(a, 7, -1)), "row 7: label -1 is not in [0, 10)"),
        (spoil_array("train_labels.npy", lambda a: a[:-1]), "1617 train sequences, but labels of shape (1616,)"),
        (spoil_array("train_tokens.npy", lambda a: a[:, :7]), "train_tokens.npy holds uint16 (1617, 7, 8)"),
        (spoil_array("train_tokens.npy", lambda a: a.astype(float)), "float64"),
        (spoil_array("val_tokens.npy", lambda a: a[:0]), "labels"),
        (lambda f: (f / "val_tokens.npy").write_bytes(b""), "val_tokens.npy cannot be read"),
        (
            lambda f: (f / "val_tokens.npy").write_bytes((f / "val_tokens.npy").read_bytes()[:999]),
            "val_tokens.npy cannot be read",
        ),
        (lambda f: (f / "val_tokens.npy").unlink(), "val_tokens.npy cannot be read"),
        (lambda f: (f / "meta.json").write_text("{"), "meta.json cannot be read"),
        (lambda f: (f / "meta.json").write_text('{"name": "digits"}'), "meta.json: vocab is missing"),
        (spoil_meta(name="../digits"), "meta.json: name '../digits' leaves the folder"),
        (spoil_meta(palette="/etc/passwd"), "meta.json: palette '/etc/passwd' leaves the folder"),
        (spoil_meta(class_names=[1] * 10), "class_names must be words"),
        (spoil_meta(palette=[[0, 0, 256]] * 17), "palette must name a colour"),
        (spoil_meta(n_classes=9), "class_names must name n_classes classes"),
        (spoil_meta(grid=[8, 0]), "grid [8, 0]"),
    ],
)
def test_spoiled_data_is_refused_by_file_and_row(folder, spoil, said):
    spoil(folder)
    with pytest.raises(SystemExit) as error:
        data.load("digits", 8)[1]["train"].rows(range(20))
    assert said in str(error.value) and "\n" not in str(error.value)


def refusal(call, *args):
    with pytest.raises(SystemExit) as error:
        call(*args)
    assert error.value.code not in (0, None) and "\n" not in str(error.value)
    return str(error.value)


def test_missing_data_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no data in data/mnist: make it with `python data.py mnist`" in refusal(data.load, "mnist")
    assert "no data in data/imagenet" in refusal(data.load, "imagenet")
    assert "leaves the folder" in refusal(data.load, "../other") and "leaves" in refusal(data.load, "/tmp/other")
    said = script("data.py", "mnst")
    assert said.returncode == 1 and said.stderr.strip().endswith("did you mean mnist?")


def test_data_that_is_there_is_never_replaced(tmp_path, monkeypatch):
    """Made twice: refused, or kept where another process was first, and said so."""
    monkeypatch.chdir(tmp_path)
    assert script("data.py", "digits").returncode == 0
    said = script("data.py", "digits", "--name", "digits", "--image-size", 4)
    assert said.returncode == 1 and "data/digits is there already" in said.stderr
    assert data.load("digits", 8)[0]["grid"] == [8, 8]


def test_text_is_bytes_in_windows(tmp_path, monkeypatch):
    """Side by side, the last tenth held out, every byte as its own id; no classes."""
    monkeypatch.chdir(tmp_path)
    raw = np.random.default_rng(0).integers(0, 256, 10_000).astype(np.uint8)
    Path("book.txt").write_bytes(raw.tobytes())
    meta, splits = made(text, file="book.txt", length=50)
    assert (meta["vocab"], meta["grid"], meta["n_classes"], meta["palette"]) == (256, [1, 50], 0, "text")
    assert np.array_equal(splits["train"][0].ravel(), raw[:9000]) and np.array_equal(
        splits["val"][0].ravel(), raw[9000:]
    )
    assert "too few for sequences of 5000" in refusal(lambda: made(text, file="book.txt", length=5000, name="x"))
    assert "name a text with --file" in refusal(lambda: made(text, name="x"))


# IDX files


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def write_mnist(folder, part, n, zipped=False, seed=0):
    """n random images with labels 0, 1, 2 ..."""
    folder.mkdir(exist_ok=True)
    images = np.random.default_rng(seed).integers(0, 256, (n, 28, 28))
    for what, array in [("images-idx3-ubyte", images), ("labels-idx1-ubyte", np.arange(n) % 10)]:
        raw = idx(array)
        (folder / f"{part}-{what}{'.gz' if zipped else ''}").write_bytes(gzip.compress(raw) if zipped else raw)
    return images


def made(source, **how):
    """-> meta, {split: (tokens, labels)} as data.load reads them"""
    how = data.Make(source.__name__.split(".")[-1], **how)
    folder = data.ROOT / (how.name or source.folder_name(how))
    data.make(source, folder, how)
    meta = data.read_meta(folder)
    splits = {split: data.Split(folder, split, meta) for split in ("train", "val")}
    return meta, {name: s.rows(np.arange(len(s))) for name, s in splits.items()}


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_become_padded_grey_levels(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    images = write_mnist(tmp_path / "idx", "t10k", 1200, zipped)
    meta, splits = made(mnist, folder="idx")
    assert (meta["vocab"], meta["grid"], meta["n_classes"]) == (8, [32, 32], 10)
    x, y = splits["train"]
    assert len(x) == 200 and len(splits["val"][0]) == 1000  # of t10k alone the last 1,000 are held out
    square = x.reshape(-1, 32, 32)
    assert np.array_equal(square[:, 2:-2, 2:-2], np.round(images[:200] * 7 / 255)) and (y == np.arange(200) % 10).all()
    assert square[:, :2].max() == square[:, -2:].max() == square[:, :, :2].max() == square[:, :, -2:].max() == 0
    write_mnist(tmp_path / "idx", "train", 30, zipped, seed=1)
    meta, splits = made(fashion_mnist, folder="idx", image_size=16, levels=256)
    assert len(splits["train"][0]) == 30 and len(splits["val"][0]) == 1200
    assert (meta["vocab"], meta["grid"]) == (256, [16, 16]) and meta["class_names"][9] == "ankle boot"
    mean = np.pad(images, ((0, 0), (2, 2), (2, 2))).reshape(-1, 16, 2, 16, 2).mean((2, 4))
    assert abs(splits["val"][0].reshape(-1, 16, 16) - mean).max() <= 1


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda f: (f / "t10k-labels-idx1-ubyte").unlink(), "t10k-images-idx3-ubyte without its labels"),
        (lambda f: (f / "t10k-images-idx3-ubyte").unlink(), "no t10k-images-idx3-ubyte"),
        (lambda f: (f / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(1199))), "1200 images"),
        (lambda f: (f / "t10k-labels-idx1-ubyte").write_bytes(idx(np.full(1200, 11))), "row 0: label 11 is not in"),
        (lambda f: (f / "t10k-images-idx3-ubyte").write_bytes(b""), "is no IDX file"),
        (lambda f: (f / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((9, 28, 28)))[:-1]), "has 7055 bytes"),
        (lambda f: (f / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((0, 28, 28)))), "says it holds (0, 28, 28)"),
    ],
)
def test_spoiled_idx_files_are_refused(tmp_path, monkeypatch, spoil, said):
    monkeypatch.chdir(tmp_path)
    write_mnist(tmp_path / "idx", "t10k", 1200)
    spoil(tmp_path / "idx")
    assert said in refusal(lambda: made(mnist, folder="idx"))
    assert not Path("data/mnist").exists()


def test_downloads_are_checked(tmp_path, monkeypatch):
    """Files come from the mirror once, a wrong checksum or a dead mirror is one line."""
    monkeypatch.chdir(tmp_path)
    for part, n in [("train", 20), ("t10k", 10)]:
        write_mnist(tmp_path / "mirror", part, n, zipped=True)
    mirror = f"{(tmp_path / 'mirror').as_uri()}/"
    md5 = {f.name: hashlib.md5(f.read_bytes()).hexdigest() for f in (tmp_path / "mirror").iterdir()}
    assert set(md5) == set(mnist.MD5) == set(fashion_mnist.MD5)
    folder = mnist.download("mnist", mirror, md5)
    assert len(mnist.read_pair(folder, "train")[0]) == 20
    mnist.download("mnist", "file:///nowhere/", md5)  # nothing is fetched twice
    (folder / "t10k-images-idx3-ubyte.gz").unlink()
    wrong = md5 | {"t10k-images-idx3-ubyte.gz": "0" * 32}
    assert "is not the file expected" in refusal(mnist.download, "mnist", mirror, wrong)
    assert "put the IDX files into a folder" in refusal(mnist.download, "mnist", "file:///nowhere/", md5)
    assert sorted(f.suffix for f in folder.iterdir()) == [".gz"] * 3


# Finished tokens


def write_tokens(path, indices, labels=None, total=None):
    labels = np.arange(len(indices)) % 7 if labels is None else labels
    save_file({"indices": indices, "labels": labels}, path)
    meta = {"total_samples": len(indices) if total is None else total}
    Path(str(path).replace(".safetensors", "_metadata.json")).write_text(json.dumps(meta))


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32, np.int64])
def test_token_files_are_read_as_ids(tmp_path, monkeypatch, dtype):
    """Ids to 65,535, as int16 bit patterns too; a tenth held out, no row lost, labels with their rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokens, "CHUNK", 64 * 7)  # several chunks
    ids = np.random.default_rng(0).integers(0, 2**16, (50, 8, 8))
    ids[3, 0, 0] = 2**16 - 1
    write_tokens("t.safetensors", ids.astype(np.uint16).view(np.int16) if dtype == np.int16 else ids.astype(dtype))
    meta, splits = made(tokens, file="t.safetensors", name="mine")
    assert (meta["vocab"], meta["grid"], meta["n_classes"], meta["name"]) == (2**16, [8, 8], 7, "mine")
    assert len(splits["train"][0]) == 45 and len(splits["val"][0]) == 5
    rows = {tuple(x): int(y) for x, y in zip(ids.reshape(50, 64), np.arange(50) % 7, strict=True)}
    for x, y in splits.values():
        assert all(rows.pop(tuple(a)) == b for a, b in zip(x, y, strict=True))
    assert not rows


def test_token_files_that_lie_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ids = np.full((20, 4, 4), 5, np.int32)
    ids[11, 2, 2] = 64_500

    def say(indices=ids, labels=None, total=None, **how):
        write_tokens("t.safetensors", indices, labels, total)
        return refusal(lambda: made(tokens, file="t.safetensors", **how))

    assert "20 sequences, its metadata says 21" in say(total=21)
    assert "row 11: token 64500 is not in [0, 64000)" in say(vocab=64_000)
    assert "row 0: token -1 is not in [0, " in say(-np.ones((3, 4, 4), np.int32))
    assert "do not go with labels" in say(labels=np.zeros(19, np.int64))
    assert "not integers" in say(ids.astype(np.float32))
    assert "tokenizer vqgan is not one of cosmos_di8x8" in say(tokenizer="vqgan")
    write_tokens("t.safetensors", ids)
    Path("t.safetensors").write_bytes(Path("t.safetensors").read_bytes()[:-8])
    assert "t.safetensors cannot be read" in refusal(lambda: made(tokens, file="t.safetensors"))
    assert "name the tokens with --file" in refusal(lambda: made(tokens))
    write_tokens("u.safetensors", ids)
    Path("t.safetensors").unlink(), Path("t_metadata.json").unlink()
    made(tokens, file="u.safetensors", tokenizer="cosmos_di8x8")
    assert "holds id 64500, and cosmos_di8x8 writes ids below 64000 only" in capsys.readouterr().out


def test_a_large_token_file_is_never_in_memory(tmp_path):
    """Making and reading 320 MB of tokens grows the process by a small part of that."""
    code = """
import resource, sys
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[1])
import data, sources.tokens
from safetensors.numpy import save_file
def peak_mb():
    if sys.platform == "linux":                             # ru_maxrss would be the parent's
        line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
np.zeros(2**20), save_file({"x": np.zeros(3)}, "warm")
before = peak_mb()
how = data.Make("tokens", file="t.safetensors", name="big")
data.make(sources.tokens, data.ROOT / "big", how)
meta, splits = data.load("big")
for start in range(0, len(splits["train"]) - 512, 512):
    splits["train"].rows(np.arange(start, start + 512))
print(peak_mb() - before)
"""
    n, body = 160_000, 160_000 * 1024 * 2
    header = {
        "indices": {"dtype": "I16", "shape": [n, 32, 32], "data_offsets": [0, body]},
        "labels": {"dtype": "I64", "shape": [n], "data_offsets": [body, body + 8 * n]},
    }
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with open(tmp_path / "t.safetensors", "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + body + 8 * n)
    (tmp_path / "t_metadata.json").write_text(json.dumps({"total_samples": n}))
    command = [sys.executable, "-c", code, ROOT]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 100, done.stdout


# Anything at all


def mutate(raw, rng):
    """A few bytes changed, cut out, doubled or cut off."""
    raw = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(raw) if rng.random() < 0.3 else min(len(raw), 256))
        kind = rng.random()
        if kind < 0.5:
            raw[at] = rng.randrange(256)
        elif kind < 0.65:
            del raw[at : at + rng.choice([1, 4, 64])]
        elif kind < 0.8:
            raw[at:at] = raw[max(0, at - 16) : at]
        elif kind < 0.9:
            raw[at : at + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"9999", b"null", b"[[[["])
        else:
            del raw[at:]
        if not raw:
            return b""
    return bytes(raw)


def read_folder(path):
    meta = data.read_meta(path.parent)
    split = data.Split(path.parent, "val", meta)
    x, y = split.rows(np.arange(len(split)))
    assert x.shape == (len(y), np.prod(meta["grid"])) and 0 <= x.min() <= x.max() < meta["vocab"]


def read_idx(path):
    x, y = mnist.read_pair(path.parent, "t10k")
    assert x.ndim == 3 and len(x) == len(y) and x.size


def read_tokens(path):
    meta, chunks = tokens.make(data.Make("tokens", file=str(path.parent / "t.safetensors")))
    for _, x, y in chunks:
        assert x.shape == (len(y), *meta["grid"]) and 0 <= x.min() <= x.max() < meta["vocab"]


def read_checkpoint(path):
    state = runtime.load_run(path.parent)
    assert state["it"] == 3 and torch.equal(state["w"], torch.arange(12.0))


def read_known(path):
    meta = dict(grid=[4, 4], vocab=9, n_classes=3)
    x, mask, labels = sample.load_known(str(path), meta, [])
    assert x.shape == mask.shape == (len(labels), 16) and (x[mask] < 9).all() and (x[mask] >= 0).all()


def test_two_thousand_spoiled_files(tmp_path, capsys):
    """Every loader reads a mutated file as what it says, or refuses it in one line."""
    ids = np.random.default_rng(0).integers(0, 9, (6, 4, 4))
    meta = dict(name="x", vocab=9, grid=[4, 4], n_classes=3, class_names=["a", "b", "c"], palette="grey", given=[])
    folder = tmp_path / "npy"
    folder.mkdir()
    np.save(folder / "val_tokens.npy", ids.astype(np.uint16))
    np.save(folder / "val_labels.npy", np.arange(6) % 3)
    (folder / "meta.json").write_text(json.dumps(meta))
    write_mnist(tmp_path / "idx", "t10k", 3)
    write_mnist(tmp_path / "gz", "t10k", 3, zipped=True)
    (tmp_path / "st").mkdir()
    write_tokens(tmp_path / "st" / "t.safetensors", ids.astype(np.int16))
    (tmp_path / "run").mkdir()
    runtime.save_checkpoint(tmp_path / "run", dict(it=3, w=torch.arange(12.0), name="x"))
    np.savez(tmp_path / "known.npz", tokens=ids, mask=ids > 4, labels=np.arange(6) % 3)
    targets = [
        (folder / "val_tokens.npy", read_folder),
        (folder / "val_labels.npy", read_folder),
        (folder / "meta.json", read_folder),
        (tmp_path / "idx" / "t10k-images-idx3-ubyte", read_idx),
        (tmp_path / "gz" / "t10k-images-idx3-ubyte.gz", read_idx),
        (tmp_path / "st" / "t.safetensors", read_tokens),
        (tmp_path / "st" / "t_metadata.json", read_tokens),
        (tmp_path / "run" / "ckpt.pt", read_checkpoint),
        (tmp_path / "known.npz", read_known),
    ]
    rng, refused = random.Random(0), {path: 0 for path, _ in targets}
    for i in range(2000):
        path, read = targets[i % len(targets)]
        whole = path.read_bytes()
        if i < len(targets):
            read(path)  # as it is, it can be read
        path.write_bytes(mutate(whole, rng))
        try:
            read(path)
        except SystemExit as error:
            assert isinstance(error.code, str) and "\n" not in error.code and path.parent.name in error.code
            refused[path] += 1
        path.write_bytes(whole)
    assert all(10 < n < 223 for n in refused.values()), refused
