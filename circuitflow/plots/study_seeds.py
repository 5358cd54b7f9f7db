"""Figure: whether two trainings that differ in the seed alone find the same features."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from circuitflow.jobs import Output
from circuitflow.plots.numbers import whole
from circuitflow.plots.style import Style, drawing, footnote, grid, new_figure, save, style_of
from circuitflow.plots.tables import Table
from circuitflow.plots.variants import looks, names, rows_height, say, shade_groups
from circuitflow.store.tables import read_table

NOTE = (
    "Features that are active on held-out tokens (n of one and the other seed); each is compared with the "
    "decoder rows of the other seed. Left: largest cosine, thin line 5 to 95 % of the features, thick line "
    "the middle half, dot the mean; cross: the mean if the rows were unrelated. Middle: share of features "
    "with a largest cosine above 0.9, from the first seed to the second (filled) and back (open). Right: the "
    "best one-to-one matching: share of its pairs above 0.9 (filled) and its mean cosine (open)."
)


def plot_study_seeds(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Agreement of dictionaries that differ in the seed alone: one row per pair.

    Input ``seeds`` (table of compare_variants); params ``style``; outputs ``png``, ``svg``.
    """
    style = style_of(params)
    with drawing(style):
        save(draw(read_table(inputs["seeds"]), style), out, style)


def draw(seeds: Table, style: Style) -> Figure:
    """The figure, from the table of pairs."""
    count = len(seeds["label_a"])
    figure = new_figure(8.0, 1.9 + rows_height(max(count, 2)))
    panels = figure.subplots(1, 3, sharey=True, width_ratios=(1.5, 1, 1))
    panels[0].set(title="Largest cosine", xlabel="cosine   ● mean   × unrelated rows")
    panels[1].set(title="With a partner", xlabel="share: ● there   ○ back")
    panels[2].set(title="One to one", xlabel="● share of pairs   ○ cosine")
    if not count:
        say(panels[0], "no two variants differ in the seed alone", style)
        for axes in panels:
            axes.set(xticks=[], yticks=[])
    else:
        _rows(panels, seeds, style)
        called = names(map(str, seeds["group"]))
        labels = [_name(seeds, row, called) for row in range(count)]
        panels[0].set_yticks(range(count), labels)
        panels[0].set_ylim(count - 0.5, -0.5)
        for axes in panels:
            axes.tick_params(axis="y", length=0)
    footnote(figure, NOTE, style)
    return figure


def _rows(panels: Any, seeds: Table, style: Style) -> None:
    found = looks(seeds["label_a"])
    for axes in panels:
        shade_groups(axes, list(seeds["label_a"]), style)
        axes.set_xlim(-0.02, 1.03)
        grid(axes, "x")
    for row in range(len(seeds["label_a"])):
        pair = {name: column[row] for name, column in seeds.items()}
        colour = found[pair["label_a"]].colour
        _distribution(panels[0], row, pair, colour)
        _two(panels[1], row, (pair["partner_share_ab"], pair["partner_share_ba"]), colour)
        _two(panels[2], row, (pair["matched_share"], pair["matched_mean"]), colour)


def _distribution(axes: Axes, row: int, pair: Mapping[str, Any], colour: str) -> None:
    p5, p25, p75, p95 = (pair[f"cosine_p{share}"] for share in ("05", "25", "75", "95"))
    mean = (pair["mean_max_cosine_ab"] + pair["mean_max_cosine_ba"]) / 2
    axes.plot([p5, p95], [row, row], color=colour, linewidth=1.1, solid_capstyle="butt")
    axes.plot([p25, p75], [row, row], color=colour, linewidth=4.2, solid_capstyle="butt", alpha=0.55)
    axes.plot([mean], [row], "o", color=colour, markersize=4, markeredgecolor="white", markeredgewidth=0.6)
    axes.plot([pair["chance"]], [row], "x", color=colour, markersize=4)


def _two(axes: Axes, row: int, values: tuple[float, float], colour: str) -> None:
    axes.plot(values, [row, row], color=colour, linewidth=0.7, alpha=0.5)
    axes.plot(values[1:], [row], "o", markerfacecolor="white", markeredgecolor=colour, markersize=4.8)
    axes.plot(values[:1], [row], "o", color=colour, markersize=3.4)


def _name(seeds: Table, row: int, called: Mapping[str, str]) -> str:
    group, *numbers = (seeds[name][row] for name in ("group", "seed_a", "seed_b", "alive_a", "alive_b"))
    first, second, n_first, n_second = (int(number) for number in numbers)
    return f"{called[str(group)]}, {first}–{second}  n {whole(n_first)}, {whole(n_second)}"
