"""notebook.ipynb: its code runs from top to bottom, cut to two iterations."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT
from PIL import Image

CELLS = json.loads((ROOT / "notebook.ipynb").read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


@pytest.fixture
def shown(monkeypatch):
    """What the cells display: names of pictures, and texts. Stands in for IPython's display."""
    display = ModuleType("IPython.display")
    shown = []
    display.Image = lambda filename: filename
    display.Markdown = str
    display.display = shown.append
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return shown


def test_the_notebook_runs(shown):
    """The settings at its top reach every cell; pictures and table are there."""
    source = "\n".join(CODE)
    for name, value in (("MAX_ITERS", 2), ("N_SAMPLES", 10)):
        source, n = re.subn(rf"^{name} = \d+", f"{name} = {value}", source, flags=re.MULTILINE)
        assert n == 1
    names = {}
    exec(source, names)
    pictures = [what for what in shown if what.startswith("out/notebook/")]
    assert [Path(path).name for path in pictures] == [
        "planner.gif", "inpainted.png", "evaluate.png"
    ]
    for path in pictures:
        assert Image.open(path).width > 100
    assert names["run"].it == 2
    assert (names["filled_in"] == names["tokens"])[names["known"]].all()
    assert not (names["filled_in"] == names["tokens"]).all()
    table = next(what for what in shown if what.startswith("| sampler"))
    assert len(table.splitlines()) == 2 + 6
    assert table.count("| ddpd |") == table.count("| ancestral |") == 3


def test_nothing_is_installed_unasked():
    assert all(line.startswith("#") for line in CODE[0].splitlines())
    assert "pip install" in CODE[0]


def test_outputs_are_cleared():
    for cell in CELLS:
        assert not cell.get("outputs") and cell.get("execution_count") is None
