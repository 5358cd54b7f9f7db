"""Figure: the variants of a study while they were trained."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from circuitflow.jobs import Output
from circuitflow.plots.scales import log_axis, token_axis
from circuitflow.plots.style import Style, drawing, footnote, grid, new_figure, save, style_of
from circuitflow.plots.tables import training_log
from circuitflow.plots.variants import by_variant, curve, legend, looks, say

BINS = 200
NOTE = (
    "Loss: of the training batches, averaged over stretches of the training ({bins} at most); its penalties "
    "differ between kinds, so that only curves of one kind compare. FVU: squared error over the variance of "
    "held-out vectors, outliers left out (0 is perfect). L0: mean number of active features per held-out "
    "token. Dead: has not fired for dead_after training tokens. Thin lines: further seeds."
)
PANELS = (
    ("loss", "Training loss", "loss (‖x‖² = 1 on average)"),
    ("fvu", "Variance unexplained", "held-out FVU"),
    ("l0", "Active features per token", "held-out L0"),
    ("dead", "Dead features", "share of the dictionary"),
)

Curve = dict[str, np.ndarray]


def plot_study_training(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Loss, held-out FVU and L0, and the share of dead features by training token: one line per variant.

    Input ``dictionaries`` (list of manifests, each in the folder of its variant); params ``style``; outputs ``png``,
    ``svg``.
    """
    style = style_of(params)
    with drawing(style):
        save(draw(read_curves(inputs["dictionaries"]), style), out, style)


def draw(curves: Mapping[str, Curve], style: Style) -> Figure:
    """The figure, from curves by variant (those without a step were not trained)."""
    trained = {label: value for label, value in curves.items() if len(value["tokens"])}
    figure = new_figure(7.8, max(4.9, 1.2 + 0.16 * len(trained)))
    for axes, (name, title, unit) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        _panel(axes, trained, name, style)
        axes.set(title=title, ylabel=unit)
    legend(figure, list(trained))
    untrained = [label for label in curves if label not in trained]
    note = NOTE.format(bins=BINS)
    footnote(figure, note + (f" Not trained here: {', '.join(untrained)}." if untrained else ""), style)
    return figure


def read_curves(manifests: Sequence[Path]) -> dict[str, Curve]:
    """Logs by variant.

    A curve has ``tokens``, ``loss`` and ``dead`` of every line, and ``held_tokens``, ``fvu`` and ``l0`` of the
    lines with a held-out measurement.
    """
    found = {}
    for label, path in by_variant(manifests).items():
        _, lines = training_log(path)
        measured = [line for line in lines if line["held_out"]]
        found[label] = {
            **{name: np.array([line[name] for line in lines], float) for name in ("tokens", "loss", "dead")},
            "held_tokens": np.array([line["tokens"] for line in measured], float),
            **{
                name: np.array([line["held_out"][name] for line in measured], float) for name in ("fvu", "l0")
            },
        }
    return found


def thinned(x: np.ndarray, y: np.ndarray, bins: int = BINS) -> tuple[np.ndarray, np.ndarray]:
    """Means over consecutive stretches of equal length, at most ``bins`` of them."""
    parts = min(bins, len(x))
    if not parts:
        return x, y
    return tuple(np.array([part.mean() for part in np.array_split(v, parts)]) for v in (x, y))  # type: ignore[return-value]


def _panel(axes: Axes, curves: Mapping[str, Curve], name: str, style: Style) -> None:
    if not curves:
        say(axes, "no variant was trained", style)
        return
    drawn = []
    for label, look in looks(curves).items():
        value = curves[label]
        x = value["held_tokens" if name in ("fvu", "l0") else "tokens"]
        x, y = thinned(x, value[name]) if name == "loss" else (x, value[name])
        curve(axes, x, y, look)
        drawn.append(y)
    values = np.concatenate(drawn)
    if name == "dead":
        axes.set_ylim(0, float(np.nanmax(values, initial=0)) * 1.12 or 1.0)
    else:
        log_axis(axes, "y", values)
    token_axis(axes)
    grid(axes)
