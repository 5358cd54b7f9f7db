"""Descriptions of features for the page: tokens in their contexts, shaded by how strongly the feature fires."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from circuitflow.features.descriptions import Description, fires_on
from circuitflow.features.tokens import visible
from circuitflow.plots.numbers import number, percent, signed, whole
from circuitflow.plots.tables import node_name
from circuitflow.report.result import Result
from circuitflow.report.tables import anchor

SHADES = 8
CONTEXTS_SHOWN = 6
LINE_BREAKS = str.maketrans({"\n": "↵", "\r": "", "\t": "⇥"})


@dataclass(frozen=True)
class Piece:
    """A run of text: inactive tokens joined, or one active token."""

    text: str
    shade: int = 0
    """0: inactive; 1 to SHADES: share of the feature's largest activation."""
    activation: str = ""
    peak: bool = False


@dataclass(frozen=True)
class Passage:
    """A context or a prompt."""

    pieces: tuple[Piece, ...]
    source: str


@dataclass(frozen=True)
class Bar:
    """One bar of the histogram, in shares of the tallest."""

    height: float
    tip: str


@dataclass(frozen=True)
class Card:
    """What the page tells about one feature."""

    anchor: str
    name: str
    in_circuit: bool
    words: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    contexts: tuple[Passage, ...]
    prompts: tuple[Passage, ...]
    raised: tuple[tuple[str, str], ...]
    lowered: tuple[tuple[str, str], ...]
    histogram: tuple[Bar, ...]


def cards(result: Result) -> list[Card]:
    """A card for every described feature, the largest |IE| on train first."""
    return list(_cards(result))


def _cards(result: Result) -> Iterator[Card]:
    members = {(node.site, node.feature) for node in result.circuit.nodes}
    nodes = result.nodes
    for i in np.argsort(-np.abs(nodes["score_train"]), kind="stable"):
        key = (str(nodes["site"][i]), int(nodes["feature"][i]))
        described = result.descriptions.get(key)
        if described is None:
            continue
        effects = {
            split: f"{signed(nodes[f'score_{split}'][i])} {result.unit}" for split in ("train", "test")
        }
        yield card(described, *key, effects, key in members)


def card(
    described: Description, site: str, feature: int, effects: Mapping[str, str], in_circuit: bool
) -> Card:
    """The card of one feature; what a dictionary without an encoder cannot tell is left out."""
    largest = float(described.get("max", 0.0))
    facts = [(f"IE, {split} pairs", effect) for split, effect in effects.items()]
    if "density" in described:
        facts += [
            ("active on", f"{percent(described['density'], 2)} of the corpus"),
            ("largest activation", number(largest)),
            ("mean where active", number(described["mean_active"])),
        ]
    prompts = described.get("task", {}).get("prompts", [])
    return Card(
        anchor=anchor(site, feature),
        name=node_name(site, "feature", feature),
        in_circuit=in_circuit,
        words=tuple(visible(token) for token in fires_on(described, 5)),
        facts=tuple(facts),
        contexts=tuple(
            Passage(pieces(item, largest), f"block {item['block']}")
            for item in described.get("contexts", [])[:CONTEXTS_SHOWN]
        ),
        prompts=tuple(
            Passage(pieces(item, largest), f"{item['case'].replace('_', ' ')}, {item['side']}")
            for item in prompts
        ),
        raised=_weights(described["logits"]["top"]),
        lowered=_weights(described["logits"]["bottom"]),
        histogram=_bars(described.get("histogram", {"edges": [], "counts": []})),
    )


def pieces(passage: Mapping[str, Any], largest: float) -> tuple[Piece, ...]:
    """Tokens as runs of text; an active token stands alone, shaded by its share of ``largest``."""
    found: list[Piece] = []
    tokens: Sequence[str] = passage["tokens"]
    for i, (token, activation) in enumerate(zip(tokens, passage["activations"], strict=True)):
        text = token.translate(LINE_BREAKS)
        if activation:
            share = min(1.0, abs(activation) / largest) if largest > 0 else 1.0
            shade = max(1, round(SHADES * share))
            found.append(Piece(text, shade, number(activation), i == passage["peak"]))
        elif found and not found[-1].shade:
            found[-1] = Piece(found[-1].text + text)
        else:
            found.append(Piece(text))
    return tuple(found)


def _weights(entries: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, str], ...]:
    return tuple((visible(entry["token"]), signed(entry["weight"])) for entry in entries)


def _bars(histogram: Mapping[str, Sequence[float]]) -> tuple[Bar, ...]:
    counts, edges = histogram["counts"], histogram["edges"]
    tallest = max(counts, default=1)
    return tuple(
        Bar(count / tallest, f"{number(edges[i])} to {number(edges[i + 1])}: {whole(count)} tokens")
        for i, count in enumerate(counts)
    )
