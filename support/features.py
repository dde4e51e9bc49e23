"""Judges of pictures, fitted to the training split: features, and where there are classes a
classifier.

A judge has a name, features(pixels) -> (n, d) and predict(pixels) -> labels (n,); its predict is
None where the data has no classes. Pixels are floats in [0, 1], (n, N) or (n, H, W, 3).
"""

import hashlib
import itertools
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from support import runtime

N_PCA = 64              # components of the pixels
WIDTH = 64              # channels of the last feature map; earlier ones have half of the next
LEAST_WIDTH = 16
LEAST_SIDE = 4          # of the last feature map, unless the pictures are smaller
N_EPOCHS = 20
MIN_ITERS = 300         # where the epochs are fewer
BATCH = 64
MAX_LR = 1e-2
CHUNK = 500             # pictures that are judged at a time


class PcaJudge:
    """Principal components of the pixels, no classifier."""

    name = "PCA"
    predict = None

    def __init__(self, pixels: np.ndarray):
        from sklearn.decomposition import PCA

        rows = as_rows(pixels)
        n_components = min(N_PCA, *rows.shape)
        self.pca = PCA(n_components, random_state=0).fit(rows)

    def features(self, pixels: np.ndarray) -> np.ndarray:
        return self.pca.transform(as_rows(pixels))


class SvcJudge(PcaJudge):
    """Principal components of the pixels, and a support vector classifier."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray):
        from sklearn.svm import SVC

        super().__init__(pixels)
        self.classifier = SVC(C=10.0).fit(as_rows(pixels), labels)

    def predict(self, pixels: np.ndarray) -> np.ndarray:
        return self.classifier.predict(as_rows(pixels))


class CnnJudge:
    """A small convolutional classifier; its features are those before the last layer."""

    name = "CNN"

    def __init__(self, net: "Classifier"):
        self.net = net.eval()

    @torch.no_grad()
    def features(self, pixels: np.ndarray) -> np.ndarray:
        parts = as_images(pixels).split(CHUNK)
        return torch.cat([self.net.features(part) for part in parts]).double().numpy()

    @torch.no_grad()
    def predict(self, pixels: np.ndarray) -> np.ndarray:
        parts = as_images(pixels).split(CHUNK)
        return torch.cat([self.net(part).argmax(1) for part in parts]).numpy()


class Classifier(nn.Module):
    """Convolutions that halve the picture, a mean over positions, a linear layer.

    images (n, 3, H, W) in [-1, 1]  ->  logits (n, n_classes)
    """

    def __init__(self, side: int, n_classes: int, rng: torch.Generator):
        super().__init__()
        n_halvings = max(0, math.floor(math.log2(side / LEAST_SIDE)))
        widths = [max(LEAST_WIDTH, WIDTH >> i) for i in reversed(range(n_halvings + 1))]
        layers = [nn.Conv2d(3, widths[0], 3, padding=1)]
        for width, next_width in itertools.pairwise(widths):
            layers += [nn.GroupNorm(8, width), nn.ReLU()]
            layers += [nn.Conv2d(width, next_width, 3, stride=2, padding=1)]
        self.body = nn.Sequential(*layers, nn.GroupNorm(8, WIDTH), nn.ReLU())
        self.head = nn.Linear(WIDTH, n_classes)
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=rng)
        nn.init.zeros_(self.head.bias)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images).mean((2, 3))                       # (n, WIDTH)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


def cnn_judge(
    pixels: np.ndarray, labels: np.ndarray, n_classes: int, folder: Path
) -> CnnJudge:
    """The classifier of these pictures: folder/judge_DIGEST.pt, trained now if it is not there."""
    path = folder / f"judge_{digest(pixels, labels)}.pt"
    net = Classifier(min(pixels.shape[1:3]), n_classes, runtime.generator("judge"))
    if path.exists():
        try:
            net.load_state_dict(torch.load(path, weights_only=True))
        except Exception:       # damaged files raise many kinds of exception
            raise SystemExit(f"{path} is damaged: remove it, and it is trained again") from None
    else:
        print(f"training a classifier of {len(labels)} training pictures as judge: {path}")
        train(net, as_images(pixels), torch.from_numpy(labels))
        with runtime.one_line_errors(OSError):
            new = path.with_suffix(f".{os.getpid()}.tmp")
            torch.save(net.state_dict(), new)
            os.replace(new, path)
    return CnnJudge(net)


def train(net: Classifier, images: torch.Tensor, labels: torch.Tensor) -> None:
    """AdamW with one warmup and decay of the learning rate, in place."""
    rng = runtime.generator("judge_batches")
    n_iters = max(MIN_ITERS, N_EPOCHS * len(labels) // BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), MAX_LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, MAX_LR, n_iters)
    for _ in tqdm(range(n_iters), "judge", leave=False):
        batch = torch.randint(len(labels), (BATCH,), generator=rng)
        loss = F.cross_entropy(net(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def digest(pixels: np.ndarray, labels: np.ndarray) -> str:
    """The pictures and labels that a judge is trained on, and how, as 12 hexadecimal digits."""
    sha = hashlib.sha256()
    for array in (as_bytes(pixels), labels):
        sha.update(f"{array.shape} {array.dtype}".encode())
        sha.update(np.ascontiguousarray(array).data)
    sha.update(repr((WIDTH, LEAST_WIDTH, LEAST_SIDE, N_EPOCHS, MIN_ITERS, BATCH, MAX_LR)).encode())
    return sha.hexdigest()[:12]


def as_rows(pixels: np.ndarray) -> np.ndarray:
    """(n, ...) -> (n, d)"""
    return pixels.reshape(len(pixels), -1)


def as_bytes(pixels: np.ndarray) -> np.ndarray:
    """[0, 1] -> 0 to 255"""
    return (255 * pixels).round().astype(np.uint8)


def as_images(pixels: np.ndarray) -> torch.Tensor:
    """(n, H, W, 3) in [0, 1] -> (n, 3, H, W) in [-1, 1]"""
    images = torch.from_numpy(pixels).float().permute(0, 3, 1, 2)
    return 2 * images - 1
