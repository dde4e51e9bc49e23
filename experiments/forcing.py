"""Rollouts and mazes, judged exactly.   python experiments/forcing.py [train | sample | table] [bounce | maze]

bounce  Diffusion Forcing, full-sequence and next-frame diffusion, two seeds: 6 frames after 2, 62 frames after 2 with
        and without stabilisation, and context with flipped pixels: assets/forcing_bounce.csv, frames.csv of the runs
maze    planner and denoiser, GIDD, Diffusion Forcing: success against NFE (assets/forcing_maze.csv); and particle
        guidance through a wanted cell
table   prints the rows of the tables and draws assets/forcing_*.png
Without a word all of it; "compile" trains compiled networks, in about half the time. Finished runs and rows are
skipped, so it can be stopped and started again.
"""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import config
import evaluate
import runtime
import train_ddpd
from diffusion import processes

RUNS = {"bounce": [(f"bounce_{kind}", seed) for seed in (0, 1) for kind in ("forcing", "full", "next")],
        "maze": [("maze_forcing", 0), ("maze_ddpd", 0), ("maze_gidd", 0), ("maze_forcing", 1),
                 ("maze_ddpd", 1)]}
LAG = {"bounce_forcing": -1, "bounce_full": 0, "bounce_next": -1}       # as each was trained
CALLS, MORE, FLIPS = 1, (2, 4), 0.05    # network calls per frame; share of flipped pixels
PYRAMID = 1                             # lag of rows in between: 7 steps, in twice as many calls
TEMPERATURE = 0.3                       # flights are certain: what they ask of a sampler is no variety
FAR, N_FAR = 64, 16                     # frames of a long rollout, and how many of them
STABILISE = {"bounce_forcing": (0.0, 0.02, 0.05), "bounce_full": (0.0, 0.02), "bounce_next": (0.0, 0.02)}
SAMPLERS = {"maze_forcing": ("rollout",), "maze_ddpd": ("confidence", "ddpd", "ancestral"), "maze_gidd": ("ancestral",)}
NFE, N_MAZES = (8, 16, 32, 64), 500
PARTICLES, STRENGTH, N_GUIDED = 16, 6.0, 60


def folder(name, seed):
    return f"out/forcing/{name}_{seed}"


def train(data):
    for name, seed in RUNS[data]:
        cfg = config.load(argv=[str(ROOT / "configs" / f"{name}.py"), "--seed", str(seed), "--out-dir",
                                folder(name, seed)])
        train_ddpd.main(replace(cfg, eval_interval=0, eval_samples=0, compile="compile" in sys.argv))


def rows(data):
    path = ROOT / "assets" / f"forcing_{data}.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def add(data, row, **more):
    evaluate.write_row(ROOT / "assets" / f"forcing_{data}.csv", row | more)
    print(*(f"{k} {row[k]}" for k in ("run", "sampler", "nfe", "all_right", "right", "intact", "valid", "shortest")
            if k in row), more, flush=True)


def bounce_jobs(name, process, p_uniform, vocab):
    """(what is asked, sampler, calls per frame, flags) of a run's rows."""
    lag, told = LAG[name], processes.level_of_flips(FLIPS, vocab, process, p_uniform)
    near, far = (evaluate.Flags(runs=(), frames=n, lag=lag, temperature=TEMPERATURE) for n in (8, FAR))
    jobs = [("near", CALLS, near), ("near, temperature 1", CALLS, replace(near, temperature=1.0))]
    jobs += [(f"far {s}", CALLS, replace(far, stabilise=s, n_samples=N_FAR)) for s in STABILISE[name]]
    jobs += [("flips", CALLS, replace(near, flips=FLIPS)),
             ("flips told", CALLS, replace(near, flips=FLIPS, context_level=told))]
    if name == "bounce_forcing":
        jobs += [(f"near, {calls} calls", calls, near) for calls in MORE]
        jobs += [("pyramid", MORE[0], replace(near, lag=PYRAMID)), ("together", MORE[0], replace(near, lag=0))]
    return [(job, "rollout", calls, flags) for job, calls, flags in jobs]


def sample(data):
    device = runtime.pick_device()
    for name, seed in RUNS[data]:
        has_any = (Path(folder(name, seed)) / "ckpt.pt").exists()
        run = evaluate.Run(folder(name, seed), device) if has_any else None
        if not run or run.it < run.cfg["max_iters"]:
            print(f"{folder(name, seed)} is not trained yet")
            continue
        done = {r["job"] for r in rows(data) if r["run"] == run.folder}
        if data == "bounce":
            jobs = bounce_jobs(name, run.process, run.p_uniform, run.meta["vocab"])
        else:
            jobs = [(f"{s} {nfe}", s, nfe, evaluate.Flags(runs=(), n_samples=N_MAZES, correct=nfe))
                    for s in SAMPLERS[name][:1 if seed else None] for nfe in NFE]   # a second seed of the best alone
        if {job for job, *_ in jobs} <= done:
            continue
        bits = run.bits()
        for job, sampler, nfe, flags in jobs:
            if job not in done:
                for row in evaluate.evaluate(run, sampler, nfe, seed, flags, bits):
                    add(data, row, job=job)
        if (name, seed) == ("maze_forcing", 0) and "particles" not in done:
            guide(run, bits)


def guide(run, bits):
    """Particles through a wanted cell, one that unguided paths seldom cross: rows of maze.csv."""
    path, n_tokens = run.judge.source.PATH, 81
    real, given, known = run.held_out(N_GUIDED, evaluate.Flags(runs=()))
    many = [np.repeat(y, PARTICLES, 0) for y in (given, known)]
    labels, rng = np.zeros(len(many[0]), np.int64), np.random.default_rng(0)
    options = dict(n_steps=32)
    free = run.draw("rollout", options, labels, 0, len(labels), *many)[0].reshape(N_GUIDED, PARTICLES, n_tokens)
    rate = ((free == path) & run.judge.source.score(free.reshape(-1, 9, 9))["valid"].reshape(N_GUIDED, -1, 1)).mean(1)
    seldom = [np.flatnonzero((0.05 < r) & (r < 0.3)) for r in rate]     # cells on one path in twenty to three
    wanted = [rng.choice(cells) if len(cells) else -1 for cells in seldom]
    keep = np.flatnonzero(np.array(wanted) >= 0)
    cell = torch.from_numpy(np.repeat(np.array(wanted)[keep], PARTICLES))[:, None]
    rows_kept = (keep[:, None] * PARTICLES + np.arange(PARTICLES)).flatten()

    def reward(x):
        return (x.gather(1, cell) == path)[:, 0].float()

    for seed, strength in [(1, 0.0), (1, STRENGTH)]:
        more = {} if strength == 0 else dict(reward=reward, reward_weight=strength, particles=PARTICLES, n_draws=4)
        start = [y[rows_kept] for y in many]
        x = run.draw("rollout", options | more, labels[rows_kept], seed, len(rows_kept), *start)[0]
        through = (x[np.arange(len(x)), cell[:, 0].numpy()] == path)
        verdict = run.judge.source.score(x.reshape(-1, 9, 9), real[rows_kept // PARTICLES].reshape(-1, 9, 9))
        means = dict(through=through & verdict["valid"]) | verdict
        name = "particles" if more else "rollout"
        row = dict(run=run.folder, sampler=name, n=len(x), nfe=32, commit=runtime.commit())
        row |= {k: round(float(v.mean()), 4) for k, v in means.items()}
        add("maze", row, job="particles" if more else "particles, none")


def table(data):
    print("| run | job | NFE | " + " | ".join(KEYS[data]) + " |\n|---|---|---|" + "---|" * len(KEYS[data]))
    for name in dict.fromkeys(name for name, _ in RUNS[data]):
        mine = [r for r in rows(data) if r["run"][:-2] == folder(name, 0)[:-2]]
        for job, sampler in dict.fromkeys((r["job"], r["sampler"]) for r in mine):
            at = [r for r in mine if (r["job"], r["sampler"]) == (job, sampler)]
            means = [np.mean([float(r[k]) for r in at if r.get(k)]) if any(r.get(k) for r in at) else np.nan
                     for k in ("nfe", *KEYS[data])]
            print(f"| {name} ({len(at)}) | {job}, {sampler} | {means[0]:.0f} | " + " | ".join(
                "" if np.isnan(m) else f"{m:.1%}" for m in means[1:]) + " |")
    picture(data)


def curves(data):
    """Lines of the picture.  -> {panel: {line: (x, y)}}"""
    out = {}
    for name in dict.fromkeys(name for name, _ in RUNS[data]):
        if data == "maze":
            for sampler in dict.fromkeys(r["sampler"] for r in rows(data) if name in r["run"] and r["bits_per_token"]):
                mine = [r for r in rows(data) if name in r["run"] and r["sampler"] == sampler and r["bits_per_token"]]
                at = sorted({(float(r["nfe"]), r["job"]) for r in mine})
                for key, label in [("valid", "valid paths"), ("shortest", "shortest paths")]:
                    y = [np.mean([float(r[key]) for r in mine if r["job"] == job]) for _, job in at]
                    out.setdefault(label, {})[f"{name}, {sampler}"] = [nfe for nfe, _ in at], y
            continue
        found = [r for seed in (0, 1) for path in [Path(folder(name, seed)) / "frames.csv"] if path.exists()
                 for r in csv.DictReader(path.read_text().splitlines())]
        for stabilise in STABILISE[name]:
            mine = [r for r in found if r["n"] == str(N_FAR) and float(r["stabilise"]) == stabilise]
            frames = sorted({int(r["frame"]) for r in mine})
            for key, label in [("intact", "sprite intact"), ("right", "frames exactly right")]:
                y = [np.mean([float(r[key]) for r in mine if int(r["frame"]) == f]) for f in frames]
                out.setdefault(label, {})[f"{name}, stabilise {stabilise:g}"] = frames, y
    return out


def picture(data):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = curves(data)
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 4.4), layout="constrained", sharey=True)
    for panel, (title, lines) in zip(panels, found.items(), strict=True):
        names = list(dict.fromkeys(label.split(",")[0] for label in lines))
        for label, (x, y) in lines.items():
            name = label.split(",")[0]
            style = ["-", "--", ":", "-."][[one for one in lines if one.startswith(name)].index(label)]
            panel.plot(x, y, style, color=f"C{names.index(name)}", marker="o" if len(x) < 9 else None, label=label)
        panel.set(xlabel={"maze": "network calls (NFE)", "bounce": "frame"}[data], ylabel=f"share of {title}",
                  ylim=(-0.02, 1.02))
    if data == "maze":
        for panel in panels:
            panel.set_xscale("log")
            panel.set_xticks(NFE, NFE)
            panel.minorticks_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(ROOT / "assets" / f"forcing_{data}.png", dpi=100)
    pyplot.close(figure)


KEYS = {"bounce": ("all_right", "right", "intact"), "maze": ("valid", "shortest", "through")}

if __name__ == "__main__":
    words = sys.argv[1:]
    if set(words) - {"train", "sample", "table", "compile", *RUNS}:
        raise SystemExit(__doc__.split("\n")[0])
    for data in [d for d in RUNS if d in words] or RUNS:
        for word in [w for w in ("train", "sample", "table") if w in words] or ("train", "sample", "table"):
            {"train": train, "sample": sample, "table": table}[word](data)
