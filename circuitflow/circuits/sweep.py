"""Which circuits are evaluated: growing ones by |score|, the assembled one, and random ones of the same make-up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from circuitflow.attribution.nodes import ERROR
from circuitflow.circuits.ablation import Kept, complement
from circuitflow.circuits.circuit import Circuit

Nodes = list[tuple[str, int]]
"""Nodes as (site, feature number), the error being −1."""


@dataclass(frozen=True)
class Candidate:
    """A circuit to evaluate and where it came from."""

    series: str
    """"circuit", "complement" (everything but a circuit) or "random"."""
    source: str
    """"count" (the n strongest), "all", "threshold", "assembled" or "draw"."""
    nodes: int
    """Nodes of the circuit (of a complement: nodes taken away)."""
    threshold: float
    """|score| of the circuit's weakest node."""
    draw: int
    """Number of a random draw, else −1."""
    kept: dict[str, Kept]


@dataclass(frozen=True)
class Ranked:
    """All nodes that have an effect, by falling |score| on train over all sites."""

    sites: tuple[str, ...]
    nodes: Nodes
    sizes: np.ndarray
    """|score| of each."""

    def top(self, n: int) -> Nodes:
        """The ``n`` strongest."""
        return self.nodes[:n]

    def above(self, threshold: float) -> Nodes:
        """All with |score| of at least ``threshold`` times the largest."""
        return self.nodes[: int((self.sizes >= threshold * self.sizes.max(initial=0)).sum())]


def ranked_nodes(table: Mapping[str, np.ndarray], sites: Sequence[str]) -> Ranked:
    """Nodes of a table of rank_features; equal |score| in order of site, then of feature number."""
    place = {site: index for index, site in enumerate(sites)}
    keep = np.array([site in place for site in table["site"]]) & (table["score_train"] != 0)
    site, feature, size = table["site"][keep], table["feature"][keep], np.abs(table["score_train"][keep])
    order = np.lexsort((feature, [place[name] for name in site], -size))
    return Ranked(tuple(sites), [(site[i], int(feature[i])) for i in order], size[order])


def growing(ranked: Ranked, counts: Sequence[int], thresholds: Sequence[float]) -> list[Candidate]:
    """Circuits of the n strongest nodes, of all above a relative threshold, and of all; each size once."""
    wanted = [("count", ranked.top(n)) for n in counts]
    wanted += [("threshold", ranked.above(threshold)) for threshold in thresholds]
    wanted.append(("all", ranked.nodes))
    first = {len(nodes): (source, nodes) for source, nodes in reversed(wanted) if nodes}
    return [
        candidate
        for n, (source, nodes) in sorted(first.items())
        for candidate in _both_sides(source, nodes, float(ranked.sizes[n - 1]), ranked.sites)
    ]


def assembled(circuit: Circuit, sites: Sequence[str]) -> list[Candidate]:
    """The assembled circuit's nodes; its edges play no part in an ablation of nodes."""
    nodes = [(node.site, node.feature) for node in circuit.nodes]
    weakest = min((abs(node.score) for node in circuit.nodes), default=0.0)
    return _both_sides("assembled", nodes, weakest, sites)


def random_circuits(ranked: Ranked, counts: Sequence[int], draws: int, seed: int) -> list[Candidate]:
    """Random circuits matched to those of the n strongest nodes: as many features at each site, the same errors.

    Features are drawn from those with an effect on the training pairs, the circuit's own among them: features that are
    never active would make every circuit look good.
    """
    found = []
    for n in sorted({min(n, len(ranked.nodes)) for n in counts}):
        for draw in range(draws):
            generator = np.random.default_rng([seed, n, draw])
            nodes = _drawn(ranked, n, generator)
            found.append(Candidate("random", "draw", n, float("nan"), draw, kept_nodes(nodes, ranked.sites)))
    return found


def empty(sites: Sequence[str]) -> dict[str, Kept]:
    """∅: every node replaced."""
    return kept_nodes([], sites)


def kept_nodes(nodes: Nodes, sites: Sequence[str]) -> dict[str, Kept]:
    """Nodes by site, as the ablation wants them."""
    at = {site: [feature for where, feature in nodes if where == site] for site in sites}
    return {
        site: Kept(
            torch.tensor([feature for feature in here if feature != ERROR], dtype=torch.int64), ERROR in here
        )
        for site, here in at.items()
    }


def _both_sides(source: str, nodes: Nodes, weakest: float, sites: Sequence[str]) -> list[Candidate]:
    kept = kept_nodes(nodes, sites)
    return [
        Candidate("circuit", source, len(nodes), weakest, -1, kept),
        Candidate("complement", source, len(nodes), weakest, -1, complement(kept)),
    ]


def _drawn(ranked: Ranked, n: int, generator: np.random.Generator) -> Nodes:
    drawn: Nodes = []
    for site in ranked.sites:
        features = [feature for where, feature in ranked.nodes if where == site and feature != ERROR]
        here = [feature for where, feature in ranked.top(n) if where == site]
        errors = here.count(ERROR)
        chosen = generator.choice(len(features), len(here) - errors, replace=False)
        drawn += [(site, features[index]) for index in sorted(chosen.tolist())] + [(site, ERROR)] * errors
    return drawn
