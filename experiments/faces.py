"""Which sampler puts faces together from parts that exist?

python experiments/faces.py [train | sample | table] [compile] [SEED ...]

train   configs/avatars.py and avatars_gidd.py with three seeds, equal in parameters and steps, into
        out/faces/
sample  planned denoising, ancestral sampling and MaskGIT; GIDD before and after self-correction.
        32 and 128 network calls in all, 300 faces each: assets/faces.csv
table   the table of that file, held-out faces first
Without a word all three are done. "compile" takes a third off a step of training.
Finished runs and rows are skipped, so the same command resumes.
"""

import sys

import common

import evaluate
from support import runtime

CONFIGS = {"ddpd": "avatars", "gidd": "avatars_gidd"}
CORRECTED = "ancestral+correct"         # half of the calls each
SAMPLERS = {
    "ddpd": ("ddpd", "ancestral", "confidence"),
    "gidd": ("ancestral", CORRECTED),
}
SEEDS = [0, 1, 2]
NFE = (32, 128)
N_SAMPLES = 300
REAL = "held-out faces"
# Columns of the table: name, format
COLUMNS = {
    "judge_acc": ("judge accuracy", ".1%"),
    "frechet": ("Frechet distance", ".2f"),
    "valid": ("valid", ".1%"),
    "parts": ("known parts", ".1%"),
    "novel": ("of the valid new", ".1%"),
    "copies": ("near copies", ".1%"),
    "distinct": ("distinct", ".1%"),
}
TABLE = common.Table("faces.csv")


def run_folder(method: str, seed: int) -> str:
    return f"out/faces/{method}_{seed}"


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
    if not common.is_started(folder):
        print(f"{folder} is not trained yet")
        return
    missing = []
    for nfe in NFE:
        for sampler in SAMPLERS[method]:
            if not TABLE.has(run=folder, sampler=sampler, calls=nfe):
                missing.append((sampler, nfe))
    if not missing:
        return
    judged = evaluate.Judged(folder, runtime.pick_device())
    bits = judged.bits()
    if not TABLE.has(sampler=REAL):
        real, _ = judged.metrics.val
        TABLE.add({"sampler": REAL, "calls": 0, "n": judged.metrics.n_val} | real)
    for sampler, nfe in missing:
        row = sample_row(judged, sampler, nfe, seed, bits)
        TABLE.add(row | {"calls": nfe})
        scores = ", ".join(cells_of(TABLE.rows()[-1:]))
        print(f"{method} {sampler} {nfe} NFE, seed {seed}: {scores}", flush=True)


def sample_row(judged: evaluate.Judged, sampler: str, nfe: int, seed: int, bits) -> dict:
    """Scores of faces made with nfe calls; where they are corrected, half of the calls do that."""
    if sampler != CORRECTED:
        flags = evaluate.Flags(runs=(), n=N_SAMPLES)
        [row] = evaluate.evaluate(judged, sampler, nfe, seed, flags, bits)
        return row
    half = nfe // 2
    flags = evaluate.Flags(runs=(), n=N_SAMPLES, correct=half)
    _, row = evaluate.evaluate(judged, "ancestral", half, seed, flags, bits)
    return row


def cells_of(rows: common.Rows) -> list[str]:
    """Means over rows as texts, a dash where no row has the column."""
    cells = []
    for column, (_, form) in COLUMNS.items():
        has_any = any(row.get(column) for row in rows)
        cells.append(f"{common.mean(rows, column):{form}}" if has_any else "-")
    return cells


def table(seeds: list[int]) -> None:
    """Print means over seeds."""
    rows = TABLE.rows()
    names = [name for name, _ in COLUMNS.values()]
    common.print_header("training", "sampler", "calls", "seeds", *names)
    if real := common.select(rows, sampler=REAL):
        common.print_row(["", REAL, "", "", *cells_of(real)])
    for method, samplers in SAMPLERS.items():
        of_method = rows_of(method, rows, seeds)
        for nfe in NFE:
            for sampler in samplers:
                if mine := common.select(of_method, sampler=sampler, calls=nfe):
                    cells = [method, sampler, str(nfe), str(len(mine))]
                    common.print_row([*cells, *cells_of(mine)])
    for method in SAMPLERS:
        print_bits(method, rows, seeds)


def rows_of(method: str, rows: common.Rows, seeds: list[int]) -> common.Rows:
    """The rows of a method with these training seeds."""
    folders = {run_folder(method, seed) for seed in seeds}
    return [row for row in rows if row["run"] in folders]


def print_bits(method: str, rows: common.Rows, seeds: list[int]) -> None:
    if mine := rows_of(method, rows, seeds):
        print(f"{method}: {common.describe_bits(mine)} bits per token")


if __name__ == "__main__":
    steps = {"train": train, "sample": sample, "table": table}
    words = common.read_words(__doc__, *steps, "compile")
    seeds = common.read_numbers() or SEEDS
    common.run_steps(steps, common.choose(words, steps), seeds)
