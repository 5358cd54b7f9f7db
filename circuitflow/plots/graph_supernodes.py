"""Figure: an attribution graph at the level of supernodes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from circuitflow.jobs import Output
from circuitflow.plots.circuit_marks import edge_opacity, edge_width, mark, sign_colour, tint
from circuitflow.plots.numbers import counted, percent
from circuitflow.plots.style import (
    SMALL,
    Style,
    drawable,
    drawing,
    fitting,
    save,
    shown,
    style_of,
    wrapped,
)
from circuitflow.plots.tables import Table, rows
from circuitflow.store.tables import read_provenance, read_table

MOST_EDGES = 48
WIDTH, HEIGHT, GAP = 1.5, 0.42, 0.14  # of boxes, inches
BESIDE = 0.5
"""Between columns: edges pass there."""
LOGIT = 0.95
MARGIN, FOOT, HEAD, RISE = 0.25, 0.8, 0.75, 4.2
MOST_COLUMNS = 14
COLOURS = {"by hand": "complement", "automatic": "feature", "single": "muted", "errors": "error"}
SHOWN = tuple(COLOURS)
NOTE = (
    "Columns are positions, height is the mean layer; supernodes: name, number of features, layers, and what they fire "
    "on. {drawn} of {groups} supernodes and features with the most influence and the errors of each position; "
    "the {edges} edges with the most influence of {all}: sums of direct effects, attention and norms held; "
    "width by share of the influence, the widest {most}. Edges within a supernode, and {back} that run down or"
    " sideways, are not drawn. One prompt, so nothing is sampled."
)


@dataclass(frozen=True)
class Super:
    """One supernode as it is drawn."""

    name: str
    kind: str
    """by hand | automatic | single | errors | token | logit."""
    words: str
    layer: float
    position: int
    influence: float
    heading: str


def plot_graph_supernodes(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Supernodes over positions and layers, and the effects between them.

    Inputs ``nodes``, ``edges`` (tables of group_features); params ``style``, ``max_nodes`` (supernodes and single
    features drawn, by influence); outputs ``png``, ``svg``.
    """
    style = style_of(params)
    nodes, edges = (read_table(inputs[name]) for name in ("nodes", "edges"))
    facts = read_provenance(inputs["nodes"])
    with drawing(style):
        save(draw(nodes, edges, facts, int(params["max_nodes"]), style), out, style)


def draw(nodes: Table, edges: Table, facts: Mapping[str, Any], max_nodes: int, style: Style) -> Figure:
    """The figure, from both tables and what is said with them: prompt, tokens, logit_tokens."""
    everything = supers(nodes, facts)
    inner = [one for one in everything if one.kind in SHOWN]
    kept = sorted(inner, key=lambda one: -one.influence)[:max_nodes]
    ends = [one for one in everything if one.kind not in SHOWN]
    used = {one.position for one in kept} | {one.position for one in ends if one.kind == "logit"}
    tokens = [one for one in ends if one.kind == "token"]
    if len(tokens) > MOST_COLUMNS:
        ends = [one for one in ends if one.kind == "logit" or one.position in used]
    places, width, height = placed(kept, ends)
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    chosen, back = drawn_edges(edges, places)
    most = max((float(edges["flow"][edge]) for edge in chosen), default=0.0) or 1.0
    for edge in reversed(chosen):
        _edge(axes, edges, edge, places, most, style)
    strongest = max((one.influence for one in kept), default=0.0) or 1.0
    for one in (*kept, *ends):
        _box(axes, one, places[one.name], strongest, style)
    note = NOTE.format(
        drawn=len(kept),
        groups=len(inner),
        edges=len(chosen),
        all=len(edges["flow"]),
        most=percent(most, 1),
        back=back,
    )
    _words(axes, str(facts.get("prompt", "")), note, (width, height), style)
    return figure


def supers(nodes: Table, facts: Mapping[str, Any]) -> list[Super]:
    """Supernodes from the table of nodes."""
    found = []
    for name in dict.fromkeys(map(str, nodes["supernode"])):
        part = rows(nodes, supernode=name)
        node_kind = str(part["kind"][0])
        kind = str(part["supernode_kind"][0]) if node_kind in ("feature", "error") else node_kind
        weight = part["influence"] + 1e-12
        layer = float(np.average(part["layer"], weights=weight))
        position = int(part["position"][int(np.argmax(weight))])
        found.append(
            Super(
                name, kind, _told(name, kind, part, facts), layer, position,
                float(part["influence"].sum()), _heading(name, kind, part),
            )
        )  # fmt: skip
    return found


def _told(name: str, kind: str, part: Table, facts: Mapping[str, Any]) -> str:
    """The second line of a box."""
    if kind in ("token", "logit"):
        texts = facts.get("tokens" if kind == "token" else "logit_tokens") or []
        number = int(name.partition("_")[2])
        return shown([texts[number]])[0] if number < len(texts) else name
    if kind == "errors":
        return counted(len(part["node"]), "layer")
    return str(part["label"][0])


def _heading(name: str, kind: str, part: Table) -> str:
    """The first line of a box: a supernode's name, how many features it has, and their layers."""
    if kind not in ("by hand", "automatic"):
        return name.replace("errors_", "errors @")
    low, high = int(part["layer"].min()), int(part["layer"].max())
    layers = f"{low}" if low == high else f"{low}–{high}"
    return f"{name} · {len(part['node'])} · {layers}"


def placed(
    kept: Sequence[Super], ends: Sequence[Super]
) -> tuple[dict[str, tuple[float, float]], float, float]:
    """Middles of all boxes, and the figure's size, in inches."""
    logits = [one for one in ends if one.kind == "logit"]
    columns = sorted({one.position for one in (*kept, *ends)})
    x = {at: MARGIN + WIDTH / 2 + number * (WIDTH + BESIDE) for number, at in enumerate(columns)}
    low = min((one.layer for one in kept), default=0.0)
    scale = RISE / max(max((one.layer for one in kept), default=1.0) - low, 1.0)
    base = FOOT + HEIGHT * 2
    places: dict[str, tuple[float, float]] = {}
    for at in columns:
        y = base
        for one in sorted((one for one in kept if one.position == at), key=lambda one: one.layer):
            y = max(y, base + (one.layer - low) * scale)
            places[one.name] = (x[at], y)
            y += HEIGHT + GAP
    for one in ends:
        if one.kind == "token":
            places[one.name] = (x[one.position], FOOT + HEIGHT / 2)
    width = max(x.values(), default=WIDTH) + WIDTH / 2 + MARGIN
    width = max(width, 8.0)
    per_row = max(1, int((width - 2 * MARGIN + GAP) // (LOGIT + GAP)))
    top = max((y for _, y in places.values()), default=base) + HEIGHT * 1.8
    for number, one in enumerate(logits):
        row, column = divmod(number, per_row)
        places[one.name] = (
            width - MARGIN - LOGIT / 2 - column * (LOGIT + GAP), top + row * (HEIGHT + GAP)
        )  # fmt: skip
    rise = (len(logits) - 1) // per_row * (HEIGHT + GAP) if logits else 0
    return places, width, top + rise + HEIGHT / 2 + HEAD


def drawn_edges(edges: Table, places: Mapping[str, tuple[float, float]]) -> tuple[list[int], int]:
    """Edges between drawn boxes that run upwards, the strongest first, and how many others there are among them."""
    there = [
        i
        for i, (a, b) in enumerate(zip(edges["source"], edges["target"], strict=True))
        if a in places and b in places
    ]
    up = [i for i in there if places[edges["target"][i]][1] > places[edges["source"][i]][1] + 1e-9]
    order = sorted(up, key=lambda i: -edges["flow"][i])
    return order[:MOST_EDGES], len(there) - len(up)


def _edge(
    axes: Axes, edges: Table, edge: int, places: Mapping[str, tuple[float, float]], most: float, style: Style
) -> None:
    (x0, y0), (x1, y1) = places[edges["source"][edge]], places[edges["target"][edge]]
    share = float(edges["flow"][edge]) / most
    # Edges within a column swing out so that the boxes between do not hide them.
    straight = abs(x1 - x0) < 1e-9
    far = y1 - y0 > HEIGHT + 2 * GAP
    bend = min(0.8, 1.3 * WIDTH / (y1 - y0)) if straight and far else 0.0
    arrow = FancyArrowPatch(
        (x0, y0 + HEIGHT / 2),
        (x1, y1 - HEIGHT / 2),
        connectionstyle=f"arc3,rad={-bend}",
        arrowstyle="-",
        shrinkA=0,
        shrinkB=0,
        color=sign_colour(float(edges["weight"][edge]), style),
        linewidth=edge_width(share),
        alpha=edge_opacity(share) * 0.8,
        zorder=1,
    )
    axes.add_patch(arrow)


def _box(axes: Axes, one: Super, middle: tuple[float, float], strongest: float, style: Style) -> None:
    palette = style.palette
    colour = getattr(palette, COLOURS.get(one.kind, "text"))
    face: Any = palette.paper
    if one.kind in SHOWN:
        face = tint(colour, 0.06 + 0.3 * one.influence / strongest, style)
    inset, width = 0.03, LOGIT if one.kind == "logit" else WIDTH
    axes.add_patch(
        FancyBboxPatch(
            (middle[0] - width / 2 + inset, middle[1] - HEIGHT / 2 + inset),
            width - 2 * inset,
            HEIGHT - 2 * inset,
            boxstyle=f"square,pad={inset}"
            if one.kind == "errors"
            else f"round,pad={inset},rounding_size=0.06",
            facecolor=face,
            edgecolor=colour,
            linewidth=1.4 if one.kind in ("by hand", "automatic") else 0.8,
            zorder=3,
        )
    )
    size, room = style.font_size, width - 0.1
    name = one.words if one.kind in ("token", "logit") else one.heading
    words: dict[str, Any] = {"ha": "center", "va": "center_baseline", "zorder": 4}
    second = "" if one.kind in ("token", "logit") else one.words
    first = middle[1] + (0.075 if second else 0)
    weight = "bold" if one.kind in ("by hand", "automatic", "logit") else "normal"
    name, sized = _heading_in(drawable(name), room * (0.9 if weight == "bold" else 1), size)
    axes.text(middle[0], first, name, fontsize=sized, fontweight=weight, **words)
    if second:
        small = size * SMALL
        axes.text(
            middle[0], middle[1] - 0.095, fitting(drawable(second), room, small), fontsize=small,
            color=palette.muted, **words,
        )  # fmt: skip


def _heading_in(text: str, inches: float, size: float) -> tuple[str, float]:
    """A heading in letters small enough for its box, since layers stand at its end; only long names are cut."""
    sizes = [size * share for share in (1.0, 0.9, 0.8)]
    sized = next((one for one in sizes if fitting(text, inches, one) == text), sizes[-1])
    return fitting(text, inches, sized), sized


def _words(axes: Axes, prompt: str, note: str, size: tuple[float, float], style: Style) -> None:
    width, height = size
    title = fitting(drawable(prompt.replace("\n", "↵")), width - 0.4, style.font_size * 1.3)
    axes.text(0.12, height - 0.14, f"{title}", fontweight="bold", fontsize=style.font_size * 1.25, va="top")
    palette = style.palette
    marks = [
        mark("supernode by hand", marker="s", markersize=7, color=palette.complement),
        mark("supernode found", marker="s", markersize=7, color=palette.feature),
        mark("feature", marker="s", markersize=7, color=palette.muted),
        mark("errors of a position", marker="s", markersize=7, color=palette.error),
        mark("raises", linestyle="-", linewidth=3, color=palette.positive),
        mark("lowers", linestyle="-", linewidth=3, color=palette.negative),
    ]
    axes.legend(
        handles=marks, loc="upper left", bbox_to_anchor=(0.0, 1 - 0.32 / height), ncols=6,
        fontsize=style.font_size * SMALL, columnspacing=1.1, handlelength=1.3, borderaxespad=0.3,
    )  # fmt: skip
    small = style.font_size * SMALL
    lines = wrapped(f"{style.subject}. {note}" if style.subject else note, width - 0.3, small)
    axes.text(0.12, 0.1, "\n".join(lines), fontsize=small, color=palette.muted, va="bottom")
