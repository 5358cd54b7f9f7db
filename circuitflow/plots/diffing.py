"""Figure: what two models share, what each has alone, and whether that holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from circuitflow.jobs import Output
from circuitflow.plots.numbers import counted, fixed, whole
from circuitflow.plots.scales import log_axis
from circuitflow.plots.style import SMALL, Style, drawing, footnote, grid, new_figure, save, style_of
from circuitflow.plots.tables import Table
from circuitflow.plots.variants import say
from circuitflow.store.files import read_json
from circuitflow.store.tables import read_table

BINS = 40
NAMES = {"base": "first model alone", "shared": "shared", "tuned": "second model alone"}
NOTE = (
    "ρ is the second model's decoder norm over both models', each in units of its own spread: 0 the first alone, 1 the "
    "second. ν is what the other model holds along an exclusive feature's direction over what its own does (latent "
    "scaling, Minder et al. 2025): in the error, with the feature's own part put back, and in the reconstruction, the "
    "other model's without that part, its own model's whole. Thin lines: 95 % intervals, bootstrap over blocks; "
    "filled: both intervals end below the dotted lines, hollow: not borne out; values beyond the axes stand at their "
    "ends."
)
NU_RANGE = (-0.25, 1.5)
"""Of ν in the figure; ratios beyond stand at the edge."""


def plot_diffing(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Relative decoder norms, cosines of shared features, the check of exclusive ones, and densities.

    Inputs ``features`` (table), ``summary`` (JSON) of compare_models; params ``style``, ``models`` (names of the two);
    outputs ``png``, ``svg``.
    """
    style = style_of(params)
    with drawing(style):
        figure = draw(read_table(inputs["features"]), read_json(inputs["summary"]), style, params["models"])
        save(figure, out, style)


def draw(table: Table, summary: Mapping[str, Any], style: Style, models: tuple[str, str]) -> Figure:
    """The figure, from the table of features and the summary."""
    keep = (table["density"] > 0) & (table["class"] != "")
    alive = {name: column[keep] for name, column in table.items()}
    figure = new_figure(9.6, 6.8)
    axes = figure.subplots(2, 2)
    _relative_norms(axes[0, 0], alive, summary, style)
    _cosines(axes[0, 1], alive, style)
    _check(axes[1, 0], alive, summary, style)
    _densities(axes[1, 1], alive, summary, style)
    footnote(figure, _note(summary, models, int((_exclusive(alive) & ~_known(alive)).sum())), style)
    return figure


def _colours(style: Style) -> dict[str, str]:
    palette = style.palette
    return {"base": palette.train, "shared": palette.random, "tuned": palette.complement}


def _relative_norms(axes: Axes, alive: Table, summary: Mapping[str, Any], style: Style) -> None:
    """Histogram of ρ; of exclusive features, those that the check does not bear out are pale."""
    edges = np.linspace(0, 1, BINS + 1)
    bottom = np.zeros(BINS)
    for name, colour in _colours(style).items():
        here = alive["class"] == name
        sound = np.isin(alive["verdict"], ("exclusive", ""))
        for part, strength in ((here & sound, 1.0), (here & ~sound, 0.4)):
            counts, _ = np.histogram(alive["rho"][part], edges)
            if not part.any():
                continue
            kind = "" if strength == 1 else ", not borne out"
            label = f"{NAMES[name]}{kind}: {whole(int(part.sum()))}"
            look: dict[str, Any] = {"color": colour, "alpha": strength, "label": label}
            axes.bar(edges[:-1], counts, width=1 / BINS, bottom=bottom, align="edge", **look)
            bottom += counts
    for bound in summary["bounds"]["shared"]:
        axes.axvline(bound, ymax=0.8, color=style.palette.muted, linewidth=0.9, linestyle=":")
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set(xlim=(0, 1), xlabel="relative decoder norm ρ", ylabel="features")
    axes.set_title(f"Which model has each feature (n = {whole(len(alive['rho']))})")
    axes.set_ylim(top=max(1.0, bottom.max()) * 1.45)
    axes.legend(loc="upper center", ncols=2, fontsize=style.font_size * 0.78, handlelength=1.2)
    grid(axes)


def _cosines(axes: Axes, alive: Table, style: Style) -> None:
    """Cosines of the decoder rows of shared features."""
    cosine = alive["cosine"][(alive["class"] == "shared") & np.isfinite(alive["cosine"])]
    axes.set(xlabel="cosine of both models' decoder rows", ylabel="features")
    axes.set_title(f"Shared features' directions (n = {whole(len(cosine))})")
    if not len(cosine):
        say(axes, "no shared feature", style)
        return
    low = min(0.0, float(np.floor(cosine.min() * 10) / 10))
    axes.hist(cosine, bins=np.linspace(low, 1, BINS + 1).tolist(), color=style.palette.random)
    middle = float(np.median(cosine))
    axes.axvline(middle, color=style.palette.text, linewidth=1.3, label=f"median {fixed(middle)}")
    axes.set_xlim(low, 1)
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.legend(loc="upper left")
    grid(axes)


def _check(axes: Axes, alive: Table, summary: Mapping[str, Any], style: Style) -> None:
    """Latent scaling of exclusive features; filled those that hold, in the corner at the lower left."""
    bounds = summary["bounds"]
    known = _known(alive)
    axes.set(
        xlabel="ν of the error: shrunk from the dotted line on", ylabel="ν of the reconstruction: decoupled"
    )
    shown = 0
    for name in ("base", "tuned"):
        here = known & (alive["class"] == name)
        shown += int(here.sum())
        sound = alive["verdict"] == "exclusive"
        for part, filled in ((here & sound, True), (here & ~sound, False)):
            if part.any():
                _with_intervals(
                    axes, {key: column[part] for key, column in alive.items()}, name, filled, style
                )
    axes.axvline(bounds["error_ratio"], color=style.palette.muted, linewidth=0.9, linestyle=":")
    axes.axhline(bounds["reconstruction_ratio"], color=style.palette.muted, linewidth=0.9, linestyle=":")
    axes.set_title(f"Are exclusive features missing in the other model? (n = {whole(shown)})")
    axes.set(xlim=(NU_RANGE[0] - 0.05, NU_RANGE[1] + 0.05), ylim=(NU_RANGE[0] - 0.05, NU_RANGE[1] + 0.05))
    if not shown:
        say(axes, "no exclusive feature whose two ratios are known", style)
        return
    axes.legend(loc="upper right", fontsize=style.font_size * SMALL)
    grid(axes, "both")


def _exclusive(alive: Table) -> np.ndarray:
    return np.isin(alive["class"], ("base", "tuned"))


def _known(alive: Table) -> np.ndarray:
    return np.isfinite(alive["nu_error"]) & np.isfinite(alive["nu_reconstruction"])


def _with_intervals(axes: Axes, part: Table, name: str, filled: bool, style: Style) -> None:
    def inside(column: np.ndarray) -> np.ndarray:
        return np.clip(column, *NU_RANGE)

    x, y = inside(part["nu_error"]), inside(part["nu_reconstruction"])
    colour = _colours(style)[name]
    look: dict[str, Any] = {"color": colour, "alpha": 0.25, "linewidth": 0.8}
    axes.hlines(y, inside(part["nu_error_low"]), inside(part["nu_error_high"]), **look)
    axes.vlines(x, inside(part["nu_reconstruction_low"]), inside(part["nu_reconstruction_high"]), **look)
    label = f"{NAMES[name]}{'' if filled else ', not borne out'}: {whole(len(x))}"
    face = colour if filled else style.palette.paper
    axes.scatter(x, y, s=14, facecolors=face, edgecolors=colour, linewidths=0.9, alpha=0.85, label=label)


def _densities(axes: Axes, alive: Table, summary: Mapping[str, Any], style: Style) -> None:
    """How often features of each ρ fire."""
    for name, colour in _colours(style).items():
        here = alive["class"] == name
        axes.scatter(alive["rho"][here], alive["density"][here], s=9, color=colour, alpha=0.55, linewidths=0)
    for bound in summary["bounds"]["shared"]:
        axes.axvline(bound, color=style.palette.muted, linewidth=0.9, linestyle=":")
    axes.set(xlim=(-0.02, 1.02), xlabel="relative decoder norm ρ", ylabel="share of tokens on which it fires")
    axes.set_title("How often they fire")
    log_axis(axes, "y", alive["density"])
    grid(axes, "both")


def _note(summary: Mapping[str, Any], models: tuple[str, str], hidden: int) -> str:
    first, second = (
        f"{model} (held-out FVU {fixed(summary['fvu'][name], 3)})"
        for model, name in zip(models, ("base", "tuned"), strict=True)
    )
    silent = counted(summary["features"] - summary["alive"], "silent feature")
    without = (
        f"{counted(hidden, 'exclusive feature')} of which a ratio is unknown left out at the lower left; "
    )
    return (
        f"First model: {first}, second: {second}, at {summary['site']}; "
        f"{whole(summary['tokens'])} training tokens compared; "
        f"L0 {fixed(summary['l0'], 1)}; {without if hidden else ''}{silent} left out. {NOTE}"
    )
