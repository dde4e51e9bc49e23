"""Mazes on 9x9 tokens and a shortest path in each: wall, free, start, goal, path.   Made when first used.

5x5 rooms joined by a random tree and ten more doors. Walls, start and goal are given, what is asked for is the path; of
several shortest ones the data shows any.
"""

import numpy as np

MAKES_ITSELF = True
WALL, FREE, START, GOAL, PATH = range(5)
SIDE, ROOMS, MORE_DOORS, LEAST = 9, 5, 10, 6        # LEAST: tokens between start and goal
N_TRAIN, N_VAL, SEED = 40_000, 1_000, 0
PALETTE = [[44, 48, 60], [236, 232, 222], [60, 160, 90], [210, 60, 60], [70, 130, 220]]


def folder_name(how):
    return "maze"


def neighbours(row, col):
    return [(row + i, col + j) for i, j in ((0, 1), (1, 0), (0, -1), (-1, 0))
            if 0 <= row + i < SIDE and 0 <= col + j < SIDE]


def distances(is_open, source):
    """Steps from a cell to every cell that can be reached.  is_open (9, 9) bool -> {cell: steps}"""
    found, line = {source: 0}, [source]
    for cell in line:
        for other in neighbours(*cell):
            if is_open[other] and other not in found:
                found[other] = found[cell] + 1
                line.append(other)
    return found


def one(rng):
    """A maze with its path.  -> (9, 9)"""
    is_open = np.zeros((SIDE, SIDE), bool)
    is_open[::2, ::2] = True
    doors = [(r, c) for r in range(SIDE) for c in range(SIDE) if (r + c) % 2]
    room, closed = {(r, c): (r, c) for r in range(0, SIDE, 2) for c in range(0, SIDE, 2)}, []

    def root(cell):
        while room[cell] != cell:
            cell = room[cell]
        return cell

    for i in rng.permutation(len(doors)):
        r, c = doors[i]
        a, b = [root(cell) for cell in ([(r, c - 1), (r, c + 1)] if c % 2 else [(r - 1, c), (r + 1, c)])]
        if a == b:
            closed.append((r, c))
        else:
            room[a] = b
            is_open[r, c] = True
    for i in rng.permutation(len(closed))[:MORE_DOORS]:
        is_open[closed[i]] = True
    while True:
        start, goal = (tuple(int(y) for y in 2 * rng.integers(ROOMS, size=2)) for _ in range(2))
        steps = distances(is_open, goal)
        if steps[start] > LEAST:
            break
    maze = np.where(is_open, FREE, WALL)
    cell = start
    while cell != goal:
        nearer = [n for n in neighbours(*cell) if steps.get(n) == steps[cell] - 1]
        cell = nearer[rng.integers(len(nearer))]
        maze[cell] = PATH
    maze[start], maze[goal] = START, GOAL
    return maze


def verdict(maze):
    """-> (is the path one line from start to goal, is it a shortest one)"""
    ends = [[tuple(cell) for cell in np.argwhere(maze == y).tolist()] for y in (START, GOAL)]
    if [len(e) for e in ends] != [1, 1]:
        return False, False
    on = maze >= START
    cell, goal, before, n = ends[0][0], ends[1][0], None, 1
    while cell != goal:
        after = [other for other in neighbours(*cell) if on[other] and other != before]
        if len(after) != 1:                                             # it ends or forks
            return False, False
        before, cell, n = cell, after[0], n + 1
        if n > on.sum():
            return False, False
    if n != on.sum():
        return False, False
    return True, n - 1 == distances(maze != WALL, goal)[ends[0][0]]


def score(tokens, real=None):
    """tokens (n, 9, 9)  ->  {"valid": (n,) one line from start to goal?, "shortest": (n,)}; with the real mazes both
    are False where a wall, the start or the goal was changed"""
    found = np.array([verdict(maze) for maze in tokens])
    if real is not None:
        solid = lambda y: np.where((y == PATH) | (y == FREE), FREE, y)  # noqa: E731
        found &= (solid(np.asarray(tokens)) == solid(np.asarray(real))).all((1, 2))[:, None]
    return {"valid": found[:, 0], "shortest": found[:, 1]}


def wrong(tokens, real):
    """Cells to mark in a picture: in mazes that are not solved, those that differ from the known solution."""
    return (tokens != real) & ~score(tokens, real)["shortest"][:, None, None]


def make(how):
    """-> meta, [(split, tokens (n, 9, 9), labels (n,))]"""
    meta = dict(name="maze", vocab=5, grid=[SIDE, SIDE], n_classes=0, class_names=[], palette=PALETTE,
                given=[WALL, START, GOAL], score="maze")
    print(f"making {N_TRAIN + N_VAL} mazes, about half a minute")
    rng = np.random.default_rng(SEED)
    tokens = np.stack([one(rng) for _ in range(N_TRAIN + N_VAL)])
    labels = np.zeros(len(tokens), np.int64)
    return meta, [("train", tokens[:N_TRAIN], labels[:N_TRAIN]), ("val", tokens[N_TRAIN:], labels[N_TRAIN:])]
