"""Which circuits are evaluated: growing ones by strength, the assembled one, and random ones of the same make-up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from circuitflow.attribution.nodes import ERROR, SUMMED, strength
from circuitflow.circuits.ablation import Kept, complement
from circuitflow.circuits.circuit import Circuit

Triple = tuple[str, int, int]
"""A node: site, feature number (the error being −1), position (−1: all positions together)."""


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
    """Strength of the circuit's weakest node."""
    draw: int
    """Number of a random draw, else −1."""
    kept: dict[str, Kept]


@dataclass(frozen=True)
class Ranked:
    """All nodes that have an effect, by falling strength on train over all sites."""

    sites: tuple[str, ...]
    nodes: list[Triple]
    strengths: np.ndarray
    """Of each: |score| or the signed score."""

    def top(self, n: int) -> list[Triple]:
        """The ``n`` strongest."""
        return self.nodes[:n]

    def above(self, threshold: float) -> list[Triple]:
        """All with a strength of at least ``threshold`` times the largest."""
        return self.nodes[: int((self.strengths >= threshold * self.strengths.max(initial=0)).sum())]

    def pooled(self, pool: int) -> "Ranked":
        """Only the ``pool`` strongest features of every site, and the errors: what a circuit is chosen from."""
        seen: dict[str, int] = {}
        kept = []
        for number, (site, feature, _) in enumerate(self.nodes):
            if feature != ERROR:
                seen[site] = seen.get(site, 0) + 1
            if feature == ERROR or seen[site] <= pool:
                kept.append(number)
        return Ranked(self.sites, [self.nodes[i] for i in kept], self.strengths[kept])


def ranked_nodes(table: Mapping[str, np.ndarray], sites: Sequence[str], ranking: str = "absolute") -> Ranked:
    """Nodes of a table of rank_features; equal strengths in order of site, feature number and position."""
    place = {site: index for index, site in enumerate(sites)}
    keep = np.array([site in place for site in table["site"]], bool) & (table["score_train"] != 0)
    site, feature, position = (table[name][keep] for name in ("site", "feature", "position"))
    strengths = strength(table["score_train"][keep], ranking)
    depth = np.array([place[name] for name in site], np.int64)
    order = np.lexsort((position, feature, depth, -strengths))
    nodes = [(site[i], int(feature[i]), int(position[i])) for i in order]
    return Ranked(tuple(sites), nodes, strengths[order])


def growing(ranked: Ranked, counts: Sequence[int], thresholds: Sequence[float]) -> list[Candidate]:
    """Circuits of the n strongest nodes, of all above a relative threshold, and of all; each size once."""
    wanted = [("count", ranked.top(n)) for n in counts]
    wanted += [("threshold", ranked.above(threshold)) for threshold in thresholds]
    wanted.append(("all", ranked.nodes))
    first = {len(nodes): (source, nodes) for source, nodes in reversed(wanted) if nodes}
    return [
        candidate
        for n, (source, nodes) in sorted(first.items())
        for candidate in _both_sides(source, nodes, float(ranked.strengths[n - 1]), ranked.sites)
    ]


def assembled(circuit: Circuit, sites: Sequence[str], ranking: str = "absolute") -> list[Candidate]:
    """The assembled circuit's nodes; its edges play no part in an ablation of nodes."""
    nodes = [
        (node.site, node.feature, SUMMED if node.position is None else node.position)
        for node in circuit.nodes
    ]
    strengths = strength(np.array([node.score for node in circuit.nodes]), ranking)
    return _both_sides("assembled", nodes, float(strengths.min()) if nodes else 0.0, sites)


def random_circuits(ranked: Ranked, counts: Sequence[int], draws: int, seed: int) -> list[Candidate]:
    """Random circuits matched to those of the n strongest nodes: as many features at each site and position, and the
    same errors.

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


def kept_nodes(nodes: Sequence[Triple], sites: Sequence[str]) -> dict[str, Kept]:
    """Nodes by site, as the ablation wants them."""
    found = {}
    for site in sites:
        here = [(feature, position) for where, feature, position in nodes if where == site]
        feature, position = torch.tensor(here, dtype=torch.int64).reshape(-1, 2).unbind(1)
        found[site] = Kept(feature, position)
    return found


def _both_sides(
    source: str, nodes: Sequence[Triple], weakest: float, sites: Sequence[str]
) -> list[Candidate]:
    kept = kept_nodes(nodes, sites)
    return [
        Candidate("circuit", source, len(nodes), weakest, -1, kept),
        Candidate("complement", source, len(nodes), weakest, -1, complement(kept)),
    ]


def _drawn(ranked: Ranked, n: int, generator: np.random.Generator) -> list[Triple]:
    """Features in place of the circuit's, drawn place by place; its errors stay."""
    drawn: list[Triple] = []
    possible, wanted = _by_place(ranked.nodes), _by_place(ranked.top(n))
    for site, position in sorted(wanted, key=lambda place: (ranked.sites.index(place[0]), place[1])):
        features = [feature for feature in possible[site, position] if feature != ERROR]
        here = wanted[site, position]
        errors = here.count(ERROR)
        chosen = generator.choice(len(features), len(here) - errors, replace=False)
        drawn += [(site, features[index], position) for index in sorted(chosen.tolist())]
        drawn += [(site, ERROR, position)] * errors
    return drawn


def _by_place(nodes: Sequence[Triple]) -> dict[tuple[str, int], list[int]]:
    """Feature numbers by site and position, in the order given."""
    found: dict[tuple[str, int], list[int]] = {}
    for site, feature, position in nodes:
        found.setdefault((site, position), []).append(feature)
    return found
