"""Does self-correction help, and whom?   python experiments/gidd.py [train | sample | table] [digits | text]

train   digits with p_uniform 0, 0.1, 0.2 and three seeds; text (data/text) with 0, 0.2, two seeds; DDPD beside them
sample  at 16, 32 and 64 steps, before and after as many steps of self-correction: rows of assets/gidd_*.csv
table   the README's tables from those files and assets/compare.csv
Without a word all of it; "compile" trains compiled networks, in about half the time. Finished runs and rows are
skipped, so it can be stopped and started again.
"""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import config
import evaluate
import runtime
import train_ddpd

STEPS, N_SAMPLES = (16, 32, 64), {"digits": 250, "text": 100}
SEEDS = {"digits": (0, 1, 2), "text": (0, 1)}
KINDS = {"digits": ("0.0", "0.1", "0.2", "ddpd"), "text": ("0.0", "0.2", "ddpd")}
COLUMNS = {"digits": {"judge_acc": ".1%", "frechet": ".2f", "entropy": ".2f"},
           "text": {"ngram_bits": ".2f", "words": ".1%", "entropy": ".2f"}}


def folder(data, kind, seed):
    is_shared = (data, kind) == ("digits", "ddpd")                      # with experiments/compare.py
    return f"out/compare/maskd_{seed}" if is_shared else f"out/gidd/{data}_{kind}_{seed}"


def train(data):
    for kind in KINDS[data]:
        for seed in SEEDS[data]:
            flags = ["--p-uniform", kind] if kind != "ddpd" else []
            flags += ["--method", "ddpd", "--n-layer", "2"] if (data, kind) == ("text", "ddpd") else []
            name = "digits_maskd" if (data, kind) == ("digits", "ddpd") else f"{data}_gidd"
            cfg = config.load(argv=[str(ROOT / "configs" / f"{name}.py"), *flags, "--seed", str(seed),
                                    "--out-dir", folder(data, kind, seed)])
            train_ddpd.main(replace(cfg, eval_interval=0, eval_samples=0, compile="compile" in sys.argv))


def rows(data):
    path = ROOT / "assets" / f"gidd_{data}.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def sample(data):
    device = runtime.pick_device()
    for kind in KINDS[data]:
        for seed in SEEDS[data]:
            if not (Path(folder(data, kind, seed)) / "ckpt.pt").exists():
                print(f"{folder(data, kind, seed)} is not trained yet")
                continue
            done = {int(r["steps"]) for r in rows(data) if r["run"] == folder(data, kind, seed)}
            if set(STEPS) <= done:
                continue
            run = evaluate.Run(folder(data, kind, seed), device)
            bits, name = run.bits(), "ddpd" if kind == "ddpd" else "ancestral"
            for steps in (n for n in STEPS if n not in done):
                flags = evaluate.Flags(runs=(), n_samples=N_SAMPLES[data], correct=steps)
                for row in evaluate.evaluate(run, name, 2 * steps if kind == "ddpd" else steps, seed, flags, bits):
                    evaluate.write_row(ROOT / "assets" / f"gidd_{data}.csv", row)
                    print(*(row[k] for k in ("run", "sampler", "steps", "nfe", *COLUMNS[data])), flush=True)


def table(data):
    """Means over seeds."""
    print("| noise | seeds | bits per token | " + " | ".join(f"{n} steps, then corrected" for n in STEPS) + " |")
    print("|---|---|---|" + "---|" * len(STEPS))
    for kind in KINDS[data]:
        mine = [r for r in rows(data) if r["run"][:-1] == folder(data, kind, "")]
        if not mine:
            continue
        bits = {r["run"]: float(r["bits_per_token"]) for r in mine}
        cells = []
        for steps in STEPS:
            stages = []
            for is_after in (False, True):
                at = [r for r in mine if int(r["steps"]) == steps and r["sampler"].endswith("+correct") == is_after]
                if at:
                    stages.append(", ".join(format(np.mean([float(r[c]) for r in at]), form)
                                            for c, form in COLUMNS[data].items()))
            cells.append(" -> ".join(stages))
        print(f"| {kind} | {len(bits)} | {np.mean([*bits.values()]):.3f} ({min(bits.values()):.3f} to "
              f"{max(bits.values()):.3f}) | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    words = sys.argv[1:]
    if set(words) - {"train", "sample", "table", "compile", *SEEDS}:
        raise SystemExit(__doc__.split("\n")[0])
    for data in [d for d in SEEDS if d in words] or SEEDS:
        for word in [w for w in ("train", "sample", "table") if w in words] or ("train", "sample", "table"):
            {"train": train, "sample": sample, "table": table}[word](data)
