"""1,797 real handwritten digits, 8x8 pixels of 17 grey levels (Alpaydin, Kaynak, UCI 1998), carried by scikit-learn."""

import numpy as np

SIZE, LEVELS = 8, 17
VAL_SHARE, SPLIT_SEED = 0.1, 0
MAKES_ITSELF = True


def folder_name(how):
    size, levels = how.image_size or SIZE, how.levels or LEVELS
    return "digits" if (size, levels) == (SIZE, LEVELS) else f"digits_{size}x{size}_{levels}"


def make(how):
    """Native, or resized and re-quantised.  -> meta, [(split, tokens (n, S, S), labels (n,))]; a tenth is held out"""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    size, levels = how.image_size or SIZE, how.levels or LEVELS
    if levels < 2:
        raise SystemExit(f"levels is {levels}; it must be at least 2")
    pixels, labels = load_digits(return_X_y=True)
    grey = pixels.reshape(-1, SIZE, SIZE).astype(np.float32) / (LEVELS - 1)                 # in [0, 1]
    if size != SIZE:
        grey = np.stack([Image.fromarray(g).resize((size, size), Image.Resampling.BICUBIC) for g in grey])
    tokens = np.round(grey.clip(0, 1) * (levels - 1)).astype(np.int64)
    train, val = train_test_split(np.arange(len(labels)), test_size=VAL_SHARE, stratify=labels, random_state=SPLIT_SEED)
    meta = dict(name="digits", vocab=levels, grid=[size, size], n_classes=10, class_names=[str(d) for d in range(10)],
                palette="grey", given=[])
    return meta, [("train", tokens[train], labels[train]), ("val", tokens[val], labels[val])]
