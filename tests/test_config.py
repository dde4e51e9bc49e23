import time
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import script

import config

FAMILY = """
--batch-size --planner-lr --denoiser-lr --max-iters --weight-decay --warmup-iters --lr-decay-iters --grad-clip
--grad-accumulation-steps --log-interval --eval-interval --save-interval --wandb-project --wandb-entity
--wandb-name --seed --compile --out-dir --data --image-size --levels --n-layer --n-head --n-embd --base-width
--ema-decay --label-dropout --denoiser-process --nets --method --overfit
""".split()


def write(text, name="mine.py"):
    Path(name).write_text(text)
    return name


def refusal(*argv):
    with pytest.raises(SystemExit) as error:
        config.load(argv=[str(a) for a in argv])
    assert error.value.code not in (0, None) and "\n" not in str(error.value)
    return str(error.value)


def test_precedence():
    """defaults < files left to right < flags, and the last file names the run."""
    write('"""A header."""\nbatch_size = 8 * 16     # why\nseed = 3\nplanner_lr = 1', "one.py")
    write("seed = 4\nn_embd = 2 ** 7\nn_head = n_embd // 64", "two.py")
    cfg = config.load(argv=["one.py", "two.py", "--n-embd", "64"])
    assert (cfg.batch_size, cfg.seed, cfg.n_embd, cfg.n_head, cfg.planner_lr) == (128, 4, 64, 2, 1.0)
    assert cfg.n_layer == config.Config().n_layer and cfg.out_dir == "out/two"
    assert config.load(argv=[]).out_dir == "out/default" and config.load(argv=["--out-dir", "x"]).out_dir == "x"


@pytest.mark.parametrize(
    "text, said",
    [
        ("batch_sise = 8", "line 1: unknown key batch_sise; did you mean batch_size?"),
        ("seed = 1\nbatch_size = 'many'", "line 2: batch_size is 'many', not int"),
        ("nets = 'three'", "not one of pair, single"),
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
    assert said in refusal(write(text))


def test_typos_in_flags_name_the_nearest():
    assert refusal("--bath-size", 3) == "unknown flag --bath-size; did you mean --batch-size?"
    assert refusal("--planner_lrr=3") == "unknown flag --planner-lrr; did you mean --planner-lr?"
    assert "nothing.py" in refusal("nothing.py")
    for argv in (
        ["train_ddpd.py", "--bath-size", "3"],
        ["sample.py", "out/x", "--lables", "3"],
        ["evaluate.py", "--n-step=3"],
        ["train_ddpd.py", "--batch-size", "many"],
        ["train_ddpd.py", "--nets", "three"],
    ):
        done = script(*argv)
        assert done.returncode != 0 and "Traceback" not in done.stderr


def test_help_names_every_flag_and_answers_within_three_seconds():
    began = time.perf_counter()
    said = script("train_ddpd.py", "--help").stdout
    assert time.perf_counter() - began < 3 and "planner_lr" not in said
    for flag in FAMILY:
        assert flag + " " in said or flag + "," in said
    names = [f.name for f in fields(config.Config)]
    source = Path(config.__file__).read_text()
    for name in names:  # every field is explained
        line = next(row for row in source.splitlines() if row.strip().startswith(name + ":"))
        assert "# " in line, name
    assert set(config.Config.FIXED) <= set(names)


def test_shipped_configs_are_read():
    for path in sorted((Path(config.__file__).parent / "configs").glob("*.py")):
        cfg = config.load(argv=[str(path)])
        assert cfg.out_dir == f"out/{path.stem}"
        assert path.read_text().startswith('"""') and f"train_ddpd.py configs/{path.name}" in path.read_text()
