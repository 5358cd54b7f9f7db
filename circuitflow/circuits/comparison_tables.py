"""A comparison of circuits as tables for the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from circuitflow.circuits.circuit import read_circuit
from circuitflow.circuits.comparison import compare
from circuitflow.errors import UserError

NOTHING = "-"
WIDE = 200
"""Wider than any table: nothing is cut when the terminal is narrow."""


def compare_files(paths: Sequence[Path]) -> dict[str, Any]:
    """:func:`circuitflow.circuits.comparison.compare` of circuit files, named by their paths.

    :raises UserError: a file is named twice, or is not a circuit.
    """
    names = [str(path) for path in paths]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"Circuit {twice[0]} is named twice; name each file once.")
    return compare({name: read_circuit(Path(name)) for name in names})


def show(found: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the circuits, and for every two of them how far they agree, in all and per site."""
    console = console or Console(width=WIDE)
    letters = {circuit["name"]: chr(ord("A") + i) for i, circuit in enumerate(found["circuits"])}
    console.print(_circuits(found["circuits"], letters))
    for pair in found["pairs"]:
        console.print(_pair(pair, letters))
        for site in ("a", "b"):
            if pair["left_out"][site]:
                listed = ", ".join(pair["left_out"][site])
                console.print(f"only in {letters[pair[site]]}: {listed}", highlight=False, soft_wrap=True)
        for note in pair["notes"]:
            console.print(f"note: {note}", highlight=False, soft_wrap=True)


def _circuits(circuits: Sequence[Mapping[str, Any]], letters: Mapping[str, str]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for name in ("", "circuit", "model", "task"):
        table.add_column(name, overflow="fold")
    for name in ("sites", "nodes", "errors", "edges"):
        table.add_column(name, justify="right")
    for circuit in circuits:
        text = [circuit["name"], *(circuit[name] or NOTHING for name in ("model", "task"))]
        counts = [len(circuit["sites"]), *(circuit[name] for name in ("nodes", "errors", "edges"))]
        table.add_row(letters[circuit["name"]], *map(escape, text), *map(str, counts))
    return table


def _pair(pair: Mapping[str, Any], letters: Mapping[str, str]) -> Table:
    a, b = letters[pair["a"]], letters[pair["b"]]
    table = Table(box=SIMPLE_HEAD, title=f"{a} and {b}", title_justify="left")
    table.add_column("")
    columns = (a, b, "both", "Jaccard", f"of {a}", f"of {b}", "Pearson", "Spearman", "signs", "|score|")
    for name in (*columns, f"effect {a}", f"effect {b}", f"error {a}", f"error {b}"):
        table.add_column(name, justify="right")
    table.add_row("nodes", *_overlap(pair["nodes"]), *_agreement(pair["scores"]), *[""] * 4)
    table.add_row("edges", *_overlap(pair["edges"]), *[""] * 8, end_section=True)
    for row in pair["per_site"]:
        shares = (row[f"{kind}_share_{side}"] for kind in ("effect", "error") for side in ("a", "b"))
        cells = (*_overlap(row.get("nodes")), *_agreement(row.get("scores")), *map(_share, shares))
        table.add_row(row["site"], *cells)
    return table


def _overlap(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return [NOTHING] * 6
    counts = [str(found[name]) for name in ("a", "b", "both")]
    return [*counts, _decimal(found["jaccard"]), *(_share(found[name]) for name in ("share_a", "share_b"))]


def _agreement(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return [NOTHING] * 4
    numbers = [_decimal(found[name]) for name in ("pearson", "spearman")]
    return [*numbers, _share(found["sign_agreement"]), _decimal(found["weighted_jaccard"])]


def _decimal(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.0%}"
