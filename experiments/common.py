"""Shared by the scripts behind the tables: result files, training runs, figures and arguments.

Importing this module puts the repository root on sys.path, so it is imported before the rest.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "assets"
sys.path.insert(0, str(ROOT))

import config
import train_ddpd
from formats.messages import may_stop_reading
from support import logs

Rows = list[dict[str, str]]


# Result files


class Table:
    """A CSV file in assets/. An experiment whose row is in the file is finished."""

    def __init__(self, name: str):
        self.path = ASSETS / name

    def rows(self) -> Rows:
        return logs.read_rows(self.path)

    def has(self, **key) -> bool:
        """Is there a row with these values?"""
        return bool(select(self.rows(), **key))

    def add(self, row: dict) -> None:
        logs.append_rows(self.path, row)


def select(rows: Rows, **key) -> Rows:
    """The rows with these values, which are compared as strings."""
    wanted = {column: str(value) for column, value in key.items()}
    return [row for row in rows if wanted.items() <= row.items()]


def mean(rows: Rows, column: str) -> float:
    """Mean of a column over the rows that have a value in it; NaN if none has."""
    values = [float(row[column]) for row in rows if row.get(column)]
    return np.mean(values) if values else np.nan


def describe_bits(rows: Rows) -> str:
    """Bits per token: mean over runs, the error that they share, and their range.

    All runs are judged on the same sequences and noise, so the error does not shrink with their
    number.
    """
    bits = {row["run"]: float(row["bits_per_token"]) for row in rows}
    values = list(bits.values())
    error = mean(rows, "bits_se")
    low, high = min(values), max(values)
    return f"{np.mean(values):.3f} +- {error:.3f} ({low:.3f} to {high:.3f})"


def print_row(cells: Iterable[str]) -> None:
    """One row of a Markdown table."""
    print("| " + " | ".join(cells) + " |")


def print_header(*names: str) -> None:
    """The first two lines of a Markdown table."""
    print_row(names)
    print("|" + "---|" * len(names))


# Runs


def train(name: str, folder: str, seed: int, *flags: str, compiled: bool = False) -> None:
    """Train configs/<name>.py into a folder, or resume it there; it validates at the end only."""
    path = ROOT / "configs" / f"{name}.py"
    argv = [str(path), *flags, "--seed", str(seed), "--out-dir", folder]
    cfg = config.load(argv=argv)
    cfg = replace(cfg, eval_interval=0, eval_samples=0, compile=compiled)
    train_ddpd.main(cfg)


def is_started(folder: str) -> bool:
    return (Path(folder) / "ckpt.pt").exists()


# Figures


def open_figure(n_rows: int, n_columns: int, width: float, height: float, **options):
    """A figure that is drawn without a display.  -> figure, array of panels"""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (width, height)
    return pyplot.subplots(n_rows, n_columns, figsize=size, layout="constrained", **options)


def save_figure(figure, name: str, dpi: int = 110) -> None:
    """Write assets/<name>."""
    from matplotlib import pyplot

    figure.savefig(ASSETS / name, dpi=dpi)
    pyplot.close(figure)


def outside_legend(figure, panel) -> None:
    """List the lines of one panel to the right of all panels."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)


def set_ticks(panel, values: Iterable[float]) -> None:
    """Label these values of a logarithmic x axis and no others."""
    panel.set_xscale("log")
    panel.set_xticks(values, values)
    panel.minorticks_off()


# Arguments


def read_words(usage: str, *allowed: str) -> list[str]:
    """The words on the command line, numbers left out; an unknown word prints the usage."""
    words = [word for word in sys.argv[1:] if not word.isdigit()]
    if set(words) - set(allowed):
        raise SystemExit(usage)
    return words


def read_numbers() -> list[int]:
    """The numbers on the command line."""
    return [int(word) for word in sys.argv[1:] if word.isdigit()]


def run_steps(steps: dict[str, Callable], names: Iterable[str], *arguments) -> None:
    """Steps of an experiment, one after another; a pipe such as `| head` may end them early."""
    with may_stop_reading():
        for name in names:
            steps[name](*arguments)


def choose(words: list[str], choices: Iterable[str]) -> list[str]:
    """The choices that are among the words, or all of them if none is."""
    return [choice for choice in choices if choice in words] or list(choices)
