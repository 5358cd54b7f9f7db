"""FVU and scales of two models against sums written out: held out or not, positions and norms that are left out."""

from pathlib import Path

import numpy as np
import pytest
import torch

from circuitflow.dictionaries.crosscoding import Crosscoder
from circuitflow.dictionaries.dictionary import Dictionary, Skip
from circuitflow.dictionaries.rows import open_sites
from circuitflow.diffing.comparison import held_out_fvu, measure
from tests.fixtures.activation_store import write_store

SITES = ("base:resid.1", "tuned:resid.1")
BLOCK, ROWS, WIDTH = 4, 24, 2
HELD_OUT = [2, 5]
OUTLIER = 9
"""A held-out row that is long in the second model alone, and so left out of both."""
TRAINING_OUTLIER = 14


@pytest.fixture
def vectors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    found = {site: rng.normal(size=(ROWS, WIDTH)).astype(np.float32) + 1 for site in SITES}
    found[SITES[1]][[OUTLIER, TRAINING_OUTLIER]] = 100
    return found


@pytest.fixture
def crosscoder() -> Crosscoder:
    """Feature i is coordinate i of the first model; both models write a part of it."""
    W_enc = torch.eye(4)[:2]
    W_dec = torch.tensor([[0.9, 0.0, 0.3, 0.1], [0.0, 0.8, -0.2, 0.4]])
    skip = Skip((0,), None, (50.0, 50.0))
    settings = (torch.zeros(2), W_dec, torch.tensor([0.1, 0.2, 1.0, 0.9]), skip)
    return Crosscoder(Dictionary("identity", SITES, SITES, "nonzero", W_enc, *settings), SITES)


def usable(held_out: bool) -> np.ndarray:
    rows = np.arange(ROWS)
    chosen = np.isin(rows // BLOCK, HELD_OUT) == held_out
    return rows[chosen & (rows % BLOCK != 0) & ~np.isin(rows, [OUTLIER, TRAINING_OUTLIER])]


def test_fvu_is_of_held_out_tokens_without_outliers(
    tmp_path: Path, vectors: dict[str, np.ndarray], crosscoder: Crosscoder
) -> None:
    rows = open_sites(write_store(tmp_path, "joint", vectors, HELD_OUT, 8, BLOCK), SITES)
    here = {site: x[usable(held_out=True)].astype(np.float64) for site, x in vectors.items()}
    decoder, offset = (
        crosscoder.dictionary.W_dec.double().numpy(),
        crosscoder.dictionary.b_dec.double().numpy(),
    )
    decoded = here[SITES[0]] @ decoder + offset
    expected = [
        ((x - decoded[:, at : at + WIDTH]) ** 2).sum() / ((x - x.mean(axis=0)) ** 2).sum()
        for x, at in zip(here.values(), (0, WIDTH), strict=True)
    ]
    assert held_out_fvu(crosscoder, rows, "cpu") == pytest.approx(expected, rel=1e-5)


def test_scales_are_spreads_of_training_tokens_without_outliers(
    tmp_path: Path, vectors: dict[str, np.ndarray], crosscoder: Crosscoder
) -> None:
    rows = open_sites(write_store(tmp_path, "joint", vectors, HELD_OUT, 8, BLOCK), SITES)
    measured = measure(crosscoder, rows, ROWS, "cpu")
    for site, x in vectors.items():
        here = x[usable(held_out=False)].astype(np.float64)
        spread = ((here - here.mean(axis=0)) ** 2).sum(axis=1).mean() ** 0.5
        assert measured.scales[site] == pytest.approx(spread, rel=1e-5)
    assert measured.sums.tokens.sum() == len(usable(held_out=False))
