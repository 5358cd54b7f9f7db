"""Edges into one site of the run, or into the metric: what upstream nodes do to the metric through each node there."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.attribution.cached import Batch, read_batch
from circuitflow.attribution.changes import changes_of
from circuitflow.attribution.ends import End, sources_of
from circuitflow.attribution.exact_edges import exact_effects
from circuitflow.attribution.nodes import METRIC, REST, SUMMED, kinds, top_nodes
from circuitflow.attribution.paths import METRIC_SITE, Blocks, Way, begin, neighbours, way_into
from circuitflow.attribution.pullback import Into, edge_effects
from circuitflow.attribution.sums import Sums, keep, kept, no_sums, poisson
from circuitflow.data.metrics import metric_of
from circuitflow.data.token_pairs import TokenPairs, load_token_pairs
from circuitflow.dictionaries.dictionary import load_dictionary
from circuitflow.errors import UserError
from circuitflow.jobs import Output, progress
from circuitflow.models.loading import load_model
from circuitflow.models.running import LanguageModel
from circuitflow.progress import clock, logger
from circuitflow.store.arrays import Store, open_store
from circuitflow.store.tables import read_table, write_table

PARTIAL = "partial.npz"
MEGABYTE = 1 << 20

CONVENTIONS = {
    "weight": "gradient of m by the downstream node x gradient of that node by the upstream one x (patched - clean)",
    "between": "the gradient stops at the other sites of the run that lie between the two",
    "positions": "summed over the positions of both nodes (position -1: all), then averaged over the training pairs",
    "rest": "all features of the downstream site that are no nodes of the pool, together",
    "exact": "the same with the upstream node truly patched and the blocks run again; empty where not measured",
    "draws": "bootstrap over pairs (Poisson weights)",
}

Columns = dict[str, np.ndarray]


def score_edges(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Weights of the edges into the pool of one site, or into the metric, on the training pairs.

    Inputs ``model``, ``tokens``, ``gradients``, ``dictionaries_up`` and ``scores_up`` (lists, in the order of ``ups``),
    ``dictionary_down`` and ``scores_down`` (none for the metric); params ``down``, ``ups`` (the sites that may be
    neighbours; those that are not in this model have no rows), ``sites`` (all of the run), ``pool`` (features per site,
    by strength; the error is always in), ``positions``, ``ranking``, ``metric``, ``batch_pairs``, ``memory_mb`` (of one
    batched product), ``exact`` (upstream nodes per site whose edges are measured exactly too), ``draws``, ``seed``,
    ``dtype``, ``compute``.

    Output ``edges``: up_site, up_kind, up_feature, up_position, down_kind, down_feature, down_position, weight, se, n,
    exact, up_effect (the upstream node's AtP effect on all its ways), one row for every two nodes. Over the tables of
    all downstream sites and the metric, the weights of an upstream node sum to its ``up_effect``, the downstream kind
    "rest" included. Output ``draws``: d0, d1 …, the weights in bootstrap draws, in the same rows.

    :raises UserError: a dictionary without an encoder.
    """
    lm = load_model(inputs["model"], dtype=params["dtype"], device=params["compute"]["device"])
    into = _into(lm, inputs, params)
    store, pairs = open_store(inputs["gradients"]), load_token_pairs(inputs["tokens"])
    sums = sum_edges(lm, store, pairs, into, params, out.folder / PARTIAL)
    exact = _exact(lm, store, pairs, into, params)
    parts = [_rows(into, up, sums[up.site], exact.get(up.site), len(pairs)) for up in into.ups]
    facts = {"neighbours": [up.site for up in into.ups], "conventions": CONVENTIONS}
    table = _stacked([columns for columns, _ in parts], _no_rows())
    draws = _stacked(
        [columns for _, columns in parts], {f"d{i}": np.zeros(0, np.float32) for i in range(params["draws"])}
    )
    write_table(out.files["edges"], table, {**out.provenance, **facts})
    write_table(out.files["draws"], draws, out.provenance)
    (out.folder / PARTIAL).unlink(missing_ok=True)


def sum_edges(
    lm: LanguageModel,
    store: Store,
    pairs: TokenPairs,
    into: Into,
    params: Mapping[str, Any],
    partial: Path | None = None,
) -> dict[str, Sums]:
    """Add up the edge effects of all pairs; an interrupted run goes on from the sums it left in ``partial``."""
    names = [up.site for up in into.ups]
    columns = 1 if into.end is None else len(into.end) + 1
    times = poisson(len(pairs), params["draws"], params["seed"])
    found = None if partial is None else kept(partial, names)
    sums, done = found or ({up.site: no_sums(len(up), columns, params["draws"]) for up in into.ups}, 0)
    while into.ups and done < len(pairs):
        started = time.monotonic()
        stop = min(done + params["batch_pairs"], len(pairs))
        batch = read_batch(store, _read(into), pairs, done, stop, lm.device)
        at_once = nodes_at_once(lm, into, batch, params["memory_mb"])
        effects = edge_effects(lm, batch.pairs, into, batch.sites, at_once)
        for up in into.ups:
            sums[up.site].add(effects[up.site], own_effects(up, batch, into.positions), times[done:stop])
        if not done:
            _estimate(into, len(pairs) / stop * (time.monotonic() - started), at_once)
        done = stop
        if partial is not None:
            keep(partial, sums, done)
        progress("pairs", done, len(pairs))
    return sums


def own_effects(up: End, batch: Batch, positions: str) -> Float[Tensor, "batch up"]:
    """AtP effect of every upstream node in every pair, on all its ways to the metric."""
    at = batch.sites[up.site]
    sources = sources_of(up, changes_of(up.dictionary, at, batch.pairs, positions))
    return sources.effects(at.gradient[None])[..., 0]


def nodes_at_once(lm: LanguageModel, into: Into, batch: Batch, memory_mb: int) -> int:
    """Downstream nodes in one batched product, so that its tensors stay within a limit.

    Per node and token the product through a block holds about six vectors as wide as the MLP, eight of the model's
    width and two rows of every head's attention pattern, and one vector per upstream site.
    """
    config = lm.hf.config
    wide = getattr(config, "intermediate_size", None) or 4 * lm.d_model
    pos = batch.pairs.mask.shape[1]
    numbers = 6 * wide + (8 + len(into.ups)) * lm.d_model + 2 * pos * config.num_attention_heads
    size = batch.pairs.mask.numel() * numbers * torch.finfo(lm.dtype).bits // 8
    return max(1, memory_mb * MEGABYTE // size)


def _estimate(into: Into, seconds: float, at_once: int) -> None:
    nodes = 1 if into.end is None else len(into.end) + 1
    how = (
        "in closed form"
        if into.way is Way.ADDED
        else f"{min(at_once, nodes)} of {nodes} downstream nodes per product"
    )
    logger.info("edges into %s from %d sites, %s: about %s", into.down, len(into.ups), how, clock(seconds))


def _read(into: Into) -> list[str]:
    """Sites whose cached tensors a batch needs."""
    cut = begin(into.down, into.sites)
    wanted = {up.site for up in into.ups} | {cut} | ({into.down} if into.end else set())
    return [site for site in into.sites if site in wanted]


def _into(lm: LanguageModel, inputs: Mapping[str, Any], params: Mapping[str, Any]) -> Into:
    down, sites = params["down"], tuple(params["sites"])
    blocks = Blocks(lm.n_layers, lm.arch.parallel)
    there = neighbours(sites, blocks)[down]
    ups = tuple(
        _end(site, Path(dictionary), Path(scores), params, lm)
        for site, dictionary, scores in zip(
            params["ups"], inputs["dictionaries_up"], inputs["scores_up"], strict=True
        )
        if site in there
    )
    if down == METRIC_SITE:
        return Into(down, ups, None, sites, Way.MIXING, metric_of(params["metric"]), params["positions"])
    end = _end(down, Path(inputs["dictionary_down"]), Path(inputs["scores_down"]), params, lm)
    return Into(down, ups, end, sites, way_into(down, sites, blocks), None, params["positions"])


def _end(site: str, dictionary: Path, scores: Path, params: Mapping[str, Any], lm: LanguageModel) -> End:
    loaded = load_dictionary(dictionary, lm.width(site)).to(lm.device)
    if loaded.W_enc is None:
        raise UserError(
            f"Dictionary {dictionary} has no encoder, so there are no edges at {site}; "
            "use a kind with an encoder, or leave the site out."
        )
    feature, position = top_nodes(read_table(scores), params["pool"], params["ranking"])
    return End(
        site, loaded, torch.from_numpy(feature).to(lm.device), torch.from_numpy(position).to(lm.device)
    )


def _exact(
    lm: LanguageModel, store: Store, pairs: TokenPairs, into: Into, params: Mapping[str, Any]
) -> dict[str, Float[Tensor, "up down"]]:
    """Exact weights of the edges from the strongest ``exact`` nodes of every upstream site; NaN elsewhere."""
    if not params["exact"]:
        return {}
    totals: dict[str, Tensor] = {}
    for start in range(0, len(pairs), params["batch_pairs"]):
        stop = min(start + params["batch_pairs"], len(pairs))
        batch = read_batch(store, _read(into), pairs, start, stop, lm.device)
        for site, effects in exact_effects(lm, batch.pairs, into, batch.sites, params["exact"]).items():
            totals[site] = totals.get(site, 0) + effects.sum(0).cpu()
        progress("pairs patched", stop, len(pairs))
    return {site: total / len(pairs) for site, total in totals.items()}


def _rows(
    into: Into, up: End, sums: Sums, exact: Float[Tensor, "up down"] | None, n: int
) -> tuple[Columns, Columns]:
    """Rows of both tables for the edges from one site."""
    mean = (sums.weight / n).numpy()
    spread = np.maximum(sums.square.numpy() - n * mean**2, 0)
    se = np.sqrt(spread / (n - 1) / n) if n > 1 else np.full_like(mean, np.nan)
    ups, downs = mean.shape
    if into.end is None:
        feature, position = np.array([METRIC]), np.array([SUMMED])
    else:
        feature = np.append(into.end.feature.cpu().numpy(), REST)
        position = np.append(into.end.position.cpu().numpy(), SUMMED)
    up_feature = np.repeat(up.feature.cpu().numpy(), downs)
    down_feature = np.tile(feature, ups)
    columns = {
        "up_site": np.full(ups * downs, up.site, object),
        "up_kind": kinds(up_feature),
        "up_feature": up_feature,
        "up_position": np.repeat(up.position.cpu().numpy(), downs),
        "down_kind": kinds(down_feature),
        "down_feature": down_feature,
        "down_position": np.tile(position, ups),
        "weight": mean.ravel(),
        "se": se.ravel(),
        "n": np.full(ups * downs, n, np.int64),
        "exact": np.full(ups * downs, np.nan) if exact is None else exact.numpy().ravel(),
        "up_effect": np.repeat((sums.effect / n).numpy(), downs),
    }
    draws = sums.draws.numpy() / n
    return columns, {f"d{i}": draw.ravel().astype(np.float32) for i, draw in enumerate(draws)}


def _no_rows() -> Columns:
    names = (
        "up_site", "up_kind", "up_feature", "up_position", "down_kind", "down_feature", "down_position", "weight",
        "se", "n", "exact", "up_effect",
    )  # fmt: skip
    text, floats = {"up_site", "up_kind", "down_kind"}, {"weight", "se", "exact", "up_effect"}
    return {
        name: np.zeros(0, "U1" if name in text else np.float64 if name in floats else np.int64)
        for name in names
    }


def _stacked(parts: Sequence[Columns], none: Columns) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in none} if parts else none
