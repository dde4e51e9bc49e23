"""Judge a run's samples.   python evaluate.py out/digits --n-samples 500 --n-steps 32

A classifier fitted on the real training sequences names each sample; its verdict is compared with the label asked for.
"""

from dataclasses import dataclass

import config


@dataclass(frozen=True)
class Flags:
    """Judge accuracy, over all and per class, and the share of distinct samples. Adds rows to RUN/evaluate.csv."""
    runs: tuple[str, ...]                   # folders of runs
    n_samples: int = 500                    # samples per seed, classes in turn
    n_steps: int = 32                       # steps of planned denoising
    seeds: tuple[int, ...] = (0,)           # of the sampling noise; one row each
    batch_size: int = 250                   # samples drawn at a time


if __name__ == "__main__":
    flags = config.load(Flags)

import csv
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import model
import runtime
from diffusion import samplers

N_FIT = 10_000          # training sequences the judge is fitted on, at most


class Judge:
    """A support vector classifier on pixels, fitted anew on the real training sequences of a run's data."""

    def __init__(self, meta, splits):
        from sklearn.svm import SVC

        self.meta = meta
        x, y = splits["train"].rows(np.arange(min(N_FIT, len(splits["train"]))))
        self.svc = SVC(C=10.0).fit(self.features(x), y)
        self.real = self.accuracy(*splits["val"].rows(np.arange(min(N_FIT, len(splits["val"])))))

    def features(self, tokens):
        return tokens / (self.meta["vocab"] - 1)

    def accuracy(self, tokens, labels):
        """Share of sequences named as labelled.  -> over all, {class: share}"""
        right = self.svc.predict(self.features(tokens)) == labels
        return right.mean(), {int(c): right[labels == c].mean() for c in np.unique(labels)}


def draw(kind, nets, labels, meta, seed, device, dtype, n_steps, batch_size):
    """Sample all labels, a batch at a time.  -> tokens (n, N), mean NFE, seconds per sample"""
    rng, parts, calls, began = runtime.generator(seed, device=device), [], [], time.perf_counter()
    for label in tqdm(torch.as_tensor(labels).split(batch_size), unit="batch", leave=False):
        with runtime.autocast(device, dtype):
            steps = samplers.run("ddpd", kind, nets, label.to(device), meta=meta, generator=rng, n_steps=n_steps)
            final = samplers.last(steps)
        parts.append(final.x.cpu().numpy())
        calls.append(final.nfe.float().cpu())
    return np.concatenate(parts), torch.cat(calls).mean().item(), (time.perf_counter() - began) / len(labels)


def worst(per_class, meta):
    c = min(per_class, key=per_class.get)
    return f"worst class {meta['class_names'][c]} {per_class[c]:.1%}"


def main(flags):
    device = runtime.pick_device()
    if min(flags.n_samples, flags.n_steps, flags.batch_size) < 1:
        raise SystemExit("--n-samples, --n-steps and --batch-size must be at least 1")
    if min(flags.seeds) < 0:
        raise SystemExit("--seeds must not be negative")
    for run in flags.runs:
        state = runtime.load_run(run)
        meta, cfg = state["meta"], state["config"]
        if not meta["n_classes"] or meta["palette"] != "grey":
            raise SystemExit(f"{run}: the judge needs grey pictures with classes, and {meta['name']} has none")
        nets = model.from_checkpoint(state, config.kind_of(cfg), device)
        judge = Judge(meta, data.load(cfg["data"], cfg["image_size"], cfg["levels"])[1])
        print(f"{run}, iteration {state['it']}: judge on real held-out data {judge.real[0]:.1%}, "
              f"{worst(judge.real[1], meta)}")
        for seed in flags.seeds:
            labels = np.arange(flags.n_samples) % meta["n_classes"]
            tokens, nfe, s_per_sample = draw(config.kind_of(cfg), nets, labels, meta, seed, device, cfg["dtype"],
                                             flags.n_steps, flags.batch_size)
            accuracy, per_class = judge.accuracy(tokens, labels)
            distinct = len(np.unique(tokens, axis=0)) / len(tokens)
            print(f"  {flags.n_samples} samples, {flags.n_steps} steps, {nfe:.1f} NFE, seed {seed}: "
                  f"judge accuracy {accuracy:.1%}, "
                  f"{worst(per_class, meta)}, distinct {distinct:.1%}, {s_per_sample:.3f} s each")
            row = dict(run=run, it=state["it"], train_seed=cfg["seed"], sampler="ddpd", steps=flags.n_steps,
                       nfe=round(nfe, 2),
                       s_per_sample=round(s_per_sample, 4), n=flags.n_samples, seed=seed, judge_acc=round(accuracy, 4),
                       worst_class=round(min(per_class.values()), 4), distinct=round(distinct, 4),
                       judge_acc_real=round(judge.real[0], 4), commit=runtime.commit(), device=str(device))
            write_row(Path(run) / "evaluate.csv", row)


def write_row(path, row):
    is_new = not path.exists()
    with runtime.one_line_errors(OSError), open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if is_new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main(flags)
