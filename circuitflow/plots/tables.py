"""What figures and the page both need from tables: rows by condition, sites in order, intervals, training logs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from circuitflow.store.objects import read_manifest

Table = Mapping[str, np.ndarray]

ASSEMBLED = "assembled"
"""Source of the rows of a faithfulness table that tell of the circuit itself."""
UNITS = {"logit_difference": "logits", "logit": "logits", "log_probability": "nats", "kl": "nats"}


def rows(table: Table, **conditions: object) -> dict[str, np.ndarray]:
    """The rows in which every named column has the given value."""
    keep = np.ones(len(next(iter(table.values()))), dtype=bool)
    for name, value in conditions.items():
        keep &= table[name] == value
    return {name: column[keep] for name, column in table.items()}


def swept(faithfulness: Table, series: str) -> dict[str, np.ndarray]:
    """One series of a faithfulness table by rising number of nodes, without the assembled circuit."""
    keep = (faithfulness["series"] == series) & (faithfulness["source"] != ASSEMBLED)
    order = np.flatnonzero(keep)[np.argsort(faithfulness["nodes"][keep], kind="stable")]
    return {name: column[order] for name, column in faithfulness.items()}


def unit_of(metric: Mapping[str, Any] | None) -> str:
    """Unit of the metric, hence of every effect on it; logits if nothing is said."""
    return UNITS.get(str((metric or {}).get("kind", "logit_difference")), "units of m")


def pair_counts(layers: Table) -> str:
    """How many pairs of each split the table of layers is about, for a footnote."""
    splits = sorted(set(layers["split"]), reverse=True)
    return ", ".join(f"{int(rows(layers, split=split)['n'].max()):,} {split} pairs" for split in splits)


def top_nodes(nodes: Table, count: int, kind: str | None = None) -> dict[str, np.ndarray]:
    """The ``count`` rows with the largest |score_train| over all sites, the largest first."""
    chosen = rows(nodes, kind=kind) if kind else dict(nodes)
    order = np.argsort(-np.abs(chosen["score_train"]), kind="stable")[:count]
    return {name: column[order] for name, column in chosen.items()}


def node_name(site: str, kind: str, feature: int) -> str:
    """How a node is called in figures and tables: "resid.12 #345" or "resid.12 error"."""
    return f"{site} error" if kind == "error" else f"{site} #{feature}"


def training_log(manifest: Path) -> tuple[str, list[dict[str, Any]]]:
    """Site of a dictionary, and the lines of its training's log: none if it was made without training."""
    read = read_manifest(manifest, kind="dictionary")
    text = (read.folder(manifest) / "log.jsonl").read_text(encoding="utf-8")
    return str(read.details["site"]), [json.loads(line) for line in text.splitlines()]
