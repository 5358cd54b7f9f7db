"""The study in the terminal: its tables as plain text, the same on every screen."""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDE = 1000  # wider than any table: nothing is wrapped or cut

VARIANT = ("variant", "features", "L0", "FVU", "CE recovered", "KL", "dead", "silent", ">10 %", "nearest")
AGREEMENT = ("variant", "seeds", "alive", "largest cosine", "by chance", ">0.9", "matched", "matched >0.9")
NOTE = """\
CE recovered: of what the site is worth to the model's cross-entropy; dead: at the end of training; silent: features
active on no held-out token; >10 %: on more than a tenth of them; nearest: median cosine of a decoder row with another.
"""
NOTE_ON_SEEDS = """\
Features active on held-out text. Largest cosine: mean over features of that with a decoder row of the other seed, both
ways; by chance: with rows whose coordinates are shuffled; matched: mean cosine of the best one-to-one pairs.
"""

Rows = Sequence[Mapping[str, Any]]


def summary(site: str, variants: Rows, seeds: Rows) -> str:
    """Tables of the variants and of the agreement between seeds, from rows of the tables of the same names."""
    n = max(row["n"] for row in variants)
    title = (
        f"Dictionaries of {site} on {n:,} held-out tokens (in brackets: 95 % bootstrap over blocks of text)"
    )
    text = f"{title}\n{_table(VARIANT, map(_variant, variants))}\n{NOTE}"
    if seeds:
        text += f"\nAgreement between seeds\n{_table(AGREEMENT, map(_seeds, seeds))}\n{NOTE_ON_SEEDS}"
    return text


def _variant(row: Mapping[str, Any]) -> list[str]:
    return [
        row["label"],
        f"{row['d_dict']:,}",
        f"{row['l0']:.1f}",
        _with_interval(row, "fvu"),
        _with_interval(row, "ce_recovered"),
        f"{row['kl']:.3f}",
        *(_percent(row[name]) for name in ("dead_share", "silent_share", "high_frequency_share")),
        f"{row['nearest_cosine_p50']:.2f}",
    ]


def _seeds(row: Mapping[str, Any]) -> list[str]:
    return [
        row["group"],
        f"{row['seed_a']}, {row['seed_b']}",
        f"{row['alive_a']:,}, {row['alive_b']:,}",
        f"{row['mean_max_cosine_ab']:.3f}, {row['mean_max_cosine_ba']:.3f}",
        f"{row['chance']:.3f}",
        f"{_percent(row['partner_share_ab'])}, {_percent(row['partner_share_ba'])}",
        f"{row['matched_mean']:.3f}",
        _percent(row["matched_share"]),
    ]


def _with_interval(row: Mapping[str, Any], name: str) -> str:
    value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    return f"{value:.3f}" if low != low else f"{value:.3f} ({low:.3f}–{high:.3f})"


def _percent(share: float) -> str:
    return "–" if share != share else f"{100 * share:.1f} %"


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for place, name in enumerate(names):
        table.add_column(Text(name), justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    file = io.StringIO()
    # nothing is asked of the terminal or the environment: width, colours and characters are fixed here
    Console(file=file, width=WIDE, color_system=None, force_terminal=False, _environ={}).print(table)
    return "".join(f"{line.rstrip()}\n" for line in file.getvalue().splitlines())
