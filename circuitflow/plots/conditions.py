"""The conditions under which circuits are evaluated, as figures and the page tell them apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from circuitflow.models.sites import in_depth_order
from circuitflow.plots.tables import Table, rows

MAIN = "main"
ABLATIONS = {
    "mean": "mean",
    "zero": "zero",
    "patched": "own patched run",
    "resample": "another prompt's patched run",
}
ERRORS = {
    "scored": "compete by score",
    "kept": "all kept",
    "removed": "all removed",
    "resid_removed": "residual ones removed",
    "other_removed": "other ones removed",
}


@dataclass(frozen=True)
class Curve:
    """The rows of one series under one condition, by rising number of nodes."""

    label: str
    table: Mapping[str, np.ndarray]
    main: bool


def main_rows(table: Table) -> dict[str, np.ndarray]:
    """The rows of the main condition and aggregate; all of a table that knows no others."""
    return rows(table, main=True) if MAIN in table else dict(table)


def wanted_aggregate(table: Table) -> dict[str, np.ndarray]:
    """The rows that average prompts as the main ones do."""
    chosen = table["aggregate"][table[MAIN]]
    return rows(table, aggregate=chosen[0]) if len(chosen) else dict(table)


def by_ablation(table: Table, series: str = "circuit") -> list[Curve]:
    """Curves that differ from the main one in the ablation alone, the main one first."""
    main = _main(table)
    here = rows(table, series=series, start=main["start"], errors=main["errors"])
    return _curves(
        here, "ablation", [name for name in ABLATIONS if name in set(here["ablation"])], ABLATIONS, main
    )


def by_errors(table: Table) -> list[Curve]:
    """Curves that differ in the treatment of error nodes, the main one first."""
    main = _main(table)
    here = rows(table, series="circuit", start=main["start"], ablation=main["ablation"])
    return _curves(here, "errors", [name for name in ERRORS if name in set(here["errors"])], ERRORS, main)


def by_start(table: Table, series: str = "circuit") -> list[Curve]:
    """Curves that differ in the first site at which anything is ablated, the main one first."""
    main = _main(table)
    here = rows(table, series=series, ablation=main["ablation"], errors=main["errors"])
    sites = in_depth_order(here["start"])
    return _curves(here, "start", sites, {site: f"from {site}" for site in sites}, main)


def _main(table: Table) -> dict[str, str]:
    first = int(np.flatnonzero(table[MAIN])[0])
    return {name: str(table[name][first]) for name in ("ablation", "start", "errors")}


def _curves(
    table: Table, column: str, names: Sequence[str], labels: Mapping[str, str], main: Mapping[str, str]
) -> list[Curve]:
    ordered = sorted(names, key=lambda name: name != main[column])
    return [
        Curve(labels[name], rising(rows(table, **{column: name})), name == main[column]) for name in ordered
    ]


def rising(table: Table) -> dict[str, np.ndarray]:
    """By rising number of nodes, without the assembled circuit."""
    order = np.flatnonzero(table["source"] != "assembled")
    order = order[np.argsort(table["nodes"][order], kind="stable")]
    return {name: column[order] for name, column in table.items()}
