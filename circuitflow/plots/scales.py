"""Axes that span decades, and axes that count tokens: ticks that are words a reader knows."""

import math
from collections.abc import Iterable

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from circuitflow.plots.numbers import MINUS, THIN, number

SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
STEPS = (
    (0.55, (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)),
    (2.4, (1.0, 2.0, 5.0)),
    (3.5, (1.0, 3.0)),
    (math.inf, (1.0,)),
)
"""Ticks of each decade, by the number of decades up to which there is room for them."""

PLAIN = (1e-3, 1e5)  # numbers outside are written as powers of ten


def power(exponent: float) -> str:
    """A power of ten: "10⁻⁴"."""
    return "10" + f"{exponent:g}".translate(SUPERSCRIPTS)


def decade(value: float) -> str:
    """A tick of a logarithmic axis: "0.05", "200", "10⁻⁶", "2·10⁻⁶"."""
    if value <= 0 or not math.isfinite(value):
        return ""
    if PLAIN[0] <= value < PLAIN[1]:
        return f"{value:g}"
    exponent = math.floor(math.log10(value) + 1e-9)
    leading = round(value / 10**exponent)
    return power(exponent) if leading == 1 else f"{leading}·{power(exponent)}"


def tokens(count: float) -> str:
    """A number of tokens: "0", "800 k", "1.5 M"."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:.3g}{THIN}{unit}".replace("-", MINUS)
    return number(count)


def log_axis(axes: Axes, which: str, values: Iterable[float]) -> None:
    """Make an axis logarithmic with ticks as dense as there is room for.

    :param values: what is drawn; the axis spans the positive ones, and stays linear if there are none.
    """
    usable = [float(value) for value in values if math.isfinite(value) and value > 0]
    if not usable:
        return
    low, high = min(usable), max(usable)
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    margin = max((high / low) ** 0.08, 1.15)
    (axes.set_xlim if which == "x" else axes.set_ylim)(low / margin, high * margin)
    axis: Axis = axes.xaxis if which == "x" else axes.yaxis
    decades = math.log10(high / low * margin**2)
    steps = next(steps for most, steps in STEPS if decades < most)
    axis.set_major_locator(LogLocator(subs=steps, numticks=20 if decades < 10 else 8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: decade(value)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def token_axis(axes: Axes) -> None:
    """An x axis that counts training tokens from 0."""
    axes.set_xlabel("training tokens")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens(value)))
