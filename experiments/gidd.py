"""Does self-correction help, and which training does it help?

python experiments/gidd.py [train | sample | table] [digits | text] [compile]

train   digits with p_uniform 0, 0.1 and 0.2, three seeds; text (data/text) with 0 and 0.2, two
        seeds; DDPD beside each
sample  with 16, 32 and 64 network calls, before and after at most as many of self-correction:
        assets/gidd_*.csv
table   the tables of those files
Without a word all of it is done. "compile" takes a third off a step of training.
Finished runs and rows are skipped, so the same command resumes.
"""

import sys

import common

import evaluate
from support import runtime

NFE = (16, 32, 64)
N_SAMPLES = {"digits": 250, "text": 100}
SEEDS = {"digits": (0, 1, 2), "text": (0, 1)}
# What is trained: GIDD with this p_uniform, or DDPD
KINDS = {"digits": ("0.0", "0.1", "0.2", "ddpd"), "text": ("0.0", "0.2", "ddpd")}
# Columns of the table and their formats
COLUMNS = {
    "digits": {"judge_acc": ".1%", "frechet": ".2f", "entropy": ".2f"},
    "text": {"ngram_bits": ".2f", "words": ".1%", "entropy": ".2f"},
}
TABLES = {data: common.Table(f"gidd_{data}.csv") for data in SEEDS}


def run_name(data: str, kind: str) -> str:
    """The folder of a run without its seed."""
    if (data, kind) == ("digits", "ddpd"):
        return "out/compare/ddpd-mask"      # the same runs as in compare.py
    return f"out/gidd/{data}_{kind}"


def train(data: str) -> None:
    compiled = "compile" in sys.argv
    for kind in KINDS[data]:
        config_name, flags = recipe(data, kind)
        for seed in SEEDS[data]:
            folder = f"{run_name(data, kind)}_{seed}"
            common.train(config_name, folder, seed, *flags, compiled=compiled)


def recipe(data: str, kind: str) -> tuple[str, list[str]]:
    """-> name of a config, flags"""
    if kind != "ddpd":
        return f"{data}_gidd", ["--p-uniform", kind]
    if data == "digits":
        return "digits", []
    return "text_gidd", ["--method", "ddpd", "--n-layer", "2"]


def sample(data: str) -> None:
    for kind in KINDS[data]:
        for seed in SEEDS[data]:
            sample_run(data, kind, seed)


def sample_run(data: str, kind: str, seed: int) -> None:
    """The rows of one run that are missing."""
    folder = f"{run_name(data, kind)}_{seed}"
    if not common.is_started(folder):
        print(f"{folder} is not trained yet")
        return
    table = TABLES[data]
    missing = [nfe for nfe in NFE if not table.has(run=folder, calls=nfe)]
    if not missing:
        return
    judged = evaluate.Judged(folder, runtime.pick_device())
    bits = judged.bits()
    sampler = "ddpd" if kind == "ddpd" else "ancestral"
    shown = ["run", "sampler", "steps", "nfe", *COLUMNS[data]]
    for nfe in missing:
        flags = evaluate.Flags(runs=(), n=N_SAMPLES[data], correct=nfe)
        for row in evaluate.evaluate(judged, sampler, nfe, seed, flags, bits):
            table.add(row | {"calls": nfe})
            print(*[row[column] for column in shown], flush=True)


def table(data: str) -> None:
    """Print means over seeds."""
    budgets = [f"{nfe} calls, then corrected" for nfe in NFE]
    common.print_header("noise", "seeds", "bits per token", *budgets)
    for kind in KINDS[data]:
        rows = [row for row in TABLES[data].rows() if is_of(row, run_name(data, kind))]
        if not rows:
            continue
        n_seeds = len({row["run"] for row in rows})
        cells = [scores(data, common.select(rows, calls=nfe)) for nfe in NFE]
        common.print_row([kind, str(n_seeds), common.describe_bits(rows), *cells])


def is_of(row: dict[str, str], run: str) -> bool:
    """Is this a row of the run, with any seed?"""
    return row["run"].rsplit("_", 1)[0] == run


def scores(data: str, rows: common.Rows) -> str:
    """Mean scores before and after self-correction, in words."""
    stages = []
    for is_corrected in (False, True):
        of_stage = [row for row in rows if row["sampler"].endswith("+correct") == is_corrected]
        if of_stage:
            means = [
                format(common.mean(of_stage, column), form)
                for column, form in COLUMNS[data].items()
            ]
            stages.append(", ".join(means))
    return " -> ".join(stages)


if __name__ == "__main__":
    steps = {"train": train, "sample": sample, "table": table}
    words = common.read_words(__doc__, *steps, *SEEDS, "compile")
    for data in common.choose(words, SEEDS):
        common.run_steps(steps, common.choose(words, steps), data)
