"""The stage ``measure_dictionary``: one dictionary's quality on held-out text, by itself and inside the model."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from circuitflow.dictionaries.dictionary import Dictionary, load_dictionary
from circuitflow.dictionaries.quality import DENSITY_EDGES, Quality
from circuitflow.dictionaries.rows import CHUNK_ROWS, open_rows
from circuitflow.dictionaries.splicing import CONVENTIONS, Splice
from circuitflow.errors import UserError
from circuitflow.jobs import Output, progress
from circuitflow.models.loading import load_model
from circuitflow.store.arrays import open_store
from circuitflow.store.tables import write_table

Line = tuple[str, str, float, float, float, int]
NONE = float("nan")


def measure_dictionary(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Measure one site's dictionary on held-out blocks.

    Inputs ``dictionary``, ``activations``, ``corpus`` and ``model`` (manifests); params ``site``, ``blocks`` (how many
    held-out blocks the model runs on), ``batch_blocks``, ``dtype`` and ``compute``. Output ``quality``, a table with
    columns quantity, tokens ("kept": without outliers, or "all"), low, high (edges of a histogram's interval), value,
    and n (tokens it is taken over). A dictionary without an encoder has no quality: its table is empty.

    :raises UserError: the dictionary is of another width, or a file is missing.
    """
    rows = open_rows(inputs["activations"], params["site"])
    dictionary = load_dictionary(inputs["dictionary"], width=rows.width).to(params["compute"]["device"])
    lines: list[Line] = []
    if dictionary.W_enc is not None:
        quality = Quality(dictionary)
        total = int(rows.held_out.sum())
        for index, x in rows.read(rows.held_out, CHUNK_ROWS):
            quality.add(x.to(dictionary.W_dec.device), index % rows.block)
            progress("held-out tokens", quality.all.n, total)
        splice = _splice(dictionary, inputs, params)
        lines = [*quality_lines(quality), *splice_lines(splice)]
    _write(lines, out)


def quality_lines(quality: Quality) -> list[Line]:
    """Lines of the table about vectors."""
    lines = [
        (name, tokens, NONE, NONE, value, sums.n)
        for tokens, sums in (("kept", quality.kept), ("all", quality.all))
        for name, value in sums.values().items()
    ]
    lines.append(("skipped_share", "all", NONE, NONE, quality.skipped_share, quality.all.n))
    lines.append(("silent_share", "kept", NONE, NONE, quality.silent_share, quality.kept.n))
    for (low, high), count in zip(pairwise(DENSITY_EDGES), quality.density_histogram(), strict=True):
        lines.append(("features_by_log10_density", "kept", low, high, float(count), quality.kept.n))
    return lines


def splice_lines(splice: Splice) -> list[Line]:
    """Lines of the table about the model's predictions."""
    return [(name, "all", NONE, NONE, value, splice.tokens) for name, value in splice.values().items()]


def _splice(dictionary: Dictionary, inputs: Mapping[str, Any], params: Mapping[str, Any]) -> Splice:
    corpus = open_store(inputs["corpus"])
    held_out = np.sort(np.asarray(corpus.attrs["held_out_blocks"], dtype=np.int64))
    if not held_out.size:
        raise UserError(
            f"Corpus {inputs['corpus']} has no held-out block; raise corpus.held_out or add text."
        )
    count = min(params["blocks"], len(held_out))
    chosen = held_out[np.linspace(0, len(held_out) - 1, count, dtype=np.int64)]
    lm = load_model(inputs["model"], params["dtype"], params["compute"]["device"])
    splice = Splice()
    for start in range(0, count, params["batch_blocks"]):
        blocks = [
            corpus.read("tokens", int(block), int(block) + 1)
            for block in chosen[start:][: params["batch_blocks"]]
        ]
        tokens = torch.from_numpy(np.concatenate(blocks)).to(lm.device, torch.int64)
        with torch.no_grad():
            splice.add(lm, dictionary, tokens)
        progress("blocks through the model", start + len(blocks), count)
    return splice


def _write(lines: list[Line], out: Output) -> None:
    names = ("quantity", "tokens", "low", "high", "value", "n")
    kinds = (np.str_, np.str_, np.float64, np.float64, np.float64, np.int64)
    columns: dict[str, np.ndarray] = {
        name: np.array([line[place] for line in lines], dtype=kind)
        for place, (name, kind) in enumerate(zip(names, kinds, strict=True))
    }
    write_table(out.files["quality"], columns, {**out.provenance, "conventions": CONVENTIONS})
