"""Exact effects: each node of a site patched alone, the model run on from there, the true difference of the metric."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from circuitflow.attribution.cached import Batch, read_batch
from circuitflow.attribution.changes import Changes, Effects, changes_of
from circuitflow.attribution.gradients import gradient_run
from circuitflow.attribution.nodes import SUMMED, top_nodes
from circuitflow.attribution.rerun import BaseRun, base_run, start_of
from circuitflow.attribution.scores import (
    CHUNK_PAIRS,
    TABLES,
    SplitScores,
    Tally,
    check_positions,
    write_scores,
)
from circuitflow.data.metrics import Metric, metric_of
from circuitflow.data.token_pairs import SPLITS, TokenPairs, load_token_pairs
from circuitflow.dictionaries.dictionary import Dictionary, load_dictionary
from circuitflow.jobs import Output, progress
from circuitflow.models.loading import load_model
from circuitflow.models.running import LanguageModel
from circuitflow.store.arrays import Store, open_store
from circuitflow.store.journal import Journal
from circuitflow.store.tables import read_table

JOURNAL = "patched.{split}.jsonl"


def patch_nodes(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Exact patching of the features and the error of one site, on both splits; tables as score_nodes writes.

    Inputs ``model``, ``dictionary``, ``gradients_{split}``, ``tokens_{split}``, and with a budget ``scores`` (AtP table
    of this site); params ``site``, ``metric``, ``budget`` (features patched, or with positions "none" pairs of feature
    and position, the strongest by |AtP score| on train; None: all that differ; the error always is), ``positions``
    (sum | last | none), ``batch_rows`` (patched prompts per pass), ``dtype``, ``compute``. With positions "sum" a node
    is patched at all its tokens at once, and the table ``positions`` is empty. The provenance tells how many nodes were
    left out.
    """
    lm = load_model(inputs["model"], dtype=params["dtype"], device=params["compute"]["device"])
    site, positions, metric = params["site"], params.get("positions", "sum"), metric_of(params["metric"])
    dictionary = load_dictionary(inputs["dictionary"], lm.width(site)).to(lm.device)
    found, left_out = {}, {}
    journals = {split: Journal(out.folder / JOURNAL.format(split=split)) for split in SPLITS}
    for split in SPLITS:
        pairs = load_token_pairs(inputs[f"tokens_{split}"])
        check_positions(positions, pairs, split)
        chosen = _chosen(inputs, params, dictionary, pairs.mask.shape[1] if positions == "none" else 1)
        plan = Plan(site, dictionary, positions, chosen, params["batch_rows"])
        found[split], left_out[split] = patch_split(
            lm, metric, open_store(inputs[f"gradients_{split}"]), pairs, plan, journals[split]
        )
    notes = {"budget": {"features": params.get("budget"), "nodes_left_out": left_out}}
    files = {name: out.files[name] for name in TABLES}
    write_scores(found, site, "exact", positions, out, files, notes)
    for journal in journals.values():
        journal.remove()


@dataclass(frozen=True)
class Plan:
    """What is patched."""

    site: str
    dictionary: Dictionary
    positions: str
    chosen: Bool[Tensor, "slots d_dict"]
    """Which features are patched: one row, or one per position if nodes have one."""
    batch_rows: int


def patch_split(
    lm: LanguageModel,
    metric: Metric,
    store: Store,
    pairs: TokenPairs,
    plan: Plan,
    journal: Journal | None = None,
) -> tuple[SplitScores, int]:
    """Exact effects of a split, and how many nodes that differ somewhere the budget left out."""
    journal = journal or Journal(None)
    tally, seen = Tally(pairs, plan.dictionary.d_dict, plan.positions), torch.zeros_like(plan.chosen)
    for start in range(0, len(pairs), CHUNK_PAIRS):
        stop = min(start + CHUNK_PAIRS, len(pairs))
        batch = read_batch(store, [plan.site], pairs, start, stop, lm.device)
        stream = start_of(plan.site, lm.arch).stream
        known = (
            read_batch(store, [stream], pairs, start, stop, lm.device).sites if _has(store, stream) else {}
        )
        values = {name: cached.base for name, cached in known.items()}
        base = base_run(lm, metric, batch.pairs, gradient_run(metric), [stream], values)
        changes = _changes(batch, plan)
        rows = interventions(changes, plan, seen)
        tally.add(measured(base, rows, plan, journal), start)
        progress("pairs", stop, len(pairs))
    return tally.result(), int((seen & ~plan.chosen).sum())


@dataclass(frozen=True)
class Interventions:
    """Nodes to patch alone: one row per pair and node, with the vectors that patching adds to the site's tokens."""

    pair: Int64[Tensor, " rows"]
    node: Int64[Tensor, " rows"]
    """d_dict is the error."""
    position: Int64[Tensor, " rows"]
    row: Int64[Tensor, " entries"]
    """Ascending."""
    at: Int64[Tensor, " entries"]
    """Token position of an entry."""
    vectors: "Vectors"
    d_dict: int

    def change(self, start: int, stop: int, pos: int) -> Float[Tensor, "rows pos d_model"]:
        """patched − clean of the nodes ``start`` to ``stop`` at their tokens."""
        first, last = torch.searchsorted(
            self.row, torch.tensor([start, stop], device=self.row.device)
        ).tolist()
        vectors = self.vectors.of(slice(first, last))
        change = vectors.new_zeros(stop - start, pos, vectors.shape[1])
        return change.index_put_((self.row[first:last] - start, self.at[first:last]), vectors)


@dataclass(frozen=True)
class Vectors:
    """value · decoder row for entries of features, rows of ``error`` for entries of errors (``feature`` is d_dict)."""

    feature: Int64[Tensor, " entries"]
    value: Float[Tensor, " entries"]
    token: Int64[Tensor, " entries"]
    error: Float[Tensor, "n d_model"]
    W_dec: Float[Tensor, "d_dict d_model"]

    def of(self, part: slice) -> Float[Tensor, "entries d_model"]:
        """The vectors of some entries."""
        feature, is_error = self.feature[part], self.feature[part] == len(self.W_dec)
        result = self.error[self.token[part]]
        rows = self.W_dec[feature[~is_error]] * self.value[part][~is_error, None]
        result[~is_error] = rows
        return result


def interventions(changes: Changes, plan: Plan, seen: Bool[Tensor, "slots d_dict"]) -> Interventions:
    """The chosen nodes of a batch in the pairs in which they are active; notes every active one in ``seen``."""
    features, d_dict = changes.features, plan.dictionary.d_dict
    token = features.rows()
    slot = changes.position[token] if plan.positions == "none" else torch.zeros_like(token)
    seen[slot.to(seen.device), features.features.to(seen.device)] = True
    keep = plan.chosen.to(token.device)[slot, features.features]
    every = torch.arange(len(changes.pair), device=token.device)
    token = torch.cat([token[keep], every])
    feature = torch.cat([features.features[keep], torch.full_like(every, d_dict)])
    error = changes.error(plan.dictionary.W_dec)
    value = torch.cat([features.values[keep], torch.ones_like(error[:, 0])])
    pair, at = changes.pair[token], changes.position[token]
    pos = int(at.max()) + 1 if len(at) else 1
    place = at if plan.positions == "none" else torch.zeros_like(at)
    keys, row = torch.unique((pair * (d_dict + 1) + feature) * pos + place, return_inverse=True)
    order = torch.argsort(row, stable=True)
    vectors = Vectors(feature[order], value[order], token[order], error, plan.dictionary.W_dec)
    position = keys % pos if plan.positions == "none" else _position_of(keys, plan, changes)
    node = keys // pos % (d_dict + 1)
    return Interventions(keys // pos // (d_dict + 1), node, position, row[order], at[order], vectors, d_dict)


def measured(base: BaseRun, rows: Interventions, plan: Plan, journal: Journal) -> Effects:
    """The effects of all rows: m with the node patched − m without, on the clean run.

    Where gradients are taken on the patched run (kl) so is this: there the node goes back to its clean value.
    """
    sign = 1.0 if gradient_run(base.metric) == "clean" else -1.0
    pos, total = base.pairs.mask.shape[1], len(rows.pair)
    plain = torch.tensor(journal.result(lambda: _plain(base, plan)), dtype=torch.float64)
    parts = []
    for start, stop in _passes(total, plan.batch_rows):

        def measure(start: int = start, stop: int = stop) -> list[float]:
            change = sign * rows.change(start, stop, pos)
            moved = change.flatten(1).any(1)
            found = plain[rows.pair[start:stop].cpu()].clone()
            if bool(moved.any()):
                pair = rows.pair[start:stop][moved].cpu()
                found[moved.cpu()] = base.values(plan.site, pair, change[moved])[0].double().cpu()
            return [float(value) for value in found]

        parts.append(torch.tensor(journal.result(measure), dtype=torch.float64))
        progress("patched prompts", stop, total)
    effect = sign * (torch.cat(parts or [plain[:0]]) - plain[rows.pair.cpu()])
    return Effects(rows.pair, rows.position, rows.node, effect.to(rows.pair.device), rows.d_dict)


def _plain(base: BaseRun, plan: Plan) -> list[float]:
    """m of every pair with nothing patched, by the same way."""
    pairs, pos = base.pairs.mask.shape
    values: list[float] = []
    for start, stop in _passes(pairs, plan.batch_rows):
        zeros = torch.zeros(stop - start, pos, base.lm.width(plan.site), device=base.lm.device)
        values += base.values(plan.site, torch.arange(start, stop), zeros)[0].double().tolist()
    return values


def _passes(total: int, size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + size, total)) for start in range(0, total, size))


def _changes(batch: Batch, plan: Plan) -> Changes:
    return changes_of(plan.dictionary, batch.sites[plan.site], batch.pairs, plan.positions)


def _position_of(keys: Tensor, plan: Plan, changes: Changes) -> Int64[Tensor, " rows"]:
    """SUMMED, except for "last", where each pair has one token."""
    if plan.positions != "last":
        return torch.full_like(keys, SUMMED)
    at = torch.zeros(int(changes.pair.max()) + 1, dtype=torch.int64, device=keys.device)
    at[changes.pair] = changes.position
    pos = int(changes.position.max()) + 1
    return at[keys // pos // (plan.dictionary.d_dict + 1)]


def _has(store: Store, site: str) -> bool:
    return f"{site}/clean" in store.arrays


def _chosen(
    inputs: Mapping[str, Path], params: Mapping[str, Any], dictionary: Dictionary, slots: int
) -> Bool[Tensor, "slots d_dict"]:
    budget = params.get("budget")
    if budget is None:
        return torch.ones(slots, dictionary.d_dict, dtype=torch.bool)
    chosen, table = torch.zeros(slots, dictionary.d_dict, dtype=torch.bool), read_table(inputs["scores"])
    feature, position = top_nodes(table, budget)
    slot = position if slots > 1 else np.zeros_like(position)
    chosen[slot[feature >= 0], feature[feature >= 0]] = True
    return chosen
