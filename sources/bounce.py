"""Video: one of three 3x3 sprites flies over an 8x8 frame with elastic walls, 8 frames.   Made when first used.

All 660 flights there are, a tenth held out. python data.py bounce --stochastic: a new velocity at every wall instead,
and 20,000 flights (data/bounce_stochastic).
"""

import itertools

import numpy as np

MAKES_ITSELF = True
SIDE, FRAMES = 8, 8
SPRITES = np.array([[[1, 1, 1], [1, 2, 2], [1, 2, 3]], [[2, 3, 2], [3, 3, 3], [1, 3, 1]],
                    [[3, 1, 2], [3, 2, 2], [3, 3, 3]]])
SPEEDS = [v for v in itertools.product((-1, 0, 1), repeat=2) if v != (0, 0)]     # pixels per frame, (down, right)
ROOM = SIDE - 3                         # the largest row and column of a sprite's corner
N_STOCHASTIC, VAL_SHARE, SEED = 20_000, 0.1, 0
PALETTE = [[16, 18, 28], [240, 200, 80], [220, 80, 90], [90, 170, 240]]


def folder_name(how):
    return "bounce_stochastic" if how.stochastic else "bounce"


def draw(sprite, corner):
    """Frames with a sprite's upper left corner at (row, column).  sprite (n,), corner (n, 2) -> (n, 8, 8)"""
    out = np.zeros((len(sprite), SIDE, SIDE), np.int64)
    for i, j in itertools.product(range(3), repeat=2):
        out[np.arange(len(sprite)), corner[:, 0] + i, corner[:, 1] + j] = SPRITES[sprite, i, j]
    return out


def fly(sprite, corner, speed, n_frames, rng=None):
    """n_frames of a flight. A coordinate that would leave the frame turns round first; rng: a new velocity there.

    sprite (n,), corner and speed (n, 2)  ->  (n, n_frames, 8, 8)
    """
    frames, corner, speed = [], corner.copy(), speed.copy()
    for _ in range(n_frames):
        frames.append(draw(sprite, corner))
        hits = (corner + speed < 0) | (corner + speed > ROOM)
        speed = np.where(hits, -speed, speed)
        for i in np.flatnonzero(hits.any(1)) if rng is not None else ():
            fits = [v for v in SPEEDS if ((0 <= corner[i] + v) & (corner[i] + v <= ROOM)).all()]
            speed[i] = fits[rng.integers(len(fits))]
        corner += speed
    return np.stack(frames, 1)


def truth(tokens, n_frames):
    """The flight that the first two frames begin.  tokens (n, at least 2, 8, 8) -> (n, n_frames, 8, 8)"""
    found = [[place(frame) for frame in row] for row in tokens[:, :2]]
    sprite, corner = np.array([f[0][0] for f in found]), np.array([[g[1:] for g in f] for f in found])
    speed = corner[:, 1] - corner[:, 0]
    back = fly(sprite, corner[:, 1], speed, n_frames - 1)
    return np.concatenate([tokens[:, :1], back], 1)


def place(frame):
    """Which sprite stands where.  frame (8, 8) -> (sprite, row, column), None where it is not exactly one whole one"""
    return WHERE.get(np.asarray(frame, np.int64).tobytes())


CORNERS = np.array(list(itertools.product(range(ROOM + 1), repeat=2)))
WHERE = {frame.tobytes(): (k, *corner) for k in range(len(SPRITES))
         for frame, corner in zip(draw(np.full(len(CORNERS), k), CORNERS), CORNERS.tolist(), strict=True)}


def score(tokens, real=None):
    """tokens (n, F, 8, 8)  ->  {"intact": (n, F) is this one whole sprite, that of the first frame?}; with the real
    frames also {"right": (n, F) is it this very frame?, "pixels": (n, F) share of wrong ones}"""
    found = [[place(frame) for frame in row] for row in tokens]
    out = {"intact": np.array([[f is not None and row[0] is not None and f[0] == row[0][0] for f in row]
                               for row in found])}
    if real is not None:
        differs = (tokens != real).reshape(*tokens.shape[:2], -1)
        out |= {"right": ~differs.any(-1), "pixels": differs.mean(-1)}
    return out


def wrong(tokens, real):
    """Cells to mark in a picture.  (n, F, 8, 8) -> bool"""
    return tokens != real


def make(how):
    """-> meta, [(split, tokens (n, 8, 8, 8), labels (n,))]"""
    rng = np.random.default_rng(SEED)
    flights = list(itertools.product(range(len(SPRITES)), range(len(CORNERS)), range(len(SPEEDS))))
    index = np.array(flights)[rng.integers(len(flights), size=N_STOCHASTIC) if how.stochastic
                              else rng.permutation(len(flights))]
    tokens = fly(index[:, 0], CORNERS[index[:, 1]], np.array(SPEEDS)[index[:, 2]], FRAMES,
                 rng if how.stochastic else None)
    if not how.stochastic:
        tokens = np.unique(tokens, axis=0)[rng.permutation(len(np.unique(tokens, axis=0)))]     # corners turn round
    cut, labels = int(len(tokens) * VAL_SHARE), np.zeros(len(tokens), np.int64)
    meta = dict(name=folder_name(how), vocab=4, grid=[FRAMES, SIDE, SIDE], n_classes=0, class_names=[],
                palette=PALETTE, given=[], score="bounce", is_certain=not how.stochastic)
    return meta, [("train", tokens[cut:], labels[cut:]), ("val", tokens[:cut], labels[:cut])]
