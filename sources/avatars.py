"""8,000 pixel-art faces, 16x16 pixels of 96 colours, six classes, by DiceBear (made on first use).

The style "pixel-art" is a design by DiceBear under CC0 1.0. assets/avatars.txt says how the
pictures were made; `pack` turned them into tokens, once.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from sources import images

MAKES_ITSELF = True
SIZE = 16
N_COLOURS = 96
PACKED = Path(__file__).parent.parent / "assets" / "avatars.npz"


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
