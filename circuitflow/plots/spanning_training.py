"""Figures: transcoders, or a crosscoder, while they were trained."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from circuitflow.jobs import Output
from circuitflow.models.sites import in_depth_order
from circuitflow.plots.scales import token_axis
from circuitflow.plots.style import Style, drawing, footnote, grid, new_figure, save, site_shades, style_of
from circuitflow.store.objects import read_manifest

LEGEND = 8  # more lines than these are named by the first and the last alone
NOTE = (
    "Held-out FVU: squared error over the variance of held-out vectors at each site written, outliers left out. L0: "
    "mean number of active features per held-out token{of}. Dead: share of features that have not fired for "
    "dead_after training tokens{of}. n = {n}."
)

Lines = dict[str, dict[str, np.ndarray]]


def plot_spanning_training(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Held-out FVU by site written, L0 and dead features, by training token.

    Input ``dictionaries`` (manifests); params ``style``; outputs ``png``, ``svg``.
    """
    style = style_of(params)
    given = inputs["dictionaries"]
    manifests = [Path(path) for path in (given if isinstance(given, list | tuple) else [given])]
    with drawing(style):
        save(draw(read_curves(manifests), style, has_layers(manifests)), out, style)


def has_layers(manifests: Sequence[Path]) -> bool:
    """Whether one training is of features of several layers, as that of a cross-layer transcoder is."""
    return any(len(read_manifest(path, kind="dictionary").details["writes"]) > 1 for path in manifests)


def read_curves(manifests: Sequence[Path]) -> Lines:
    """By name: ``fvu`` of every site written, ``l0`` and ``dead`` of every training, each with its ``tokens``."""
    found: Lines = {}
    for path in manifests:
        manifest = read_manifest(Path(path), kind="dictionary")
        text = (manifest.folder(Path(path)) / "log.jsonl").read_text(encoding="utf-8")
        lines = [line for line in map(json.loads, text.splitlines()) if line["held_out"]]
        writes = list(dict.fromkeys(site for member in manifest.details["writes"] for site in member))
        tokens = np.array([line["tokens"] for line in lines], float)
        for site in writes:
            values = [line["held_out"].get("fvu_of", {site: line["held_out"]["fvu"]})[site] for line in lines]
            found[f"fvu {site}"] = {"tokens": tokens, "value": np.array(values, float)}
        name = "+".join(writes)
        found[f"l0 {name}"] = {
            "tokens": tokens,
            "value": np.array([line["held_out"]["l0"] for line in lines], float),
        }
        found[f"dead {name}"] = {"tokens": tokens, "value": np.array([line["dead"] for line in lines], float)}
    return found


def draw(curves: Lines, style: Style, layers: bool = False) -> Figure:
    """The figure, from curves by name; with ``layers`` L0 and dead features are of several layers at once."""
    figure = new_figure(7.8, 3.3)
    panels = figure.subplots(1, 3)
    for axes, (quantity, title, unit) in zip(
        panels,
        (
            ("fvu", "Variance unexplained", "held-out FVU"),
            ("l0", "Active features per token", "held-out L0"),
            ("dead", "Dead features", "share of the dictionary"),
        ),
        strict=True,
    ):
        _panel(
            axes, {name[len(quantity) + 1 :]: c for name, c in curves.items() if name.startswith(quantity)}
        )
        axes.set(title=title, ylabel=unit)
    if len(panels[0].lines) > 1:
        panels[0].legend(loc="best")
    trainings = sum(name.startswith("l0") for name in curves)
    together = ", of all layers together" if layers else ""
    n = f"{trainings} training" + ("s" if trainings != 1 else "")
    footnote(figure, NOTE.format(of=together, n=n), style)
    return figure


def _panel(axes: Axes, curves: Mapping[str, dict[str, np.ndarray]]) -> None:
    names = in_depth_order(curves)
    for place, (name, colour) in enumerate(zip(names, site_shades(len(names)), strict=True)):
        named = len(names) <= LEGEND or place in (0, len(names) - 1)
        label = name if named and "+" not in name else None
        axes.plot(curves[name]["tokens"], curves[name]["value"], color=colour, linewidth=1.1, label=label)
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    if any(len(curve["tokens"]) for curve in curves.values()):
        token_axis(axes)
    grid(axes)
