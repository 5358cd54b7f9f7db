"""Ablating error nodes and restoring features: the stage that runs the experiments and writes what became of m."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from circuitflow.attribution.nodes import SUMMED
from circuitflow.circuits.evaluation import Evaluation, prepared
from circuitflow.circuits.interventions import Intervention, from_site, nothing
from circuitflow.circuits.measuring import forget_journals, ledger_for, measured
from circuitflow.circuits.statistics import bootstrap, faithfulness
from circuitflow.error_nodes.baselines import ScoredNodes, scored_nodes
from circuitflow.error_nodes.planning import ALL_POSITIONS, ERRORS, Experiment, planned, study_of
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.models.sites import parse_site
from circuitflow.progress import logger
from circuitflow.store.tables import read_table, write_table

Columns = dict[str, Any]


def ablate_error_nodes(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. The metric with error nodes ablated by layer, threshold, position and window, with features ablated in
    their place, and with features restored beside them, on test pairs.

    Inputs ``model``, ``nodes`` (table of rank_features), ``tokens_{split}``, ``gradients_{split}``, ``dictionaries``
    and, for the ablation by means, ``means`` (lists, in the order of ``sites``); params those of
    :func:`circuitflow.circuits.evaluation.prepared` and :func:`circuitflow.error_nodes.planning.planned`, ``ranking``,
    ``aggregate``, ``bootstrap``, ``batch_rows``.

    Output ``experiments``, one row per experiment: experiment, what (see planning.Experiment), first, last (sites of
    the ablated window), layers (of the window), restored_first, restored_last, k, threshold, position (tokens before
    the answer's; −1: all), nodes (ablated), restored, score and score_test (Σ of the ablated nodes' scores; NaN at
    single positions), F, low, high (95 % bootstrap over prompts), predicted (F as the test scores say, to first order),
    m, m_empty, m_full, n (prompts). F = (m − m(∅)) / (m(M) − m(∅)). What is known from earlier runs of the stage is
    not run again.

    :raises UserError: a param names what the run does not have, or prompts have no replacement.
    """
    if params["start"] is not None and params["start"] not in params["sites"]:
        raise UserError(
            f"Key error_nodes.start names {params['start']}, which is no site of this run; "
            f"choose one of {', '.join(params['sites'])}."
        )
    nodes = scored_nodes(read_table(inputs["nodes"]), params["sites"], params["ranking"])
    study = study_of(nodes, params)
    here = prepared(inputs, params, "test")
    answer = here.prompts.pairs.position.cpu().numpy()
    experiments = planned(study, int(answer.max()) + 1)
    logger.info("%d experiments on %d prompts", len(experiments), len(answer))
    ledger = ledger_for(out, params, "test", base="features")

    def run(wanted: Sequence[Intervention]) -> Float[np.ndarray, "interventions n"]:
        return measured(here, wanted, params["batch_rows"], ledger, out.folder)

    empty, values = measured_values(experiments, answer, params, run)
    columns = _columns(experiments, values, empty, here, nodes, params)
    columns["layers"] = [_layers_between(study.levels, one.sites) for one in experiments]
    facts = {
        "conventions": conventions(params),
        "cases": sorted(set(here.prompts.pairs.case)),
        "kinds": list(dict.fromkeys(parse_site(s).kind for level in study.levels for s in level.sites)),
        "ledgers": [ledger.name] if ledger.folder is not None else [],
    }
    write_table(out.files["experiments"], columns, {**out.provenance, **facts})
    ledger.save()
    forget_journals(out.folder)


def measured_values(
    experiments: Sequence[Experiment],
    answer: Int64[np.ndarray, " n"],
    params: Mapping[str, Any],
    run: Any,
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "experiments n"]]:
    """m(∅), and m of every experiment; NaN for prompts that have no such position.

    An experiment at a position before the answer's is at other positions of prompts of other lengths: it is run at each
    of them, and every prompt gives its own.

    :param answer: position of the answer's token in every prompt.
    :param run: gives m of a list of interventions on every prompt; called once.
    """
    sites = params["sites"]
    wanted: list[Intervention] = [from_site(nothing(sites), params["start"], sites)]
    places: list[dict[int, int]] = []
    for one in experiments:
        absolute = (
            [SUMMED] if one.position == ALL_POSITIONS else sorted(set((answer - one.position).tolist()))
        )
        here = {}
        for position in absolute:
            if position >= 0 or one.position == ALL_POSITIONS:
                here[position] = len(wanted)
                wanted.append(one.intervention(sites, position))
        places.append(here)
    found = run(wanted)
    values = np.full((len(experiments), len(answer)), np.nan)
    for row, (one, here) in enumerate(zip(experiments, places, strict=True)):
        for position, number in here.items():
            there = answer - one.position == position if one.position != ALL_POSITIONS else slice(None)
            values[row, there] = found[number, there]
    return found[0], values


def _columns(
    experiments: Sequence[Experiment],
    values: Float[np.ndarray, "experiments n"],
    empty: Float[np.ndarray, " n"],
    here: Evaluation,
    nodes: ScoredNodes,
    params: Mapping[str, Any],
) -> Columns:
    sums = {
        split: np.array([_score(nodes, one, split) for one in experiments]) for split in ("train", "test")
    }
    known = ~np.isnan(values)
    return {
        "experiment": [one.name for one in experiments],
        "what": [one.what for one in experiments],
        "first": [one.sites[0] for one in experiments],
        "last": [one.sites[1] for one in experiments],
        "restored_first": [one.restored_sites[0] for one in experiments],
        "restored_last": [one.restored_sites[1] for one in experiments],
        "k": np.array([one.k for one in experiments], np.int64),
        "threshold": np.array([one.threshold for one in experiments]),
        "position": np.array([one.position for one in experiments], np.int64),
        "nodes": np.array([len(one.removed) for one in experiments], np.int64),
        "restored": np.array([len(one.restored) for one in experiments], np.int64),
        "score": sums["train"],
        "score_test": sums["test"],
        **_faithful(values, empty, here.full, sums["test"], params),
        "m": np.nanmean(values, 1),
        "m_empty": np.array([empty[row].mean() for row in known]),
        "m_full": np.array([here.full[row].mean() for row in known]),
        "n": known.sum(1).astype(np.int64),
    }


def _faithful(
    values: Float[np.ndarray, "experiments n"],
    empty: Float[np.ndarray, " n"],
    full: Float[np.ndarray, " n"],
    scores: Float[np.ndarray, " experiments"],
    params: Mapping[str, Any],
) -> Columns:
    """F with intervals, over the prompts that each experiment has, and the F that Σ score foretells."""
    names = ("F", "low", "high", "predicted")
    found = {name: np.full(len(values), np.nan) for name in names}
    known = ~np.isnan(values)
    for pattern in np.unique(known, axis=0):
        if not pattern.any():
            continue
        rows = (known == pattern).all(1)
        three = values[rows][:, pattern], empty[pattern], full[pattern]
        found["F"][rows] = faithfulness(*three, params["aggregate"])
        found["low"][rows], found["high"][rows] = bootstrap(
            *three, params["aggregate"], params["bootstrap"], params["seed"]
        )
        whole = full[pattern].mean() - empty[pattern].mean()
        found["predicted"][rows] = 1 + scores[rows] / whole if whole else np.nan
    return found


def _score(nodes: ScoredNodes, one: Experiment, split: str) -> float:
    """Σ score of the ablated nodes; scores are known for all positions together."""
    if one.position != ALL_POSITIONS:
        return float("nan")
    if one.what != ERRORS:
        return nodes.score(one.removed, split)
    return sum(nodes.score(nodes.errors[site], split) for site, _, _ in one.removed)


def _layers_between(levels: Sequence[Any], sites: tuple[str, str]) -> int:
    """How many of the studied levels lie in a window; 0 if it is no window of these."""
    place = {site: number for number, level in enumerate(levels) for site in level.sites}
    return place[sites[1]] - place[sites[0]] + 1 if set(sites) <= set(place) else 0


def conventions(params: Mapping[str, Any]) -> dict[str, str]:
    """What the numbers mean: one line per choice that systems make differently."""
    first = params["start"] or params["sites"][0]
    return {
        "F": "(m - m(∅)) / (m(M) - m(∅)); M: the whole model, ∅: every node replaced",
        "metric": f"{params['metric']['kind']}",
        "ablation": f"{params['ablation']}; everything that is not named stays as the changed stream has it",
        "start": f"nothing before {first} is replaced, in no experiment and in ∅",
        "restored": "features held at the value of the clean run of the same prompt, per site of the range",
        "selection": f"features by {'|score|' if params['ranking'] == 'absolute' else 'score'} on train, site by site",
        "nearest": "per site, the feature whose |score| is the nearest to the error's",
        "committee": "per site, the fewest features of falling |score| whose |scores| add up to the error's",
        "threshold": "share of the largest |score| of any node",
        "score": "Σ of the ablated nodes' scores; predicted: F if m rose by Σ score_test, all else linear",
        "aggregate": params["aggregate"],
    }
