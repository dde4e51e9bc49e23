"""Judge runs by their samples, at equal numbers of network calls.

python evaluate.py out/digits --samplers ddpd ancestral confidence --nfe 8 16 32 64 --n 500
"""

import typing
from dataclasses import dataclass

import config
from support.flags import NotNegative, Share


@dataclass(frozen=True)
class EvaluateOptions:
    """What is compared."""
    runs: tuple[str, ...]                   # folders of runs, exported or not, or hf://OWNER/NAME
    # samplers that fit the runs, or random (confidence in random order); (): each run's default
    samplers: tuple[str, ...] = ()
    # network calls per sample, or per frame of a video; (): 64, or 8 per frame
    nfe: tuple[int, ...] = ()
    n: int = 500                            # samples per row, classes in turn
    seeds: tuple[int, ...] = (0,)           # of the sampling noise; one row each
    batch_size: NotNegative = 0      # samples at a time; 0: 250, or fewer for their memory
    correct: NotNegative = 0         # gidd: steps of self-correction, which add a row
    flips: Share = 0.0               # share of known tokens that are redrawn as another id
    bits: bool = True                       # estimate bits per token, which takes a while
    again: bool = False                     # draw finished rows of evaluate.csv anew
    planner: bool = False                   # judge the planner too: RUN/reliability.png
    # TorchScript file (code that is run), tokens -> images: writes RUN/SAMPLER_NFE_*.npz
    decoder: str = ""


@dataclass(frozen=True)
class Flags(config.SamplerFlags, config.VideoFlags, EvaluateOptions):
    """One table over runs, samplers and NFE: rows of RUN/evaluate.csv, for videos also
    RUN/frames.csv; plots in the first run's folder."""

    GROUPS: typing.ClassVar = {
        "evaluate": EvaluateOptions, "videos": config.VideoFlags, **config.SamplerFlags.GROUPS,
    }


if __name__ == "__main__":
    flags = config.load(Flags)

import bisect
import functools
import inspect
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import data
import methods
from diffusion import forcing, samplers
from support import comparison, diagnostics, logs, metrics, pictures, runtime, sampling
from support.checkpoint import load_run
from support.text import is_text, load_text
from support.validate import find_decoder

N_BITS = 2048               # sequences behind bits per token, at least
N_BITS_VIDEO = 512
HASH_CHARS = 12             # of the digest of the weights, in a row's settings
N_PLANNER = 1024            # sequences that a planner is judged on
DECODED = 100               # pictures that a decoder makes at a time
N_NEIGHBOURS = 10           # samples that are shown over their nearest training pictures
N_PILOT = 64                # sequences on which a sampler's calls are counted beforehand
PACING = ("remask", "eta", "trust")      # options on which the number of calls depends
MAX_STEPS_PER_TOKEN = 16    # where more steps hardly make more calls
FRAME_KEYS = (
    "run", "train_seed", "sampler", "steps", "lag", "stabilization_level", "context_level", "flips",
    "n", "seed",
)
# Names of rows that are a sampler with options; temperature_end is a share of the temperature at
# the start
VARIANTS = {"random": ("confidence", {"order": "random", "temperature_end": 0.6})}
FITTING = dict.fromkeys(name for row in methods.METHODS.values() for name in row.samplers)
SAMPLERS = [name for name in FITTING if name != "self_correct"] + list(VARIANTS)


def sampler_of(row: str) -> str:
    """The sampler behind the name of a row."""
    return VARIANTS.get(row, (row, {}))[0]


Bits = dict[str, tuple[float, float]]       # bound -> bits per token, standard error


# A run that is judged


class Judged:
    """A trained run, its data and the metrics that fit them."""

    def __init__(self, folder: str, device: torch.device, decoder: str = ""):
        self.run = load_run(folder, device)
        self.spec = self.run.spec
        config_ = self.spec.config
        runtime.freeze(self.run.nets, device, config_["dtype"])
        self.splits = data.load(config_["data"], config_["image_size"], config_["grey_levels"])[1]
        self.decoder = find_decoder(decoder, self.run.folder, self.spec.meta, device)
        self.files = {}         # name -> path of each file written beside the table

    def path_of(self, name: str) -> Path:
        """A file's path in the run's folder; remembered, to be listed at the end."""
        return self.files.setdefault(name, self.run.folder / name)

    @functools.cached_property
    def metrics(self):
        """The metrics for this data, made on first use, since that can train a judge."""
        to_pixels = self.decoded_pixels if self.decoder else None
        to_bytes = None
        if is_text(self.spec.meta):
            to_bytes = load_text(self.run.folder, self.spec.meta).to_bytes
        return metrics.metrics_for(self.spec.meta, self.splits, to_pixels, to_bytes)

    def decoded(self, tokens: np.ndarray) -> np.ndarray:
        """Pictures of the run's decoder, a few at a time.  (n, N) -> (n, H, W, 3) uint8"""
        grids = tokens.reshape(-1, *self.spec.grid)
        starts = range(0, len(grids), DECODED)
        return np.concatenate([
            pictures.decoded_pictures(grids[i:i + DECODED], self.spec.meta, self.decoder)
            for i in starts
        ])

    def decoded_pixels(self, tokens: np.ndarray) -> np.ndarray:
        """As decoded(), but float32 in [0, 1]."""
        return self.decoded(tokens).astype(np.float32) / 255

    def bits(self) -> Bits:
        """Bits per token of held-out data and its standard error, by each bound of the method, the
        tight one first. The noise is the same for all runs; tokens that are known to samplers are
        known here too."""
        val = self.splits["val"]
        n = N_BITS_VIDEO if self.spec.is_video else N_BITS
        n_repeated = -(-n // len(val)) * len(val)       # each sequence as often as any other
        home = runtime.device_of_doubles(self.run.device)
        x0, label = (torch.from_numpy(y).to(home) for y in val.spread_subset(n_repeated))
        with runtime.autocast(self.run.device, self.spec.config["dtype"]):
            known = data.context_mask(self.spec.meta, x0, self.spec.config["context_frames"])
            rng = runtime.generator("bits")
            return methods.bits_per_token(
                self.spec, self.run.nets, x0, label, known, rng, n_distinct=len(val),
                progress=functools.partial(tqdm, desc="bits per token", leave=False),
            )

    def n_frames(self, flags: Flags) -> int:
        """Frames of a video: a rollout makes any number, other samplers as many as the data has."""
        own = self.spec.grid[0]
        if self.spec.method.has_own_levels:
            return flags.frames or 8 * own
        if flags.frames not in (0, own):
            raise SystemExit(f"--frames {flags.frames}: a {self.spec.name} run makes {own}")
        return own

    def n_unknown(self, flags: Flags) -> int:
        """Tokens of a sequence that are sampled, on average."""
        known = self.held_out(flags).known
        n_tokens = self.spec.shape.n_tokens
        return n_tokens if known is None else round((~known).mean() * n_tokens)

    def held_out(self, flags: Flags) -> "HeldOut":
        """What samples start from: held-out sequences, n at most, or classes in turn."""
        spec = self.spec
        if not spec.is_video and not spec.meta["given"]:
            return HeldOut(np.arange(flags.n) % max(1, spec.n_classes))
        val = self.splits["val"]
        real, labels = val.spread_subset(min(flags.n, len(val)))
        if spec.is_video:
            real = self.real_frames(real.reshape(len(real), *spec.grid), self.n_frames(flags))
        known = data.context_mask(spec.meta, torch.from_numpy(real), flags.n_given)
        if known is None:
            return HeldOut(labels, real, real)
        known = known.numpy()
        return HeldOut(labels, real, flip_known(real, known, flags.flips, spec.vocab), known)

    def real_frames(self, videos: np.ndarray, n_frames: int) -> np.ndarray:
        """Videos (n, F, h, w), cut or continued to n_frames.  -> (n, N)"""
        if n_frames > videos.shape[1]:
            if not self.spec.meta.get("is_certain"):
                raise SystemExit(
                    f"{self.spec.meta['name']} has no one truth after its frames: "
                    f"--frames {videos.shape[1]}"
                )
            videos = self.metrics.source.truth(videos, n_frames)
        return videos[:, :n_frames].reshape(len(videos), -1)


class HeldOut(NamedTuple):
    """What samples start from."""
    labels: np.ndarray                      # (n,)
    real: np.ndarray | None = None          # (n, N) held-out sequences
    known_tokens: np.ndarray | None = None  # (n, N), real ones with flips
    known: np.ndarray | None = None         # (n, N) bool


def flip_known(real: np.ndarray, known: np.ndarray, rate: float, vocab: int) -> np.ndarray:
    """Redraw a share of the known tokens as another id.  (n, N) -> (n, N)"""
    if not rate:
        return real.copy()
    rng = np.random.default_rng(0)
    is_flipped = (rng.random(real.shape) < rate) & known
    other = (real + rng.integers(1, vocab, real.shape)) % vocab
    return np.where(is_flipped, other, real)


# One row of the table


def n_steps_of(row: str, judged: Judged, nfe: int, flags: Flags) -> int:
    """The steps that a sampler can take with nfe network calls; refuses fewer than one step."""
    spec = judged.spec
    if spec.is_video and spec.method.has_own_levels:
        return n_steps_of_rollout(row, judged, nfe, flags)
    calls = 1 if flags.guidance in (None, 1) else 2
    if sampler_of(row) == "p2":
        calls += 1
    if sampler_of(row) == "ddpd" and "planner" in spec.method.networks:
        calls += 1 if flags.planner_guidance in (None, 1) else 2
    if nfe < calls:
        raise SystemExit(
            f"--nfe {nfe} is too small for {row}: a step of it takes {calls} network calls"
        )
    n_calls = nfe // calls
    is_unmasking = spec.noise.only_masks and not spec.method.has_own_levels
    if row in ("remdm", "planned") or (row == "ancestral" and is_unmasking):
        process = spec.noise.process
        return n_steps_of_unmasking(row, process, n_calls, judged.n_unknown(flags), flags)
    return n_calls


@functools.cache
def n_steps_of_unmasking(
    row: str, process: str, n_calls: int, n_tokens: int, flags: Flags,
) -> int:
    """The fewest steps in which a sampler that uncovers masks makes n_calls on average, if any do.

    Steps and calls differ since a step costs no call for sequences in which it uncovers no token.
    Calls are counted by sampling n_tokens masks with a uniform denoiser.
    """
    def denoiser(x, t, label, sites):
        return torch.zeros(*sites.shape, 2)

    def both(x, t, label):
        return torch.zeros(*x.shape, 2), torch.zeros(x.shape)

    sampler = {
        "ancestral": functools.partial(
            samplers.ancestral, denoiser, process=process, p_uniform=0.0
        ),
        "remdm": functools.partial(samplers.remdm, denoiser),
        "planned": functools.partial(samplers.planned, denoiser, both),
    }[row]
    options = {}
    if row != "ancestral":
        names = [name for name in PACING if name in inspect.signature(sampler).parameters]
        options = {name: getattr(flags, name) for name in names}
        options = {name: value for name, value in options.items() if value is not None}

    def spends_budget(n_steps):
        x = torch.full((N_PILOT, n_tokens), 2)
        label = torch.zeros(N_PILOT, dtype=torch.long)
        rng = runtime.generator("pilot")
        states = sampler(x, label, n_steps=n_steps, generator=rng, **options)
        final = samplers.last(states)
        return final.nfe.double().mean() >= n_calls - 0.5

    low = n_calls
    high = n_calls
    while high < MAX_STEPS_PER_TOKEN * n_tokens and not spends_budget(high):
        low = high
        high = 2 * high
    return low + bisect.bisect_left(range(low, high), True, key=spends_budget)


def n_steps_of_rollout(row: str, judged: Judged, nfe: int, flags: Flags) -> int:
    """The most steps of a frame at which a rollout makes nfe calls per frame on average."""
    n_frames = judged.n_frames(flags)
    lag = flags.lag
    if row == "ancestral":
        lag = 0
    elif lag is None:
        lag = -1
    budget = nfe * (n_frames - flags.n_given)
    fitting = 0
    for n_steps in range(1, budget + 1):
        levels = forcing.rollout_levels(
            judged.spec.grid, n_steps, n_frames, lag, flags.n_given
        )
        if len(levels) - 1 <= budget:
            fitting = n_steps
    if not fitting:
        raise SystemExit(f"--nfe is too small for --lag {lag}: {budget} network calls in all")
    return fitting


class Stage(NamedTuple):
    name: str               # in the table
    sampler: str
    options: dict[str, Any]


def plan_stages(row: str, judged: Judged, nfe: int, flags: Flags) -> list[Stage]:
    """The sampler, and self-correction after it where asked for."""
    spec = judged.spec
    sampler, variant = VARIANTS.get(row, (row, {}))
    given = flags.sampler_options()

    def options_for(name):
        known = methods.options_of(methods.find_sampler(spec, name))
        return {option: value for option, value in given.items() if option in known}

    options = options_for(sampler) | variant
    if "temperature_end" in variant:
        options["temperature_end"] = variant["temperature_end"] * given.get("temperature", 1.0)
    options["n_steps"] = n_steps_of(row, judged, nfe, flags)
    if spec.is_video:
        options["frames"] = judged.n_frames(flags)
    stages = [Stage(row, sampler, options)]
    if flags.correct and "self_correct" in spec.method.samplers:
        options = options_for("self_correct") | dict(n_steps=flags.correct)
        options.pop("temperature", None)                # it has one of its own
        stages.append(Stage(f"{row}+correct", "self_correct", options))
    return stages


def settings_of(judged: Judged, row: str, nfe: int, seed: int, flags: Flags) -> str:
    """All that a row depends on, as JSON: rows with equal settings are not drawn again."""
    settings = dict(it=judged.run.it, weights=judged.run.digest[:HASH_CHARS])
    settings |= dict(sampler=row, nfe=nfe, seed=seed, n_samples=flags.n)
    settings |= dict(correct=flags.correct, **flags.sampler_options())
    if judged.spec.is_video:
        settings |= dict(frames=flags.frames, context_frames=flags.n_given)
    if flags.decoder:
        settings["decoder"] = flags.decoder
    if flags.flips:
        settings["flips"] = flags.flips
    return json.dumps(settings, sort_keys=True)


def finished_rows(path: Path, settings: str) -> list[dict[str, Any]]:
    """Rows of a CSV that were drawn with these settings."""
    return [row for row in logs.read_numbers(path) if row.get("settings") == settings]


def add_bits(path: Path, settings: str, bits: Bits) -> None:
    """Add bits per token to finished rows that were drawn with --no-bits."""
    rows = logs.read_rows(path)
    for row in rows:
        if row["settings"] == settings and not row.get("bits_per_token"):
            row |= bits_columns(bits)
    logs.write_rows(path, rows)


class Drawn(NamedTuple):
    """The samples of a stage."""
    stage: Stage
    tokens: np.ndarray          # (n, N)
    nfe: float                  # network calls of each sample, of all stages so far
    seconds: float              # for each sample, likewise


def evaluate(
    judged: Judged, row: str, nfe: int, seed: int, flags: Flags, bits: Bits | None,
) -> list[dict[str, Any]]:
    """One row of the table, and one more where samples are corrected afterwards."""
    alone = runtime.World(0, 1, judged.run.device)
    drawn = draw_stages(judged, row, nfe, seed, flags, alone)
    return judge(judged, row, nfe, seed, flags, bits, drawn)


def draw_stages(
    judged: Judged, row: str, nfe: int, seed: int, flags: Flags, world: runtime.World,
) -> list[Drawn]:
    """Draw the samples of a row, by all processes; those that RUN/samples has are not drawn again.
    """
    run = judged.run
    labels, _, tokens, known = judged.held_out(flags)
    words = [f"flips{flags.flips:g}"] if flags.flips else []
    total_nfe = total_s = 0.0
    drawn = []
    for stage in plan_stages(row, judged, nfe, flags):
        request = sampling.Request(stage.sampler, stage.options, seed, labels, tokens, known)
        folder = run.folder / "samples" / sampling.folder_name(request, *words)
        if flags.again and world.is_main:
            shutil.rmtree(folder, ignore_errors=True)
        sampling.draw_all(run, request, folder, world, flags.batch_size)
        tokens = sampling.load_tokens(folder, request.n)
        costs = sampling.load_costs(folder, request.n)
        total_nfe += costs.nfe.mean()
        total_s += costs.seconds
        drawn.append(Drawn(stage, tokens, total_nfe, total_s))
        words += ["after", stage.sampler, str(stage.options["n_steps"])]
    return drawn


def judge(
    judged: Judged, row: str, nfe: int, seed: int, flags: Flags, bits: Bits | None,
    drawn: list[Drawn],
) -> list[dict[str, Any]]:
    """A row of the table for each stage."""
    spec, run = judged.spec, judged.run
    labels, real, _, _ = judged.held_out(flags)
    rows = []
    for stage, tokens, total_nfe, total_s in drawn:
        out = dict(
            run=str(run.folder), it=run.it, train_seed=spec.config["seed"], sampler=stage.name,
            steps=drawn[0].stage.options["n_steps"], nfe=round(total_nfe, 2),
            guidance=flags.guidance or 1.0, s_per_sample=round(total_s, 4), n=len(labels),
            seed=seed,
        )
        if spec.is_video:
            out |= dict(
                lag=-1 if flags.lag is None else flags.lag,
                stabilization_level=flags.stabilization_level or 0.0,
                context_level=flags.context_level or 0.0, flips=flags.flips,
            )
        scores, per_frame = judged.metrics.scores(
            tokens, labels, real, flags.n_given if spec.is_video else 0
        )
        out |= scores
        if spec.is_video:
            write_frames(judged.path_of("frames.csv"), out, per_frame)
        out |= bits_columns(bits)
        out |= dict(
            commit=runtime.commit(), device=runtime.device_name(run.device),
            settings=settings_of(judged, row, nfe, seed, flags),
        )
        rows.append(out)
        if isinstance(judged.metrics, metrics.PictureMetrics):
            draw_neighbours(judged, stage.name, nfe, tokens, labels)
        if flags.decoder:
            stem = f"{stage.name}_{nfe}_seed{seed}_guidance{flags.guidance or 1:g}"
            write_images(judged, stem, tokens)
    return rows


def bits_columns(bits: Bits | None) -> dict[str, float]:
    """The tight bound as bits_per_token, every other one under its name; none with --no-bits."""
    if bits is None:
        return {}
    tight, *others = bits.items() or [("none", (math.nan, math.nan))]      # no closed form
    columns = dict(bits_per_token=round(tight[1][0], 4), bits_se=round(tight[1][1], 4))
    for name, (value, error) in others:
        columns |= {f"bits_{name}": round(value, 4), f"bits_{name}_se": round(error, 4)}
    return columns


def write_frames(path: Path, row: dict[str, Any], per_frame: dict[str, np.ndarray]) -> None:
    """A row of frames.csv for each frame."""
    rows = []
    for frame in range(len(next(iter(per_frame.values())))):
        values = {name: round(float(value[frame]), 4) for name, value in per_frame.items()}
        rows.append({key: row[key] for key in FRAME_KEYS} | dict(frame=frame) | values)
    logs.append_rows(path, *rows)


def draw_neighbours(
    judged: Judged, sampler: str, nfe: int, tokens: np.ndarray, labels: np.ndarray
) -> None:
    """The first samples over their nearest training pictures: RUN/neighbours_SAMPLER_NFE.png."""
    meta = judged.spec.meta
    tokens = tokens[:N_NEIGHBOURS]
    nearest, distances = judged.metrics.nearest(tokens)
    captions = [
        [pictures.label_name(label, meta), f"{distance:.0f} of 255 rms"]
        for label, distance in zip(labels, distances, strict=False)
    ]
    pairs = np.stack([tokens, nearest], 1).reshape(len(tokens), 2, *meta["grid"])
    path = judged.path_of(f"neighbours_{sampler}_{nfe}.png")
    title = [f"{sampler} at {nfe} NFE", "below: the nearest training pictures"]
    pictures.pairs_png(path, pairs, captions, meta, title, judged.decoder)


def write_images(judged: Judged, name: str, tokens: np.ndarray) -> None:
    """Decoded samples as uint8 (n, H, W, 3) under arr_0: the layout of the ADM evaluation suite."""
    np.savez(judged.path_of(f"{name}.npz"), judged.decoded(tokens))


# The table


def describe_bits(bits: Bits | None) -> str:
    if bits is None:
        return "bits per token left out"
    if not bits:
        return "no likelihood bound for its noise"
    bounds = [f"{value:.3f} +- {error:.3f} ({name})" for name, (value, error) in bits.items()]
    return f"{', '.join(bounds)} bits per token on held-out data"


def check_flags(flags: Flags) -> None:
    for name in flags.samplers:
        if name not in SAMPLERS:
            raise SystemExit(f"--samplers {name} is not one of {', '.join(SAMPLERS)}")
    if not flags.runs or not flags.seeds:
        raise SystemExit("name at least one run and --seeds")
    if min(flags.nfe, default=1) < 1 or flags.n < 2:
        raise SystemExit("--nfe must be at least 1, --n at least 2")
    if not all(0 <= seed < 2**32 for seed in flags.seeds):
        raise SystemExit("--seeds must lie in [0, 4294967295]")
    if flags.n_given < 0:
        raise SystemExit("--context-frames must not be negative")


def check_run(judged: Judged, names: list[str], budgets: tuple[int, ...], flags: Flags) -> None:
    """Refuse what the run cannot do, before anything is sampled.

    Where several runs are compared, samplers that do not fit become rows of n/a.
    """
    spec = judged.spec
    if not os.access(judged.run.folder, os.W_OK):
        raise SystemExit(f"{judged.run.folder} is not writable: evaluate.csv belongs there")
    is_guided = any(scale not in (None, 1) for scale in (flags.guidance, flags.planner_guidance))
    if is_guided and not (spec.config["label_dropout"] and spec.n_classes):
        raise SystemExit(
            f"{judged.run.folder} was trained without labels or their dropout: "
            "nothing to guide away from"
        )
    known_options = set()
    for name in names:
        with runtime.one_line_errors(ValueError):
            if len(flags.runs) == 1 or sampler_of(name) in spec.method.samplers:
                sampler = methods.find_sampler(spec, sampler_of(name))
                known_options |= set(methods.options_of(sampler))
        n_steps_of(name, judged, min(budgets), flags)
    if len(flags.runs) == 1:
        for option in flags.sampler_options():
            if option not in known_options:
                raise SystemExit(f"--{option.replace('_', '-')} is no option of {', '.join(names)}")
        refuse_idle_flags(spec, flags)


def refuse_idle_flags(spec: methods.Spec, flags: Flags) -> None:
    """Refuse, by name, flags that the run has no use for."""
    has_known = spec.is_video or bool(spec.meta["given"])
    idle = {
        "--correct": flags.correct and "self_correct" not in spec.method.samplers,
        "--planner": flags.planner and "ddpd" not in spec.method.samplers,
        "--flips": flags.flips and not has_known,
        "--frames": flags.frames and not spec.is_video,
        "--context-frames": flags.context_frames is not None and not spec.is_video,
    }
    for flag, is_idle in idle.items():
        if is_idle:
            raise SystemExit(f"{flag} means nothing for a {spec.name} run on {spec.meta['name']}")


def evaluate_run(judged: Judged, flags: Flags, world: runtime.World) -> None:
    """All rows of one run, printed and written to its evaluate.csv by rank 0."""
    spec = judged.spec
    names = list(flags.samplers) or list(spec.method.samplers)[:1]
    budgets = flags.nfe or ((8,) if spec.is_video else (64,))
    check_run(judged, names, budgets, flags)
    bits = None
    table = comparison.Table()
    with runtime.main_alone(world) as is_main:
        if is_main:
            bits = describe_run(judged, flags, table)
    for name in names:
        if sampler_of(name) not in spec.method.samplers:
            if world.is_main:
                write_misfit(judged, name)
            continue
        for nfe in budgets:
            for seed in flags.seeds:
                add_rows(judged, name, nfe, seed, flags, bits, table, world)


def describe_run(judged: Judged, flags: Flags, table: comparison.Table) -> Bits | None:
    """Print what is known before anything is sampled.  -> bits per token, if they are asked for"""
    spec, folder = judged.spec, judged.run.folder
    bits = judged.bits() if flags.bits else None
    print(f"{folder}, iteration {judged.run.it}: {describe_bits(bits)}")
    if flags.planner and "ddpd" in spec.method.samplers:
        x0, label = (torch.from_numpy(y) for y in judged.splits["val"].spread_subset(N_PLANNER))
        limit = min(64, sampling.batch_limit(spec, "", 1))
        diagnostics.report_planner(judged.run, x0, label, limit)
        judged.path_of("reliability.png")
    held_out = held_out_scores(judged)
    if "features" in held_out:
        print(f"features for Frechet distance, precision and recall: {held_out['features']}")
    if held_out:
        table.print(dict(sampler="held-out data", n=judged.metrics.n_val, **held_out))
    return bits


def write_misfit(judged: Judged, name: str) -> None:
    """The row of a sampler that does not fit the run, unless it is there."""
    path = judged.run.folder / "evaluate.csv"
    row = dict(run=str(judged.run.folder), sampler=name, steps="n/a", nfe="n/a", judge_acc="n/a")
    known = [(old["sampler"], old["steps"]) for old in logs.read_rows(path)]
    if (name, "n/a") not in known:
        logs.append_rows(path, row)
    print(f"  {name}: n/a for a {judged.spec.name} run")


def held_out_scores(judged: Judged) -> dict[str, Any]:
    """Scores of held-out data, {} where they would say nothing."""
    return judged.metrics.val[0] if judged.metrics.val else {}


def add_rows(
    judged: Judged, name: str, nfe: int, seed: int, flags: Flags, bits: Bits | None,
    table: comparison.Table, world: runtime.World,
) -> None:
    """Print the rows of a setting, one for each stage: those in evaluate.csv if they are finished,
    or else drawn now by all processes and judged by rank 0."""
    path = judged.run.folder / "evaluate.csv"
    rows = None
    if world.is_main:
        rows = known_rows(judged, name, nfe, seed, flags, bits)
    if rows := sampling.from_main(rows, world):
        if world.is_main:
            for row in rows:
                table.print(row, "  from evaluate.csv")
        return
    with runtime.one_line_errors(ValueError):
        drawn = draw_stages(judged, name, nfe, seed, flags, world)
    with runtime.main_alone(world) as is_main:
        if is_main:
            rows = judge(judged, name, nfe, seed, flags, bits, drawn)
            logs.append_rows(path, *rows)
            for row in rows:
                table.print(row, "")


def known_rows(
    judged: Judged, name: str, nfe: int, seed: int, flags: Flags, bits: Bits | None,
) -> list[dict[str, Any]] | None:
    """The finished rows of a setting; None if they are missing, or --again asks for new ones."""
    path = judged.run.folder / "evaluate.csv"
    settings = settings_of(judged, name, nfe, seed, flags)
    n_stages = len(plan_stages(name, judged, nfe, flags))
    rows = finished_rows(path, settings)[-n_stages:]            # --again leaves the older ones
    if len(rows) < n_stages or flags.again:
        return None
    if bits and not all("bits_per_token" in row for row in rows):
        add_bits(path, settings, bits)
    return rows


def summary(folders: list[Path], files: list[Path], plot: Path | None) -> str:
    """Where the tables and pictures are, in one line."""
    tables = ", ".join(str(folder / "evaluate.csv") for folder in folders)
    written = [str(path) for path in files]
    if plot is not None:
        has_several = len(folders) > 1
        written.insert(0, f"{plot}{' (a plot of all runs)' * has_several}")
    return f"rows: {tables}" + f"; wrote {', '.join(written)}" * bool(written)


def main(flags: Flags) -> None:
    check_flags(flags)
    world = runtime.start()
    rows = []
    held_out = {}
    folders = []
    files = []
    for name in flags.runs:
        judged = Judged(name, world.device, flags.decoder)
        folder = judged.run.folder
        folders.append(folder)
        evaluate_run(judged, flags, world)
        files += judged.files.values()
        if world.is_main:
            held_out[str(folder)] = held_out_scores(judged)
            table = logs.read_numbers(folder / "evaluate.csv")
            rows += [row | {"run": str(folder)} for row in table]
    if world.is_main:
        plot = folders[0] / "evaluate.png"
        is_drawn = comparison.plot(rows, held_out, plot)
        print(summary(folders, files, plot if is_drawn else None))
    runtime.end()


if __name__ == "__main__":
    with runtime.one_voice("stopped: finished rows are kept, the same command continues"):
        main(flags)
    runtime.leave_without_shutdown()
