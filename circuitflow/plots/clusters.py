"""Points with clusters: colours, numbers at the places of the clusters, and a colour bar for quantities."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_hex
from matplotlib.patheffects import withStroke

from circuitflow.plots.numbers import whole
from circuitflow.plots.style import Style

NOISE = -1
NUMBERED = 24  # clusters that get their number
MANY = 2000  # points beyond which they are drawn as pixels in SVG
COLOURS = tuple(
    to_hex(colormaps["tab20"](place)) for place in (*range(0, 14, 2), 16, 18, *range(1, 14, 2), 17, 19)
)
DENSITY = ListedColormap(colormaps["viridis_r"](np.linspace(0.1, 1, 256)), "density")
"""Of log density: the rare ones pale, but not so pale that paper hides them."""


def cluster_colours(clusters: np.ndarray, style: Style) -> list[str]:
    """A colour per point: neighbouring numbers differ, points of no cluster are grey."""
    return [style.palette.grid if c == NOISE else COLOURS[int(c) % len(COLOURS)] for c in clusters]


def dot_size(count: int) -> float:
    """Area of a dot in points²: small where there are many."""
    return float(np.clip(9000 / max(count, 1), 1.5, 14))


def cluster_points(axes: Axes, x: np.ndarray, y: np.ndarray, clusters: np.ndarray, style: Style) -> None:
    """Points coloured by cluster, those of none below the others, and each large cluster's number at its median."""
    order = np.argsort(clusters != NOISE, kind="stable")
    axes.scatter(
        x[order],
        y[order],
        s=dot_size(len(x)),
        c=cluster_colours(clusters[order], style),
        linewidths=0,
        rasterized=len(x) > MANY,
    )
    numbers, counts = np.unique(clusters[clusters != NOISE], return_counts=True)
    for number in numbers[np.argsort(-counts, kind="stable")][:NUMBERED]:
        place = np.median(x[clusters == number]), np.median(y[clusters == number])
        write(axes, place, str(int(number)), style)


def write(axes: Axes, place: tuple[Any, Any], text: str, style: Style, **more: Any) -> None:
    """Small text that can be read on top of points."""
    axes.annotate(
        text,
        place,
        fontsize=style.font_size * 0.8,
        path_effects=[withStroke(linewidth=2, foreground=style.palette.paper)],
        **({"ha": "center", "va": "center"} | more),
    )


def write_apart(
    axes: Axes, places: Sequence[tuple[float, float]], texts: Sequence[str], style: Style
) -> None:
    """Small text to the right of points, the first ones first; what would lie on an earlier one is left out."""
    to_axes = axes.transData + axes.transAxes.inverted()
    taken: list[np.ndarray] = []
    for place, text in zip(places, texts, strict=True):
        here = to_axes.transform(place)
        if all(abs(here[0] - x) > 0.13 or abs(here[1] - y) > 0.045 for x, y in taken):
            write(axes, place, text, style, xytext=(4, 0), textcoords="offset points", ha="left")
            taken.append(here)


def without_ticks(axes: Axes) -> None:
    """A plane whose coordinates have no meaning of their own."""
    axes.set(xticks=[], yticks=[])


def clusters_told(clusters: np.ndarray) -> str:
    """How many clusters there are, and points in none: "12 clusters, 340 points in none"."""
    count = len(np.unique(clusters[clusters != NOISE]))
    noise = int((clusters == NOISE).sum())
    return f"{count} cluster{'s' * (count != 1)}" + (f", {whole(noise)} points in none" if noise else "")
