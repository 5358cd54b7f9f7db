"""Figure: why scores of error nodes are as large as they are: size of the change, of the gradient, and their angle."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from circuitflow.jobs import Output
from circuitflow.models.sites import in_depth_order
from circuitflow.plots.error_series import places
from circuitflow.plots.scales import log_axis
from circuitflow.plots.style import Style, drawing, footnote, grid, new_figure, save, site_shades, style_of
from circuitflow.plots.tables import Table, rows, unit_of
from circuitflow.store.tables import read_table

LOOKS = {"error": ("error", "^"), "features": ("feature", "o"), "whole": ("text", "s")}
NAMES = {"error": "error ε", "features": "features x̂", "whole": "whole x = x̂ + ε"}
SPLIT = "train"
MANY = 2000
NOTE = (
    "n = {n} {split} pairs. Δ: patched − clean, g: gradient of m; the tokens of a pair where the runs can differ count "
    "as one vector, so that the score of a pair is ‖Δ‖·‖g‖·cos(Δ, g). Lines: means over pairs with 95 % bootstrap "
    "intervals. Marks below: the error node of one site in one pair; score > 0: its clean value supports the "
    "clean answer."
)


def plot_error_components(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. ‖Δ‖, ‖g‖, cosine and score by site, and of the errors of single pairs.

    Inputs ``components``, ``pairs`` (tables of measure_components); params ``style``, optionally ``metric``; outputs
    ``png``, ``svg``.
    """
    style = style_of(params)
    components, pairs = (read_table(inputs[name]) for name in ("components", "pairs"))
    with drawing(style):
        save(draw(components, pairs, style, unit_of(params.get("metric"))), out, style)


def draw(components: Table, pairs: Table, style: Style, unit: str = "logits") -> Figure:
    """The figure, from both tables."""
    means, errors = rows(components, split=SPLIT), rows(pairs, split=SPLIT, part="error")
    sites = in_depth_order(components["site"])
    figure = new_figure(max(10.4, 2 + 1.0 * len(sites)), 6.6)
    parts = figure.subfigures(2, 1, squeeze=False)[:, 0]
    panels, marks = parts[0].subplots(1, 4), parts[1].subplots(1, 2)
    for axes, name, title, label in zip(
        panels,
        ("score", "delta", "gradient", "cosine"),
        ("Score by depth", "Size of the change", "Size of the gradient", "Angle of the two"),
        (f"IE ({unit})", "‖Δ‖ (activation units)", f"‖g‖ ({unit} per unit)", "cos(Δ, g)"),
        strict=True,
    ):
        _by_site(axes, means, sites, name, style)
        axes.set(title=title, ylabel=label)
        if name in ("score", "cosine"):
            axes.axhline(0, color=style.palette.muted, linewidth=0.8, zorder=0)
        else:
            axes.set_ylim(bottom=0)
    _against_gradient(marks[0], errors, style, unit)
    _against_cosine(marks[1], errors, sites, style)
    handles, labels = panels[0].get_legend_handles_labels()
    parts[0].legend(handles, labels, loc="outside upper right", ncols=3)
    n = int(means["n"].max(initial=0))
    footnote(figure, NOTE.format(n=n, split=SPLIT), style)
    return figure


def _by_site(axes: Axes, means: Table, sites: Sequence[str], name: str, style: Style) -> None:
    parts = ("whole",) if name == "gradient" else tuple(LOOKS)  # the gradient is the same for all parts
    for order, part in enumerate(parts):
        colour, marker = LOOKS[part]
        here = rows(means, part=part)
        x = np.array([sites.index(site) for site in here["site"]], float)
        value, low, high = (here[f"{name}{end}"] for end in ("", "_low", "_high"))
        axes.errorbar(
            x + 0.12 * (order - (len(parts) - 1) / 2),
            value,
            yerr=np.nan_to_num(np.maximum([value - low, high - value], 0)),
            fmt=f"{marker}-",
            color=getattr(style.palette, colour),
            markersize=4,
            linewidth=1.1,
            elinewidth=0.9,
            label=NAMES[part],
        )
    places(axes, sites, room=8)
    grid(axes)


def _against_gradient(axes: Axes, errors: Table, style: Style, unit: str) -> None:
    """‖Δ‖ against ‖g‖, one mark per pair and site, coloured by score."""
    palette = style.palette
    shown = _drawable(errors)
    size = float(np.percentile(np.abs(shown["score"]), 98)) if len(shown["score"]) else 0.0
    colours = LinearSegmentedColormap.from_list("score", [palette.negative, "#d8d8d8", palette.positive])
    marks = axes.scatter(
        shown["gradient"],
        shown["delta"],
        c=shown["score"],
        cmap=colours,
        vmin=-(size or 1),
        vmax=size or 1,
        s=11,
        marker="^",
        linewidths=0,
        alpha=0.85,
        rasterized=len(shown["score"]) > MANY,
    )
    for which in ("x", "y"):
        log_axis(axes, which, shown["gradient" if which == "x" else "delta"])
    axes.set(
        title="Errors of single pairs, by score",
        xlabel=f"‖g‖ ({unit} per unit)",
        ylabel="‖Δ‖ (activation units)",
    )
    grid(axes, "both")
    root = axes.get_figure(root=True)
    assert root is not None
    bar = root.colorbar(marks, ax=axes, extend="both", aspect=30, pad=0.02)
    bar.set_label(f"IE ({unit})")


def _against_cosine(axes: Axes, errors: Table, sites: Sequence[str], style: Style) -> None:
    """‖Δ‖ against the cosine, coloured by site."""
    shades = site_shades(len(sites))
    for place, site in enumerate(sites):
        shown = _drawable(rows(errors, site=site))
        axes.scatter(
            shown["delta"],
            shown["cosine"],
            s=11,
            marker="^",
            color=shades[place],
            linewidths=0,
            alpha=0.8,
            label=site,
            rasterized=len(shown["delta"]) > MANY,
        )
    log_axis(axes, "x", _drawable(errors)["delta"])
    axes.axhline(0, color=style.palette.muted, linewidth=0.8, zorder=0)
    axes.set(title="Errors of single pairs, by site", xlabel="‖Δ‖ (activation units)", ylabel="cos(Δ, g)")
    bound = float(np.abs(_drawable(errors)["cosine"]).max(initial=0.05)) * 1.1
    axes.set_ylim(-bound, bound)
    grid(axes, "both")
    some = len(sites) > 9
    axes.legend(
        loc="upper left", bbox_to_anchor=(1, 1), handletextpad=0.1, ncols=2 if some else 1, borderaxespad=0.2
    )


def _drawable(errors: Table) -> dict[str, np.ndarray]:
    """Rows whose norms have a logarithm."""
    keep = (errors["delta"] > 0) & (errors["gradient"] > 0)
    return {name: column[keep] for name, column in errors.items()}
