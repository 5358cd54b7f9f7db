"""What circuits of growing size are made of: features and errors, and of which sites."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from circuitflow.attribution.nodes import ERROR
from circuitflow.circuits.circuit import read_circuit
from circuitflow.circuits.conditions import RESIDUAL
from circuitflow.circuits.interventions import Triple
from circuitflow.circuits.members import circuit_nodes
from circuitflow.circuits.sweep import ranked_nodes
from circuitflow.jobs import Output
from circuitflow.models.sites import parse_site
from circuitflow.store.tables import read_table, write_table

FEATURE, RESIDUAL_ERROR, OTHER_ERROR = "feature", "residual_error", "other_error"

CONVENTIONS = {
    "nodes": "the strongest nodes on train over all sites, error nodes included; 'assembled' is the circuit itself",
    "share": "count / number of the circuit's nodes",
    "strength_share": "their part of the circuit's sum of |score|",
    "residual_error": "errors of embed, resid and resid_mid sites; other_error: of all others",
}

COLUMNS = ("source", "nodes", "site", "kind", "count", "share", "strength", "strength_share")


def compose(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. How many features, errors of the residual stream and other errors circuits have, by site.

    Inputs ``nodes`` (table of rank_features) and ``circuit``; params ``sites``, ``ranking`` (absolute | signed),
    ``counts``, ``thresholds``, ``shares`` (as in evaluate_circuit).

    Output ``composition``, one row per circuit, site and kind of node: source ("count", "threshold", "share", "all",
    "assembled"), nodes (of the circuit), site, kind ("feature", "residual_error", "other_error"), count, share (of the
    circuit's nodes), strength (Σ|score|), strength_share (of the circuit's). Every circuit has a row for every site and
    each kind that a site can have, so that shares sum to 1.
    """
    sites, ranking = params["sites"], params["ranking"]
    ranked = ranked_nodes(read_table(inputs["nodes"]), sites, ranking)
    chosen = [
        (source, ranked.top(n), ranked.strengths[:n])
        for n, source in ranked.sizes(params["counts"], params["thresholds"], params["shares"])
    ]
    chosen.append(("assembled", *circuit_nodes(read_circuit(Path(inputs["circuit"])), ranking)))
    rows = [row for source, nodes, strengths in chosen for row in made_of(source, nodes, strengths, sites)]
    columns = {name: [row[place] for row in rows] for place, name in enumerate(COLUMNS)}
    write_table(out.files["composition"], columns, {**out.provenance, "conventions": CONVENTIONS})


def made_of(
    source: str, nodes: Sequence[Triple], strengths: np.ndarray, sites: Sequence[str]
) -> list[tuple[Any, ...]]:
    """The rows of one circuit, in the order of :data:`COLUMNS`; strengths count by their size."""
    size = np.abs(strengths)
    total = float(size.sum())
    rows = []
    for site in sites:
        for kind in (FEATURE, error_kind(site)):
            here = np.array([node[0] == site and kind_of(node) == kind for node in nodes], bool)
            count, strength = int(here.sum()), float(size[here].sum()) if len(nodes) else 0.0
            shares = count / max(len(nodes), 1), strength / total if total else 0.0
            rows.append((source, len(nodes), site, kind, count, shares[0], strength, shares[1]))
    return rows


def kind_of(node: Triple) -> str:
    """The kind of node: a feature, an error of the residual stream, or another error."""
    return error_kind(node[0]) if node[1] == ERROR else FEATURE


def error_kind(site: str) -> str:
    """The kind that the error of a site is."""
    return RESIDUAL_ERROR if parse_site(site).kind in RESIDUAL else OTHER_ERROR
