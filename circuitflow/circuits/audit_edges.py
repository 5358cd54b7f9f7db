"""Edges that an audit can measure, and their true weights: one end patched alone, the other read after the blocks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from circuitflow.attribution.cached import Batch
from circuitflow.attribution.ends import End
from circuitflow.attribution.exact_edges import exact_effects
from circuitflow.attribution.nodes import ERROR, METRIC, REST, SUMMED, kinds
from circuitflow.attribution.paths import METRIC_SITE, Blocks, Way, begin, neighbours, way_into
from circuitflow.attribution.pullback import Into, edge_effects
from circuitflow.circuits.audit_nodes import pick
from circuitflow.circuits.circuit import Circuit, Node
from circuitflow.data.metrics import Metric
from circuitflow.data.token_pairs import TokenPairs
from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.jobs import progress
from circuitflow.models.running import LanguageModel
from circuitflow.store.arrays import Store
from circuitflow.store.journal import Journal
from circuitflow.store.tables import read_table

PAIRS_AT_ONCE = 8
NAMES = ("up_site", "up_feature", "up_position", "down_feature", "down_position", "weight")


@dataclass(frozen=True)
class Edges:
    """Edges of the tables of score_edges that lead between single nodes, or from one to the metric."""

    down: np.ndarray
    """(edges,) downstream site, or "metric"."""
    up: np.ndarray
    """(edges,) upstream site."""
    up_feature: np.ndarray
    up_position: np.ndarray
    down_feature: np.ndarray
    down_position: np.ndarray
    score: np.ndarray
    """Mean weight on the training pairs."""

    @property
    def errors(self) -> np.ndarray:
        """None is measured as a matter of course."""
        return np.zeros(len(self.score), bool)

    def inside(self, circuit: Circuit) -> np.ndarray:
        """Which belong to a circuit."""
        own = {(edge.up, edge.down) for edge in circuit.edges}
        ups = zip(self.up, self.up_feature.tolist(), self.up_position.tolist(), strict=True)
        downs = zip(self.down, self.down_feature.tolist(), self.down_position.tolist(), strict=True)
        return np.array([(_id(*a), _id(*b)) in own for a, b in zip(ups, downs, strict=True)], bool)

    def columns(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
        """Names of some of them."""
        return {
            "up_site": self.up[chosen],
            "up_kind": kinds(self.up_feature[chosen]),
            "up_feature": self.up_feature[chosen],
            "up_position": self.up_position[chosen],
            "down_site": self.down[chosen],
            "down_kind": kinds(self.down_feature[chosen]),
            "down_feature": self.down_feature[chosen],
            "down_position": self.down_position[chosen],
        }


def edge_population(downs: Sequence[str], tables: Sequence[Path]) -> Edges:
    """The edges of all tables that have a weight, the rests left out."""
    parts = []
    for down, path in zip(downs, tables, strict=True):
        table = read_table(Path(path))
        keep = (table["down_feature"] != REST) & (table["weight"] != 0)
        columns = [table[name][keep] for name in NAMES]
        parts.append([np.full(int(keep.sum()), down, object), *columns])
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Edges(columns[0], columns[1].astype(object), *columns[2:])


def measured_edges(
    lm: LanguageModel,
    metric: Metric,
    store: Store,
    pairs: TokenPairs,
    rows: Sequence[int],
    dictionaries: Mapping[str, Dictionary],
    edges: Edges,
    chosen: np.ndarray,
    params: Mapping[str, Any],
    journal: Journal,
) -> tuple[np.ndarray, np.ndarray]:
    """True weights (pairs, chosen) of the edges, and their first order on the same pairs; float64."""
    exact, linear = np.zeros((2, len(rows), len(chosen)))
    downs = [down for down in params["downs"] if (edges.down[chosen] == down).any()]
    for done, down in enumerate(downs):
        here = np.flatnonzero(edges.down[chosen] == down)
        into = _into(lm, metric, dictionaries, edges, chosen[here], down, params)
        for start in range(0, len(rows), PAIRS_AT_ONCE):
            some = rows[start : start + PAIRS_AT_ONCE]

            def measure(some: Sequence[int] = some, into: Into = into, here: np.ndarray = here) -> Any:
                batch = pick(store, _needed(into), pairs, some, lm)
                return [found.tolist() for found in _weights(lm, batch, into, edges, chosen[here])]

            stop = start + len(some)
            exact[start:stop, here], linear[start:stop, here] = np.array(journal.result(measure))
        progress("sites with edges", done + 1, len(downs))
    return exact, linear


def _weights(
    lm: LanguageModel, batch: Batch, into: Into, edges: Edges, units: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    most = max(len(up) for up in into.ups)
    exact = exact_effects(lm, batch.pairs, into, batch.sites, most)
    linear = edge_effects(lm, batch.pairs, into, batch.sites)
    places = {up.site: _places(up) for up in into.ups}
    downs = {(METRIC, SUMMED): 0} if into.end is None else _places(into.end)
    found = np.zeros((2, len(batch.pairs), len(units)))
    for column, unit in enumerate(units.tolist()):
        site = edges.up[unit]
        row = places[site][int(edges.up_feature[unit]), int(edges.up_position[unit])]
        down = downs[int(edges.down_feature[unit]), int(edges.down_position[unit])]
        for number, effects in enumerate((exact, linear)):
            found[number, :, column] = effects[site][:, row, down].detach().cpu().numpy()
    return found[0], found[1]


def _into(
    lm: LanguageModel,
    metric: Metric,
    dictionaries: Mapping[str, Dictionary],
    edges: Edges,
    units: np.ndarray,
    down: str,
    params: Mapping[str, Any],
) -> Into:
    """All neighbours are there, with or without a node of the sample: what passes through them is no direct effect."""
    sites, blocks = tuple(params["sites"]), Blocks(lm.n_layers, lm.arch.parallel)
    ups = tuple(
        _end(lm, dictionaries, site, edges.up_feature[here], edges.up_position[here])
        for site in neighbours(sites, blocks)[down]
        for here in [units[edges.up[units] == site]]
    )
    if down == METRIC_SITE:
        return Into(down, ups, None, sites, Way.MIXING, metric, params["positions"])
    end = _end(lm, dictionaries, down, edges.down_feature[units], edges.down_position[units])
    return Into(down, ups, end, sites, way_into(down, sites, blocks), None, params["positions"])


def _end(
    lm: LanguageModel,
    dictionaries: Mapping[str, Dictionary],
    site: str,
    feature: np.ndarray,
    position: np.ndarray,
) -> End:
    nodes = np.unique(np.stack([feature, position], 1), axis=0)
    columns = (torch.from_numpy(nodes[:, i].copy()).to(lm.device) for i in range(2))
    return End(site, dictionaries[site], *columns)


def _needed(into: Into) -> list[str]:
    """Sites whose cached tensors the edges need: both ends, and where the pass begins."""
    cut = begin(into.down, into.sites)
    wanted = {up.site for up in into.ups} | {cut} | ({into.down} if into.end else set())
    return [site for site in into.sites if site in wanted]


def _places(end: End) -> dict[tuple[int, int], int]:
    return {node: i for i, node in enumerate(zip(end.feature.tolist(), end.position.tolist(), strict=True))}


def _id(site: str, feature: int, position: int) -> str:
    if site == METRIC_SITE:
        return METRIC_SITE
    kind = "error" if feature == ERROR else "feature"
    return Node(site, kind, feature, 0.0, None if position == SUMMED else position).id  # type: ignore[arg-type]
