"""Pictures through an encoder: tokens as it gives them, refused in one line where they are bad."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from sources import images
from support import render, validate


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
    meta = data.read_meta(data.ROOT / "made")
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
    """Each id as a grey 8x8 patch."""

    def __init__(self, largest: int = 2**31):
        super().__init__()
        self.largest = largest

    def forward(self, ids):
        assert int(ids.max()) < self.largest
        grey = (ids.float() / 100 - 1).to(torch.bfloat16)
        patches = grey.repeat_interleave(8, 1).repeat_interleave(8, 2)
        return patches[:, None].expand(-1, 3, -1, -1)


def test_decoder_travels_and_a_changed_one_is_refused(tmp_path):
    torch.jit.script(Decoder()).save("decoder.jit")
    meta, _ = make(CosmosLike(), vocab=64_000)
    run = tmp_path / "run"
    run.mkdir()
    data.copy_kept_files(data.ROOT / "made", run, meta)
    decoder = validate.find_decoder("", run, meta, "cpu")
    pictures = render.pictures(np.full((1, 32, 32), 200), meta, decoder)
    assert pictures.shape == (1, 256, 256, 3) and (pictures == 255).all()
    with open(run / "decoder.jit", "ab") as file:
        file.write(b"more")
    with pytest.raises(SystemExit, match=r"decoder\.jit has changed"):
        validate.find_decoder("", run, meta, "cpu")
    (run / "decoder.jit").unlink()
    with pytest.raises(SystemExit, match="missing"):
        validate.find_decoder("", run, meta, "cpu")


def test_decoder_of_another_vocabulary_is_refused():
    torch.jit.script(Decoder(100)).save("decoder.jit")
    with pytest.raises(SystemExit, match="cannot decode tokens of vocabulary 300"):
        make(CosmosLike(), vocab=300)


@pytest.mark.parametrize("entry", [
    "decoder.jit",
    {"file": "../decoder.jit", "sha256": "0" * 64},
    {"file": "decoder.jit", "sha256": "0" * 63},
])
def test_meta_names_a_plain_file_and_its_digest(entry):
    meta, _ = make(CosmosLike(), vocab=300)
    assert data.meta_error(meta) == ""
    assert data.meta_error(meta | {"decoder": entry}).startswith("decoder")
