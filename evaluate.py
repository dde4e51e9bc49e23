"""Judge runs by their samples, at equal numbers of network calls.

python evaluate.py out/digits --samplers ddpd ancestral confidence --nfe 8 16 32 64 --n 500
"""

import typing
from dataclasses import dataclass

import config
from formats.flags import NotNegative, Share


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
    batch_size: NotNegative = 0      # samples at a time; 0: 250, fewer on a CPU or for memory
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

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import methods
from support import comparison, diagnostics, logs, metrics, pictures, runtime, sampling
from support.budgets import VARIANTS, n_steps_of, sampler_of
from support.judged import Bits, Judged

HASH_CHARS = 12             # of the digest of the weights, in a row's settings
N_PLANNER = 1024            # sequences that a planner is judged on
N_NEIGHBOURS = 10           # samples that are shown over their nearest training pictures
FRAME_KEYS = (
    "run", "train_seed", "sampler", "steps", "lag", "stabilization_level", "context_level", "flips",
    "n", "seed",
)
FITTING = dict.fromkeys(name for row in methods.METHODS.values() for name in row.samplers)
SAMPLERS = [name for name in FITTING if name != "self_correct"] + list(VARIANTS)


# One row of the table


class Stage(NamedTuple):
    name: str               # in the table
    sampler: str
    options: dict[str, Any]


def plan_stages(name: str, judged: Judged, nfe: int, flags: Flags) -> list[Stage]:
    """The sampler, and self-correction after it where asked for; steps follow from the budget."""
    spec = judged.spec
    sampler, variant = VARIANTS.get(name, (name, {}))
    given = flags.sampler_options()

    def options_for(sampler):
        known = methods.options_of(methods.find_sampler(spec, sampler))
        return {option: value for option, value in given.items() if option in known}

    options = options_for(sampler) | variant
    if "temperature_end" in variant:
        options["temperature_end"] = variant["temperature_end"] * given.get("temperature", 1.0)
    options["n_steps"] = n_steps_of(name, judged, nfe, flags)
    if spec.is_video:
        options["frames"] = judged.n_frames(flags)
    stages = [Stage(name, sampler, options)]
    if flags.correct and "self_correct" in spec.method.samplers:
        options = options_for("self_correct") | dict(n_steps=flags.correct)
        options.pop("temperature", None)                # it has one of its own
        stages.append(Stage(f"{name}+correct", "self_correct", options))
    return stages


def settings_of(judged: Judged, name: str, nfe: int, seed: int, flags: Flags) -> str:
    """All that a row depends on, as JSON: rows with equal settings are not drawn again."""
    settings = dict(it=judged.run.it, weights=judged.run.digest[:HASH_CHARS])
    settings |= dict(sampler=name, nfe=nfe, seed=seed, n_samples=flags.n)
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
    nfe: float                  # mean network calls of a sample, of all stages so far
    seconds: float              # for each sample, likewise


def evaluate(
    judged: Judged, name: str, nfe: int, seed: int, flags: Flags, bits: Bits | None,
) -> list[dict[str, Any]]:
    """One row of the table, and one more where samples are corrected afterwards."""
    alone = runtime.World(0, 1, judged.run.device)
    drawn = draw_stages(judged, name, nfe, seed, flags, alone)
    return judge(judged, name, nfe, seed, flags, bits, drawn)


def draw_stages(
    judged: Judged, name: str, nfe: int, seed: int, flags: Flags, world: runtime.World,
) -> list[Drawn]:
    """Draw the samples of a row, by all processes; those that RUN/samples has are not drawn again.
    """
    run = judged.run
    labels, _, tokens, known = judged.held_out(flags)
    words = [f"flips{flags.flips:g}"] if flags.flips else []
    total_nfe = total_s = 0.0
    drawn = []
    for stage in plan_stages(name, judged, nfe, flags):
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
    judged: Judged, name: str, nfe: int, seed: int, flags: Flags, bits: Bits | None,
    drawn: list[Drawn],
) -> list[dict[str, Any]]:
    """A row of the table for each stage."""
    spec, run = judged.spec, judged.run
    labels, real, _, _ = judged.held_out(flags)
    guidance = 1.0 if flags.guidance is None else flags.guidance
    rows = []
    for stage, tokens, total_nfe, total_s in drawn:
        out = dict(
            run=str(run.folder), it=run.it, train_seed=spec.config["seed"], sampler=stage.name,
            steps=drawn[0].stage.options["n_steps"], nfe=round(total_nfe, 2),
            guidance=guidance, s_per_sample=round(total_s, 4), n=len(labels),
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
            settings=settings_of(judged, name, nfe, seed, flags),
        )
        rows.append(out)
        if isinstance(judged.metrics, metrics.PictureMetrics):
            draw_neighbours(judged, stage.name, nfe, tokens, labels)
        if flags.decoder:
            stem = f"{stage.name}_{nfe}_seed{seed}_guidance{guidance:g}"
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
    sampling.refuse_idle_guidance(flags, spec, judged.run.folder)
    known_options = set()
    if flags.correct and "self_correct" in spec.method.samplers:
        known_options |= set(methods.options_of(methods.find_sampler(spec, "self_correct")))
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
