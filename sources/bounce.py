"""Video: one of three 3x3 sprites bounces between the walls of an 8x8 frame (made on first use).

All 660 distinct flights of 8 frames, a tenth held out. `python data.py bounce --stochastic` makes
data/bounce_stochastic instead: 20,000 flights with a new velocity drawn at every wall.
"""

import itertools

import numpy as np

MAKES_ITSELF = True
SIDE = 8
FRAMES = 8
SPRITE_SIDE = 3
SPRITES = np.array([
    [[1, 1, 1],
     [1, 2, 2],
     [1, 2, 3]],
    [[2, 3, 2],
     [3, 3, 3],
     [1, 3, 1]],
    [[3, 1, 2],
     [3, 2, 2],
     [3, 3, 3]],
])
ROOM = SIDE - SPRITE_SIDE       # largest row and column of a sprite's upper left corner
CORNERS = np.array(list(itertools.product(range(ROOM + 1), repeat=2)))      # (36, 2)
SPEEDS = [                      # pixels per frame, (down, right)
    speed for speed in itertools.product((-1, 0, 1), repeat=2) if speed != (0, 0)
]
N_STOCHASTIC = 20_000
VAL_SHARE = 0.1
SEED = 0
# far from the orange, red, blue and purple of marks on pictures
PALETTE = [[16, 18, 28], [240, 236, 220], [214, 84, 190], [60, 170, 120]]


def folder_name(options) -> str:
    return "bounce_stochastic" if options.stochastic else "bounce"


# Flights


def draw_frames(sprite: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """Frames with one sprite each, its upper left corner at (row, column).

    sprite (n,), corner (n, 2)  ->  (n, 8, 8)
    """
    n = len(sprite)
    frames = np.zeros((n, SIDE, SIDE), np.int64)
    for i, j in itertools.product(range(SPRITE_SIDE), repeat=2):
        rows = corner[:, 0] + i
        columns = corner[:, 1] + j
        frames[np.arange(n), rows, columns] = SPRITES[sprite, i, j]
    return frames


def fly(
    sprite: np.ndarray,
    corner: np.ndarray,
    speed: np.ndarray,
    n_frames: int,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """The first n_frames of flights. With rng, a new velocity is drawn at every wall.

    sprite (n,), corner (n, 2), speed (n, 2)  ->  (n, n_frames, 8, 8)
    """
    frames = []
    for _ in range(n_frames):
        frames.append(draw_frames(sprite, corner))
        speed = bounce_off(corner, speed, rng)
        corner = corner + speed
    return np.stack(frames, 1)


def bounce_off(
    corner: np.ndarray, speed: np.ndarray, rng: np.random.Generator | None
) -> np.ndarray:
    """Reverse each velocity component that would leave the frame, or redraw the velocity with rng.

    corner, speed (n, 2)  ->  speed (n, 2)
    """
    hits_wall = (corner + speed < 0) | (corner + speed > ROOM)              # (n, 2)
    speed = np.where(hits_wall, -speed, speed)
    if rng is not None:
        for i in np.flatnonzero(hits_wall.any(1)):
            possible = [v for v in SPEEDS if is_inside(corner[i] + v)]
            speed[i] = possible[rng.integers(len(possible))]
    return speed


def is_inside(corner: np.ndarray) -> bool:
    """Is a sprite with this corner (2,) whole?"""
    return bool(((0 <= corner) & (corner <= ROOM)).all())


# Scores


def locate_every_sprite() -> dict[bytes, tuple[int, int, int]]:
    """Bytes of each possible frame -> (sprite, row, column)."""
    located = {}
    for sprite in range(len(SPRITES)):
        frames = draw_frames(np.full(len(CORNERS), sprite), CORNERS)
        for frame, (row, column) in zip(frames, CORNERS.tolist(), strict=True):
            located[frame.tobytes()] = (sprite, row, column)
    return located


LOCATION = locate_every_sprite()


def place(frame: np.ndarray) -> tuple[int, int, int] | None:
    """Which sprite stands where.

    frame (8, 8)  ->  (sprite, row, column), None unless the frame is exactly one whole sprite
    """
    return LOCATION.get(np.asarray(frame, np.int64).tobytes())


def truth(tokens: np.ndarray, n_frames: int) -> np.ndarray:
    """Continue the flights that the first two frames begin.

    tokens (n, at least 2, 8, 8)  ->  (n, n_frames, 8, 8)
    """
    first = np.array([place(frame) for frame in tokens[:, 0]])              # (n, 3)
    second = np.array([place(frame) for frame in tokens[:, 1]])
    sprite = first[:, 0]
    speed = second[:, 1:] - first[:, 1:]
    continued = fly(sprite, second[:, 1:], speed, n_frames - 1)
    return np.concatenate([tokens[:, :1], continued], 1)


def score(tokens: np.ndarray, real: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Judge each frame.  tokens (n, F, 8, 8)  ->  arrays (n, F)

    intact: is it one whole sprite, the one of the first frame?
    With the real frames also right: is it exactly the real frame? and pixels: share of wrong ones.
    """
    scores = {"intact": np.array([is_intact(video) for video in tokens])}
    if real is not None:
        differs = (tokens != real).reshape(*tokens.shape[:2], -1)           # (n, F, 64)
        scores["right"] = ~differs.any(-1)
        scores["pixels"] = differs.mean(-1)
    return scores


def is_intact(video: np.ndarray) -> list[bool]:
    """For each frame: does it show exactly the sprite of the first frame?  (F, 8, 8)  ->  F"""
    places = [place(frame) for frame in video]
    if places[0] is None:
        return [False] * len(places)
    sprite = places[0][0]
    return [found is not None and found[0] == sprite for found in places]


def wrong(tokens: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Cells to mark in a picture.  tokens, real (n, F, 8, 8)  ->  bool"""
    return tokens != real


# The data


def make(options) -> tuple[dict, list]:
    """Videos in random order.  ->  meta, [(split, tokens (n, 8, 8, 8), labels (n,))]"""
    rng = np.random.default_rng(SEED)
    if options.stochastic:
        tokens = stochastic_flights(rng)
    else:
        tokens = distinct_flights(rng)
    labels = np.zeros(len(tokens), np.int64)
    n_val = int(len(tokens) * VAL_SHARE)
    meta = {
        "name": folder_name(options),
        "vocab": 4,
        "grid": [FRAMES, SIDE, SIDE],
        "n_classes": 0,
        "class_names": [],
        "palette": PALETTE,
        "given": [],
        "score": "bounce",
        "is_certain": not options.stochastic,
    }
    return meta, [
        ("train", tokens[n_val:], labels[n_val:]),
        ("val", tokens[:n_val], labels[:n_val]),
    ]


def initial_states() -> np.ndarray:
    """Every (sprite, index of corner, index of speed).  ->  (864, 3)"""
    indices = (range(len(SPRITES)), range(len(CORNERS)), range(len(SPEEDS)))
    return np.array(list(itertools.product(*indices)))


def fly_from(states: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
    """The flights from initial states (n, 3)  ->  (n, 8, 8, 8)"""
    corner = CORNERS[states[:, 1]]
    speed = np.array(SPEEDS)[states[:, 2]]
    return fly(states[:, 0], corner, speed, FRAMES, rng)


def distinct_flights(rng: np.random.Generator) -> np.ndarray:
    """Each flight once: a state that heads out of the frame is the same flight as its reflection.

    ->  (660, 8, 8, 8)
    """
    states = initial_states()
    states = states[rng.permutation(len(states))]       # np.unique sorts; rng must advance
    tokens = np.unique(fly_from(states), axis=0)
    return tokens[rng.permutation(len(tokens))]


def stochastic_flights(rng: np.random.Generator) -> np.ndarray:
    """Flights from random states with a new velocity at every wall.  ->  (20000, 8, 8, 8)"""
    states = initial_states()
    sampled = states[rng.integers(len(states), size=N_STOCHASTIC)]
    return fly_from(sampled, rng)
