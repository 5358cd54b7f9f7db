"""Figure: what sparsity costs, for every variant of a study."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from circuitflow.jobs import Output
from circuitflow.plots.numbers import whole
from circuitflow.plots.scales import log_axis
from circuitflow.plots.style import Style, drawing, footnote, grid, new_figure, save, style_of
from circuitflow.plots.tables import Table
from circuitflow.plots.variants import Look, Variant, looks, names, say
from circuitflow.store.tables import read_table

PENALTY = re.compile(
    r"-(p[\d.]+(?:e[-+]?\d+)?)(?=-|$)"
)  # in a label; other sparsities can be read off the axis
NOTE = (
    "Each mark is one variant, bars are 95 % intervals (bootstrap over held-out blocks){n}; lines join the "
    "means over seeds of variants that differ in sparsity alone; p: penalty. FVU: squared error over "
    "variance, outliers left out. CE recovered: how far the model's loss comes back from that with the site's "
    "vectors replaced by zeros (0) to its own (1) when they are replaced by reconstructions; outliers stay. "
    "KL: of the next-token distributions, untouched to spliced."
)
PANELS = (
    ("fvu", "Variance unexplained", "held-out FVU", True),
    ("ce_recovered", "Loss recovered", "CE recovered", False),
    ("kl", "Divergence", "KL (nats per token)", True),
)


def plot_study_frontier(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. FVU, CE recovered and KL against L0.

    Input ``variants`` (table of compare_variants); params ``style``; outputs ``png``, ``svg``.
    """
    style = style_of(params)
    with drawing(style):
        save(draw(read_table(inputs["variants"]), style), out, style)


def draw(variants: Table, style: Style) -> Figure:
    """The figure, from the table of variants."""
    found = looks(variants["label"], lambda variant: variant.family)
    figure = new_figure(8.0, max(3.5, 1.5 + 0.16 * len(_families(list(found)))))
    for place, (axes, (name, title, unit, logarithmic)) in enumerate(
        zip(figure.subplots(1, 3), PANELS, strict=True)
    ):
        _panel(axes, variants, name, found, style)
        if logarithmic:
            log_axis(axes, "y", _with_bars(variants, name).ravel())
        axes.set(title=title, ylabel=unit)
        if place == 0:
            _name_points(axes, variants, style)
    _legend(figure, found)
    n = sorted({int(count) for count in variants["n"]})
    footnote(figure, NOTE.format(n=f", n = {_span(n)} tokens for FVU and L0" if n else ""), style)
    return figure


def _panel(axes: Axes, table: Table, name: str, found: Mapping[str, Look], style: Style) -> None:
    measured = np.isfinite(table[name]) & (table["l0"] > 0)
    axes.set_xlabel("held-out L0 (per token)")
    if not measured.any():
        say(axes, "not measured", style)
        return
    for family, labels in _families(list(found)).items():
        points = _means(table, name, labels)
        look = found[labels[0]]
        axes.plot(*points, color=look.colour, linestyle=look.line, linewidth=1.1, label=family, zorder=1)
    for row, label in enumerate(table["label"]):
        if measured[row]:
            _point(axes, {key: column[row] for key, column in table.items()}, name, found[label])
    log_axis(axes, "x", _with_bars(table, "l0")[:, measured].ravel())
    grid(axes, "both")


def _point(axes: Axes, row: Mapping[str, Any], name: str, look: Look) -> None:
    bars = [_bar(row, quantity) for quantity in ("l0", name)]
    axes.errorbar(
        [row["l0"]],
        [row[name]],
        xerr=bars[0],
        yerr=bars[1],
        fmt=look.mark,
        color=look.colour,
        markersize=4.2,
        markeredgecolor="white",
        markeredgewidth=0.4,
        elinewidth=0.9,
        capsize=1.5,
    )


def _bar(row: Mapping[str, Any], name: str) -> np.ndarray | None:
    """(2, 1) lengths below and above the value; None where there is no interval."""
    low, high = row.get(f"{name}_low", np.nan), row.get(f"{name}_high", np.nan)
    if not (np.isfinite(low) and np.isfinite(high)):
        return None
    return np.maximum([[row[name] - low], [high - row[name]]], 0)


def _with_bars(table: Table, name: str) -> np.ndarray:
    """(3 or 1, variants): values and the ends of their intervals, as far as there are any."""
    return np.stack([table[key] for key in (name, f"{name}_low", f"{name}_high") if key in table])


def _families(labels: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for label in labels:
        found.setdefault(Variant.of(label).family, []).append(label)
    return found


def _means(table: Table, name: str, labels: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Means over seeds of L0 and of a quantity, by rising L0."""
    groups = dict.fromkeys(Variant.of(label).group for label in labels)
    group_of = np.array([Variant.of(label).group for label in table["label"]])
    points = [
        (float(np.mean(table["l0"][group_of == group])), float(np.mean(table[name][group_of == group])))
        for group in groups
    ]
    ordered = np.array(sorted(points)).reshape(-1, 2)
    return ordered[:, 0], ordered[:, 1]


def _name_points(axes: Axes, table: Table, style: Style) -> None:
    """Penalties, which the axis does not tell, beside the mean over seeds."""
    groups = np.array([Variant.of(label).group for label in table["label"]], object)
    for group in dict.fromkeys(groups):
        penalty = PENALTY.search(group)
        place = float(np.mean(table["l0"][groups == group])), float(np.mean(table["fvu"][groups == group]))
        if penalty and np.isfinite(place).all():
            axes.annotate(
                penalty[1],
                place,
                xytext=(4, 3),
                textcoords="offset points",
                fontsize=style.font_size * 0.78,
                color=style.palette.muted,
            )


def _legend(figure: Figure, found: Mapping[str, Look]) -> None:
    handles, families = [], _families(list(found))
    called = names(families)
    for family, labels in families.items():
        look = found[labels[0]]
        shape = {"color": look.colour, "linestyle": look.line, "marker": look.mark, "markersize": 4.2}
        handles.append(Line2D([], [], linewidth=1.1, label=called[family], **shape))
    if handles:
        figure.legend(handles=handles, loc="outside right upper", handlelength=2.6, labelspacing=0.35)


def _span(counts: Sequence[int]) -> str:
    return whole(counts[0]) if len(counts) == 1 else f"{whole(counts[0])} to {whole(counts[-1])}"
