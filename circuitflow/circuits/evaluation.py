"""Evaluating circuits on cached prompts: what is loaded for it, in which passes it runs, and how it is resumed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
from circuitflow.circuits.statistics import spread_over_cases
from circuitflow.data.metrics import Metric, metric_of
from circuitflow.data.token_pairs import TokenPairs, load_token_pairs
from circuitflow.dictionaries.dictionary import Dictionary, load_dictionary
from circuitflow.jobs import progress
from circuitflow.models.loading import load_model
from circuitflow.models.running import LanguageModel
from circuitflow.models.sites import parse_site
from circuitflow.store.arrays import Store, open_store
from circuitflow.store.journal import Journal

MEAN_CHUNK = 64

Plan = list[list[tuple[int, int]]]
"""Forward passes: lists of (circuit, prompt) rows."""

Measure = Callable[[Sequence[tuple[int, int]]], Tensor]
"""Gives m of the rows of one pass."""


@dataclass(frozen=True)
class Evaluation:
    """A model, its sites with what replaces their nodes, and the prompts on which circuits are measured."""

    lm: LanguageModel
    metric: Metric
    sites: list[AblationSite]
    prompts: Prompts
    full: Float[np.ndarray, " n"]
    """m(M): the metric of every prompt on the whole model."""

    def values(
        self, circuits: Sequence[KeptNodes], batch_rows: int, journal: Journal | None = None
    ) -> Float[np.ndarray, "circuits n"]:
        """m of every circuit on every prompt; passes that ``journal`` holds are not run again."""

        def measure(rows: Sequence[tuple[int, int]]) -> Float[Tensor, " rows"]:
            return run_circuits(self.lm, self.metric, self.sites, circuits, self.prompts, rows)

        plan = planned(circuits, self.sites, self.prompts.pairs.mask.sum(1).tolist(), batch_rows)
        return evaluated(plan, measure, (len(circuits), len(self.full)), journal)


def prepared(inputs: Mapping[str, Any], params: Mapping[str, Any], split: str) -> Evaluation:
    """Load what evaluating on ``params["pairs"]`` prompts of a split takes.

    Inputs ``model``, ``tokens_train``, ``gradients_train`` (for the means), those of ``split``, and ``dictionaries``;
    params ``sites``, ``metric``, ``ablation``, ``pairs``, ``dtype``, ``compute``.
    """
    lm = load_model(inputs["model"], dtype=params["dtype"], device=params["compute"]["device"])
    sites = _sites(lm, inputs, params)
    prompts, full = _prompts(lm, inputs, params, sites, split)
    return Evaluation(lm, metric_of(params["metric"]), sites, prompts, full)


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


def evaluated(
    plan: Plan, measure: Measure, shape: tuple[int, int], journal: Journal | None = None
) -> np.ndarray:
    """m of every (circuit, prompt); passes that ``journal`` holds are not run again."""
    journal = journal or Journal(None)
    values = np.full(shape, np.nan)
    for number, rows in enumerate(plan):
        circuit, prompt = np.array(rows).T
        values[circuit, prompt] = journal.result(partial(_listed, measure, rows))
        progress("passes", number + 1, len(plan))
    return values


def _listed(measure: Measure, rows: Sequence[tuple[int, int]]) -> list[float]:
    return measure(rows).double().tolist()


def _sites(lm: LanguageModel, inputs: Mapping[str, Any], params: Mapping[str, Any]) -> list[AblationSite]:
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
    lm: LanguageModel,
    inputs: Mapping[str, Any],
    params: Mapping[str, Any],
    sites: Sequence[AblationSite],
    split: str,
) -> tuple[Prompts, np.ndarray]:
    """The prompts used and their m on the whole model."""
    everything, store = load_token_pairs(inputs[f"tokens_{split}"]), open_store(inputs[f"gradients_{split}"])
    chosen = spread_over_cases(everything.case, params["pairs"])
    pairs = trimmed(everything[chosen])
    train = load_token_pairs(inputs["tokens_train"])
    cells = Cells(tuple(sorted(set(train.case))), train.mask.shape[1])
    first = None
    if parse_site(sites[0].name).kind in STARTS:
        cached = store.read(f"{sites[0].name}/clean")[chosen][:, : pairs.mask.shape[1]]
        first = torch.from_numpy(cached.copy()).to(lm.device)
    prompts = Prompts(pairs.to(lm.device), cells.of(pairs).to(lm.device), first)
    if params["metric"]["kind"] == "kl":
        reference = clean_logits(lm, sites[0].name, prompts)
        prompts = Prompts(prompts.pairs, prompts.cell, prompts.first, reference)
    return prompts, store.read("metric/clean")[chosen].astype(np.float64)
