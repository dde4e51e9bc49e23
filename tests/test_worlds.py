"""The sources that know what is right: a bouncing sprite and mazes."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TINY, script

from sources import bounce, maze


def test_the_sprite_bounces():
    """One step per frame, turning round where it would leave; the truth of any two frames goes on like that."""
    video = bounce.fly(np.array([1]), np.array([[4, 0]]), np.array([[1, 1]]), 20)
    corners = [bounce.place(frame)[1:] for frame in video[0]]
    assert corners[:4] == [(4, 0), (5, 1), (4, 2), (3, 3)] and {bounce.place(f)[0] for f in video[0]} == {1}
    assert all(0 <= r <= bounce.ROOM and 0 <= c <= bounce.ROOM for r, c in corners)
    assert corners[10:] == corners[:10]  # there and back
    assert (bounce.truth(video[:, :2], 20) == video).all()
    meta, parts = bounce.make(SimpleNamespace(stochastic=False))
    (_, train, _), (_, val, _) = parts
    assert meta["vocab"] == 4 and train.shape[1:] == (8, 8, 8) and 0.08 < len(val) / len(train) < 0.13
    assert (bounce.truth(val, 8) == val).all() and bounce.score(val, val)["right"].all()
    assert not {v.tobytes() for v in val} & {t.tobytes() for t in train}


def test_stochastic_flights_turn_at_walls_only():
    meta, parts = bounce.make(SimpleNamespace(stochastic=True))
    video = parts[1][1][:200]
    corners = np.array([[bounce.place(frame)[1:] for frame in row] for row in video])
    speed, turned = corners[:, 1:] - corners[:, :-1], 0
    for row in range(len(video)):
        for f in range(6):
            next_corner = corners[row, f + 1] + speed[row, f]
            if ((0 <= next_corner) & (next_corner <= bounce.ROOM)).all():
                assert (speed[row, f + 1] == speed[row, f]).all()
            else:
                turned += 1
                assert tuple(speed[row, f + 1]) in bounce.SPEEDS
    assert turned > 100 and not meta["is_certain"]


def test_scores_of_a_video():
    """Broken, moved, another sprite's or missing: what each counts as."""
    real = bounce.fly(np.array([0]), np.array([[1, 1]]), np.array([[0, 1]]), 6)
    made = real.copy()
    made[0, 2, 7, 7] = 3  # one pixel too many
    made[0, 3] = bounce.draw(np.array([0]), np.array([[5, 5]]))[0]  # somewhere else
    made[0, 4] = bounce.draw(np.array([1]), np.array([[1, 5]]))[0]  # another sprite
    made[0, 5] = 0
    score = bounce.score(made, real)
    assert score["intact"].tolist() == [[True, True, False, True, False, False]]
    assert score["right"].tolist() == [[True, True, False, False, False, False]]
    assert score["pixels"][0, 2] == 1 / 64 and "right" not in bounce.score(made)


def picture(text):
    return np.array([["#.SG*".index(c) for c in line] for line in text.split()])


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


def drawn(cells):
    out = picture(OPEN)
    for cell in cells:
        out[cell] = maze.PATH
    return out


def test_verdicts_on_mazes():
    """Shortest, longer, forked, broken, with a loop, or cheated."""
    down = [(r, 0) for r in range(1, 9)] + [(8, c) for c in range(1, 8)]
    detour = [(1, 0), (2, 0), (2, 1), (2, 2), (1, 2), (0, 2), *((0, c) for c in range(3, 9))]
    detour = detour + [(r, 8) for r in range(1, 8)]
    real = np.stack([drawn(down)])
    for cells, valid, shortest in [
        (down, True, True),
        (detour, True, False),
        ([*down, (4, 1)], False, False),
        (down[:-2], False, False),
        ([], False, False),
        ([*down, (1, 2)], False, False),
        ([*down, (6, 1), (6, 2), (7, 2)], False, False),
    ]:
        score = maze.score(drawn(cells)[None], real)
        assert (score["valid"][0], score["shortest"][0]) == (valid, shortest), cells
    cheat = drawn([])
    cheat[0, 1] = maze.GOAL
    assert not maze.score(cheat[None])["valid"][0]
    walled = drawn(down)
    walled[2, 4] = maze.WALL  # another maze, solved
    assert maze.score(walled[None])["shortest"][0] and not maze.score(walled[None], real)["shortest"][0]


def test_mazes_are_solved():
    rng = np.random.default_rng(3)
    mazes = np.stack([maze.one(rng) for _ in range(60)])
    assert maze.score(mazes, mazes)["shortest"].all() and len(np.unique(mazes, axis=0)) == 60
    assert ((mazes == maze.START).sum((1, 2)) == 1).all() and ((mazes == maze.PATH).sum((1, 2)) >= maze.LEAST).all()
    other = mazes.copy()
    other[0][other[0] == maze.PATH] = maze.FREE
    assert maze.wrong(other, mazes)[0].sum() == (mazes[0] == maze.PATH).sum() and not maze.wrong(mazes, mazes).any()


@pytest.fixture
def few_mazes():
    """data/maze with few mazes: as many as tests need."""
    if not Path("data/maze").exists():
        Path("data/maze").mkdir(parents=True)
        rng = np.random.default_rng(0)
        mazes = np.stack([maze.one(rng) for _ in range(60)]).astype(np.uint16)
        for split, tokens in [("train", mazes[:40]), ("val", mazes[40:])]:
            np.save(f"data/maze/{split}_tokens.npy", tokens)
            np.save(f"data/maze/{split}_labels.npy", np.zeros(len(tokens), np.int64))
        meta = dict(name="maze", vocab=5, grid=[9, 9], n_classes=0, class_names=[], palette=maze.PALETTE)
        meta |= dict(given=[maze.WALL, maze.START, maze.GOAL], score="maze")
        Path("data/maze/meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("flags", ["", "--method gidd", "--method forcing --level-group token"])
def test_a_maze_run(flags, few_mazes):
    """Walls, start and goal stay as they are; every sampler that fits is judged exactly."""
    out = f"out/{flags.split()[1] if flags else 'ddpd'}"
    done = script("train_ddpd.py", *TINY, "--data", "maze", *flags.split(), "--max-iters", 2, "--out-dir", out)
    assert done.returncode == 0, done.stderr
    done = script("sample.py", out, "--n-steps", 2, "--labels", 0, 0, 0)
    assert done.returncode == 0, done.stderr
    assert "shortest" in done.stdout and ("rollout.gif" if "forcing" in out else "planner.gif") in done.stdout
    tokens, real = np.load(f"{out}/samples.npz")["tokens"], np.load("data/maze/val_tokens.npy")[[0, 6, 12]]
    given = np.isin(real, [maze.WALL, maze.START, maze.GOAL])
    assert (tokens[given] == real[given]).all() and tokens.max() < 5
    names = {"ddpd": "ddpd ancestral confidence", "gidd": "ancestral", "forcing": "rollout ancestral"}[out[4:]].split()
    done = script(
        "evaluate.py", out, "--samplers", *names, "--nfe", 4, "--n-samples", 6, "--correct", 2 * ("gidd" in out)
    )
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(Path(out, "evaluate.csv").open()))
    assert {row["sampler"] for row in rows} == {*names, *(["ancestral+correct"] if "gidd" in out else [])}
    assert all(0 <= float(row["valid"]) <= 1 and row["n"] == "6" for row in rows)
    assert Path(out, "evaluate.png").exists()


def test_videos_are_judged_frame_by_frame():
    out = "out/bounce"
    flags = ["--method", "forcing", "--data", "bounce", "--batch-size", 2, "--eval-sequences", 4, "--causal"]
    done = script("train_ddpd.py", *TINY, *flags, "--max-iters", 1, "--out-dir", out)
    assert done.returncode == 0, done.stderr
    evaluate = ["evaluate.py", out, "--n-samples", 3, "--nfe", 2]
    for more in ([], ["--frames", 12, "--stabilise", 0.02, "--flips", 0.1, "--context-level", 0.1], ["--lag", 0]):
        done = script(*evaluate, *more)
        assert done.returncode == 0, done.stderr
        assert "sequences exactly right" in done.stdout
    rows = list(csv.DictReader(Path(out, "evaluate.csv").open()))
    assert [float(r["nfe"]) for r in rows] == [124, 20, 121] and [r["steps"] for r in rows] == [
        "2",
        "2",
        "11",
    ]
    frames = list(csv.DictReader(Path(out, "frames.csv").open()))
    assert len(frames) == 64 + 12 + 64 and [float(f["right"]) for f in frames[:2]] == [1, 1]
    assert float(frames[64]["pixels"]) > 0.03  # flipped context is counted as it is
    refused = script(*evaluate, "--lag", 9)
    assert refused.returncode != 0 and "too small for --lag 9" in refused.stderr
