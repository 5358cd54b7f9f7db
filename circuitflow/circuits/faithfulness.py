"""How much of the model's behaviour circuits of growing size keep, and how much is left without them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from circuitflow.circuits.ablation import STARTS, KeptNodes
from circuitflow.circuits.circuit import read_circuit
from circuitflow.circuits.evaluation import prepared
from circuitflow.circuits.statistics import bootstrap, faithfulness
from circuitflow.circuits.sweep import Candidate, assembled, empty, growing, random_circuits, ranked_nodes
from circuitflow.jobs import Output
from circuitflow.models.sites import parse_site
from circuitflow.progress import logger
from circuitflow.store.journal import Journal
from circuitflow.store.tables import read_table, write_table

JOURNAL = "evaluated.jsonl"


def evaluate_circuit(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Faithfulness and completeness against the number of nodes, on test pairs.

    Inputs ``model``, ``circuit``, ``nodes`` (table of rank_features), ``tokens_{split}``, ``gradients_{split}``,
    ``dictionaries`` (list, in the order of ``sites``); params ``sites``, ``metric``, ``counts``, ``random_counts``,
    ``random_draws``, ``pairs`` (test pairs used), ``ablation`` (mean | zero), ``aggregate`` (ratio_of_means |
    mean_of_ratios), ``bootstrap`` (resamples), ``seed``, ``batch_rows`` (prompt copies per pass), ``dtype``,
    ``compute``, ``ranking`` (absolute | signed), optionally ``thresholds`` (shares of the largest strength).

    Output ``faithfulness``, one row per circuit: series ("circuit", "complement", "random"), source, threshold,
    nodes, draw, F, low, high (95 % bootstrap over prompts), m_circuit, m_empty, m_full, n. What was ablated, where and
    how is in the provenance (``conventions``). F(C) = (m(C) − m(∅)) / (m(M) − m(∅)); of a complement it is the
    completeness.

    :raises UserError: test prompts have no means, or a dictionary has no encoder.
    """
    here = prepared(inputs, params, "test")
    ranking = params["ranking"]
    ranked = ranked_nodes(read_table(inputs["nodes"]), params["sites"], ranking)
    candidates = [
        *growing(ranked, params["counts"], params.get("thresholds", [])),
        *assembled(read_circuit(Path(inputs["circuit"])), params["sites"], ranking),
        *random_circuits(ranked, params["random_counts"], params["random_draws"], params["seed"]),
    ]
    circuits: list[KeptNodes] = [empty(params["sites"]), *(candidate.kept for candidate in candidates)]
    journal = Journal(out.folder / JOURNAL)
    values = here.values(circuits, params["batch_rows"], journal)
    columns = _columns(candidates, values[1:], values[0], here.full, params)
    facts = {"conventions": conventions(params), "cases": sorted(set(here.prompts.pairs.case))}
    write_table(out.files["faithfulness"], columns, {**out.provenance, **facts})
    journal.remove()


def conventions(params: Mapping[str, Any]) -> dict[str, str]:
    """What the numbers mean: one line per choice that systems make differently."""
    ablation = {
        "mean": "per-position mean over the patched training inputs of the same case (clean ones if unpaired)",
        "zero": "0, so that an empty circuit leaves b_dec",
    }
    first = params["sites"][0]
    opposed = params["metric"]["kind"] == "logit_difference"
    sign = (
        "wrong - right: negative when the model is right"
        if opposed
        else "the lower, the more the model is right"
    )
    before = (
        f"layers up to {first} are" if parse_site(first).kind in STARTS else f"everything before {first} is"
    )
    order = {"absolute": "|score|", "signed": "score, most positive first,"}[params["ranking"]]
    return {
        "metric": f"{params['metric']['kind']}, {sign}",
        "ablation": f"{params['ablation']}: nodes outside become their {ablation[params['ablation']]}",
        "empty_circuit": "every node of every site ablated",
        "start": f"{before} free in C, in M and in the empty circuit",
        "encoding": "each site encodes the stream as the sites before have left it",
        "selection": f"nodes by {order} on train over all sites, error nodes included",
        "random": "features with an effect on train; as many per site and position as the circuit, the same errors",
        "aggregate": params["aggregate"],
    }


def _columns(
    candidates: Sequence[Candidate],
    values: Float[np.ndarray, "circuits n"],
    nothing: Float[np.ndarray, " n"],
    full: Float[np.ndarray, " n"],
    params: Mapping[str, Any],
) -> dict[str, Any]:
    aggregate, n = params["aggregate"], len(full)
    if abs(full.mean() - nothing.mean()) < 1e-6 * max(np.abs(full).max(), np.abs(nothing).max()):
        logger.warning("ablating every node leaves the metric as it is: F means nothing here")
    low, high = bootstrap(values, nothing, full, aggregate, params["bootstrap"], params["seed"])
    size = len(candidates)
    names = ("series", "source", "threshold", "nodes", "draw")
    return {
        **{name: [getattr(candidate, name) for candidate in candidates] for name in names},
        "F": faithfulness(values, nothing, full, aggregate),
        "low": low,
        "high": high,
        "m_circuit": values.mean(1),
        "m_empty": np.full(size, nothing.mean()),
        "m_full": np.full(size, full.mean()),
        "n": np.full(size, n, np.int64),
    }
