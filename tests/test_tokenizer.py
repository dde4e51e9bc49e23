"""The image tokenizer: its quantiser, and the path from a folder to a run's pictures."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import TINY, refusal, script
from PIL import Image

import tokenizer
from support.canvas import text_width

SMALL = """--image-size 16 --downsample 4 --levels 3 4 --width 8 --batch-size 4 --max-iters 4
    --save-interval 2 --dtype float32""".split()


def flags_of(**values):
    return tokenizer.Flags(**values)


def make_folder(n=12, side=20):
    """Squares of random colours on white, in two classes.  -> folder"""
    rng = np.random.default_rng(0)
    for i in range(n):
        pixels = np.full((side, side, 3), 255, np.uint8)
        top, left = rng.integers(1, side // 2, 2)
        pixels[top:top + 8, left:left + 8] = rng.integers(0, 256, 3)
        path = tokenizer.Path(f"pics/{'ab'[i % 2]}/{i:02d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return "pics"


# Finite scalar quantisation


@pytest.mark.parametrize("levels", [(5, 5, 5), (8, 5), (2, 3, 4), (7,)])
def test_codes_and_ids_are_one_to_one(levels):
    """All ids, and no two with one code; each level is spaced evenly in [-1, 1]."""
    fsq = tokenizer.FSQ(levels)
    ids = torch.arange(math.prod(levels)).view(1, 1, -1)
    codes = fsq.codes(ids)
    assert torch.equal(fsq.indices(codes), ids.int())
    assert len(torch.unique(codes[0, :, 0].T, dim=0)) == ids.numel()
    expected = set(itertools.product(*[
        [round((digit - n // 2) / (n // 2), 5) for digit in range(n)] for n in levels
    ]))
    rows = codes[0, :, 0].T.tolist()
    assert {tuple(round(value, 5) for value in row) for row in rows} == expected


@pytest.mark.parametrize("n_levels", [2, 3, 4, 5, 8])
def test_every_level_is_reached_and_none_beyond(n_levels):
    fsq = tokenizer.FSQ((n_levels,))
    z = torch.linspace(-6, 6, 2001).view(1, 1, 1, -1)
    ids = fsq.indices(fsq(z))
    assert torch.equal(ids.unique(), torch.arange(n_levels).int())
    assert (ids.flatten().diff() >= 0).all()
    assert fsq.indices(fsq(torch.full((1, 1, 1, 1), 1e4))) == n_levels - 1


def test_the_gradient_passes_the_rounding():
    """That of the bounded value, tanh, over half the number of levels."""
    fsq = tokenizer.FSQ((5,))
    z = torch.tensor([0.3, -0.7]).view(1, 1, 1, 2).requires_grad_()
    fsq(z).sum().backward()
    half = 4 * 1.001 / 2
    expected = half * (1 - torch.tanh(z.detach()) ** 2) / 2
    torch.testing.assert_close(z.grad, expected)


# Networks and training


@pytest.mark.parametrize("downsample", [2, 4, 8])
def test_sizes(downsample):
    flags = flags_of(image_size=32, downsample=downsample, levels=(3, 3), width=8)
    indices, codes = tokenizer.Encoder(flags)(torch.zeros(2, 3, 32, 32))
    side = 32 // downsample
    assert indices.shape == (2, side, side)
    assert codes.shape == (2, 2, side, side)
    assert tokenizer.Decoder(flags)(indices).shape == (2, 3, 32, 32)


def test_the_loss_is_zero_for_the_picture_itself_only():
    x = torch.rand(2, 3, 8, 8)
    assert tokenizer.reconstruction_loss(x, x) == 0
    shifted = tokenizer.reconstruction_loss(x + 0.5, x)
    torch.testing.assert_close(shifted, torch.tensor(0.5 + 0.25))      # no difference changes


def test_stopped_and_resumed_equals_whole():
    """Two iterations and two more are four, bit for bit; the averages too."""
    folder = make_folder()
    for out, n_iters in (("whole", (4,)), ("parts", (2, 4))):
        for n in n_iters:       # all of them warm up, so the rates do not depend on their number
            args = [*SMALL, "--max-iters", str(n)]
            done = script("tokenizer.py", "--folder", folder, "--out-dir", out, *args)
            assert done.returncode == 0, done.stderr
    states = [torch.load(f"{out}/ckpt.pt", weights_only=True) for out in ("whole", "parts")]
    for part in ("net", "ema"):
        for name, value in states[0][part].items():
            assert torch.equal(value, states[1][part][name]), name


def test_the_words_over_reconstructions_are_whole(tmp_path):
    """However narrow the picture is."""
    path = tmp_path / "x.png"
    pixels = np.zeros((1, 70, 70, 3), np.uint8)
    tokenizer.draw_reconstructions(path, pixels, pixels)
    longest = max(map(text_width, ("above: held-out pictures", "below: reconstructed")))
    assert Image.open(path).width > longest


def test_from_a_folder_to_a_run():
    """tokenizer.py, data.py, train_ddpd.py, sample.py: the decoder comes along to the run."""
    folder = make_folder()
    commands = [
        ["tokenizer.py", "--folder", folder, "--out-dir", "tok", *SMALL],
        ["data.py", "images", "--folder", folder, "--image-size", 16, "--encoder",
         "tok/encoder.jit", "--name", "squares"],
        ["train_ddpd.py", *TINY, "--data", "squares", "--max-iters", 2, "--out-dir", "out/squares"],
        ["sample.py", "out/squares", "--n-steps", 2, "--n-video", 2],
        ["evaluate.py", "out/squares", "--n", 4, "--nfe", 4],
    ]
    for command in commands:
        done = script(*command)
        assert done.returncode == 0, done.stderr
    meta = json.loads(tokenizer.Path("data/squares/meta.json").read_text())
    assert meta["vocab"] == 12
    assert meta["grid"] == [4, 4]
    row = json.loads(tokenizer.Path("tok/log.jsonl").read_text().splitlines()[-1])
    assert row["it"] == 4
    assert row["val_psnr"] > 0
    assert Image.open("tok/reconstructions.png").height > 2 * 16
    for name in ("decoder.jit", "samples.png", "neighbours_ddpd_4.png",
                 "samples/ddpd_2_seed0/samples.png", "samples/ddpd_2_seed0/planner.gif"):
        assert tokenizer.Path("out/squares", name).exists(), name


@pytest.mark.parametrize("args, said", [
    (["--folder", "nowhere"], "no folder 'nowhere'"),
    (["--folder", "pics", "--downsample", 3], "--downsample 3 is not 2, 4, 8"),
    (["--folder", "pics", "--image-size", 18], "--image-size 18 is no multiple"),
    (["--folder", "pics", "--levels", 5, 1], "--levels 5 1: each must be at least 2"),
    (["--folder", "pics", "--width", 12], "--width 12 is no multiple of 8"),
    (["--folder", "pics", "--image-size", 64], "smaller than 64 x 64"),
    (["--folder", "empty"], "holds no pictures"),
])
def test_refusals(args, said):
    make_folder(n=4)
    tokenizer.Path("empty").mkdir(exist_ok=True)
    flags = tokenizer.config.load(tokenizer.Flags, list(map(str, args)))
    assert said in refusal(tokenizer.main, flags)


def test_another_tokenizer_is_refused():
    folder = make_folder()
    args = ["--folder", folder, "--out-dir", "tok", *SMALL]
    assert script("tokenizer.py", *args).returncode == 0
    again = script("tokenizer.py", *args, "--levels", 3, 5)
    assert again.returncode == 1
    assert "was trained with levels = [3, 4], not [3, 5]" in again.stderr
