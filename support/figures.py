"""How figures are drawn: without a display, with plain numbers on their axes."""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

DPI = 110
LEVEL_STYLES = ((0, (5, 3)), (0, (1, 2)), (0, (6, 2, 1, 2)), (0, (10, 3)), (0, (3, 1, 1, 1, 1, 1)))
LARGE = 10_000              # from here on, thousands are set apart


def open_figure(n_rows: int, n_columns: int, width: float, height: float, **options):
    """Inches.  -> figure, array of panels (n_rows, n_columns)"""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(
        n_rows, n_columns, figsize=(width, height), squeeze=False, layout="constrained", **options
    )


def save_figure(figure, path: str | Path, **options) -> None:
    from matplotlib import pyplot

    figure.savefig(path, **dict(dpi=DPI) | options)
    pyplot.close(figure)


def plain_number(value: float, _=None) -> str:
    """0.0002 and 25,000, never 2e-04. The second argument is for matplotlib."""
    if abs(value) >= LARGE:
        return f"{value:,.0f}"
    return np.format_float_positional(value, precision=6, fractional=False, trim="-")


def set_plain_ticks(axis, values: Iterable[float] = ()) -> None:
    """Plain numbers on an x or y axis; a logarithmic one has labels within a decade, too.

    values: all that it shows; if they are one number, that is the only tick
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    distinct = {float(value) for value in values if math.isfinite(value)}
    if len(distinct) == 1:
        set_ticks(axis, distinct)
        return
    if axis.get_scale() == "log":
        low, high = axis.get_view_interval()
        is_wide = math.log10(high / low) > 2
        axis.set_major_locator(LogLocator(subs=(1,) if is_wide else (1, 2, 5)))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(plain_number)


def set_ticks(axis, values: Iterable[float]) -> None:
    """Label these values of an axis and no others."""
    values = list(values)
    axis.set_ticks(values, [plain_number(value) for value in values])
    axis.set_ticks([], minor=True)


def colour_of(i: int, n: int):
    """Of one of n: a few are told apart best by the default colours, many need a scale."""
    from matplotlib import colormaps

    return f"C{i}" if n <= 10 else colormaps["turbo"]((i + 0.5) / n)


def handle(colour, linestyle="-", **options):
    """What stands for a line in a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, linestyle=linestyle, **options)
