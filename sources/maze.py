"""Mazes on 9x9 tokens and a shortest path: wall, free, start, goal, path (made on first use).

5x5 rooms are joined by a random spanning tree and ten more doors. Walls, start and goal are known
and the path is to be generated; if there are several shortest paths, the data shows one at random.
"""

import numpy as np

MAKES_ITSELF = True
WALL, FREE, START, GOAL, PATH = range(5)
SIDE = 9
ROOMS = 5               # rooms per side, at even rows and columns
MORE_DOORS = 10         # doors beyond the spanning tree
LEAST = 6               # fewest tokens between start and goal
N_TRAIN = 40_000
N_VAL = 1_000
SEED = 0
# wall, free, start, goal, path; far from the orange, red, blue and purple of marks on pictures
PALETTE = [[40, 42, 46], [236, 232, 222], [20, 110, 60], [214, 84, 190], [110, 200, 170]]

Cell = tuple[int, int]      # (row, column)


def folder_name(options) -> str:
    return "maze"


# Making a maze


def neighbours(row: int, column: int) -> list[Cell]:
    """The cells to the right, below, to the left and above, where they exist."""
    cells = []
    for down, right in ((0, 1), (1, 0), (0, -1), (-1, 0)):
        is_row = 0 <= row + down < SIDE
        is_column = 0 <= column + right < SIDE
        if is_row and is_column:
            cells.append((row + down, column + right))
    return cells


def distances(is_open: np.ndarray, source: Cell) -> dict[Cell, int]:
    """Breadth-first search from a cell.  is_open (9, 9) bool  ->  {reachable cell: steps}"""
    steps = {source: 0}
    queue = [source]
    for cell in queue:
        for other in neighbours(*cell):
            if is_open[other] and other not in steps:
                steps[other] = steps[cell] + 1
                queue.append(other)
    return steps


def make_maze(rng: np.random.Generator) -> np.ndarray:
    """A maze with a shortest path.  ->  (9, 9)"""
    is_open = open_doors(rng)
    start, goal, steps = draw_ends(is_open, rng)
    maze = np.where(is_open, FREE, WALL)
    cell = start
    while cell != goal:
        nearer = [other for other in neighbours(*cell) if steps.get(other) == steps[cell] - 1]
        cell = nearer[rng.integers(len(nearer))]
        maze[cell] = PATH
    maze[start] = START
    maze[goal] = GOAL
    return maze


def open_doors(rng: np.random.Generator) -> np.ndarray:
    """Join the rooms by a random spanning tree (Kruskal) and MORE_DOORS more doors.

    ->  is_open (9, 9) bool
    """
    is_open = np.zeros((SIDE, SIDE), bool)
    is_open[::2, ::2] = True
    rooms = [(row, column) for row in range(0, SIDE, 2) for column in range(0, SIDE, 2)]
    doors = [(row, column) for row in range(SIDE) for column in range(SIDE) if (row + column) % 2]
    parent = {room: room for room in rooms}     # union-find: joined rooms share a root
    closed = []
    for i in rng.permutation(len(doors)):
        one_room, other_room = rooms_beside(doors[i])
        one_root = find_root(parent, one_room)
        other_root = find_root(parent, other_room)
        if one_root == other_root:
            closed.append(doors[i])
        else:
            parent[one_root] = other_root
            is_open[doors[i]] = True
    for i in rng.permutation(len(closed))[:MORE_DOORS]:
        is_open[closed[i]] = True
    return is_open


def rooms_beside(door: Cell) -> tuple[Cell, Cell]:
    """The two rooms that a door joins."""
    row, column = door
    if column % 2:
        return (row, column - 1), (row, column + 1)
    return (row - 1, column), (row + 1, column)


def find_root(parent: dict[Cell, Cell], room: Cell) -> Cell:
    while parent[room] != room:
        room = parent[room]
    return room


def draw_ends(is_open: np.ndarray, rng: np.random.Generator) -> tuple[Cell, Cell, dict[Cell, int]]:
    """Two rooms with at least LEAST tokens between them.

    is_open (9, 9)  ->  start, goal, {cell: steps to the goal}
    """
    while True:
        start = draw_room(rng)
        goal = draw_room(rng)
        steps = distances(is_open, goal)
        if steps[start] > LEAST:
            return start, goal, steps


def draw_room(rng: np.random.Generator) -> Cell:
    row, column = 2 * rng.integers(ROOMS, size=2)
    return int(row), int(column)


# Scores


def path_validity(maze: np.ndarray) -> tuple[bool, bool]:
    """Is the path a single line from start to goal, and is it a shortest one?  maze (9, 9)"""
    starts = cells_of(maze, START)
    goals = cells_of(maze, GOAL)
    if len(starts) != 1 or len(goals) != 1:
        return False, False
    start = starts[0]
    goal = goals[0]
    on_path = maze >= START
    n_cells = follow_path(on_path, start, goal)
    if n_cells is None or n_cells != on_path.sum():        # the sum also counts cells off the line
        return False, False
    steps = distances(maze != WALL, goal)
    return True, n_cells - 1 == steps[start]


def cells_of(maze: np.ndarray, token: int) -> list[Cell]:
    return [tuple(cell) for cell in np.argwhere(maze == token).tolist()]


def follow_path(on_path: np.ndarray, start: Cell, goal: Cell) -> int | None:
    """Cells on the line from start to goal, both counted; None if it ends, forks or loops.

    on_path (9, 9) bool: path, start and goal
    """
    n_path = on_path.sum()
    n_cells = 1
    before = None
    cell = start
    while cell != goal:
        after = [other for other in neighbours(*cell) if on_path[other] and other != before]
        if len(after) != 1:
            return None
        before = cell
        cell = after[0]
        n_cells += 1
        if n_cells > n_path:
            return None
    return n_cells


def score(tokens: np.ndarray, real: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Judge each maze.  tokens (n, 9, 9)  ->  {"valid": (n,) bool, "shortest": (n,) bool}

    valid: the path is a single line from start to goal. With the real mazes, both are False where
    a wall, the start or the goal was changed.
    """
    verdicts = np.array([path_validity(maze) for maze in tokens])           # (n, 2)
    if real is not None:
        is_same = without_path(tokens) == without_path(real)
        verdicts &= is_same.all((1, 2))[:, None]
    return {"valid": verdicts[:, 0], "shortest": verdicts[:, 1]}


def without_path(mazes: np.ndarray) -> np.ndarray:
    """Mazes (n, 9, 9) with path cells set free."""
    mazes = np.asarray(mazes)
    return np.where(mazes == PATH, FREE, mazes)


def wrong(tokens: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Cells to mark in a picture: where an unsolved maze differs from the known solution.

    tokens, real (n, 9, 9)  ->  (n, 9, 9) bool
    """
    is_unsolved = ~score(tokens, real)["shortest"]
    return (tokens != real) & is_unsolved[:, None, None]


# The data


def make(options) -> tuple[dict, list]:
    """->  meta, [(split, tokens (n, 9, 9), labels (n,))]"""
    meta = {
        "name": "maze",
        "vocab": 5,
        "grid": [SIDE, SIDE],
        "n_classes": 0,
        "class_names": [],
        "palette": PALETTE,
        "given": [WALL, START, GOAL],
        "score": "maze",
    }
    n = N_TRAIN + N_VAL
    print(f"making {n} mazes, about half a minute")
    rng = np.random.default_rng(SEED)
    tokens = np.stack([make_maze(rng) for _ in range(n)])
    labels = np.zeros(n, np.int64)
    return meta, [
        ("train", tokens[:N_TRAIN], labels[:N_TRAIN]),
        ("val", tokens[N_TRAIN:], labels[N_TRAIN:]),
    ]
