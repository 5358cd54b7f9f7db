"""Figure: how much of the errors is linear in the sites' vectors, and through which part their effect goes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from circuitflow.jobs import Output
from circuitflow.models.sites import in_depth_order
from circuitflow.plots.error_series import places
from circuitflow.plots.style import Style, drawing, footnote, grid, new_figure, save, style_of
from circuitflow.plots.tables import Table, rows, unit_of
from circuitflow.store.tables import read_table

SHARES = {
    "linear_share": ("of the error ε, by a linear function of x", "error", "^"),
    "norm_share": ("of its norm ‖ε‖, by one", "train", "D"),
    "fvu": ("of x: unexplained by the features (FVU)", "muted", "s"),
}
PARTS = {
    "effect_linear": ("linear part ε̂", "feature", "o"),
    "effect_rest": ("rest ε − ε̂", "complement", "D"),
    "effect_skipped": ("skipped tokens", "random", "s"),
    "effect": ("whole error", "error", "^"),
}
SPLIT = "train"
NOTE = (
    "Left: shares of variance on {tokens} held-out tokens, with 95 % bootstrap intervals over blocks of text; the "
    "linear function is a ridge regression on other text. Right: AtP effects, means over {n} {split} pairs with 95 % "
    "bootstrap intervals over pairs; linear part, rest and skipped tokens add up to the whole error. IE > 0 supports "
    "the clean answer. Skipped: tokens (attention sinks) that the dictionary was not made for."
)


def plot_error_decomposition(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Predictable shares of the errors, and their effect split into the linear part's and the rest's.

    Input ``decomposition`` (table of decompose_errors); params ``style``, optionally ``metric``; outputs ``png``,
    ``svg``.
    """
    style = style_of(params)
    with drawing(style):
        figure = draw(read_table(inputs["decomposition"]), style, unit_of(params.get("metric")))
        save(figure, out, style)


def draw(table: Table, style: Style, unit: str = "logits") -> Figure:
    """The figure, from the table of the decomposition."""
    sites = in_depth_order(table["site"])
    corpus, effects = rows(table, data="corpus"), rows(table, data=SPLIT)
    parts = [
        name
        for name in PARTS
        if name != "effect_skipped" or np.any(rows(effects, quantity=name)["value"] != 0)
    ]
    figure = new_figure(max(9.0, 3 + 0.8 * len(sites)), 3.7)
    left, right = figure.subplots(1, 2)
    _by_site(left, corpus, sites, {name: SHARES[name] for name in SHARES}, style)
    _by_site(right, effects, sites, {name: PARTS[name] for name in parts}, style)
    left.set(title="Share of the variance", ylabel="share", ylim=(0, 1.3), yticks=np.arange(6) / 5)
    right.set(title="Effect of the error nodes", ylabel=f"IE ({unit})")
    bottom, top = right.get_ylim()
    right.set_ylim(bottom, top + 0.3 * (top - bottom))  # room for the legend
    right.axhline(0, color=style.palette.muted, linewidth=0.8, zorder=0)
    left.legend(loc="upper left", fontsize=style.font_size * 0.8)
    right.legend(loc="upper left", fontsize=style.font_size * 0.8)
    tokens = int(corpus["n"].max(initial=0))
    n = int(effects["n"].max(initial=0))
    footnote(figure, NOTE.format(tokens=tokens, n=n, split=SPLIT), style)
    return figure


def _by_site(
    axes: Axes,
    table: Table,
    sites: Sequence[str],
    quantities: Mapping[str, tuple[str, str, str]],
    style: Style,
) -> None:
    for order, (name, (label, colour, marker)) in enumerate(quantities.items()):
        part = rows(table, quantity=name)
        x = np.array([sites.index(site) for site in part["site"]], float)
        value, low, high = (part[key] for key in ("value", "low", "high"))
        axes.errorbar(
            x + 0.14 * (order - (len(quantities) - 1) / 2),
            value,
            yerr=np.nan_to_num(np.maximum([value - low, high - value], 0)),
            fmt=marker,
            color=getattr(style.palette, colour),
            markersize=5,
            elinewidth=1,
            capsize=2,
            label=label,
        )
    places(axes, sites, room=10)
    grid(axes)
