"""What a training has to know of its rows before it starts: which are left out, and their normalisation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from circuitflow.dictionaries.dictionary import Skip
from circuitflow.dictionaries.normalisation import Normalisation, measure_normalisation
from circuitflow.dictionaries.outliers import find_shared_outliers
from circuitflow.dictionaries.rows import SiteRows
from circuitflow.dictionaries.settings import Training
from circuitflow.dictionaries.tensors import read_tensors, write_tensors

PREPARED_FILE = "prepared.safetensors"


@dataclass(frozen=True)
class Prepared:
    """The rows of one site or several as a training takes them."""

    keep: np.ndarray
    """(rows,) bool: training rows that are not outliers."""
    positions: tuple[int, ...]
    """Positions of a block that are left out."""
    max_norms: Mapping[str, float | None]
    """The limit of each site, in raw units."""
    normalisations: Mapping[str, Normalisation]
    facts: dict[str, Any]
    """Median norm and shares left out, for the manifest; of several sites also their limits and scales."""

    @property
    def normalisation(self) -> Normalisation:
        """That of the first site."""
        return next(iter(self.normalisations.values()))

    @property
    def skip(self) -> Skip:
        """The rule of all sites together."""
        return self.skip_of(tuple(self.max_norms))

    def skip_of(self, reads: Sequence[str]) -> Skip:
        """The rule as a dictionary that reads these sites can apply it."""
        limits = tuple(self.max_norms[site] for site in reads)
        return Skip(self.positions, limits[0]) if len(limits) == 1 else Skip(self.positions, max_norms=limits)

    def of(self, sites: Sequence[str]) -> list[Normalisation]:
        """Normalisations of some sites, in that order."""
        return [self.normalisations[site] for site in sites]


def prepare(rows: SiteRows | Sequence[SiteRows], training: Training, folder: Path, recipe: str) -> Prepared:
    """Outlier rule and normalisation of the training rows, kept in the folder for a resumed run of this recipe.

    :raises UserError: no training row is left.
    """
    each = [rows] if isinstance(rows, SiteRows) else list(rows)
    path = folder / PREPARED_FILE
    if not path.is_file() or (read_tensors(path)[1] or {}).get("recipe") != recipe:
        tensors, facts = _found(each, training)
        write_tensors(path, tensors, {**facts, "recipe": recipe})
    tensors, described = read_tensors(path)
    assert described is not None
    max_norms, scales, _ = (described.pop(key) for key in ("max_norms", "scales", "recipe"))
    max_norms = {
        one.site: max_norms[one.site] for one in each
    }  # in the order of the sites, not of their names
    normalisations = {}
    for one in each:  # copied: values of a file may lie at other alignments in memory
        mean = tensors[f"mean.{one.site}"]
        normalisations[one.site] = Normalisation(torch.empty_like(mean).copy_(mean), scales[one.site])
    if len(each) > 1:
        described |= {"max_norm": max_norms, "scale": scales}
    return Prepared(tensors["keep"].numpy(), training.skip_positions, max_norms, normalisations, described)


def _found(rows: Sequence[SiteRows], training: Training) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What is kept in the file: tensors, and facts in plain JSON."""
    found = find_shared_outliers(rows, training.skip_positions, training.outlier_ratio)
    medians = {of.site: one.median_norm for of, one in zip(rows, found.each, strict=True)}
    normalisations = {of.site: measure_normalisation(of, found.keep) for of in rows}
    tensors = {f"mean.{site}": one.mean for site, one in normalisations.items()}
    facts = {
        "max_norms": {of.site: one.skip.max_norm for of, one in zip(rows, found.each, strict=True)},
        "scales": {site: one.scale for site, one in normalisations.items()},
        "median_norm": medians if len(rows) > 1 else found.each[0].median_norm,
        "share_left_out": found.share,
        "share_left_out_by_norm": found.share_by_norm,
    }
    return {"keep": torch.from_numpy(found.keep), **tensors}, facts
