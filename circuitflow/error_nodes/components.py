"""What makes an error's score large: the size of its change and of the gradient, and the angle of the two."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from circuitflow.attribution.cached import Cached, batches
from circuitflow.attribution.changes import changes_of
from circuitflow.attribution.intervals import interval
from circuitflow.data.token_pairs import SPLITS, TokenPairs, load_token_pairs
from circuitflow.dictionaries.dictionary import Dictionary, load_dictionary
from circuitflow.jobs import Output, progress
from circuitflow.store.arrays import Store, open_store
from circuitflow.store.tables import write_table

CHUNK_PAIRS = 64
"""Pairs read and encoded at once; bounds memory, changes no number."""

PARTS = ("error", "features", "whole")
"""What changes at a site: its error, all its features together (x̂), and the vector itself, which is their sum."""

QUANTITIES = ("delta", "gradient", "cosine", "score")

CONVENTIONS = {
    "delta": "norm of (patched - clean), over all tokens of a pair at which the runs can differ, in activation units",
    "gradient": "norm of the metric's gradient at the same tokens, in units of the metric per activation",
    "cosine": "of the two: score = delta x gradient x cosine in every pair",
    "score": "gradient . change (AtP), in units of the metric; > 0: the clean value supports the clean answer",
    "parts": "error + features = whole",
    "unpaired": "patch state 0",
    "intervals": "95 %, pairs resampled; means over pairs, cosines over pairs in which both norms are above 0",
}

Columns = dict[str, np.ndarray]


def measure_components(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. ‖Δ‖, ‖g‖, their cosine and their product's sum, for the error, the features and the whole of every site.

    Inputs ``dictionaries`` (list, in the order of ``sites``), ``gradients_{split}``, ``tokens_{split}``; params
    ``sites``, ``bootstrap`` (resamples), ``seed``, ``compute``. Outputs:

    - ``components``: site, split, part ("error", "features", "whole"), n (pairs), and delta, gradient, cosine, score,
      each a mean over pairs with ``_low`` and ``_high``.
    - ``pairs``: site, split, pair, case, part, tokens (at which the runs can differ), delta, gradient, cosine, score.

    :raises UserError: a dictionary has no encoder or is of another width, or a store was made for other pairs.
    """
    device = params.get("compute", {}).get("device", "cpu")
    stores = {split: open_store(inputs[f"gradients_{split}"]) for split in SPLITS}
    pairs = {split: load_token_pairs(inputs[f"tokens_{split}"]) for split in SPLITS}
    summary: list[Columns] = []
    single: list[Columns] = []
    for number, (site, path) in enumerate(zip(params["sites"], inputs["dictionaries"], strict=True)):
        width = stores["train"].shape(f"{site}/clean")[2]
        dictionary = load_dictionary(Path(path), width).to(device)
        for split in SPLITS:
            found = components_of_split(dictionary, stores[split], site, pairs[split], device)
            single.append(_per_pair(found, site, split, pairs[split]))
            summary.append(_means(found, site, split, params))
        progress("sites", number + 1, len(params["sites"]))
    for name, parts in (("components", summary), ("pairs", single)):
        columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        write_table(out.files[name], columns, {**out.provenance, "conventions": CONVENTIONS})


def components_of_split(
    dictionary: Dictionary, store: Store, site: str, pairs: TokenPairs, device: str = "cpu"
) -> dict[str, Float64[Tensor, "pairs parts"]]:
    """delta, gradient, cosine, score and tokens of every pair, columns in the order of :data:`PARTS`."""
    found = [
        components(dictionary, batch.sites[site], batch.pairs)
        for batch in batches(store, [site], pairs, CHUNK_PAIRS, device)
    ]
    return {name: torch.cat([part[name] for part in found]).cpu() for name in found[0]}


def components(
    dictionary: Dictionary, cached: Cached, pairs: TokenPairs
) -> dict[str, Float64[Tensor, "pairs parts"]]:
    """The same for one batch; the tokens of a pair are taken together as one long vector.

    So the product of the two norms and the cosine is the score itself, of every part. A cosine with a vector of norm 0
    is NaN.
    """
    changes = changes_of(dictionary, cached, pairs)
    error = changes.error(dictionary.W_dec)
    parts = torch.stack([error, changes.whole - error, changes.whole], 1).double()
    gradient = changes.gradient.double()

    def total(values: Float64[Tensor, "tokens parts"]) -> Float64[Tensor, "pairs parts"]:
        return values.new_zeros(len(pairs), values.shape[1]).index_add_(0, changes.pair, values)

    delta = total(parts.square().sum(2)).sqrt()
    size = total(gradient.square().sum(1, keepdim=True)).sqrt().expand(-1, len(PARTS))
    score = total((parts * gradient[:, None]).sum(2))
    tokens = total(torch.ones_like(gradient[:, :1])).expand(-1, len(PARTS))
    return {
        "delta": delta,
        "gradient": size,
        "cosine": score / (delta * size),  # 0/0 is NaN
        "score": score,
        "tokens": tokens,
    }


def mean_and_interval(
    values: Float64[np.ndarray, " n"], counts: Float64[np.ndarray, "draws n"]
) -> tuple[float, float, float]:
    """Mean of the values that are known, and its 95 % interval over draws of how often each counts."""
    known = ~np.isnan(values)
    if not known.any():
        return float("nan"), float("nan"), float("nan")
    mean = float(values[known].mean())
    with np.errstate(invalid="ignore"):
        draws = counts[:, known] @ values[known] / counts[:, known].sum(1)
    return mean, *interval(draws[np.isfinite(draws)], mean)


def resampled(n: int, params: Mapping[str, Any]) -> Float64[np.ndarray, "draws n"]:
    """How often each of n pairs counts in each resample; the same for every site and part."""
    generator = np.random.default_rng(params["seed"])
    return generator.multinomial(n, np.full(n, 1 / n), size=params["bootstrap"]).astype(np.float64)


def _means(found: Mapping[str, Tensor], site: str, split: str, params: Mapping[str, Any]) -> Columns:
    n = len(found["delta"])
    counts = resampled(n, params)
    columns: Columns = {
        **_constant(len(PARTS), site=site, split=split),
        "part": np.array(PARTS, object),
        "n": np.full(len(PARTS), n, np.int64),
    }
    for name in QUANTITIES:
        rows = [mean_and_interval(found[name][:, part].numpy(), counts) for part in range(len(PARTS))]
        columns |= dict(zip((name, f"{name}_low", f"{name}_high"), np.array(rows).T, strict=True))
    return columns


def _per_pair(found: Mapping[str, Tensor], site: str, split: str, pairs: TokenPairs) -> Columns:
    """One row per part and pair, part by part."""
    size, n = len(PARTS) * len(pairs), len(pairs)
    return {
        **_constant(size, site=site, split=split),
        "pair": np.tile(pairs.pair.numpy(), len(PARTS)),
        "case": np.tile(np.array(pairs.case, object), len(PARTS)),
        "part": np.repeat(np.array(PARTS, object), n),
        "tokens": found["tokens"].T.reshape(-1).long().numpy(),
        **{name: found[name].T.reshape(-1).numpy() for name in QUANTITIES},
    }


def _constant(size: int, **values: str) -> Columns:
    return {name: np.full(size, value, object) for name, value in values.items()}


def arrays_read(sites: Sequence[str]) -> list[str]:
    """Arrays of the gradient stores that :func:`measure_components` reads."""
    return [f"{site}/{part}" for site in sites for part in ("clean", "patched", "gradient")]
