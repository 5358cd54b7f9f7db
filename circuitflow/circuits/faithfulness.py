"""How much of the model's behaviour circuits of growing size keep, and how much is left without them."""

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.attribution.cached import trimmed
from circuitflow.circuits.ablation import (
    STARTS,
    AblationSite,
    Cells,
    KeptNodes,
    Means,
    Prompts,
    clean_logits,
    first_needed,
    run_circuits,
    zeros,
)
from circuitflow.circuits.circuit import read_circuit
from circuitflow.circuits.sweep import Candidate, assembled, empty, growing, random_circuits, ranked_nodes
from circuitflow.data.metrics import metric_of
from circuitflow.data.token_pairs import TokenPairs, load_token_pairs
from circuitflow.dictionaries.dictionary import Dictionary, load_dictionary
from circuitflow.errors import UserError
from circuitflow.jobs import Output, progress
from circuitflow.models.loading import load_model
from circuitflow.models.running import LanguageModel
from circuitflow.models.sites import parse_site
from circuitflow.progress import logger
from circuitflow.provenance import canonical_json
from circuitflow.store.arrays import Store, open_store
from circuitflow.store.tables import read_table, write_table

JOURNAL = "evaluated.jsonl"
MEAN_CHUNK = 64
INTERVAL = (2.5, 97.5)


def evaluate_circuit(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Faithfulness and completeness against the number of nodes, on test pairs.

    Inputs ``model``, ``circuit``, ``nodes`` (table of rank_features), ``tokens_{split}``, ``gradients_{split}``,
    ``dictionaries`` (list, in the order of ``sites``); params ``sites``, ``metric``, ``counts``, ``random_counts``,
    ``random_draws``, ``pairs`` (test pairs used), ``ablation`` (mean | zero), ``aggregate`` (ratio_of_means |
    mean_of_ratios), ``bootstrap`` (resamples), ``seed``, ``batch_rows`` (prompt copies per pass), ``dtype``,
    ``compute``, optionally ``thresholds`` (shares of the largest |score|).

    Output ``faithfulness``, one row per circuit: series ("circuit", "complement", "random"), source, threshold,
    nodes, draw, F, low, high (95 % bootstrap over prompts), m_circuit, m_empty, m_full, n. What was ablated, where and
    how is in the provenance (``conventions``). F(C) = (m(C) − m(∅)) / (m(M) − m(∅)); of a complement it is the
    completeness.

    :raises UserError: test prompts have no means, a dictionary has no encoder, or the first site is not residual.
    """
    device = params["compute"]["device"]
    lm = load_model(inputs["model"], dtype=params["dtype"], device=device)
    metric = metric_of(params["metric"])
    sites = _sites(lm, inputs, params)
    prompts, full = _prompts(lm, inputs, params, sites)
    ranked = ranked_nodes(read_table(inputs["nodes"]), params["sites"])
    candidates = [
        *growing(ranked, params["counts"], params.get("thresholds", [])),
        *assembled(read_circuit(Path(inputs["circuit"])), params["sites"]),
        *random_circuits(ranked, params["random_counts"], params["random_draws"], params["seed"]),
    ]

    def measure(rows: Sequence[tuple[int, int]]) -> Float[Tensor, " rows"]:
        return run_circuits(lm, metric, sites, circuits, prompts, rows)

    circuits: list[KeptNodes] = [empty(params["sites"]), *(candidate.kept for candidate in candidates)]
    plan = planned(circuits, sites, prompts.pairs.mask.sum(1).tolist(), params["batch_rows"])
    values = evaluated(plan, measure, (len(circuits), len(prompts.pairs)), out.folder / JOURNAL)
    columns = _columns(candidates, values[1:], values[0], full, params)
    facts = {"conventions": conventions(params), "cases": sorted(set(prompts.pairs.case))}
    write_table(out.files["faithfulness"], columns, {**out.provenance, **facts})
    (out.folder / JOURNAL).unlink(missing_ok=True)


def conventions(params: Mapping[str, Any]) -> dict[str, str]:
    """What the numbers mean: one line per choice that systems make differently."""
    ablation = {
        "mean": "per-position mean over the patched training inputs of the same case (clean ones if unpaired)",
        "zero": "0, so that an empty circuit leaves b_dec",
    }
    return {
        "metric": f"{params['metric']['kind']}, wrong - right: negative when the model is right",
        "ablation": f"{params['ablation']}: nodes outside become their {ablation[params['ablation']]}",
        "empty_circuit": "every node of every site ablated",
        "start": f"layers up to {params['sites'][0]} are free in C, in M and in the empty circuit",
        "encoding": "each site encodes the stream as the sites before have left it",
        "selection": "nodes by |score| on train over all sites, error nodes included",
        "random": "features with an effect on train; as many per site as the circuit, the same error nodes",
        "aggregate": params["aggregate"],
    }


Numbers = np.ndarray | np.floating

Plan = list[list[tuple[int, int]]]
"""Forward passes: lists of (circuit, prompt) rows."""


def planned(
    circuits: Sequence[KeptNodes], sites: Sequence[AblationSite], lengths: Sequence[int], batch_rows: int
) -> Plan:
    """Passes of at most ``batch_rows`` rows that start at the same site, with prompts of nearly the same length."""
    starts = [first_needed(circuit, sites) for circuit in circuits]
    rows = [(circuit, prompt) for circuit in range(len(circuits)) for prompt in range(len(lengths))]
    rows.sort(key=lambda row: (starts[row[0]], lengths[row[1]]))
    plan: Plan = []
    for _, group in groupby(rows, key=lambda row: starts[row[0]]):
        together = list(group)
        plan += [together[start : start + batch_rows] for start in range(0, len(together), batch_rows)]
    return plan


def evaluated(plan: Plan, measure: Any, shape: tuple[int, int], journal: Path | None = None) -> np.ndarray:
    """m of every (circuit, prompt); finished passes are kept in ``journal``, after which an interrupted run goes on."""
    values = np.full(shape, np.nan)
    done = _finished(journal)
    for number, rows in enumerate(plan):
        if number < len(done):
            found = done[number]
        else:
            found = measure(rows).double().tolist()
            if journal is not None:
                _note(journal, found)
        circuit, prompt = np.array(rows).T
        values[circuit, prompt] = found
        progress("passes", number + 1, len(plan))
    return values


def faithfulness(circuit: np.ndarray, empty: np.ndarray, full: np.ndarray, aggregate: str) -> np.ndarray:
    """F from the metric of each prompt; NaN where emptying the circuit changes nothing.

    :param circuit: m(C), (…, n) with any leading axes; ``empty``, m(∅), and ``full``, m(M), broadcast against it.
    :param aggregate: how the n prompts are averaged: "ratio_of_means" or "mean_of_ratios".
    """
    if aggregate == "mean_of_ratios":
        return np.asarray(_ratio(circuit - empty, full - empty).mean(-1))
    return _ratio((circuit - empty).mean(-1), (full - empty).mean(-1))


def bootstrap(
    circuit: np.ndarray, empty: np.ndarray, full: np.ndarray, aggregate: str, draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """95 % intervals of F over resampled prompts: the same prompts for C, ∅ and M, and for every circuit.

    :param circuit: (circuits, n); the others (n,).
    """
    n = len(empty)
    index = np.random.default_rng(seed).integers(0, n, (draws, n))
    low_high = [
        np.percentile(faithfulness(one[index], empty[index], full[index], aggregate), INTERVAL)
        for one in circuit
    ]
    low, high = np.array(low_high).reshape(-1, 2).T
    return low, high


def spread_over_cases(cases: Sequence[str], n: int) -> list[int]:
    """``n`` prompts (all, if there are fewer), taken from the cases in turn, in their order."""
    turn: dict[str, int] = {}
    keys = []
    for index, case in enumerate(cases):
        keys.append((turn.get(case, 0), case, index))
        turn[case] = turn.get(case, 0) + 1
    return sorted(index for _, _, index in sorted(keys)[:n])


def _ratio(numerator: Numbers, denominator: Numbers) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator == 0, np.nan, numerator / denominator)


def _sites(lm: LanguageModel, inputs: Mapping[str, Any], params: Mapping[str, Any]) -> list[AblationSite]:
    if parse_site(params["sites"][0]).kind not in STARTS:
        raise UserError(
            f"The first site is {params['sites'][0]}, but evaluation starts on the residual stream; "
            "list embed or a resid.L first."
        )
    store, pairs = open_store(inputs["gradients_train"]), load_token_pairs(inputs["tokens_train"])
    cells = Cells(tuple(sorted(set(pairs.case))), pairs.mask.shape[1])
    found = []
    for site, path in zip(params["sites"], inputs["dictionaries"], strict=True):
        dictionary = load_dictionary(Path(path), lm.width(site)).to(lm.device)
        if params["ablation"] == "zero":
            replacement = zeros(dictionary, cells)
        else:
            replacement = mean_over_patched(store, site, pairs, dictionary, cells).replacement()
        found.append(AblationSite(site, dictionary, replacement))
        progress("sites with means", len(found), len(params["sites"]))
    return found


def mean_over_patched(
    store: Store, site: str, pairs: TokenPairs, dictionary: Dictionary, cells: Cells
) -> Means:
    """Means of a site over the cached patched inputs; over the clean input of a pair that has no patched one."""
    means, device = Means(dictionary, cells), dictionary.W_dec.device
    for start in range(0, len(pairs), MEAN_CHUNK):
        stop = min(start + MEAN_CHUNK, len(pairs))
        here = pairs[start:stop]
        clean, patched = (
            torch.from_numpy(store.read(f"{site}/{run}", start, stop)) for run in ("clean", "patched")
        )
        x = torch.where(here.has_patch[:, None, None], patched, clean)
        means.add(x.to(device), here.to(device))
    return means


def _prompts(
    lm: LanguageModel, inputs: Mapping[str, Any], params: Mapping[str, Any], sites: Sequence[AblationSite]
) -> tuple[Prompts, np.ndarray]:
    """The test prompts used and their m on the whole model."""
    everything, store = load_token_pairs(inputs["tokens_test"]), open_store(inputs["gradients_test"])
    chosen = spread_over_cases(everything.case, params["pairs"])
    pairs = trimmed(everything[chosen])
    train = load_token_pairs(inputs["tokens_train"])
    cells = Cells(tuple(sorted(set(train.case))), train.mask.shape[1])
    first = store.read(f"{sites[0].name}/clean")[chosen][:, : pairs.mask.shape[1]]
    prompts = Prompts(
        pairs.to(lm.device), cells.of(pairs).to(lm.device), torch.from_numpy(first.copy()).to(lm.device)
    )
    if params["metric"]["kind"] == "kl":
        reference = clean_logits(lm, sites[0].name, prompts)
        prompts = Prompts(prompts.pairs, prompts.cell, prompts.first, reference)
    return prompts, store.read("metric/clean")[chosen].astype(np.float64)


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


def _finished(journal: Path | None) -> list[list[float]]:
    """Passes of an interrupted run; its last line may have been torn."""
    if journal is None or not journal.is_file():
        return []
    text = journal.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        journal.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def _note(journal: Path, found: list[float]) -> None:
    with open(journal, "a", encoding="utf-8") as file:
        file.write(canonical_json(found) + "\n")
