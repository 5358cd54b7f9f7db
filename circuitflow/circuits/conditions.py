"""Under which conditions circuits are evaluated: one way in full, and others that each change one thing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from circuitflow.attribution.nodes import ERROR
from circuitflow.circuits.circuit import Circuit
from circuitflow.circuits.interventions import Intervention, Triple, complement, from_site, keep, nothing
from circuitflow.circuits.members import circuit_nodes
from circuitflow.circuits.sweep import Ranked, random_nodes
from circuitflow.models.sites import depth_order, parse_site

RESIDUAL = ("embed", "resid", "resid_mid")
"""Kinds of site whose errors are those of the residual stream."""

ERRORS = ("scored", "kept", "removed", "resid_removed", "other_removed")
"""What becomes of error nodes: they compete by score with features; all are kept, beside the strongest features; none
is; none of the residual stream is, or none of other sites, while the rest competes."""


@dataclass(frozen=True)
class Condition:
    """One way of evaluating circuits; the rows of one condition make one curve."""

    ablation: str
    start: str
    """The first site at which anything is replaced."""
    errors: str
    base: str = "features"
    """"features" of the run's dictionaries, or "neurons": the coordinates of its sites."""
    main: bool = False
    """Whether it is the one that figures and the page tell about if they tell about one."""


@dataclass(frozen=True)
class Candidate:
    """A circuit to evaluate and where it came from."""

    series: str
    """"circuit", "complement" (everything but a circuit), "random" or "neurons"."""
    source: str
    """"count" (the n strongest), "threshold", "share" (of all), "all", "assembled" or "draw"."""
    nodes: tuple[Triple, ...]
    """The circuit's nodes (of a complement: the nodes taken away)."""
    threshold: float
    """Strength of the circuit's weakest node that was chosen for it."""
    share: float
    """The part of the condition's nodes that was chosen; NaN where it was not the strongest ones."""
    draw: int = -1
    """Number of a random draw, else −1."""

    def intervention(self, sites: Sequence[str], start: str) -> Intervention:
        """What becomes of all nodes: sites before ``start`` are left as they are."""
        kept = keep(self.nodes, sites)
        return from_site(complement(kept) if self.series == "complement" else kept, start, sites)


def conditions(params: Mapping[str, Any]) -> list[Condition]:
    """The main condition, then others; each changes one thing, and none is listed twice.

    Of ``errors``, what comes to the same as another for these sites is left out.
    """
    sites = params["sites"]
    main = Condition(params["ablation"], sites[0], "scored", main=True)
    other = replace(main, main=False)
    found = [main]
    found += [replace(other, ablation=name) for name in params.get("further_ablations", [])]
    found += [replace(other, start=site) for site in params.get("starts", [])]
    found += [replace(other, errors=name) for name in params.get("errors", []) if _differs(name, sites)]
    if params.get("neurons"):
        found.append(replace(other, base="neurons", errors="none"))
    seen: dict[Condition, Condition] = {}
    for one in found:
        seen.setdefault(replace(one, main=False), one)
    return list(seen.values())


def _differs(errors: str, sites: Sequence[str]) -> bool:
    """Whether removing some errors is neither removing all nor none."""
    kinds = {parse_site(site).kind in RESIDUAL for site in sites}
    return errors in ("kept", "removed") or (errors != "scored" and len(kinds) == 2)


def empty(condition: Condition, sites: Sequence[str]) -> Intervention:
    """∅ of a condition: from its start on every node is replaced, errors too."""
    return from_site(nothing(sites), condition.start, sites)


def reached(ranked: Ranked, start: str) -> Ranked:
    """The nodes at a site and after it."""
    first = depth_order(parse_site(start))
    return ranked.where([depth_order(parse_site(site)) >= first for site, _, _ in ranked.nodes])


def grown(ranked: Ranked, condition: Condition, params: Mapping[str, Any]) -> list[Candidate]:
    """Circuits of the strongest nodes by rising size, each size once, and their complements.

    Neurons and other treatments of errors have no complements.
    """
    chosen = competing(ranked, condition)
    extra = _always(ranked, condition)
    found = []
    for n, source in chosen.sizes(params["counts"], params.get("thresholds", []), params.get("shares", [])):
        nodes = (*chosen.top(n), *extra)
        weakest, share = float(chosen.strengths[n - 1]), n / len(chosen.nodes)
        if condition.base == "neurons":
            found.append(Candidate("neurons", source, nodes, weakest, share))
            continue
        found.append(Candidate("circuit", source, nodes, weakest, share))
        if condition.errors == "scored":
            found.append(Candidate("complement", source, nodes, weakest, share))
    return found


def whole(circuit: Circuit, condition: Condition, ranking: str) -> list[Candidate]:
    """The assembled circuit and its complement; its edges play no part in an ablation of nodes.

    Nodes before the start are no part of it there; other treatments of errors do not apply to it.
    """
    if condition.base == "neurons" or condition.errors != "scored":
        return []
    nodes, strengths = circuit_nodes(circuit, ranking)
    first = depth_order(parse_site(condition.start))
    inside = [depth_order(parse_site(site)) >= first for site, _, _ in nodes]
    nodes = [node for node, kept in zip(nodes, inside, strict=True) if kept]
    weakest = float(strengths[inside].min()) if nodes else 0.0
    return [
        Candidate(series, "assembled", tuple(nodes), weakest, float("nan"))
        for series in ("circuit", "complement")
    ]


def randomly(ranked: Ranked, condition: Condition, params: Mapping[str, Any]) -> list[Candidate]:
    """Random circuits of the main condition (see :func:`circuitflow.circuits.sweep.random_nodes`)."""
    if not condition.main:
        return []
    drawn = random_nodes(ranked, params["random_counts"], params["random_draws"], params["seed"])
    nan = float("nan")
    return [Candidate("random", "draw", tuple(nodes), nan, nan, draw) for _, draw, nodes in drawn]


def competing(ranked: Ranked, condition: Condition) -> Ranked:
    """The nodes that a condition's circuits are chosen from by strength."""
    from_start = reached(ranked, condition.start)
    if condition.errors in ("scored", "none"):
        return from_start
    return from_start.where(
        [_competes(site, feature, condition.errors) for site, feature, _ in from_start.nodes]
    )


def _competes(site: str, feature: int, errors: str) -> bool:
    residual = parse_site(site).kind in RESIDUAL
    gone = {"resid_removed": residual, "other_removed": not residual}.get(errors, True)
    return feature != ERROR or not gone


def _always(ranked: Ranked, condition: Condition) -> list[Triple]:
    """Error nodes that are in every circuit."""
    if condition.errors != "kept":
        return []
    return [node for node in reached(ranked, condition.start).nodes if node[1] == ERROR]
