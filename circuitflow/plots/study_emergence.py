"""Figure: when the features of a study's variants came to be."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from circuitflow.jobs import Output
from circuitflow.plots.scales import log_axis, token_axis
from circuitflow.plots.style import Style, drawing, footnote, grid, new_figure, save, style_of
from circuitflow.plots.tables import Table
from circuitflow.plots.variants import curve, followed, legend, looks, read_variants, say

NOTE = (
    "At every checkpoint, each finished feature that is active on held-out tokens is matched with the decoder "
    "row of largest cosine. Present: match above 0.9. At the end every feature is present by definition. "
    "Decoder cosine: mean |cosine| over all pairs of decoder rows. Thin lines: further seeds."
)
PANELS = (
    ("present_share", "Finished features present", "share of finished features"),
    ("match_mean", "Mean match", "mean of the largest cosine"),
    ("decoder_cosine_mean", "Orthogonality", "mean |cosine| of decoder rows"),
    ("fvu", "Variance unexplained", "held-out FVU"),
)


def plot_study_emergence(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Share of finished features present, their match, decoder cosines and FVU by training token.

    Input ``checkpoints`` (list of tables of study_features, each in the folder of its variant); params ``style``;
    outputs ``png``, ``svg``.
    """
    style = style_of(params)
    with drawing(style):
        save(draw(read_variants(inputs["checkpoints"]), style), out, style)


def draw(checkpoints: Mapping[str, Table], style: Style) -> Figure:
    """The figure, from tables of checkpoints by variant (those with one step have nothing to follow)."""
    shown = followed(checkpoints)
    figure = new_figure(7.8, max(4.9, 1.2 + 0.16 * len(shown)))
    for axes, (name, title, unit) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        _panel(axes, shown, name, style)
        axes.set(title=title, ylabel=unit)
    legend(figure, list(shown))
    bare = [label for label in checkpoints if label not in shown]
    footnote(figure, NOTE + (f" Without checkpoints: {', '.join(bare)}." if bare else ""), style)
    return figure


def _panel(axes: Axes, checkpoints: Mapping[str, Table], name: str, style: Style) -> None:
    if not checkpoints:
        say(axes, "no variant has checkpoints", style)
        return
    for label, look in looks(checkpoints).items():
        curve(axes, checkpoints[label]["tokens"], checkpoints[label][name], look, marks=True)
    if name == "fvu":
        log_axis(axes, "y", np.concatenate([table[name] for table in checkpoints.values()]))
    elif name == "decoder_cosine_mean":
        highest = max(float(np.nanmax(table[name], initial=0)) for table in checkpoints.values())
        axes.set_ylim(0, highest * 1.12 or 1.0)
    else:
        axes.set_ylim(0, 1.03)
    token_axis(axes)
    grid(axes)
