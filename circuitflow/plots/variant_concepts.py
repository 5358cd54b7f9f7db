"""Figure: how one variant's features came to be, what they are for, and what the activations look like."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from circuitflow.jobs import Output
from circuitflow.plots.clusters import DENSITY, MANY, cluster_points, dot_size, write_apart
from circuitflow.plots.numbers import percent, whole
from circuitflow.plots.scales import log_axis, power, token_axis, tokens
from circuitflow.plots.style import Style, drawing, footnote, grid, new_figure, save, style_of
from circuitflow.plots.tables import Table
from circuitflow.plots.variants import say
from circuitflow.store.tables import read_provenance, read_table

PRESENT = 0.9
NAMED = 8
CELLS = 240  # rows of the picture; a row is the mean of as many features as it must hold
NOTE = (
    "Match: largest cosine of a finished feature's decoder row with any decoder row of the checkpoint; only "
    "the {alive} features that are active on held-out tokens are counted ({silent} are not), those that came "
    "first on top. Present: match above {present}. Lines: median of the matches with bands of 50 and 90 %, "
    "share of features present, mean cosines with the nearest other decoder row and with the own encoder row. "
    "PCA: {points} held-out vectors, outliers left out; colours and numbers: clusters of k-means. Importance: "
    "by how much FVU grows when the feature alone is removed ({harmless} features, worth nothing or less, are "
    "not drawn). Sensitivity: share of its activity that changes when the vectors are displaced at random by "
    "a tenth of ‖x − x̄‖. Numbers: the most important features, as far as there is room."
)


@dataclass(frozen=True)
class Concepts:
    """What the figure shows: tables of study_features, and the facts of the projection."""

    emergence: Table
    checkpoints: Table
    features: Table
    projection: Table
    facts: Mapping[str, Any]


def plot_variant_concepts(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. When features emerged, how they relate, clusters of activations, and importance against sensitivity.

    Inputs ``emergence``, ``checkpoints``, ``features`` and ``projection`` (tables of study_features); params
    ``style``, ``variant`` and ``site`` (for the title); outputs ``png``, ``svg``.
    """
    style = style_of(params)
    names = ("emergence", "checkpoints", "features", "projection")
    facts = read_provenance(inputs["projection"]).get("facts", {})
    shown = Concepts(**{name: read_table(inputs[name]) for name in names}, facts=facts)
    with drawing(style):
        save(draw(shown, f"{params['variant']} · {params['site']}", style), out, style)


def draw(concepts: Concepts, title: str, style: Style) -> Figure:
    """The figure of one variant."""
    figure = new_figure(7.8, 6.9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=style.font_size * 1.1, fontweight="bold")
    panels = figure.subplots(2, 2)
    _matrix(panels[0, 0], concepts, style)
    _cosines(panels[0, 1], concepts, style)
    _projection(panels[1, 0], concepts, style)
    _purpose(panels[1, 1], concepts.features, style)
    alive = int((concepts.features["density"] > 0).sum())
    facts = {
        "alive": whole(alive),
        "harmless": whole(alive - int(_drawn(concepts.features).sum())),
        "silent": whole(len(concepts.features["density"]) - alive),
        "present": PRESENT,
        "points": whole(len(concepts.projection["x"])),
    }
    footnote(figure, NOTE.format(**facts), style)
    return figure


def matches(emergence: Table, features: Table) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the (active features, steps) matrix of matches, features in the order in which they came to be.

    A feature counts from the first step after which it stays present; features that came at the same step are
    in the order of their mean match.
    """
    steps = np.unique(emergence["step"])
    active = features["feature"][features["density"] > 0]
    table = np.full((len(features["feature"]), len(steps)), np.nan)
    table[emergence["feature"], np.searchsorted(steps, emergence["step"])] = emergence["match"]
    table = table[active]
    absent = table <= PRESENT
    came = np.where(absent.any(axis=1), len(steps) - absent[:, ::-1].argmax(axis=1), 0)
    order = np.lexsort((-np.nan_to_num(table).mean(axis=1), came))
    return steps, table[order]


def _matrix(axes: Axes, concepts: Concepts, style: Style) -> None:
    steps, table = matches(concepts.emergence, concepts.features)
    axes.set_title("Which finished features exist when")
    if len(steps) < 2 or not len(table):
        say(axes, "no checkpoints" if len(steps) < 2 else "no active feature", style)
        return
    cells = np.stack([part.mean(axis=0) for part in np.array_split(table, min(len(table), CELLS))])
    extent = (-0.5, len(steps) - 0.5, len(table), 0)
    image = axes.imshow(
        cells, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest", extent=extent
    )
    counted = dict(
        zip(concepts.checkpoints["step"].tolist(), concepts.checkpoints["tokens"].tolist(), strict=True)
    )
    every = max(1, len(steps) // 7)
    places = np.arange(len(steps))[::-1][::every][::-1]
    axes.set_xticks(places, [tokens(counted.get(int(steps[place]), np.nan)) for place in places])
    axes.set(xlabel="training tokens at the checkpoint", ylabel="active features, in order of emergence")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: whole(value)))
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes, label="match (cosine)", shrink=0.9)


def _cosines(axes: Axes, concepts: Concepts, style: Style) -> None:
    steps, table = matches(concepts.emergence, concepts.features)
    checkpoints, palette = concepts.checkpoints, style.palette
    axes.set_title("Cosines during training")
    if len(steps) < 2 or not len(table):
        say(axes, "no checkpoints" if len(steps) < 2 else "no active feature", style)
        return
    place = np.searchsorted(checkpoints["step"], steps)
    x = checkpoints["tokens"][np.minimum(place, len(checkpoints["step"]) - 1)]
    p5, p25, p50, p75, p95 = np.nanpercentile(table, (5, 25, 50, 75, 95), axis=0)
    axes.fill_between(x, p5, p95, color=palette.feature, alpha=0.12, linewidth=0)
    axes.fill_between(x, p25, p75, color=palette.feature, alpha=0.25, linewidth=0)
    axes.plot(x, p50, "o-", color=palette.feature, markersize=3.5, label="match")
    lines = (
        ("present_share", "present", palette.text, "s-"),
        ("nearest_cosine_mean", "nearest row", palette.complement, "^--"),
        ("enc_dec_cosine_mean", "encoder–decoder", palette.train, "D--"),
    )
    for name, label, colour, mark in lines:
        axes.plot(
            checkpoints["tokens"],
            checkpoints[name],
            mark,
            color=colour,
            markersize=3.2,
            linewidth=1.1,
            label=label,
        )
    axes.set(ylim=(0, 1.03), ylabel="cosine, or share of features")
    axes.legend(loc="upper left", bbox_to_anchor=(-0.03, -0.24), ncols=2, handlelength=1.6, borderaxespad=0)
    token_axis(axes)
    grid(axes)


def _projection(axes: Axes, concepts: Concepts, style: Style) -> None:
    table = concepts.projection
    axes.set_title("Activations and their clusters")
    if not len(table["x"]):
        say(axes, "no held-out vector", style)
        return
    cluster_points(axes, table["x"], table["y"], table["cluster"], style)
    explained = [*concepts.facts.get("explained", []), float("nan"), float("nan")]
    for which, share in zip(("x", "y"), explained[:2], strict=True):
        label = f"principal component {1 if which == 'x' else 2}"
        axes.set(
            **{f"{which}label": label + (f" ({percent(share)} of variance)" if np.isfinite(share) else "")}
        )
    grid(axes, "both")


def _drawn(features: Table) -> np.ndarray:
    """(features,) bool: those with a place on logarithmic axes of importance and sensitivity."""
    with np.errstate(invalid="ignore"):
        return np.asarray(
            (features["importance"] > 0) & (features["sensitivity"] > 0) & (features["density"] > 0)
        )


def _purpose(axes: Axes, features: Table, style: Style) -> None:
    importance, sensitivity = (np.asarray(features[name], float) for name in ("importance", "sensitivity"))
    axes.set(
        title="Importance and sensitivity",
        xlabel="sensitivity (share of activity)",
        ylabel="importance (FVU gained)",
    )
    shown = _drawn(features)
    if not shown.any():
        say(axes, "no feature matters", style)
        return
    logs = np.log10(np.maximum(features["density"][shown], 1e-12))
    points = axes.scatter(
        sensitivity[shown],
        importance[shown],
        s=dot_size(int(shown.sum())),
        c=logs,
        cmap=DENSITY,
        linewidths=0,
        rasterized=int(shown.sum()) > MANY,
    )
    log_axis(axes, "x", sensitivity[shown])
    log_axis(axes, "y", importance[shown])
    first = np.flatnonzero(shown)[np.argsort(-importance[shown], kind="stable")][:NAMED]
    places = list(zip(sensitivity[first], importance[first], strict=True))
    write_apart(axes, places, [str(int(number)) for number in features["feature"][first]], style)
    assert axes.figure is not None
    bar = axes.figure.colorbar(points, ax=axes, label="density", shrink=0.9)
    bar.locator = MaxNLocator(4, integer=True)
    bar.formatter = FuncFormatter(lambda value, _: power(value))
    bar.update_ticks()
    grid(axes, "both")
