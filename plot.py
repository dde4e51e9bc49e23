"""Training curves of one run, or of several beside each other.

python plot.py out/digits out/digits_single
python plot.py out/digits --html
"""

import typing
from dataclasses import dataclass

import config


@dataclass(frozen=True)
class PlotOptions:
    """What is drawn."""
    runs: tuple[str, ...]                   # folders of runs
    out: str = ""                           # picture; "": curves.png in the first run's folder
    html: bool = False                      # write a page about each run, too: RUN/report.html


@dataclass(frozen=True)
class Flags(PlotOptions):
    """Losses, bits per token, gradient norms and speed, as log.jsonl has them."""

    GROUPS: typing.ClassVar = {"plot": PlotOptions}


if __name__ == "__main__":
    flags = config.load(Flags)

from pathlib import Path

from support import curves, report, runtime


def main(flags: Flags) -> None:
    if not flags.runs:
        raise SystemExit("name at least one run")
    runs = [curves.read_curves(folder) for folder in flags.runs]
    path = Path(flags.out or Path(flags.runs[0]) / "curves.png")
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise SystemExit(f"--out {path}: pictures are .png, .pdf or .svg")
    curves.draw(runs, path)
    print(f"wrote {path}")
    if flags.html:
        for folder, run in zip(flags.runs, runs, strict=True):
            print(f"wrote {report.write_report(folder, run)}")


if __name__ == "__main__":
    with runtime.one_voice():
        main(flags)
