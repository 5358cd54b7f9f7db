"""Figure: in which of its sites the features of a crosscoder live."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from circuitflow.jobs import Output
from circuitflow.plots.numbers import counted, fixed, whole
from circuitflow.plots.style import Style, drawing, footnote, grid, new_figure, save, style_of
from circuitflow.plots.tables import Table
from circuitflow.plots.variants import say
from circuitflow.store.tables import read_table

BINS = 30
NOTE = (
    "Norms are in units of each site's spread (root mean square distance from its mean). Left: a row is a feature, in "
    "the order of the centre of its squared norm over depth. Middle: dot the median, thick line the middle half, thin "
    "line 5 to 95 % of the features; numbers: features whose norm is largest there. Right: (Σ n²)² / Σ n⁴ over sites, "
    "1 for a feature of one site alone; cosine: mean between decoder rows at neighbouring sites, weighted by norm."
)


def plot_crosscoder_layers(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Norms of decoder rows by site, and over how many sites features are spread.

    Inputs ``features``, ``norms`` (tables of locate_features); params ``style``; outputs ``png``, ``svg``.
    """
    style = style_of(params)
    with drawing(style):
        save(draw(read_table(inputs["features"]), read_table(inputs["norms"]), style), out, style)


def draw(features: Table, norms: Table, style: Style) -> Figure:
    """The figure, from one row a feature and one row a feature and site."""
    sites = list(dict.fromkeys(map(str, norms["site"])))
    alive = (features["density"] > 0) & (features["peak"] != "")
    share, norm = (norms[name].reshape(-1, len(sites))[alive] for name in ("share", "norm"))
    figure = new_figure(10.0, 4.6)
    if not alive.any():
        say(figure.subplots(), "no active feature", style)
        return figure
    panels = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    kept = {name: column[alive] for name, column in features.items()}
    _heatmap(panels[0], share, sites, style)
    _by_site(panels[1], norm, kept["peak"], sites, style)
    _spread(panels[2], kept, len(sites), style)
    silent = len(alive) - int(alive.sum())
    left_out = f"{counted(silent, 'silent one')} left out"
    footnote(figure, f"n = {whole(int(alive.sum()))} features that fire; {left_out}. {NOTE}", style)
    return figure


def _heatmap(axes: Axes, share: np.ndarray, sites: list[str], style: Style) -> None:
    order = np.lexsort((share.argmax(axis=1), (share * np.arange(len(sites))).sum(axis=1)))
    colours = LinearSegmentedColormap.from_list("share", [style.palette.paper, "#9cc3d9", "#123a5e"])
    image = axes.imshow(
        share[order], cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest", rasterized=True
    )
    axes.set_xticks(range(len(sites)), sites, rotation=90 if len(sites) > 4 else 0)
    axes.set(ylabel="features, by depth", title="Share of the squared norm", yticks=[])
    assert axes.figure is not None
    bar = axes.figure.colorbar(image, ax=axes, location="bottom", shrink=0.5, aspect=25, pad=0.02)
    bar.locator = MaxNLocator(2)
    bar.update_ticks()


def _by_site(axes: Axes, norm: np.ndarray, peak: np.ndarray, sites: list[str], style: Style) -> None:
    colour = style.palette.feature
    for row, site in enumerate(sites):
        p5, p25, p50, p75, p95 = np.percentile(norm[:, row], [5, 25, 50, 75, 95])
        axes.plot([p5, p95], [row, row], color=colour, linewidth=1.1, solid_capstyle="butt")
        axes.plot([p25, p75], [row, row], color=colour, linewidth=4.2, solid_capstyle="butt", alpha=0.55)
        axes.plot([p50], [row], "o", color=colour, markersize=4, markeredgecolor="white", markeredgewidth=0.6)
        count = whole(int((peak == site).sum()))
        axes.annotate(
            count, (1.0, row), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=style.palette.muted,
            fontsize=style.font_size * 0.78, xytext=(-2, 2), textcoords="offset points",
        )  # fmt: skip
    axes.set_yticks(range(len(sites)), sites)
    axes.set(ylim=(len(sites) - 0.5, -0.6), xlabel="decoder norm", title="Norm by site")
    axes.set_xlim(left=0, right=axes.get_xlim()[1] * 1.1)
    grid(axes, "x")


def _spread(axes: Axes, features: Table, count: int, style: Style) -> None:
    effective = features["effective"]
    axes.hist(effective, bins=np.linspace(1, count, BINS + 1).tolist(), color=style.palette.feature)
    middle = float(np.median(effective))
    axes.axvline(middle, color=style.palette.text, linewidth=1.3, label=f"median {fixed(middle, 1)}")
    cosine = features["neighbour_cosine"]
    known = cosine[np.isfinite(cosine)]
    if len(known):
        axes.plot([], [], " ", label=f"cosine of neighbours: median {fixed(float(np.median(known)))}")
    axes.set(
        xlim=(1, count), xlabel="effective number of sites", ylabel="features", title="Over how many sites"
    )
    axes.set_ylim(top=axes.get_ylim()[1] * 1.25)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.legend(loc="upper left", handlelength=1.2, fontsize=style.font_size * 0.78)
    grid(axes)
