"""Nodes that an audit can measure, and their true effects: each patched alone, the model run on from there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from circuitflow.attribution.cached import Batch, Cached, read_batch, trimmed
from circuitflow.attribution.changes import changes_of
from circuitflow.attribution.exact import Plan, interventions, measured
from circuitflow.attribution.gradients import gradient_run
from circuitflow.attribution.nodes import ERROR, SUMMED, kinds
from circuitflow.attribution.rerun import base_run, start_of
from circuitflow.attribution.scores import CHUNK_PAIRS
from circuitflow.circuits.circuit import Circuit
from circuitflow.data.metrics import Metric
from circuitflow.data.token_pairs import TokenPairs
from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.jobs import progress
from circuitflow.models.running import LanguageModel
from circuitflow.store.arrays import Store
from circuitflow.store.journal import Journal
from circuitflow.store.tables import read_table


@dataclass(frozen=True)
class Nodes:
    """Nodes that change in some pair of the audit; all others have no effect at all."""

    sites: tuple[str, ...]
    site: np.ndarray
    """(nodes,) number of the site."""
    feature: np.ndarray
    position: np.ndarray
    score: np.ndarray
    """Mean effect by AtP on the audit's pairs."""

    @property
    def errors(self) -> np.ndarray:
        """Which are error nodes."""
        return np.asarray(self.feature == ERROR)

    def inside(self, circuit: Circuit) -> np.ndarray:
        """Which belong to a circuit."""
        own = {
            (node.site, node.feature, SUMMED if node.position is None else node.position)
            for node in circuit.nodes
        }
        keys = zip(self.site.tolist(), self.feature.tolist(), self.position.tolist(), strict=True)
        return np.array([(self.sites[site], feature, at) in own for site, feature, at in keys], bool)

    def columns(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
        """Names of some of them."""
        return {
            "site": np.array(self.sites, object)[self.site[chosen]],
            "kind": kinds(self.feature[chosen]),
            "feature": self.feature[chosen],
            "position": self.position[chosen],
        }


def node_population(sites: Sequence[str], tables: Sequence[Path], pairs: Sequence[int]) -> Nodes:
    """The nodes of score tables per pair that change in one of the given test pairs."""
    parts = []
    for number, path in enumerate(tables):
        table = read_table(Path(path))
        here = (table["split"] == "test") & np.isin(table["pair"], pairs)
        names = np.stack([table["feature"][here], table["position"][here]], 1).reshape(-1, 2)
        nodes, index = np.unique(names, axis=0, return_inverse=True)
        score = np.bincount(index.reshape(-1), table["score"][here], len(nodes)) / len(pairs)
        parts.append((np.full(len(nodes), number), nodes[:, 0], nodes[:, 1], score))
    site, feature, position, score = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Nodes(tuple(sites), site, feature, position, score)


def measured_nodes(
    lm: LanguageModel,
    metric: Metric,
    store: Store,
    pairs: TokenPairs,
    rows: Sequence[int],
    dictionaries: Mapping[str, Dictionary],
    nodes: Nodes,
    chosen: np.ndarray,
    params: Mapping[str, Any],
    journal: Journal,
) -> np.ndarray:
    """Effects (pairs, chosen), float64: m with the node patched − m clean; 0 where a node does not change."""
    effects = np.zeros((len(rows), len(chosen)))
    for number, site in enumerate(nodes.sites):
        here = np.flatnonzero(nodes.site[chosen] == number)
        if len(here):
            units = chosen[here]
            effects[:, here] = _at_site(
                lm, metric, store, pairs, rows, dictionaries[site], site, (nodes, units), params, journal
            )
        progress("sites patched", number + 1, len(nodes.sites))
    return effects


def _at_site(
    lm: LanguageModel,
    metric: Metric,
    store: Store,
    pairs: TokenPairs,
    rows: Sequence[int],
    dictionary: Dictionary,
    site: str,
    wanted: tuple[Nodes, np.ndarray],
    params: Mapping[str, Any],
    journal: Journal,
) -> np.ndarray:
    nodes, units = wanted
    positions, stream = params["positions"], start_of(site, lm.arch).stream
    feature, position = nodes.feature[units], nodes.position[units]
    slots = pairs.mask.shape[1] if positions == "none" else 1
    picked = torch.zeros(slots, dictionary.d_dict, dtype=torch.bool)
    features = feature != ERROR
    picked[np.where(slots > 1, position, 0)[features], feature[features]] = True
    place = {key: i for i, key in enumerate(zip(feature.tolist(), position.tolist(), strict=True))}
    plan = Plan(site, dictionary, positions, picked, params["batch_rows"])
    found = np.zeros((len(rows), len(units)))
    for start in range(0, len(rows), CHUNK_PAIRS):
        batch = pick(
            store, sorted({site, stream} & sites_of(store)), pairs, rows[start : start + CHUNK_PAIRS], lm
        )
        known = {stream: batch.sites[stream].base} if stream in batch.sites else {}
        base = base_run(lm, metric, batch.pairs, gradient_run(metric), [stream], known)
        changes = changes_of(dictionary, batch.sites[site], batch.pairs, positions)
        effects = measured(base, interventions(changes, plan, torch.zeros_like(picked)), plan, journal)
        columns = (effects.pair, effects.node, effects.position, effects.effect)
        for pair, node, at, effect in zip(*(column.tolist() for column in columns), strict=True):
            number = ERROR if node == dictionary.d_dict else node
            index = place.get((number, at if positions == "none" else SUMMED))
            if index is not None:
                found[start + pair, index] = effect
    return found


def sites_of(store: Store) -> set[str]:
    """Sites whose activations a store holds."""
    return {name.removesuffix("/clean") for name in store.arrays if name.endswith("/clean")} - {"metric"}


def pick(
    store: Store, sites: Sequence[str], pairs: TokenPairs, rows: Sequence[int], lm: LanguageModel
) -> Batch:
    """Some pairs of a split, wherever they are in its store, cut to the longest among them."""
    parts: list[dict[str, Cached]] = [read_batch(store, sites, pairs, row, row + 1).sites for row in rows]
    chosen = trimmed(pairs[torch.as_tensor(list(rows))])
    pos = chosen.mask.shape[1]

    def joined(site: str, part: str) -> torch.Tensor:
        values = [getattr(found[site], part)[0] for found in parts]
        padded = [torch.nn.functional.pad(x, (0, 0, 0, pos - len(x))) for x in values]
        return torch.stack(padded).to(lm.device)

    cached = {
        site: replace(
            parts[0][site],
            clean=joined(site, "clean"),
            patched=joined(site, "patched"),
            gradient=joined(site, "gradient"),
        )
        for site in sites
    }
    return Batch(0, len(rows), chosen.to(lm.device), cached)
