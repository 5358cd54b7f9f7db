"""The stage ``measure_dictionary``: one dictionary's quality on held-out text, by itself and inside the model."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int32
from torch import Tensor

from circuitflow.dictionaries.dictionary import Dictionary, load_dictionary
from circuitflow.dictionaries.quality import (
    DENSITY_EDGES,
    HIGH_FREQUENCY,
    Quality,
    check_one_site,
    intervals,
    weight_statistics,
)
from circuitflow.dictionaries.rows import CHUNK_ROWS, SiteRows, open_rows
from circuitflow.dictionaries.splicing import CONVENTIONS, Splice
from circuitflow.errors import UserError
from circuitflow.jobs import Output, progress
from circuitflow.models.loading import load_model
from circuitflow.store.arrays import open_store
from circuitflow.store.objects import read_manifest
from circuitflow.store.tables import write_table

NONE = float("nan")
DRAWS = 1000  # resamples, where the parameters do not say

MEANINGS = {
    "fvu": "Σ‖x − x̂‖² / Σ‖x − x̄‖² with the mean over the same tokens",
    "dead_share": "features that had not fired for dead_after tokens at the end of training",
    "silent_share": "features active in no held-out token",
    "high_frequency_share": f"features active in more than {HIGH_FREQUENCY:g} of held-out tokens",
    "decoder_cosine_mean": "mean |cosine| over all pairs of decoder rows",
    "nearest_cosine": "largest cosine of a decoder row with another one: mean, percentiles and maximum over features",
    "enc_dec_cosine": "cosine of a feature's encoder and decoder row",
    "interval": "95 % bootstrap over held-out blocks, drawn with replacement",
}


class Line(NamedTuple):
    """One row of the table."""

    quantity: str
    tokens: str
    """What it is taken over: "kept" (tokens without outliers), "all" tokens, or "weights" (features)."""
    value: float
    n: int
    """Tokens, or features, it is taken over."""
    low: float = NONE
    """Edges of a histogram's interval."""
    high: float = NONE
    ci_low: float = NONE
    """95 % bootstrap interval over held-out blocks."""
    ci_high: float = NONE


COLUMNS = ("quantity", "tokens", "low", "high", "value", "n", "ci_low", "ci_high")


def measure_dictionary(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Measure one site's dictionary on held-out blocks.

    Inputs ``dictionary``, ``activations``, ``corpus`` and ``model`` (manifests); params ``site``, ``blocks`` (how many
    held-out blocks the model runs on), ``batch_blocks``, ``dtype``, ``compute``, optionally ``bootstrap`` (resamples,
    1000 by default) and their ``seed`` (0). Output ``quality``, a table with columns quantity, tokens ("kept": without
    outliers, "all", or "weights"), low, high (edges of a histogram's interval), value, n (tokens, or features, it is
    taken over), ci_low and ci_high (95 % bootstrap interval over held-out blocks; NaN for what is no mean over tokens).
    A dictionary without an encoder has no quality: its table is empty.

    :raises UserError: the dictionary is of another width or writes another site than it reads, or a file is missing.
    """
    rows = open_rows(inputs["activations"], params["site"])
    dictionary = load_dictionary(inputs["dictionary"], width=rows.width).to(params["compute"]["device"])
    check_one_site(dictionary)
    lines: list[Line] = []
    if dictionary.W_enc is not None:
        draws, seed = params.get("bootstrap", DRAWS), params.get("seed", 0)
        lines = [
            *quality_lines(_quality(dictionary, rows), draws, seed),
            *weight_lines(dictionary, _dead_share(inputs["dictionary"])),
            *splice_lines(_splice(dictionary, inputs, params), draws, seed),
        ]
    columns: dict[str, np.ndarray] = {
        name: np.array([getattr(line, name) for line in lines], _dtype(name)) for name in COLUMNS
    }
    write_table(out.files["quality"], columns, {**out.provenance, "conventions": {**CONVENTIONS, **MEANINGS}})


def quality_lines(quality: Quality, draws: int = DRAWS, seed: int = 0) -> list[Line]:
    """Lines of the table about vectors."""
    lines = []
    for tokens, sums in (("kept", quality.kept), ("all", quality.all)):
        bounds = intervals(quality.blocks, draws, seed, sums.drawn)
        for name, value in sums.values().items():
            lines.append(Line(name, tokens, value, sums.n, NONE, NONE, *bounds[name]))
    n = quality.kept.n
    lines += [
        Line("skipped_share", "all", quality.skipped_share, quality.all.n),
        Line("silent_share", "kept", quality.silent_share, n),
        Line("high_frequency_share", "kept", quality.high_frequency_share, n),
    ]
    edges = pairwise(DENSITY_EDGES.tolist())
    for (low, high), count in zip(edges, quality.density_histogram(), strict=True):
        lines.append(Line("features_by_log10_density", "kept", float(count), n, low, high))
    return lines


def weight_lines(dictionary: Dictionary, dead_share: float) -> list[Line]:
    """Lines of the table about weights and their training."""
    values = {"dead_share": dead_share, **weight_statistics(dictionary)}
    return [Line(name, "weights", value, dictionary.d_dict) for name, value in values.items()]


def splice_lines(splice: Splice, draws: int = DRAWS, seed: int = 0) -> list[Line]:
    """Lines of the table about the model's predictions."""
    bounds = intervals(len(splice.sums), draws, seed, splice.drawn)
    return [
        Line(name, "all", value, splice.tokens, NONE, NONE, *bounds[name])
        for name, value in splice.values().items()
    ]


def _quality(dictionary: Dictionary, rows: SiteRows) -> Quality:
    """Quality over all held-out tokens of the store."""
    held_out = rows.held_out_blocks
    quality = Quality(dictionary, len(held_out))
    total = int(rows.held_out.sum())
    for index, x in rows.read(rows.held_out, CHUNK_ROWS):
        block = torch.from_numpy(np.searchsorted(held_out, index.numpy() // rows.block))
        quality.add(x.to(dictionary.W_dec.device), index % rows.block, block)
        progress("held-out tokens", quality.all.n, total)
    return quality


def _dead_share(manifest: Path) -> float:
    """Share of dead features by the counters of the training; NaN for a dictionary that was not trained here."""
    last = read_manifest(manifest).details.get("last") or {}
    return float(last.get("dead", NONE))


def _splice(dictionary: Dictionary, inputs: Mapping[str, Any], params: Mapping[str, Any]) -> Splice:
    batches = held_out_batches(inputs["corpus"], params["blocks"], params["batch_blocks"])
    lm = load_model(inputs["model"], params["dtype"], params["compute"]["device"])
    splice, count = Splice(), sum(len(batch) for batch in batches)
    for batch in batches:
        with torch.no_grad():
            splice.add(lm, dictionary, batch.to(lm.device, torch.int64))
        progress("blocks through the model", len(splice.sums), count)
    return splice


def held_out_batches(manifest: Path, blocks: int, batch_blocks: int) -> list[Int32[Tensor, "batch pos"]]:
    """Tokens of at most ``blocks`` held-out blocks of a corpus, spread over them.

    :raises UserError: none is held out.
    """
    corpus = open_store(manifest)
    held_out = np.sort(np.asarray(corpus.attrs["held_out_blocks"], dtype=np.int64))
    if not held_out.size:
        raise UserError(f"Corpus {manifest} has no held-out block; raise corpus.held_out or add text.")
    count = min(blocks, len(held_out))
    chosen = held_out[np.linspace(0, len(held_out) - 1, count, dtype=np.int64)]
    tokens = [corpus.read("tokens", int(block), int(block) + 1) for block in chosen]
    return [
        torch.from_numpy(np.concatenate(tokens[start : start + batch_blocks]))
        for start in range(0, count, batch_blocks)
    ]


def _dtype(column: str) -> type:
    return {"quantity": np.str_, "tokens": np.str_, "n": np.int64}.get(column, np.float64)
