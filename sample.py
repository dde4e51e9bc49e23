"""Sample a run and watch its planner.   python sample.py out/digits --labels 0 1 2 3 --n-steps 64

Writes samples.png, samples.npz, planner.mp4 and planner.gif into a folder of RUN/samples/ that is
named after the settings, from the averaged (EMA) weights. Any number of samples:
torchrun --nproc_per_node=2 -- sample.py out/digits --n 10000; the same command resumes.
"""

import typing
from dataclasses import dataclass, replace

import config
from formats.flags import NotNegative, Prose, Seed


@dataclass(frozen=True)
class SampleOptions:
    """What is sampled."""
    run: str                                # folder of a run, exported or not, or hf://OWNER/NAME
    n: NotNegative = 0               # samples, classes in turn; 0: every class once, or 8
    labels: tuple[str, ...] = ()            # numbers or names of classes, in turn where n is given
    sampler: str = ""                       # one that fits the run's method; "": its first
    n_steps: int | None = None              # if not given 64, or 4 for each frame of a video
    correct: NotNegative = 0         # gidd: steps of self-correction afterwards
    seed: Seed = 0                   # of the noise and every draw
    # inpainting: .npz file with `tokens` (n, *grid), a bool `mask`, True where tokens stay, and
    # maybe `labels`; samples have no label if neither it nor --labels gives one
    known: str = ""
    prompt: Prose = ""               # text: how it begins; [...] in the prompt is filled in
    gap: NotNegative = 0             # tokens to fill in at [...]; 0: what is left
    batch_size: NotNegative = 0      # samples at a time; 0: 250, fewer on a CPU or for memory


@dataclass(frozen=True)
class FileOptions:
    """What is written."""
    out: str = ""                           # folder; "": RUN/samples/ and a name by the settings
    # samples in the video; 0: no video; if not given 10, or fewer tall ones
    n_video: int | None = None
    scale: NotNegative = 0           # pixels per token in pictures; 0: chosen by their size
    png: bool = False                       # each sample also as a file: png/00000000.png, ...
    # TorchScript file (code that is run), tokens (n, h, w) -> images (n, 3, H, W) in [-1, 1]
    decoder: str = ""


@dataclass(frozen=True)
class Flags(config.SamplerFlags, config.VideoFlags, FileOptions, SampleOptions):
    """Sample a run: pictures, tokens and a video of the planner's probability map."""

    GROUPS: typing.ClassVar = {
        "sample": SampleOptions, "files": FileOptions, "videos": config.VideoFlags,
        **config.SamplerFlags.GROUPS,
    }


if __name__ == "__main__":
    flags = config.load(Flags)

import functools
import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

import data
import methods
from support import pictures, runtime, sampling, videos
from support.checkpoint import Run, load_run
from support.starts import Start, starting_point
from support.text import is_text, load_text
from support.validate import find_decoder

N_STEPS = 64
N_STEPS_PER_FRAME = 4       # of a video
N_VIDEO = 10                # samples in the video, if they are not tall
N_PICTURED = 100            # samples in samples.png, at most
N_PRINTED = 20              # texts on the terminal, at most
PNG_CHUNK = 100             # pictures that are decoded at a time

# Stages: the sampler, and self-correction after it


class Stage(NamedTuple):
    sampler: str
    options: dict[str, Any]     # of methods.sample, n_steps first

    @property
    def file_stem(self) -> str:
        """Of its video."""
        return {"self_correct": "correct", "rollout": "rollout"}.get(self.sampler, "planner")

    def title(self, is_video: bool) -> list[str]:
        """Of its pictures: the sampler, its steps, and the options that were given."""
        options = dict(self.options)
        n_steps = options.pop("n_steps")
        steps = f"{n_steps} step{'s' * (n_steps != 1)}"
        if is_video and self.sampler == "rollout":
            steps += " a frame"
        words = [f"{name.replace('_', ' ')} {value}" for name, value in options.items()]
        return [self.sampler, steps, *words]


def plan_stages(flags: Flags, spec: methods.Spec) -> list[Stage]:
    """Each option goes to the stages that have it; one that none has is refused."""
    sampler = flags.sampler or next(iter(spec.method.samplers))
    names = [sampler, "self_correct"] if flags.correct > 0 else [sampler]
    with runtime.one_line_errors(ValueError):
        known_options = {
            name: methods.options_of(methods.find_sampler(spec, name)) for name in names
        }
    if sampler == "self_correct":
        raise SystemExit(
            "self_correct corrects what another sampler made: leave --sampler out, add --correct N"
        )
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
        elif flags.frames:
            own["frames"] = flags.frames
        n_steps = flags.correct if name == "self_correct" else flags.n_steps
        stages.append(Stage(name, {"n_steps": n_steps} | own))
    return stages


def words_of(flags: Flags) -> list[str]:
    """What a folder's name says besides the sampler and its options."""
    words = []
    if flags.labels:
        words.append("labels" + ".".join(flags.labels))
    if flags.known:
        words.append("known-" + Path(flags.known).stem)
    if flags.prompt:
        words.append("prompt" + hashlib.sha256(flags.prompt.encode()).hexdigest()[:6])
    if flags.gap:
        words.append(f"gap{flags.gap}")
    if flags.context_frames is not None:
        words.append(f"context{flags.context_frames}")
    return words


# Files


def outlined(start: Start, spec: methods.Spec, n: int) -> np.ndarray | None:
    """The known tokens of the first n samples, to be outlined in pictures; None where the data says
    which are known, as the walls of mazes: they need no outline.

    ->  (n, *grid) bool
    """
    if start.known is None or spec.meta["given"]:
        return None
    return start.known[:n].unflatten(1, start.grid).numpy()


def write_video(
    folder: Path, run: Run, start: Start, stage: Stage, moments: list[videos.Moment], decoder,
    wrong: np.ndarray | None, scale: int,
) -> list[str]:
    """The video of a stage.  -> names of its files"""
    spec = run.spec
    n = len(moments[0].x)
    title = stage.title(spec.is_video)
    real = None if start.real is None else start.real[:n]
    known = outlined(start, spec, n)
    if spec.is_video and spec.method.has_own_levels:
        lag = 0 if stage.sampler == "ancestral" else stage.options.get("lag", -1)
        n_steps, n_frames = stage.options["n_steps"], stage.options.get("frames", 0)
        levels = methods.rollout_levels(spec, start.known, n_steps, n_frames, lag)
        frames = videos.rollout_frames(
            moments, levels.numpy(), real, known, spec.meta, title, scale
        )
    else:
        errors = None if wrong is None else wrong[:n]
        frames = videos.planner_frames(
            moments, start.labels[:n], spec.meta, title, decoder, known, real, errors, scale
        )
    videos.write_video(folder / stage.file_stem, frames)
    return [f"{stage.file_stem}.mp4", f"{stage.file_stem}.gif"]


def write_files(
    flags: Flags, run: Run, start: Start, stage: Stage, folder: Path,
    moments: list[videos.Moment], decoder,
) -> None:
    """Write samples.png and the video, and print scores where the data has a measure of them."""
    spec = run.spec
    n = len(start.labels)
    has_score = start.known is not None and bool(spec.meta.get("score"))
    n_read = n if has_score else min(n, N_PICTURED)
    tokens = sampling.load_tokens(folder, n_read).reshape(-1, *start.grid)
    source = data.import_source(spec.meta["score"]) if has_score else None
    wrong = source.wrong(tokens, start.real) if source and start.real is not None else None
    title = stage.title(spec.is_video)
    if n > N_PICTURED:
        title.append(f"the first {N_PICTURED} of {n}")
    with runtime.one_line_errors(OSError):
        pictures.samples_png(
            folder / "samples.png", tokens[:N_PICTURED], start.labels[:N_PICTURED], spec.meta,
            title, decoder, None if wrong is None else wrong[:N_PICTURED],
            flags.scale, outlined(start, spec, N_PICTURED),
        )
        names = ["samples.png", "samples.npz"]
        if moments:
            names += write_video(
                folder, run, start, stage, moments, decoder, wrong, flags.scale
            )
    if source:
        scores = source.score(tokens, start.real)
        print(", ".join(f"{name} {value.mean():.1%}" for name, value in scores.items()))
    if is_text(spec.meta):
        text = load_text(run.folder, spec.meta)
        for i, sequence in enumerate(tokens.reshape(len(tokens), -1)[:N_PRINTED]):
            print(f"--- sample {i}\n{text.to_str(sequence)}")
    if flags.png:
        names.append("png/")
    print(f"wrote {', '.join(names)} in {folder}")


def write_pngs(
    folder: Path, grid: list[int], meta: dict[str, Any], decoder, scale: int, first: int,
    tokens: np.ndarray,
) -> None:
    """png/INDEX.png for each of the samples (n, N), the first of which has the index `first`."""
    (folder / "png").mkdir(exist_ok=True)
    for i in range(0, len(tokens), PNG_CHUNK):
        chunk = tokens[i:i + PNG_CHUNK].reshape(-1, *grid)
        if decoder:
            tiles = pictures.decoded_pictures(chunk, meta, decoder)
        else:
            tiles = pictures.pictures(chunk, meta, None, scale)
        for j, tile in enumerate(tiles):
            Image.fromarray(tile).save(folder / "png" / f"{first + i + j:08}.png")


def write_missing_pngs(folder: Path, n: int, write: typing.Callable) -> None:
    """Write those of samples that an earlier command drew without --png."""
    missing = [i for i in range(n) if not (folder / "png" / f"{i:08}.png").exists()]
    if missing:
        first, last = missing[0], missing[-1]
        write(first, sampling.load_tokens(folder, last + 1)[first:])


# The command


def check_flags(flags: Flags, spec: methods.Spec) -> Flags:
    """Refuse what the run cannot do.  -> flags with n_steps filled in"""
    is_video_rollout = spec.is_video and spec.method.has_own_levels
    sampling.refuse_idle_guidance(flags, spec, flags.run)
    if flags.frames and not is_video_rollout:
        raise SystemExit("--frames is a number of a video's frames, for forcing runs")
    if flags.n_given < 0 or (flags.context_frames is not None and not spec.is_video):
        raise SystemExit("--context-frames is a number of a video's first frames")
    if flags.prompt and not is_text(spec.meta):
        raise SystemExit(f"--prompt is for text, and {flags.run} makes {spec.meta['name']}")
    if flags.prompt and flags.known:
        raise SystemExit("--prompt and --known exclude each other")
    if flags.n_video is not None and flags.n_video < 0:
        raise SystemExit("--n-video must not be negative")
    if flags.gap and not flags.prompt:
        raise SystemExit("--gap is the length of the gap [...] in --prompt")
    if flags.n_steps is None:
        return replace(flags, n_steps=N_STEPS_PER_FRAME if is_video_rollout else N_STEPS)
    return flags


def n_tiles_of(spec: methods.Spec, start: Start, decoder) -> int:
    """Pictures of each sample in a video: tokens, the planner's map, and truth or decoded tokens.
    """
    has_third = start.real is not None or (decoder is not None and not is_text(spec.meta))
    return 3 if has_third else 2


def check_scale(flags: Flags, spec: methods.Spec, start: Start, decoder) -> None:
    """Refuse, before anything is sampled, a --scale at which the pictures are too large."""
    is_alone = flags.n_video == 0 or (spec.is_video and spec.method.has_own_levels)
    n_tiles = 1 if is_alone else n_tiles_of(spec, start, decoder)
    blank = np.zeros((1, *start.grid), np.int64)
    pictures.pictures(blank, spec.meta, decoder, flags.scale, n_tiles)


def n_in_video(flags: Flags, spec: methods.Spec, start: Start, decoder) -> int:
    """How many samples the video shows: N_VIDEO or fewer tall ones, unless --n-video says it."""
    n = min(len(start.labels), N_VIDEO if flags.n_video is None else flags.n_video)
    is_rollout = spec.is_video and spec.method.has_own_levels
    if flags.n_video is not None or is_rollout:
        return n
    n_tiles = n_tiles_of(spec, start, decoder)
    blank = pictures.in_lines(np.zeros((1, *start.grid), np.int64), spec.meta)
    [tile] = pictures.pictures(blank, spec.meta, decoder, flags.scale, n_tiles)
    return videos.n_that_fit(n, tile, n_tiles)


def folders_of(flags: Flags, run: Run, stages: list[Stage], start: Start) -> list[Path]:
    """Where the samples of each stage go; those of the last one to --out, if that is given."""
    folders = []
    words = words_of(flags)
    for stage in stages:
        request = request_of(flags, stage, start)
        folders.append(run.folder / "samples" / sampling.folder_name(request, *words))
        words = [*words, "after", stage.sampler, str(stage.options["n_steps"])]
    if flags.out:
        folders[-1] = Path(flags.out)
    if not flags.out and not os.access(run.folder, os.W_OK):
        raise SystemExit(f"{run.folder} is not writable: name a folder for the samples with --out")
    return folders


def request_of(flags: Flags, stage: Stage, start: Start) -> sampling.Request:
    known_tokens, known = (
        None if y is None else y.numpy() for y in (start.known_tokens, start.known)
    )
    return sampling.Request(
        stage.sampler, stage.options, flags.seed, np.array(start.labels), known_tokens, known
    )


def run_stage(
    flags: Flags, run: Run, start: Start, stage: Stage, folder: Path, world: runtime.World,
    decoder,
) -> sampling.Costs:
    """Draw what the folder lacks; rank 0 writes the pictures."""
    request = request_of(flags, stage, start)
    write = functools.partial(
        write_pngs, folder, start.grid, run.spec.meta, decoder, flags.scale
    )
    moments = sampling.draw_all(
        run, request, folder, world, flags.batch_size, flags.n_video,
        on_batch=write if flags.png else None,
    )
    with runtime.main_alone(world) as is_main:
        if is_main:
            write_files(flags, run, start, stage, folder, moments, decoder)
            if flags.png:
                write_missing_pngs(folder, request.n, write)
    return sampling.load_costs(folder, request.n)


def main(flags: Flags) -> None:
    world = runtime.start()
    run = load_run(flags.run, world.device)
    runtime.freeze(run.nets, world.device, run.spec.config["dtype"])
    flags = check_flags(flags, run.spec)
    decoder = find_decoder(flags.decoder, run.folder, run.spec.meta, world.device)
    start = starting_point(flags, run)
    is_unlabelled = run.spec.n_classes and set(start.labels) == {run.spec.n_classes}
    if world.is_main and flags.known and not flags.labels and is_unlabelled:
        print(f"samples without a label: neither {flags.known} nor --labels has one")
    stages = plan_stages(flags, run.spec)
    check_scale(flags, run.spec, start, decoder)
    flags = replace(flags, n_video=n_in_video(flags, run.spec, start, decoder))
    n = len(start.labels)
    nfe = np.zeros(n)
    for stage, folder in zip(stages, folders_of(flags, run, stages, start), strict=True):
        costs = run_stage(flags, run, start, stage, folder, world, decoder)
        nfe += costs.nfe
        if world.is_main:
            print(
                f"{n} samples, {nfe.mean():.1f} NFE each, {costs.seconds:.3f} s each on "
                f"{world.device}"
            )
        if len(stages) > 1:
            tokens = torch.from_numpy(sampling.load_tokens(folder, n))
            if stage.sampler == "self_correct" and world.is_main:
                n_changed = (tokens != start.known_tokens).sum()
                print(f"self-correction changed {n_changed} of {tokens.numel()} tokens")
            start = start._replace(known_tokens=tokens)
    runtime.end()


if __name__ == "__main__":
    with runtime.one_voice("stopped: finished batches are kept, the same command continues"):
        main(flags)
    runtime.leave_without_shutdown()
