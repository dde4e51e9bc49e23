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
    n: config.NotNegative = 0               # samples, classes in turn; 0: every class once, or 8
    labels: tuple[str, ...] = ()            # numbers or names of classes, in turn where n is given
    sampler: str = ""                       # one that fits the run's method; "": its first
    n_steps: int | None = None              # steps; 64, or 4 for each frame of a video
    correct: config.NotNegative = 0         # gidd: steps of self-correction afterwards
    seed: config.Seed = 0                   # of the noise and every draw
    known: str = ""                         # inpainting: .npz of tokens (n, *grid) and bool mask
    prompt: config.Prose = ""               # text: its beginning; [...] in it is filled in
    gap: config.NotNegative = 0             # tokens at [...]; 0: what follows ends the sequence
    n_video: config.NotNegative = 10        # samples in the video; 0: no video
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
from support import render, runtime
from support.checkpoint import Run, load_run
from support.text import is_text, load_text, place_prompt
from support.validate import find_decoder, render_frame

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


def in_turn(labels: list[int], n: int) -> list[int]:
    """n labels, those given again and again; n = 0: each once."""
    return [labels[i % len(labels)] for i in range(n or len(labels))]


def label_of(word: str, meta: dict[str, Any]) -> int:
    """A class by its number or its name."""
    try:
        return int(word)
    except ValueError:
        pass
    names = meta["class_names"]
    if word not in names:
        near = config.nearest(word, names) or "it has none"
        raise SystemExit(f"--labels {word} names no class of {meta['name']}; {near}")
    return names.index(word)


def load_known_tokens(
    path: str, meta: dict[str, Any], labels: list[int], n_samples: int = 0,
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
    labels = in_turn(labels or own_labels.tolist() or [meta["n_classes"]] * n, n_samples)
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


def tokens_of_prompt(flags: Flags, run: Run, n: int) -> tuple[Tensor, Tensor]:
    """The prompt in n sequences.  -> tokens, mask (n, N)"""
    n_tokens = run.spec.shape.n_tokens
    tokens = torch.zeros(n, n_tokens, dtype=torch.long)
    mask = torch.zeros(n, n_tokens, dtype=torch.bool)
    with runtime.one_line_errors(ValueError):
        text = load_text(run.folder, run.spec.meta)
        placed = place_prompt(flags.prompt, flags.gap, n_tokens, text)
    for start, ids in placed.items():
        end = start + len(ids)
        tokens[:, start:end] = torch.tensor(ids, dtype=torch.long)
        mask[:, start:end] = True
    return tokens, mask


def starting_point(flags: Flags, run: Run) -> Start:
    """Labels, and what is known by the flags and the data."""
    spec = run.spec
    n_classes = spec.n_classes
    labels = [label_of(word, spec.meta) for word in flags.labels]
    known_tokens = known = None
    if flags.known:
        known_tokens, known, labels = load_known_tokens(flags.known, spec.meta, labels, flags.n)
    for label in labels:
        if not 0 <= label <= n_classes:
            raise SystemExit(
                f"--labels {label}: {flags.run} knows 0 to {n_classes - 1}, "
                f"and {n_classes} for no label"
            )
    if labels:
        labels = in_turn(labels, flags.n)
    else:
        n = n_classes if 0 < n_classes <= 10 else N_SAMPLES
        labels = in_turn(list(range(max(1, n_classes))), flags.n or n)
    if flags.prompt:
        known_tokens, known = tokens_of_prompt(flags, run, len(labels))
        return Start(labels, list(spec.grid), known_tokens, known)
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
    frames: dict[str, list]                 # stem of a video -> what render needs of each State


def draw(flags: Flags, run: Run, start: Start, stages: list[Stage]) -> Drawn:
    """Run the stages one after the other."""
    rng = runtime.generator("sample", flags.seed, device=run.device)
    label = torch.tensor(start.labels, device=run.device)
    known, known_tokens = (
        None if y is None else y.to(run.device) for y in (start.known, start.known_tokens)
    )
    n_shown = min(flags.n_video, len(start.labels))
    nfe = 0
    frames = {}
    for stage in stages:
        before = known_tokens
        with (
            runtime.one_line_errors(ValueError),
            runtime.autocast(run.device, run.spec.config["dtype"]),
        ):
            states = methods.sample(
                run.spec, run.nets, label, sampler=stage.sampler, n_steps=stage.n_steps,
                generator=rng, known=known, known_tokens=known_tokens, frames=flags.frames,
                **stage.options,
            )
            first = next(states)  # a refusal comes before the bar
            total = (
                None
                if stage.sampler == "rollout"
                else stage.n_steps + stage.options.get("refine", 0)
            )
            for state in tqdm(itertools.chain([first], states), total=total, unit="step"):
                if n_shown:
                    frames.setdefault(stage.file_stem, []).append(
                        render_frame(state, start.grid, n_shown)
                    )
        nfe = nfe + state.nfe
        if stage.sampler == "self_correct":
            print(
                f"self-correction changed {(state.x != before).sum()} of {state.x.numel()} tokens"
            )
        known_tokens = state.x
    return Drawn(state.x.view(-1, *start.grid).cpu().numpy(), nfe, frames)


# Files


def write_videos(
    flags: Flags, spec: methods.Spec, start: Start, stages: list[Stage], drawn: Drawn, decoder,
    wrong: np.ndarray | None,
) -> list[str]:
    """A video of each stage.  -> names of the files"""
    names = []
    for stage in stages:
        frames = drawn.frames.get(stage.file_stem)
        if not frames:
            continue
        n = len(frames[0][0])
        labels = start.labels[:n]
        real = None if start.real is None else start.real[:n]
        known = None                                    # ids that are given show themselves
        if start.known is not None and not spec.meta["given"]:
            known = start.known[:n].unflatten(1, start.grid).numpy()
        if spec.is_video and spec.method.has_own_levels:
            lag = 0 if stage.sampler == "ancestral" else stage.options.get("lag", -1)
            levels = methods.rollout_levels(spec, start.known, stage.n_steps, flags.frames, lag)
            pictures = render.rollout_frames(frames, levels[1:].numpy(), real, known, spec.meta)
        else:
            errors = None if wrong is None else wrong[:n]
            pictures = render.planner_frames(
                frames, labels, spec.meta, decoder, known, real, errors
            )
        render.write_video(Path(flags.run) / stage.file_stem, pictures)
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
        render.samples_png(
            folder / "samples.png", drawn.tokens, start.labels, spec.meta, decoder, wrong
        )
        videos = write_videos(flags, spec, start, stages, drawn, decoder, wrong)
    if source:
        scores = source.score(drawn.tokens, start.real)
        print(", ".join(f"{name} {value.mean():.1%}" for name, value in scores.items()))
    if is_text(spec.meta):
        text = load_text(run.folder, spec.meta)
        for sequence in drawn.tokens.reshape(len(drawn.tokens), -1):
            print("---\n" + text.to_str(sequence))
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
    if flags.prompt and not is_text(spec.meta):
        raise SystemExit(f"--prompt is for text, and {flags.run} makes {spec.meta['name']}")
    if flags.prompt and flags.known:
        raise SystemExit("--prompt and --known exclude each other")
    if flags.gap and not flags.prompt:
        raise SystemExit("--gap is the length of the gap [...] in --prompt")
    if flags.n_steps is None:
        return replace(flags, n_steps=N_STEPS_PER_FRAME if is_video_rollout else N_STEPS)
    return flags


def main(flags: Flags) -> None:
    device = runtime.pick_device()
    run = load_run(flags.run, device)
    runtime.freeze(run.nets, device, run.spec.config["dtype"])
    flags = check_flags(flags, run.spec)
    decoder = find_decoder(flags.decoder, run.folder, run.spec.meta, device)
    start = starting_point(flags, run)
    stages = plan_stages(flags, run.spec)
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
