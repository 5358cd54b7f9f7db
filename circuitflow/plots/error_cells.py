"""Cells coloured by F, the whole model's 1 in the middle of the scale, with their numbers where there is room."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.image import AxesImage

from circuitflow.plots.numbers import fixed
from circuitflow.plots.style import TINY, Style

REACH = (0.25, 1.0)
"""Least and greatest distance from 1 that the colours span."""
WRITTEN = (16, 32)
"""Columns and rows up to which numbers are written into cells."""
DARK = 0.7
"""Share of the span from which on numbers are white."""


def cells(
    axes: Axes, values: np.ndarray, style: Style, below: Sequence[Sequence[str]] | None = None
) -> AxesImage:
    """Draw (rows, columns) of F; unknown cells stay empty.

    :param below: smaller text under each number (intervals), in the same layout.
    """
    palette = style.palette
    distance = np.abs(values - 1)
    reach = float(np.clip(np.nanmax(distance, initial=0), *REACH))
    colours = LinearSegmentedColormap.from_list("F", [palette.complement, palette.paper, palette.circuit])
    image = axes.imshow(
        values, cmap=colours, vmin=1 - reach, vmax=1 + reach, aspect="auto", interpolation="nearest"
    )
    axes.set_xticks(np.arange(values.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(values.shape[0] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color=palette.grid, linewidth=0.6)
    axes.tick_params(which="both", length=0)
    if values.shape[1] <= WRITTEN[0] and values.shape[0] <= WRITTEN[1]:
        _write(axes, values, reach, style, below)
    return image


def colour_bar(axes: Axes, image: AxesImage, label: str) -> None:
    """The scale of the cells beside them."""
    assert axes.figure is not None
    bar = axes.figure.colorbar(
        image, ax=axes, extend="both", extendfrac=0.03, pad=0.01, fraction=0.03, aspect=25
    )
    bar.set_label(label)


def _write(
    axes: Axes, values: np.ndarray, reach: float, style: Style, below: Sequence[Sequence[str]] | None
) -> None:
    for (row, column), value in np.ndenumerate(values):
        if not np.isfinite(value):
            continue
        dark = abs(value - 1) > DARK * reach
        look: dict[str, Any] = {
            "ha": "center",
            "color": style.palette.paper if dark else style.palette.text,
        }
        small = style.font_size * TINY
        if below is None:
            axes.text(column, row, fixed(value), va="center", fontsize=small * 1.1, **look)
            continue
        axes.text(column, row - 0.04, fixed(value), va="bottom", fontsize=small * 1.2, **look)
        axes.text(column, row + 0.08, below[row][column], va="top", fontsize=small, **look)
