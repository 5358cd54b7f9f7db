"""What circuit drawings have in common: widths, tints, labels of nodes, legends, how nodes were chosen."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path as Curve

from circuitflow.circuits.circuit import METRIC, Circuit, Edge, Node
from circuitflow.features.descriptions import Description, Descriptions, fires_on, promotes
from circuitflow.plots.circuit_layout import Grid, Layout
from circuitflow.plots.circuit_routes import Route, curve
from circuitflow.plots.numbers import number
from circuitflow.plots.style import SMALL, Style, shown, wrapped

THINNEST, THICKEST = 0.5, 5.0  # points
FAINTEST, STRONGEST = 0.05, 0.55  # opacity of a node's tint
LABEL = 0.94  # of the font size
BAND = "#f4f6f8"
"""Behind every second layer."""


@dataclass(frozen=True)
class Drawing:
    """What is drawn: a circuit with descriptions of its features, and how many of its edges."""

    circuit: Circuit
    descriptions: Descriptions
    max_edges: int
    unit: str = "logits"
    audit: str = ""
    """What the audit says of the circuit, a sentence for the note."""

    @property
    def title(self) -> str:
        """Model and task, if the circuit's provenance names them."""
        made = self.circuit.provenance
        return " · ".join(str(made[name]) for name in ("model", "task") if name in made)

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """The edges with the largest |weight|, the weakest of them first: the strongest are drawn on top."""
        return tuple(sorted(self.circuit.edges, key=lambda edge: -abs(edge.weight))[: self.max_edges][::-1])

    @cached_property
    def numbers(self) -> dict[str, str]:
        """The number of each node in the circuit, "m" for the metric: they name the SVG's groups."""
        return {**{node.id: str(number) for number, node in enumerate(self.circuit.nodes)}, METRIC: "m"}

    @cached_property
    def strongest_edge(self) -> float:
        """The largest |weight|; 1 if there are no edges."""
        return max((abs(edge.weight) for edge in self.edges), default=0.0) or 1.0

    @cached_property
    def strongest_node(self) -> float:
        """The largest |score|; 1 if there are no nodes."""
        return max((abs(node.score) for node in self.circuit.nodes), default=0.0) or 1.0

    def gid(self, edge: Edge) -> str:
        """Name of an edge's group in the SVG."""
        return f"edge-{self.numbers[edge.up]}-{self.numbers[edge.down]}"


def edge_width(share: float) -> float:
    """Line width in points of an edge with ``share`` of the largest |weight|.

    It grows with the square root: the edges into the metric carry whole scores and would make hairlines of all others.
    """
    return THINNEST + (THICKEST - THINNEST) * share**0.5


def edge_opacity(share: float) -> float:
    """Opacity of an edge with ``share`` of the largest |weight|."""
    return 0.35 + 0.5 * share**0.5


def sign_colour(value: float, style: Style) -> str:
    """Colour of what supports (value ≥ 0) or opposes the clean answer."""
    return style.palette.positive if value >= 0 else style.palette.negative


def tint(colour: str, opacity: float, style: Style) -> tuple[float, ...]:
    """The colour laid thinly over the paper, itself opaque, so that no edge shines through a box."""
    front, back = np.array(to_rgba(colour)[:3]), np.array(to_rgba(style.palette.paper)[:3])
    return tuple(float(value) for value in front * opacity + back * (1 - opacity))


def node_box(
    axes: Axes, node: Node, corner: tuple[float, float], size: tuple[float, float], share: float, style: Style
) -> FancyBboxPatch:
    """The node's box: round corners for features, sharp ones and a frame in the error's colour for errors."""
    error, inset = node.kind == "error", 0.03
    colour = sign_colour(node.score, style)
    shape = f"square,pad={inset}" if error else f"round,pad={inset},rounding_size=0.05"
    box = FancyBboxPatch(
        (corner[0] + inset, corner[1] + inset),
        size[0] - 2 * inset,
        size[1] - 2 * inset,
        boxstyle=shape,
        facecolor=tint(colour, FAINTEST + (STRONGEST - FAINTEST) * share, style),
        edgecolor=style.palette.error if error else colour,
        linewidth=1.5 if error else 0.7,
        zorder=3,
    )
    axes.add_patch(box)
    return box


def node_mark(axes: Axes, node: Node, at: tuple[float, float], style: Style) -> None:
    """A disc for a feature, a triangle for an error."""
    error = node.kind == "error"
    colour = style.palette.error if error else style.palette.feature
    axes.plot([at[0]], [at[1]], "^" if error else "o", markersize=6 if error else 4.5, color=colour, zorder=4)


def edge_curve(axes: Axes, edge: Edge, way: Route, drawn: Drawing, style: Style, faint: float = 1.0) -> None:
    """An edge along its way; ``faint`` scales its opacity."""
    share = abs(edge.weight) / drawn.strongest_edge
    patch = PathPatch(
        Curve(*curve(way)),
        facecolor="none",
        edgecolor=sign_colour(edge.weight, style),
        linewidth=edge_width(share),
        alpha=edge_opacity(share) * faint,
        capstyle="butt",
        joinstyle="round",
        zorder=1,
    )
    patch.set_gid(drawn.gid(edge))
    axes.add_patch(patch)


def stub(axes: Axes, edge: Edge, box: str, drawn: Drawing, grid: Grid, layout: Layout, style: Style) -> None:
    """An edge from below the last site into the metric: a diamond on its box, the larger the stronger."""
    x, y = layout.places[box]
    share = abs(edge.weight) / drawn.strongest_edge
    (diamond,) = axes.plot(
        [x + grid.box - 0.02],
        [y + grid.height / 2 - 0.01],
        "D",
        markersize=3.5 + 0.9 * edge_width(share),
        color=sign_colour(edge.weight, style),
        markeredgecolor=style.palette.paper,
        markeredgewidth=0.6,
        zorder=5,
    )
    diamond.set_gid(drawn.gid(edge))


def short_name(node: Node) -> str:
    """The node's name within its site: "#431", "error", "#431 @5"."""
    name = "error" if node.kind == "error" else f"#{node.feature}"
    return name if node.position is None else f"{name} @{node.position}"


def words_of(description: Description | None) -> list[str]:
    """What the feature fires on; if that is not known, the tokens that it promotes, after an arrow."""
    fired = shown(fires_on(description))
    if fired or description is None or "logits" not in description:
        return fired
    return [f"→{word}" for word in shown(promotes(description))]


def chosen_how(circuit: Circuit) -> str:
    """How nodes and edges were chosen: "Chosen: nodes by top 60 of 196; edges by top 150 of 620; …"."""
    told = []
    for name, total in (("nodes", "candidates"), ("edges", "possible_edges")):
        rule = circuit.selection.get(name)
        if isinstance(rule, Mapping) and rule:
            words = ", ".join(f"{key.replace('_', ' ')} {_value(value)}" for key, value in rule.items())
            whole = "total_nodes" if name == "nodes" and "sparsity" in rule else total
            pool = circuit.selection.get(whole)
            told.append(f"{name} by {words}" + (f" of {pool}" if pool is not None else ""))
    prune = circuit.selection.get("prune")
    if isinstance(prune, str) and prune != "none":
        told.append(f"pruned {prune.replace('_', ' ')}")
    return f"Chosen: {'; '.join(told)}; all edges into the metric." if told else ""


def _value(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)


def mark(label: str, **look: Any) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], label=label, **{"linestyle": "", **look})


def widths(told: Callable[[float], str], colour: str) -> list[Line2D]:
    """Entries for edges of three strengths, told by their share of the strongest."""
    return [
        mark(told(share), linestyle="-", linewidth=edge_width(share), color=colour)
        for share in (0.01, 0.1, 1.0)
    ]


def legend_below(axes: Axes, marks: list[Line2D], columns: int, style: Style) -> None:
    """The legend at the bottom of a drawing."""
    axes.legend(
        handles=marks,
        loc="lower left",
        bbox_to_anchor=(0.005, 0),
        ncols=columns,
        fontsize=style.font_size * 0.9,
        columnspacing=1.2,
        handlelength=1.7,
        borderaxespad=0.3,
    )


def legend(axes: Axes, drawn: Drawing, told: str, width: float, style: Style) -> None:
    """At the bottom: kinds of nodes, signs, three widths of edges with their weights, and lines of text above them."""
    palette = style.palette
    marks = [
        mark(
            "feature: number, tokens it fires on (→ promotes)",
            marker="o",
            markersize=5,
            color=palette.feature,
        ),
        mark("error of the site's dictionary", marker="^", markersize=6.5, color=palette.error),
        mark("corner of a box: its edge to the metric", marker="D", markersize=6, color=palette.positive),
        mark("> 0: supports the clean answer", linestyle="-", linewidth=3, color=palette.positive),
        mark("< 0: opposes it", linestyle="-", linewidth=3, color=palette.negative),
    ]
    if drawn.edges:
        marks += widths(
            lambda share: f"edge of {number(share * drawn.strongest_edge, 2)} {drawn.unit}", palette.muted
        )
    legend_below(axes, marks, 3, style)
    size = style.font_size * SMALL
    lines = wrapped(told, width - 0.3, size)
    axes.text(0.12, 0.66, "\n".join(lines), fontsize=size, color=palette.muted, va="bottom")


def note(drawn: Drawing) -> str:
    """How many nodes and edges there are and are drawn, how they were chosen, and what the numbers are."""
    nodes, edges, in_all = len(drawn.circuit.nodes), len(drawn.edges), len(drawn.circuit.edges)
    told = f"all {edges} edges" if edges == in_all else f"the {edges} strongest of {in_all} edges"
    said = (
        f"{nodes} nodes, {told}. {chosen_how(drawn.circuit)} Number in a box: indirect effect in {drawn.unit}, mean "
        "over the training pairs, which also tints it. Edge: the part of that effect which runs through the upper "
        f"end. {drawn.audit}"
    )
    return said.replace("  ", " ").rstrip()
