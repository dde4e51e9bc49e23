"""1,797 handwritten digits, 8x8 pixels of 17 grey levels, from scikit-learn (made on first use).

Alpaydin and Kaynak, UCI Machine Learning Repository, 1998.
"""

import numpy as np

SIZE = 8
GREY_LEVELS = 17
N_CLASSES = 10
VAL_SHARE = 0.1
SPLIT_SEED = 0
MAKES_ITSELF = True


def folder_name(options) -> str:
    size = options.image_size or SIZE
    grey_levels = options.grey_levels or GREY_LEVELS
    if (size, grey_levels) == (SIZE, GREY_LEVELS):
        return "digits"
    return f"digits_{size}x{size}_{grey_levels}"


def make(options) -> tuple[dict, list]:
    """Native, or resized and quantised again; a stratified tenth is held out.

    ->  meta, [(split, tokens (n, S, S), labels (n,))]
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    size = options.image_size or SIZE
    grey_levels = options.grey_levels or GREY_LEVELS
    if grey_levels < 2:
        raise SystemExit(f"grey_levels is {grey_levels}; it must be at least 2")
    pixels, labels = load_digits(return_X_y=True)
    tokens = to_tokens(pixels.reshape(-1, SIZE, SIZE), size, grey_levels)
    rows = np.arange(len(labels))
    train, val = train_test_split(
        rows, test_size=VAL_SHARE, stratify=labels, random_state=SPLIT_SEED
    )
    meta = {
        "name": "digits",
        "vocab": grey_levels,
        "grid": [size, size],
        "n_classes": N_CLASSES,
        "class_names": [str(digit) for digit in range(N_CLASSES)],
        "palette": "grey",
        "given": [],
    }
    return meta, [("train", tokens[train], labels[train]), ("val", tokens[val], labels[val])]


def to_tokens(pixels: np.ndarray, size: int, grey_levels: int) -> np.ndarray:
    """Resize and quantise.  pixels (n, 8, 8) in [0, 16]  ->  (n, size, size) int64"""
    from PIL import Image

    grey = pixels.astype(np.float32) / (GREY_LEVELS - 1)                    # in [0, 1]
    if size != SIZE:
        images = [Image.fromarray(image) for image in grey]
        grey = np.stack([image.resize((size, size), Image.Resampling.BICUBIC) for image in images])
    return np.round(grey.clip(0, 1) * (grey_levels - 1)).astype(np.int64)
