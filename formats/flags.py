"""Flags of a dataclass: the types of its fields, reading a command line, refusals of one line."""

import math
import shlex
import sys
import typing
from dataclasses import MISSING, fields, make_dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from formats.messages import is_plain, may_stop_reading, nearest, shown

LARGEST = 2**63             # larger numbers are neither taken nor computed
MAX_TEXT = 1000             # characters


class Bound(NamedTuple):
    """Where the numbers of a field must lie, ends included."""
    low: float
    high: float = math.inf


Positive = Annotated[int, Bound(1)]
Layers = Annotated[int, Bound(1, 10_000)]
NotNegative = Annotated[int, Bound(0)]
NotNegativeFloat = Annotated[float, Bound(0)]
Share = Annotated[float, Bound(0, 1)]
Seed = Annotated[int, Bound(0, 2**32 - 1)]      # distinct seeds are distinct orders of the data
RENAMED = {"--n-samples": "--n"}                # flags of older versions
PROSE = "prose"
Prose = Annotated[str, PROSE]                   # may be long and have several lines


# A command line


def parse(cls: type, values: dict[str, Any], argv: list[str]) -> Any:
    """Flags over values, by tyro, with --help in the groups of cls.GROUPS.  -> an instance of
    cls"""
    import tyro

    refuse_unknown_flags(cls, argv)
    refuse_missing(cls, argv)
    rows = []
    for name, group in cls.GROUPS.items():
        own = {field.name: values[field.name] for field in fields(group) if field.name in values}
        is_required = any(field.default is MISSING for field in fields(group))
        default = MISSING if is_required else group(**own)
        rows.append((name, tyro.conf.OmitArgPrefixes[group], default_field(default)))
    command_line = make_dataclass(cls.__name__, rows, namespace={"__doc__": cls.__doc__})
    with may_stop_reading():
        grouped = tyro.cli(command_line, args=argv, config=(tyro.conf.PositionalRequiredArgs,))
    flat = {}
    for name in cls.GROUPS:
        flat |= vars(getattr(grouped, name))
    return cls(**flat)


def default_field(default: Any) -> Any:
    return dataclass_field() if default is MISSING else dataclass_field(default=default)


def refuse_unknown_flags(cls: type, argv: list[str]) -> None:
    """tyro refuses them too, but in a box; one line names the nearest flag."""
    flags = ["--help"]
    for field in fields(cls):
        flag = field.name.replace("_", "-")
        flags += [f"--{flag}", f"--no-{flag}"] if field.type in (bool, "bool") else [f"--{flag}"]
    for arg in argv:
        flag = arg.split("=")[0].replace("_", "-")
        if arg.startswith("--") and flag not in flags:
            if RENAMED.get(flag) in flags:
                raise SystemExit(f"{flag} is now called {RENAMED[flag]}")
            raise SystemExit(f"unknown flag {flag}; {nearest(flag, flags)}")


def refuse_missing(cls: type, argv: list[str]) -> None:
    """Refuse missing positional arguments by a line of usage; flags take the words after them."""
    types = typing.get_type_hints(cls)
    required = [field.name for field in fields(cls) if field.default is MISSING]
    words = [name.upper() for name in required if types[name] is str]
    n_given = 0
    n_values = 0                # words that the flag before them may still take
    for arg in argv:
        if arg.startswith("--"):
            name = arg.removeprefix("--").replace("-", "_")
            kind = types.get(name, bool)                                # --no-NAME, --NAME=VALUE
            n_values = math.inf if typing.get_origin(kind) is tuple else int(kind is not bool)
        elif n_values:
            n_values -= 1
        else:
            n_given += 1
    if n_given < len(words) and not {"-h", "--help"} & set(argv):
        script = Path(sys.argv[0]).name
        raise SystemExit(f"usage: python {script} {' '.join(words)}, then flags: see --help")


def as_flags(values: dict[str, Any]) -> str:
    """The flags that set fields to these values."""
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(words)


# Checks


def check_type(value: Any, kind: Any, where: str) -> Any:
    """The value as its field's type, or a refusal."""
    if typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if type(value) is not str or value not in choices:
            raise SystemExit(f"{where} is {shown(value)}, not one of {', '.join(choices)}")
        return value
    if typing.get_origin(kind) is tuple:
        if type(value) is not tuple or any(type(part) is not int for part in value):
            raise SystemExit(
                f"{where} is {shown(value)}, not whole numbers in brackets, as (32, 32)"
            )
        return value
    if kind is float and type(value) is int and abs(value) <= LARGEST:
        return float(value)
    if type(value) is not kind:
        raise SystemExit(f"{where} is {shown(value)}, not {kind.__name__}")
    return value


def flaw(value: Any) -> str:
    """What is wrong with a text or number, whatever its field; "" where nothing is."""
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            return f"{len(value)} characters long; it must have at most {MAX_TEXT}"
        if not is_plain(value):
            return f"{shown(value)}; it must be without control characters"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}; it must be a finite number"
    if isinstance(value, int) and abs(value) > LARGEST:
        return "too large; numbers go to 2**63"
    return ""


def check_bounds(flags: Any) -> Any:
    """Refuse, by name, texts and numbers of no use, and numbers outside of their field's Bound."""
    for name, kind in typing.get_type_hints(type(flags), include_extras=True).items():
        value = getattr(flags, name, None)
        if PROSE in getattr(kind, "__metadata__", ()):
            continue
        for part in value if isinstance(value, tuple) else (value,):
            if said := flaw(part):
                raise SystemExit(f"{name} is {said}")
        bounds = [part for part in getattr(kind, "__metadata__", ()) if isinstance(part, Bound)]
        for low, high in bounds:
            if low <= value <= high:
                continue
            if high < math.inf:
                raise SystemExit(f"{name} is {value}; it must lie in [{low}, {high}]")
            raise SystemExit(
                f"{name} is {value}; it must "
                + ("be at least 1" if low == 1 else "not be negative")
            )
    return flags
