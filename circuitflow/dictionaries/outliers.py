"""The outlier rule: attention sinks are left out of training, normalisation and quality, and stay error nodes.

The first position of a text, and a token in thousands elsewhere, has a norm tens of times that of the others.
A few such tokens carry most of the variance, so that a dictionary trained with them explains them and little
else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from circuitflow.dictionaries.dictionary import Skip
from circuitflow.dictionaries.rows import SiteRows
from circuitflow.errors import UserError


@dataclass(frozen=True)
class Outliers:
    """The rule made definite on one site's training rows."""

    skip: Skip
    keep: np.ndarray
    """(rows,) bool: training rows that are not left out."""
    median_norm: float
    """Median norm of training rows at positions that are not skipped, in raw units."""
    share: float
    """Share of training rows that are left out."""
    share_by_norm: float
    """Share of training rows that are left out for their norm, at positions that are not skipped."""


def find_outliers(rows: SiteRows, positions: tuple[int, ...], ratio: float | None) -> Outliers:
    """Leave out the given positions of every block, and norms above ``ratio`` × median (None: no limit).

    :raises UserError: no training row is left.
    """
    norms = np.zeros(rows.store.rows, dtype=np.float32)
    for index, x in rows.read(~rows.held_out):
        norms[index.numpy()] = x.norm(dim=1).numpy()
    elsewhere = ~rows.held_out & ~np.isin(rows.positions, positions)
    if not elsewhere.any():
        raise UserError(
            f"Keys skip_positions {list(positions)} leave no training row at {rows.site}, whose blocks have "
            f"{rows.block} positions; skip fewer."
        )
    median = float(np.median(norms[elsewhere]))
    limit = None if ratio is None else ratio * median
    keep = elsewhere if limit is None else elsewhere & (norms <= limit)
    trained = int((~rows.held_out).sum())
    return Outliers(
        skip=Skip(positions, limit),
        keep=keep,
        median_norm=median,
        share=1 - int(keep.sum()) / trained,
        share_by_norm=(int(elsewhere.sum()) - int(keep.sum())) / trained,
    )


@dataclass(frozen=True)
class SharedOutliers:
    """The rule made definite on the training rows of several sites: a row goes where any site says so."""

    each: tuple[Outliers, ...]
    """By site; their shares are of that site alone."""
    keep: np.ndarray
    share: float
    share_by_norm: float


def find_shared_outliers(
    rows: Sequence[SiteRows], positions: tuple[int, ...], ratio: float | None
) -> SharedOutliers:
    """:func:`find_outliers` of every site, and what they leave together.

    :raises UserError: no training row is left.
    """
    each = tuple(find_outliers(one, positions, ratio) for one in rows)
    keep = np.logical_and.reduce([found.keep for found in each])
    if not keep.any():
        raise UserError(
            f"Key outlier_ratio {ratio} leaves no training row that is no outlier at any of "
            f"{', '.join(one.site for one in rows)}; raise it, or null for no limit."
        )
    trained, elsewhere = (
        int((~rows[0].held_out).sum()),
        int((~rows[0].held_out & _apart(rows[0], positions)).sum()),
    )
    kept = int(keep.sum())
    return SharedOutliers(each, keep, 1 - kept / trained, (elsewhere - kept) / trained)


def _apart(rows: SiteRows, positions: tuple[int, ...]) -> np.ndarray:
    """(rows,) bool: rows at positions that are not skipped."""
    return ~np.isin(rows.positions, positions)
