"""Figure: held-out quality of every dictionary while it was trained."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from circuitflow.jobs import Output
from circuitflow.models.sites import in_depth_order
from circuitflow.plots.style import Style, drawing, footnote, grid, new_figure, save, site_shades, style_of
from circuitflow.plots.tables import training_log

NOTE = (
    "One line per site, darker = deeper. FVU: squared error of the reconstruction over the variance of "
    "the vectors, without outliers (0 is perfect); thin lines: on the training batches. Dead: has not "
    "fired for the number of tokens that the configuration sets."
)

Curve = dict[str, np.ndarray]


def plot_training_curves(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Held-out FVU and L0, and the share of dead features, by training step: one line per site.

    Input ``dictionaries`` (list of manifests); params ``style``; outputs ``png``, ``svg``.
    """
    style = style_of(params)
    with drawing(style):
        save(draw(read_curves(inputs["dictionaries"]), style), out, style)


def draw(curves: Mapping[str, Curve], style: Style) -> Figure:
    """The figure, from curves by site."""
    figure = new_figure(7.8, 3.0)
    panels = figure.subplots(1, 3)
    panels[0].set(title="Variance unexplained", ylabel="held-out FVU")
    panels[1].set(title="Active features per token", ylabel="held-out L0")
    panels[2].set(title="Dead features", ylabel="share of the dictionary")
    for axes, name in zip(panels, ("fvu", "l0", "dead"), strict=True):
        _panel(axes, curves, name, style)
    if curves:
        panels[0].legend(title="site", loc="upper right")
    footnote(figure, NOTE, style)
    return figure


def read_curves(manifests: Sequence[Path]) -> dict[str, Curve]:
    """Logs by site, in order of depth; dictionaries that were made without training are left out.

    A curve has ``step``, ``train_fvu`` and ``dead`` of every line, and ``held_step``, ``fvu`` and ``l0`` of the lines
    with a held-out measurement.
    """
    found = {}
    for path in manifests:
        site, lines = training_log(path)
        if lines:
            found[site] = _curve(lines)
    return {site: found[site] for site in in_depth_order(found)}


def _curve(lines: Sequence[Mapping[str, Any]]) -> Curve:
    measured = [line for line in lines if line["held_out"]]
    return {
        "step": np.array([line["step"] for line in lines]),
        "train_fvu": np.array([line["fvu"] for line in lines], dtype=float),
        "dead": np.array([line["dead"] for line in lines], dtype=float),
        "held_step": np.array([line["step"] for line in measured]),
        "fvu": np.array([line["held_out"]["fvu"] for line in measured], dtype=float),
        "l0": np.array([line["held_out"]["l0"] for line in measured], dtype=float),
    }


def _panel(axes: Axes, curves: Mapping[str, Curve], name: str, style: Style) -> None:
    for shade, (site, curve) in zip(site_shades(len(curves)), curves.items(), strict=True):
        steps = curve["step" if name == "dead" else "held_step"]
        if name == "fvu":
            axes.plot(curve["step"], curve["train_fvu"], color=shade, linewidth=0.6, alpha=0.5)
        axes.plot(steps, curve[name], color=shade, label=site)
        axes.plot(steps[-1:], curve[name][-1:], "o", color=shade, markersize=3.5)
    if not curves:
        axes.text(
            0.5,
            0.5,
            "no dictionary was trained",
            transform=axes.transAxes,
            ha="center",
            color=style.palette.muted,
        )
        axes.set(xticks=[], yticks=[])
    highest = max((float(np.nanmax(curve[name], initial=0)) for curve in curves.values()), default=0)
    axes.set_ylim(0, highest * 1.12 or 1.0)
    axes.set_xlabel("training step")
    grid(axes)
