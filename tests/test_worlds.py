"""The sources that can judge samples exactly: a bouncing sprite and mazes."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TINY, samples_of, script

from sources import bounce, maze

# Bouncing sprites


def corners_of(video):
    """Upper left corner of the sprite in each frame.  video (F, 8, 8)  ->  [(row, column)]"""
    return [bounce.place(frame)[1:] for frame in video]


def test_the_sprite_bounces():
    """One step per frame, reversed at walls; truth() continues any two frames the same way."""
    video = bounce.fly(np.array([1]), np.array([[4, 0]]), np.array([[1, 1]]), 20)
    corners = corners_of(video[0])
    assert corners[:4] == [(4, 0), (5, 1), (4, 2), (3, 3)]
    assert {bounce.place(frame)[0] for frame in video[0]} == {1}
    assert all(bounce.is_inside(np.array(corner)) for corner in corners)
    assert corners[10:] == corners[:10]     # there and back
    assert (bounce.truth(video[:, :2], 20) == video).all()


def test_bounce_holds_out_flights_that_are_not_trained_on():
    meta, parts = bounce.make(SimpleNamespace(stochastic=False))
    (_, train, _), (_, val, _) = parts
    assert meta["vocab"] == 4
    assert train.shape[1:] == (8, 8, 8)
    assert 0.08 < len(val) / len(train) < 0.13
    assert (bounce.truth(val, 8) == val).all()
    assert bounce.score(val, val)["right"].all()
    train_flights = {flight.tobytes() for flight in train}
    val_flights = {flight.tobytes() for flight in val}
    assert not val_flights & train_flights


def test_stochastic_flights_turn_at_walls_only():
    meta, parts = bounce.make(SimpleNamespace(stochastic=True))
    assert not meta["is_certain"]
    val = parts[1][1][:200]
    n_turns = 0
    for video in val:
        corners = np.array(corners_of(video))
        speeds = corners[1:] - corners[:-1]
        for f in range(6):
            if bounce.is_inside(corners[f + 1] + speeds[f]):
                assert (speeds[f + 1] == speeds[f]).all()
            else:
                n_turns += 1
                assert tuple(speeds[f + 1]) in bounce.SPEEDS
    assert n_turns > 100


def sprite_at(sprite, row, column):
    """One frame.  ->  (8, 8)"""
    return bounce.draw_frames(np.array([sprite]), np.array([[row, column]]))[0]


def test_scores_of_a_video():
    """What a broken, moved, exchanged or missing sprite counts as."""
    real = bounce.fly(np.array([0]), np.array([[1, 1]]), np.array([[0, 1]]), 6)
    made = real.copy()
    made[0, 2, 7, 7] = 3                    # one pixel too many
    made[0, 3] = sprite_at(0, 5, 5)         # somewhere else
    made[0, 4] = sprite_at(1, 1, 5)         # another sprite
    made[0, 5] = 0
    score = bounce.score(made, real)
    assert score["intact"].tolist() == [[True, True, False, True, False, False]]
    assert score["right"].tolist() == [[True, True, False, False, False, False]]
    assert score["pixels"][0, 2] == 1 / 64
    assert "right" not in bounce.score(made)


# Mazes


def picture(text):
    return np.array([["#.SG*".index(cell) for cell in line] for line in text.split()])


OPEN = """
    S........
    .#.#.#.#.
    .........
    .#.#.#.#.
    .........
    .#.#.#.#.
    .........
    .#.#.#.#.
    ........G
"""


def with_path(cells):
    """The open maze with path tokens in these cells.  ->  (9, 9)"""
    out = picture(OPEN)
    for cell in cells:
        out[cell] = maze.PATH
    return out


SHORTEST = [(row, 0) for row in range(1, 9)] + [(8, column) for column in range(1, 8)]
DETOUR = [
    *[(1, 0), (2, 0), (2, 1), (2, 2), (1, 2)],
    *[(0, column) for column in range(2, 9)],
    *[(row, 8) for row in range(1, 8)],
]


@pytest.mark.parametrize("cells, valid, shortest", [
    (SHORTEST, True, True),
    (DETOUR, True, False),
    ([*SHORTEST, (4, 1)], False, False),                    # forked
    (SHORTEST[:-2], False, False),                          # broken
    ([], False, False),
    ([*SHORTEST, (1, 2)], False, False),                    # a cell off the line
    ([*SHORTEST, (6, 1), (6, 2), (7, 2)], False, False),    # a loop
])
def test_scores_of_a_path(cells, valid, shortest):
    real = with_path(SHORTEST)[None]
    score = maze.score(with_path(cells)[None], real)
    assert score["valid"][0] == valid
    assert score["shortest"][0] == shortest


def test_changed_mazes_are_not_solved():
    """A second goal is never valid; a moved wall shows only against the real maze."""
    cheat = with_path([])
    cheat[0, 1] = maze.GOAL
    assert not maze.score(cheat[None])["valid"][0]
    real = with_path(SHORTEST)[None]
    walled = real.copy()
    walled[0, 2, 4] = maze.WALL
    assert maze.score(walled)["shortest"][0]
    assert not maze.score(walled, real)["shortest"][0]


def make_mazes(n, seed):
    rng = np.random.default_rng(seed)
    return np.stack([maze.make_maze(rng) for _ in range(n)])


def test_mazes_are_solved():
    """Mazes are distinct and show shortest paths of at least LEAST tokens; wrong() marks errors."""
    mazes = make_mazes(60, seed=3)
    assert maze.score(mazes, mazes)["shortest"].all()
    assert len(np.unique(mazes, axis=0)) == 60
    assert ((mazes == maze.START).sum((1, 2)) == 1).all()
    assert ((mazes == maze.PATH).sum((1, 2)) >= maze.LEAST).all()
    assert not maze.wrong(mazes, mazes).any()
    erased = mazes.copy()
    erased[0][erased[0] == maze.PATH] = maze.FREE
    assert maze.wrong(erased, mazes)[0].sum() == (mazes[0] == maze.PATH).sum()


# Whole runs


@pytest.fixture
def few_mazes():
    """data/maze with as many mazes as tests need."""
    folder = Path("data/maze")
    if folder.exists():
        return
    folder.mkdir(parents=True)
    mazes = make_mazes(60, seed=0).astype(np.uint16)
    for split, tokens in [("train", mazes[:40]), ("val", mazes[40:])]:
        np.save(folder / f"{split}_tokens.npy", tokens)
        np.save(folder / f"{split}_labels.npy", np.zeros(len(tokens), np.int64))
    given = [maze.WALL, maze.START, maze.GOAL]
    meta = dict(name="maze", vocab=5, grid=[9, 9], n_classes=0, class_names=[],
                palette=maze.PALETTE, given=given, score="maze")
    (folder / "meta.json").write_text(json.dumps(meta))


def succeed(*args):
    """Run a script that must exit 0.  ->  CompletedProcess"""
    done = script(*args)
    assert done.returncode == 0, done.stderr
    return done


def read_csv(*path):
    with Path(*path).open() as file:
        return list(csv.DictReader(file))


FORCING = ["--method", "forcing", "--noise-granularity", "token"]


@pytest.mark.parametrize("flags, samplers, picture", [
    (["--method", "ddpd"], ["ddpd", "ancestral", "confidence"], "planner.gif"),
    (["--method", "gidd"], ["ancestral"], "planner.gif"),
    (FORCING, ["rollout", "ancestral"], "rollout.gif"),
], ids=["ddpd", "gidd", "forcing"])
def test_a_maze_run(flags, samplers, picture, few_mazes):
    """Walls, start and goal stay as they are; every sampler that fits is judged exactly."""
    method = flags[1]
    out = f"out/{method}"
    train = [*TINY, "--data", "maze", *flags, "--max-iters", 2, "--out-dir", out]
    succeed("train_ddpd.py", *train)
    done = succeed("sample.py", out, "--n-steps", 2, "--labels", 0, 0, 0)
    assert "shortest" in done.stdout
    assert picture in done.stdout
    tokens = np.load(samples_of(out) / "samples.npz")["tokens"]
    real = np.load("data/maze/val_tokens.npy")[[0, 6, 13]]
    is_known = np.isin(real, [maze.WALL, maze.START, maze.GOAL])
    assert (tokens[is_known] == real[is_known]).all()
    assert tokens.max() < 5
    n_correct = 2 if method == "gidd" else 0
    budget = ["--nfe", 4, "--n", 6, "--correct", n_correct]
    succeed("evaluate.py", out, "--samplers", *samplers, *budget)
    rows = read_csv(out, "evaluate.csv")
    corrected = ["ancestral+correct"] if method == "gidd" else []
    assert {row["sampler"] for row in rows} == {*samplers, *corrected}
    assert all(0 <= float(row["valid"]) <= 1 for row in rows)
    assert all(row["n"] == "6" for row in rows)
    assert Path(out, "evaluate.png").exists()


def test_videos_are_judged_frame_by_frame():
    out = "out/bounce"
    train = [*TINY, "--method", "forcing", "--data", "bounce", "--batch-size", 2]
    train += ["--eval-sequences", 4, "--causal", "--max-iters", 1, "--out-dir", out]
    succeed("train_ddpd.py", *train)
    evaluate = ["evaluate.py", out, "--n", 3, "--nfe", 2]
    corrupted = ["--frames", 12, "--stabilization-level", 0.02, "--flips", 0.1]
    for flags in ([], [*corrupted, "--context-level", 0.1], ["--lag", 0]):
        done = succeed(*evaluate, *flags)
        assert "all right" in done.stdout
    rows = read_csv(out, "evaluate.csv")
    assert [float(row["nfe"]) for row in rows] == [124, 20, 121]
    assert [row["steps"] for row in rows] == ["2", "2", "11"]
    frames = read_csv(out, "frames.csv")
    assert len(frames) == 64 + 12 + 64
    assert [float(frame["right"]) for frame in frames[:2]] == [1, 1]
    assert float(frames[64]["pixels"]) > 0.03       # corrupted context is counted as it is
    refused = script(*evaluate, "--lag", 9)
    assert refused.returncode != 0
    assert "too small for --lag 9" in refused.stderr
