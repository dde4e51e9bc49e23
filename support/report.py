"""A page about a run, RUN/report.html: one file that needs no server, no network and no scripts.

All that comes from files is escaped; pictures and videos are data URIs.
"""

import base64
import html
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from support import curves, figures, logs

MEDIA_TYPES = {".png": "image/png", ".gif": "image/gif", ".mp4": "video/mp4"}
# What training and evaluate.py write: title, stem of the file
PICTURES = {
    "Samples in training": "samples", "Evaluation": "evaluate",
    "Planner's calibration": "reliability",
}
N_SAMPLES = 4           # folders of sample.py that are shown, the newest ones
VIDEOS = {"Sampling": "planner", "Rollout": "rollout", "Self-correction": "correct"}
THEMES = {"light": "default", "dark": "dark_background"}

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
{sections}
</body>
</html>
"""
STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --line: #ddd; --head: #f4f4f4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #121212; --line: #333; --head: #1e1e1e; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; }
h1, p, td { overflow-wrap: anywhere; }
.panels { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
img, video { display: block; max-width: 100%; height: auto; }
.panels img { width: 100%; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; }
th, td { padding: 0.2rem 0.6rem; border-bottom: 1px solid var(--line); text-align: left; }
.wide td { white-space: nowrap; overflow-wrap: normal; font-variant-numeric: tabular-nums; }
th { background: var(--head); }
"""


def write_report(folder: str | Path, run: curves.Curves) -> Path:
    """-> RUN/report.html"""
    folder = Path(folder)
    sections = [section("Curves", curves_of(run))]
    for title, stem in PICTURES.items():
        sections.append(section(title, picture(folder / f"{stem}.png")))
    for samples in sampled_folders(folder):
        sections.append(section(f"Samples {samples.name}", picture(samples / "samples.png")))
        for title, stem in VIDEOS.items():
            sections.append(section(f"{title} {samples.name}", video(samples, stem)))
    sections.append(section("Table of evaluate.py", rows_table(folder / "evaluate.csv")))
    sections.append(section("Config", config_table(run.config)))
    page = PAGE.format(
        title=html.escape(run.name), style=STYLE, summary=html.escape(summary(run)),
        sections="\n".join(part for part in sections if part),
    )
    path = folder / "report.html"
    path.write_text(page)
    return path


def sampled_folders(folder: Path) -> list[Path]:
    """What sample.py wrote last, the newest first."""
    pictures = list(folder.glob("samples/*/samples.png"))
    pictures.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return [path.parent for path in pictures[:N_SAMPLES]]


def summary(run: curves.Curves) -> str:
    """The last numbers of a run in words."""
    last_it = max(max(by_it) for by_it in run.values.values())
    total = run.config.get("max_iters")
    words = [f"iteration {last_it:,}" + (f" of {total:,}" if total else "")]
    for name, unit in {"epochs": "epochs", "peak_mib": "MiB at most"}.items():
        values = run.series(name)[1]
        if len(values):
            words.append(f"{values[-1]:,.1f} {unit}")
    return ", ".join(words)


def section(title: str, content: str) -> str:
    """"" where there is nothing to show."""
    return f"<h2>{html.escape(title)}</h2>\n{content}" if content else ""


# Pictures


def data_uri(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def file_uri(path: Path) -> str:
    return data_uri(path.read_bytes(), MEDIA_TYPES[path.suffix])


def curves_of(run: curves.Curves) -> str:
    """A picture of each panel, in a light and a dark version."""
    pictures = []
    for panel in curves.panels_of([run]):
        dark, light = (data_uri(panel_svg(panel, theme), "image/svg+xml")
                       for theme in ("dark", "light"))
        pictures.append(
            f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
            f'<img src="{light}" alt="{html.escape(panel.title)}"></picture>'
        )
    return f'<div class="panels">{"".join(pictures)}</div>'


def panel_svg(panel: curves.Panel, theme: str) -> bytes:
    """One panel on a transparent ground."""
    import matplotlib.style

    with matplotlib.style.context(THEMES[theme]):
        figure, axes = figures.open_figure(1, 1, *curves.PANEL_SIZE)
        curves.draw_panel(axes[0, 0], panel, n_runs=1)
        axes[0, 0].set_facecolor("none")
        content = io.BytesIO()
        figures.save_figure(figure, content, format="svg", transparent=True)
    return content.getvalue()


def picture(path: Path) -> str:
    if not path.is_file():
        return ""
    return f'<img src="{file_uri(path)}" alt="{html.escape(path.name)}">'


def video(folder: Path, stem: str) -> str:
    """The .gif, which every browser plays, or else the .mp4."""
    path = folder / f"{stem}.mp4"
    moving = picture(folder / f"{stem}.gif")
    if moving or not path.is_file():
        return moving
    return f'<video src="{file_uri(path)}" controls loop muted playsinline></video>'


# Tables


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = ["".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)]
    for row in rows:
        lines.append("".join(f"<td>{html.escape(str(cell))}</td>" for cell in row))
    return "<table>" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def rows_table(path: Path) -> str:
    """A CSV file, without the column of the folder."""
    rows = logs.read_rows(path)
    if not rows:
        return ""
    columns = [column for column in rows[0] if column != "run"]
    cells = [[row[column] for column in columns] for row in rows]
    return f'<div class="wide">{table(columns, cells)}</div>'


def config_table(config: dict[str, Any]) -> str:
    """Values as they are typed in a config file."""
    rows = [[name, json.dumps(value)] for name, value in config.items()]
    return table(["name", "value"], rows) if rows else ""
