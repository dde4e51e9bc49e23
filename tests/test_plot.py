"""Curves of log.jsonl, the page about a run, and what evaluate.py shows of its rows."""

import base64
import contextlib
import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import refusal, script
from PIL import Image

import evaluate
import plot
from support import comparison, curves, figures, logs, report

START = dict(it=0, start=True, floors={"denoiser_start": 2.8}, config={"denoiser_lr": 0.002})
HOSTILE = '<script>alert("x")</script>&"\''


def write_log(name, *lines, tail=""):
    """-> folder of a run with this log.jsonl"""
    folder = Path("out", name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return folder


def training_line(it, **more):
    return dict(it=it, denoiser_loss=3 - it / 100, lr_factor=1.0, tokens_per_s=2e4) | more


def validation_line(it, bins=(2.0, None, 1.5)):
    scores = dict(val_denoiser_ce=1.7, val_denoiser_ce_bins=bins, val_denoiser_accuracy=0.5)
    bits = dict(val_bits_masked=2.5, val_bits_masked_se=0.1)
    return dict(it=it, **scores, **bits, val_s=1.0, val_sequences=8)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    saved = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path, **_: saved.append(figure))
    return saved


# Reading a log


def test_what_is_trained_again_after_a_resume_counts():
    """A run that was killed at iteration 50 and went on from 20, with fewer lines than before."""
    first = [training_line(it) for it in (10, 20, 30, 40, 50)]
    again = [dict(it=20, start=True), dict(it=40, denoiser_loss=9.0)]
    folder = write_log("resumed", START, *first, *again, tail='{"it": 60, "denoi')
    its, losses = curves.read_curves(folder).series("denoiser_loss")
    assert its.tolist() == [10, 20, 40]
    assert losses.tolist() == [2.9, 2.8, 9.0]


def test_a_repeated_line_counts_once():
    folder = write_log("repeated", training_line(10), training_line(10, denoiser_loss=7.0))
    its, losses = curves.read_curves(folder).series("denoiser_loss")
    assert (its.tolist(), losses.tolist()) == ([10], [7.0])


@pytest.mark.parametrize("lines, tail, said", [
    ([], "", "has no losses yet"),
    ([START], '{"it": 10, "denoiser_loss": 1.0}', "has no losses yet"),     # torn: no line end
    ([training_line(10)], "half\n", "line 2 is no line of a training log"),
    ([training_line(10), [1, 2]], "", "line 2 is no line of a training log"),
])
def test_logs_without_curves_are_refused(lines, tail, said):
    folder = write_log("refused", *lines, tail=tail)
    assert said in refusal(curves.read_curves, folder)


def test_folders_without_a_log_are_refused():
    Path("out/nothing").mkdir(parents=True, exist_ok=True)
    assert "it has no log.jsonl" in refusal(curves.read_curves, "out/nothing")
    assert "there is no such folder" in refusal(curves.read_curves, "out/none")


# Panels


def test_panels_show_what_a_log_has():
    """The loss beside its floor, the learning rate in full, an empty bin as a gap."""
    log = [START, training_line(10), training_line(20, denoiser_grad_norm=0.5), validation_line(20)]
    run = curves.read_curves(write_log("whole", *log))
    panels = {panel.title: panel for panel in curves.panels_of([run])}
    assert list(panels) == [
        "denoiser: loss", "denoiser: accuracy in validation", "denoiser: loss by noise level",
        "bits per token", "gradient norm before clipping", "learning rate", "speed",
    ]
    loss = panels["denoiser: loss"]
    assert loss.y_label == "CE, nats"
    assert [line.kind for line in loss.lines] == ["training", "validation"]
    assert loss.levels == [curves.Level("ln V, at the start", 2.8, None)]
    assert panels["learning rate"].lines[0].y.tolist() == [0.002, 0.002]
    [levels] = panels["denoiser: loss by noise level"].lines
    assert levels.x == pytest.approx([1 / 6, 1 / 2, 5 / 6])
    assert np.isnan(levels.y).tolist() == [False, True, False]
    assert panels["bits per token"].lines[0].error.tolist() == [0.1]


def test_floors_of_runs_that_differ_are_told_apart():
    assert curves.levels_of("floor", [0.5, None, 0.5]) == [curves.Level("floor", 0.5, None)]
    assert [level.run for level in curves.levels_of("floor", [0.5, None, 0.4])] == [0, 2]
    assert curves.levels_of("floor", [None]) == []


def test_a_running_mean_keeps_the_ends():
    assert curves.running_mean(np.full(9, 2.0), 4) == pytest.approx(np.full(9, 2.0))
    assert curves.running_mean(np.arange(5.0), 3)[1:-1] == pytest.approx([1, 2, 3])


def test_runs_of_different_methods_share_a_figure(drawn):
    """No panel is empty or lacks a label, and ticks are plain numbers."""
    single = write_log("single", START, training_line(10), training_line(5000), validation_line(10))
    planner = dict(planner_loss=0.4, planner_grad_norm=0.001)
    pair = write_log("pair", START, training_line(10, **planner), training_line(20, **planner))
    curves.draw([curves.read_curves(folder) for folder in (single, pair)], "x.png")
    [figure] = drawn
    figure.canvas.draw()
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["single", "pair"]
    for panel in figure.axes:
        assert panel.get_lines(), panel.get_ylabel()
        assert panel.get_xlabel() and panel.get_ylabel()
        labels = [*panel.get_xticklabels(), *panel.get_yticklabels()]
        assert not any("e" in label.get_text() or "$" in label.get_text() for label in labels)


def test_losses_of_other_units_have_panels_of_their_own():
    """Cross-entropy, GIDD's weighted loss and that of another weight; runs of one unit share."""
    gidd = START | dict(floors={}, config=dict(method="gidd", weight=""))
    elbo = START | dict(floors={}, config=dict(method="gidd", weight="elbo"))
    weighted = dict(it=20, val_denoiser_loss=0.1, val_denoiser_loss_bins=[0.1, 0.2])
    runs = [
        curves.read_curves(write_log(name, start, training_line(10), validation))
        for name, start, validation in [
            ("ce_1", START, validation_line(20)), ("gidd", gidd, weighted),
            ("ce_2", START, validation_line(20)), ("elbo", elbo, weighted),
        ]
    ]
    for title in ("denoiser: loss", "denoiser: loss by noise level"):
        panels = [panel for panel in curves.panels_of(runs) if panel.title == title]
        assert [(panel.y_label, {line.run for line in panel.lines}) for panel in panels] == [
            ("CE, nats", {0, 2}), ("loss, nats, weight dynamic", {1}),
            ("loss, nats, weight elbo", {3}),
        ]
    levels = [panel.levels for panel in curves.panels_of(runs) if panel.title == "denoiser: loss"]
    assert [len(of_panel) for of_panel in levels] == [1, 0, 0]


def test_the_unit_of_a_run_without_validation_is_that_of_its_method():
    gidd = START | dict(config=dict(method="gidd"))
    run = curves.read_curves(write_log("early", gidd, training_line(10)))
    assert curves.unit_of(run, "denoiser").end == "loss"
    run = curves.read_curves(write_log("early", START, training_line(10, planner_loss=0.4)))
    assert [curves.unit_of(run, name).end for name in run.networks()] == ["bce", "ce"]


def test_equal_learning_rates_are_one_line():
    """Named after the runs that share it; others stay as they are."""
    def lr_lines(*rates):
        runs = []
        for i, rate in enumerate(rates):
            start = START | dict(config=dict(denoiser_lr=rate))
            lines = training_line(10), training_line(20, lr_factor=0.5)
            runs.append(curves.read_curves(write_log(f"lr_{i}", start, *lines)))
        lines = curves.lr_panel(runs, ["denoiser"]).lines
        return [(line.run, line.kind) for line in lines]

    assert lr_lines(1, 2) == [(0, "denoiser"), (1, "denoiser")]
    assert lr_lines(1, 2, 1) == [(None, "denoiser of lr_0, lr_2"), (1, "denoiser")]
    assert lr_lines(1, 1, 1, 1) == [(None, "denoiser of 4 runs")]


def test_one_point_has_one_tick(drawn):
    """Of a log with one line and one validation, and of a table with one row."""
    log = [START | dict(floors={}), training_line(300), validation_line(300)]
    curves.draw([curves.read_curves(write_log("point", *log))], "x.png")
    row = dict(run="a", sampler="ddpd", steps=8, nfe=15.9, s_per_sample=0.0137, frechet=0.2713,
               settings=json.dumps(dict(nfe=16)))
    comparison.plot([row], {}, "x.png")
    single, table = drawn
    for axis in single.axes:
        if axis.get_xlabel() == "iterations":
            assert [tick.get_text() for tick in axis.get_xticklabels()] == ["300"]
        for line in axis.get_lines():
            assert len(line.get_xdata()) > 1 or line.get_marker() != "None"
    accuracy = [axis for axis in single.axes if axis.get_ylabel() == "accuracy"]
    assert [tick.get_text() for tick in accuracy[0].get_yticklabels()] == ["0.5"]
    ticks = [[tick.get_text() for tick in axis.get_xticklabels()] for axis in table.axes]
    assert ticks == [["16"], ["0.0137"]]
    assert [tick.get_text() for tick in table.axes[0].get_yticklabels()] == ["0.2713"]


@pytest.mark.parametrize("value, text", [
    (0.0002, "0.0002"), (2e-7, "0.0000002"), (0.1 + 0.2, "0.3"), (5, "5"), (5000, "5000"),
    (25_000, "25,000"), (1.5e6, "1,500,000"), (0, "0"), (-0.5, "-0.5"),
])
def test_numbers_are_plain(value, text):
    assert figures.plain_number(value) == text


# The page about a run


class Page(HTMLParser):
    """Tags that are open, attributes, and text outside of <style>."""

    VOID = ("meta", "img", "source")

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.tags = []
        self.sources = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """That of a run whose files hold what must not be read as HTML."""
    start = START | dict(config={"data": HOSTILE, "max_iters": 20})
    with contextlib.chdir(tmp_path_factory.mktemp("page")):
        folder = write_log("page", start, training_line(10, epochs=1.5), validation_line(20))
        Image.new("RGB", (4, 4)).save(folder / "samples.png")
        samples = folder / "samples" / "ddpd_64_seed0"
        samples.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(samples / "samples.png")
        (samples / "planner.mp4").write_bytes(b"video")
        logs.append_rows(folder / "evaluate.csv", dict(run="x", sampler=HOSTILE, frechet=3.25))
        run = curves.read_curves(folder)._replace(name=HOSTILE)
        return report.write_report(folder, run).read_text()


def test_a_page_is_one_file_without_scripts(page):
    """Well-formed; every picture is inside it, in a version for light and for dark."""
    parsed = Page(page)
    assert parsed.open == []
    assert "script" not in parsed.tags
    assert parsed.sources and all(source.startswith("data:") for source in parsed.sources)
    assert "url(" not in page and "@import" not in page
    assert parsed.tags.count("picture") == parsed.tags.count("source") > 4
    pictures = [source for source in parsed.sources if source.startswith("data:image/svg")]
    assert all(b"</svg>" in base64.b64decode(source.split(",")[1]) for source in pictures)
    assert f"data:video/mp4;base64,{base64.b64encode(b'video').decode()}" in parsed.sources
    assert '<meta name="viewport"' in page


def test_a_page_shows_what_files_say_as_text(page):
    """The name, the table, the config and the last iteration."""
    text = Page(page).text
    assert text.count(HOSTILE) == 3                 # title, heading, sampler
    assert json.dumps(HOSTILE) in text              # config
    assert "3.25" in text
    assert "iteration 20 of 20, 1.5 epochs" in text


def test_the_script_draws_runs_and_pages():
    folders = [str(write_log(name, training_line(10))) for name in "ab"]
    plot.main(plot.Flags(runs=tuple(folders), html=True))
    assert Image.open("out/a/curves.png").width > 500
    assert Path("out/a/report.html").exists() and Path("out/b/report.html").exists()
    assert "pictures are .png" in refusal(plot.main, plot.Flags(runs=("out/a",), out="x.txt"))
    done = script("plot.py", "out/a", "out/none")
    assert done.returncode == 1
    assert done.stderr.strip() == "no run in out/none: there is no such folder"


# Rows of evaluate.csv


def row_of(nfe=8, seed=0, accuracy=0.5, run="out/a", sampler="ddpd", **options):
    settings = dict(it=5, nfe=nfe, seed=seed, n_samples=100, sampler=sampler, **options)
    return dict(
        run=run, sampler=sampler, steps=nfe // 2, nfe=float(nfe), s_per_sample=nfe / 100, n=100,
        seed=seed, judge_acc=accuracy, lo=accuracy - 0.1, hi=accuracy + 0.05, frechet=1 / nfe,
        settings=json.dumps(settings),
    )


def test_rows_of_the_same_settings_are_one_point():
    """Seeds are averaged; a row that was drawn again replaces the one before; n/a is no point."""
    not_fitting = dict(run="out/a", sampler="remdm", steps="n/a", nfe="n/a", judge_acc="n/a")
    rows = [row_of(accuracy=0.1), row_of(accuracy=0.5), row_of(seed=1, accuracy=0.7)]
    rows += [row_of(nfe=4), row_of(temperature=0.5), not_fitting]
    plain, sharpened = comparison.lines_of(rows).values()
    assert [point.nfe for point in plain] == [4, 8]
    assert plain[1].quality["judge_acc"] == pytest.approx(0.6)
    assert plain[1].interval == pytest.approx((0.5, 0.65))
    assert len(sharpened) == 1


def test_lines_are_named_by_what_differs():
    def labels(*rows):
        return comparison.labels_of(comparison.lines_of(rows))

    assert labels(row_of(), row_of(nfe=4)) == ["ddpd"]
    assert labels(row_of(guidance=2.0), row_of(guidance=2.0, sampler="remdm")) == ["ddpd", "remdm"]
    narrowed = row_of(guidance=2.0, top_p=0.9)
    assert labels(row_of(), narrowed) == ["ddpd", "ddpd, guidance 2, top_p 0.9"]
    assert labels(row_of(), row_of(run="out/b")) == ["a, ddpd", "b, ddpd"]


def test_the_plot_of_an_evaluation(drawn):
    """A panel for each quality that some row has, intervals as bars, held-out data as a line."""
    bare = {key: value for key, value in row_of(sampler="ancestral").items() if key != "frechet"}
    rows = [row_of(nfe) for nfe in (8, 16, 128)] + [bare]
    comparison.plot(rows, {"out/a": dict(judge_acc=0.9, n=3)}, "x.png")
    [figure] = drawn
    figure.canvas.draw()
    assert len(figure.axes) == 4
    accuracy, _, distance, _ = figure.axes
    labels = [label.get_text() for label in accuracy.get_xticklabels()]
    assert labels == ["8", "16", "128"]
    bars = accuracy.collections[0].get_segments()
    assert np.array(bars)[:, :, 1] == pytest.approx(np.array([[0.4, 0.55]] * 3))
    assert [0.9, 0.9] in [list(line.get_ydata()) for line in accuracy.get_lines()]
    assert not any([0.9, 0.9] == list(line.get_ydata()) for line in distance.get_lines())
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["ddpd", "ancestral", "held-out data"]


def test_nothing_is_drawn_of_rows_without_a_quality(drawn):
    comparison.plot([dict(run="a", sampler="remdm", nfe="n/a", judge_acc="n/a")], {}, "x.png")
    assert not drawn


def test_held_out_data_of_runs():
    """One line where all runs have the same data, else one with the name of each."""
    same = {"out/a": dict(frechet=0.5), "out/b": dict(frechet=0.5), "out/c": {}}
    assert comparison.levels_of(same, ["frechet"]) == {"held-out data": dict(frechet=0.5)}
    other = same | {"out/c": dict(frechet=math.e)}
    assert list(comparison.levels_of(other, ["frechet"])) == [
        "held-out data of a", "held-out data of c",
    ]


def test_the_table_is_aligned(capsys):
    """Numbers end where their headers do, also where a row lacks some."""
    table = comparison.Table()
    table.print(dict(sampler="held-out data", n=180, judge_acc=1.0, lo=0.98, hi=1.0, frechet=0.1))
    table.print(row_of(nfe=128), "  from evaluate.csv")
    header, held_out, row = capsys.readouterr().out.splitlines()
    for name, text in {"NFE": "128", "judge acc": "50.0%", "frechet": "0.008", "n": "100"}.items():
        end = header.index(f" {name} ") + len(name) + 1
        assert row[:end].endswith(f" {text}"), name
    assert held_out[:header.index(" judge acc") + 10].endswith(" 100.0%")
    assert row.endswith("  from evaluate.csv")


def test_bits_are_added_to_rows_that_lack_them():
    path = Path("bits.csv")
    path.unlink(missing_ok=True)
    logs.append_rows(path, dict(settings="a"), dict(settings="b"))
    evaluate.add_bits(path, "a", {"masked": (1.5, 0.1)})
    assert [row["bits_per_token"] for row in logs.read_rows(path)] == ["1.5", ""]
