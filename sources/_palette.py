"""The colours of a folder of pictures: k-means, and pixels as the nearest of K colours."""

from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from sources._pictures import Picture, load, pixel_chunks, report_unreadable

N_ROUNDS = 100                  # of k-means, at most
N_SAMPLE_PICTURES = 10_000      # from which the colours are chosen
N_SAMPLE_PIXELS = 2**20
RADIX = np.array([2**16, 2**8, 1])
SEED = 0


def find_palette(pictures: list[Picture], size: int, n_colours: int) -> np.ndarray:
    """The colours of the pictures, or K means of them if there are more.  ->  (K, 3) uint8, sorted

    The means are those of the different colours, weighted by how often they occur.
    """
    from sklearn.cluster import KMeans

    codes = sample_pixels(pictures, size).astype(np.int64) @ RADIX
    different, counts = np.unique(codes, return_counts=True)
    palette = different[:, None] // RADIX % 256
    if len(palette) > n_colours:
        kmeans = KMeans(n_colours, n_init=1, max_iter=N_ROUNDS, random_state=SEED)
        kmeans.fit(palette, sample_weight=counts)
        palette = np.unique(kmeans.cluster_centers_.round(), axis=0)
    if len(palette) < 2:
        raise SystemExit(f"the training pictures have no colour but {palette[0].tolist()}")
    if len(palette) < n_colours:
        print(f"the training pictures have {len(palette)} colours, "
              f"so the palette has {len(palette)}, not {n_colours}")
    return palette.astype(np.uint8)


def sample_pixels(pictures: list[Picture], size: int) -> np.ndarray:
    """Random pixels of random pictures, equally many of each; all of them if they are few.

    ->  (n, 3) uint8
    """
    rng = np.random.default_rng(SEED)
    n_pictures = min(len(pictures), N_SAMPLE_PICTURES)
    n_each = min(size**2, N_SAMPLE_PIXELS // n_pictures)
    chosen = rng.permutation(len(pictures))[:n_pictures]
    samples = []
    for i in tqdm(chosen, "colours", unit=" pictures"):
        pixels = load(pictures[i], size)
        if pixels is not None:
            some = rng.permutation(size**2)[:n_each]
            samples.append(pixels.reshape(-1, 3)[some])
    if not samples:
        raise SystemExit(f"none of {n_pictures} training pictures can be read")
    return np.concatenate(samples)


def nearest(pixels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """The id of the closest colour.  pixels (..., 3), palette (K, 3)  ->  (...) int64"""
    from sklearn.metrics import pairwise_distances_argmin

    rows = pixels.reshape(-1, 3).astype(np.float64)
    ids = pairwise_distances_argmin(rows, palette.astype(np.float64))
    return ids.reshape(pixels.shape[:-1])


def token_chunks(
    splits: dict[str, list[Picture]], size: int, palette: np.ndarray, unreadable: list[str]
) -> Iterator[tuple]:
    """Read and quantise all pictures.  yields (split, tokens (m, S, S), labels (m,))"""
    unreadable = list(unreadable)
    squared_errors = 0.0
    n_values = 0
    n_pictures = sum(map(len, splits.values()))
    with tqdm(total=n_pictures, desc="pictures", unit=" pictures") as bar:
        for split, pictures in splits.items():
            n_before = n_values
            for pixels, labels in pixel_chunks(pictures, size, unreadable, bar):
                tokens = nearest(pixels, palette)
                errors = palette[tokens].astype(np.float64) - pixels
                squared_errors += np.square(errors).sum()
                n_values += errors.size
                yield split, tokens, labels
            if n_values == n_before:
                raise SystemExit(f"none of {len(pictures)} {split} pictures can be read")
    report_unreadable(unreadable)
    rms = (squared_errors / n_values) ** 0.5
    print(f"{len(palette)} colours, {rms:.1f} of 255 rms from those of the pictures")


