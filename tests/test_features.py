"""Judging pictures in colour: classifier, copies, neighbours, the parts of faces."""

import contextlib
import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import meta_of, refusal, save_run
from PIL import Image

import data
import evaluate
from sources import avatars
from support import comparison, features, metrics, pictures

COLOURS = [[255, 255, 255], [200, 30, 30], [30, 60, 200], [225, 225, 225]]
SIDE = 8


def squares(n, seed):
    """Squares on white with specks of light grey, red in class 0 and blue in class 1.

    ->  tokens (n, 8, 8), labels (n,)
    """
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    tokens = 3 * (rng.random((n, SIDE, SIDE)) < 0.2)
    for picture, label in zip(tokens, labels, strict=True):
        row, column = rng.integers(SIDE - 3, size=2)
        picture[row:row + 3, column:column + 3] = 1 + label
    return tokens, labels


def make_squares(name, **change):
    """A folder of 200 squares for training and 60 held-out ones.  -> meta, splits"""
    meta = meta_of(len(COLOURS), [SIDE, SIDE], 2, palette=COLOURS, name=name) | change
    chunks = [("train", *squares(200, seed=0)), ("val", *squares(60, seed=1))]
    if not meta["n_classes"]:
        chunks = [(split, tokens, 0 * labels) for split, tokens, labels in chunks]
    source = SimpleNamespace(make=lambda options: (meta, chunks))
    data.make(source, data.ROOT / name, data.Make(name))
    return data.load(name, SIDE, 0)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Metrics of the squares, their splits."""
    folder = tmp_path_factory.getbasetemp() / "test_features"
    folder.mkdir(exist_ok=True)
    with contextlib.chdir(folder):
        meta, splits = make_squares("squares")
        return metrics.metrics_for(meta, splits), splits


def flat(tokens):
    return tokens.reshape(len(tokens), -1)


# Judges


def test_a_classifier_learns_colours(judged):
    """The CNN names the class of held-out pictures, and no other."""
    picture_metrics, splits = judged
    real, accuracy = picture_metrics.val
    assert real["features"] == "CNN"
    assert real["judge_acc"] > 0.95
    assert len(accuracy) == 2
    tokens, labels = splits["val"].rows(np.arange(60))
    swapped, _ = picture_metrics.scores(tokens, 1 - labels)
    assert swapped["judge_acc"] == pytest.approx(1 - real["judge_acc"])


def test_features_tell_noise_from_pictures(judged):
    picture_metrics, splits = judged
    real, _ = picture_metrics.val
    _, labels = splits["val"].rows(np.arange(60))
    noise = np.random.default_rng(0).integers(4, size=(60, SIDE**2))
    scores, _ = picture_metrics.scores(noise, labels)
    assert scores["frechet"] > 3 * real["frechet"]
    assert scores["precision"] < 0.2 < real["precision"]


def test_a_judge_is_kept_beside_the_data(tmp_path, monkeypatch, capsys):
    """One file for each training set: read again if it is there, refused if it is damaged."""
    monkeypatch.setattr(features, "MIN_ITERS", 3)
    monkeypatch.setattr(features, "N_EPOCHS", 0)
    tokens, labels = squares(20, seed=0)
    pixels = np.array(COLOURS)[tokens] / 255

    first = features.cnn_judge(pixels, labels, 2, tmp_path)
    assert "training a classifier of 20" in capsys.readouterr().out
    again = features.cnn_judge(pixels, labels, 2, tmp_path)
    assert not capsys.readouterr().out
    assert np.array_equal(first.features(pixels), again.features(pixels))

    [path] = tmp_path.iterdir()
    features.cnn_judge(pixels, 1 - labels, 2, tmp_path)
    features.cnn_judge(1 - pixels, labels, 2, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3

    path.write_bytes(path.read_bytes()[:1000])
    assert path.name in refusal(features.cnn_judge, pixels, labels, 2, tmp_path)


def test_pictures_without_classes_have_components(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    meta, splits = make_squares("plain", n_classes=0, class_names=[])
    picture_metrics = metrics.metrics_for(meta, splits)
    real, accuracy = picture_metrics.val
    assert real["features"] == "PCA"
    assert "judge_acc" not in real and not accuracy
    noise = np.random.default_rng(0).integers(4, size=(60, SIDE**2))
    scores, _ = picture_metrics.scores(noise, None)
    assert scores["frechet"] > 3 * real["frechet"]


def test_a_decoder_makes_pictures_of_any_tokens(tmp_path, monkeypatch):
    """Tokens without a palette, decoded to sides of 128, are judged as pictures of 64."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(features, "MIN_ITERS", 3)
    monkeypatch.setattr(features, "N_EPOCHS", 0)
    meta, splits = make_squares("coded", palette="any")
    palette = np.array(COLOURS) / 255

    def to_pixels(tokens):
        return palette[tokens.reshape(-1, SIDE, SIDE)].repeat(16, 1).repeat(16, 2)

    picture_metrics = metrics.metrics_for(meta, splits, to_pixels)
    assert picture_metrics.pixels(splits["val"].rows(np.arange(2))[0]).shape == (2, 64, 64, 3)
    assert picture_metrics.judge.name == "CNN"
    tokens, _ = splits["train"].rows(np.array([7]))
    nearest, distances = picture_metrics.nearest(tokens)
    assert np.array_equal(nearest, tokens) and distances[0] == 0


# Copies


def test_copies_are_nearer_than_held_out_pictures(judged):
    """Training pictures are copies, as they are or but for a speck; held-out ones rarely are."""
    picture_metrics, splits = judged
    real, _ = picture_metrics.val
    assert real["copies"] <= 0.04 and real["duplicates"] == 0

    tokens, labels = splits["train"].rows(np.arange(50))
    exact, _ = picture_metrics.scores(tokens, labels)
    assert exact["copies"] == exact["duplicates"] == 1

    speck = tokens.copy()
    is_white = speck[:, 0] == 0
    speck[:, 0] = np.where(is_white, 3, speck[:, 0])
    near, _ = picture_metrics.scores(speck, labels)
    assert near["duplicates"] < 0.5
    assert near["copies"] == 1


def test_the_nearest_row_is_the_nearest():
    """Among random bytes, against all distances written out."""
    rng = np.random.default_rng(0)
    a = rng.integers(256, size=(7, 12)).astype(np.uint8)
    b = rng.integers(256, size=(30, 12)).astype(np.uint8)
    squared = np.square(a[:, None].astype(float) - b).mean(2)
    index, distances = metrics.nearest_rows(a, b)
    assert np.array_equal(index, squared.argmin(1))
    assert distances == pytest.approx(np.sqrt(squared.min(1)))


def test_neighbours_are_drawn_below_their_samples(tmp_path):
    """Each column holds one pair, the sample above."""
    meta = meta_of(4, [SIDE, SIDE], 2, palette=COLOURS)
    pairs = np.array([[0, 1], [2, 3]])[:, :, None, None] + np.zeros((SIDE, SIDE), int)
    path = tmp_path / "pairs.png"
    pictures.pairs_png(path, pairs, [("a", "b")] * 2, meta)
    drawn = np.asarray(Image.open(path))
    height, width = drawn.shape[:2]
    for column in range(2):
        for row in range(2):
            y = height * (2 * row + 1) // 4 + 10
            x = width * (2 * column + 1) // 4
            assert drawn[y, x].tolist() == COLOURS[2 * column + row]


def test_a_run_in_colour_is_judged(tmp_path, monkeypatch):
    """A row of evaluate.csv has the columns, and the folder the neighbours."""
    monkeypatch.chdir(tmp_path)
    meta, _ = make_squares("squares")
    save_run("out/squares", meta, "--data", "squares")
    judged = evaluate.Judged("out/squares", torch.device("cpu"))
    flags = evaluate.Flags(runs=(), n=4)
    [row] = evaluate.evaluate(judged, "ddpd", 8, 0, flags, {})
    assert {"judge_acc", "frechet", "copies", "features"} <= set(row)
    assert Path("out/squares/neighbours_ddpd_8.png").stat().st_size > 500
    comparison.plot([row], {}, Path("plot.png"))
    assert Path("plot.png").stat().st_size > 1000


# Tokens that nothing explains


def test_counts_of_tokens_are_compared(tmp_path, monkeypatch):
    """Held-out tokens are near; half of them replaced by one id are far, shuffled ones are not."""
    monkeypatch.chdir(tmp_path)
    meta, splits = make_squares("coded", palette="any")
    token_metrics = metrics.metrics_for(meta, splits)
    real, _ = token_metrics.val
    assert real["features"] == "token counts"
    tokens, labels = splits["val"].rows(np.arange(60))
    shuffled, _ = token_metrics.scores(np.random.default_rng(0).permuted(tokens, axis=1), labels)
    assert shuffled["frechet"] == pytest.approx(real["frechet"], abs=1e-3)
    biased, _ = token_metrics.scores(np.where(np.arange(SIDE**2) % 2, tokens, 3), labels)
    assert biased["frechet"] > 10 * real["frechet"]


# The parts of faces


@pytest.fixture(scope="module")
def faces():
    """-> training faces (7200, 16, 16), held-out ones (800, 16, 16)"""
    _, splits = avatars.make(None)
    return [tokens.astype(int) for _, tokens, _ in splits]


def change_part(tokens, name, change):
    """A copy of faces whose sites of one part are changed."""
    out = flat(tokens).copy()
    sites = avatars.PARTS[name]
    out[:, sites] = change(out[:, sites])
    return out.reshape(tokens.shape)


def test_parts_cover_the_grid():
    assert set(itertools.chain(*avatars.PARTS.values())) == set(range(avatars.SIZE**2))


def test_real_faces_are_valid(faces):
    """Held-out faces are, and new; training faces are, and not new."""
    train, val = faces
    held_out = avatars.validity(val, train)
    assert held_out["valid"] >= 0.97
    assert held_out["parts"] > 0.99
    assert held_out["novel"] > 0.9
    assert avatars.validity(train[:300], train) == dict(valid=1, parts=1, novel=0)


def test_a_pattern_is_known_in_any_colours():
    """Renamed colours leave a pattern as it is; one site more of a colour does not."""
    seen = np.array([[5, 5, 7], [1, 2, 3]])
    ids, _ = avatars.known_patterns(np.array([[9, 9, 4], [4, 9, 9], [3, 2, 1]]), seen)
    assert ids.tolist() == [0, -1, 1]


def test_halves_of_different_mouths_are_no_mouth(faces):
    """The left half comes from another face of the same skin."""
    train, val = faces
    skin = val[:, 8, 7]
    mixed = val.copy()
    for i in range(len(val)):
        others = np.flatnonzero(skin == skin[i])
        other = others[(np.flatnonzero(others == i)[0] + 1) % len(others)]
        mixed[i, 9:12, 4:8] = val[other, 9:12, 4:8]
    is_changed = (mixed != val).any((1, 2))
    assert is_changed.sum() > 300
    assert avatars.validity(mixed[is_changed], train)["valid"] < 0.05


@pytest.mark.parametrize("name", ["crown", "eyes", "mouth", "clothes"])
def test_random_colours_are_no_part(faces, name):
    """One pixel of a part that is drawn anew spoils nearly every face."""
    train, val = faces
    rng = np.random.default_rng(0)

    def one_pixel(sites):
        sites = sites.copy()
        rows = np.arange(len(sites))
        column = rng.integers(sites.shape[1], size=len(sites))
        sites[rows, column] = (sites[rows, column] + rng.integers(1, 96, len(sites))) % 96
        return sites

    assert avatars.validity(change_part(val, name, one_pixel), train)["valid"] < 0.05


def test_green_skin_is_not_valid(faces):
    """All patterns are known, so the colours tell: skin in the colour of clothes."""
    train, val = faces
    skin = val[:, 8, 7][:, None, None]
    green = np.where(val == skin, 1, val)
    scores = avatars.validity(green, train)
    assert scores["parts"] > 0.9
    assert scores["valid"] == 0 and "novel" not in scores


def test_skin_goes_on_across_parts(faces):
    """Skin of two colours, each part in order: no such face is valid, and most joints tell.

    Not all do: long hair may cover the forehead, and beards are darker skin.
    """
    train, val = faces
    skin = val[:, 8, 7][:, None, None]
    is_above = np.arange(16)[:, None] < 8
    two_colours = np.where(is_above & (val == skin), 0, val)
    scores = avatars.validity(two_colours, train)
    assert scores["parts"] > 0.95
    assert scores["valid"] < 0.02
    sites = avatars.JOINTS["skin"]
    ids, _ = avatars.known_patterns(flat(two_colours)[:, sites], flat(train)[:, sites])
    assert (ids >= 0).mean() < 0.4


def test_most_hair_goes_on_across_parts(faces):
    """A crown in another colour than the hair below is a hat, or a mistake that the joint tells."""
    train, val = faces
    hair = val[:, 3, 2]
    is_long = (hair != 95) & (hair == val[:, 4, 2]) & (hair != val[:, 8, 7])
    faces_long = val[is_long]
    is_above = np.arange(16)[:, None] < 4
    is_crown = is_above & (faces_long == hair[is_long][:, None, None])
    two_colours = np.where(is_crown, 0, faces_long)
    sites = avatars.JOINTS["hair"]
    ids, _ = avatars.known_patterns(flat(two_colours)[:, sites], flat(train)[:, sites])
    assert (ids >= 0).mean() < 0.7
    whole, _ = avatars.known_patterns(flat(faces_long)[:, sites], flat(train)[:, sites])
    assert (whole >= 0).mean() > 0.98


def test_clothes_may_be_changed(faces):
    """Clothes of another face of the same skin, with no hair over them, make new valid faces."""
    train, _ = faces
    is_plain = (train[:, 12:, [0, 1, 14, 15]] == 95).all((1, 2))
    shirts = train[is_plain][:400]
    skin = shirts[:, 8, 7]
    dressed = shirts.copy()
    for colour in np.unique(skin):
        mine = np.flatnonzero(skin == colour)
        dressed[mine, 12:] = shirts[np.roll(mine, 1), 12:]
    scores = avatars.validity(dressed, train)
    assert scores["valid"] > 0.8
    assert scores["novel"] > 0.8


def test_shuffled_pixels_are_no_face(faces):
    train, val = faces
    shuffled = np.random.default_rng(0).permuted(flat(val), axis=1).reshape(val.shape)
    scores = avatars.validity(shuffled, train)
    assert scores["valid"] == 0
    assert scores["parts"] < 0.01


def test_validity_is_found_for_faces_alone():
    """By the name of the data; other pictures of that name are judged without it."""
    made_of = dict(name="avatars", grid=[16, 16])
    assert metrics.find_validity(made_of) is avatars.validity
    assert metrics.find_validity(made_of | {"grid": [32, 32]}) is None
    for name in ("digits", "images", "squares", "no.name"):
        assert metrics.find_validity(dict(name=name, grid=[16, 16])) is None
