"""What a training has to know of its rows before it starts: which are left out, and their normalisation."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from circuitflow.dictionaries.dictionary import Skip
from circuitflow.dictionaries.normalisation import Normalisation, measure_normalisation
from circuitflow.dictionaries.outliers import find_outliers
from circuitflow.dictionaries.rows import SiteRows
from circuitflow.dictionaries.settings import Training
from circuitflow.dictionaries.tensors import read_tensors, write_tensors

PREPARED_FILE = "prepared.safetensors"


@dataclass(frozen=True)
class Prepared:
    """The rows of a site as a training takes them."""

    keep: np.ndarray
    """(rows,) bool: training rows that are not outliers."""
    skip: Skip
    normalisation: Normalisation
    facts: dict[str, float]
    """Median norm and shares left out, for the manifest."""


def prepare(rows: SiteRows, training: Training, folder: Path, recipe: str) -> Prepared:
    """Outlier rule and normalisation of the training rows, kept in the folder for a resumed run of this recipe.

    :raises UserError: no training row is left.
    """
    path = folder / PREPARED_FILE
    if not path.is_file() or (read_tensors(path)[1] or {}).get("recipe") != recipe:
        found = find_outliers(rows, training.skip_positions, training.outlier_ratio)
        normalisation = measure_normalisation(rows, found.keep)
        tensors = {"keep": torch.from_numpy(found.keep), "mean": normalisation.mean}
        facts = {
            "max_norm": found.skip.max_norm,
            "scale": normalisation.scale,
            "median_norm": found.median_norm,
            "share_left_out": found.share,
            "share_left_out_by_norm": found.share_by_norm,
            "recipe": recipe,
        }
        write_tensors(path, tensors, facts)
    tensors, described = read_tensors(path)
    assert described is not None
    max_norm, scale, _ = (described.pop(key) for key in ("max_norm", "scale", "recipe"))
    normalisation = Normalisation(torch.empty_like(tensors["mean"]).copy_(tensors["mean"]), scale)
    return Prepared(
        tensors["keep"].numpy(), Skip(training.skip_positions, max_norm), normalisation, described
    )
