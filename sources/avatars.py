"""8,000 pixel-art faces, 16x16 pixels of 96 colours, six classes, by DiceBear (made on first use).

The style "pixel-art" is a design by DiceBear under CC0 1.0. assets/avatars.txt says how the
pictures were made; `pack` turned them into tokens, once. A face is put together from parts, so
`validity` can tell exactly whether its parts occur in the data.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from sources import images

MAKES_ITSELF = True
SIZE = 16
N_COLOURS = 96
PACKED = Path(__file__).parent.parent / "assets" / "avatars.npz"


def box(rows: range, *columns: range) -> list[int]:
    """The sites of some rows and columns, in raster order."""
    chosen = [column for part in columns for column in part]
    return [SIZE * row + column for row in rows for column in chosen]


# Where the parts of a face are; together they cover the grid
PARTS = {
    "crown": box(range(4), range(SIZE)),                            # hair or hat
    "forehead": box(range(4, 5), range(3, 13)),
    "eyes": box(range(5, 8), range(4, 12)),                         # and glasses
    "mouth": box(range(9, 12), range(4, 12)),
    "cheeks": box(range(8, 9), range(4, 12)) + box(range(11, 12), range(4, 12)),
    "temples": box(range(5, 12), range(3, 4), range(12, 13)),
    "sides": box(range(4, 13), range(3), range(13, SIZE)),          # hair and earrings
    "clothes": box(range(12, SIZE), range(3, 13)),
    "ends": box(range(12, SIZE), range(3), range(13, SIZE)),        # of hair, and shoulders
}
# Sites on both sides of the borders between parts, where hair and skin go on in one colour
JOINTS = {
    "hair": [35, 36, 50, 51, 66, 67, 82, 130, 178, 61, 93, 141, 189],
    "skin": [71, 132, 133, 99, 147, 92, 188],
}


def folder_name(options) -> str:
    return "avatars"


def make(options) -> tuple[dict, list]:
    """Unpack the tokens.  ->  meta, [(split, tokens (n, 16, 16), labels (n,))]"""
    with np.load(PACKED) as packed:
        tokens = packed["tokens"]
        labels = packed["labels"]
        is_val = packed["is_val"]
        palette = packed["palette"].tolist()
        class_names = packed["class_names"].tolist()
    meta = {
        "name": "avatars",
        "vocab": len(palette),
        "grid": [SIZE, SIZE],
        "n_classes": len(class_names),
        "class_names": class_names,
        "palette": palette,
        "given": [],
    }
    train = ("train", tokens[~is_val], labels[~is_val])
    val = ("val", tokens[is_val], labels[is_val])
    return meta, [train, val]


def validity(tokens: np.ndarray, train_tokens: np.ndarray) -> dict[str, float]:
    """Are faces put together as those of the training split are?

    A part is known if its pattern, colours left aside, occurs there. A face is valid if its parts
    and joints are known, each site has a colour that it has there, and every two of its colours
    occur there in one face. It is new if no training face is made of the same patterns.

    tokens (n, 16, 16), train_tokens (m, 16, 16)  ->  share of valid faces, of known parts, and of
    new faces among the valid ones, which is left out if none is valid
    """
    faces = tokens.reshape(len(tokens), -1)
    train_faces = train_tokens.reshape(len(train_tokens), -1)
    part_ids = [known_patterns(faces[:, s], train_faces[:, s]) for s in PARTS.values()]
    joint_ids = [known_patterns(faces[:, s], train_faces[:, s]) for s in JOINTS.values()]
    made_of = np.stack([ids for ids, _ in part_ids], 1)             # (n, parts)
    train_made_of = np.stack([ids for _, ids in part_ids], 1)       # (m, parts)
    has_joints = np.all([ids >= 0 for ids, _ in joint_ids], 0)
    is_known = made_of >= 0
    is_valid = is_known.all(1) & has_joints & has_known_colours(faces, train_faces)
    columns = dict(valid=is_valid.mean(), parts=is_known.mean())
    if is_valid.any():
        seen = set(map(tuple, train_made_of))
        columns["novel"] = np.mean([tuple(row) not in seen for row in made_of[is_valid]])
    return columns


def known_patterns(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the patterns of rows of b, and find those of a among them; -1 where there is none.

    a (n, s), b (m, s)  ->  (n,), (m,) int
    """
    ids = {}
    b_ids = [ids.setdefault(row.tobytes(), len(ids)) for row in pattern(b)]
    a_ids = [ids.get(row.tobytes(), -1) for row in pattern(a)]
    return np.array(a_ids), np.array(b_ids)


def pattern(a: np.ndarray) -> np.ndarray:
    """Each colour renamed to the first position at which it stands.  (n, s) -> (n, s)"""
    is_equal = a[:, :, None] == a[:, None, :]
    return is_equal.argmax(2).astype(np.uint8)


def has_known_colours(faces: np.ndarray, train_faces: np.ndarray) -> np.ndarray:
    """Does each site have a colour that it has in training, and every two colours a common face?

    faces (n, N), train_faces (m, N)  ->  (n,) bool
    """
    n_colours = 1 + max(faces.max(), train_faces.max())
    sites = np.arange(faces.shape[1])
    at_site = np.zeros((len(sites), n_colours), bool)
    at_site[sites, train_faces] = True
    train_colours = colours_of(train_faces, n_colours)
    is_pair = train_colours.T @ train_colours > 0                   # (K, K)
    colours = colours_of(faces, n_colours)
    n_strange = ((colours @ ~is_pair) * colours).sum(1)
    return at_site[sites, faces].all(1) & (n_strange == 0)


def colours_of(faces: np.ndarray, n_colours: int) -> np.ndarray:
    """Which colours a face has, as ones and zeros.  (n, N) -> (n, K) float"""
    has = np.zeros((len(faces), n_colours), np.float32)
    np.put_along_axis(has, faces, 1, 1)
    return has


def pack(folder: str, path: Path = PACKED) -> None:
    """Write assets/avatars.npz from a folder with one folder of pictures per class.

    The tokens are those of `python data.py images --folder FOLDER --image-size 16 --palette 96`.
    """
    options = SimpleNamespace(
        encoder="",
        folder=folder, name="avatars", image_size=SIZE, palette=N_COLOURS, group_by=""
    )
    meta, chunks = images.make(options)
    splits, tokens, labels = zip(*chunks, strict=True)
    n_rows = list(map(len, labels))
    np.savez_compressed(
        path,
        tokens=np.concatenate(tokens).astype(np.uint8),         # (n, 16, 16), train before val
        labels=np.concatenate(labels).astype(np.uint8),         # (n,)
        is_val=np.repeat(np.array(splits) == "val", n_rows),    # (n,)
        palette=np.array(meta["palette"], np.uint8),            # (K, 3)
        class_names=np.array(meta["class_names"]),
    )
