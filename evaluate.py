"""Judge runs by their samples, at equal numbers of network calls.

python evaluate.py out/digits --samplers ddpd ancestral confidence remdm --nfe 8 16 32 64 --n-samples 500
"""

from dataclasses import dataclass

import config


@dataclass(frozen=True)
class Flags:
    """One table over runs, samplers and NFE: rows of RUN/evaluate.csv, for videos also RUN/frames.csv; plots in the
    first run's folder."""
    runs: tuple[str, ...]                   # folders of runs
    samplers: tuple[str, ...] = ()          # ddpd, ancestral, confidence, random, remdm, rollout; (): a run's first
    nfe: tuple[int, ...] = ()               # network calls per sample, planner and denoiser both; of a video per frame
    n_samples: int = 500                    # samples per row, classes in turn
    seeds: tuple[int, ...] = (0,)           # of the sampling noise; one row each
    batch_size: int = 250                   # samples drawn at a time
    temperature: float = 1.0                # of the denoiser
    top_p: float = 1.0                      # probability mass it draws from, in (0, 1]
    guidance: float = 1.0                   # of the denoiser
    planner_guidance: float = 1.0           # of the planner
    correct: int = 0                        # gidd: a second row after this many steps of self-correction
    guidance_ramp: bool = False             # let both grow from 1 with the share of noise gone
    context: int = 2                        # videos: frames of held-out ones that are given
    frames: int = 0                         # videos: frames in all; 0: 8 times as many as the data has
    lag: int = -1                           # rollout: steps between frames; -1: frame by frame; 0: all together
    stabilise: float = 0.0                  # rollout: noise level told of finished frames
    context_level: float = 0.0              # rollout: noise level told of known tokens
    flips: float = 0.0                      # share of known tokens that are redrawn as another id
    planner: bool = False                   # judge the planner too: RUN/reliability.png
    decoder: str = ""                       # TorchScript, tokens -> images: writes RUN/SAMPLER_NFE_*.npz


if __name__ == "__main__":
    flags = config.load(Flags)

import csv
import functools
import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import judges
import model
import render
import runtime
from diffusion import objectives, processes, samplers

N_BINS, N_CALIBRATION = 10, 15
N_BITS = 2048           # sequences behind bits per token, at least
QUALITY = {"judge_acc": "judge accuracy", "frechet": "Frechet distance", "shortest": "shortest paths",
           "valid": "valid paths", "right": "frames exactly right", "intact": "sprite intact"}     # two by two
MOST = 2**27            # logits at once: samplers hold about six numbers for each
FRAME_KEYS = "run train_seed sampler steps lag stabilise context_level flips n seed".split()
VARIANTS = {            # name here: (sampler, its options)
    "ddpd": ("ddpd", {}),
    "ancestral": ("ancestral", {}),
    "confidence": ("confidence", {}),
    "random": ("confidence", dict(order="random", temperature_end=0.6)),        # of the temperature at the start
    "remdm": ("remdm", {}),
    "rollout": ("rollout", {}),
}


class Run:
    """A trained run, ready to be sampled and judged."""

    def __init__(self, folder, device):
        self.folder, self.device, state = folder, device, runtime.load_run(folder)
        self.meta, self.cfg, self.it = state["meta"], state["config"], state["it"]
        self.kind, (self.process, self.p_uniform) = config.kind_of(self.cfg), config.noise_of(self.cfg)
        self.is_video = len(self.meta["grid"]) == 3
        self.nets = model.from_checkpoint(state, self.kind, device)
        self.splits = data.load(self.cfg["data"], self.cfg["image_size"], self.cfg["levels"])[1]
        self.judge = judges.of(self.meta, self.splits)

    def val(self, n):
        """n held-out sequences, again from the first where there are fewer.  -> x0 (n, N), label (n,)"""
        x0, label = self.splits["val"].some(n)
        return torch.from_numpy(x0).to(self.device), torch.from_numpy(label).to(self.device)

    def at_once(self, most):
        """Sequences whose logits are together no more numbers than `most`."""
        return max(1, most // (math.prod(self.meta["grid"]) * self.meta["vocab"]))

    def bits(self):
        """Bits per token of held-out data by the bound that is tight for exact networks, and its standard error."""
        n = N_BITS // (4 if self.is_video else 1)
        x0, label = self.val(-(-n // len(self.splits["val"])) * len(self.splits["val"]))
        with runtime.autocast(self.device, self.cfg["dtype"]):
            bounds = objectives.bits_per_token(self.nets, self.kind, x0, label, self.meta["vocab"],
                                               runtime.generator(0), self.p_uniform, process=self.process,
                                               given=data.given(self.meta, x0),
                                               frames=self.meta["grid"][0] if self.is_video else 1)
        return min(bounds.values()) if self.kind == "forcing" else next(iter(bounds.values()))

    def held_out(self, n, flags):
        """Sequences to go on from, n at most.  -> real (n, N) or None, given, known (n, N) or None"""
        if not self.is_video and not self.meta["given"]:
            return None, None, None
        real = self.splits["val"].some(min(n, len(self.splits["val"])))[0]
        if self.is_video and self.frames(flags) > self.meta["grid"][0]:
            video = real.reshape(len(real), *self.meta["grid"])
            if not self.meta.get("is_certain"):
                raise SystemExit(f"{self.meta['name']} has no one truth after its frames: --frames {len(video[0])}")
            real = self.judge.source.truth(video, self.frames(flags)).reshape(len(real), -1)
        real = real[:, :self.frames(flags) * math.prod(self.meta["grid"][1:])] if self.is_video else real
        known = data.context(self.meta, torch.from_numpy(real), flags.context)
        given, rng = real.copy(), np.random.default_rng(0)
        if known is not None and flags.flips:
            is_flipped = (rng.random(real.shape) < flags.flips) & known.numpy()
            other = (real + rng.integers(1, self.meta["vocab"], real.shape)) % self.meta["vocab"]
            given = np.where(is_flipped, other, real)
        return real, given, None if known is None else known.numpy()

    def frames(self, flags):
        """Frames of a video: a rollout makes any number, all else as many as the data has."""
        own = self.meta["grid"][0]
        if self.kind != "forcing" and flags.frames not in (0, own):
            raise SystemExit(f"--frames {flags.frames}: a {self.kind} run makes {own}")
        return flags.frames or (8 * own if self.kind == "forcing" else own)

    def draw(self, sampler, options, labels, seed, batch_size, given=None, known=None):
        """given: (n, N) tokens where known, or all to be corrected.  -> tokens (n, N), mean NFE, seconds per sample"""
        rng, parts, calls = runtime.generator(seed, device=self.device), [], []
        batch_size = min(batch_size, self.at_once(MOST))
        began = time.perf_counter()
        for i in tqdm(torch.arange(len(labels)).split(batch_size), unit="batch", leave=False):
            label = torch.as_tensor(labels)[i]
            x, kept = (None if y is None else torch.from_numpy(y[i]).to(self.device) for y in (given, known))
            with runtime.autocast(self.device, self.cfg["dtype"]):
                steps = samplers.run(sampler, self.kind, self.nets, label.to(self.device), meta=self.meta,
                                     generator=rng, given=x, known=kept, process=self.process,
                                     p_uniform=self.p_uniform, **options)
                final = samplers.last(steps)
            parts.append(final.x.cpu().numpy())
            calls.append(final.nfe.float().cpu())
        return np.concatenate(parts), torch.cat(calls).mean().item(), (time.perf_counter() - began) / len(labels)


def n_steps_of(name, run, nfe, flags):
    """Steps for which a sampler may make nfe calls; refuses fewer than one."""
    kind = run.kind
    if run.is_video and kind == "forcing":                              # nfe calls for each frame that is made
        lag, nfe = 0 if name == "ancestral" else flags.lag, nfe * (run.frames(flags) - flags.context)
        of = functools.partial(samplers.staircase_of, run.meta["grid"], frames=run.frames(flags), lag=lag)
        fits = [n for n in range(1, nfe + 1) if len(of(n, context=flags.context)) - 1 <= nfe]
        if not fits:
            raise SystemExit(f"--nfe is too small for --lag {lag}: {nfe} network calls in all")
        return fits[-1]
    is_pair = VARIANTS[name][0] == "ddpd" and kind != "single"
    calls = (2 if flags.guidance != 1 else 1) + is_pair * (2 if flags.planner_guidance != 1 else 1)
    if nfe < calls:
        raise SystemExit(f"--nfe {nfe} is too small for {name}: a step of it takes {calls} network calls")
    return nfe // calls


def evaluate(run, name, nfe, seed, flags, bits, decoder=None):
    """One row of the table, and one more where samples are corrected afterwards.  -> [{column: value}]"""
    sampler, options = VARIANTS[name]
    n_steps = n_steps_of(name, run, nfe, flags)
    drawn = dict(top_p=flags.top_p, guidance=flags.guidance, guidance_ramp=flags.guidance_ramp)
    options = dict(n_steps=n_steps, temperature=flags.temperature) | drawn | options
    if "temperature_end" in options:
        options["temperature_end"] *= flags.temperature
    if sampler == "ddpd":
        options["planner_guidance"] = flags.planner_guidance
    real, tokens, known = run.held_out(flags.n_samples, flags)
    if run.is_video:
        options |= dict(frames=run.frames(flags), context=flags.context)
    if sampler == "rollout":
        options |= dict(stabilise=flags.stabilise, context_level=flags.context_level, lag=flags.lag)
    n_classes, n = run.meta["n_classes"], flags.n_samples if real is None else len(real)
    labels = np.arange(n) % n_classes if n_classes else np.zeros(n, np.int64)
    stages, rows, calls, seconds = [(name, sampler, options)], [], 0.0, 0.0
    if flags.correct and run.kind == "gidd":
        stages.append((f"{name}+correct", "self_correct", dict(n_steps=flags.correct) | drawn))
    for label, stage, chosen in stages:
        tokens, more_calls, more_seconds = run.draw(stage, chosen, labels, seed, flags.batch_size, tokens, known)
        calls, seconds = calls + more_calls, seconds + more_seconds
        row = dict(run=run.folder, it=run.it, train_seed=run.cfg["seed"], sampler=label, steps=n_steps,
                   nfe=round(calls, 2), guidance=flags.guidance, s_per_sample=round(seconds, 4), n=n, seed=seed)
        if run.is_video:
            row |= dict(lag=flags.lag, stabilise=flags.stabilise, context_level=flags.context_level, flips=flags.flips)
        asked = dict(context=flags.context) if run.is_video else {}
        scores, of_frames = run.judge.scores(tokens, labels, real, **asked)
        row |= scores
        for frame in range(len(next(iter(of_frames.values()))) if run.is_video else 0):
            write_row(Path(run.folder) / "frames.csv", {k: row[k] for k in FRAME_KEYS} | dict(frame=frame) | {
                k: round(float(v[frame]), 4) for k, v in of_frames.items()})
        rows.append(row | dict(bits_per_token=round(bits[0], 4), bits_se=round(bits[1], 4), commit=runtime.commit(),
                               device=runtime.device_name(run.device)))
        if decoder:
            stem = f"{label}_{nfe}_seed{seed}_guidance{flags.guidance:g}"
            write_images(run, stem, tokens, decoder, flags.batch_size)
    return rows


def write_images(run, name, tokens, decoder, batch_size):
    """Decoded samples as uint8 (n, H, W, 3) under arr_0: the layout of the ADM evaluation suite."""
    parts = []
    for batch in np.split(tokens, range(batch_size, len(tokens), batch_size)):
        parts.append(render.pictures(batch.reshape(-1, *run.meta["grid"]), run.meta, decoder))
    np.savez(Path(run.folder) / f"{name}.npz", np.concatenate(parts))


# The planner


@torch.no_grad()
def planner_says(run, n=1024):
    """P(noise) of held-out tokens and whether they are noise, on corrupted data and on what the planner sees in use.

    In use: noise of level t replaced by the denoiser's draws, "noise" being what differs from the clean token.
    -> {"corrupted" or "in use": (t, p, is_noise), each (n * N,)}
    """
    (x0, label), vocab, rng = run.val(n), run.meta["vocab"], runtime.generator(0)
    t = ((torch.randperm(n, generator=rng)[:, None] + 0.5) / n).to(run.device)
    out = {"corrupted": [], "in use": []}

    def say(where, x, i, is_noise):
        if "planner" in run.nets:
            p = run.nets["planner"](x, t[i], label[i]).sigmoid()
        else:
            p = processes.from_self(run.nets["denoiser"](x, t[i], label[i]).softmax(-1), x, t[i])[0]
        out[where].append(torch.stack([t[i].expand(x.shape), p, is_noise.float()]).flatten(1).cpu())

    for i in torch.arange(n).split(min(64, run.at_once(MOST))):
        with runtime.autocast(run.device, run.cfg["dtype"]):
            x, is_noise = (y.to(run.device) for y in processes.corrupt(x0[i].cpu(), t[i].cpu(), "uniform", vocab, rng))
            say("corrupted", x, i, is_noise)
            masked = x.masked_fill(is_noise, vocab) if run.kind == "maskd" else x
            draws = run.nets["denoiser"](masked, t[i], label[i]).softmax(-1)
            if run.kind == "single":
                draws = processes.from_self(draws, x, t[i])[1]
            filled = torch.where(is_noise, samplers.draw(draws, torch.Generator(run.device).manual_seed(int(i[0]))), x)
            say("in use", filled, i, filled != x0[i])
    return {name: torch.cat(parts, 1).numpy() for name, parts in out.items()}


def calibration(p, is_noise):
    """Expected calibration error over equal bins of p.  -> error, [(mean p, share of noise, tokens)]"""
    which = np.minimum((p * N_CALIBRATION).astype(int), N_CALIBRATION - 1)
    bins = [(p[which == b].mean(), is_noise[which == b].mean(), (which == b).sum()) for b in np.unique(which)]
    return sum(n * abs(mean - share) for mean, share, n in bins) / len(p), bins


def judge_planner(run):
    """Print AUROC and calibration error per bin of noise level; the reliability diagram goes to RUN/reliability.png."""
    import matplotlib
    from sklearn.metrics import roc_auc_score

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(5, 4.6), layout="constrained")
    panel.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for name, (t, p, is_noise) in planner_says(run).items():
        error, bins = calibration(p, is_noise)
        overall = roc_auc_score(is_noise, p)
        print(f"planner of {run.folder}, {name}: AUROC {overall:.3f}, calibration error {error:.3f}")
        for b in range(N_BINS):
            here = (t * N_BINS).astype(int) == b
            if 0 < is_noise[here].sum() < here.sum():
                auroc, off = roc_auc_score(is_noise[here], p[here]), calibration(p[here], is_noise[here])[0]
                print(f"  t {b / N_BINS:.1f} to {(b + 1) / N_BINS:.1f}: AUROC {auroc:.3f}, calibration error {off:.3f}")
        panel.plot(*np.array([b[:2] for b in bins]).T, marker="o", markersize=4,
                   label=f"{name}: AUROC {overall:.3f}, error {error:.3f}")
    panel.set(xlabel="P(noise) said by the planner", ylabel="share of noise", title=run.folder, xlim=(0, 1),
              ylim=(0, 1))
    panel.legend()
    figure.savefig(Path(run.folder) / "reliability.png", dpi=110)
    pyplot.close(figure)


# The table


def write_row(path, row):
    """Append to a CSV, which is written anew where a column is new."""
    with runtime.one_line_errors(OSError):
        rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
        columns = list(dict.fromkeys([*(rows[0] if rows else ()), *row]))
        is_same = bool(rows) and columns == list(rows[0])
        with open(path, "a" if is_same else "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            if not is_same:
                writer.writeheader()
            writer.writerows([row] if is_same else [*rows, row])


def plot(rows, path):
    """Quality against NFE and against seconds, or against the frame; seeds are averaged."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row["nfe"] != "n/a"]
    good = [k for k in QUALITY if any(k in row for row in rows)]
    if not good:
        return
    rows = [row for row in rows if good[0] in row]
    figure, panels = pyplot.subplots(2, 2, figsize=(10, 7), sharey="row", layout="constrained")
    for line in dict.fromkeys((row["run"], row["sampler"]) for row in rows):
        mine = [row for row in rows if (row["run"], row["sampler"]) == line]
        steps = sorted({row["steps"] for row in mine})
        axes = [(y, x) for y in good for x in ("nfe", "s_per_sample")]
        for panel, (y, x) in zip(panels.flat, axes, strict=True):
            at = [[np.mean([row[k] for row in mine if row["steps"] == s]) for s in steps] for k in (x, y)]
            panel.plot(*at, marker="o", markersize=4, label=f"{Path(line[0]).name}, {line[1]}")
            panel.set(xscale="log", xlabel={"nfe": "network calls (NFE)", "s_per_sample": "seconds per sample"}[x],
                      ylabel=QUALITY[y])
    if good[1] == "frechet":
        panels[1, 0].set_yscale("log")
    panels[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(flags):
    device = runtime.pick_device()
    for name in flags.samplers:
        if name not in VARIANTS:
            raise SystemExit(f"--samplers {name} is not one of {', '.join(VARIANTS)}")
    if not flags.runs or not flags.seeds:
        raise SystemExit("name at least one run and --seeds")
    if min((flags.batch_size, *flags.nfe)) < 1 or min(flags.seeds) < 0 or flags.n_samples < 2:
        raise SystemExit("--batch-size and --nfe must be at least 1, --n-samples at least 2, --seeds not negative")
    rows = []
    for folder in flags.runs:
        run = Run(folder, device)
        is_guided = (flags.guidance, flags.planner_guidance) != (1, 1)
        if is_guided and not (run.cfg["label_dropout"] and run.meta["n_classes"]):
            raise SystemExit(f"{folder} was trained without labels or their dropout: nothing to guide away from")
        names, budgets = flags.samplers or samplers.FITS[run.kind][:1], flags.nfe or ((8,) if run.is_video else (64,))
        for name in names:
            with runtime.one_line_errors(ValueError):
                if len(flags.runs) == 1:
                    samplers.check_fit(run.kind, VARIANTS[name][0])
            n_steps_of(name, run, min(budgets), flags)
        decoder = render.load_decoder(flags.decoder, run.meta, device) if flags.decoder else None
        bits = run.bits()
        print(f"{folder}, iteration {run.it}: {bits[0]:.3f} +- {bits[1]:.3f} bits per token on held-out data")
        if run.judge.val:
            real, per_class = run.judge.val
            print(f"  held-out real data, n {run.judge.n_val}: " + describe(real, per_class, run.meta))
        if flags.planner and run.kind not in ("gidd", "forcing"):
            judge_planner(run)
        for name in names:
            if VARIANTS[name][0] not in samplers.FITS[run.kind]:
                rows.append(dict(run=folder, sampler=name, steps="n/a", nfe="n/a", judge_acc="n/a"))
                write_row(Path(folder) / "evaluate.csv", rows[-1])
                print(f"  {name}: n/a for a {run.kind} run")
                continue
            for nfe in budgets:
                for seed in flags.seeds:
                    with runtime.one_line_errors(ValueError):
                        made = evaluate(run, name, nfe, seed, flags, bits, decoder)
                    for row in made:
                        print(f"  {row['sampler']:10} {row['steps']:>4} steps, {row['nfe']:g} NFE, seed {seed}, "
                              f"n {row['n']}: {describe(row, None, run.meta)}, {row['s_per_sample']:.3f} s each")
                        write_row(Path(folder) / "evaluate.csv", row)
                    rows += made
    plot(rows, Path(flags.runs[0]) / "evaluate.png")


def describe(row, per_class, meta):
    """A row in words."""
    said = [f"{words} {row[column]:{form}}" for column, (words, form) in judges.COLUMNS.items() if column in row]
    if "lo" in row:
        said[0] += f" ({row['lo']:.1%} to {row['hi']:.1%})"
        if per_class:
            said[1] += f" (class {meta['class_names'][min(per_class, key=per_class.get)]})"
    return ", ".join(said)


if __name__ == "__main__":
    main(flags)
