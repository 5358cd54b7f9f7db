"""Edges between two neighbouring sites: the effect that upstream nodes have on the metric through downstream nodes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.attribution.cached import read_batch
from circuitflow.attribution.nodes import ERROR, REST, kinds, top_features
from circuitflow.attribution.pullback import End, edge_effects
from circuitflow.data.token_pairs import TokenPairs, load_token_pairs
from circuitflow.dictionaries.dictionary import load_dictionary
from circuitflow.errors import UserError
from circuitflow.jobs import Output, progress
from circuitflow.models.loading import load_model
from circuitflow.models.running import LanguageModel
from circuitflow.models.sites import parse_site
from circuitflow.store.arrays import Store, open_store
from circuitflow.store.files import atomic_path
from circuitflow.store.tables import read_table, write_table

PARTIAL = "partial.npz"

FULL_CUTS = ("embed", "resid")
"""Kinds of site through which every path from below runs to the metric."""

CONVENTIONS = {
    "weight": "gradient of m by the downstream node x gradient of that node by the upstream one x (patched - clean)",
    "between": "total effects: nothing between the two sites is held fixed",
    "positions": "summed over positions at both ends, then averaged over the training pairs",
}


@dataclass
class Sums:
    """Running sums over pairs of edge weights and of their squares, (up, down) in float64."""

    weight: Float[Tensor, "up down"]
    square: Float[Tensor, "up down"]
    pairs: int = 0

    def add(self, effects: Float[Tensor, "batch up down"]) -> None:
        """Take in a batch."""
        self.weight += effects.sum(0).cpu()
        self.square += effects.square().sum(0).cpu()
        self.pairs += len(effects)


def score_edges(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Weights of all edges between the pools of two sites, on the training pairs.

    Inputs ``model``, ``tokens``, ``gradients``, ``dictionary_up``, ``dictionary_down``, ``scores_up``, ``scores_down``;
    params ``up``, ``down``, ``pool`` (features per site, by |score|; the error is always in), ``batch_pairs``,
    ``dtype``, ``compute``. Output ``edges``: up_kind, up_feature, down_kind, down_feature, weight, se, n, one row for
    every two nodes. Downstream kind "rest" (feature −2) is all features outside the pool together, so that over all
    downstream rows an upstream node's weights sum to its own score; ``conservation`` in the provenance says how nearly.

    :raises UserError: a dictionary without an encoder, or a site that some paths to the metric go around.
    """
    site_up, site_down = params["up"], params["down"]
    _check_kinds(site_up, site_down)
    scores = {side: read_table(inputs[f"scores_{side}"]) for side in ("up", "down")}
    lm = load_model(inputs["model"], dtype=params["dtype"], device=params["compute"]["device"])
    up = _end(site_up, inputs["dictionary_up"], scores["up"], params["pool"], lm)
    down = _end(site_down, inputs["dictionary_down"], scores["down"], params["pool"], lm)
    store, pairs = open_store(inputs["gradients"]), load_token_pairs(inputs["tokens"])
    sums = sum_edges(lm, store, pairs, up, down, params["batch_pairs"], out.folder / PARTIAL)
    facts = {
        "pool": {side: end.pool.tolist() for side, end in (("up", up), ("down", down))},
        "conservation": conservation(sums.weight / sums.pairs, up, scores["up"]),
        "conventions": CONVENTIONS,
    }
    write_table(out.files["edges"], _columns(sums, up, down), {**out.provenance, **facts})
    (out.folder / PARTIAL).unlink(missing_ok=True)


def sum_edges(
    lm: LanguageModel,
    store: Store,
    pairs: TokenPairs,
    up: End,
    down: End,
    batch_pairs: int,
    partial: Path | None = None,
) -> Sums:
    """Add up the edge effects of all pairs; an interrupted run goes on from the sums it left in ``partial``."""
    shape = (len(up.pool) + 1, len(down.pool) + 2)
    sums = _resumed(partial, shape)
    while sums.pairs < len(pairs):
        stop = min(sums.pairs + batch_pairs, len(pairs))
        batch = read_batch(store, [up.site, down.site], pairs, sums.pairs, stop, lm.device)
        sums.add(edge_effects(lm, batch.pairs, up, down, batch.sites[up.site], batch.sites[down.site]))
        if partial is not None:
            _keep(partial, sums)
        progress("pairs", stop, len(pairs))
    return sums


def conservation(
    weights: Float[Tensor, "up down"], up: End, scores: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """How far Σ over downstream nodes of w(u→d) is from the score of u, at worst over the upstream pool.

    ``residual`` is in units of the metric, ``relative`` a share of the pool's largest |score|.
    """
    train = scores["split"] == "train"
    known = dict(zip(scores["feature"][train].tolist(), scores["score"][train].tolist(), strict=True))
    expected = np.array([known[feature] for feature in [*up.pool.tolist(), ERROR]])
    residual = float(np.abs(weights.sum(1).numpy() - expected).max())
    size = float(np.abs(expected).max())
    return {"residual": residual, "relative": residual / size if size else residual}


def _check_kinds(up: str, down: str) -> None:
    for site in (up, down):
        if parse_site(site).kind not in FULL_CUTS:
            raise UserError(
                f"Edges {up} -> {down} were asked for, but {site} is not on the residual stream; "
                f"edges are there for sites of kind {' and '.join(FULL_CUTS)} so far."
            )
    if not parse_site(up) < parse_site(down):
        raise UserError(
            f"Edges {up} -> {down} run against the order of computation; name the upstream site first."
        )


def _end(site: str, dictionary: Path, scores: Mapping[str, np.ndarray], pool: int, lm: LanguageModel) -> End:
    loaded = load_dictionary(dictionary, lm.width(site)).to(lm.device)
    if loaded.W_enc is None:
        raise UserError(
            f"Dictionary {dictionary} has no encoder, so there are no edges at {site}; "
            "use a kind with an encoder, or leave the site out."
        )
    return End(site, loaded, torch.from_numpy(np.sort(top_features(scores, pool))).to(lm.device))


def _columns(sums: Sums, up: End, down: End) -> dict[str, np.ndarray]:
    n = sums.pairs
    mean = (sums.weight / n).numpy()
    spread = np.maximum(sums.square.numpy() - n * mean**2, 0)
    se = np.sqrt(spread / (n - 1) / n) if n > 1 else np.full_like(mean, np.nan)
    sources = np.array([*up.pool.tolist(), ERROR])
    targets = np.array([*down.pool.tolist(), ERROR, REST])
    up_feature, down_feature = np.repeat(sources, len(targets)), np.tile(targets, len(sources))
    return {
        "up_kind": kinds(up_feature),
        "up_feature": up_feature,
        "down_kind": kinds(down_feature),
        "down_feature": down_feature,
        "weight": mean.ravel(),
        "se": se.ravel(),
        "n": np.full(mean.size, n, np.int64),
    }


def _resumed(partial: Path | None, shape: tuple[int, int]) -> Sums:
    if partial is None or not partial.is_file():
        return Sums(torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64))
    with np.load(partial, allow_pickle=False) as kept:
        return Sums(torch.from_numpy(kept["weight"]), torch.from_numpy(kept["square"]), int(kept["pairs"]))


def _keep(partial: Path, sums: Sums) -> None:
    with atomic_path(partial) as temporary, open(temporary, "wb") as file:
        np.savez(file, weight=sums.weight.numpy(), square=sums.square.numpy(), pairs=sums.pairs)
