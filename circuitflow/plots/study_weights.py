"""Figure: the weights of a study's variants, and how orthogonal their features are."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from circuitflow.jobs import Output
from circuitflow.plots.numbers import whole
from circuitflow.plots.scales import log_axis
from circuitflow.plots.style import Style, drawing, footnote, grid, new_figure, save, style_of
from circuitflow.plots.tables import Table
from circuitflow.plots.variants import (
    alive,
    looks,
    name_rows,
    read_variants,
    rows_height,
    say,
    shade_groups,
    spread,
)

PANELS = (
    ("decoder_norm", "Decoder norm", "‖W_dec,i‖"),
    ("encoder_norm", "Encoder norm", "‖W_enc,i‖"),
    ("b_enc", "Encoder bias", "b_enc,i (units of activity)"),
    ("enc_dec_cosine", "Encoder–decoder", "cosine"),
    ("nearest_cosine", "Nearest row", "largest cosine"),
)
NOTE = (
    "Over the n features that are active on held-out tokens. Thin line: 5 to 95 % of the features, thick "
    "line: the middle half, dot: the median. Encoder–decoder: cosine of a feature's encoder row with its own "
    "decoder row. Nearest: largest cosine of its decoder row with that of any other feature; features at 0 "
    "are orthogonal to all others."
)


def plot_study_weights(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Norms, biases and cosines of encoder and decoder rows: one row per variant.

    Input ``features`` (list of tables of study_features, each in the folder of its variant); params ``style``;
    outputs ``png``, ``svg``.
    """
    style = style_of(params)
    with drawing(style):
        save(draw(read_variants(inputs["features"]), style), out, style)


def draw(features: Mapping[str, Table], style: Style) -> Figure:
    """The figure, from tables of features by variant. Decoder norms have a panel only if they are not all 1."""
    unit_rows = all(
        np.allclose(table["decoder_norm"][alive(table)], 1, atol=1e-3) for table in features.values()
    )
    panels = PANELS[1:] if unit_rows else PANELS
    labels = list(features)
    figure = new_figure(8.0, 1.5 + rows_height(len(labels)))
    columns = figure.subplots(1, len(panels), sharey=True)
    for axes, (name, title, unit) in zip(columns, panels, strict=True):
        _panel(axes, features, name, style)
        axes.set(title=title, xlabel=unit)
    counts = {label: f"n {whole(int(alive(table).sum()))}" for label, table in features.items()}
    name_rows(columns, labels, counts)
    footnote(figure, NOTE + (" Every decoder row has norm 1." if unit_rows else ""), style)
    return figure


def _panel(axes: Axes, features: Mapping[str, Table], name: str, style: Style) -> None:
    ends: list[float] = []
    shade_groups(axes, list(features), style)
    for row, (label, look) in enumerate(looks(features).items()):
        table = features[label]
        ends += spread(axes, row, np.asarray(table[name], float)[alive(table)], look.colour)
    if not ends:
        say(axes, "no active feature", style)
    elif name.endswith("norm"):
        log_axis(axes, "x", ends)
    else:
        axes.axvline(0, color=style.palette.muted, linewidth=0.8, linestyle=":")
        if "cosine" in name:
            axes.set_xlim(min(-0.03, *ends) - 0.02, 1.03)
    grid(axes, "x")
