"""Evaluating interventions on cached prompts: what is loaded for it, in which passes it runs, how it is resumed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
    AblationSite,
    Prompts,
    logits_of_interventions,
    run_interventions,
    start_of,
)
from circuitflow.circuits.interventions import Intervention, everything
from circuitflow.circuits.means import load_means, means_of_store, patched_or_clean
from circuitflow.circuits.replacement import Known, drawn_prompts, run_values, zeros
from circuitflow.circuits.statistics import spread_over_cases
from circuitflow.data.metrics import Metric, metric_of
from circuitflow.data.token_pairs import TokenPairs, load_token_pairs
from circuitflow.dictionaries.dictionary import Dictionary, load_dictionary
from circuitflow.errors import UserError, nearest
from circuitflow.jobs import progress
from circuitflow.models.loading import load_model
from circuitflow.models.running import LanguageModel
from circuitflow.store.arrays import Store, open_store
from circuitflow.store.journal import Journal

ABLATIONS = ("mean", "zero", "patched", "resample")
"""What replaced nodes become: the mean of the patched training inputs at the position in the case, zero, the prompt's
own patched run, or that of another training prompt of the case."""

Plan = list[list[tuple[int, int]]]
"""Forward passes: lists of (intervention, prompt) rows."""

Measure = Callable[[Sequence[tuple[int, int]]], Tensor]
"""Gives m of the rows of one pass."""


@dataclass(frozen=True)
class Evaluation:
    """A model, its sites with what nodes can become, and the prompts on which interventions are measured."""

    lm: LanguageModel
    metric: Metric
    sites: list[AblationSite]
    prompts: Prompts
    full: Float[np.ndarray, " n"]
    """m(M): the metric of every prompt on the whole model."""

    def values(
        self, interventions: Sequence[Intervention], batch_rows: int, journal: Journal | None = None
    ) -> Float[np.ndarray, "interventions n"]:
        """m of every intervention on every prompt; passes that ``journal`` holds are not run again.

        :param batch_rows: copies of prompts per forward pass; the results do not depend on it.
        """

        def measure(rows: Sequence[tuple[int, int]]) -> Float[Tensor, " rows"]:
            return run_interventions(self.lm, self.metric, self.sites, interventions, self.prompts, rows)

        plan = self._planned(interventions, batch_rows)
        return evaluated(plan, measure, (len(interventions), len(self.full)), journal)

    def logits(
        self, interventions: Sequence[Intervention], batch_rows: int
    ) -> Float[np.ndarray, "interventions n vocab"]:
        """Logits where the answer is read, of every intervention on every prompt: for a few."""
        found = None
        for rows in self._planned(interventions, batch_rows):
            here = logits_of_interventions(self.lm, self.sites, interventions, self.prompts, rows)
            if found is None:
                found = np.zeros(
                    (len(interventions), len(self.full), here.shape[1]), here.cpu().numpy().dtype
                )
            intervention, prompt = np.array(rows).T
            found[intervention, prompt] = here.cpu().numpy()
        if found is None:
            raise ValueError("there is nothing to run: no intervention, or no prompt")
        return found

    def _planned(self, interventions: Sequence[Intervention], batch_rows: int) -> Plan:
        return planned(interventions, self.sites, self.prompts.pairs.mask.sum(1).tolist(), batch_rows)


def prepared(inputs: Mapping[str, Any], params: Mapping[str, Any], split: str) -> Evaluation:
    """Load what evaluating on ``params["pairs"]`` prompts of a split takes.

    Inputs ``model``, ``tokens_train``, ``gradients_train``, those of ``split``, ``dictionaries``, and for the ablation
    by means ``means`` (lists, in the order of ``sites``; without ``means`` they are computed here); params ``sites``
    (in order of depth), ``metric``, ``ablation`` (see ABLATIONS), ``pairs``, ``seed`` (for resample), ``dtype``,
    ``compute``. Other runs' values at a site are read and encoded when an intervention first needs them.

    :raises UserError: prompts without a mean, without a patched run, or without another prompt to resample from.
    """
    lm = load_model(inputs["model"], dtype=params["dtype"], device=params["compute"]["device"])
    metric, loader = metric_of(params["metric"]), _Loader.opened(lm, inputs, params, split)
    sites = [loader.site(place) for place in range(len(params["sites"]))]
    here = Evaluation(lm, metric, sites, Prompts(loader.pairs), loader.full())
    if metric.kind != "kl":
        return here
    clean = here.logits([everything(params["sites"])], len(loader.pairs))[0]
    return replace(here, prompts=Prompts(loader.pairs, torch.from_numpy(clean).to(lm.device)))


def planned(
    interventions: Sequence[Intervention],
    sites: Sequence[AblationSite],
    lengths: Sequence[int],
    batch_rows: int,
) -> Plan:
    """Passes of at most ``batch_rows`` rows that start at the same site, with prompts of nearly the same length."""
    starts = [start_of(intervention, sites) for intervention in interventions]
    rows = [(number, prompt) for number in range(len(interventions)) for prompt in range(len(lengths))]
    rows.sort(key=lambda row: (starts[row[0]], lengths[row[1]]))
    plan: Plan = []
    for _, group in groupby(rows, key=lambda row: starts[row[0]]):
        together = list(group)
        plan += [together[start : start + batch_rows] for start in range(0, len(together), batch_rows)]
    return plan


def evaluated(
    plan: Plan, measure: Measure, shape: tuple[int, int], journal: Journal | None = None
) -> np.ndarray:
    """m of every (intervention, prompt); passes that ``journal`` holds are not run again."""
    journal = journal or Journal(None)
    values = np.full(shape, np.nan)
    for number, rows in enumerate(plan):
        intervention, prompt = np.array(rows).T
        values[intervention, prompt] = journal.result(partial(_listed, measure, rows))
        progress("passes", number + 1, len(plan))
    return values


def _listed(measure: Measure, rows: Sequence[tuple[int, int]]) -> list[float]:
    return measure(rows).double().tolist()


@dataclass(frozen=True)
class _Loader:
    """Where the known values of every site come from."""

    lm: LanguageModel
    inputs: Mapping[str, Any]
    params: Mapping[str, Any]
    split: str
    store: Store
    """Cached runs of the evaluated split."""
    chosen: list[int]
    """Numbers of the evaluated pairs in it."""
    pairs: TokenPairs
    """Those pairs, on the model's device."""
    training: TokenPairs

    @classmethod
    def opened(
        cls, lm: LanguageModel, inputs: Mapping[str, Any], params: Mapping[str, Any], split: str
    ) -> "_Loader":
        if params["ablation"] not in ABLATIONS:
            raise UserError(
                f"Ablation {params['ablation']!r} is unknown; {nearest(params['ablation'], ABLATIONS)}."
            )
        every = load_token_pairs(inputs[f"tokens_{split}"])
        chosen = spread_over_cases(every.case, params["pairs"])
        pairs = trimmed(every[chosen]).to(lm.device)
        training = load_token_pairs(inputs["tokens_train"])
        store = open_store(inputs[f"gradients_{split}"])
        return cls(lm, inputs, params, split, store, chosen, pairs, training)

    def full(self) -> Float[np.ndarray, " n"]:
        """m of the clean runs."""
        return self.store.read("metric/clean")[self.chosen].astype(np.float64)

    def site(self, place: int) -> AblationSite:
        """One site; replacements that no prompt of another split is needed for are loaded now, to fail early."""
        name = self.params["sites"][place]
        dictionary = load_dictionary(Path(self.inputs["dictionaries"][place]), self.lm.width(name)).to(
            self.lm.device
        )
        load = {run: partial(self._run, name, dictionary, run) for run in ("clean", "patched")}
        site = AblationSite(
            name, dictionary, {**load, "replacement": partial(self._replacement, place, name, dictionary)}
        )
        if self.params["ablation"] in ("mean", "zero"):
            site.known("replacement")
        progress("sites loaded", place + 1, len(self.params["sites"]))
        return site

    def _replacement(self, place: int, name: str, dictionary: Dictionary) -> Known:
        ablation = self.params["ablation"]
        if ablation == "zero":
            return zeros(dictionary, self.pairs)
        if ablation == "patched":
            return self._run(name, dictionary, "patched")
        if ablation == "resample":
            return self._resampled(name, dictionary)
        if "means" in self.inputs:
            return load_means(Path(self.inputs["means"][place]), dictionary).at(self.pairs, dictionary)
        training = open_store(self.inputs["gradients_train"])
        return means_of_store(training, name, self.training, dictionary).values().at(self.pairs, dictionary)

    def _run(self, name: str, dictionary: Dictionary, run: str) -> Known:
        if run == "patched" and not bool(self.pairs.has_patch.all()):
            raise UserError(
                "Some evaluated prompts have no patched prompt, so nodes cannot take its values; "
                "use the ablation mean, zero or resample."
            )
        return self._known(self.store.read(f"{name}/{run}")[self.chosen], dictionary)

    def _resampled(self, name: str, dictionary: Dictionary) -> Known:
        same = self.chosen if self.split == "train" else []
        drawn = drawn_prompts(self.pairs, self.training, self.params["seed"], same)
        training = open_store(self.inputs["gradients_train"])
        values = patched_or_clean(training, name, self.training, slice(0, len(self.training)))
        return self._known(values.numpy()[drawn], dictionary)

    def _known(self, values: np.ndarray, dictionary: Dictionary) -> Known:
        mask = self.pairs.mask.bool()
        x = torch.from_numpy(values[:, : mask.shape[1]].copy()).to(self.lm.device)
        return run_values(x, mask, dictionary)
