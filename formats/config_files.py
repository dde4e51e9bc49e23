"""Config files: assignments and arithmetic, which are read and never run."""

import ast
import contextlib
import math
import operator
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

from formats.flags import LARGEST, MAX_TEXT, check_type
from formats.messages import nearest, shown


def read_file(path: str | Path, cls: type) -> dict[str, Any]:
    """The assignments of one config file."""
    types = typing.get_type_hints(cls, include_extras=True)
    names = [field.name for field in fields(cls)]
    module, lines = parse_file(path)
    values = {}
    for node in module.body:
        where = f"{path}, line {node.lineno}"
        line = lines[node.lineno - 1].strip()[:MAX_TEXT]
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue                                                    # the header
        is_assignment = isinstance(node, ast.Assign) and len(node.targets) == 1
        if not is_assignment or not isinstance(node.targets[0], ast.Name):
            raise SystemExit(f"{where}: a config file holds assignments only, not `{line}`")
        key = node.targets[0].id
        if key not in names:
            raise SystemExit(f"{where}: unknown key {key}; {nearest(key, names)}")
        try:
            value = evaluate(node.value, values)
        except (ArithmeticError, NameError) as error:
            raise SystemExit(f"{where}: {key}: {error}") from None
        except (SyntaxError, RecursionError):
            raise SystemExit(
                f"{where}: {key} must be a value or arithmetic, not `{line}`"
            ) from None
        values[key] = check_type(value, types[key], f"{where}: {key}")
    return values


def summary_of(path: str | Path) -> str:
    """The first line of a Python file's docstring, without running the file; "" without one."""
    header = ast.get_docstring(parse_file(path)[0]) or ""
    return header.partition("\n")[0]


def literals_of(path: Path) -> dict:
    """The assignments of literals in a config file; calculated values are left out."""
    values = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign):
            with contextlib.suppress(ValueError):
                values[node.targets[0].id] = ast.literal_eval(node.value)
    return values


def parse_file(path: str | Path) -> tuple[ast.Module, list[str]]:
    """-> its syntax tree, its lines"""
    try:
        text = Path(path).read_text()
        return ast.parse(text), text.split("\n")
    except (OSError, SyntaxError, ValueError) as error:
        raise SystemExit(f"{path}: {error}") from None
    except (RecursionError, MemoryError):
        raise SystemExit(f"{path}: it is nested too deeply") from None


def evaluate(node: ast.expr, values: dict[str, Any]) -> Any:
    """A literal, a name assigned before, a tuple, or arithmetic on numbers. Nothing is run, and no
    number exceeds LARGEST.

    Raises SyntaxError for anything else
    """
    if isinstance(node, ast.Constant):
        return not_too_large(node.value)
    if isinstance(node, ast.Name):
        if node.id not in values:
            raise NameError(f"{node.id} has no value above this line")
        return values[node.id]
    if isinstance(node, ast.Tuple):
        return tuple(evaluate(part, values) for part in node.elts)
    if isinstance(node, ast.BinOp):
        parts = [node.left, node.right]
    elif isinstance(node, ast.UnaryOp):
        parts = [node.operand]
    else:
        raise SyntaxError
    if type(node.op) not in OPERATORS:
        raise SyntaxError
    numbers = [evaluate(part, values) for part in parts]
    for number in numbers:
        if type(number) not in (int, float):
            raise ArithmeticError(f"arithmetic is for numbers, not for {shown(number)}")
    return not_too_large(OPERATORS[type(node.op)](*numbers))


def not_too_large(value: Any) -> Any:
    """The value itself. Raises ArithmeticError"""
    if type(value) in (int, float) and not abs(value) <= LARGEST:
        raise ArithmeticError("numbers go to 2**63")
    return value


def power(base: float, exponent: float) -> float:
    """base ** exponent, unless that is too large to be worth computing."""
    if abs(base) > 1 and exponent * math.log2(abs(base)) > math.log2(LARGEST) + 1:
        raise ArithmeticError("numbers go to 2**63")
    return base**exponent


OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: power,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
