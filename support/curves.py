"""The curves of runs: log.jsonl is read into panels, and panels are drawn."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from support import figures

MAX_COLUMNS = 3
PANEL_SIZE = (4.8, 3.2)     # inches
N_VALIDATIONS = 4           # of one run, in a panel over noise levels
N_NAMES = 3                 # of runs that share a line, in a legend
N_SMOOTH = 100              # lines of a log from which on a running mean is drawn over them
N_MEANS = 50                # windows of that mean in a whole log
NETWORKS = ("planner", "denoiser")

# The last part of a loss's or score's name in the log: its label
LOSSES = {"bce": "BCE, nats", "ce": "CE, nats", "loss": "loss, nats"}
WEIGHTS = {"gidd": "dynamic", "forcing": "none"}    # of tokens in the loss, where no flag says it
SCORES = {"auroc": "AUROC", "accuracy": "accuracy"}
# Losses that the log names beside those of training: {end of the name: label}
FLOORS = {
    "start": "ln V, at the start",
    "blind": "blind",
    "level_only": "knows the level only",
    "floor": "best possible",
    "by_heart": "known by heart",
}
OTHERS = {"tokens_per_s": ("speed", "tokens per second"), "peak_mib": ("peak memory", "MiB")}
NOT_DRAWN = ("val_s", "val_sequences")
LINE_STYLES = ("-", "--", ":", "-.")


# Reading


class Curves(NamedTuple):
    """What log.jsonl says of a run."""
    name: str
    values: dict[str, dict[int, Any]]       # name -> {iteration: number or list}
    floors: dict[str, float]
    config: dict[str, Any]

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """-> iterations, values; both empty where the log has none"""
        values = self.values.get(name, {})
        numbers = [(it, value) for it, value in sorted(values.items()) if value is not None]
        its, numbers = zip(*numbers, strict=True) if numbers else ((), ())
        return np.array(its, int), np.array(numbers, float)

    def networks(self) -> list[str]:
        return [name for name in NETWORKS if f"{name}_loss" in self.values]


def read_curves(folder: str | Path) -> Curves:
    """Of an iteration that was trained twice, after a resume, the second time counts."""
    folder = Path(folder)
    values = {}
    floors = {}
    config = {}
    for line in read_lines(folder):
        it = line.pop("it")
        if line.pop("start", False):
            floors = line.get("floors", {})
            config = line.get("config", {})
            forget_after(values, it)
            continue
        for name, value in line.items():
            if is_drawable(value):
                values.setdefault(name, {})[it] = value
    if not values:
        raise SystemExit(f"{folder / 'log.jsonl'} has no losses yet")
    return Curves(folder.resolve().name, values, floors, config)


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl; a last one that is still being written is left out."""
    path = folder / "log.jsonl"
    if not path.is_file():
        what = "it has no log.jsonl" if folder.is_dir() else "there is no such folder"
        raise SystemExit(f"no run in {folder}: {what}")
    *whole, _ = path.read_text(errors="replace").split("\n")
    lines = []
    for number, text in enumerate(whole, 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict) or type(line.get("it")) is not int:
            raise SystemExit(f"{path}, line {number} is no line of a training log")
        lines.append(line)
    return lines


def forget_after(values: dict[str, dict[int, Any]], start: int) -> None:
    """A run goes on from its last checkpoint: what was logged after it is trained again."""
    for name, by_it in values.items():
        values[name] = {it: value for it, value in by_it.items() if it <= start}


def is_drawable(value: Any) -> bool:
    """A number, or the numbers of noise levels, None where there is none."""
    parts = value if isinstance(value, list) else [value]
    return all(part is None or type(part) in (int, float) for part in parts)


# Panels


class Line(NamedTuple):
    run: int | None                         # whose it is, None: that of several runs
    kind: str                               # what distinguishes it from others of that run
    x: np.ndarray
    y: np.ndarray
    error: np.ndarray | None = None         # standard error of y
    look: str = "points"                    # or "smooth", or "noisy": with its running mean


class Level(NamedTuple):
    """A horizontal line."""
    label: str
    y: float
    run: int | None                         # whose it is, None: that of all runs


class Panel(NamedTuple):
    title: str
    y_label: str
    lines: list[Line]
    levels: Sequence[Level] = ()
    x_label: str = "iterations"
    is_log: bool = False


def panels_of(runs: Sequence[Curves]) -> list[Panel]:
    """All panels that have something to show."""
    names = list(dict.fromkeys(name for run in runs for name in run.values))
    networks = [name for name in NETWORKS if any(name in run.networks() for run in runs)]
    panels = [panel for network in networks for panel in loss_panels(runs, network)]
    for network in networks:
        panels += score_panels(runs, network, names)
    for network in networks:
        panels += level_panels(runs, network)
    panels += [bits_panel(runs, names), norm_panel(runs, networks), lr_panel(runs, networks)]
    for name, (title, label) in OTHERS.items():
        panels.append(Panel(title, label, lines_of(runs, {"": name}, "noisy")))
    panels += [
        Panel(name, name.removeprefix("val_"), lines_of(runs, {"": name}))
        for name in names if is_unknown(name, networks)
    ]
    return [panel for panel in panels if panel.lines]


def lines_of(
    runs: Sequence[Curves], names: dict[str, str], look: str = "points", has_error: bool = False,
) -> list[Line]:
    """names: {kind: name in the log}"""
    lines = []
    for i, run in enumerate(runs):
        for kind, name in names.items():
            its, values = run.series(name)
            error = run.series(f"{name}_se")[1] if has_error else None
            if len(its):
                lines.append(Line(i, kind, its, values, error, look))
    return lines


class Unit(NamedTuple):
    """Losses that can be compared: those of one name and one weight of tokens."""
    end: str                                # of the name in the log
    label: str


def unit_of(run: Curves, network: str) -> Unit:
    """What a run's loss is, by its validation, or by its method where there was none yet."""
    method = run.config.get("method", "ddpd")
    of_method = "loss" if method != "ddpd" else "bce" if network == "planner" else "ce"
    end = next((end for end in LOSSES if f"val_{network}_{end}" in run.values), of_method)
    weight = run.config.get("weight") or WEIGHTS.get(method, "none")
    is_weighted = end == "loss" and weight != "none"
    return Unit(end, LOSSES[end] + f", weight {weight}" * is_weighted)


def by_unit(runs: Sequence[Curves], network: str) -> dict[Unit, list[int]]:
    """-> {unit: the runs that have it}"""
    groups = {}
    for i, run in enumerate(runs):
        if network in run.networks():
            groups.setdefault(unit_of(run, network), []).append(i)
    return groups


def loss_panels(runs: Sequence[Curves], network: str) -> list[Panel]:
    """A network's loss in training and validation, with the losses to compare it with: a panel for
    each unit."""
    panels = []
    for unit, members in by_unit(runs, network).items():
        lines = lines_of(runs, {"training": f"{network}_loss"}, "noisy")
        lines += lines_of(runs, {"validation": f"val_{network}_{unit.end}"})
        lines += lines_of(runs, {"validation on fills": f"val_{network}_fill_{unit.end}"})
        levels = []
        for end, words in FLOORS.items():
            values = [run.floors.get(f"{network}_{end}") for run in runs]
            values = [value if i in members else None for i, value in enumerate(values)]
            levels += levels_of(words, values)
        own = [line for line in lines if line.run in members]
        panels.append(Panel(f"{network}: loss", unit.label, own, levels))
    return panels


def levels_of(label: str, values: Sequence[float | None]) -> list[Level]:
    """One line where all runs agree, else one for each run that has a value."""
    known = {i: value for i, value in enumerate(values) if value is not None}
    if len(set(known.values())) == 1:
        return [Level(label, next(iter(known.values())), None)]
    return [Level(label, value, i) for i, value in known.items()]


def score_panels(runs: Sequence[Curves], network: str, names: list[str]) -> list[Panel]:
    panels = []
    for end, label in SCORES.items():
        name = f"val_{network}_{end}"
        if name in names:
            lines = lines_of(runs, {"": name, "on fills": f"val_{network}_fill_{end}"})
            panels.append(Panel(f"{network}: {label} in validation", label, lines))
    return panels


def level_panels(runs: Sequence[Curves], network: str) -> list[Panel]:
    """Validation over noise levels, a panel for each unit."""
    panels = []
    for unit, members in by_unit(runs, network).items():
        lines = level_lines(runs, f"val_{network}_{unit.end}_bins")
        own = [line for line in lines if line.run in members]
        title = f"{network}: loss by noise level"
        panels.append(Panel(title, unit.label, own, x_label="noise level t"))
    return panels


def level_lines(runs: Sequence[Curves], name: str) -> list[Line]:
    """The last validation over noise levels; of one run a few earlier ones, too."""
    lines = []
    for i, run in enumerate(runs):
        by_it = run.values.get(name, {})
        its = sorted(by_it)
        shown = its[-1:]
        if len(runs) == 1:
            chosen = np.linspace(0, len(its) - 1, min(len(its), N_VALIDATIONS)).round()
            shown = [its[int(index)] for index in chosen]
        for it in shown:
            y = np.array([np.nan if part is None else part for part in by_it[it]], float)
            x = (np.arange(len(y)) + 0.5) / len(y)
            kind = f"iteration {it}" if len(runs) == 1 else "last validation"
            lines.append(Line(i, kind, x, y))
    return lines


def bits_panel(runs: Sequence[Curves], names: list[str]) -> Panel:
    """Upper bounds with their standard errors."""
    bounds = {
        name.removeprefix("val_bits_"): name for name in names
        if name.startswith("val_bits_") and not name.endswith("_se")
    }
    return Panel("bits per token", "bits, upper bound", lines_of(runs, bounds, has_error=True))


def norm_panel(runs: Sequence[Curves], networks: list[str]) -> Panel:
    lines = lines_of(runs, {name: f"{name}_grad_norm" for name in networks}, "noisy")
    clips = [run.config.get("grad_clip") or None for run in runs]
    levels = levels_of("clipped above", clips) if lines else []
    is_log = all((line.y > 0).all() for line in lines)
    return Panel("gradient norm before clipping", "gradient norm", lines, levels, is_log=is_log)


def lr_panel(runs: Sequence[Curves], networks: list[str]) -> Panel:
    """Learning rates at base_width: muP scales those of each tensor."""
    lines = []
    for line in lines_of(runs, {name: "lr_factor" for name in networks}, "smooth"):
        config = runs[line.run].config
        if line.kind in runs[line.run].networks() and f"{line.kind}_lr" in config:
            lines.append(line._replace(y=line.y * config[f"{line.kind}_lr"]))
    return Panel("learning rate", "learning rate at base width", without_copies(lines, runs))


def without_copies(lines: list[Line], runs: Sequence[Curves]) -> list[Line]:
    """One for all that are the same and would hide each other."""
    groups = {}
    for line in lines:
        groups.setdefault((line.x.tobytes(), line.y.tobytes()), []).append(line)
    merged = []
    for same in groups.values():
        owners = list(dict.fromkeys(line.run for line in same))
        kinds = list(dict.fromkeys(line.kind for line in same))
        if len(owners) == 1:
            merged.append(same[0]._replace(kind=", ".join(kinds)))
            continue
        names = [runs[i].name for i in owners]
        shared = ", ".join(names) if len(names) <= N_NAMES else f"{len(names)} runs"
        merged.append(same[0]._replace(run=None, kind=f"{', '.join(kinds)} of {shared}"))
    return merged


def is_unknown(name: str, networks: list[str]) -> bool:
    """What other logs hold, such as those of tokenizer.py: a panel each."""
    known = (*(f"val_{network}_" for network in networks), "val_bits_")
    is_validation = name.startswith("val_") and name not in NOT_DRAWN
    return name == "loss" or (is_validation and not name.startswith(known))


# Drawing


def draw(runs: Sequence[Curves], path: str | Path) -> None:
    """All panels as one picture, with a legend of the runs over them where there are several."""
    panels = panels_of(runs)
    n_columns = min(MAX_COLUMNS, len(panels))
    n_rows = math.ceil(len(panels) / n_columns)
    width, height = PANEL_SIZE
    figure, axes = figures.open_figure(n_rows, n_columns, width * n_columns, height * n_rows)
    for axis, panel in zip(axes.flat, panels, strict=False):
        draw_panel(axis, panel, len(runs))
    for axis in axes.flat[len(panels):]:
        axis.remove()
    if len(runs) > 1:
        handles = [figures.handle(figures.colour_of(i, len(runs))) for i in range(len(runs))]
        figure.legend(
            handles, [run.name for run in runs],
            loc="outside upper left", ncols=min(len(runs), 2 * n_columns), frameon=False,
        )
    else:
        figure.suptitle(runs[0].name)
    figures.save_figure(figure, path)


def draw_panel(axis, panel: Panel, n_runs: int) -> None:
    """Colours tell runs apart, or kinds of lines where there is only one run."""
    from matplotlib import rcParams

    ink = rcParams["text.color"]
    kinds = list(dict.fromkeys(line.kind for line in panel.lines))
    handles = {}
    for line in panel.lines:
        k = kinds.index(line.kind)
        style = "-"
        colour = colour_of_kind(panel, k, len(kinds))
        if n_runs > 1:
            style = LINE_STYLES[k % len(LINE_STYLES)]
            colour = ink if line.run is None else figures.colour_of(line.run, n_runs)
        draw_line(axis, line, colour, style)
        handles.setdefault(line.kind, figures.handle(colour if n_runs == 1 else ink, style))
    labels = list(dict.fromkeys(level.label for level in panel.levels))
    for level in panel.levels:
        colour = ink if level.run is None else figures.colour_of(level.run, n_runs)
        look = dict(linestyle=figures.LEVEL_STYLES[labels.index(level.label)], linewidth=1)
        axis.axhline(level.y, color=colour, alpha=0.6, **look)
        handles[level.label] = figures.handle(ink, alpha=0.6, **look)
    handles.pop("", None)                   # the only kind
    if panel.is_log:
        axis.set_yscale("log")
    axis.set(xlabel=panel.x_label, ylabel=panel.y_label)
    axis.grid(alpha=0.2)
    heights = [*(line.y for line in panel.lines), [level.y for level in panel.levels]]
    has_errors = any(line.error is not None for line in panel.lines)
    figures.set_plain_ticks(axis.xaxis, np.concatenate([line.x for line in panel.lines]))
    figures.set_plain_ticks(axis.yaxis, () if has_errors else np.concatenate(heights))
    legend_above(axis, panel.title, handles)


def colour_of_kind(panel: Panel, k: int, n: int):
    """Validations of one run darken as training goes on."""
    from matplotlib import colormaps

    is_in_order = panel.x_label != "iterations"
    shade = 0.9 - 0.65 * k / max(1, n - 1)
    return colormaps["viridis"](shade) if is_in_order else f"C{k}"


def draw_line(axis, line: Line, colour, style: str) -> None:
    options = dict(color=colour, linestyle=style)
    if line.look == "points" or len(line.y) == 1:
        options |= dict(marker="o", markersize=3, linewidth=1.2)
    if line.error is not None and len(line.error) == len(line.y):
        axis.errorbar(line.x, line.y, line.error, capsize=2, **options)
    elif line.look == "noisy" and len(line.y) >= N_SMOOTH:
        axis.plot(line.x, line.y, linewidth=0.6, alpha=0.35, **options)
        axis.plot(line.x, running_mean(line.y, len(line.y) // N_MEANS), linewidth=1.2, **options)
    else:
        axis.plot(line.x, line.y, **options)


def running_mean(y: np.ndarray, width: int) -> np.ndarray:
    """Over `width` neighbours, fewer at both ends.  (n,) -> (n,)"""
    window = np.ones(width)
    return np.convolve(y, window, "same") / np.convolve(np.ones_like(y), window, "same")


def legend_above(axis, title: str, handles: dict[str, Any]) -> None:
    """Title and legend, outside of the data."""
    if not handles:
        axis.set_title(title, loc="left", fontsize=10)
        return
    n_rows = math.ceil(len(handles) / 3)
    axis.legend(
        handles.values(), handles.keys(), title=title, alignment="left", loc="lower left",
        bbox_to_anchor=(0, 1), ncols=math.ceil(len(handles) / n_rows), fontsize=8,
        title_fontsize=10, frameon=False, borderaxespad=0.2, borderpad=0.2, columnspacing=1.2,
        handlelength=2.4,
    )
