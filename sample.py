"""Sample a run and watch its planner.   python sample.py out/digits --labels 0 1 2 3 --n-steps 64

Writes samples.png, samples.npz, planner.mp4 and planner.gif into the run's folder, from the
averaged (EMA) weights.
"""

import typing
from dataclasses import dataclass, replace

import config


@dataclass(frozen=True)
class SampleOptions:
    """What is sampled, and what is written."""
    run: str                                # folder of a run
    labels: tuple[int, ...] = ()            # one sample for each; (): every class once, or 8
    sampler: str = ""                       # one that fits the run's method; "": its first
    n_steps: int | None = None              # steps; 64, or 4 for each frame of a video
    correct: config.NotNegative = 0         # gidd: steps of self-correction afterwards
    seed: config.Seed = 0                   # of the noise and every draw
    known: str = ""                         # inpainting: .npz of tokens (n, *grid) and bool mask
    n_video: config.NotNegative = 10        # samples in the video; 0: no video
    scale: config.NotNegative = 0           # pixels per token in pictures; 0: chosen by their size
    # TorchScript file (code that is run), tokens (n, h, w) -> images (n, 3, H, W) in [-1, 1]
    decoder: str = ""


@dataclass(frozen=True)
class Flags(config.SamplerFlags, config.VideoFlags, SampleOptions):
    """Sample a run: pictures, tokens and a video of the planner's probability map."""

    GROUPS: typing.ClassVar = {
        "sample": SampleOptions, "videos": config.VideoFlags, **config.SamplerFlags.GROUPS,
    }


if __name__ == "__main__":
    flags = config.load(Flags)

import itertools
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import methods
from support import pictures, runtime, videos
from support.checkpoint import Run, load_run
from support.validate import find_decoder

N_STEPS = 64
N_STEPS_PER_FRAME = 4       # of a video
N_SAMPLES = 8               # where no labels say how many

# Where sampling starts


class Start(NamedTuple):
    """What is known before sampling."""
    labels: list[int]
    grid: list[int]  # of the samples; a rollout may have more frames than the data
    known_tokens: Tensor | None = None      # (n, N)
    known: Tensor | None = None             # (n, N) bool, where known_tokens stay
    real: np.ndarray | None = None  # (n, *grid) held-out sequences that the samples go on from


def load_known_tokens(
    path: str, meta: dict[str, Any], labels: list[int],
) -> tuple[Tensor, Tensor, list[int]]:
    """Tokens to keep: one sequence for each sample, or one for all.  -> tokens, mask (n, N),
    labels"""
    try:
        with np.load(path, allow_pickle=False) as file:
            tokens = file["tokens"]
            mask = file["mask"]
            own_labels = np.atleast_1d(file["labels"] if "labels" in file else []).astype(np.int64)
    except Exception as error:                          # np.load raises a dozen kinds
        reason = runtime.first_line(error)
        raise SystemExit(f"{path} cannot be read as tokens and mask: {reason}") from None
    grid = tuple(meta["grid"])
    if tokens.shape[-len(grid):] != grid or tokens.ndim > len(grid) + 1 or mask.dtype != bool:
        raise SystemExit(
            f"{path} holds tokens {tokens.shape} and a {mask.dtype} mask {mask.shape}, "
            "not tokens of grid "
            f"{grid} and a bool mask"
        )
    if not tokens.size or not mask.size or tokens.dtype.kind not in "iu":
        raise SystemExit(f"{path} holds {tokens.shape} tokens of {tokens.dtype}, not whole numbers")
    n = len(tokens) if tokens.ndim > len(grid) else 1
    if (len(own_labels) and len(own_labels) != n) or mask.shape not in (grid, (n, *grid)):
        raise SystemExit(
            f"{path}: {n} sequences of grid {grid} do not fit {len(own_labels)} labels and a mask "
            f"{mask.shape}"
        )
    labels = labels or own_labels.tolist() or [meta["n_classes"]] * n
    try:
        tokens, mask = (
            np.broadcast_to(y, (len(labels), *grid)) for y in (tokens.astype(np.int64), mask)
        )
    except ValueError:
        raise SystemExit(
            f"{path}: tokens {tokens.shape} and mask {mask.shape} do not fit {len(labels)} "
            f"samples of grid {grid}"
        ) from None
    kept = tokens[mask]
    if kept.size and not 0 <= kept.min() <= kept.max() < meta["vocab"]:
        raise SystemExit(f"{path}: tokens that are kept must lie in [0, {meta['vocab']}), "
                         f"not {kept.min()} to {kept.max()}")
    tokens, mask = (torch.from_numpy(np.array(y).reshape(len(labels), -1)) for y in (tokens, mask))
    return tokens, mask, labels


def real_frames(real: np.ndarray, frames: int, meta: dict[str, Any]) -> np.ndarray:
    """Held-out videos (n, F, h, w), cut or continued to `frames`; zeros stand where there is no one
    truth."""
    n_missing = frames - real.shape[1]
    if n_missing <= 0:
        return real[:, :frames]
    if meta.get("is_certain", False):
        return data.import_source(meta["score"]).truth(real, frames)
    return np.pad(real, [(0, 0), (0, n_missing), (0, 0), (0, 0)])


def start_from_data(flags: Flags, spec: methods.Spec, labels: list[int]) -> Start:
    """Held-out sequences to go on from: the first frames of videos, and the tokens that the data
    gives."""
    config_ = spec.config
    _, splits = data.load(config_["data"], config_["image_size"], config_["grey_levels"])
    n = len(labels) or N_SAMPLES
    x0, own_labels = splits["val"].spread_subset(n)
    real = x0.reshape(n, *spec.grid)
    if flags.frames:
        real = real_frames(real, flags.frames, spec.meta)
    known_tokens = torch.from_numpy(real.reshape(n, -1))
    known = data.context_mask(spec.meta, known_tokens, flags.n_given)
    if known is None:
        known = torch.zeros_like(known_tokens, dtype=torch.bool)
    grid = list(real.shape[1:])
    has_truth = grid[0] <= spec.grid[0] or spec.meta.get("is_certain", False)
    return Start(
        labels or own_labels.tolist(), grid, known_tokens, known, real if has_truth else None
    )


def starting_point(flags: Flags, spec: methods.Spec) -> Start:
    """Labels, and what is known by the flags and the data."""
    n_classes = spec.n_classes
    labels = list(flags.labels)
    known_tokens = known = None
    if flags.known:
        known_tokens, known, labels = load_known_tokens(flags.known, spec.meta, labels)
    for label in labels:
        if not 0 <= label <= n_classes:
            raise SystemExit(
                f"--labels {label}: {flags.run} knows 0 to {n_classes - 1}, "
                f"and {n_classes} for no label"
            )
    if not labels:
        n = n_classes if 0 < n_classes <= 10 else N_SAMPLES
        labels = [min(i, n_classes) for i in range(n)]
    if not flags.known and (spec.is_video or spec.meta["given"]):
        return start_from_data(flags, spec, labels)
    return Start(labels, list(spec.grid), known_tokens, known)


# Stages: the sampler, and self-correction after it


class Stage(NamedTuple):
    sampler: str
    n_steps: int
    options: dict[str, Any]

    @property
    def file_stem(self) -> str:
        """Of its video."""
        return {"self_correct": "correct", "rollout": "rollout"}.get(self.sampler, "planner")

    def title(self, is_video: bool) -> list[str]:
        """Of its pictures: the sampler, its steps, and the options that were given."""
        is_by_frames = is_video and self.sampler == "rollout"
        steps = f"{self.n_steps} step{'s' * (self.n_steps != 1)}"
        steps += " a frame" * is_by_frames
        options = [f"{name.replace('_', ' ')} {value}" for name, value in self.options.items()]
        return [self.sampler, steps, *options]


def plan_stages(flags: Flags, spec: methods.Spec) -> list[Stage]:
    """Each option goes to the stages that have it; one that none has is refused."""
    sampler = flags.sampler or next(iter(spec.method.samplers))
    names = [sampler, *["self_correct"] * (flags.correct > 0)]
    with runtime.one_line_errors(ValueError):
        known_options = {
            name: methods.options_of(methods.find_sampler(spec, name)) for name in names
        }
    options = flags.sampler_options()
    for option in options:
        if not any(option in known_options[name] for name in names):
            raise SystemExit(f"--{option.replace('_', '-')} is no option of sampler {sampler}")
    if flags.correct and spec.noise.only_masks:
        print(
            "warning: a denoiser that never saw uniform noise cannot correct tokens that are "
            "filled in"
        )
    stages = []
    for name in names:
        own = {option: value for option, value in options.items() if option in known_options[name]}
        if name == "self_correct":
            own.pop("temperature", None)                # it has one of its own
        stages.append(Stage(name, flags.correct if name == "self_correct" else flags.n_steps, own))
    return stages


class Drawn(NamedTuple):
    tokens: np.ndarray                      # (n, *grid)
    nfe: Tensor                             # (n,) network calls of all stages
    moments: dict[str, list[videos.Moment]]     # stem of a video -> what it shows


def draw(flags: Flags, run: Run, start: Start, stages: list[Stage]) -> Drawn:
    """Run the stages one after the other."""
    rng = runtime.generator("sample", flags.seed, device=run.device)
    label = torch.tensor(start.labels, device=run.device)
    known, known_tokens = (
        None if y is None else y.to(run.device) for y in (start.known, start.known_tokens)
    )
    n_shown = min(flags.n_video, len(start.labels))
    nfe = 0
    moments = {}
    for stage in stages:
        before = known_tokens
        with (
            runtime.one_line_errors(ValueError),
            runtime.autocast(run.device, run.spec.config["dtype"]),
        ):
            x = methods.starting_tokens(
                run.spec, label, rng, stage.sampler, known, known_tokens, flags.frames
            )
            states = methods.sample(
                run.spec, run.nets, label, sampler=stage.sampler, n_steps=stage.n_steps,
                generator=rng, known=known, frames=flags.frames, x=x, **stage.options,
            )
            recording = videos.Recording(x, start.grid, n_shown)
            first = next(states)  # a refusal comes before the bar
            total = (
                None
                if stage.sampler == "rollout"
                else stage.n_steps + stage.options.get("refine", 0)
            )
            for state in tqdm(itertools.chain([first], states), total=total, unit="step"):
                if n_shown:
                    recording.add(state)
            if n_shown:
                after = methods.p_noise_after(
                    run.spec, run.nets, state, label, sampler=stage.sampler, known=known,
                    **stage.options,
                )
                moments[stage.file_stem] = recording.finish(after)
        nfe = nfe + state.nfe
        if stage.sampler == "self_correct":
            print(
                f"self-correction changed {(state.x != before).sum()} of {state.x.numel()} tokens"
            )
        known_tokens = state.x
    return Drawn(state.x.view(-1, *start.grid).cpu().numpy(), nfe, moments)


# Files


def write_videos(
    flags: Flags, spec: methods.Spec, start: Start, stages: list[Stage], drawn: Drawn, decoder,
    wrong: np.ndarray | None,
) -> list[str]:
    """A video of each stage.  -> names of the files"""
    names = []
    for stage in stages:
        moments = drawn.moments.get(stage.file_stem)
        if not moments:
            continue
        n = len(moments[0].x)
        labels = start.labels[:n]
        title = stage.title(spec.is_video)
        real = None if start.real is None else start.real[:n]
        known = None                                    # ids that are given show themselves
        if start.known is not None and not spec.meta["given"]:
            known = start.known[:n].unflatten(1, start.grid).numpy()
        if spec.is_video and spec.method.has_own_levels:
            lag = 0 if stage.sampler == "ancestral" else stage.options.get("lag", -1)
            levels = methods.rollout_levels(spec, start.known, stage.n_steps, flags.frames, lag)
            frames = videos.rollout_frames(
                moments, levels.numpy(), real, known, spec.meta, title, flags.scale
            )
        else:
            errors = None if wrong is None else wrong[:n]
            frames = videos.planner_frames(
                moments, labels, spec.meta, title, decoder, known, real, errors, flags.scale
            )
        videos.write_video(Path(flags.run) / stage.file_stem, frames)
        names += [f"{stage.file_stem}.mp4", f"{stage.file_stem}.gif"]
    return names


def write_files(
    flags: Flags, run: Run, start: Start, stages: list[Stage], drawn: Drawn, decoder,
) -> None:
    """samples.npz, samples.png and the videos; prints how right the samples are where the data
    knows."""
    spec = run.spec
    folder = Path(flags.run)
    settings = {
        **asdict(flags),
        "it": run.it,
        "nfe": drawn.nfe.tolist(),
        "commit": runtime.commit(),
    }
    source = (
        data.import_source(spec.meta["score"])
        if start.known is not None and spec.meta.get("score")
        else None
    )
    wrong = source.wrong(drawn.tokens, start.real) if source and start.real is not None else None
    with runtime.one_line_errors(OSError):
        np.savez(folder / "samples.npz", tokens=drawn.tokens, labels=np.array(start.labels),
                 settings=json.dumps(settings))
        title = [words for stage in stages for words in stage.title(spec.is_video)]
        pictures.samples_png(
            folder / "samples.png", drawn.tokens, start.labels, spec.meta, title, decoder, wrong,
            flags.scale,
        )
        videos = write_videos(flags, spec, start, stages, drawn, decoder, wrong)
    if source:
        scores = source.score(drawn.tokens, start.real)
        print(", ".join(f"{name} {value.mean():.1%}" for name, value in scores.items()))
    if spec.meta["palette"] == "text":
        for text in drawn.tokens.reshape(len(drawn.tokens), -1):
            print("---\n" + bytes(text.astype(np.uint8)).decode(errors="replace"))
    print(f"wrote {', '.join(['samples.png', 'samples.npz', *videos])} in {folder}")


def check_flags(flags: Flags, spec: methods.Spec) -> Flags:
    """Refuse what the run cannot do.  -> flags with n_steps filled in"""
    is_video_rollout = spec.is_video and spec.method.has_own_levels
    is_guided = any(scale not in (None, 1) for scale in (flags.guidance, flags.planner_guidance))
    if is_guided and not (spec.config["label_dropout"] and spec.n_classes):
        raise SystemExit(
            f"{flags.run} was trained without labels or their dropout: nothing to guide away from"
        )
    if flags.frames and not is_video_rollout:
        raise SystemExit("--frames is a number of a video's frames, for forcing runs")
    if flags.n_given < 0 or (flags.context_frames is not None and not spec.is_video):
        raise SystemExit("--context-frames is a number of a video's first frames")
    if flags.n_steps is None:
        return replace(flags, n_steps=N_STEPS_PER_FRAME if is_video_rollout else N_STEPS)
    return flags


def check_scale(flags: Flags, spec: methods.Spec, start: Start, decoder) -> None:
    """Refuse, before anything is sampled, a scale that the pictures do not fit."""
    is_alone = not flags.n_video or (spec.is_video and spec.method.has_own_levels)
    has_third = start.real is not None or decoder is not None
    n_tiles = 1 if is_alone else 3 if has_third else 2
    blank = np.zeros((1, *start.grid), np.int64)
    pictures.pictures(blank, spec.meta, decoder, flags.scale, n_tiles)


def main(flags: Flags) -> None:
    device = runtime.pick_device()
    run = load_run(flags.run, device)
    runtime.freeze(run.nets, device, run.spec.config["dtype"])
    flags = check_flags(flags, run.spec)
    decoder = find_decoder(flags.decoder, run.folder, run.spec.meta, device)
    start = starting_point(flags, run.spec)
    stages = plan_stages(flags, run.spec)
    check_scale(flags, run.spec, start, decoder)
    began = time.perf_counter()
    drawn = draw(flags, run, start, stages)
    seconds = time.perf_counter() - began
    print(
        f"{len(start.labels)} samples, {drawn.nfe.float().mean():.1f} NFE each, "
        f"{seconds:.1f} s on {device}"
    )
    write_files(flags, run, start, stages, drawn, decoder)


if __name__ == "__main__":
    with runtime.one_voice():
        main(flags)
