"""Settling where things stand before a figure is saved, so that equal work gives equal bytes."""

from matplotlib.figure import Figure

DIGITS = 6
"""Of positions, as shares of the figure: far finer than a pixel, far coarser than what the solver leaves to chance."""


def settle(figure: Figure, dpi: float) -> None:
    """Lay the figure out once, for every file that is made of it, and round the places of its axes.

    The last bits of the solver's results depend on addresses in memory, and SVG names clip paths by them.
    """
    figure.set_dpi(dpi)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        left, bottom, width, height = axes.get_position(original=True).bounds
        axes.set_position(tuple(round(value, DIGITS) for value in (left, bottom, width, height)))
