"""Does planning help at an equal number of network calls?

python experiments/compare.py [train | sample | table] [compile] [SEED ...]

train   configs/digits.py, digits_uniform.py and digits_single.py with three seeds, equal in
        parameters and steps, into out/compare/
sample  planned denoising, ancestral sampling, MaskGIT and ReMDM, where they fit, at 8, 16, 32 and
        64 NFE, 500 digits each: assets/compare.csv
table   the table of that file, and assets/compare.png
Without a word all three are done. "compile" takes a third off a step of training.
Finished runs and rows are skipped, so the same command resumes.
"""

import sys

import common

import evaluate
from support import runtime

CONFIGS = {
    "ddpd-mask": "digits",
    "ddpd-uniform": "digits_uniform",
    "ddpd-single": "digits_single",
}
SAMPLERS = {
    "ddpd-mask": ("ddpd", "ancestral", "confidence", "random", "remdm"),
    "ddpd-uniform": ("ddpd", "ancestral"),
    "ddpd-single": ("ddpd", "ancestral"),
}
STYLES = {"ddpd-mask": "-", "ddpd-uniform": "--", "ddpd-single": ":"}
SEEDS = [0, 1, 2]
NFE = (8, 16, 32, 64)
N_SAMPLES = 500
QUALITY = {"judge_acc": "judge accuracy", "frechet": "Frechet distance"}
FRECHET_TICKS = (0.15, 0.2, 0.3, 0.4, 0.6)
TABLE = common.Table("compare.csv")


def run_folder(method: str, seed: int) -> str:
    return f"out/compare/{method}_{seed}"


def train(seeds: list[int]) -> None:
    for seed in seeds:
        for method, config_name in CONFIGS.items():
            folder = run_folder(method, seed)
            common.train(config_name, folder, seed, compiled="compile" in sys.argv)


def sample(seeds: list[int]) -> None:
    for seed in seeds:
        for method in CONFIGS:
            sample_run(method, seed)


def sample_run(method: str, seed: int) -> None:
    """The rows of one run that are missing."""
    folder = run_folder(method, seed)
    missing = []
    for sampler in SAMPLERS[method]:
        for nfe in NFE:
            if not TABLE.has(run=folder, sampler=sampler, calls=nfe):
                missing.append((sampler, nfe))
    if not missing:
        return
    judged = evaluate.Judged(folder, runtime.pick_device())
    flags = evaluate.Flags(runs=(), n=N_SAMPLES)
    bits = judged.bits()
    for sampler, nfe in missing:
        [row] = evaluate.evaluate(judged, sampler, nfe, seed, flags, bits)
        TABLE.add(row | {"calls": nfe})
        scores = f"{row['judge_acc']:.3f}, {row['frechet']:.3f}"
        print(f"{method} {sampler} {nfe} NFE, seed {seed}: {scores}", flush=True)


def rows_of(method: str, seeds: list[int]) -> common.Rows:
    """The rows of a method with these training seeds."""
    folders = {run_folder(method, seed) for seed in seeds}
    return [row for row in TABLE.rows() if row["run"] in folders]


def table(seeds: list[int]) -> None:
    """Print means over seeds of judge accuracy and Frechet distance, and draw them."""
    figure, panels = common.open_figure(1, 2, width=12, height=4.6)
    budgets = [f"{nfe} NFE" for nfe in NFE]
    common.print_header("training", "sampler", "seeds", *budgets, "entropy")
    for method, samplers in SAMPLERS.items():
        rows = rows_of(method, seeds)
        for i, sampler in enumerate(samplers):
            by_nfe = [common.select(rows, sampler=sampler, calls=nfe) for nfe in NFE]
            if all(by_nfe):
                print_sampler(method, sampler, by_nfe)
                draw_sampler(panels, method, sampler, by_nfe, color=f"C{i}")
    for panel in panels:
        common.set_ticks(panel, NFE)
    panels[1].set_yscale("log")
    panels[1].set_yticks(FRECHET_TICKS, FRECHET_TICKS)
    panels[1].minorticks_off()
    common.outside_legend(figure, panels[0])
    common.save_figure(figure, "compare.png")
    for method in CONFIGS:
        print_bits(method, seeds)


def print_sampler(method: str, sampler: str, by_nfe: list[common.Rows]) -> None:
    """A row of the table; entropy and number of seeds are those of the most calls."""
    cells = [method, sampler, str(len(by_nfe[-1]))]
    for rows in by_nfe:
        accuracy = common.mean(rows, "judge_acc")
        frechet = common.mean(rows, "frechet")
        cells.append(f"{accuracy:.1%}, {frechet:.2f}")
    entropy = common.mean(by_nfe[-1], "entropy")
    common.print_row([*cells, f"{entropy:.2f}"])


def draw_sampler(panels, method: str, sampler: str, by_nfe: list[common.Rows], color: str) -> None:
    """A line in each panel."""
    style = dict(linestyle=STYLES[method], color=color, marker="o", markersize=4)
    for panel, (column, label) in zip(panels, QUALITY.items(), strict=True):
        means = [common.mean(rows, column) for rows in by_nfe]
        panel.plot(NFE, means, label=f"{method}, {sampler}", **style)
        panel.set(xlabel="network calls (NFE)", ylabel=label)


def print_bits(method: str, seeds: list[int]) -> None:
    if rows := rows_of(method, seeds):
        print(f"{method}: {common.describe_bits(rows)} bits per token")


if __name__ == "__main__":
    steps = {"train": train, "sample": sample, "table": table}
    words = common.read_words(__doc__, *steps, "compile")
    seeds = common.read_numbers() or SEEDS
    common.run_steps(steps, common.choose(words, steps), seeds)
