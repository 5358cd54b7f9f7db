"""Features that error nodes are compared with: a site's strongest, the one like its error, those that add up to it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from circuitflow.attribution.nodes import ERROR, SUMMED
from circuitflow.circuits.interventions import Triple
from circuitflow.circuits.sweep import ranked_nodes
from circuitflow.errors import UserError, nearest

NEAREST, COMMITTEE = "nearest", "committee"


@dataclass(frozen=True)
class ScoredNodes:
    """The nodes of every site, strongest on train first, with their scores."""

    features: Mapping[str, list[Triple]]
    errors: Mapping[str, list[Triple]]
    """One error per site, or one per position."""
    scores: Mapping[str, Mapping[Triple, float]]
    """split → node → mean effect; nodes without one are left out."""

    def score(self, nodes: Sequence[Triple], split: str = "train") -> float:
        """Σ score."""
        return float(sum(self.scores[split].get(node, 0.0) for node in nodes))

    def error_size(self, site: str) -> float:
        """|score| of the site's error, over all positions."""
        return abs(self.score(self.errors[site]))

    def top(self, site: str, k: int) -> list[Triple]:
        """The site's ``k`` strongest features."""
        return self.features[site][:k]

    def nearest(self, site: str) -> list[Triple]:
        """The feature whose |score| is the nearest to the error's."""
        wanted = self.error_size(site)
        return sorted(self.features[site], key=lambda node: abs(self._size(node) - wanted))[:1]

    def committee(self, site: str) -> list[Triple]:
        """The fewest features by falling |score| whose |score| adds up to the error's; all, if they never do."""
        ordered = sorted(self.features[site], key=lambda node: -self._size(node))
        reached = np.cumsum([self._size(node) for node in ordered])
        return ordered[: int(np.searchsorted(reached, self.error_size(site))) + 1]

    def chosen(self, rule: str, site: str) -> list[Triple]:
        """The features that a rule of :func:`rules` picks."""
        if rule == NEAREST:
            return self.nearest(site)
        return self.committee(site) if rule == COMMITTEE else self.top(site, int(rule.removeprefix("top-")))

    def _size(self, node: Triple) -> float:
        return abs(self.scores["train"].get(node, 0.0))


def scored_nodes(table: Mapping[str, np.ndarray], sites: Sequence[str], ranking: str) -> ScoredNodes:
    """What a table of rank_features says of the sites' nodes.

    :raises UserError: a site has no scored feature.
    """
    ranked = ranked_nodes(table, sites, ranking)
    triples = list(
        zip(table["site"].tolist(), table["feature"].tolist(), table["position"].tolist(), strict=True)
    )
    features: dict[str, list[Triple]] = {site: [] for site in sites}
    for node in ranked.nodes:
        if node[1] != ERROR:
            features[node[0]].append(node)
    errors = {site: [node for node in triples if node[:2] == (site, ERROR)] for site in sites}
    scores = {
        split: dict(zip(triples, table[f"score_{split}"].tolist(), strict=True))
        for split in ("train", "test")
    }
    # The error is a node of its site even where its score is 0 and the table leaves it out.
    return ScoredNodes(
        features, {site: found or [(site, ERROR, SUMMED)] for site, found in errors.items()}, scores
    )


def rules(names: Sequence[str]) -> list[str]:
    """Check the names of baselines: "top-1", "top-5", …, "nearest", "committee".

    :raises UserError: a name is none of these.
    """
    for name in names:
        number = name.removeprefix("top-")
        if name not in (NEAREST, COMMITTEE) and not (
            name.startswith("top-") and number.isdecimal() and int(number)
        ):
            raise UserError(
                f"Key error_nodes.baselines has '{name}'; {nearest(name, ['top-1', 'top-5', NEAREST, COMMITTEE])}."
            )
    return list(names)
