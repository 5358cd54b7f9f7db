"""What the figures about error nodes share: names of windows, series with intervals, the axis of F."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from circuitflow.jobs import Output
from circuitflow.models.sites import parse_site
from circuitflow.plots.methods import NAMES
from circuitflow.plots.style import TINY, Style, drawing, grid, save, style_of
from circuitflow.plots.tables import Table
from circuitflow.store.tables import read_provenance, read_table

LIMITS = (-0.6, 1.6)
"""F is drawn at most within this range."""
CROWDED = 14
"""Labels that fit side by side in one panel."""
NOTE_F = (
    "n = {n} test prompts. F = (m − m(∅)) / (m(M) − m(∅)); m: metric, M: whole model, ∅: every node replaced. "
    "{marks}: 95 % bootstrap intervals over prompts.{outside} Ablation: {ablation}. Error nodes of {kinds} sites."
)


def figure_of_experiments(
    inputs: Mapping[str, Path],
    params: Mapping[str, Any],
    out: Output,
    draw: Callable[[Table, Mapping[str, Any], Style], Figure],
) -> None:
    """What every stage that draws the table of experiments does."""
    style = style_of(params)
    table, facts = experiments_of(inputs)
    facts = {**facts, "method": params.get("method")}
    with drawing(style):
        save(draw(table, facts, style), out, style)


def experiments_of(inputs: Mapping[str, Path]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The table of ablate_error_nodes and what its provenance says."""
    return read_table(inputs["experiments"]), read_provenance(inputs["experiments"])


def scores_of(facts: Mapping[str, Any]) -> str:
    """The scores of nodes by their method, where the figure was told (``facts["method"]``)."""
    method = facts.get("method")
    return (
        f"{NAMES.get(str(method), str(method))} scores" if method else "scores (of the run's scores.method)"
    )


def layers(first: str, last: str) -> str:
    """The layers of a window in short: "12" or "6–12"."""
    names = [_layer(site) for site in (first, last)]
    return names[0] if names[0] == names[1] else f"{names[0]}–{names[1]}"


def window_names(table: Table, which: str = "") -> list[str]:
    """The layers of the window in every row; of the restored range with ``which`` "restored_"."""
    pairs = zip(table[f"{which}first"].tolist(), table[f"{which}last"].tolist(), strict=True)
    return [layers(first, last) if first else "none" for first, last in pairs]


def series(axes: Axes, x: np.ndarray, part: Table, **look: Any) -> None:
    """F with its intervals; points beyond what is drawn sit at the edge."""
    value = np.clip(part["F"], *LIMITS)
    low, high = (np.clip(part[name], *LIMITS) for name in ("low", "high"))
    spread = np.nan_to_num(np.maximum([value - low, high - value], 0))
    axes.errorbar(x, value, yerr=spread, **{"elinewidth": 0.9, "capsize": 0, "markersize": 4, **look})


def faithfulness_axis(axes: Axes, table: Table, style: Style, label: str = "F") -> None:
    """The axis of F, with lines at the whole model and at the empty circuit; the same for all panels of one table."""
    for level in (0.0, 1.0):
        axes.axhline(level, color=style.palette.muted, linewidth=0.9, linestyle=":", zorder=0)
    low, high = np.nanmin([table["F"], table["low"]]), np.nanmax([table["F"], table["high"]])
    axes.set_ylim(max(LIMITS[0], min(low, 0) - 0.05), min(LIMITS[1], max(high, 1) + 0.05))
    axes.set_ylabel(label)
    grid(axes)


def places(axes: Axes, names: Sequence[str], label: str = "", room: int = CROWDED) -> None:
    """Names of places 0, 1, … along x; every second, third, … where they would not fit.

    :param room: half the labels that fit when turned; up to half as many stand upright.
    """
    step = max(1, -(-len(names) // (2 * room)))
    shown = range(0, len(names), step)
    turned: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(list(shown), [names[at] for at in shown], **(turned if len(names) > room / 2 else {}))
    spare = max(0.0, (3 - len(names)) / 2)  # so that one or two places do not fill a panel
    axes.set_xlim(-0.5 - spare, len(names) - 0.5 + spare)
    axes.set_xlabel(label)


def notes(table: Table, facts: Mapping[str, Any], marks: str = "Bars") -> str:
    """The footnote on F; ``marks`` says what shows the intervals."""
    outside = int(np.sum((table["F"] < LIMITS[0]) | (table["F"] > LIMITS[1])))
    counts = sorted({int(n) for n in table["n"]})
    return NOTE_F.format(
        marks=marks,
        n=counts[0] if len(counts) == 1 else f"{counts[0]}–{counts[-1]}",
        outside=f" {outside} points beyond the axis are drawn at its end." if outside else "",
        ablation=str(facts.get("conventions", {}).get("ablation", "mean")).partition(";")[0],
        kinds=", ".join(facts.get("kinds", [])) or "the",
    )


def say_nothing(axes: Axes, why: str, style: Style) -> None:
    """An empty panel that says why it is empty."""
    axes.set_axis_off()
    look: dict[str, Any] = {"color": style.palette.muted, "fontsize": style.font_size * TINY * 1.2}
    axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes, **look)


def _layer(site: str) -> str:
    parsed = parse_site(site)
    return parsed.kind if parsed.layer is None else str(parsed.layer)
