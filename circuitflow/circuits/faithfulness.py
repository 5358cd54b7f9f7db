"""How much of the model's behaviour circuits of growing size keep, and how much is left without them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from circuitflow.circuits.circuit import read_circuit
from circuitflow.circuits.columns import stacked
from circuitflow.circuits.conditions import (
    Candidate,
    Condition,
    competing,
    conditions,
    empty,
    grown,
    randomly,
    whole,
)
from circuitflow.circuits.conventions import conventions
from circuitflow.circuits.evaluation import Evaluation, prepared
from circuitflow.circuits.faithfulness_tables import Found, area_rows, circuit_rows, prompt_rows
from circuitflow.circuits.measuring import forget_journals, ledger_for, measured
from circuitflow.circuits.neurons import as_neurons, ranked_neurons
from circuitflow.circuits.sweep import Ranked, ranked_nodes
from circuitflow.errors import UserError, nearest
from circuitflow.jobs import Output
from circuitflow.progress import logger
from circuitflow.store.ledger import Ledger
from circuitflow.store.tables import read_table, write_table


def evaluate_circuit(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Faithfulness and completeness against the number of nodes, on test pairs.

    Inputs ``model``, ``circuit``, ``nodes`` (table of rank_features), ``tokens_{split}``, ``gradients_{split}``,
    ``dictionaries`` and ``means`` (lists, in the order of ``sites``); params ``sites``, ``metric``, ``ranking``
    (absolute | signed), ``positions``, ``counts``, ``thresholds`` (shares of the largest strength), ``shares`` (of all
    nodes, for the areas), ``random_counts``, ``random_draws``, ``ablation`` (mean | zero | patched | resample); for
    conditions beside it ``further_ablations``, ``starts`` (further first sites), ``errors`` (further treatments of
    error nodes: kept | removed | resid_removed | other_removed), ``neurons`` (whether circuits of coordinates are
    evaluated too); ``pairs`` (test pairs used), ``aggregate`` (ratio_of_means | mean_of_ratios), ``bootstrap``,
    ``seed``, ``batch_rows`` (prompt copies per pass), ``dtype``, ``compute``.

    Output ``faithfulness``, one row per circuit, condition and aggregate: series ("circuit", "complement", "random",
    "neurons"), source ("count", "threshold", "share", "all", "assembled", "draw"), threshold, nodes, share, draw;
    ablation, start, errors, main (the condition and aggregate that ``ablation`` and ``aggregate`` name, without further
    start or treatment of errors), aggregate; F, low, high (95 % bootstrap over prompts), m_circuit, m_empty, m_full, n.
    F(C) = (m(C) − m(∅)) / (m(M) − m(∅)); of a complement it is the completeness.
    Output ``prompts``, the same per prompt without random circuits: also pair, case, F of the prompt, outlier (1.5
    interquartile ranges outside the quartiles of its circuit). Output ``areas``, one row per curve and aggregate: CPR
    and CMD (see statistics.areas) with intervals, candidates (all nodes), points.

    :raises UserError: test prompts have no means, a start is no site of the run, or a dictionary has no encoder.
    """
    _check_starts(params)
    ranked = {"features": ranked_nodes(read_table(inputs["nodes"]), params["sites"], params["ranking"])}
    if params.get("neurons"):
        how = (params["sites"], params["ranking"], params["positions"])
        ranked["neurons"] = ranked_neurons(inputs, *how)
    parts: dict[str, list[Any]] = {"faithfulness": [], "prompts": [], "areas": []}
    ledgers, left_out, cases = [], {}, set()
    for together in _run_alike(conditions(params)):
        chosen = {**params, "ablation": together[0].ablation}
        try:
            here = _evaluation(inputs, chosen, together[0].base)
        except UserError as error:
            if together[0].main:
                raise
            logger.warning("the ablation %s is left out: %s", together[0].ablation, error)
            left_out[together[0].ablation] = str(error)
            continue
        ledgers.append(ledger_for(out, chosen, "test", base=together[0].base))
        for condition in together:
            nodes = ranked[condition.base]
            found = _measure(here, condition, nodes, inputs, params, ledgers[-1], out.folder)
            parts["faithfulness"].append(circuit_rows(found, params))
            parts["prompts"].append(prompt_rows(found, here.prompts.pairs))
            parts["areas"].append(area_rows(found, params))
        cases |= set(here.prompts.pairs.case)
    facts = {"conventions": conventions(params), "cases": sorted(cases), "left_out": left_out}
    names = [ledger.name for ledger in ledgers if ledger.folder is not None]
    for name, tables in parts.items():
        write_table(out.files[name], stacked(tables), {**out.provenance, **facts, "ledgers": names})
    for ledger in ledgers:
        ledger.save()
    forget_journals(out.folder)


def _run_alike(found: Sequence[Condition]) -> list[list[Condition]]:
    """Conditions by what they need loaded: an ablation, and features or neurons; the main one's group first."""
    groups: dict[tuple[str, str], list[Condition]] = {}
    for one in found:
        groups.setdefault((one.ablation, one.base), []).append(one)
    return list(groups.values())


def _evaluation(inputs: Mapping[str, Any], params: Mapping[str, Any], base: str) -> Evaluation:
    here = prepared(inputs, params, "test")
    here.sites[0].known("replacement")  # so that what cannot be run is known before anything is
    if base == "features":
        return here
    pairs = here.prompts.pairs
    return replace(here, sites=[as_neurons(site, pairs, params["ablation"]) for site in here.sites])


def _measure(
    here: Evaluation,
    condition: Condition,
    ranked: Ranked,
    inputs: Mapping[str, Any],
    params: Mapping[str, Any],
    ledger: Ledger,
    folder: Path,
) -> Found:
    sites = params["sites"]
    candidates = [
        *grown(ranked, condition, params),
        *whole(read_circuit(Path(inputs["circuit"])), condition, params["ranking"]),
        *randomly(ranked, condition, params),
    ]
    wanted = [empty(condition, sites), *(one.intervention(sites, condition.start) for one in candidates)]
    logger.info("%s: %d circuits", described(condition), len(candidates))
    values = measured(here, wanted, params["batch_rows"], ledger, folder)
    nothing, full = values[0], here.full
    if abs(full.mean() - nothing.mean()) < 1e-6 * max(np.abs(full).max(), np.abs(nothing).max()):
        logger.warning(
            "%s: ablating every node leaves the metric as it is: F means nothing", described(condition)
        )
    return _found(condition, candidates, values[1:], nothing, full, ranked, params)


def _found(
    condition: Condition,
    candidates: Sequence[Candidate],
    values: np.ndarray,
    nothing: np.ndarray,
    full: np.ndarray,
    ranked: Ranked,
    params: Mapping[str, Any],
) -> Found:
    """The results of one condition, with the sizes over which its areas are taken."""
    chosen = competing(ranked, condition)
    sizes = frozenset(chosen.shared(params["shares"]))
    return Found(condition, candidates, values, nothing, full, len(chosen.nodes), sizes)


def _check_starts(params: Mapping[str, Any]) -> None:
    for site in params.get("starts", []):
        if site not in params["sites"]:
            raise UserError(
                f"Key evaluation.starts names {site}, which is no site of this run; {nearest(site, params['sites'])}."
            )


def described(condition: Condition) -> str:
    """A condition in words, for the log."""
    what = "neurons" if condition.base == "neurons" else f"errors {condition.errors}"
    return f"{condition.ablation} from {condition.start}, {what}"
