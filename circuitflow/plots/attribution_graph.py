"""Figure: the attribution graph of one prompt. Columns are tokens, rows are layers, the outputs stand on top."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch, Rectangle
from matplotlib.path import Path as Curve

from circuitflow.graphs.formats.viewer_reading import Viewed, read_viewer
from circuitflow.graphs.graph import NO_TOKEN
from circuitflow.jobs import Output
from circuitflow.plots.circuit_marks import (
    BAND,
    FAINTEST,
    LABEL,
    STRONGEST,
    edge_opacity,
    edge_width,
    legend_below,
    mark,
    sign_colour,
    tint,
    widths,
)
from circuitflow.plots.graph_layout import BOTTOM, BOX, GAP, HEIGHT, LOGITS, TOKENS, Place, arrange
from circuitflow.plots.graph_routes import rounded_curve, straight_routes
from circuitflow.plots.numbers import counted, fixed, number, percent, whole
from circuitflow.plots.style import SMALL, Style, drawable, drawing, fitting, save, shown, style_of, wrapped

MOST_COLUMNS = 16
"""Prompts of more tokens show only those with nodes or edges."""


@dataclass(frozen=True)
class Picture:
    """What is drawn of a graph: its most influential nodes and strongest edges."""

    view: Viewed
    max_nodes: int
    max_edges: int

    @cached_property
    def influence(self) -> np.ndarray:
        """(n_nodes,) of each node within the pruned graph."""
        return self.view.kept.influence

    @cached_property
    def inner(self) -> list[int]:
        """Features and errors that are drawn, in the order of their numbers."""
        strongest = np.argsort(-self.influence[: self.view.graph.first_token], kind="stable")
        return sorted(strongest[: self.max_nodes].tolist())

    @cached_property
    def edges(self) -> list[int]:
        """Numbers of the edges that are drawn: those with the largest share among drawn nodes, the weakest first."""
        graph, kept = self.view.graph, self.view.kept
        drawn = np.zeros(graph.n_nodes, dtype=bool)
        drawn[self.inner] = True
        drawn[graph.first_token :] = True
        inside = np.flatnonzero(drawn[kept.edges].all(axis=1))
        order = inside[np.argsort(-kept.shares[inside], kind="stable")]
        return [int(number) for number in order[: self.max_edges][::-1]]

    @cached_property
    def strongest(self) -> float:
        """The largest share of an edge."""
        return max((float(self.view.kept.shares[edge]) for edge in self.edges), default=0.0) or 1.0

    @cached_property
    def place(self) -> Place:
        """Where everything stands."""
        graph = self.view.graph
        layers, positions = graph.layers(), graph.positions()
        cells: dict[int, dict[int, list[str]]] = {}
        for node in sorted(
            self.inner, key=lambda node: (layers[node], positions[node], -self.influence[node])
        ):
            cell = cells.setdefault(int(layers[node]), {})
            cell.setdefault(int(positions[node]), []).append(str(node))
        used = {int(positions[up]) for up in self.view.kept.edges[self.edges, 1]} | {graph.n_pos - 1}
        used |= {at for cell in cells.values() for at in cell}
        columns = [at for at in range(graph.n_pos) if at in used or graph.n_pos <= MOST_COLUMNS]
        tokens = {at: str(graph.first_token + at) for at in columns}
        return arrange(cells, tokens, [str(node) for node in range(graph.first_logit, graph.n_nodes)])


def plot_attribution_graph(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. The pruned graph of one prompt over its tokens and layers.

    Input ``graph`` (graph.json of export_graph, or a viewer's file from elsewhere); params ``style``, ``max_nodes``
    (features and errors, the most influential), ``max_edges``; outputs ``png``, ``svg``.
    """
    style = style_of(params)
    picture = Picture(read_viewer(Path(inputs["graph"])), int(params["max_nodes"]), int(params["max_edges"]))
    with drawing(style):
        save(draw(picture, style), out, style)


def draw(picture: Picture, style: Style) -> Figure:
    """The figure; lengths are inches throughout."""
    layout = picture.place.layout
    figure = Figure(figsize=(layout.width, layout.height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, layout.width), ylim=(0, layout.height))
    axes.set_axis_off()
    _frame(axes, picture, style)
    _edges(axes, picture, style)
    graph = picture.view.graph
    for node in picture.inner:
        _inner(axes, picture, node, style)
    for at, column in picture.place.columns.items():
        _token(axes, picture, at, column, style)
    for node in range(graph.first_logit, graph.n_nodes):
        _logit(axes, picture, node, style)
    _legend(axes, picture, style)
    return figure


def _frame(axes: Axes, picture: Picture, style: Style) -> None:
    """Title, rows with their layers, borders of columns."""
    place, graph = picture.place, picture.view.graph
    layout = place.layout
    title = fitting(
        drawable(graph.prompt.strip().replace("\n", "↵")), layout.width - 0.3, style.font_size * 1.3
    )
    axes.text(0.12, layout.height - 0.12, title, fontweight="bold", fontsize=style.font_size * 1.3, va="top")
    names = [str(value) for key in ("model", "dictionaries") if (value := graph.facts.get(key))]
    axes.text(
        0.12, layout.height - 0.38, " · ".join(names), fontsize=style.font_size * SMALL, va="top",
        color=style.palette.muted,
    )  # fmt: skip
    for row, (name, (low, high)) in enumerate(place.bands.items()):
        if row % 2:
            axes.add_patch(Rectangle((0, low), layout.width, high - low, color=BAND, linewidth=0, zorder=0))
        axes.text(0.12, (low + high) / 2, name, fontweight="bold", va="center_baseline", zorder=4)
    top = place.bands[LOGITS][0] if LOGITS in place.bands else layout.height - 0.6
    line: dict[str, Any] = {"color": style.palette.grid, "linewidth": 0.8, "zorder": 0.5}
    for x in sorted({x for left, width in place.columns.values() for x in (left, left + width)}):
        axes.plot([x, x], [place.bands[TOKENS][0], top], **line)
    if LOGITS in place.bands:
        _last_column(axes, picture, line)
        low, high = place.bands[LOGITS]
        axes.text(
            0.12, (low + high) / 2 - 0.16, f"after {graph.n_pos - 1}", fontsize=style.font_size * SMALL,
            va="center_baseline", color=style.palette.muted, zorder=4,
        )  # fmt: skip


def _last_column(axes: Axes, picture: Picture, line: Mapping[str, Any]) -> None:
    """Borders of the last column go on around the logits, which are its next token."""
    place, graph = picture.place, picture.view.graph
    low, high = place.bands[LOGITS]
    left, width = place.columns[graph.n_pos - 1]
    boxes = [place.layout.places[str(node)][0] for node in range(graph.first_logit, graph.n_nodes)]
    for border, outer in (
        (left, min(left, min(boxes) - GAP)),
        (left + width, max(left + width, max(boxes) + BOX + GAP)),
    ):
        axes.plot([border, outer, outer], [low, low, high], **line)


def _edges(axes: Axes, picture: Picture, style: Style) -> None:
    kept, graph = picture.view.kept, picture.view.graph
    ends = {edge: (str(kept.edges[edge, 1]), str(kept.edges[edge, 0])) for edge in picture.edges}
    ways = straight_routes(list(ends.values()), picture.place.grid, picture.place.layout)
    for edge in picture.edges:
        way = list(ways[ends[edge]])
        up = int(kept.edges[edge, 1])
        if graph.kind(up) == "token":
            way[0] = _out_of_token(picture, up - graph.first_token, way[0])
        share = float(kept.shares[edge]) / picture.strongest
        patch = PathPatch(
            Curve(*rounded_curve(way)),
            facecolor="none",
            edgecolor=sign_colour(float(kept.weights[edge]), style),
            linewidth=edge_width(share),
            alpha=edge_opacity(share) * 0.8,
            capstyle="butt",
            joinstyle="round",
            zorder=1,
        )
        patch.set_gid("edge-{}-{}".format(*(graph.node_id(int(ends[edge][side])) for side in (0, 1))))
        axes.add_patch(patch)


def _out_of_token(picture: Picture, at: int, start: tuple[float, float]) -> tuple[float, float]:
    """Where an edge leaves a token, whose box is as narrow as its column."""
    left, width = picture.place.columns[at]
    middle = left + width / 2
    return middle + (start[0] - middle) * min(1.0, (width - 0.1) / BOX), start[1]


def _inner(axes: Axes, picture: Picture, node: int, style: Style) -> None:
    """A feature (circle, its number, what it is) or an error (diamond), the darker the more influential."""
    graph, palette = picture.view.graph, style.palette
    error = graph.kind(node) == "error"
    most = float(picture.influence[picture.inner].max()) or 1.0
    colour = palette.error if error else palette.feature
    share = float(picture.influence[node]) / most
    left, middle = _box(
        axes, picture, node, tint(colour, FAINTEST + (STRONGEST - FAINTEST) * share, style), colour
    )
    name = "error" if error else f"#{graph.features[node, 2]}"
    words = (
        ""
        if error
        else picture.view.labels.get((int(graph.features[node, 0]), int(graph.features[node, 2])), "")
    )
    first = middle + (0.072 if words else 0)
    axes.plot(
        [left + 0.1], [first], "D" if error else "o", markersize=4.8 if error else 4.5, color=colour, zorder=4
    )
    size = style.font_size * LABEL
    text: dict[str, Any] = {"va": "center_baseline", "zorder": 4, "fontsize": size}
    axes.text(left + 0.19, first, fitting(name, BOX - 0.22, size), **text)
    if words:
        axes.text(left + 0.07, middle - 0.075, fitting(drawable(words), BOX - 0.1, size), **text)


def _token(axes: Axes, picture: Picture, at: int, column: tuple[float, float], style: Style) -> None:
    graph = picture.view.graph
    node = graph.first_token + at
    left, width = column[0] + 0.05, column[1] - 0.1
    narrow = min(width, BOX)
    left += (width - narrow) / 2
    size = style.font_size
    _, middle = _box(axes, picture, node, style.palette.paper, style.palette.muted, (left, narrow))
    words: dict[str, Any] = {"ha": "center", "va": "center_baseline", "zorder": 4}
    token = fitting(shown([graph.tokens[at]])[0], narrow - 0.06, size)
    axes.text(left + narrow / 2, middle + 0.055, token, fontsize=size, **words)
    small = size * SMALL * 0.9
    axes.text(left + narrow / 2, middle - 0.09, str(at), fontsize=small, color=style.palette.muted, **words)


def _logit(axes: Axes, picture: Picture, node: int, style: Style) -> None:
    graph, size = picture.view.graph, style.font_size
    rank = node - graph.first_logit
    left, middle = _box(axes, picture, node, style.palette.paper, style.palette.text)
    words: dict[str, Any] = {"ha": "center", "va": "center_baseline", "zorder": 4}
    token = fitting(shown([graph.logit_tokens[rank]])[0], BOX - 0.08, size)
    axes.text(left + BOX / 2, middle + 0.065, token, fontsize=size, fontweight="bold", **words)
    weight = float(graph.probabilities[rank])
    told = f"weight {number(weight)}" if graph.logits[rank] == NO_TOKEN else percent(weight, 1)
    axes.text(left + BOX / 2, middle - 0.085, told, fontsize=size * SMALL, color=style.palette.muted, **words)


def _box(
    axes: Axes,
    picture: Picture,
    node: int,
    face: Any,
    colour: str,
    span: tuple[float, float] | None = None,
) -> tuple[float, float]:
    """The node's box; gives its left edge and middle height."""
    left, middle = picture.place.layout.places[str(node)]
    at, width = span or (left, BOX)
    error, inset = picture.view.graph.kind(node) == "error", 0.03
    box = FancyBboxPatch(
        (at + inset, middle - HEIGHT / 2 + inset),
        width - 2 * inset,
        HEIGHT - 2 * inset,
        boxstyle=f"square,pad={inset}" if error else f"round,pad={inset},rounding_size=0.05",
        facecolor=face,
        edgecolor=colour,
        linewidth=1.3 if error else 0.7,
        zorder=3,
    )
    box.set_gid(f"node-{picture.view.graph.node_id(node)}")
    axes.add_patch(box)
    return at, middle


def _legend(axes: Axes, picture: Picture, style: Style) -> None:
    palette = style.palette
    marks = [
        mark("feature: number, what it is", marker="o", markersize=5, color=palette.feature),
        mark("error: what dictionaries leave over", marker="D", markersize=5, color=palette.error),
        mark("raises the upper node", linestyle="-", linewidth=3, color=palette.positive),
        mark("lowers it", linestyle="-", linewidth=3, color=palette.negative),
    ]
    if picture.edges:
        marks += widths(
            lambda share: f"edge with {percent(share * picture.strongest, 2)} of the influence", palette.muted
        )
    legend_below(axes, marks, 4, style)
    size = style.font_size * SMALL
    lines = wrapped(note(picture), picture.place.layout.width - 0.9, size)
    axes.text(0.12, BOTTOM - 0.1, "\n".join(lines), fontsize=size, color=palette.muted, va="top")


def note(picture: Picture) -> str:
    """How much of the graph is drawn, how it was pruned, its scores, and what the marks mean."""
    view, facts = picture.view, picture.view.facts
    graph, kept = view.graph, view.kept
    inner = np.arange(graph.first_token)
    counts = []
    for kind, noun, known in (("feature", "feature", "features"), ("error", "error", "errors")):
        here = sum(graph.kind(int(node)) == kind for node in picture.inner)
        in_file = sum(graph.kind(int(node)) == kind for node in inner)
        whole = facts.get("sizes", {}).get(known)
        of = f" of {in_file} kept" if here < in_file else " kept"
        counts.append(counted(here, noun) + of + (f" of {whole}" if whole is not None else ""))
    edges = f"the {len(picture.edges)} strongest of {len(kept.edges)} edges"
    edges = f"all {len(kept.edges)} edges" if len(picture.edges) == len(kept.edges) else edges
    said = [f"{' and '.join(counts)}; {edges}."]
    pruned = graph.facts.get("pruned") or {}
    if pruned:
        shares = [f"{key.split('_')[0]}s to {percent(float(value))}" for key, value in sorted(pruned.items())]
        said.append(f"Pruned: {', '.join(reversed(shares))} of their influence on the outputs.")
    scores = facts.get("scores") or {}
    if scores:
        values = ", ".join(f"{name} {fixed(float(scores[name]))}" for name in ("replacement", "completeness"))
        said.append(f"Scores of {_scored(graph.facts)}: {values}.")
    directions = (graph.logits == NO_TOKEN).any()
    weighted = "Combinations of logits have a weight in its place. " if directions else ""
    said.append(
        "Edges are direct effects with attention patterns and norm scales held; their width is their share of the "
        "influence on the outputs, and so is the tint of nodes. Percentages at the top: probability of the token after "
        f"the last position ({graph.n_pos - 1}). "
        f"{weighted}One prompt, so nothing is sampled."
    )
    return " ".join(said)


def _scored(facts: Mapping[str, Any]) -> str:
    """Of what part of the graph its scores are."""
    done, active = facts.get("expanded_features"), facts.get("active_features")
    if done is None or active is None or done >= active:
        return "the whole graph"
    return f"the part that has rows ({whole(done)} of {counted(active, 'active feature')})"
