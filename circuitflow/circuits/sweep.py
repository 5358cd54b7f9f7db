"""Nodes by strength: what growing circuits and random ones of the same make-up consist of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from circuitflow.attribution.nodes import ERROR, strength
from circuitflow.circuits.interventions import Triple


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

    def sizes(
        self, counts: Sequence[int], thresholds: Sequence[float] = (), shares: Sequence[float] = ()
    ) -> list[tuple[int, str]]:
        """Numbers of strongest nodes that make a circuit, ascending, each once, and what first asked for each.

        :param counts: node counts; larger ones than there are nodes mean all.
        :param thresholds: for the nodes with at least these shares of the largest strength.
        :param shares: parts of all nodes; at least one node.
        """
        total = len(self.nodes)
        wanted = [(min(n, total), "count") for n in counts]
        wanted += [(len(self.above(threshold)), "threshold") for threshold in thresholds]
        wanted += [(n, "share") for n in self.shared(shares)]
        wanted.append((total, "all"))
        return sorted({n: source for n, source in reversed(wanted) if n}.items())

    def shared(self, shares: Sequence[float]) -> list[int]:
        """The number of nodes that parts of all nodes are, at least one each."""
        return [min(max(round(share * len(self.nodes)), 1), len(self.nodes)) for share in shares]

    def where(self, stays: Sequence[bool]) -> "Ranked":
        """Only some of the nodes."""
        kept = [number for number, stay in enumerate(stays) if stay]
        return Ranked(self.sites, [self.nodes[i] for i in kept], self.strengths[kept])

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


def random_nodes(
    ranked: Ranked, counts: Sequence[int], draws: int, seed: int
) -> list[tuple[int, int, list[Triple]]]:
    """Random circuits as (size, number of the draw, nodes), matched to those of the n strongest nodes: as many features
    at each site and position, and the same errors.

    Features are drawn from those with an effect on the training pairs, the circuit's own among them: features that are
    never active would make every circuit look good.
    """
    sizes = sorted({min(n, len(ranked.nodes)) for n in counts})
    return [
        (n, draw, _drawn(ranked, n, np.random.default_rng([seed, n, draw])))
        for n in sizes
        for draw in range(draws)
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
