"""The stage ``compare_variants``: the dictionaries of a study side by side, and how far seeds agree."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.dictionaries.dictionary import load_dictionary
from circuitflow.features.seeds import agreement
from circuitflow.features.summary import summary
from circuitflow.jobs import Output, progress
from circuitflow.provenance import canonical_json
from circuitflow.store.files import write_text
from circuitflow.store.objects import read_manifest
from circuitflow.store.tables import read_provenance, read_table, write_table

WITH_INTERVALS = ("fvu", "l0", "cosine", "norm_ratio", "ce_recovered", "delta_ce", "kl")
WITHOUT = (
    "dead_share",
    "silent_share",
    "high_frequency_share",
    "decoder_cosine_mean",
    "nearest_cosine_mean",
    "nearest_cosine_p50",
    "nearest_cosine_p95",
    "nearest_cosine_max",
    "enc_dec_cosine_mean",
)
SEEDS = (
    "label_a", "label_b", "group", "seed_a", "seed_b", "alive_a", "alive_b", "mean_max_cosine_ab", "mean_max_cosine_ba",
    "partner_share_ab", "partner_share_ba", "matched_mean", "matched_share", "matching", "chance", "cosine_p05",
    "cosine_p25", "cosine_p50", "cosine_p75", "cosine_p95",
)  # fmt: skip
"""Columns of the table ``seeds``, which may have no row."""

TEXTS = {"label", "group", "kind", "label_a", "label_b", "matching"}
WHOLE = {"seed", "d_dict", "n", "steps", "tokens", "seed_a", "seed_b", "alive_a", "alive_b"}

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """One dictionary of the study, and where its results are."""

    label: str
    settings: Mapping[str, Any]
    manifest: Path
    quality: Path
    features: Path

    @property
    def seed(self) -> int:
        """Seed of its training."""
        return int(self.settings.get("seed", 0))

    @property
    def group(self) -> str:
        """Its label without the seed."""
        return self.label.removesuffix(f"-seed{self.seed}")

    @property
    def beside_seed(self) -> str:
        """Everything that shaped it but the seed."""
        return canonical_json({key: value for key, value in self.settings.items() if key != "seed"})

    def alive_rows(self) -> Float[Tensor, "alive d_model"]:
        """Decoder rows of the features that are active on held-out tokens."""
        density = read_table(self.features)["density"]
        return load_dictionary(self.manifest).W_dec[torch.from_numpy(density > 0)]


def compare_variants(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Compare the variants of a study.

    Inputs ``dictionaries`` (manifests), ``quality`` (tables of measure_dictionary) and ``features`` (tables of
    study_features): lists in the same order; params ``site``, ``labels`` and ``settings`` (of each variant, in that
    order, :func:`~circuitflow.dictionaries.settings.used_settings`), ``seed`` and ``compute``. Outputs:

    ``variants`` (Parquet), one row per variant in the given order: label; group (label without its seed); kind; seed;
    d_dict; k, penalty, target_l0 (NaN where the kind has none); n (held-out tokens); fvu, l0, cosine, norm_ratio,
    ce_recovered, delta_ce, kl, each with ``_low`` and ``_high`` (95 % bootstrap over held-out blocks); dead_share (by
    the training's own counters; NaN if it was not trained here); silent_share (never active on held-out tokens);
    high_frequency_share (active on more than a tenth of them); decoder_cosine_mean (mean |cosine| of decoder rows);
    nearest_cosine_mean, nearest_cosine_p50, nearest_cosine_p95, nearest_cosine_max; enc_dec_cosine_mean; stability
    (correlation of log density between halves of the held-out blocks); steps and tokens (trained on; 0 if unknown).

    ``seeds`` (Parquet), one row per pair of variants that differ in the seed alone: label_a, label_b, group, seed_a,
    seed_b; alive_a, alive_b (features active on held-out tokens: only these are compared); mean_max_cosine_ab (mean
    over features of a of the largest cosine with a decoder row of b), mean_max_cosine_ba; partner_share_ab,
    partner_share_ba (share of features with such a cosine above 0.9); matched_mean (mean cosine of the best one-to-one
    matching), matched_share (pairs of it above 0.9, as share of the features of the smaller side); matching
    ("hungarian": exact; "greedy": for large dictionaries); chance (mean_max_cosine_ab where the coordinates of b are
    shuffled: what unrelated rows would give); cosine_p05, cosine_p25, cosine_p50, cosine_p75, cosine_p95 (percentiles
    over features of a of the largest cosine).

    ``summary`` (text): a table of both, of fixed width, without colours.
    """
    lists = (
        params["labels"],
        params["settings"],
        *(inputs[name] for name in ("dictionaries", "quality", "features")),
    )
    variants = [Variant(*one) for one in zip(*lists, strict=True)]
    lines = [_line(variant) for variant in variants]
    pairs = list(_pairs(variants))
    found = []
    for a, b in pairs:
        found.append(_agreement(a, b, params))
        progress("pairs of seeds", len(found), len(pairs))
    write_table(out.files["variants"], _columns(tuple(lines[0]), lines), out.provenance)
    write_table(out.files["seeds"], _columns(SEEDS, found), out.provenance)
    write_text(out.files["summary"], summary(params["site"], lines, found))


def _line(variant: Variant) -> Row:
    """One row of the table ``variants``."""
    settings, details = variant.settings, read_manifest(variant.manifest, "dictionary").details
    quality, notes = _quality(read_table(variant.quality)), details.get("notes", {})
    measured = {
        f"{name}{end}": quality[name][place]
        for name in WITH_INTERVALS
        for place, end in enumerate(("", "_low", "_high"))
    }
    return {
        "label": variant.label,
        "group": variant.group,
        "kind": settings["kind"],
        "seed": variant.seed,
        "d_dict": details["d_dict"],
        **{name: _number(settings.get(name)) for name in ("k", "penalty", "target_l0")},
        "n": int(quality["fvu"][3]),
        **measured,
        **{name: quality[name][0] for name in WITHOUT},
        "stability": _number(read_provenance(variant.features)["facts"]["stability"]),
        "steps": notes.get("step", 0),
        "tokens": notes.get("tokens", 0),
    }


def _quality(table: Mapping[str, np.ndarray]) -> dict[str, tuple[float, ...]]:
    """Value, interval and n of each quantity; without outliers ("kept") where there is also one with them."""
    columns = (table[name] for name in ("quantity", "tokens", "value", "ci_low", "ci_high", "n"))
    found: dict[str, tuple[float, ...]] = {}
    for quantity, tokens, *numbers in zip(*columns, strict=True):
        if tokens == "kept" or quantity not in found:
            found[str(quantity)] = tuple(map(float, numbers))
    return found


def _pairs(variants: Sequence[Variant]) -> Iterator[tuple[Variant, Variant]]:
    for a, b in combinations(variants, 2):
        if a.seed != b.seed and a.beside_seed == b.beside_seed:
            yield a, b


def _agreement(a: Variant, b: Variant, params: Mapping[str, Any]) -> Row:
    """One row of the table ``seeds``."""
    left, right = (variant.alive_rows().to(params["compute"]["device"]) for variant in (a, b))
    return {
        "label_a": a.label,
        "label_b": b.label,
        "group": a.group,
        "seed_a": a.seed,
        "seed_b": b.seed,
        "alive_a": len(left),
        "alive_b": len(right),
        **agreement(left, right, params["seed"]),
    }


def _columns(names: Sequence[str], rows: Sequence[Row]) -> dict[str, np.ndarray]:
    kinds = {**dict.fromkeys(TEXTS, np.str_), **dict.fromkeys(WHOLE, np.int64)}
    return {name: np.array([row[name] for row in rows], kinds.get(name, np.float64)) for name in names}


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
