"""What frontiers.py compares: tasks, their trainings, and the samplers of each at every setting."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Training(NamedTuple):
    config: str
    flags: tuple[str, ...] = ()
    on: str = ""            # the training whose denoiser it takes as it is


class Arm(NamedTuple):
    name: str
    sampler: str                    # a row of evaluate.py
    dial: str                       # the option that is varied
    values: tuple[float, ...]
    options: Mapping[str, Any] = MappingProxyType({})   # the others that are not the default
    training: str = "pair"
    is_control: bool = False
    second_half: str = ""           # an option that takes half of the calls, as steps
    rewritten: int = 0              # tokens that these write, all together


TEMPERATURES = (1.0, 0.6)
NOISES = (1.0, 2.0, 4.5)            # on log-probabilities, where the most confident are uncovered
ALL = dict(remask="rescale", eta=1.0)
UNINFORMED = dict(trust=0.0, eta=1.0)   # ReMDM at full strength, confident draws first
ARMS = (
    Arm("ancestral", "ancestral", "temperature", TEMPERATURES, is_control=True),
    Arm("MaskGIT", "confidence", "noise", NOISES, is_control=True),
    Arm("MaskGIT, cold", "confidence", "temperature", (0.6,), is_control=True),
    Arm(
        "MaskGIT by entropy", "confidence", "noise", NOISES, dict(schedule="entropy"),
        is_control=True,
    ),
    Arm(
        "Halton order", "confidence", "temperature", TEMPERATURES, dict(order="halton"),
        is_control=True,
    ),
    Arm("ReMDM", "remdm", "temperature", TEMPERATURES, ALL, is_control=True),
    Arm(
        "ReMDM by confidence", "planned", "noise", NOISES, UNINFORMED, training="trunk",
        is_control=True,
    ),
    Arm(
        "ReMDM by confidence, cold", "planned", "temperature", (0.6,), UNINFORMED,
        training="trunk", is_control=True,
    ),
    Arm("ddpd", "ddpd", "temperature", (1.0, 0.7)),
    Arm("p2", "p2", "temperature", (1.3, 1.0)),
    Arm("planned", "planned", "noise", NOISES, training="trunk"),
    Arm("planned, cold", "planned", "temperature", (0.6,), training="trunk"),
    Arm("planned by surprise", "planned", "noise", NOISES, dict(surprise=1.0), training="trunk"),
    Arm(
        "planned by surprise, cold", "planned", "temperature", (0.6,), dict(surprise=1.0),
        training="trunk",
    ),
    Arm(
        "planned, random order", "planned", "temperature", TEMPERATURES, dict(order="random"),
        training="trunk",
    ),
)
# One network for all, as deep as planner and denoiser together
DEEP_ARMS = (
    Arm("ancestral", "ancestral", "temperature", TEMPERATURES, training="masked", is_control=True),
    Arm(
        "MaskGIT by entropy", "confidence", "noise", NOISES, dict(schedule="entropy"),
        training="masked", is_control=True,
    ),
    Arm("ReMDM", "remdm", "temperature", TEMPERATURES, ALL, training="masked", is_control=True),
    Arm("GIDD", "ancestral", "temperature", TEMPERATURES, training="gidd", is_control=True),
    Arm(
        "GIDD, corrected", "ancestral", "temperature", TEMPERATURES, training="gidd",
        is_control=True, second_half="correct", rewritten=16,
    ),
    Arm(
        "uniform noise, ancestral", "ancestral", "temperature", TEMPERATURES, training="single",
        is_control=True,
    ),
    Arm(
        "ddpd, refined at random", "ddpd", "temperature", TEMPERATURES,
        dict(schedule="leap", pick="random"), "single", True, "refine", 32,
    ),
    Arm("ddpd", "ddpd", "temperature", TEMPERATURES, training="single"),
    Arm("ddpd, leap", "ddpd", "temperature", TEMPERATURES, dict(schedule="leap"), "single"),
    Arm(
        "ddpd, refined", "ddpd", "temperature", TEMPERATURES, dict(schedule="leap"),
        "single", second_half="refine", rewritten=32,
    ),
)


class Task(NamedTuple):
    trainings: Mapping[str, Training]       # in this order
    folder: str             # of a run, by its seed; but for "pair" its training is added
    axes: tuple[str, str]   # columns of the plane in which frontiers lie, more is better
    arms: tuple[Arm, ...] = ARMS
    calls: tuple[int, ...] = (8, 16)
    n_report: int = 500
    n_choice: int = 250
    temperatures: tuple[float, ...] = ()    # besides those of the arms
    noises: tuple[float, ...] = ()          # instead of those of the arms


def pair_and_trunk(pair: str, trunk: str, *pair_flags: str) -> dict[str, Training]:
    """A planner apart, and one on the trunk of the same denoiser."""
    return {"pair": Training(pair, pair_flags), "trunk": Training(trunk, on="pair")}


PICTURE_AXES = ("recall", "precision")
TASKS = {
    "digits": Task(
        pair_and_trunk("digits", "digits_trunk"), "out/frontiers/digits_{seed}", PICTURE_AXES,
        temperatures=(0.8,),
    ),
    "digits_deep": Task(
        {
            "masked": Training("digits", ("--nets", "denoiser", "--n-layer", "8")),
            "gidd": Training("digits_gidd", ("--p-uniform", "0.1")),
            "single": Training("digits_single"),
        },
        "out/frontiers/deep_{seed}", PICTURE_AXES, DEEP_ARMS, temperatures=(0.8,),
    ),
    "avatars": Task(
        pair_and_trunk("avatars", "avatars_trunk"), "out/frontiers/avatars_{seed}", PICTURE_AXES
    ),
    # an empty picture counts as precise, since most pixels of any digit are black
    "mnist": Task(
        pair_and_trunk("mnist_32", "mnist_32_trunk", "--max-iters", "2500"),
        "out/frontiers/mnist_32_{seed}", ("recall", "judge_acc"), noises=(1.0, 2.0, 4.5, 9.0),
    ),
    "mazes": Task(
        pair_and_trunk("maze_ddpd", "maze_trunk"), "out/frontiers/maze_{seed}",
        ("valid", "shortest"),
    ),
}


def run_folder(task: str, training: str, seed: int) -> str:
    folder = TASKS[task].folder.format(seed=seed)
    return folder if training == "pair" else f"{folder}_{training}"
