"""Does planning pay? Samplers compared by their frontiers, such as that of precision and recall.

python experiments/frontiers.py [train | sample | table | plot | exact] [TASK ...] [compile]
[SEED ...]

A sampler has a dial, such as its temperature, that trades variety for precision. It is judged at
all settings of the dial, at equal numbers of network calls.
train   the networks of each task with three seeds, into out/; those of digits_deep are one
        network of eight blocks for each method, the others pairs of four
sample  every arm at every setting of its dial, on two seeds of the sampling noise: one to choose
        the setting, one to report it. Held-out data is a row, too: assets/frontiers_TASK.csv
table   for each arm and number of calls, at the chosen setting: the scores, their harmonic mean,
        the area that the frontier dominates, and how far the arm gets outside of the controls
plot    assets/frontiers_TASK.png
exact   what each sampler draws on a tiny world with exact networks (exact.py)
Without a word all of it is done, for all tasks. "compile" takes a third off a step of training.
Finished runs and rows are skipped, so the same command resumes.
"""

import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import common
import exact
import numpy as np
from arms import TASKS, Arm, Task, run_folder
from scipy import stats
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import evaluate
from support import runtime, sampling

SEEDS = [0, 1, 2]
CHOICE_SEED = 100       # of the sampling noise: here settings of dials are chosen,
REPORT_SEED = 0         # and here their scores are read off
N_COUNTED = 50          # samples over which FLOPs are counted
REAL = "held-out data"


def table_of(task: str) -> common.Table:
    """Each task has its own, so that they can be sampled side by side."""
    return common.Table(f"frontiers_{task}.csv")


def train(task: str, seeds: list[int]) -> None:
    for seed in seeds:
        for name, training in TASKS[task].trainings.items():
            flags = training.flags
            if training.on:
                flags = (*flags, "--freeze-denoiser", run_folder(task, training.on, seed))
            folder = run_folder(task, name, seed)
            common.train(
                training.config, folder, seed, *flags, compiled="compile" in sys.argv
            )


# Sampling


class Setting(NamedTuple):
    arm: Arm
    calls: int
    value: float            # of the dial
    seed: int               # of the sampling noise

    def key(self, folder: str) -> dict[str, Any]:
        """Columns that tell its row from all others."""
        own = dict(arm=self.arm.name, calls=self.calls, value=self.value, seed=self.seed)
        return {"run": folder} | own


def values_of(task: str, arm: Arm) -> tuple[float, ...]:
    """All settings of an arm's dial."""
    if arm.dial == "noise":
        return TASKS[task].noises or arm.values
    more = TASKS[task].temperatures if arm.dial == "temperature" else ()
    return tuple(sorted({*arm.values, *more}, reverse=arm.values[0] > arm.values[-1]))


def settings_of(task: str, training: str) -> list[Setting]:
    arms = [arm for arm in TASKS[task].arms if arm.training == training]
    return [
        Setting(arm, calls, value, seed)
        for calls in TASKS[task].calls for arm in arms for value in values_of(task, arm)
        for seed in (CHOICE_SEED, REPORT_SEED)
    ]


def sample(task: str, seeds: list[int]) -> None:
    for seed in seeds:
        for training in TASKS[task].trainings:
            sample_run(task, run_folder(task, training, seed), settings_of(task, training))


def sample_run(task: str, folder: str, settings: list[Setting]) -> None:
    """The rows of one run that are missing."""
    if not common.is_started(folder):
        print(f"{folder} is not trained yet")
        return
    table = table_of(task)
    missing = [setting for setting in settings if not table.has(**setting.key(folder))]
    if not missing:
        return
    judged = evaluate.Judged(folder, runtime.pick_device())
    if judged.metrics.val and not table.has(arm=REAL):
        real, _ = judged.metrics.val
        table.add({"arm": REAL, "n": judged.metrics.n_val} | real)
    for setting in missing:
        row = sample_row(judged, TASKS[task], setting)
        table.add(row | setting.key(folder))
        x, y = TASKS[task].axes
        print(f"{folder} {describe(setting)}: {x} {row[x]:.3f}, {y} {row[y]:.3f}", flush=True)


def describe(setting: Setting) -> str:
    arm, calls, value, seed = setting
    return f"{arm.name} {calls} calls, {arm.dial} {value:g}, seed {seed}"


def sample_row(judged: evaluate.Judged, task: Task, setting: Setting) -> dict[str, Any]:
    """Scores of the samples of a setting, and their FLOPs."""
    flags = flags_of(task, setting)
    *_, row = evaluate.evaluate(
        judged, setting.arm.sampler, steps_of(setting), setting.seed, flags, None
    )
    return {"flops": flops_per_sample(judged, setting, flags)} | row


def steps_of(setting: Setting) -> int:
    """Calls of the sampler, without those of a second half."""
    return setting.calls // 2 if setting.arm.second_half else setting.calls


def flags_of(task: Task, setting: Setting) -> evaluate.Flags:
    arm = setting.arm
    n = task.n_choice if setting.seed == CHOICE_SEED else task.n_report
    options = arm.options | {arm.dial: setting.value}
    if arm.second_half:
        n_steps = setting.calls - steps_of(setting)
        options |= {arm.second_half: n_steps, "k": arm.rewritten // n_steps}
    return evaluate.Flags(runs=(), n=n, **options)


def flops_per_sample(judged: evaluate.Judged, setting: Setting, flags: evaluate.Flags) -> int:
    """Of all its network calls, each by the size of its network: counted by PyTorch while some
    samples are drawn. Fused attention is taken apart, for it is not counted on every device."""
    labels, _, tokens, known = judged.held_out(flags)
    n = min(N_COUNTED, len(labels))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for stage in evaluate.plan_stages(setting.arm.sampler, judged, steps_of(setting), flags):
            request = sampling.Request(
                stage.sampler, stage.options, setting.seed, labels, tokens, known
            )
            tokens = sampling.draw_batch(judged.run, request, range(n)).tokens
    return round(counter.get_total_flops() / n)


# Frontiers: points of a plane in which more is better

Point = tuple[float, float]


def harmonic_mean(point: Point) -> float:
    """0 if a coordinate is."""
    if min(point) <= 0:
        return 0.0
    return len(point) / sum(1 / value for value in point)


def staircase(points: Iterable[Point]) -> list[Point]:
    """The points that no other dominates, from left to right."""
    steps = []
    for point in sorted(set(points), reverse=True):     # from the right, the higher one first
        if not steps or point[1] > steps[-1][1]:
            steps.append(point)
    return steps[::-1]


def hypervolume(points: Iterable[Point]) -> float:
    """The area that points dominate, from (0, 0)."""
    area = left = 0.0
    for x, y in staircase(points):
        area += (x - left) * y
        left = x
    return area


AXES = [(0.0, np.inf), (np.inf, 0.0)]       # what is worth nothing is reached by anyone


def margin(point: Point, controls: Iterable[Point]) -> float:
    """How far a point is outside of the controls' staircase, which ends at the axes; negative
    inside.

    So much it would have to lose in both coordinates to lie on the staircase: the additive epsilon
    indicator.
    """
    return min(max(point[0] - x, point[1] - y) for x, y in [*controls, *AXES])


def best_setting(scores: dict[float, float]) -> float:
    """The value of the dial with the highest score, the first of equal ones."""
    return max(scores, key=scores.get)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval by Student's t."""
    n = len(values)
    half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)
    return float(np.mean(values)), float(half)


# Results


class Curve(NamedTuple):
    """Rows of an arm by the value of its dial, of one training seed and number of calls."""
    choice: dict[float, dict[str, str]]
    report: dict[float, dict[str, str]]


class Result(NamedTuple):
    """Of an arm, for one training seed and number of calls."""
    value: float            # of the dial, chosen by the harmonic mean
    row: dict[str, str]     # of the report at that value
    harmonic_mean: float
    hypervolume: float
    margin: float           # at the value with the largest margin among the rows of the choice


def curve_of(rows: common.Rows, task: str, arm: Arm, calls: int, seed: int) -> Curve | None:
    """None where rows are missing."""
    folder = run_folder(task, arm.training, seed)
    splits = []
    for sampling_seed in (CHOICE_SEED, REPORT_SEED):
        keys = {value: Setting(arm, calls, value, sampling_seed).key(folder)
                for value in values_of(task, arm)}
        found = {value: common.select(rows, **key) for value, key in keys.items()}
        if not all(found.values()):
            return None
        splits.append({value: own[-1] for value, own in found.items()})
    return Curve(*splits)


def points_of(rows: dict[float, dict[str, str]], task: str) -> dict[float, Point]:
    x, y = TASKS[task].axes
    return {value: (float(row[x]), float(row[y])) for value, row in rows.items()}


def results_of(rows: common.Rows, task: str, calls: int, seed: int) -> dict[str, Result]:
    """{arm: Result} of the arms that are finished."""
    curves = {arm.name: curve_of(rows, task, arm, calls, seed) for arm in TASKS[task].arms}
    curves = {name: curve for name, curve in curves.items() if curve}
    choice = {name: points_of(curve.choice, task) for name, curve in curves.items()}
    report = {name: points_of(curve.report, task) for name, curve in curves.items()}
    results = {}
    for name, curve in curves.items():
        scores = {value: harmonic_mean(point) for value, point in choice[name].items()}
        value = best_setting(scores)
        results[name] = Result(
            value, curve.report[value], harmonic_mean(report[name][value]),
            hypervolume(report[name].values()), margin_of(task, name, choice, report),
        )
    return results


def margin_of(
    task: str, name: str, choice: dict[str, dict[float, Point]],
    report: dict[str, dict[float, Point]],
) -> float:
    """Of an arm to the controls, of a control to the others: at the value that the choice favours;
    NaN without controls."""
    controls = [arm.name for arm in TASKS[task].arms if arm.is_control]
    others = [other for other in controls if other != name and other in report]
    if not others:
        return np.nan

    def margins(split):
        controls = [point for other in others for point in split[other].values()]
        return {value: margin(point, controls) for value, point in split[name].items()}

    return margins(report)[best_setting(margins(choice))]


# Table

# Columns at the chosen setting, where rows have them: name, format
COLUMNS = {
    "judge_acc": ("judge accuracy", ".1%"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "valid": ("valid", ".1%"),
    "shortest": ("shortest", ".1%"),
    "frechet": ("Frechet", ".2f"),
    "class_entropy": ("entropy in a class", ".2f"),
}
SUMMARIES = {
    "harmonic_mean": "harmonic mean", "hypervolume": "area of frontier", "margin": "outside by"
}


def table(task: str, seeds: list[int]) -> None:
    """Print the results of all arms that are finished."""
    rows = table_of(task).rows()
    columns = [name for name in COLUMNS if any(row.get(name) for row in rows)]
    names = [COLUMNS[name][0] for name in columns]
    print(
        f"\n{task}: means over training seeds, 95 % intervals by Student's t; sampling seed "
        f"{REPORT_SEED}, settings chosen on {CHOICE_SEED}\n"
    )
    common.print_header(
        "calls", "arm", "seeds", "dial", *names, *SUMMARIES.values(), "MFLOP per sample"
    )
    if real := common.select(rows, arm=REAL):
        print_real(real[0], task, columns)
    for calls in TASKS[task].calls:
        by_seed = [results_of(rows, task, calls, seed) for seed in seeds]
        for arm in TASKS[task].arms:
            results = [results[arm.name] for results in by_seed if arm.name in results]
            if results:
                print_arm(arm, calls, results, columns)


def print_real(row: dict[str, str], task: str, columns: list[str]) -> None:
    cells = ["", REAL, "", "", *scores_of([row], columns)]
    [point] = points_of({0.0: row}, task).values()
    common.print_row([*cells, f"{harmonic_mean(point):.3f}", f"{hypervolume([point]):.3f}", "", ""])


def print_arm(arm: Arm, calls: int, results: list[Result], columns: list[str]) -> None:
    chosen = dict.fromkeys(f"{result.value:g}" for result in results)
    rows = [result.row for result in results]
    cells = [str(calls), arm.name, str(len(results)), f"{arm.dial} {', '.join(chosen)}"]
    cells += scores_of(rows, columns)
    for name in SUMMARIES:
        form = "+.3f" if name == "margin" else ".3f"
        cells.append(describe_values([getattr(result, name) for result in results], form))
    common.print_row([*cells, f"{common.mean(rows, 'flops') / 1e6:,.0f}"])


def describe_values(values: list[float], form: str) -> str:
    """Mean and interval over three training seeds or more, else all of them: a Student's t of two
    says nothing."""
    if len(values) < 3:
        return ", ".join(f"{value:{form}}" for value in values)
    mean, half = interval(values)
    return f"{mean:{form}} ± {half:.3f}"


def scores_of(rows: common.Rows, columns: list[str]) -> list[str]:
    """Means over rows as texts."""
    return [f"{common.mean(rows, name):{COLUMNS[name][1]}}" for name in columns]


# Plot

COLOURS = ("#d62728", "#1f5fd6", "#17a34a", "#c026d3", "#f08c00", "#0891b2", "#7c3aed", "#b45309")
PLANNED_MARKERS = "oDs^vP"
GREYS = ("0.30", "0.45", "0.60", "0.70", "0.78", "0.55", "0.38", "0.65")
CONTROL_MARKERS = "x+12<>34"
PANEL_WIDTH = 3.1       # inches
LEGEND_WIDTH = 2.7
MARGIN = 0.03           # around the points


def plot(task: str, seeds: list[int]) -> None:
    """The frontiers, means over training seeds, a panel for each number of calls that was made."""
    rows = table_of(task).rows()
    all_calls = [calls for calls in TASKS[task].calls if common.select(rows, calls=calls)]
    if not all_calls:
        print(f"{task} is not sampled yet")
        return
    width = PANEL_WIDTH * len(all_calls) + LEGEND_WIDTH
    figure, panels = common.open_figure(
        1, len(all_calls), width=width, height=3.9, sharex=True, sharey=True, squeeze=False
    )
    arms = TASKS[task].arms
    styles = styles_of(arms)
    handles = {}
    shown = []
    for calls, panel in zip(all_calls, panels[0], strict=True):
        means = {arm.name: mean_points(rows, task, arm, calls, seeds) for arm in arms}
        controls = [point for arm in arms if arm.is_control for point in means[arm.name]]
        shown += [point for own in means.values() for point in own]
        if controls:
            handles["reach of the controls"] = draw_reach(panel, controls)
        for arm in arms:
            if means[arm.name]:
                [handles[arm.name]] = panel.plot(*zip(*means[arm.name], strict=True),
                                                 **styles[arm.name])
        if real := common.select(rows, arm=REAL):
            [point] = points_of({0.0: real[0]}, task).values()
            [handles[REAL]] = panel.plot(*point, "*", color="black", markersize=12)
            shown.append(point)
        panel.set_title(f"{calls} network calls")
        panel.set_xlabel(COLUMNS[TASKS[task].axes[0]][0])
        panel.grid(alpha=0.2)
    panels[0][0].set_ylabel(COLUMNS[TASKS[task].axes[1]][0])
    if shown:
        x, y = zip(*shown, strict=True)
        panels[0][0].set_xlim(min(x) - MARGIN, max(x) + MARGIN)
        panels[0][0].set_ylim(min(y) - MARGIN, max(y) + MARGIN)
    figure.legend(
        handles.values(), handles.keys(), loc="outside right upper", fontsize=10, frameon=False
    )
    common.save_figure(figure, f"frontiers_{task}.png")


def styles_of(arms: Iterable[Arm]) -> dict[str, dict[str, Any]]:
    """Saturated colours for planned arms, which are drawn above the controls' greys."""
    styles = {}
    planned = [arm.name for arm in arms if not arm.is_control]
    for i, name in enumerate(planned):
        styles[name] = dict(
            color=COLOURS[i % len(COLOURS)], marker=PLANNED_MARKERS[i % len(PLANNED_MARKERS)],
            markersize=5, linewidth=1.6, zorder=3,
        )
    controls = [arm.name for arm in arms if arm.is_control]
    for i, name in enumerate(controls):
        styles[name] = dict(
            color=GREYS[i % len(GREYS)], marker=CONTROL_MARKERS[i % len(CONTROL_MARKERS)],
            markersize=7, linewidth=1, zorder=2,
        )
    return styles


def mean_points(
    rows: common.Rows, task: str, arm: Arm, calls: int, seeds: list[int],
) -> list[Point]:
    """Of the report, by the value of the dial; none where no seed is finished."""
    curves = [curve_of(rows, task, arm, calls, seed) for seed in seeds]
    by_seed = [points_of(curve.report, task) for curve in curves if curve]
    if not by_seed:
        return []
    return [tuple(np.mean([points[value] for points in by_seed], 0))
            for value in values_of(task, arm)]


def draw_reach(panel, points: list[Point]):
    """Shade what points dominate.  -> what stands for it in a legend"""
    steps = staircase(points)
    x = [0, *[x for x, _ in steps]]
    y = [steps[0][1], *[y for _, y in steps]]
    return panel.fill_between(x, y, step="pre", color="0.93", zorder=0)


if __name__ == "__main__":
    steps = {"train": train, "sample": sample, "table": table, "plot": plot}
    words = common.read_words(__doc__, *steps, "exact", *TASKS, "compile")
    seeds = common.read_numbers() or SEEDS
    chosen = common.choose(words, (*steps, "exact"))
    for task in common.choose(words, TASKS):
        common.run_steps(steps, [name for name in chosen if name in steps], task, seeds)
    if "exact" in chosen:
        common.run_steps({"exact": exact.table}, ["exact"])
