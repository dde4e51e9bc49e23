"""Sample a run and watch its planner.   python sample.py out/digits --labels 0 1 2 3 --n-steps 64

Writes samples.png, samples.npz, planner.mp4 and planner.gif into the run's folder, from the averaged (EMA) weights.
"""

from dataclasses import dataclass, fields, replace
from typing import Literal

import config


@dataclass(frozen=True)
class Flags:
    """Sample a run: pictures, tokens and a video of the planner's probability map."""
    run: str                                # folder of a run
    labels: tuple[int, ...] = ()            # one sample for each; (): one per class up to 10 classes, else 8
    n_steps: int = -1                       # two network calls each in planned denoising; -1: 64, for a video's frame 4
    seed: int = 0                           # of the noise and every draw
    sampler: Literal["", "ddpd", "ancestral", "confidence", "remdm", "rollout"] = ""    # "": the first that fits
    context: int = 2                        # videos: frames of held-out ones that are given
    frames: int = 0                         # videos: frames in all; 0: as many as the data has
    correct: int = 0                        # steps of self-correction after the sampler, k tokens in each (gidd runs)
    # Of the sampler. Only flags that are given are passed on; one that the sampler does not have is refused.
    schedule: str = ""                      # ddpd: spread, fixed, one, leap; confidence: arccos, cosine, linear
    k: int = 1                              # sites per step of --schedule fixed, and of --refine
    pick: Literal["proportional", "softmax"] = "proportional"   # choose sites by P(noise), or by its odds
    stop: float = 0.0                       # expected noise tokens under which a sequence is done; 0: spend all steps
    refine: int = 0                         # further steps of k sites
    order: Literal["confidence", "random"] = "confidence"   # which tokens MaskGIT keeps
    noise: float = 4.5                      # of MaskGIT's confidence: Gumbel noise at the start
    temperature_end: float = 0.0            # MaskGIT: where the temperature, falling evenly, ends; 0: it stays
    remask: Literal["confidence", "rescale", "cap"] = "confidence"  # ReMDM: which tokens are masked again
    eta: float = 0.2                        # ReMDM: how much of what may be masked again is
    lag: int = -1                           # rollout: steps between frames; -1: frame by frame; 0: all together
    stabilise: float = 0.0                  # rollout: noise level told of finished frames, that it may distrust them
    context_level: float = 0.0              # rollout: noise level told of known tokens, if they are not to be trusted
    temperature: float = 1.0                # of the denoiser
    top_k: int = 0                          # likeliest tokens the denoiser draws from; 0: all
    top_p: float = 1.0                      # probability mass it draws from, in (0, 1]
    min_p: float = 0.0                      # draw only ids at least this share as likely as the likeliest
    guidance: float = 1.0                   # of the denoiser: 1 follows the label as trained, more exaggerates it
    planner_guidance: float = 1.0           # of the planner
    guidance_ramp: bool = False             # let both grow from 1 with the share of noise gone
    known: str = ""                         # .npz with tokens (n, *grid) and mask, True where they stay: inpainting
    n_video: int = 10                       # samples in the video; 0: no video
    decoder: str = ""                       # TorchScript file, tokens (n, h, w) -> images (n, 3, H, W) in [-1, 1]


OWN = """run labels n_steps seed sampler context frames correct known n_video decoder""".split()     # of this script

if __name__ == "__main__":
    flags = config.load(Flags)

import itertools
import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import model
import render
import runtime
from diffusion import samplers


def load_known(path, meta, labels):
    """Tokens to keep: one sequence for each sample, or one for all.  -> tokens, mask (n, N), labels"""
    try:
        with np.load(path, allow_pickle=False) as file:
            tokens, mask = file["tokens"], file["mask"]
            own = np.atleast_1d(file["labels"]).astype(np.int64).tolist() if "labels" in file else []
    except Exception as error:                                          # np.load raises a dozen kinds
        raise SystemExit(f"{path} cannot be read as tokens and mask: {runtime.first_line(error)}") from None
    grid = tuple(meta["grid"])
    if tokens.shape[-len(grid):] != grid or tokens.ndim > len(grid) + 1 or mask.dtype != bool:
        raise SystemExit(f"{path} holds tokens {tokens.shape} and a {mask.dtype} mask {mask.shape}, not tokens of grid "
                         f"{grid} and a bool mask")
    if not tokens.size or not mask.size or tokens.dtype.kind not in "iu":
        raise SystemExit(f"{path} holds {tokens.shape} tokens of {tokens.dtype}, not whole numbers")
    n = len(tokens) if tokens.ndim > len(grid) else 1
    if (own and len(own) != n) or mask.shape not in (grid, (n, *grid)):
        raise SystemExit(f"{path}: {n} sequences of grid {grid} do not fit {len(own)} labels and a mask {mask.shape}")
    labels = labels or own or [meta["n_classes"]] * n
    try:
        shape = (len(labels), *grid)
        pair = [np.array(np.broadcast_to(y, shape)).reshape(len(labels), -1) for y in (tokens.astype(np.int64), mask)]
    except ValueError:
        raise SystemExit(f"{path}: tokens {tokens.shape} and mask {mask.shape} do not fit {len(labels)} samples of "
                         f"grid {grid}") from None
    kept = pair[0][pair[1]]
    if kept.size and not 0 <= kept.min() <= kept.max() < meta["vocab"]:
        raise SystemExit(f"{path}: tokens that are kept must lie in [0, {meta['vocab']}), "
                         f"not {kept.min()} to {kept.max()}")
    return *(torch.from_numpy(y) for y in pair), labels


def held_out(cfg, meta, flags, labels, device):
    """Held-out sequences to go on from: their context, and what is real.  -> real (n, *grid), given, known, labels"""
    n = len(labels) or 8
    x0, own = data.load(cfg["data"], cfg["image_size"], cfg["levels"])[1]["val"].some(n)
    frames = flags.frames
    real = x0.reshape(n, *meta["grid"])
    if frames and frames <= len(real[0]):
        real = real[:, :frames]
    elif frames:                                                        # what comes after may have more than one answer
        is_certain = meta.get("is_certain", False)
        real = data.import_source(meta["score"]).truth(real, frames) if is_certain else np.pad(
            real, [(0, 0), (0, frames - len(real[0])), (0, 0), (0, 0)])
    given = torch.from_numpy(real.reshape(n, -1)).to(device)
    known = data.context(meta, given, flags.context)
    return real, given, torch.zeros_like(given, dtype=torch.bool) if known is None else known, labels or own.tolist()


def main(flags):
    device = runtime.pick_device()
    if flags.seed < 0 or flags.n_video < 0:
        raise SystemExit("--seed and --n-video must not be negative")
    state = runtime.load_run(flags.run)
    meta, kind = state["meta"], config.kind_of(state["config"])
    n_classes = meta["n_classes"]
    labels, given, known = list(flags.labels), None, None
    if flags.known:
        given, known, labels = load_known(flags.known, meta, labels)
        given, known = given.to(device), known.to(device)
    for label in labels:
        if not 0 <= label <= n_classes:
            raise SystemExit(f"--labels {label}: {flags.run} knows 0 to {n_classes - 1}, and {n_classes} for no label")
    labels = labels or [min(i, n_classes) for i in range(n_classes if 0 < n_classes <= 10 else 8)]
    if (flags.guidance, flags.planner_guidance) != (1, 1) and not (state["config"]["label_dropout"] and n_classes):
        raise SystemExit(f"{flags.run} was trained without labels or their dropout: nothing to guide away from")
    decoder = render.load_decoder(flags.decoder, meta, device) if flags.decoder else None
    grid, real = list(meta["grid"]), None
    is_video = len(grid) == 3
    if flags.n_steps == -1:
        flags = replace(flags, n_steps=4 if is_video and kind == "forcing" else 64)
    if (flags.frames and not (is_video and kind == "forcing")) or min(flags.frames, flags.context) < 0:
        raise SystemExit("--frames and --context are numbers of a video's frames, and --frames is for forcing runs")
    if not flags.known and (is_video or meta["given"]):
        real, given, known, labels = held_out(state["config"], meta, flags, labels, device)
        grid = list(real.shape[1:])
        real = None if grid[0] > meta["grid"][0] and not meta.get("is_certain") else real
    nets = model.from_checkpoint(state, kind, device)

    options = {f.name: getattr(flags, f.name) for f in fields(flags)
               if f.name not in OWN and getattr(flags, f.name) != f.default}
    sampler, (process, p_uniform) = flags.sampler or samplers.FITS[kind][0], config.noise_of(state["config"])
    stages = [sampler, *["self_correct"] * (flags.correct > 0)]
    for name in options:
        if not any(name in samplers.options_of(stage) for stage in stages):
            raise SystemExit(f"--{name.replace('_', '-')} is no option of sampler {sampler}")
    with runtime.one_line_errors(ValueError):
        for stage in stages:
            samplers.check_fit(kind, stage)
    if flags.correct and p_uniform == 0:
        print("warning: a denoiser that never saw uniform noise has nothing to say of tokens that are filled in")
    rng = runtime.generator(flags.seed, device=device)
    n_shown, began = min(flags.n_video, len(labels)), time.perf_counter()
    label, nfe, shown, s = torch.tensor(labels, device=device), 0, {}, None
    grids = lambda y: y[:n_shown].unflatten(1, grid).cpu().numpy()  # noqa: E731
    for stage in stages:
        own = {k: v for k, v in options.items() if k in samplers.options_of(stage)}
        if stage == "self_correct":
            own.pop("temperature", None)                                # it has one of its own
            given = before = s.x
        n_steps = flags.correct if stage == "self_correct" else flags.n_steps
        frames = shown.setdefault({"self_correct": "correct", "rollout": "rollout"}.get(stage, "planner"), [])
        with runtime.one_line_errors(ValueError), runtime.autocast(device, state["config"]["dtype"]):
            steps = samplers.run(stage, kind, nets, label, meta=meta, generator=rng, n_steps=n_steps, given=given,
                                 known=known, p_uniform=p_uniform, process=process, frames=flags.frames * is_video,
                                 context=flags.context, **own)
            first = next(steps)                                         # a refusal comes before the bar
            total = None if stage == "rollout" else n_steps + flags.refine
            for s in tqdm(itertools.chain([first], steps), total=total, unit="step"):
                if n_shown:
                    frames.append([*map(grids, (s.x, s.p_noise, s.written)), s.nfe[:n_shown].cpu().numpy()])
        nfe = nfe + s.nfe
        if stage == "self_correct":
            print(f"self-correction changed {(s.x != before).sum()} of {s.x.numel()} tokens")
    tokens = s.x.view(-1, *grid).cpu().numpy()
    seconds = time.perf_counter() - began
    print(f"{len(labels)} samples, {nfe.float().mean():.1f} NFE each, {seconds:.1f} s on {device}")

    folder, written = Path(flags.run), ["samples.png", "samples.npz"]
    settings = json.dumps({**asdict(flags), "it": state["it"], "nfe": nfe.tolist(), "commit": runtime.commit()})
    with runtime.one_line_errors(OSError):
        np.savez(folder / "samples.npz", tokens=tokens, labels=np.array(labels), settings=settings)
        source = data.import_source(meta["score"]) if known is not None and meta.get("score") else None
        wrong = source.wrong(tokens, real) if source and real is not None else None
        truth, errors = (None if y is None else y[:n_shown] for y in (real, wrong))
        render.samples_png(folder / "samples.png", tokens, labels, meta, decoder, wrong)
        for name, frames in shown.items():
            marked = grids(known) if known is not None and not meta["given"] else None  # ids that are given show it
            if frames and is_video and kind == "forcing":
                lag = 0 if sampler == "ancestral" else flags.lag
                levels = samplers.staircase_of(meta["grid"], flags.n_steps, flags.frames, lag, flags.context)
                pictures = render.rollout_frames(frames, levels[1:].numpy(), truth, marked, meta)
            elif frames:
                pictures = render.planner_frames(frames, labels[:n_shown], meta, decoder, marked, truth, errors)
            if frames:
                render.write_video(folder / name, pictures)
                written += [f"{name}.mp4", f"{name}.gif"]
    if source:
        print(", ".join(f"{name} {value.mean():.1%}" for name, value in source.score(tokens, real).items()))
    if meta["palette"] == "text":
        for text in tokens.reshape(len(tokens), -1):
            print("---\n" + bytes(text.astype(np.uint8)).decode(errors="replace"))
    print(f"wrote {', '.join(written)} in {folder}")


if __name__ == "__main__":
    main(flags)
