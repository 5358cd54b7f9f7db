"""Contenders at equal node budgets: other methods, dictionaries, seeds and tasks, each with as many nodes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from circuitflow.attribution.nodes import ERROR, SUMMED
from circuitflow.circuits.circuit import Circuit, Kind, Node, write_circuit
from circuitflow.circuits.evaluation import prepared
from circuitflow.circuits.interventions import keep, nothing
from circuitflow.circuits.measuring import ENGINE, forget_journals, ledger_for, measured
from circuitflow.circuits.sweep import Ranked, ranked_nodes
from circuitflow.jobs import Output
from circuitflow.store.objects import content_of
from circuitflow.store.tables import read_table, write_table

CONVENTIONS = {
    "circuits": "the contender's strongest nodes over all sites on train; error nodes compete by score",
    "ablation": "nodes outside become what evaluation.ablation says, at every site of the run",
    "counts": "a count above the contender's nodes means all of them, and stands as that number",
    "share": "nodes kept, as a part of the contender's own nodes with an effect on train",
}


def evaluate_budget(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. The metric on test pairs with one contender's strongest nodes alone, at every budget.

    Inputs ``model``, ``nodes`` and ``layers`` (tables of rank_features), ``tokens_{split}``, ``gradients_{split}``,
    ``dictionaries`` and optionally ``means`` (lists, in the order of ``sites``); params ``sites``, ``metric``,
    ``means`` (split over whose pairs means are taken where none are given; train by default), ``ranking``,
    ``contender`` and ``method`` (names), ``counts``, ``shares`` (of the contender's nodes, for the areas), ``size``
    (nodes of the circuit that is compared), ``ablation``, ``pairs``, ``seed``, ``batch_rows``, ``dtype``, ``compute``,
    ``model_name``, ``task``.

    Outputs ``values``, one row per budget and prompt: contender, method, source (count | share | all), nodes, share,
    errors (error nodes among them), candidates (all nodes), pair, case, m, m_empty, m_full; ``circuit``: the ``size``
    strongest nodes as a circuit without edges, which keeps the number of train pairs behind their scores (``pairs``
    of its selection).

    :raises UserError: test prompts have no means, or a dictionary has no encoder.
    """
    table, sites = read_table(inputs["nodes"]), list(params["sites"])
    ranked = ranked_nodes(table, sites, params["ranking"])
    inputs_of_means, more = means_over(inputs, params)
    here = prepared(inputs_of_means, params, "test")
    ledger = ledger_for(out, params, "test", ENGINE, **more)
    sizes = ranked.sizes(params["counts"], (), params["shares"])
    wanted = [nothing(sites), *(keep(ranked.top(n), sites) for n, _ in sizes)]
    values = measured(here, wanted, params["batch_rows"], ledger, out.folder)
    pairs, n = here.prompts.pairs, len(here.full)
    count = np.array([n for n, _ in sizes])
    errors = np.array([sum(node[1] == ERROR for node in ranked.top(n)) for n in count])
    columns = {
        "contender": np.full(n * len(sizes), params["contender"], object),
        "method": np.full(n * len(sizes), params["method"], object),
        "source": np.repeat(np.array([source for _, source in sizes], object), n),
        "nodes": np.repeat(count, n),
        "share": np.repeat(count / len(ranked.nodes), n),
        "errors": np.repeat(errors, n),
        "candidates": np.full(n * len(sizes), len(ranked.nodes)),
        "pair": np.tile(pairs.pair.cpu().numpy(), len(sizes)),
        "case": np.tile(np.array(pairs.case, object), len(sizes)),
        "m": values[1:].ravel(),
        "m_empty": np.tile(values[0], len(sizes)),
        "m_full": np.tile(here.full, len(sizes)),
    }
    ledgers = [ledger.name] if ledger.folder is not None else []
    said = {
        "ablated": params["ablation"],
        **({"means": params.get("means", "train")} if by_means(params) else {}),
    }
    facts = {"conventions": {**CONVENTIONS, **said}, "ledgers": ledgers}
    write_table(out.files["values"], columns, {**out.provenance, **facts})
    write_circuit(out.files["circuit"], strongest(table, ranked, params, inputs, out))
    ledger.save()
    forget_journals(out.folder)


def by_means(params: Mapping[str, Any]) -> bool:
    """Whether nodes outside become means."""
    return bool(params["ablation"] == "mean")


def means_over(inputs: Mapping[str, Any], params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The inputs with the pairs over which means are taken as ``train``, and what the ledger depends on besides.

    Means are computed in place, over the train pairs unless ``params["means"]`` says test.
    """
    if not by_means(params) or params.get("means", "train") == "train" or "means" in inputs:
        return dict(inputs), {}
    over = {f"{name}_train": inputs[f"{name}_test"] for name in ("tokens", "gradients")}
    return {**inputs, **over}, {"means": str(params["means"])}


def strongest(
    table: Mapping[str, np.ndarray],
    ranked: Ranked,
    params: Mapping[str, Any],
    inputs: Mapping[str, Any],
    out: Output,
) -> Circuit:
    """The ``size`` strongest nodes as a circuit; it has no edges."""
    sites, names = list(params["sites"]), ("site", "feature", "position", "score_train")
    score = {tuple(key[:3]): key[3] for key in zip(*(table[name].tolist() for name in names), strict=True)}
    order = {site: depth for depth, site in enumerate(sites)}
    nodes = [
        Node(site, _kind(feature), feature, score[site, feature, at], None if at == SUMMED else at)
        for site, feature, at in ranked.top(params["size"])
    ]
    nodes.sort(key=lambda node: (order[node.site], -abs(node.score), node.feature))
    made = {site: content_of(Path(path)) for site, path in zip(sites, inputs["dictionaries"], strict=True)}
    known = {"model": params["model_name"], "task": params["task"], "dictionaries": made}
    selection = {
        "nodes": {"top": params["size"]},
        "edges": None,
        "ranking": params["ranking"],
        "pairs": scored_pairs(Path(inputs["layers"])),
    }
    return Circuit(tuple(sites), tuple(nodes), (), selection, CONVENTIONS, {**out.provenance, **known})


def scored_pairs(layers: Path) -> int:
    """How many train pairs the scores are means over, from the table ``layers`` of rank_features."""
    table = read_table(layers)
    return int(table["n"][table["split"] == "train"].max(initial=0))


def _kind(feature: int) -> Kind:
    return "error" if feature == ERROR else "feature"
