"""What a run writes down as it goes: log.jsonl, Weights & Biases, tables."""

import csv
import functools
import json
import netrc
import os
import secrets
import socket
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import ParseResult, urlparse

from support.runtime import World, first_line, one_line_errors


class Log:
    """log.jsonl always, Weights & Biases where a project is named. Rank 0 only.

    What cannot be logged is said once; it never ends a run.
    """

    def __init__(self, folder: str | Path, cfg, world: World):
        self.warned = set()
        self.file = None
        self.wandb = None
        if world.is_main:
            with self.never_fatal("log.jsonl"):
                self.file = open_log(Path(folder) / "log.jsonl")
        if world.is_main and cfg.wandb_project:
            with self.never_fatal("wandb", Exception):
                self.wandb = start_wandb(Path(folder), cfg)

    @contextmanager
    def never_fatal(self, what: str, *kinds: type[Exception]) -> Iterator[None]:
        """Errors of these kinds (OSError, if none is named) are said once."""
        try:
            yield
        except kinds or (OSError,) as error:  # noqa: B030
            if what not in self.warned:
                self.warned.add(what)
                print(f"warning: {what}: {first_line(error)}; training goes on", file=sys.stderr)

    def write(self, it: int, **values: Any) -> None:
        if self.file:
            with self.never_fatal("log.jsonl"):
                self.file.write(json.dumps({"it": it, **values}) + "\n")
                self.file.flush()
        if self.wandb:
            with self.never_fatal("wandb", Exception):
                self.send(it, values)

    def send(self, it: int, values: dict[str, Any]) -> None:
        """To Weights & Biases: curves under train/ and val/, floors into its table of runs, noise
        levels as one table."""
        import wandb

        for name, value in values.get("floors", {}).items():
            self.wandb.summary[f"floor/{name}"] = value
        content = sections_of(values)
        if levels := level_table(values):
            content["val/by_level"] = wandb.Table(*levels)
        if content:
            self.wandb.log(content, step=it)

    def media(self, it: int, caption: str, **paths: Path) -> None:
        """Pictures (.png) and videos, under val/."""
        with self.never_fatal("wandb", Exception):
            import wandb

            media = {}
            for name, path in paths.items():
                is_picture = path.suffix == ".png"
                kind = wandb.Image if is_picture else functools.partial(wandb.Video, format="mp4")
                media[f"val/{name}"] = kind(str(path), caption=caption)
            self.wandb.log(media, step=it)

    def close(self) -> None:
        if self.file:
            with self.never_fatal("log.jsonl"):
                self.file.close()
        if self.wandb:
            with self.never_fatal("wandb", Exception):
                self.wandb.finish()


def open_log(path: Path):
    """To append to; a last line that a kill left torn is cut."""
    file = open(path, "ab+")
    file.seek(0)
    end = file.read().rfind(b"\n") + 1
    file.truncate(end)
    file.close()
    return open(path, "a")


def sections_of(values: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line of the log, as train/NAME or val/NAME."""
    sections = {}
    for name, value in values.items():
        if type(value) in (int, float):
            is_validation = name.startswith("val_")
            section = "val" if is_validation else "train"
            sections[f"{section}/{name.removeprefix('val_')}"] = value
    return sections


def level_table(values: dict[str, Any]) -> tuple[list[str], list[list]] | None:
    """Scores by noise level, a row for each bin.  -> columns, rows; None where there are none"""
    bins = {name: value for name, value in values.items() if name.endswith("_bins")}
    if not bins:
        return None
    names = [name.removeprefix("val_").removesuffix("_bins") for name in bins]
    n_bins = len(next(iter(bins.values())))
    rows = [
        [(i + 0.5) / n_bins, *scores]
        for i, scores in enumerate(zip(*bins.values(), strict=True))
    ]
    return ["level", *names], rows


def start_wandb(folder: Path, cfg):
    """A run that goes on under the same id when training does."""
    import wandb

    mode = wandb_mode(cfg.wandb_mode)
    if mode == "offline":
        print("wandb: offline, to be sent later with `wandb sync`")
    id_file = folder / "wandb_id.txt"
    if not id_file.exists() or not id_file.read_text().strip():
        id_file.write_text(secrets.token_hex(4) + "\n")
    return wandb.init(
        project=cfg.wandb_project, entity=cfg.wandb_entity or None, dir=folder, mode=mode,
        name=cfg.wandb_name or folder.name, config=vars(cfg), id=id_file.read_text().strip(),
        resume="allow",
    )


def wandb_mode(mode: str) -> str:
    """"auto" is offline where there is no key or no network; WANDB_MODE goes before all."""
    mode = os.environ.get("WANDB_MODE") or mode
    if mode != "auto":
        return mode
    url = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    return "online" if has_key(url.hostname) and is_reachable(url) else "offline"


def has_key(host: str) -> bool:
    """Is there a key that wandb would find? Asked here, because wandb itself would ask the user."""
    try:
        return bool(os.environ.get("WANDB_API_KEY") or netrc.netrc().authenticators(host))
    except (OSError, netrc.NetrcParseError):
        return False


def is_reachable(url: ParseResult, timeout_s: float = 3) -> bool:
    """Does the server answer? Behind a proxy it is taken to."""
    if urllib.request.getproxies().get(url.scheme):
        return True
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((url.hostname, port), timeout_s).close()
        return True
    except OSError:
        return False


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """The rows of a CSV, none if there is no file; a row that a kill left torn is left out."""
    path = Path(path)
    if not path.exists():
        return []
    try:
        rows = list(csv.DictReader(path.read_text().splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SystemExit(f"{path} cannot be read as a table: {first_line(error)}") from None
    return [row for row in rows if None not in row and None not in row.values()]


def read_numbers(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a CSV without their empty cells, numbers as numbers."""
    return [
        {column: as_number(value) for column, value in row.items() if value}
        for row in read_rows(path)
    ]


def as_number(value: str) -> Any:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def append_rows(path: str | Path, *new_rows: dict[str, Any]) -> None:
    """Append to a CSV, which is written anew, whole or not at all; columns may be new."""
    write_rows(path, [*read_rows(path), *new_rows])


def write_rows(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """A CSV, whole or not at all."""
    path = Path(path)
    with one_line_errors(OSError):
        columns = list(dict.fromkeys(column for row in rows for column in row))
        new = path.with_suffix(".tmp")
        with open(new, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
