"""Figure: the clusters of a task's contexts, in their principal plane and by example."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from circuitflow.features.tokens import visible
from circuitflow.jobs import Output
from circuitflow.plots.clusters import COLOURS, write
from circuitflow.plots.numbers import fixed, percent
from circuitflow.plots.style import (
    SMALL,
    Style,
    drawable,
    drawing,
    fitting,
    footnote,
    new_figure,
    save,
    style_of,
    text_width,
)
from circuitflow.plots.tables import Table, rows
from circuitflow.store.tables import read_provenance, read_table

EXAMPLES = 5
WIDTH, HEIGHT = 9.6, 3.6  # inches; higher where there are many examples
LINE = 0.165  # inches of a line of text
CONTEXT, ANSWER = 3.9, 1.0  # inches of an example
MARKERS = {"train": "o", "test": "D"}
SEEN = {
    "activations": "directions of activations at the position of the answer, less their mean,",
    "gradients": "the metric's gradients, summed over positions,",
}
NOTE = (
    "K-means of {what} at {site}, scaled to length 1{components}; centres are fitted on training contexts, test "
    "contexts belong to the nearest. Left: the first two principal components of the training vectors ({shares} of "
    "their variance); a number stands at each cluster's median. Right: the training contexts nearest to each centre, "
    "the right answer in bold.{silhouette}"
)


def plot_clusters(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Clusters in their principal plane, and contexts of each.

    Input ``clusters`` (table of cluster_contexts); params ``style``; outputs ``png``, ``svg``.
    """
    style = style_of(params)
    provenance = read_provenance(inputs["clusters"])
    with drawing(style):
        save(
            draw(read_table(inputs["clusters"]), provenance["params"] | provenance["clusters"], style),
            out,
            style,
        )


def draw(clusters: Table, facts: Mapping[str, Any], style: Style) -> Figure:
    """The figure, from the table of clusters; ``facts``: by, site, components, explained, silhouette."""
    numbers = sorted(set(clusters["cluster"].tolist()))
    lines = sum(2 + min(EXAMPLES, _count(clusters, number, "train")) for number in numbers)
    figure = new_figure(WIDTH, max(HEIGHT, LINE * (lines + 2) + 0.8))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    _plane(left, clusters, facts["explained"], style)
    _examples(right, clusters, numbers, lines, style)
    footnote(figure, _note(facts), style)
    return figure


def _plane(axes: Axes, clusters: Table, explained: list[float], style: Style) -> None:
    for split, marker in MARKERS.items():
        part = rows(clusters, split=split)
        colours, muted = [colour_of(number) for number in part["cluster"]], style.palette.muted
        look: dict[str, Any] = {"marker": marker, "s": 15, "linewidths": 0.9}
        filled = split == "train"
        axes.scatter(
            part["x"], part["y"], facecolors=colours if filled else "none", edgecolors=colours, **look
        )
        label = f"{split} ({len(part['x'])} contexts)"
        axes.scatter([], [], facecolors=muted if filled else "none", edgecolors=muted, label=label, **look)
    for number in np.unique(clusters["cluster"]):
        here = rows(clusters, cluster=number)
        place = float(np.median(here["x"])), float(np.median(here["y"]))
        write(axes, place, str(int(number)), style, fontweight="bold")
    names = [f"component {i + 1} ({percent(share)} of variance)" for i, share in enumerate(explained)]
    axes.set(title="Clusters of contexts", xlabel=names[0], ylabel=names[1])
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, handletextpad=0.2)


def _examples(axes: Axes, clusters: Table, numbers: list[int], lines: int, style: Style) -> None:
    """A block of lines per cluster: its number and sizes, then contexts whose ends meet their answers."""
    axes.set_axis_off()
    axes.set(title="Contexts nearest to each centre", xlim=(0, CONTEXT + ANSWER), ylim=(lines, 0))
    size, line = style.font_size * SMALL, 0.5
    for number in numbers:
        train, test = (_count(clusters, number, split) for split in MARKERS)
        axes.plot([0.06], [line], "o", color=colour_of(number), markersize=6, clip_on=False)
        axes.text(
            0.18,
            line,
            f"cluster {number}: {train} train, {test} test",
            fontweight="bold",
            va="center",
            fontsize=size,
        )
        nearest = rows(clusters, cluster=number, split="train")
        for row in np.argsort(nearest["distance"], kind="stable")[:EXAMPLES]:
            line += 1
            context = ending(drawable(visible_text(nearest["text"][row])), CONTEXT - 0.2, size)
            answer = fitting(drawable(visible(nearest["answer"][row])), ANSWER / 1.15, size)
            axes.text(CONTEXT, line, context, ha="right", va="center", fontsize=size)
            axes.text(CONTEXT + 0.04, line, answer, va="center", fontsize=size, fontweight="bold")
        line += 2


def ending(text: str, inches: float, size: float) -> str:
    """The end of a text, with "…" before it where the whole is wider than ``inches`` at ``size`` points."""
    if text_width(text, size) <= inches:
        return text
    kept = ""
    for character in reversed(text):
        if text_width(f"…{character}{kept}", size) > inches:
            break
        kept = character + kept
    return f"…{kept.lstrip()}"


def visible_text(text: str) -> str:
    """A context on one line: line breaks as signs, spaces as they are."""
    return "".join(character if character == " " else visible(character) for character in text)


def colour_of(cluster: int) -> str:
    """Colour of a cluster."""
    return COLOURS[int(cluster) % len(COLOURS)]


def _count(clusters: Table, number: int, split: str) -> int:
    return int(np.sum((clusters["cluster"] == number) & (clusters["split"] == split)))


def _note(facts: Mapping[str, Any]) -> str:
    silhouette, components = facts["silhouette"], facts["components"]
    return NOTE.format(
        what=SEEN[facts["by"]],
        site=facts["site"],
        components=f", on their first {components} principal components" if components else "",
        shares=percent(sum(facts["explained"])),
        silhouette=""
        if silhouette is None
        else f" Mean silhouette of training contexts: {fixed(silhouette)}.",
    )
