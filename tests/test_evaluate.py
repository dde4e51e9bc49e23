"""The tables of evaluate.py: which rows they have, how calls are counted, what is refused."""

import contextlib
import csv
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, script, tiny_config
from world import tiny_spec

import evaluate
import train_ddpd
from diffusion import samplers
from support import diagnostics, logs, sampling
from support.budgets import n_steps_of


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """That of this file, for fixtures that are made once."""
    folder = tmp_path_factory.getbasetemp() / "test_evaluate"
    folder.mkdir(exist_ok=True)
    with contextlib.chdir(folder):
        yield folder


def rows_of(run):
    with open(Path(run) / "evaluate.csv") as file:
        return list(csv.DictReader(file))


# Numbers


def test_calibration_error():
    """A planner that is right on average everywhere has none; one that is .3 too sure has .3."""
    rng = np.random.default_rng(0)
    p = rng.random(400_000)
    error, _ = diagnostics.calibration_error(p, rng.random(p.shape) < p)
    assert error < 0.01
    p = np.full(100_000, 0.8)
    error, _ = diagnostics.calibration_error(p, rng.random(p.shape) < 0.5)
    assert error == pytest.approx(0.3, abs=0.01)


def judged_stub(spec, n_frames=0):
    """A run as n_steps_of needs it."""
    return types.SimpleNamespace(
        spec=spec, n_frames=lambda flags: n_frames, n_unknown=lambda flags: spec.shape.n_tokens
    )


def flags_of(**values):
    return evaluate.Flags(runs=("x",), **values)


@pytest.mark.parametrize(
    "row, method, nfe, steps",
    [
        ("ddpd", "ddpd-mask", 9, 4),
        ("ddpd", "ddpd-single", 9, 9),
        ("p2", "ddpd-mask", 9, 4),
        ("confidence", "ddpd-mask", 8, 8),
        ("planned", "ddpd-trunk", 8, 8),
        ("ancestral", "ddpd-uniform", 3, 3),
        ("ancestral", "gidd", 3, 3),
    ],
)
def test_steps_for_a_number_of_calls(row, method, nfe, steps):
    """A planner's call counts: a step of a pair takes two calls, of a single network one."""
    assert n_steps_of(row, judged_stub(tiny_spec(method)), nfe, flags_of()) == steps


def test_a_batch_is_cut_by_the_logits_it_holds(monkeypatch):
    """Of the tokens that a step writes where the sampler asks for those alone, else of all."""
    monkeypatch.setattr(sampling, "MAX_LOGITS", 10 * 64 * 17)
    def limit(method, sampler, n_steps):
        spec = tiny_spec(method, grid=(8, 8), vocab=17)
        return sampling.batch_limit(spec, sampler, n_steps)
    assert limit("ddpd-mask", "confidence", 16) == 10
    assert limit("ddpd-single", "ddpd", 16) == 10
    assert limit("ddpd-mask", "ddpd", 16) == 40             # 4 sites, room for 16
    assert limit("ddpd-mask", "ddpd", 2) == 10
    assert limit("ddpd-mask", "ancestral", 32) == 80
    assert limit("ddpd-uniform", "ancestral", 32) == 10


@pytest.mark.parametrize("row, method, options", [
    ("ancestral", "ddpd-mask", dict(process="mask")), ("remdm", "ddpd-mask", {}),
    ("ancestral", "gidd", dict(process="hybrid", p_uniform=0.0)),       # masks only, on squares
])
@pytest.mark.parametrize("nfe", [4, 12])
def test_a_sampler_of_masks_makes_the_calls_that_it_may(row, method, options, nfe, rng):
    """Steps in which nothing is uncovered cost nothing, so there are more of them than calls."""
    flags = dict(p_uniform=0.0) if method == "gidd" else {}
    judged = judged_stub(tiny_spec(method, **flags))                    # 16 tokens
    n_steps = n_steps_of(row, judged, nfe, flags_of())
    assert n_steps > nfe or nfe == 4

    def denoiser(x, t, label, sites):
        return torch.zeros(*sites.shape, 7)

    x = torch.full((500, 16), 7)
    label = torch.zeros(500).long()
    options = options | dict(n_steps=n_steps, generator=rng, vocab=7)
    states = getattr(samplers, row)(denoiser, x, label, **options)
    assert samplers.last(states).nfe.double().mean().item() == pytest.approx(nfe, abs=0.7)


def test_rollouts_of_masks_pay_for_every_step():
    judged = judged_stub(tiny_spec("forcing", process="mask", noise_granularity="token"))
    for row in ("rollout", "ancestral"):
        assert n_steps_of(row, judged, 12, flags_of()) == 12


def test_guidance_takes_more_calls():
    """Guidance of the denoiser takes one more call in a step, guidance of the planner another."""
    judged = judged_stub(tiny_spec("ddpd-mask"))
    guided = flags_of(guidance=2.0)
    assert n_steps_of("ddpd", judged, 9, guided) == 3
    assert n_steps_of("p2", judged, 9, guided) == 3
    assert n_steps_of("confidence", judged, 9, guided) == 4
    both = flags_of(guidance=2.0, planner_guidance=2.0)
    assert n_steps_of("ddpd", judged, 9, both) == 2
    assert n_steps_of("p2", judged, 9, both) == 3      # its planner is not guided


def test_too_few_calls_are_refused():
    judged = judged_stub(tiny_spec("ddpd-uniform"))
    with pytest.raises(SystemExit, match="--nfe 1 is too small for ddpd"):
        n_steps_of("ddpd", judged, 1, flags_of())


@pytest.mark.parametrize(
    "row, lag, steps",
    [("rollout", -1, 4), ("rollout", None, 4), ("rollout", 0, 24), ("ancestral", -1, 24)],
)
def test_calls_for_a_video_are_counted_per_frame_that_is_made(row, lag, steps):
    """8 frames of which 2 are given, 4 calls for each of the other 6: one by one, or all of them
    together."""
    judged = judged_stub(tiny_spec("forcing", grid=(8, 2, 2)), n_frames=8)
    assert n_steps_of(row, judged, 4, flags_of(lag=lag)) == steps


# Tables


@pytest.fixture(scope="module")
def runs(folder):
    """Two runs of two iterations: a pair of networks, and a single one."""
    single = ["--nets", "single", "--denoiser-process", "uniform"]
    for name, flags in [("a", []), ("b", single)]:
        train_ddpd.main(tiny_config(name, "--max-iters", 2, *flags))
    return "out/a", "out/b"


def test_one_table_over_runs(runs):
    """Rows for what fits, "n/a" for what does not; nfe is what was called; the plots are there."""
    samplers = ["--samplers", "ddpd", "ancestral", "remdm"]
    size = ["--nfe", 2, 4, "--n", 20, "--batch-size", 7]
    done = script("evaluate.py", *runs, *samplers, *size, "--planner")
    assert done.returncode == 0, done.stderr
    assert "remdm: n/a for a ddpd-single run" in done.stdout
    assert "in use: AUROC" in done.stdout

    pair, single = (rows_of(run) for run in runs)
    assert [(row["sampler"], row["steps"]) for row in pair] == [
        ("ddpd", "1"),
        ("ddpd", "2"),
        ("ancestral", "2"),
        ("ancestral", "4"),
        ("remdm", "2"),
        ("remdm", "4"),
    ]
    assert [(row["sampler"], row["steps"]) for row in single] == [
        ("ddpd", "2"),
        ("ddpd", "4"),
        ("ancestral", "2"),
        ("ancestral", "4"),
        ("remdm", "n/a"),
    ]
    columns = """
        run sampler steps nfe s_per_sample n seed judge_acc lo hi worst_class frechet precision
        recall entropy duplicates bits_per_token device
    """.split()
    for row in pair + single[:-1]:
        is_two_calls = row["sampler"] == "ddpd" and row["run"] == "out/a"
        nfe = float(row["steps"]) * (2 if is_two_calls else 1)
        assert float(row["nfe"]) == pytest.approx(nfe, abs=1)
        assert all(row[column] != "" for column in columns)
    files = "out/a/evaluate.png (a plot of all runs), out/a/reliability.png, out/a/neighbours_"
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"rows: out/a/evaluate.csv, out/b/evaluate.csv; wrote {files}")
    assert "out/b/neighbours_ancestral_4.png" in last
    assert Path("out/a/evaluate.png").stat().st_size > 1000
    assert Path("out/b/reliability.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--samplers", "confidence"], "sampler confidence does not fit a ddpd-single run"),
        (["--samplers", "magic"], "--samplers magic is not one of ddpd"),
        (["--nfe", "0"], "must be at least 1"),
        (["--top-p", "1.5"], "top_p is 1.5; it must be in (0, 1]"),
        (["--guidance", "2", "--nfe", "1"], "--nfe 1 is too small"),
        (["--eta", "0.2"], "--eta is no option of ddpd"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(runs, flags, said):
    done = script("evaluate.py", "out/b", "--n", 4, *flags)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_correction_has_a_row_of_its_own(folder):
    """A gidd run, before and after self-correction: calls of both stages are counted."""
    gidd = ["--method", "gidd", "--p-uniform", 0.2]
    train_ddpd.main(tiny_config("g", "--max-iters", 2, *gidd))
    last_batch_of_one = ["--n", 20, "--batch-size", 19]
    done = script("evaluate.py", "out/g", "--nfe", 3, "--correct", 2, "--k", 2, *last_batch_of_one)
    assert done.returncode == 0, done.stderr
    rows = [(row["sampler"], row["nfe"]) for row in rows_of("out/g")]
    assert rows == [("ancestral", "3.0"), ("ancestral+correct", "5.0")]


def test_a_misfit_has_one_row(tmp_path, capsys):
    """However often the same samplers are asked for."""
    run = types.SimpleNamespace(folder=tmp_path)
    judged = types.SimpleNamespace(run=run, spec=tiny_spec("ddpd-single"))
    for name in ("remdm", "remdm", "confidence"):
        evaluate.write_misfit(judged, name)
    samplers = [row["sampler"] for row in rows_of(tmp_path)]
    assert samplers == ["remdm", "confidence"]
    assert capsys.readouterr().out.count("remdm: n/a") == 2


def test_the_last_line_says_what_was_written():
    """The plot of one run, and none where no row has a quality."""
    folder = Path("out/x")
    plot = folder / "evaluate.png"
    rows = "rows: out/x/evaluate.csv"
    assert evaluate.summary([folder], [], None) == rows
    assert evaluate.summary([folder], [], plot) == f"{rows}; wrote out/x/evaluate.png"


def test_labels_belong_to_the_known_tokens():
    """Samples that go on from held-out sequences are asked for those sequences' classes."""
    judged = object.__new__(evaluate.Judged)
    judged.spec = tiny_spec("ddpd-mask", grid=(1, 4))
    real = np.arange(8).reshape(2, 4) % 7

    class TwoSequences(list):
        def spread_subset(self, n):
            return real[:n], np.array([2, 1])[:n]

    judged.splits = {"val": TwoSequences([0, 1])}
    flags = evaluate.Flags(runs=("x",), n=5)
    assert judged.held_out(flags).labels.tolist() == [0, 1, 2, 0, 1]    # nothing known: in turn
    judged.spec = judged.spec._replace(meta=judged.spec.meta | dict(given=[0]))
    held_out = judged.held_out(flags)
    assert held_out.labels.tolist() == [2, 1]
    assert (held_out.known == (real == 0)).all()


def test_finished_rows_are_not_drawn_again(runs):
    """The same command reads them from evaluate.csv, other settings or --again draw anew."""
    command = ["evaluate.py", "out/a", "--nfe", 2, "--n", 6, "--seeds", 5]

    def n_rows():
        return len([row for row in rows_of("out/a") if row["seed"] == "5"])

    def has_bits():
        return all(row["bits_per_token"] for row in rows_of("out/a") if row["seed"] == "5")

    for more, n_expected, is_read in [
        (["--no-bits"], 1, False), ([], 1, True), (["--top-p", 0.9, "--no-bits"], 2, False),
        (["--again", "--no-bits"], 3, False), (["--no-bits"], 3, True),
    ]:
        done = script(*command, *more)
        assert done.returncode == 0, done.stderr
        assert n_rows() == n_expected
        assert ("from evaluate.csv" in done.stdout) == is_read
        assert Path("out/a/evaluate.png").exists()
        assert ("bits per token left out" in done.stdout) == ("--no-bits" in more)
        assert has_bits() == (more == [])               # filled in where they were left out


def test_ctrl_c_keeps_what_is_finished(runs):
    """No traceback, and a word on how to go on; the same command reads the finished rows."""
    many = [str(nfe) for nfe in range(2, 400)]
    command = [sys.executable, ROOT / "evaluate.py", "out/b", "--n", "4", "--seeds", "77"]
    process = subprocess.Popen(
        [*command, "--nfe", *many], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )

    def finished():
        rows = logs.read_rows("out/b/evaluate.csv")
        return [row for row in rows if row["seed"] == "77"]

    while len(finished()) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 128 + signal.SIGINT
    assert said.strip().splitlines()[-1].endswith("the same command continues")
    assert "Traceback" not in said
    n_finished = len(finished())
    assert 2 <= n_finished < len(many)
    again = subprocess.run([*command, "--nfe", *many[:2]], capture_output=True, text=True)
    assert again.stdout.count("from evaluate.csv") == 2
    assert len(finished()) == n_finished


def test_a_run_of_another_method_has_no_correction(runs):
    shape = ["--nfe", 4, "--n", 4, "--seeds", 9]
    done = script("evaluate.py", "out/a", *shape, "--correct", 2)
    assert done.returncode == 1
    assert "--correct means nothing for a ddpd-mask run" in done.stderr
    assert not [row for row in rows_of("out/a") if row["seed"] == "9"]


def test_guidance_of_0_is_recorded_as_such(runs):
    """Unlabelled samples, which are not those of guidance 1."""
    judged = evaluate.Judged("out/a", torch.device("cpu"))
    for guidance, recorded in ((None, 1.0), (0.0, 0.0), (2.0, 2.0)):
        [row] = evaluate.evaluate(
            judged, "ancestral", 4, 0, flags_of(n=4, guidance=guidance), None
        )
        assert row["guidance"] == recorded


def test_images_for_outside_suites(runs):
    """--decoder writes uint8 (n, H, W, 3) under arr_0."""

    class Grey(torch.nn.Module):
        def forward(self, tokens):
            return (tokens / 8.0 - 1)[:, None].expand(-1, 3, -1, -1).clone()

    torch.jit.script(Grey()).save("grey.jit")
    size = ["--nfe", 2, "--n", 5, "--batch-size", 2]
    done = script("evaluate.py", "out/a", *size, "--decoder", "grey.jit")
    assert done.returncode == 0, done.stderr
    images = np.load("out/a/ddpd_2_seed0_guidance1.npz")["arr_0"]
    assert images.shape == (5, 8, 8, 3)
    assert images.dtype == np.uint8
