"""Does planning help, at equal network calls?   python experiments/compare.py [train | sample | table] [SEED ...]

train   configs/digits_{maskd,unid,single}.py with three seeds, equal parameters and steps, into out/compare/
sample  every sampler that fits, at 8, 16, 32 and 64 NFE, 500 digits each: rows of assets/compare.csv
table   the README's table and assets/compare.png from that file
Without a word all three. Finished runs and rows are skipped, so it can be stopped and started again.
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

CSV = ROOT / "assets" / "compare.csv"
KINDS, SEEDS, NFE, N_SAMPLES = ("maskd", "unid", "single"), (0, 1, 2), (8, 16, 32, 64), 500
SAMPLERS = {"maskd": ("ddpd", "ancestral", "confidence", "random", "remdm"), "unid": ("ddpd", "ancestral"),
            "single": ("ddpd", "ancestral")}
COLUMNS = {"judge_acc": "judge accuracy", "frechet": "Frechet distance"}


def folder(kind, seed):
    return f"out/compare/{kind}_{seed}"


def train(seeds):
    for seed in seeds:
        for kind in KINDS:
            cfg = config.load(argv=[str(ROOT / "configs" / f"digits_{kind}.py"), "--seed", str(seed), "--out-dir",
                                    folder(kind, seed)])
            train_ddpd.main(replace(cfg, eval_interval=0, eval_samples=0))


def rows():
    return list(csv.DictReader(CSV.read_text().splitlines())) if CSV.exists() else []


def sample(seeds):
    device, flags = runtime.pick_device(), evaluate.Flags(runs=(), n_samples=N_SAMPLES)
    for seed in seeds:
        for kind in KINDS:
            wanted = [(s, nfe) for s in SAMPLERS[kind] for nfe in NFE]
            done = {(r["sampler"], int(r["calls"])) for r in rows() if r["run"] == folder(kind, seed)}
            if set(wanted) <= done:
                continue
            run = evaluate.Run(folder(kind, seed), device)
            bits = run.bits()
            for sampler, nfe in wanted:
                if (sampler, nfe) not in done:
                    [row] = evaluate.evaluate(run, sampler, nfe, seed, flags, bits)
                    evaluate.write_row(CSV, row | {"calls": nfe})
                    print(f"{kind} {sampler} {nfe} NFE, seed {seed}: {row['judge_acc']:.3f}, {row['frechet']:.3f}",
                          flush=True)


def table():
    """Means over seeds: judge accuracy, Frechet distance."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    print("| training | sampler | seeds | " + " | ".join(f"{nfe} NFE" for nfe in NFE) + " | entropy |")
    print("|---|---|---|" + "---|" * (len(NFE) + 1))
    styles = {"maskd": "-", "unid": "--", "single": ":"}
    for kind in KINDS:
        for i, sampler in enumerate(SAMPLERS[kind]):
            cells, lines = [], {column: [] for column in COLUMNS}
            for nfe in NFE:
                mine = [r for r in rows() if (r["run"].rsplit("_", 1)[0], r["sampler"], r["calls"])
                        == (folder(kind, 0)[:-2], sampler, str(nfe))]
                if not mine:
                    break
                value = {c: np.array([float(r[c]) for r in mine]) for c in (*COLUMNS, "entropy")}
                cells.append(f"{value['judge_acc'].mean():.1%}, {value['frechet'].mean():.2f}")
                for column, line in lines.items():
                    line.append(value[column].mean())
            else:
                print(f"| {kind} | {sampler} | {len(mine)} | " + " | ".join(cells)
                      + f" | {value['entropy'].mean():.2f} |")
                for panel, (column, line) in zip(panels, lines.items(), strict=True):
                    panel.plot(NFE, line, styles[kind], color=f"C{i}", marker="o", markersize=4,
                               label=f"{kind}, {sampler}")
                    panel.set(xscale="log", xlabel="network calls (NFE)", ylabel=COLUMNS[column])
    for panel in panels:
        panel.set_xticks(NFE, NFE)
        panel.minorticks_off()
    panels[1].set_yscale("log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(ROOT / "assets" / "compare.png", dpi=110)
    for kind in KINDS:
        bits = {r["run"]: float(r["bits_per_token"]) for r in rows() if r["run"].startswith(folder(kind, 0)[:-2])}
        if bits:
            low, mean, high = min(bits.values()), np.mean([*bits.values()]), max(bits.values())
            print(f"{kind}: {mean:.3f} bits per token ({len(bits)} seeds, {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    words = [a for a in sys.argv[1:] if not a.isdigit()]
    given = [int(a) for a in sys.argv[1:] if a.isdigit()]
    if set(words) - {"train", "sample", "table"}:
        raise SystemExit(__doc__.split("\n")[0])
    for word in words or ("train", "sample", "table"):
        {"train": train, "sample": sample}[word](given or SEEDS) if word != "table" else table()
