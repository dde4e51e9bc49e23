"""What evaluate.py shows of its rows: an aligned table as they come, and a plot of all of them."""

import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from support import figures, metrics

Row = dict[str, Any]                # of evaluate.csv, numbers as numbers

# What the plot shows, where rows have it
QUALITY = {
    "judge_acc": "judge accuracy", "frechet": "Frechet distance",
    "shortest": "shortest paths", "valid": "valid ones",
    "right": "frames exactly right", "intact": "sprite intact",
    "ngram_bits": "bits per byte by n-gram",
}
COSTS = {"nfe": "network calls (NFE)", "s_per_sample": "seconds per sample"}
# Settings that are columns of the table, or do not tell lines of the plot apart
OF_A_POINT = ("nfe", "seed", "sampler")
N_TICKS = 8                 # most values that are ticks of their own
WIDE = 10                   # highest over lowest distance from which on the axis is logarithmic


# The table

FIRST = {"sampler": "sampler", "steps": "steps", "nfe": "NFE", "seed": "seed", "n": "n"}
NAMES = {"ngram_bits": "n-gram bits/byte"}      # of columns whose own name does not say what it is
LAST = {"s_per_sample": "s each"}
INTERVAL = "95 % interval"
N_SAMPLER = 22              # characters of a sampler's name
N_CELL = 6                  # of a number, at least


def cells_of(row: Row) -> dict[str, str]:
    """Header -> text, in the order of the table."""
    cells = {}
    for column, header in FIRST.items():
        cells[header] = plain(row.get(column, ""))
    for column, (_, form) in metrics.COLUMNS.items():
        if column in row and form:
            cells[NAMES.get(column, column.replace("_", " "))] = f"{row[column]:{form}}"
        if column == "judge_acc" and "lo" in row:
            cells[INTERVAL] = f"{row['lo']:.1%}-{row['hi']:.1%}"
    for column, header in LAST.items():
        cells[header] = f"{row[column]:.3f}" if column in row else ""
    return cells


def plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


class Table:
    """Prints rows as they come, with the columns of the first one that fit into the terminal."""

    def __init__(self):
        self.headers = []

    def print(self, row: Row, note: str = "") -> None:
        if not self.headers:
            self.headers = headers_for(row)
            print(aligned(self.headers, self.headers))
        cells = cells_of(row)
        line = aligned([cells.get(header, "") for header in self.headers], self.headers)
        print(line + note)


def aligned(cells: list[str], headers: list[str]) -> str:
    """The sampler on the left, numbers under the ends of their headers."""
    first, *others = cells
    widths = [max(N_CELL, len(header)) for header in headers[1:]]
    words = [f"{cell:>{width}}" for cell, width in zip(others, widths, strict=True)]
    return "  ".join([f"  {first:{N_SAMPLER}}", *words]).rstrip()


def headers_for(row: Row) -> list[str]:
    """Those of a row that fit beside each other into the terminal, from the left."""
    headers = list(cells_of(row))
    if not sys.stdout.isatty():
        return headers
    width = shutil.get_terminal_size().columns
    while len(headers) > len(FIRST) + 1 and len(aligned(headers, headers)) > width:
        del headers[-2]                     # the seconds stay
    return headers


# The plot


class Point(NamedTuple):
    """The mean of rows that differ in their seed."""
    budget: float                           # NFE asked for
    nfe: float
    s_per_sample: float
    quality: dict[str, float]
    interval: tuple[float, float] | None    # of the judge's accuracy, 95 %


def settings_of(row: Row) -> dict[str, Any]:
    """What its samples depend on, {} for rows of older versions."""
    return json.loads(row.get("settings") or "{}")


def settings_of_line(row: Row) -> str:
    """Those in which the points of one line agree, as JSON."""
    settings = settings_of(row).items()
    return json.dumps({name: value for name, value in settings if name not in OF_A_POINT})


def lines_of(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Point]]:
    """Rows of the same settings are one point, a later one of the same seed replaces an earlier.

    ->  {(run, sampler, settings as JSON): points by NFE}
    """
    drawn = [row for row in rows if row.get("nfe") not in (None, "", "n/a")]
    latest = {(row["run"], row["sampler"], row.get("settings", str(row))): row for row in drawn}
    groups = {}
    for row in latest.values():
        line = (row["run"], row["sampler"], settings_of_line(row))
        groups.setdefault(line, {}).setdefault(row["steps"], []).append(row)
    return {
        line: sorted((point_of(same) for same in by_steps.values()), key=lambda point: point.nfe)
        for line, by_steps in groups.items()
    }


def point_of(rows: list[Row]) -> Point:
    """The interval is a mean, too: that of as many samples as one row has."""
    def mean(column: str) -> float:
        return float(np.mean([row[column] for row in rows]))

    quality = {column: mean(column) for column in QUALITY if all(column in row for row in rows)}
    has_interval = all("lo" in row and "hi" in row for row in rows)
    interval = (mean("lo"), mean("hi")) if has_interval else None
    budget = settings_of(rows[0]).get("nfe", rows[0]["nfe"])
    return Point(budget, mean("nfe"), mean("s_per_sample"), quality, interval)


def labels_of(lines: Iterable[tuple[str, str, str]]) -> list[str]:
    """Run, sampler, and the settings in which lines differ."""
    lines = list(lines)
    settings = [json.loads(text) for _, _, text in lines]
    names = dict.fromkeys(name for own in settings for name in own)
    differing = [name for name in names if len({str(own.get(name)) for own in settings}) > 1]
    has_runs = len({run for run, _, _ in lines}) > 1
    labels = []
    for (run, sampler, _), own in zip(lines, settings, strict=True):
        words = [Path(run).name, sampler] if has_runs else [sampler]
        words += [f"{name} {plain(own[name])}" for name in differing if name in own]
        labels.append(", ".join(words))
    return labels


def plot(rows: Iterable[Row], held_out: dict[str, dict[str, float]], path: str | Path) -> bool:
    """Quality against NFE and against seconds.  -> False where no row has a quality to draw

    held_out: {run: scores of its held-out data}, which are dashed lines
    """
    lines = lines_of(rows)
    points = [point for of_line in lines.values() for point in of_line]
    columns = [column for column in QUALITY if any(column in point.quality for point in points)]
    if not columns:
        return False
    height = 3.4 * len(columns)
    figure, panels = figures.open_figure(len(columns), len(COSTS), 11, height, sharey="row")
    levels = levels_of(held_out, columns)
    for column, beside in zip(columns, panels, strict=True):
        for cost, panel in zip(COSTS, beside, strict=True):
            for i, of_line in enumerate(lines.values()):
                draw_line(panel, of_line, cost, column, figures.colour_of(i, len(lines)))
            for scores, style in zip(levels.values(), figures.LEVEL_STYLES, strict=False):
                if column in scores:
                    panel.axhline(scores[column], color="0.3", linestyle=style, linewidth=1)
            panel.set(xlabel=COSTS[cost])
            panel.grid(alpha=0.2)
            scale_cost(panel, points, cost)
        scale_quality(beside[0], column, points, levels)
    handles = {
        label: figures.handle(figures.colour_of(i, len(lines)), marker="o", markersize=4)
        for i, label in enumerate(labels_of(lines))
    }
    for label, style in zip(levels, figures.LEVEL_STYLES, strict=False):
        handles[label] = figures.handle("0.3", style, linewidth=1)
    figure.legend(
        handles.values(), handles.keys(), loc="outside right upper", fontsize=8, frameon=False
    )
    figures.save_figure(figure, path)
    return True


def levels_of(held_out: dict[str, dict[str, float]], columns: list[str]) -> dict[str, dict]:
    """Label -> scores of held-out data; runs on the same data share a line."""
    distinct = {}
    for run, scores in held_out.items():
        shown = {column: scores[column] for column in columns if column in scores}
        if shown:
            distinct.setdefault(tuple(shown.values()), (Path(run).name, shown))
    is_shared = len(distinct) == 1
    return {
        "held-out data" if is_shared else f"held-out data of {name}": shown
        for name, shown in distinct.values()
    }


def draw_line(panel, points: list[Point], cost: str, column: str, colour) -> None:
    """Points that have the column, with intervals of the judge's accuracy as bars."""
    points = [point for point in points if column in point.quality]
    x = [getattr(point, cost) for point in points]
    y = np.array([point.quality[column] for point in points])
    panel.plot(x, y, marker="o", markersize=4, linewidth=1.2, color=colour)
    if column == "judge_acc" and points and all(point.interval for point in points):
        low, high = np.array([point.interval for point in points]).T
        bars = np.maximum([y - low, high - y], 0)
        panel.errorbar(x, y, bars, fmt="none", capsize=2, linewidth=0.8, color=colour)


def scale_cost(panel, points: list[Point], cost: str) -> None:
    """A logarithmic axis where costs differ by a factor; few budgets of NFE are its ticks."""
    costs = [getattr(point, cost) for point in points]
    budgets = sorted({point.budget for point in points})
    if max(costs) > 2 * min(costs) > 0:
        panel.set_xscale("log")
    figures.set_plain_ticks(panel.xaxis, costs)
    if cost == "nfe" and len(budgets) <= N_TICKS:
        figures.set_ticks(panel.xaxis, budgets)


def scale_quality(panel, column: str, points: list[Point], levels: dict[str, dict]) -> None:
    """Distances that differ much are read on a logarithmic axis."""
    panel.set_ylabel(QUALITY[column] + ", 95 % interval" * (column == "judge_acc"))
    of_rows = [point.quality for point in points]
    values = [scores[column] for scores in [*of_rows, *levels.values()] if column in scores]
    values = [value for value in values if np.isfinite(value)]
    is_distance = column == "frechet" and values and min(values) > 0
    if is_distance and max(values) > WIDE * min(values):
        panel.set_yscale("log")
    has_intervals = column == "judge_acc" and any(point.interval for point in points)
    figures.set_plain_ticks(panel.yaxis, () if has_intervals else values)
