"""How far circuits agree: between tasks, seeds, dictionaries or methods."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from circuitflow.attribution.intervals import rank_correlation
from circuitflow.circuits.circuit import METRIC, Circuit, Edge, Node
from circuitflow.errors import UserError

Key = tuple[str, int, int]
"""A node wherever circuits are compared: site, feature number (−1: error), position (−1: summed)."""

Weights = dict[Any, float]

ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Matched:
    """Features of two dictionaries that are each other's nearest by decoder direction."""

    a: np.ndarray
    """(matches,) feature numbers of the first dictionary, ascending."""
    b: np.ndarray
    """(matches,) the features of the second that belong to them."""
    cosine: np.ndarray
    """(matches,) cosines of their decoder rows."""


def matched_features(W_dec_a: np.ndarray, W_dec_b: np.ndarray, least_cosine: float = 0.7) -> Matched:
    """Pairs of features whose decoder rows are each other's most alike, with a cosine of at least ``least_cosine``.

    Each feature is in one pair at most. Equal cosines go to the lower number; rows of length 0 match nothing.

    :param W_dec_a: (d_dict_a, d_model); ``W_dec_b`` (d_dict_b, d_model).
    :raises UserError: the two are of different width.
    """
    if W_dec_a.shape[1] != W_dec_b.shape[1]:
        raise UserError(
            f"Decoders of width {W_dec_a.shape[1]} and {W_dec_b.shape[1]} cannot be matched; "
            "give two dictionaries of the same site and model."
        )
    a, b = _directions(W_dec_a), _directions(W_dec_b)
    nearest_of_a = np.zeros(len(a), np.int64)
    cosine = np.zeros(len(a))
    nearest_of_b, best = np.full(len(b), -1, np.int64), np.full(len(b), -np.inf)
    for start in range(0, len(a), ROWS_AT_ONCE):
        cosines = a[start : start + ROWS_AT_ONCE] @ b.T
        rows = np.arange(len(cosines))
        nearest_of_a[start + rows] = cosines.argmax(1)
        cosine[start + rows] = cosines.max(1)
        here = cosines.max(0)
        better = here > best
        nearest_of_b[better] = start + cosines.argmax(0)[better]
        best = np.maximum(best, here)
    mutual = nearest_of_b[nearest_of_a] == np.arange(len(a))
    found = np.flatnonzero(mutual & (cosine >= least_cosine) & (cosine > 0))
    return Matched(found, nearest_of_a[found], cosine[found])


def compare(
    circuits: Mapping[str, Circuit], matches: Mapping[tuple[str, str], Mapping[str, Matched]] | None = None
) -> dict[str, Any]:
    """Every two of the named circuits compared; plain values that can be written as JSON.

    Only sites that both circuits have in their lists count. Where the dictionaries of a site differ (by
    ``provenance["dictionaries"]``, content digests by site) or the models do, a feature's number means different
    things: nodes there are not compared, unless ``matches`` says which features belong together; only the shares of
    the effect that the site and its error carry are.

    :param matches: (name of a, name of b) → site → matched features.
    :raises UserError: fewer than two circuits.
    """
    if len(circuits) < 2:
        raise UserError("Comparing takes two circuits or more; name a second circuit.json.")
    return {
        "circuits": [_described(name, circuit) for name, circuit in circuits.items()],
        "pairs": [
            {"a": a, "b": b, **compare_two(circuits[a], circuits[b], (matches or {}).get((a, b), {}))}
            for a, b in combinations(circuits, 2)
        ],
    }


def compare_two(a: Circuit, b: Circuit, matches: Mapping[str, Matched] | None = None) -> dict[str, Any]:
    """One entry of ``pairs`` of :func:`compare`.

    - ``sites`` in common, ``left_out`` (sites of a alone, of b alone), ``compared`` (sites whose nodes are), ``notes``;
    - ``nodes`` and ``edges`` (None if no site is compared): counts ``a``, ``b``, ``both``; ``jaccard``; ``share_a`` and
      ``share_b``, the parts of each that the other has too. Edges count between compared sites, or from one to the
      metric;
    - ``scores`` on the union, 0 where a circuit lacks the node: ``pearson``, ``spearman``, ``weighted_jaccard``
      (Σ min / Σ max of |score|); ``sign_agreement`` is over the nodes of both;
    - ``per_site``: one row per common site with ``effect_share_{a,b}`` (its part of Σ|score| over the common sites),
      ``error_share_{a,b}`` (the error's part of Σ|score| at the site), and nodes and scores as above where compared.
    """
    a, b, notes = _same_positions(a, b)
    common = [site for site in a.sites if site in b.sites]
    left_out = {"a": [s for s in a.sites if s not in common], "b": [s for s in b.sites if s not in common]}
    matched = {site: found for site, found in (matches or {}).items() if site in common}
    compared, reasons = _comparable(a, b, common, matched)
    notes += reasons
    if any(left_out.values()):
        notes.append("sites in only one of the lists do not count; edges lead to the next site of each list")
    key_a, key_b = _key, _translated(matched)
    sides = {"a": _scores(a, key_a, compared), "b": _scores(b, key_b, compared)}
    edges = {"a": _weights(a, key_a, compared), "b": _weights(b, key_b, compared)}
    return {
        "sites": common,
        "left_out": left_out,
        "compared": compared,
        "matched": {site: len(found.a) for site, found in matched.items()},
        "notes": notes,
        "nodes": overlap(sides["a"], sides["b"]) if compared else None,
        "edges": overlap(edges["a"], edges["b"]) if compared else None,
        "scores": agreement(sides["a"], sides["b"]) if compared else None,
        "per_site": [_site_row(site, a, b, common, compared, sides) for site in common],
    }


def overlap(a: Mapping[Any, float], b: Mapping[Any, float]) -> dict[str, float | int | None]:
    """How many keys two sets have and share."""
    both, either = len(a.keys() & b.keys()), len(a.keys() | b.keys())
    return {
        "a": len(a),
        "b": len(b),
        "both": both,
        "jaccard": _ratio(both, either),
        "share_a": _ratio(both, len(a)),
        "share_b": _ratio(both, len(b)),
    }


def agreement(a: Mapping[Any, float], b: Mapping[Any, float]) -> dict[str, float | int | None]:
    """How far values agree on the union of their keys; None where nothing can be said."""
    union = sorted(a.keys() | b.keys())
    x, y = (np.array([side.get(key, 0.0) for key in union]) for side in (a, b))
    both = [(a[key], b[key]) for key in union if key in a and key in b]
    same = sum(np.sign(first) == np.sign(second) for first, second in both)
    return {
        "union": len(union),
        "pearson": _pearson(x, y),
        "spearman": _number(rank_correlation(x, y[None])[0]) if union else None,
        "sign_agreement": _ratio(float(same), len(both)),
        "weighted_jaccard": _ratio(
            float(np.minimum(abs(x), abs(y)).sum()), float(np.maximum(abs(x), abs(y)).sum())
        ),
    }


def _described(name: str, circuit: Circuit) -> dict[str, Any]:
    return {
        "name": name,
        "model": circuit.provenance.get("model"),
        "task": circuit.provenance.get("task"),
        "sites": list(circuit.sites),
        "nodes": len(circuit.nodes),
        "errors": sum(node.kind == "error" for node in circuit.nodes),
        "edges": len(circuit.edges),
    }


def _comparable(
    a: Circuit, b: Circuit, common: Sequence[str], matched: Mapping[str, Matched]
) -> tuple[list[str], list[str]]:
    """Common sites at which a number means the same feature in both circuits, and notes on the others."""
    models = [circuit.provenance.get("model") for circuit in (a, b)]
    if None not in models and models[0] != models[1]:
        found = [site for site in common if site in matched]
        return found, [f"the models differ ({models[0]}, {models[1]}), and so do features of the same number"]
    notes = []
    recorded = [circuit.provenance.get("dictionaries") for circuit in (a, b)]
    digests = [found for found in recorded if found is not None]
    if len(digests) < 2:
        notes.append(
            "a circuit does not record its dictionaries: features of the same number are taken for the same"
        )
        return list(common), notes
    differ = [site for site in common if digests[0].get(site) != digests[1].get(site)]
    if alone := [site for site in differ if site not in matched]:
        notes.append(
            f"dictionaries differ at {', '.join(alone)}: only shares of the effect are compared there"
        )
    if alike := [site for site in differ if site in matched]:
        notes.append(f"dictionaries differ at {', '.join(alike)}: features are matched by decoder direction")
    return [site for site in common if site not in alone], notes


def _same_positions(a: Circuit, b: Circuit) -> tuple[Circuit, Circuit, list[str]]:
    """Both circuits with positions, or both without."""
    placed = [any(node.position is not None for node in circuit.nodes) for circuit in (a, b)]
    if placed[0] == placed[1] or not (a.nodes and b.nodes):
        return a, b, []
    note = "only one circuit has nodes per position: they are summed over positions before comparing"
    return (_summed(a), b, [note]) if placed[0] else (a, _summed(b), [note])


def _summed(circuit: Circuit) -> Circuit:
    """The circuit with the nodes and edges of all positions added up."""
    names = {node.id: replace(node, position=None).id for node in circuit.nodes} | {METRIC: METRIC}
    first: dict[str, Node] = {}
    for node in circuit.nodes:
        known = first.get(names[node.id])
        score = node.score + (known.score if known else 0.0)
        first[names[node.id]] = replace(node, position=None, score=score)
    weights: dict[tuple[str, str], float] = {}
    for edge in circuit.edges:
        ends = names[edge.up], names[edge.down]
        weights[ends] = weights.get(ends, 0.0) + edge.weight
    edges = tuple(Edge(up, down, weight) for (up, down), weight in weights.items())
    return replace(circuit, nodes=tuple(first.values()), edges=edges)


def _key(node: Node) -> Key:
    return node.site, node.feature, -1 if node.position is None else node.position


def _translated(matched: Mapping[str, Matched]) -> Callable[[Node], Key]:
    """Keys for nodes of b in the numbers of a; features without a match get numbers below those of the error."""
    tables = {
        site: dict(zip(found.b.tolist(), found.a.tolist(), strict=True)) for site, found in matched.items()
    }

    def key(node: Node) -> Key:
        site, feature, position = _key(node)
        if site in tables and node.kind == "feature":
            feature = tables[site].get(feature, -2 - feature)
        return site, feature, position

    return key


def _scores(circuit: Circuit, key: Callable[[Node], Key], sites: Sequence[str]) -> Weights:
    return {key(node): node.score for node in circuit.nodes if node.site in sites}


def _weights(circuit: Circuit, key: Callable[[Node], Key], sites: Sequence[str]) -> Weights:
    ends: dict[str, Key] = {node.id: key(node) for node in circuit.nodes if node.site in sites}
    ends[METRIC] = (METRIC, 0, 0)
    return {
        (ends[edge.up], ends[edge.down]): edge.weight
        for edge in circuit.edges
        if edge.up in ends and edge.down in ends
    }


def _site_row(
    site: str,
    a: Circuit,
    b: Circuit,
    common: Sequence[str],
    compared: Sequence[str],
    sides: Mapping[str, Weights],
) -> dict[str, Any]:
    row: dict[str, Any] = {"site": site}
    for name, circuit in (("a", a), ("b", b)):
        size = _size(circuit.at(site))
        row[f"effect_share_{name}"] = _ratio(size, sum(_size(circuit.at(other)) for other in common))
        errors = _size([node for node in circuit.at(site) if node.kind == "error"])
        row[f"error_share_{name}"] = _ratio(errors, size)
    if site in compared:
        here = [{key: score for key, score in side.items() if key[0] == site} for side in sides.values()]
        row |= {"nodes": overlap(*here), "scores": agreement(*here)}
    return row


def _size(nodes: Sequence[Node]) -> float:
    return sum(abs(node.score) for node in nodes)


def _directions(W_dec: np.ndarray) -> np.ndarray:
    rows = np.asarray(W_dec, np.float32)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)


def _pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    x, y = x - x.mean(), y - y.mean()
    return _ratio(float(x @ y), float(np.sqrt((x @ x) * (y @ y))))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
