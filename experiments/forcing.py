"""Rollouts of videos and solutions of mazes, judged exactly.

python experiments/forcing.py [train | sample | table] [bounce | maze] [compile]

bounce  Diffusion Forcing, full-sequence and next-frame diffusion, two seeds: 6 and 62 frames after
        2, with and without stabilization, and after frames with flipped pixels:
        assets/forcing_bounce.csv, and frames.csv of each run
maze    planner and denoiser, GIDD and Diffusion Forcing, success against NFE; and particles that
        steer paths through a wanted cell: assets/forcing_maze.csv
table   the tables of those files, and assets/forcing_*.png
Without a word all of it is done. "compile" takes a third off a step of training.
Finished runs and rows are skipped, so the same command resumes.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import common
import numpy as np
import torch

import evaluate
import methods
from diffusion import samplers
from diffusion.processes import Noise, flip_rate_to_level
from support import logs, runtime

# (config, seed) of each run, in the order of the tables
RUNS = {
    "bounce": [
        ("bounce_forcing", 0),
        ("bounce_full", 0),
        ("bounce_next", 0),
        ("bounce_forcing", 1),
        ("bounce_full", 1),
        ("bounce_next", 1),
    ],
    "maze": [
        ("maze_forcing", 0),
        ("maze_ddpd", 0),
        ("maze_gidd", 0),
        ("maze_forcing", 1),
        ("maze_ddpd", 1),
    ],
}
TABLES = {data: common.Table(f"forcing_{data}.csv") for data in RUNS}
COLUMNS = {"bounce": ("all_right", "right", "intact"), "maze": ("valid", "shortest", "through")}

# Videos
LAG = {"bounce_forcing": -1, "bounce_full": 0, "bounce_next": -1}       # as each was trained
NEAR = 8                # frames, the first two of them given
FAR = 64
N_FAR = 16              # long rollouts
CALLS = 1               # network calls per frame
MORE_CALLS = (2, 4)
PYRAMID_LAG = 1         # rows in between: 7 steps, in twice as many calls
FLIPS = 0.05            # share of flipped pixels
TEMPERATURE = 0.3       # low: the flights are deterministic
STABILIZATION = {
    "bounce_forcing": (0.0, 0.02, 0.05),
    "bounce_full": (0.0, 0.02),
    "bounce_next": (0.0, 0.02),
}

# Mazes
SAMPLERS = {
    "maze_forcing": ("rollout",),
    "maze_ddpd": ("confidence", "ddpd", "ancestral"),
    "maze_gidd": ("ancestral",),
}
NFE = (8, 16, 32, 64)
N_MAZES = 500
GUIDED_RUN = ("maze_forcing", 0)
N_GUIDED = 60           # mazes
GUIDED_STEPS = 32
PARTICLES = 16          # for each maze
REWARD_WEIGHT = 6.0
SELDOM = (0.05, 0.3)    # shares of unguided paths that cross a wanted cell, exclusive

LINE_STYLES = ("-", "--", ":", "-.")


def run_folder(name: str, seed: int) -> str:
    return f"out/forcing/{name}_{seed}"


def name_of(row: dict[str, str]) -> str:
    """The config of a row's run."""
    return Path(row["run"]).name.rsplit("_", 1)[0]


def names_of(data: str) -> list[str]:
    """The configs of all runs, each once."""
    return list(dict.fromkeys(name for name, _ in RUNS[data]))


def train(data: str) -> None:
    compiled = "compile" in sys.argv
    for name, seed in RUNS[data]:
        common.train(name, run_folder(name, seed), seed, compiled=compiled)


# Sampling


class Job(NamedTuple):
    name: str               # of the row, or of both rows where a sample is corrected afterwards
    sampler: str
    nfe: int                # per frame of a video
    flags: evaluate.Flags


def bounce_jobs(name: str, noise: Noise) -> list[Job]:
    near = evaluate.Flags(runs=(), frames=NEAR, lag=LAG[name], temperature=TEMPERATURE)
    far = replace(near, frames=FAR, n=N_FAR)
    flipped = replace(near, flips=FLIPS)
    told = replace(flipped, context_level=flip_rate_to_level(FLIPS, noise))
    jobs = [
        Job("near", "rollout", CALLS, near),
        Job("near, temperature 1", "rollout", CALLS, replace(near, temperature=1.0)),
    ]
    for level in STABILIZATION[name]:
        flags = replace(far, stabilization_level=level)
        jobs.append(Job(f"far {level}", "rollout", CALLS, flags))
    jobs.append(Job("flips", "rollout", CALLS, flipped))
    jobs.append(Job("flips told", "rollout", CALLS, told))
    if name == "bounce_forcing":
        for calls in MORE_CALLS:
            jobs.append(Job(f"near, {calls} calls", "rollout", calls, near))
        pyramid = replace(near, lag=PYRAMID_LAG)
        jobs.append(Job("pyramid", "rollout", MORE_CALLS[0], pyramid))
        jobs.append(Job("together", "rollout", MORE_CALLS[0], replace(near, lag=0)))
    return jobs


def maze_jobs(name: str, seed: int) -> list[Job]:
    """All samplers for the first seed, the best alone for the second."""
    samplers = SAMPLERS[name][:1] if seed else SAMPLERS[name]
    jobs = []
    for sampler in samplers:
        for nfe in NFE:
            flags = evaluate.Flags(runs=(), n=N_MAZES, correct=nfe)
            jobs.append(Job(f"{sampler} {nfe}", sampler, nfe, flags))
    return jobs


def sample(data: str) -> None:
    for name, seed in RUNS[data]:
        judged = open_finished(run_folder(name, seed))
        if judged:
            sample_run(data, name, seed, judged)


def open_finished(folder: str) -> evaluate.Judged | None:
    """A run that has had all its iterations; None for another, by name."""
    if common.is_started(folder):
        judged = evaluate.Judged(folder, runtime.pick_device())
        if judged.run.it >= judged.spec.config["max_iters"]:
            return judged
    print(f"{folder} is not trained yet")
    return None


def sample_run(data: str, name: str, seed: int, judged: evaluate.Judged) -> None:
    """The rows of one run that are missing."""
    folder = run_folder(name, seed)
    table = TABLES[data]
    if data == "bounce":
        jobs = bounce_jobs(name, judged.spec.noise)
    else:
        jobs = maze_jobs(name, seed)
    missing = [job for job in jobs if not table.has(run=folder, job=job.name)]
    if missing:
        bits = judged.bits()
        for job in missing:
            rows = evaluate.evaluate(judged, job.sampler, job.nfe, seed, job.flags, bits)
            for row in rows:
                add_row(data, row | {"job": job.name})
    if (name, seed) == GUIDED_RUN and not table.has(run=folder, job="particles"):
        guide(judged)


def add_row(data: str, row: dict) -> None:
    TABLES[data].add(row)
    shown = ("run", "job", "sampler", "nfe", *COLUMNS[data])
    words = [f"{column} {row[column]}" for column in shown if column in row]
    print(*words, flush=True)


# Particles


def guide(judged: evaluate.Judged) -> None:
    """Steer paths through a wanted cell by particles, beside paths that are not steered.

    The wanted cell of a maze is one that its unguided paths seldom cross. Two rows of
    forcing_maze.csv; the samples are PARTICLES paths for each maze.
    """
    path = judged.metrics.source.PATH
    mazes = judged.held_out(evaluate.Flags(runs=(), n=N_GUIDED))
    real, known_tokens, known = (np.repeat(y, PARTICLES, axis=0) for y in mazes[1:])
    free = draw_paths(judged, known_tokens, known, seed=0)
    is_valid = score(judged, free)["valid"]                             # (mazes * particles,)
    crosses = (free == path) & is_valid[:, None]
    rate = crosses.reshape(N_GUIDED, PARTICLES, -1).mean(1)             # (mazes, tokens)
    wanted = np.repeat(choose_cells(rate), PARTICLES)
    has_cell = wanted >= 0
    real = real[has_cell]
    known_tokens = known_tokens[has_cell]
    known = known[has_cell]
    cell = wanted[has_cell][:, None]                                    # (n, 1)

    def reward(x):
        at_cell = x.gather(1, torch.from_numpy(cell).to(x.device))
        return (at_cell == path)[:, 0].float()

    steering = dict(reward=reward, reward_weight=REWARD_WEIGHT, particles=PARTICLES, n_draws=4)
    rows = [("particles, none", "rollout", {}), ("particles", "particles", steering)]
    for job, sampler, options in rows:
        x = draw_paths(judged, known_tokens, known, seed=1, **options)
        scores = score(judged, x, real)
        at_cell = np.take_along_axis(x, cell, axis=1)[:, 0]
        scores["through"] = (at_cell == path) & scores["valid"]
        row = dict(run=str(judged.run.folder), sampler=sampler, n=len(x), nfe=GUIDED_STEPS)
        row["commit"] = runtime.commit()
        for column, values in scores.items():
            row[column] = round(float(values.mean()), 4)
        add_row("maze", row | {"job": job})


def draw_paths(
    judged: evaluate.Judged, known_tokens: np.ndarray, known: np.ndarray, seed: int, **options
) -> np.ndarray:
    """One batch of mazes (n, N) with paths drawn into them."""
    device = runtime.device_of_doubles(judged.run.device)
    label = torch.zeros(len(known), dtype=torch.long, device=device)
    with runtime.autocast(judged.run.device, judged.spec.config["dtype"]):
        states = methods.sample(
            judged.spec, judged.run.nets, label, sampler="rollout", n_steps=GUIDED_STEPS,
            generator=runtime.generator("sample", seed, device=device),
            known=torch.from_numpy(known).to(device),
            known_tokens=torch.from_numpy(known_tokens).to(device), **options,
        )
        return samplers.last(states).x.cpu().numpy()


def score(judged: evaluate.Judged, x: np.ndarray, real: np.ndarray | None = None) -> dict:
    """x, real (n, N)  ->  {"valid": (n,) bool, "shortest": (n,) bool}"""
    to_grid = judged.metrics.on_grid
    return judged.metrics.source.score(to_grid(x), None if real is None else to_grid(real))


def choose_cells(rate: np.ndarray) -> np.ndarray:
    """A random cell of each maze whose rate of crossings lies in SELDOM; -1 where there is none.

    rate (mazes, tokens)  ->  (mazes,)
    """
    rng = np.random.default_rng(0)
    low, high = SELDOM
    wanted = np.full(len(rate), -1)
    for i, rate_of_cell in enumerate(rate):
        cells = np.flatnonzero((low < rate_of_cell) & (rate_of_cell < high))
        if len(cells):
            wanted[i] = rng.choice(cells)
    return wanted


# Tables and figures


def table(data: str) -> None:
    """Print means over seeds, and draw them."""
    common.print_header("run", "job", "NFE", *COLUMNS[data])
    for name in names_of(data):
        rows = [row for row in TABLES[data].rows() if name_of(row) == name]
        for job, sampler in dict.fromkeys((row["job"], row["sampler"]) for row in rows):
            mine = common.select(rows, job=job, sampler=sampler)
            cells = [f"{name} ({len(mine)})", f"{job}, {sampler}"]
            cells.append(f"{common.mean(mine, 'nfe'):.0f}")
            cells += [percent(common.mean(mine, column)) for column in COLUMNS[data]]
            common.print_row(cells)
    draw(data)


def percent(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.1%}"


class Line(NamedTuple):
    name: str               # of the config; lines of one share a color
    variant: str
    x: list[float]
    y: list[float]


def bounce_lines(column: str) -> list[Line]:
    """Means over long rollouts and seeds, against frames."""
    lines = []
    for name in names_of("bounce"):
        rows = []
        for of_run, seed in RUNS["bounce"]:
            if of_run == name:
                rows += logs.read_rows(Path(run_folder(name, seed)) / "frames.csv")
        rows = common.select(rows, n=N_FAR)
        frames = sorted({int(row["frame"]) for row in rows})
        for level in STABILIZATION[name]:
            mine = common.select(rows, stabilization_level=level)
            means = [common.mean(common.select(mine, frame=frame), column) for frame in frames]
            lines.append(Line(name, f"stabilization {level:g}", frames, means))
    return lines


def maze_lines(column: str) -> list[Line]:
    """Means over mazes and seeds, against NFE; without particles, whose rows have no bits."""
    rows = [row for row in TABLES["maze"].rows() if row["bits_per_token"]]
    lines = []
    for name in names_of("maze"):
        of_run = [row for row in rows if name_of(row) == name]
        for sampler in dict.fromkeys(row["sampler"] for row in of_run):
            mine = common.select(of_run, sampler=sampler)
            points = sorted({(float(row["nfe"]), row["job"]) for row in mine})
            nfe = [x for x, _ in points]
            means = [common.mean(common.select(mine, job=job), column) for _, job in points]
            lines.append(Line(name, sampler, nfe, means))
    return lines


LINES = {"bounce": bounce_lines, "maze": maze_lines}
X_LABELS = {"bounce": "frame", "maze": "network calls (NFE)"}
PANELS = {
    "bounce": {"intact": "sprite intact", "right": "frames exactly right"},
    "maze": {"valid": "valid paths", "shortest": "shortest paths"},
}


def draw(data: str) -> None:
    """assets/forcing_bounce.png or forcing_maze.png: a panel for each score."""
    lines = {column: LINES[data](column) for column in PANELS[data]}
    is_complete = all(of_panel and all(line.x for line in of_panel) for of_panel in lines.values())
    if not is_complete:
        print(f"assets/forcing_{data}.png is not redrawn: rows are missing, or frames.csv of runs")
        return
    figure, panels = common.open_figure(1, 2, width=12, height=4.4, sharey=True)
    for panel, (column, title) in zip(panels, PANELS[data].items(), strict=True):
        draw_lines(panel, lines[column], marker="o" if data == "maze" else None)
        panel.set(xlabel=X_LABELS[data], ylabel=f"share of {title}", ylim=(-0.02, 1.02))
        if data == "maze":
            common.set_ticks(panel, NFE)
    common.outside_legend(figure, panels[0])
    common.save_figure(figure, f"forcing_{data}.png", dpi=100)


def draw_lines(panel, lines: list[Line], marker: str | None) -> None:
    """A color for each config, a style for each of its variants."""
    names = list(dict.fromkeys(line.name for line in lines))
    for i, name in enumerate(names):
        variants = [line for line in lines if line.name == name]
        for j, line in enumerate(variants):
            style = dict(color=f"C{i}", linestyle=LINE_STYLES[j], marker=marker)
            panel.plot(line.x, line.y, label=f"{name}, {line.variant}", **style)


if __name__ == "__main__":
    steps = {"train": train, "sample": sample, "table": table}
    words = common.read_words(__doc__, *steps, *RUNS, "compile")
    for data in common.choose(words, RUNS):
        common.run_steps(steps, common.choose(words, steps), data)
