"""What a step of training costs against batch, width, tokens and processes.

python experiments/cost.py

Both patches in turns at each setting, 4 layers of 2 heads on V = 8; each network of a run counts.
Writes assets/cost.csv, in which a finished setting is skipped, and assets/cost.png.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import common

import bench
from support import runtime

TABLE = common.Table("cost.csv")
ROUNDS = 3
SETTING = dict(side=32, n_embd=128, batch_size=16)
AXES = {
    "batch_size": (4, 8, 16, 32, 64),
    "n_embd": (64, 128, 256, 512),
    "side": (8, 16, 32, 64),
}
TITLES = {
    "batch_size": "sequences in a batch", "n_embd": "width", "side": "tokens of a sequence",
    "processes": "processes of one thread each",
}
N_ITERS = 40                # of a run in several processes


def time_setting(axis: str, value: int) -> None:
    """Both patches, the batch cut where sequences are long."""
    setting = SETTING | {axis: value}
    if axis == "side":
        setting["batch_size"] = max(1, 16 * 1024 // value**2)
    flags = bench.Flags(work="train", patches=(1, 2), n_head=2, **setting)
    settings = bench.settings_of(flags)
    for worker in bench.run_sides(settings, ["1", "2"], ROUNDS):
        n_tokens = setting["batch_size"] * setting["side"] ** 2
        seconds = statistics.median(worker.seconds)
        add(axis, value, worker.name, n_tokens / seconds, worker.bytes / 1e6)
        worker.process.kill()


def time_processes(n: int) -> None:
    """Digits as train_ddpd.py trains them, every process on a core of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc_per_node={n}", str(common.ROOT / "train_ddpd.py"), "digits",
            "--max-iters", str(N_ITERS), "--batch-size", str(64 // n), "--out-dir", f"{folder}/run",
        ]
        subprocess.run(
            [*command, "--eval-sequences", "8", "--eval-samples", "0"], check=True,
            cwd=common.ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
        )
        lines = (Path(folder) / "run" / "log.jsonl").read_text().splitlines()
        rates = [row["tokens_per_s"] for row in map(json.loads, lines) if "tokens_per_s" in row]
    add("processes", n, "patch 1", statistics.median(rates), "")


def add(axis: str, value: int, side: str, tokens_per_s: float, megabytes: float | str) -> None:
    row = dict(axis=axis, value=value, side=side, tokens_per_s=round(tokens_per_s))
    row["megabytes"] = round(megabytes) if megabytes else ""
    row["device"] = runtime.device_name(runtime.pick_device())
    TABLE.add(row | dict(commit=runtime.commit()))
    print(row)


def plot() -> None:
    """Tokens a second against each axis."""
    figure, panels = common.open_figure(1, len(TITLES), 11, 2.9, sharey=True)
    for panel, (axis, title) in zip(panels, TITLES.items(), strict=True):
        for side, colour in (("patch 1", "tab:blue"), ("patch 2", "tab:orange")):
            rows = common.select(TABLE.rows(), axis=axis, side=side)
            values = [int(row["value"]) ** (2 if axis == "side" else 1) for row in rows]
            rates = [float(row["tokens_per_s"]) / 1e3 for row in rows]
            if rows:
                panel.plot(values, rates, "o-", color=colour, label=side)
                common.set_ticks(panel, values)
        panel.set_xlabel(title)
        panel.set_yscale("log")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("thousand tokens a second")
    panels[0].legend(fontsize=8)
    common.save_figure(figure, "cost.png")


def main() -> None:
    for axis, values in AXES.items():
        for value in values:
            if not TABLE.has(axis=axis, value=value, side="patch 2"):
                time_setting(axis, value)
    for n in range(1, 1 + os.cpu_count()):
        if not TABLE.has(axis="processes", value=n):
            time_processes(n)
    plot()


if __name__ == "__main__":
    main()
