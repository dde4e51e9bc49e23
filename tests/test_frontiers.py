"""Frontiers of samplers: their arithmetic by hand, the choice of a setting, and a tiny run of it
all."""

import csv
import math
import sys
from dataclasses import fields

import pytest
import torch
from conftest import ROOT, tiny_config
from world import dense

import config
import evaluate
import methods
import train_ddpd
from sources import maze
from support.budgets import sampler_of

sys.path.append(str(ROOT / "experiments"))

import exact
import frontiers
from arms import ARMS, PICTURE_AXES, TASKS, Arm, Task, Training, run_folder

# Arithmetic


@pytest.mark.parametrize("point, mean", [
    ((0.5, 0.5), 0.5), ((0.25, 0.75), 0.375), ((1.0, 0.0), 0.0), ((0.0, 0.0), 0.0),
])
def test_harmonic_mean(point, mean):
    assert frontiers.harmonic_mean(point) == pytest.approx(mean)


@pytest.mark.parametrize("points, steps, area", [
    ([(0.5, 0.4)], [(0.5, 0.4)], 0.2),
    # .2 x .8 and .4 x .5; (.4, .3) is dominated, and so is one of the two at .6
    ([(0.6, 0.5), (0.4, 0.3), (0.2, 0.8), (0.6, 0.1)], [(0.2, 0.8), (0.6, 0.5)], 0.36),
    ([(0.3, 0.7), (0.3, 0.7), (0.2, 0.7)], [(0.3, 0.7)], 0.21),
    ([(0.1, 0.9), (0.5, 0.5), (0.9, 0.1)], [(0.1, 0.9), (0.5, 0.5), (0.9, 0.1)], 0.33),
    ([], [], 0.0),
])
def test_staircase_and_its_area(points, steps, area):
    assert frontiers.staircase(points) == steps
    assert frontiers.hypervolume(points) == pytest.approx(area)
    assert frontiers.hypervolume(points[::-1]) == pytest.approx(area)


@pytest.mark.parametrize("point, expected", [
    ((0.2, 0.8), 0.0),              # a control itself
    ((0.7, 0.6), 0.1),              # .1 beyond (.6, .5) on both axes
    ((0.4, 0.6), 0.1),              # in the inner corner: .1 above one, .2 right of the other
    ((0.65, 0.1), 0.05),            # beyond the right end
    ((0.9, 0.02), 0.02),            # far beyond it, but hardly above the axis
    ((0.4, 0.45), -0.05),           # .05 under the step
    ((0.1, 0.1), -0.4),             # (.6, .5) is .5 and .4 better
])
def test_margin(point, expected):
    controls = [(0.2, 0.8), (0.6, 0.5), (0.1, 0.1)]
    assert frontiers.margin(point, controls) == pytest.approx(expected)
    if expected:                    # losing as much in both brings it onto the staircase
        moved = (point[0] - expected, point[1] - expected)
        assert frontiers.margin(moved, controls) == pytest.approx(0)


def test_a_setting_is_chosen_by_its_score():
    assert frontiers.best_setting({1.0: 0.2, 0.8: 0.5, 0.6: 0.4}) == 0.8
    assert frontiers.best_setting({1.0: 0.5, 0.8: 0.5}) == 1.0


def test_interval():
    """Of 1, 2, 3: standard deviation 1, and 4.303 / sqrt(3) by the table of t with 2 degrees."""
    assert frontiers.interval([1.0, 2.0, 3.0]) == pytest.approx((2, 2.484), abs=1e-3)
    assert frontiers.describe_values([1.0, 2.0, 3.0], ".1f") == "2.0 ± 2.484"
    assert frontiers.describe_values([0.25, -0.5], "+.2f") == "+0.25, -0.50"


# Results

PLAIN = Arm("plain", "ancestral", "temperature", (1.0, 0.5), is_control=True)
OTHER = Arm("other", "confidence", "temperature", (1.0, 0.5), is_control=True)
PLANNED = Arm("planned", "ddpd", "temperature", (1.0, 0.5))


def rows_of(arm, seed, choice, report):
    """Rows of two settings on both splits, as a CSV has them.  choice, report: two points each"""
    folder = run_folder("digits", arm.training, seed)
    rows = []
    for sampling_seed, points in ((100, choice), (0, report)):
        for value, (recall, precision) in zip(arm.values, points, strict=True):
            row = dict(run=folder, arm=arm.name, calls=8, value=value)
            row |= dict(seed=sampling_seed, recall=recall, precision=precision, flops=1)
            rows.append({name: str(cell) for name, cell in row.items()})
    return rows


@pytest.fixture
def arms(monkeypatch):
    arms = (PLAIN, OTHER, PLANNED)
    plain_digits = TASKS["digits"]._replace(temperatures=(), arms=arms)
    monkeypatch.setitem(TASKS, "digits", plain_digits)


def test_a_setting_is_chosen_on_one_split_and_reported_on_the_other(arms):
    """The choice favours .5 where the report would favour 1, for harmonic mean and margin."""
    rows = rows_of(PLAIN, 0, [(0.8, 0.2), (0.5, 0.5)], [(0.6, 0.6), (0.5, 0.4)])
    rows += rows_of(OTHER, 0, [(0.1, 0.1), (0.2, 0.2)], [(0.1, 0.1), (0.2, 0.2)])
    rows += rows_of(PLANNED, 0, [(0.9, 0.05), (0.6, 0.6)], [(0.9, 0.9), (0.7, 0.5)])
    results = frontiers.results_of(rows, "digits", 8, 0)
    plain = results["plain"]
    assert plain.value == 0.5
    assert plain.row["recall"] == "0.5"
    assert plain.harmonic_mean == pytest.approx(2 * 0.5 * 0.4 / 0.9)
    assert plain.hypervolume == pytest.approx(0.36)
    assert plain.margin == pytest.approx(0.3)       # of (.5, .4) to the other control's (.2, .2)
    assert results["other"].margin == pytest.approx(-0.4)
    assert results["planned"].value == 0.5
    assert results["planned"].margin == pytest.approx(0.1)      # of (.7, .5) to (.6, .6)


def test_an_unfinished_arm_is_left_out(arms):
    """Also one whose report of another seed is there; its controls are those that are finished."""
    rows = rows_of(PLAIN, 0, [(0.8, 0.2), (0.5, 0.5)], [(0.6, 0.6), (0.5, 0.4)])
    rows += rows_of(PLANNED, 0, [(0.9, 0.05), (0.6, 0.6)], [(0.9, 0.9), (0.7, 0.5)])[:3]
    rows += rows_of(PLANNED, 1, [(0.9, 0.1), (0.6, 0.6)], [(0.9, 0.9), (0.7, 0.5)])
    results = frontiers.results_of(rows, "digits", 8, 0)
    assert list(results) == ["plain"]
    assert math.isnan(results["plain"].margin)
    assert list(frontiers.results_of(rows, "digits", 8, 1)) == ["planned"]


METHODS_OF_TRAININGS = {
    "pair": "ddpd-mask", "trunk": "ddpd-trunk", "masked": "masked", "gidd": "gidd",
    "single": "ddpd-single",
}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_arms_have_the_options_that_they_set(task):
    """And no two of a task have one name, which tells their rows apart."""
    flags = {field.name for field in fields(config.SamplerFlags)}
    assert len({arm.name for arm in task.arms}) == len(task.arms)
    for arm in task.arms:
        fits = methods.METHODS[METHODS_OF_TRAININGS[arm.training]].samplers
        known = methods.options_of(fits[sampler_of(arm.sampler)])
        given = {arm.dial, *arm.options}
        assert given <= flags & set(known), arm.name
        assert len(set(arm.values)) == len(arm.values), arm.name
        assert arm.training in task.trainings
        assert arm.second_half in ("", "refine") or "self_correct" in fits


def test_a_task_can_have_settings_of_its_own(arms, monkeypatch):
    """More temperatures, and other noises, for all arms alike."""
    warmer = TASKS["digits"]._replace(temperatures=(0.8,))
    assert frontiers.values_of("digits", PLAIN) == (1.0, 0.5)
    monkeypatch.setitem(TASKS, "digits", warmer)
    assert frontiers.values_of("digits", PLAIN) == (1.0, 0.8, 0.5)
    assert frontiers.values_of("digits", PLAIN._replace(values=(0.6,))) == (0.6, 0.8)
    by_noise = PLAIN._replace(dial="noise", values=(1.0, 2.0))
    assert frontiers.values_of("digits", by_noise) == (1.0, 2.0)
    monkeypatch.setitem(TASKS, "digits", warmer._replace(noises=(2.0, 9.0)))
    assert frontiers.values_of("digits", by_noise) == (2.0, 9.0)
    assert frontiers.values_of("digits", PLAIN) == (1.0, 0.8, 0.5)


# A tiny run


def rows_in(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_a_tiny_task_from_training_to_plot(monkeypatch, tmp_path, capsys):
    """Rows of all settings on both splits, FLOPs by the networks' sizes; nothing is drawn twice."""
    folder = "out/frontiers_{seed}"
    axes = PICTURE_AXES
    task = Task(
        {"pair": Training("digits")}, folder, axes, (PLAIN, PLANNED), calls=(2,), n_report=20,
        n_choice=12,
    )
    monkeypatch.setitem(TASKS, "digits", task)
    monkeypatch.setattr(frontiers.common, "ASSETS", tmp_path)
    frontiers.sample("digits", [0])
    assert "not trained yet" in capsys.readouterr().out
    train_ddpd.main(tiny_config("frontiers_0", "--data", "digits", "--max-iters", 1))
    frontiers.sample("digits", [0])
    rows = rows_in(tmp_path / "frontiers_digits.csv")
    assert [row["arm"] for row in rows] == [frontiers.REAL] + 4 * ["plain"] + 4 * ["planned"]
    assert [(row["value"], row["seed"], row["n"]) for row in rows[1:5]] == [
        ("1.0", "100", "12"), ("1.0", "0", "20"), ("0.5", "100", "12"), ("0.5", "0", "20"),
    ]
    run = evaluate.Judged("out/frontiers_0", torch.device("cpu")).run
    n_weights = sum(p.numel() for p in run.nets["denoiser"].blocks.parameters())
    for row in rows[1:]:                # 2 FLOPs for each weight and token of a call, at least
        assert 1 < float(row["flops"]) / (2 * 64 * n_weights * float(row["nfe"])) < 2
    monkeypatch.setattr(frontiers, "sample_row", None)
    frontiers.sample("digits", [0])
    capsys.readouterr()
    frontiers.table("digits", [0])
    said = capsys.readouterr().out
    assert "| 2 | plain | 1 | temperature" in said and "held-out data" in said
    frontiers.plot("digits", [0])
    assert (tmp_path / "frontiers_digits.png").stat().st_size > 10_000


def test_mazes_are_judged_by_their_paths(monkeypatch, tmp_path, capsys):
    """Held-out mazes with their walls given, which have no scores of real data."""
    for name, size in {"N_TRAIN": 40, "N_VAL": 20}.items():
        monkeypatch.setattr(maze, name, size)
    axes = ("valid", "shortest")
    task = Task(
        {"pair": Training("maze_ddpd")}, "out/mazes_{seed}", axes, (PLAIN, PLANNED), (4,), 10, 6
    )
    monkeypatch.setitem(TASKS, "mazes", task)
    monkeypatch.setattr(frontiers.common, "ASSETS", tmp_path)
    train_ddpd.main(tiny_config("mazes_0", "--data", "maze", "--max-iters", 1))
    frontiers.sample("mazes", [0])
    rows = rows_in(tmp_path / "frontiers_mazes.csv")
    assert [row["n"] for row in rows] == 4 * ["6", "10"]
    assert {row["valid"] for row in rows} == {"0.0"}
    frontiers.table("mazes", [0])
    assert "| valid | shortest |" in capsys.readouterr().out
    frontiers.plot("mazes", [0])
    assert (tmp_path / "frontiers_mazes.png").exists()


def test_a_second_half_takes_half_of_the_calls():
    arm = PLAIN._replace(second_half="refine", rewritten=9)
    setting = frontiers.Setting(arm, calls=5, value=0.6, seed=100)
    assert frontiers.steps_of(setting) == 2
    flags = frontiers.flags_of(TASKS["digits"], setting)
    assert (flags.refine, flags.k, flags.temperature, flags.n) == (3, 3, 0.6, 250)
    plain = setting._replace(arm=PLAIN)
    assert frontiers.steps_of(plain) == 5
    assert frontiers.flags_of(TASKS["digits"], plain).refine is None


def test_calls_of_a_correction_are_counted(monkeypatch, tmp_path, capsys):
    """Half of the calls draw, half correct; the row is that of the corrected samples."""
    arm = PLAIN._replace(training="gidd", values=(1.0,), second_half="correct", rewritten=8)
    plain = arm._replace(name="alone", second_half="")
    task = Task(
        {"gidd": Training("digits_gidd")}, "out/frontiers_{seed}", PICTURE_AXES,
        (arm, plain), calls=(4,), n_report=12, n_choice=12,
    )
    monkeypatch.setitem(TASKS, "digits", task)
    monkeypatch.setattr(frontiers.common, "ASSETS", tmp_path)
    flags = ("--data", "digits", "--method", "gidd", "--max-iters", 1)
    train_ddpd.main(tiny_config("frontiers_0_gidd", *flags))
    frontiers.sample("digits", [0])
    rows = rows_in(tmp_path / "frontiers_digits.csv")[1:]
    corrected, alone = rows[1], rows[3]
    assert corrected["sampler"] == "ancestral+correct" and alone["sampler"] == "ancestral"
    assert (corrected["steps"], corrected["nfe"]) == ("2", "4.0")
    assert (alone["steps"], alone["nfe"]) == ("4", "4.0")
    assert corrected["flops"] == alone["flops"]
    capsys.readouterr()


# Exact networks


def test_the_blind_planner_averages_over_levels():
    """Against the planner that is told each level, weighted by how likely x is at it."""
    world = dense()
    x = torch.cartesian_prod(*[torch.arange(3)] * 3)
    levels = (torch.arange(400) + 0.5) / 400
    told = torch.zeros(x.shape, dtype=torch.float64)
    total = torch.zeros(len(x), 1, dtype=torch.float64)
    for level in levels:
        t = level.expand(len(x), 1)
        p_x = (world.likelihood(x, t).prod(-1) @ world.q)[:, None]
        told += p_x * world.planner(x, t, None).sigmoid()
        total += p_x
    blind = exact.blind_planner(world)(x, None, None).sigmoid()
    torch.testing.assert_close(blind, told / total, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def exact_nets():
    """A world, and what is exact on it."""
    world = exact.make_world()
    return world, exact.exact_networks(world)


@pytest.mark.parametrize("name, n_steps, tv, bits", [
    ("random order", 8, 0.01, 5.16),            # one token at a time: exact
    ("ancestral", 256, 0.01, 5.16),
    ("ancestral", 2, 0.32, 6.66),               # many at a time: as if they were independent
    ("MaskGIT, noise 0", 8, 0.70, 1.17),        # sharpened
    ("p2", 8, 0.67, 1.41),
    ("ReMDM, rescaled, eta 1", 8, 0.13, 5.84),
    ("ReMDM, counts", 8, 0.08, 5.57),
    ("planned, written", 8, 0.04, 5.41),        # closer, and not sharpened
    ("planned, differs", 8, 0.12, 4.99),
    ("planned, differs, by confidence", 8, 0.195, 4.45),
    ("planned, differs, by confidence, surprise 1", 8, 0.07, 5.16),     # no longer sharpened
    ("uniform noise, ancestral", 8, 0.10, 5.71),
    ("ddpd, one network, leap", 8, 0.095, 5.65),
    ("ddpd, one network, refined", 8, 0.16, 4.89),
    ("ddpd, one network, refined at random", 8, 0.15, 5.90),
])
def test_laws_with_exact_networks(exact_nets, name, n_steps, tv, bits):
    world, nets = exact_nets
    x = exact.draw(nets, exact.ROWS[name], n_steps, 20_000).x
    assert world.distance(x) == pytest.approx(tv, abs=0.025)
    assert exact.entropy(x) == pytest.approx(bits, abs=0.05)


def test_the_exact_table_covers_the_arms():
    """A sampler that is judged on frontiers has a row there."""
    judged = {sampler_of(arm.sampler) for arm in ARMS}
    assert judged <= {row.sampler for row in exact.ROWS.values()}


def test_the_exact_table_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(exact, "N_SAMPLES", 200)
    monkeypatch.setattr(exact, "FILLS_AT_ONCE", 1000)
    monkeypatch.setattr(exact, "N_FILLS", 1000)
    exact.table()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 3 + len(exact.ROWS)
    assert len({line.count("|") for line in lines}) == 1
