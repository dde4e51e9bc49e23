"""Config files and flags: what is read, what --help says, what is refused."""

import inspect
import io
import math
import os
import re
import subprocess
import sys
import tokenize
import typing
from dataclasses import MISSING, fields, replace
from pathlib import Path

import pytest
from conftest import ROOT, refusal, script

import config
import data
import evaluate
import export
import sample
from formats.flags import PROSE, Bound, check_bounds

CONFIGS = sorted((ROOT / "configs").glob("*.py"))

# Scripts and the dataclasses of their flags
SCRIPTS = {
    "train_ddpd.py": config.Config,
    "sample.py": sample.Flags,
    "evaluate.py": evaluate.Flags,
    "data.py": data.Make,
}

# Flags whose names must stay: other programs of this family have them too
FAMILY = """
    --batch-size --planner-lr --denoiser-lr --max-iters --weight-decay --warmup-iters
    --lr-decay-iters --grad-clip --grad-accumulation-steps --log-interval --eval-interval
    --save-interval --wandb-project --wandb-entity --wandb-name --seed --compile --out-dir --data
    --image-size --grey-levels --n-layer --n-head --n-embd --base-width --ema-decay
    --label-dropout --denoiser-process --nets --method --overfit
""".split()


def write(text, name="mine.py"):
    Path(name).write_text(text)
    return name


def load_refusal(*argv, cls=config.Config):
    return refusal(config.load, cls, [str(arg) for arg in argv])


# What is read


def test_precedence():
    """defaults < files left to right < flags, and the last file names the run."""
    write('"""A header."""\nbatch_size = 8 * 16     # why\nseed = 3\nplanner_lr = 1', "one.py")
    write("seed = 4\nn_embd = 2 ** 7\nn_head = n_embd // 64", "two.py")
    cfg = config.load(argv=["one.py", "two.py", "--n-embd", "64"])
    assert cfg.batch_size == 128
    assert cfg.planner_lr == 1.0
    assert cfg.seed == 4
    assert cfg.n_head == 2
    assert cfg.n_embd == 64
    assert cfg.n_layer == config.Config().n_layer
    assert cfg.out_dir == "out/two"
    assert config.load(argv=[]).out_dir == "out/default"
    assert config.load(argv=["--out-dir", "x"]).out_dir == "x"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_read_by_path_and_by_name(path):
    """`digits` means configs/digits.py; each file starts with a header that has its command."""
    cfg = config.load(argv=[str(path)])
    assert cfg.out_dir == f"out/{path.stem}"
    assert config.load(argv=[path.stem]) == cfg
    text = path.read_text()
    assert text.startswith('"""')
    assert re.search(rf"train_ddpd\.py (configs/{path.name}|{path.stem})\b", text)


def test_a_file_of_ones_own_goes_before_a_shipped_config():
    write("batch_size = 3", "digits")
    assert config.load(argv=["digits"]).batch_size == 3
    Path("digits").unlink()
    assert config.load(argv=["digits"]).batch_size == 64


def test_a_name_and_flags_of_a_config_are_the_command_line_of_train_ddpd():
    """`train_ddpd.py digits` starts with the values of configs/digits.py."""
    flags = ["--vocab", 17, "--grid", 8, 8, "--n-classes", 10, "--dry-run"]
    by_name = script("train_ddpd.py", "digits", *flags)
    assert by_name.returncode == 0, by_name.stderr
    by_path = script("train_ddpd.py", ROOT / "configs" / "digits.py", *flags)
    first_line = by_name.stdout.splitlines()[0]
    assert first_line == by_path.stdout.splitlines()[0]
    assert "8 x 8 tokens, V = 17, 10 classes" in first_line and "batch 64" in first_line


# What is explained


def test_list_prints_every_config_with_a_line():
    done = script("train_ddpd.py", "--list")
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert [name for name, _ in lines] == [path.stem for path in CONFIGS]
    for _, summary in lines:
        assert len(summary) > 20 and "train_ddpd.py" not in summary


def test_help_names_every_flag_and_answers_within_three_seconds():
    """Of the processor's time, since the machine may be busy."""
    before = os.times()
    said = script("train_ddpd.py", "--help").stdout
    after = os.times()
    assert sum(after[2:4]) - sum(before[2:4]) < 3       # user and system time of children
    assert "planner_lr" not in said
    for flag in FAMILY:
        assert flag + " " in said or flag + "," in said
    names = [field.name for field in fields(config.Config)]
    assert set(config.Config.FIXED) <= set(names)


def test_help_shows_the_groups():
    said = script("train_ddpd.py", "--help").stdout
    places = []
    for name, group in config.Config.GROUPS.items():
        places.append(said.index(f"─ {name} options ─"))
        assert one_line(group.__doc__) in one_line(said)
    assert list(config.Config.GROUPS) == "data network optimisation method logging run cost".split()
    assert places == sorted(places)


@pytest.mark.parametrize(
    "command", [*([name, "--help"] for name in SCRIPTS), ["train_ddpd.py", "--list"],
                ["data.py", "--list"]],
)
def test_a_reader_may_leave_before_the_end(command):
    """As `| head` does: no traceback."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as pipe:
        done = subprocess.run(
            [sys.executable, ROOT / command[0], command[1]], stdout=pipe, stderr=subprocess.PIPE
        )
    assert (done.returncode, done.stderr) == (0, b"")


def one_line(text):
    """Without the boxes that --help draws and the places where it breaks lines."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def comments_of(cls):
    """The comment beside each field of a dataclass, or above it.  -> {field: comment}"""
    source = inspect.getsource(cls)
    above = []
    comments = {}
    for line in source.splitlines():
        tokens = tokenize.generate_tokens(io.StringIO(line.strip()).readline)
        said = [token.string[2:] for token in tokens if token.type == tokenize.COMMENT]
        if line.strip().startswith("#"):
            above += said
            continue
        name = line.strip().split(":")[0]
        if name in cls.__annotations__:
            comments[name] = " ".join(said or above)
        above = []
    return comments


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_the_comment_of_every_field(name):
    """Each field has a comment, beside or above it; --help shows it beside its flag."""
    cls = SCRIPTS[name]
    groups = cls.GROUPS.values() if hasattr(cls, "GROUPS") else [cls]
    done = script(name, "--help")
    assert done.returncode == 0
    said = one_line(done.stdout)
    comments = {}
    for group in groups:
        comments |= comments_of(group)
    assert set(comments) == {field.name for field in fields(cls)}
    for field in fields(cls):
        comment = comments[field.name]
        assert len(comment) > 3, field.name
        assert comment in said, field.name
        if field.default is not MISSING:
            flag = "--" + field.name.replace("_", "-")
            assert re.search(rf"{flag}\b[^-].*?{re.escape(comment)}", said), field.name


# What is refused


@pytest.mark.parametrize(
    "text, said",
    [
        ("batch_sise = 8", "line 1: unknown key batch_sise; did you mean batch_size?"),
        ("seed = 1\nbatch_size = 'many'", "line 2: batch_size is 'many', not int"),
        ("nets = 'three'", "not one of pair, trunk, denoiser, single"),
        ("compile = 1", "not bool"),
        ("seed = 1.5", "not int"),
        ("import os", "assignments only"),
        ("seed = __import__('os').getpid()", "a value or arithmetic"),
        ("seed = 1 / 0", "division by zero"),
        ("seed = sed", "sed"),
        ("seed = (", "mine.py"),
        ("seed, n_head = 1, 2", "only"),
        ("max_iters = 0", "max_iters is 0"),
        ("label_dropout = 2.0", "label_dropout is 2.0"),
        ("planner_lr = -1", "planner_lr"),
        ("nets = 'single'", "denoiser_process"),
    ],
)
def test_a_config_file_is_refused_by_line_key_and_value(text, said):
    assert said in load_refusal(write(text))


def test_a_config_that_does_not_exist_is_refused():
    assert "nothing.py" in load_refusal("nothing.py")
    assert "nothing" in load_refusal("nothing")


def test_missing_arguments_are_a_line_of_usage():
    """Wherever flags stand; what follows a flag is no argument."""
    for flags, argv, words in [
        (export.Flags, ["out/x"], "RUN FOLDER"),
        (export.Flags, ["out/x", "--license", "mit"], "RUN FOLDER"),
        (sample.Flags, ["--labels", "1", "2"], "RUN"),
        (sample.Flags, ["--png", "--n-steps=4"], "RUN"),
    ]:
        usage = f" {words}, then flags: see --help"
        assert refusal(config.load, flags, argv).endswith(usage)
    assert config.load(sample.Flags, ["--n-steps", "4", "--png", "out/x"]).run == "out/x"


def test_typos_in_flags_name_the_nearest():
    nearest = "unknown flag --bath-size; did you mean --batch-size?"
    assert load_refusal("--bath-size", 3) == nearest
    renamed = "--n-samples is now called --n"
    assert refusal(config.load, evaluate.Flags, ["out/x", "--n-samples", "5"]) == renamed
    nearest = "unknown flag --planner-lrr; did you mean --planner-lr?"
    assert load_refusal("--planner_lrr=3") == nearest


@pytest.mark.parametrize(
    "argv",
    [
        ["train_ddpd.py", "--bath-size", "3"],
        ["train_ddpd.py", "--batch-size", "many"],
        ["train_ddpd.py", "--nets", "three"],
        ["sample.py", "out/x", "--lables", "3"],
        ["sample.py", "out/x", "--schedule", "never"],
        ["evaluate.py", "--n-step=3"],
    ],
    ids=" ".join,
)
def test_bad_flags_are_refused_without_a_traceback(argv):
    done = script(*argv)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr


def test_a_prompt_may_be_long_and_have_lines():
    """Other texts may not."""
    prompt = "ROMEO:\n" * 1000
    assert config.load(sample.Flags, ["out/x", "--prompt", prompt]).prompt == prompt
    assert "without control characters" in load_refusal("out/x\n", cls=sample.Flags)


def bounded_fields():
    """(options class, field, value outside) for all bounds of all options."""
    cases = []
    for cls in (config.Config, sample.Flags, evaluate.Flags):
        for name, kind in typing.get_type_hints(cls, include_extras=True).items():
            for bound in getattr(kind, "__metadata__", ()):
                if bound == PROSE:
                    continue
                step = 1 if typing.get_args(kind)[0] is int else 0.001
                cases.append((cls, name, bound.low - step))
                if bound.high < math.inf:
                    cases.append((cls, name, bound.high + step))
    return cases


REQUIRED = {config.Config: [], sample.Flags: ["out/x"], evaluate.Flags: ["out/x"]}


@pytest.mark.parametrize("cls, name, value", bounded_fields())
def test_a_value_outside_of_its_bound_is_refused_by_name(cls, name, value):
    flag = "--" + name.replace("_", "-")
    said = load_refusal(*REQUIRED[cls], f"{flag}={value}", cls=cls)
    assert said.startswith(f"{name} is {value}; it must ")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_numbers_must_be_finite(value):
    assert "planner_lr is" in load_refusal("--planner-lr", value)
    assert "it must be a finite number" in load_refusal("--p-uniform", value)


def test_weights_that_learn_nothing_are_refused():
    """Every rollout begins at level 1, where dynamic and clipped weights are 0."""
    for weight in ("dynamic", "clip"):
        message = load_refusal("--method", "forcing", "--weight", weight)
        assert f"weight = {weight} learns nothing at level 1" in message


def test_bounds_are_inclusive():
    """The least and the largest value of every field of Config pass; all kinds of bounds occur."""
    kinds = set()
    for name, kind in typing.get_type_hints(config.Config, include_extras=True).items():
        for bound in getattr(kind, "__metadata__", ()):
            kinds.add(bound)
            check_bounds(replace(config.Config(), **{name: bound.low}))
            if bound.high < math.inf:
                check_bounds(replace(config.Config(), **{name: bound.high}))
    both = [(0, 1), (0, 2**32 - 1), (1, 10_000)]
    assert kinds == {Bound(0), Bound(1), *(Bound(*ends) for ends in both)}


@pytest.mark.parametrize(
    "flag, value",
    [("p-uniform", 1), ("p-uniform", -0.1), ("clean-token-rate", 0), ("clean-token-rate", 1.1)],
)
def test_half_open_intervals_are_refused_by_name(flag, value):
    assert load_refusal(f"--{flag}={value}").startswith(flag.replace("-", "_"))


@pytest.mark.parametrize(
    "flags",
    [["--vocab", 17], ["--grid", 8, 8], ["--n-classes", 10], ["--vocab", 17, "--grid", 8, 0]],
)
def test_data_is_stated_as_a_whole(flags):
    assert "stated together" in load_refusal(*flags)
