"""Pictures through an encoder: tokens as it gives them, refused in one line where they are bad."""

import io
import tarfile
from pathlib import Path

import imageio
import numpy as np
import pytest
import torch
from conftest import refusal, samples_of, script
from PIL import Image

import data
from formats import meta_file
from sources import _encoder, images
from support import pictures, validate


class CosmosLike(torch.nn.Module):
    """The mean of each 8x8 patch as an int32 id, beside codes in bfloat16."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(100.0, dtype=torch.bfloat16))

    def forward(self, x):
        means = torch.nn.functional.avg_pool2d(x * self.scale, 8).mean(1)
        ids = (means.float().round() + 100).to(torch.int32)
        return ids, x * self.scale


class StatesVocab(CosmosLike):
    def __init__(self):
        super().__init__()
        self.vocab = 300


class Floats(CosmosLike):
    def forward(self, x):
        return x.mean(1)


class Flat(CosmosLike):
    def forward(self, x):
        return torch.zeros(x.shape[0], 4, dtype=torch.int32)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Forty grey pictures, each of its own level, in F."""
    monkeypatch.chdir(tmp_path)
    Path("F").mkdir()
    for i in range(40):
        Image.new("RGB", (256, 256), (6 * i,) * 3).save(f"F/{i:02}.png")


def make(module, **options):
    torch.jit.script(module).save("encoder.jit")
    defaults = dict(folder="F", name="made", image_size=256, encoder="encoder.jit")
    data.make(images, data.ROOT / "made", data.Make("images", **(defaults | options)))
    meta = meta_file.read_meta(data.ROOT / "made")
    return meta, data.Split(data.ROOT / "made", "train", meta)


def test_tokens_are_those_of_a_cosmos_encoder():
    meta, train = make(CosmosLike(), tokenizer="cosmos_di8x8")
    assert (meta["vocab"], meta["grid"], meta["palette"]) == (64_000, [32, 32], "any")
    tokens, _ = train.rows(np.arange(len(train)))
    assert len(tokens) == 36
    assert (tokens == tokens[:, :1]).all()
    assert (np.diff(tokens[:, 0]) > 0).all()        # brighter pictures, in order
    assert tokens.min() < 20 and tokens.max() > 170     # black is -1, near-white is 0.8


def test_corrupt_pictures_are_left_out(capsys):
    Path("F/bad.png").write_bytes(b"nothing")
    _, train = make(CosmosLike(), vocab=300)
    assert len(train) == 36
    assert "1 files cannot be read and are left out: 'bad.png'" in capsys.readouterr().out


def test_vocabulary_of_the_module():
    assert make(StatesVocab())[0]["vocab"] == 300


@pytest.mark.parametrize("module, options, text", [
    (CosmosLike, {}, "--vocab"),
    (StatesVocab, {"vocab": 200}, "has a vocabulary of 300, not 200"),
    (CosmosLike, {"vocab": 50}, "its vocabulary is 50"),
    (Floats, {"vocab": 50}, "not integer ids"),
    (Flat, {"vocab": 50}, "not (n, h, w)"),
    (CosmosLike, {"vocab": 300, "palette": 4}, "exclude each other"),
    (CosmosLike, {"vocab": 300, "image_size": 4}, "cannot encode pictures"),
    (CosmosLike, {"vocab": 300, "encoder": "F/00.png"}, "is not a TorchScript file"),
    (CosmosLike, {"vocab": 300, "encoder": "none.jit"}, "no file 'none.jit'"),
    (CosmosLike, {"tokenizer": "other"}, "tokenizer other is not one of"),
])
def test_refusals(module, options, text):
    with pytest.raises(SystemExit) as error:
        make(module(), **options)
    assert text in str(error.value) and "\n" not in str(error.value)
    assert not Path("data/made").exists()


class Decoder(torch.nn.Module):
    """Each id as a grey patch."""

    def __init__(self, largest: int = 2**31, patch: int = 8):
        super().__init__()
        self.largest = largest
        self.patch = patch

    def forward(self, ids):
        assert int(ids.max()) < self.largest
        grey = (ids.float() / 100 - 1).to(torch.bfloat16)
        patches = grey.repeat_interleave(self.patch, 1).repeat_interleave(self.patch, 2)
        return patches[:, None].expand(-1, 3, -1, -1)


def test_decoder_travels_and_a_changed_one_is_refused(tmp_path):
    torch.jit.script(Decoder()).save("decoder.jit")
    meta, _ = make(CosmosLike(), vocab=64_000)
    run = tmp_path / "run"
    run.mkdir()
    meta_file.copy_kept_files(data.ROOT / "made", run, meta)
    decoder = validate.find_decoder("", run, meta, "cpu")
    shown = pictures.pictures(np.full((1, 32, 32), 200), meta, decoder)
    assert shown.shape == (1, 256, 256, 3) and (shown == 255).all()
    with open(run / "decoder.jit", "ab") as file:
        file.write(b"more")
    with pytest.raises(SystemExit, match=r"decoder\.jit has changed"):
        validate.find_decoder("", run, meta, "cpu")
    (run / "decoder.jit").unlink()
    with pytest.raises(SystemExit, match="missing"):
        validate.find_decoder("", run, meta, "cpu")


@pytest.mark.parametrize("decoder, said", [
    (Decoder(largest=100), "cannot decode tokens of vocabulary 300"),
    (Decoder(patch=4), "makes pictures of 128 x 128 pixels from those of 256 x 256"),
])
def test_decoder_of_another_tokenizer_is_refused(decoder, said):
    torch.jit.script(decoder).save("decoder.jit")
    with pytest.raises(SystemExit, match=said):
        make(CosmosLike(), vocab=300)


def test_a_stopped_command_encodes_what_is_missing(monkeypatch):
    """Killed after two chunks; the same command reads these, and other pictures start anew."""
    monkeypatch.setattr(_encoder, "N_CHUNK", 7)
    Path("F/bad.png").write_bytes(Path("F/09.png").read_bytes()[:100])      # a good header
    encode = _encoder.Encoder.encode
    encoded = []

    def encode_two_chunks(self, pixels):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(len(pixels))
        return encode(self, pixels)

    def count(self, pixels):
        encoded.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(_encoder.Encoder, "encode", encode_two_chunks)
    with pytest.raises(KeyboardInterrupt):
        make(CosmosLike(), vocab=300)
    assert not Path("data/made").exists()
    monkeypatch.setattr(_encoder.Encoder, "encode", count)
    _, resumed = make(CosmosLike(), vocab=300)
    assert sum(encoded) == 40 and len(encoded) == 7
    assert not Path("data/.made.partial").exists()
    _, at_once = make(CosmosLike(), vocab=300, name="at_once")
    index = np.arange(len(at_once))
    for one, other in zip(resumed.rows(index), at_once.rows(index), strict=True):
        assert np.array_equal(one, other)


def test_other_pictures_start_anew(capsys):
    Path("data/.made.partial").mkdir(parents=True)
    Path("data/.made.partial/key").write_text("of another command")
    Path("data/.made.partial/train_0.npz").write_bytes(b"nothing")
    assert len(make(CosmosLike(), vocab=300)[1]) == 36
    assert "and is made anew" in capsys.readouterr().out


def test_from_pictures_to_a_video_with_a_stand_in_for_cosmos():
    """32x32 tokens of 64,000 codes in int32, a decoder that gives bfloat16."""
    torch.jit.script(Decoder()).save("decoder.jit")
    make(CosmosLike(), tokenizer="cosmos_di8x8")
    train = [
        "train_ddpd.py", "--data", "made", "--n-layer", 1, "--n-head", 1, "--n-embd", 32,
        "--batch-size", 2, "--max-iters", 2, "--eval-sequences", 2, "--eval-samples", 1,
        "--patch", 2, "--out-dir", "run",
    ]
    for command in (train, ["sample.py", "run", "--n-steps", 2, "--n-video", 1, "--labels", 0]):
        done = script(*command)
        assert done.returncode == 0, done.stderr
    folder = samples_of("run")
    samples = np.load(folder / "samples.npz")["tokens"]
    assert samples.shape == (1, 32, 32) and samples.max() > 300
    frames = imageio.mimread(folder / "planner.gif")
    assert len(frames) >= 2
    picture = np.asarray(Image.open(folder / "samples.png").convert("RGB")).astype(int)
    is_white = (picture == 255).all(2)
    rows, columns = np.nonzero(is_white)
    tile = picture[rows.min():rows.max() + 1, columns.min():columns.max() + 1]
    is_grey = tile.max(2) == tile.min(2)                # tokens shown by themselves have hues
    assert is_white.mean() > 0.3 and is_grey.mean() > 0.95


# Larger files


def write_tar(name, members):
    """members: {name: bytes}"""
    with tarfile.open(name, "w") as tar:
        for member, raw in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))


def test_webdataset_tars_are_the_folder_of_their_pictures():
    """Classes by .cls files, in the order of numbers; other files are passed over."""
    Path("tars").mkdir()
    for shard in range(2):
        members = {}
        for i in range(20 * shard, 20 * shard + 20):
            members[f"./{i:02}.png"] = Path(f"F/{i:02}.png").read_bytes()
            members[f"./{i:02}.cls"] = b"10\n" if i % 2 else b"9"
            members[f"./{i:02}.json"] = b"{}"
        write_tar(f"tars/{shard}.tar", members)
    meta, train = make(CosmosLike(), vocab=300, folder="tars")
    assert meta["class_names"] == ["9", "10"]
    tokens, labels = train.rows(np.arange(len(train)))
    assert len(train) == 36
    number = np.rint(tokens[:, 0] * 255 / 1200)      # of the picture, by its level of grey
    assert (number % 2 == labels).all()


def test_tars_with_folders_of_classes_and_refusals():
    Path("tars").mkdir()
    raw = Path("F/01.png").read_bytes()
    write_tar("tars/a.tar", {f"{name}/{i}.png": raw for name in "xy" for i in range(3)})
    assert make(CosmosLike(), vocab=300, folder="tars")[0]["class_names"] == ["x", "y"]
    write_tar("tars/a.tar", {"a.txt": b"text"})
    assert "1 tars without pictures" in refusal(make, CosmosLike(), folder="tars")
    Path("tars/a.tar").write_bytes(b"not a tar")
    assert "cannot be read as an uncompressed tar" in refusal(make, CosmosLike(), folder="tars")


def test_hugging_face_datasets_on_disk():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])}
    )
    rows = {"image": [f"F/{i:02}.png" for i in range(40)], "label": [i // 20 for i in range(40)]}
    whole = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": whole}).save_to_disk("saved")
    meta, train = make(CosmosLike(), vocab=300, folder="saved")
    assert meta["class_names"] == ["dark", "light"]
    tokens, labels = train.rows(np.arange(len(train)))
    assert len(train) == 36
    assert ((tokens[:, 0] > 92) == labels).all()
    datasets.DatasetDict({"test": whole}).save_to_disk("tests")
    assert "has no split train, only test" in refusal(make, CosmosLike(), folder="tests")
