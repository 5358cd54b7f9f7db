"""What errors are made of: the part that is a linear function of the site's own vector, and the rest.

The map is a ridge regression of ε = x − x̂ on x over the tokens of the corpus's training part, ε̂ = ε̄ + (x − x̄)·A, with
A the least of Σ‖ε − ε̂‖² + n·ridge·s²·‖A‖² and s² the mean variance of a coordinate of x. Held-out tokens tell which
share of the error's variance it predicts. On the task's pairs g·(ε̂_p − ε̂_c) is the part of the error's effect that
goes through the linear part.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from circuitflow.attribution.cached import Cached, batches
from circuitflow.attribution.changes import changes_of
from circuitflow.data.token_pairs import SPLITS, TokenPairs, load_token_pairs
from circuitflow.dictionaries.dictionary import Dictionary, load_dictionary
from circuitflow.dictionaries.quality import Sums, check_one_site, intervals
from circuitflow.dictionaries.rows import SiteRows, open_rows
from circuitflow.error_nodes.components import CHUNK_PAIRS, mean_and_interval, resampled
from circuitflow.errors import UserError
from circuitflow.jobs import Output, progress
from circuitflow.store.arrays import Store, open_store
from circuitflow.store.tables import write_table

EFFECTS = ("effect", "effect_linear", "effect_rest", "effect_skipped")

CONVENTIONS = {
    "fvu": "Σ‖ε‖² / Σ‖x - x̄‖² over held-out tokens",
    "linear_share": "share of the error's variance that a linear function of x predicts: 1 - Σ‖ε - ε̂‖² / Σ‖ε - ε̄‖²",
    "norm_share": "share of the variance of ‖ε‖ that a linear function of x predicts",
    "regression": "ridge, fitted on the corpus's training part without the tokens that the dictionary skips",
    "effect": "AtP score of the error, g·(ε_p - ε_c) over tokens; > 0: its clean value supports the clean answer",
    "effect_linear": "g·(ε̂_p - ε̂_c): through the part that is linear in x",
    "effect_rest": "the remainder at the same tokens",
    "effect_skipped": "at tokens that the dictionary skips in either run, where the whole vector is the error",
    "unpaired": "patch state 0",
    "intervals": "95 %: held-out blocks resampled for shares, pairs for effects",
}


@dataclass(frozen=True)
class LinearMap:
    """ε̂ = ε̄ + (x − x̄)·A, and likewise for ‖ε‖."""

    centre: Float64[Tensor, " d_model"]
    """x̄ over the tokens of the fit."""
    weights: Float64[Tensor, "d_model d_model_plus_1"]
    """A; the last column predicts ‖ε‖."""
    offset: Float64[Tensor, " d_model_plus_1"]
    """ε̄, and the mean of ‖ε‖."""
    n: int
    """Tokens of the fit."""

    def predict(self, x: Float[Tensor, "n d_model"]) -> Float64[Tensor, "n d_model_plus_1"]:
        """ε̂ of every vector, and in the last column the norm of the error as predicted by itself."""
        return self.offset + (x.double() - self.centre) @ self.weights

    def error(self, x: Float[Tensor, "n d_model"]) -> Float64[Tensor, "n d_model"]:
        """ε̂ alone."""
        return self.predict(x)[..., :-1]


def decompose_errors(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. How much of every site's error is linear in the site's vector, and which part carries its effect.

    Inputs ``activations``, ``dictionaries`` (list, in the order of ``sites``), ``gradients_{split}``,
    ``tokens_{split}``; params ``sites``, ``ridge``, ``rows`` (tokens of the fit, spread evenly), ``bootstrap``,
    ``seed``, ``compute``. Output ``decomposition``: site, data ("corpus", "train" or "test" pairs), quantity, value,
    low, high, n (held-out tokens, or pairs). What the quantities are is in the provenance (``conventions``).

    :raises UserError: a dictionary has no encoder, is of another width or writes another site than it reads.
    """
    device = params.get("compute", {}).get("device", "cpu")
    stores = {split: open_store(inputs[f"gradients_{split}"]) for split in SPLITS}
    pairs = {split: load_token_pairs(inputs[f"tokens_{split}"]) for split in SPLITS}
    lines: list[tuple[str, str, str, float, float, float, int]] = []
    for number, (site, path) in enumerate(zip(params["sites"], inputs["dictionaries"], strict=True)):
        rows = open_rows(inputs["activations"], site)
        dictionary = load_dictionary(Path(path), rows.width).to(device)
        check_one_site(dictionary)
        fitted = fit(
            errors_of(dictionary, rows, rows.spread(~rows.held_out, params["rows"])), params["ridge"]
        )
        lines += [(site, "corpus", *line) for line in held_out_shares(dictionary, rows, fitted, params)]
        for split in SPLITS:
            effects = effects_of_split(dictionary, fitted, stores[split], site, pairs[split])
            lines += [(site, split, *line) for line in _mean_effects(effects, params)]
        progress("sites", number + 1, len(params["sites"]))
    names = ("site", "data", "quantity", "value", "low", "high", "n")
    columns = {name: list(column) for name, column in zip(names, zip(*lines, strict=True), strict=True)}
    facts = {
        "conventions": {**CONVENTIONS, "ridge": f"{params['ridge']:g} x the mean variance of a coordinate"}
    }
    write_table(out.files["decomposition"], columns, {**out.provenance, **facts})


Chunk = tuple[Int64[Tensor, " n"], Float[Tensor, "n d_model"], Float[Tensor, "n d_model"]]
"""Row numbers, vectors and their errors."""


def errors_of(dictionary: Dictionary, rows: SiteRows, wanted: np.ndarray) -> Iterator[Chunk]:
    """Vectors of the corpus and their errors, without the tokens that the dictionary skips."""
    device = dictionary.W_dec.device
    for index, read in rows.read(wanted):
        position = (index % rows.block).to(device)
        x = read.to(device, dictionary.W_dec.dtype)
        kept = ~dictionary.skip.mask(x, position)
        x = x[kept]
        yield index[kept.cpu()], x, dictionary.error(x, dictionary.encode(x, position[kept]))


def fit(chunks: Iterator[Chunk], ridge: float) -> LinearMap:
    """The regression of the module's formula, from sums in float64, the same however the tokens are cut.

    :param ridge: penalty in units of the mean variance of a coordinate of x; 0 is least squares.
    :raises UserError: there is no token to fit on.
    """
    centre = None
    for _, x, error in chunks:
        target = torch.cat([error, error.norm(dim=1, keepdim=True)], 1).double()
        if centre is None:  # any point near the mean: it saves the sums from cancellation
            centre = x.double().mean(0)
            width = len(centre)
            squares = x.new_zeros(width, width, dtype=torch.float64)
            products = x.new_zeros(width, width + 1, dtype=torch.float64)
            total, total_target, n = torch.zeros_like(centre), products.new_zeros(width + 1), 0
        here = x.double() - centre
        squares.addmm_(here.T, here)
        products.addmm_(here.T, target)
        total, total_target, n = total + here.sum(0), total_target + target.sum(0), n + len(x)
    if centre is None:
        raise UserError(
            "No token of the corpus is left to fit error_nodes.rows on: the dictionary skips all; add text."
        )
    mean, mean_target = total / n, total_target / n
    covariance = squares / n - torch.outer(mean, mean)
    across = products / n - torch.outer(mean, mean_target)
    penalty = ridge * covariance.diagonal().mean()
    eye = torch.eye(width, dtype=torch.float64, device=x.device)
    weights = torch.linalg.solve(covariance + penalty * eye, across)
    return LinearMap(centre + mean, weights, mean_target, n)


def held_out_shares(
    dictionary: Dictionary, rows: SiteRows, fitted: LinearMap, params: Mapping[str, Any]
) -> list[tuple[str, float, float, float, int]]:
    """fvu, linear_share and norm_share over held-out tokens: quantity, value, low, high, n."""
    blocks = rows.held_out_blocks
    sums = {name: Sums(len(blocks)) for name in ("fvu", "linear_share", "norm_share")}
    for index, x, error in errors_of(dictionary, rows, rows.held_out):
        block = torch.from_numpy(np.searchsorted(blocks, index.numpy() // rows.block))
        predicted, none = fitted.predict(x), torch.zeros_like(block)
        norm, offset = error.norm(dim=1, keepdim=True), fitted.offset
        sums["fvu"].add(x, x - error, none, fitted.centre, block)
        sums["linear_share"].add(error, predicted[:, :-1], none, offset[:-1], block)
        sums["norm_share"].add(norm, predicted[:, -1:], none, offset[-1:], block)
    lines = []
    for name, found in sums.items():
        if not found.n:
            lines.append((name, float("nan"), float("nan"), float("nan"), 0))
            continue
        bounds = intervals(len(blocks), params["bootstrap"], params["seed"], found.drawn)["fvu"]
        value = found.values()["fvu"]
        if name != "fvu":  # what is explained instead of what is not
            value, bounds = 1 - value, (1 - bounds[1], 1 - bounds[0])
        lines.append((name, value, *bounds, found.n))
    return lines


def effects_of_split(
    dictionary: Dictionary, fitted: LinearMap, store: Store, site: str, pairs: TokenPairs
) -> Float64[Tensor, "pairs effects"]:
    """The effects of every pair in the order of :data:`EFFECTS`; the last three sum to the first."""
    device = dictionary.W_dec.device
    found = [
        effects(dictionary, fitted, batch.sites[site], batch.pairs)
        for batch in batches(store, [site], pairs, CHUNK_PAIRS, device)
    ]
    return torch.cat(found).cpu()


def effects(
    dictionary: Dictionary, fitted: LinearMap, cached: Cached, pairs: TokenPairs
) -> Float64[Tensor, "pairs effects"]:
    """The same for one batch."""
    changes = changes_of(dictionary, cached, pairs)
    pair, position = changes.pair, changes.position
    before, after = cached.clean[pair, position], cached.patched[pair, position]
    paired = pairs.has_patch[pair]
    skipped = dictionary.skip.mask(before, position) | (paired & dictionary.skip.mask(after, position))
    linear = fitted.error(after) * paired[:, None] - fitted.error(
        before
    )  # without a patched run it is 0 there
    gradient = changes.gradient.double()
    whole = (gradient * changes.error(dictionary.W_dec).double()).sum(1)
    through = (gradient * linear).sum(1) * ~skipped
    parts = torch.stack([whole, through, whole * ~skipped - through, whole * skipped], 1)
    return parts.new_zeros(len(pairs), parts.shape[1]).index_add_(0, pair, parts)


def _mean_effects(
    effects: Float64[Tensor, "pairs effects"], params: Mapping[str, Any]
) -> list[tuple[str, float, float, float, int]]:
    counts = resampled(len(effects), params)
    return [
        (name, *mean_and_interval(column.numpy(), counts), len(effects))
        for name, column in zip(EFFECTS, effects.unbind(1), strict=True)
    ]
