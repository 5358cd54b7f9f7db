"""How many prompts the model is how confident about, and the confident pairs as a file that others can read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from circuitflow.data.pairs import read_pairs, write_pairs
from circuitflow.data.proportions import wilson
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.store.tables import read_table, write_table

SPLITS = ("train", "test")
EVERY_CASE = "all cases"
QUANTITIES = ("difference", "probability", "rank")

CONVENTIONS = {
    "difference": "logit(right) - logit(wrong) of the clean prompt is at least the threshold",
    "probability": "the right answers' probability is at least the threshold",
    "rank": "the right answer's rank among all tokens is at most the threshold",
    "interval": "95 % of the share (Wilson)",
}


def count_confident(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Numbers of clean prompts that pass thresholds of confidence.

    Input ``prompts`` (table of filter_pairs); params ``differences``, ``probabilities``, ``ranks``: thresholds, lists.

    Output ``confidence``, one row per split, case ("all cases" for all together), quantity and threshold: split, case,
    quantity ("difference" in logits, "probability", "rank"), threshold, count, share, low, high (95 %, Wilson), n
    (prompts of the split and case).
    """
    table = read_table(inputs["prompts"])
    clean = table["side"] == "clean"
    thresholds = dict(
        zip(QUANTITIES, (params["differences"], params["probabilities"], params["ranks"]), strict=True)
    )
    rows = []
    for split in SPLITS:
        there = clean & (table["split"] == split)
        for case in (EVERY_CASE, *sorted(set(table["case"][there]))):
            chosen = there & ((table["case"] == case) | (case == EVERY_CASE))
            for quantity, limits in thresholds.items():
                values = table[quantity][chosen]
                rows += [
                    (split, case, quantity, float(limit), *passing(values, quantity, limit))
                    for limit in limits
                ]
    names = ("split", "case", "quantity", "threshold", "count", "share", "low", "high", "n")
    columns = {name: [row[place] for row in rows] for place, name in enumerate(names)}
    write_table(out.files["confidence"], columns, {**out.provenance, "conventions": CONVENTIONS})


def passing(values: np.ndarray, quantity: str, limit: float) -> tuple[int, float, float, float, int]:
    """How many prompts pass one threshold: count, share, its interval, and n."""
    n = len(values)
    count = int((values <= limit).sum() if quantity == "rank" else (values >= limit).sum())
    return count, count / max(n, 1), *wilson(count, n), n


def export_confident(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. The confident pairs of both splits as JSON lines, like the pair files they come from.

    Inputs ``pairs_{split}`` (the task's pair files) and ``tokens_{split}`` (tables of filter_pairs, which number the
    pairs); outputs ``train``, ``test``: files that task.pairs can import.

    :raises UserError: a table numbers pairs that its file does not have.
    """
    for split in SPLITS:
        path, numbers = Path(inputs[f"pairs_{split}"]), read_table(inputs[f"tokens_{split}"])["pair"]
        pairs = read_pairs(path)
        if len(numbers) and int(numbers.max()) >= len(pairs):
            raise UserError(
                f"Pair {int(numbers.max())} is confident, but {path} has {len(pairs)} pairs; "
                "run the stage filter_pairs again."
            )
        write_pairs(out.files[split], [pairs[int(number)] for number in numbers])
