"""Figure: which attention heads carry the edges of an attribution graph."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from circuitflow.jobs import Output
from circuitflow.plots.numbers import percent
from circuitflow.plots.style import (
    SMALL,
    Style,
    drawable,
    drawing,
    footnote,
    grid,
    new_figure,
    save,
    shown,
    style_of,
)
from circuitflow.plots.tables import Table, rows
from circuitflow.store.tables import read_provenance, read_table

EDGES, NAMED = 14, 3
PARTS = ("no head", "its largest head", "second", "third", "other heads")
CELL = 0.24  # inches
NOTE = (
    "Prompt: {prompt} The {edges} strongest edges of the pruned graph ({flow} of the influence along all "
    "edges), patterns held. Each edge is split by the last head on its paths, the one nearest to the target; "
    "left: shares of the edges, weighted by influence: all cells and the direct part ({direct}: no head on the"
    " way) sum to 100 %; below 0: against the sign of the edge. Right: the {shown} strongest edges that any "
    "head carries: the part without a head, the three largest of its heads (L1H0: layer 1, head 0), and all others; "
    "features are layer_number @position."
)


def plot_graph_heads(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Heat map of heads, and the strongest edges by head.

    Input ``heads`` (table of attribute_heads); params ``style``; outputs ``png``, ``svg``.
    """
    style = style_of(params)
    table, facts = read_table(inputs["heads"]), read_provenance(inputs["heads"])
    with drawing(style):
        save(draw(table, facts, style), out, style)


def draw(table: Table, facts: Mapping[str, Any], style: Style) -> Figure:
    """The figure, from the table and what is said with it: n_layers, heads, edges, prompt."""
    layers, heads = int(facts["n_layers"]), int(facts["heads"])
    shares, direct, flow = by_head(table, layers, heads)
    edges = strongest_carried(table, EDGES)
    wide = max(2.4, CELL * heads)
    figure = new_figure(wide + 7.4, max(4.2, CELL * layers + 1.6))
    spec = figure.add_gridspec(1, 2, width_ratios=(wide + 1.4, 5.4))
    left, right = (figure.add_subplot(spec[place]) for place in range(2))
    _heat_map(left, shares, style)
    _edges(right, table, edges, facts, style)
    note = NOTE.format(
        prompt=f"“{drawable(str(facts.get('prompt', '')).strip())}”.",
        edges=int(facts["edges"]),
        flow=percent(flow),
        direct=percent(direct, 1),
        shown=len(edges),
    )
    footnote(figure, note, style)
    return figure


def by_head(table: Table, layers: int, heads: int) -> tuple[np.ndarray, float, float]:
    """Share of the edges whose last head is each (layers, heads), that without a head, and the flow of all."""
    direct = table["layer"] < 0
    flow = float(table["flow"][direct].sum())
    share = table["flow"] * table["last"] / table["weight"] / (flow or 1.0)
    found = np.zeros((layers, heads))
    np.add.at(found, (table["layer"][~direct], table["head"][~direct]), share[~direct])
    return found, float(share[direct].sum()), flow


def strongest_carried(table: Table, most: int) -> list[tuple[str, str]]:
    """Source and target of the edges with most influence of which a head carries a tenth at least."""
    part = (table["layer"] >= 0) & (np.abs(table["last"]) >= 0.1 * np.abs(table["weight"]))
    order = np.argsort(-table["flow"][part], kind="stable")
    ends = zip(table["source"][part][order], table["target"][part][order], strict=True)
    return list(dict.fromkeys((str(a), str(b)) for a, b in ends))[:most]


def _heat_map(axes: Axes, shares: np.ndarray, style: Style) -> None:
    palette = style.palette
    ends = LinearSegmentedColormap.from_list("share", [palette.negative, palette.paper, palette.positive])
    reach = 100 * float(np.abs(shares).max()) or 1.0
    image = axes.imshow(
        100 * shares,
        cmap=ends,
        vmin=-reach,
        vmax=reach,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
    )
    axes.set(title="Heads that bring influence to targets", xlabel="head", ylabel="layer")
    for length, set_ticks in ((shares.shape[1], axes.set_xticks), (shares.shape[0], axes.set_yticks)):
        step = max(1, -(-length // 16))
        set_ticks(range(0, length, step))
    axes.tick_params(length=0)
    assert axes.figure is not None
    axes.figure.colorbar(
        image, ax=axes, location="bottom", label="share of the edges (%)", shrink=0.7, aspect=30, pad=0.01
    )


def readable(node: str, facts: Mapping[str, Any]) -> str:
    """A node's id as readers know it: tokens and logits by their text."""
    kind, *rest = node.split("_")
    if kind in ("T", "L"):
        texts = facts.get("tokens" if kind == "T" else "logit_tokens") or []
        number = int(rest[0])
        return f"“{shown([texts[number]])[0]}”" if number < len(texts) else node
    return f"error {rest[0]} @{rest[1]}" if kind == "E" else f"{kind}_{rest[0]} @{rest[1]}"


def _edges(
    axes: Axes, table: Table, edges: list[tuple[str, str]], facts: Mapping[str, Any], style: Style
) -> None:
    """Stacked parts of each edge: direct, its strongest heads by name, all others."""
    axes.set(title="Strongest edges that heads carry", xlabel="part of the edge (%)")
    palette = style.palette
    colours = (palette.feature, palette.train, palette.error)
    names = []
    for row, (source, target) in enumerate(edges):
        part = rows(table, source=source, target=target)
        share = 100 * part["last"] / part["weight"]
        carried = np.flatnonzero(part["layer"] >= 0)
        order = carried[np.argsort(-np.abs(share[carried]), kind="stable")]
        ends = {True: 0.0, False: 0.0}
        direct = share[part["layer"] < 0].sum()
        pieces = [(direct, palette.muted, "no head")]
        pieces += [
            (share[i], colour, f"L{part['layer'][i]}H{part['head'][i]}")
            for i, colour in zip(order[:NAMED], colours, strict=False)
        ]
        pieces.append((share[order[NAMED:]].sum(), palette.grid, ""))
        for value, colour, name in pieces:
            if not value:
                continue
            axes.barh(row, value, left=ends[value > 0], height=0.72, color=colour)
            if abs(value) > 14:
                middle = ends[value > 0] + value / 2
                axes.text(
                    middle, row, name, ha="center", va="center", color=style.palette.paper,
                    fontsize=style.font_size * SMALL * 0.9,
                )  # fmt: skip
            ends[value > 0] += value
        names.append(f"{readable(source, facts)} → {readable(target, facts)}")
    axes.axvline(0, color=style.palette.text, linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(max(len(names), 3) - 0.5, -0.5)
    if not edges:
        axes.text(0.5, 0.5, "no head carries a tenth of an edge", ha="center", transform=axes.transAxes)
        axes.set_xticks([])
    else:
        axes.legend(
            handles=[Patch(color=colour, label=label) for colour, label in zip(
                (palette.muted, *colours, palette.grid), PARTS, strict=True
            )],
            loc="upper center", bbox_to_anchor=(0.4, -0.14), ncols=len(PARTS), handlelength=1.2, columnspacing=1.2,
        )  # fmt: skip
    grid(axes, "x")
    axes.tick_params(axis="y", length=0)
