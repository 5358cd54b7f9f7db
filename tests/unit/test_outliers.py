"""The outlier rule and the normalisation, against values computed by hand from the whole array."""

from pathlib import Path

import numpy as np
import pytest
import torch

from circuitflow.dictionaries.dictionary import Skip
from circuitflow.dictionaries.normalisation import Moments, Normalisation, measure_normalisation
from circuitflow.dictionaries.outliers import find_outliers
from circuitflow.dictionaries.rows import SiteRows, open_rows, open_sites, read_together
from circuitflow.errors import UserError
from tests.fixtures.activation_store import BLOCK, SITE, planted, with_sinks, write_store

HELD_OUT = [1, 4]


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return with_sinks(planted(BLOCK * 12, 8, 8, 2, seed=0)[0])


@pytest.fixture(scope="module")
def rows(tmp_path_factory, x) -> SiteRows:
    return open_rows(write_store(tmp_path_factory.mktemp("store"), "activations", {SITE: x}, HELD_OUT), SITE)


def test_rows_know_their_positions_and_blocks(rows):
    assert rows.width == 8
    assert rows.positions[:18].tolist() == [*range(16), 0, 1]
    assert np.flatnonzero(rows.held_out).tolist() == [*range(16, 32), *range(64, 80)]


def test_reading_chosen_rows(rows, x):
    wanted = rows.held_out & (rows.positions % 3 == 1)
    for chunk_rows in (7, 1000):
        index, found = zip(*rows.read(wanted, chunk_rows), strict=True)
        assert np.array_equal(torch.cat(index).numpy(), np.flatnonzero(wanted))
        assert np.array_equal(torch.cat(found).numpy(), x[wanted])


def test_spread_takes_first_and_last(rows):
    chosen = rows.spread(rows.held_out, 5)
    assert (chosen & rows.held_out).sum() == chosen.sum() == 5
    assert chosen[16]
    assert chosen[79]
    assert rows.spread(rows.held_out, 10_000).sum() == 32


def test_sites_are_read_together_without_what_any_site_skips(tmp_path, x):
    sites = {"resid.1": x, "resid.2": np.roll(x, 1, axis=0)}
    rows = open_sites(write_store(tmp_path, "activations", sites, HELD_OUT), list(sites))
    skip = Skip((3,), max_norms=(100.0, 200.0))
    norms = [np.linalg.norm(values, axis=1) for values in sites.values()]
    kept = rows[0].held_out & (rows[0].positions != 3) & (norms[0] <= 100) & (norms[1] <= 200)
    assert kept.sum() == 2 * 13  # not the first, second and fourth of a block
    index, found = zip(*read_together(rows, rows[0].held_out, skip, chunk_rows=40), strict=True)
    assert len(index) == 2
    assert np.array_equal(torch.cat(index).numpy(), np.flatnonzero(kept))
    for place, values in enumerate(sites.values()):
        assert np.array_equal(torch.cat([each[place] for each in found]).numpy(), values[kept])
    everything = torch.cat([index for index, _ in read_together(rows, rows[0].held_out)])
    assert len(everything) == 32


def test_rule_leaves_out_sinks_and_says_so(rows, x):
    found = find_outliers(rows, (0,), 5.0)
    norms = np.linalg.norm(x, axis=1)
    median = np.median(norms[~rows.held_out & (rows.positions != 0)])
    assert found.median_norm == pytest.approx(median, rel=1e-6)
    assert found.skip.positions == (0,)
    assert found.skip.max_norm == pytest.approx(5 * median, rel=1e-6)
    expected = ~rows.held_out & (rows.positions != 0)
    expected[5] = False
    assert np.array_equal(found.keep, expected)
    assert found.share == pytest.approx((10 + 1) / 160)
    assert found.share_by_norm == pytest.approx(1 / 160)


def test_rule_can_be_off(rows):
    found = find_outliers(rows, (), None)
    assert found.skip.max_norm is None
    assert np.array_equal(found.keep, ~rows.held_out)
    assert found.share == 0


def test_normalised_rows_have_mean_zero_and_mean_square_one(rows, x):
    keep = find_outliers(rows, (0,), 5.0).keep
    normalisation = measure_normalisation(rows, keep)
    y = normalisation.apply(torch.from_numpy(x[keep])).double()
    assert float(y.mean(dim=0).abs().max()) < 1e-6
    assert float(y.square().sum(dim=1).mean()) == pytest.approx(1, rel=1e-5)


def test_moments_do_not_depend_on_parts_and_need_a_vector(x):
    moments = Moments()
    for part in torch.from_numpy(x).split(50):
        moments.add(part)
    found = moments.normalisation()
    wide = x.astype(np.float64)
    assert np.allclose(found.mean.numpy(), wide.mean(axis=0), rtol=1e-6)
    expected = np.sqrt(((wide - wide.mean(axis=0)) ** 2).sum(axis=1).mean())
    assert found.scale == pytest.approx(expected, rel=1e-12)
    with pytest.raises(UserError, match="Every token is an outlier"):
        Moments().normalisation()


def test_folding_gives_the_same_reconstruction_in_raw_units():
    draw = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (5, 4), "b_enc": (5,), "W_dec": (5, 4), "b_dec": (4,)}
    w = {name: torch.randn(*shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    normalisation = Normalisation(torch.randn(4, generator=draw, dtype=torch.float64) * 9, 37.0)
    x = 30 * torch.randn(6, 4, generator=draw, dtype=torch.float64)
    y = normalisation.apply(x)
    f = torch.relu(y @ w["W_enc"].T + w["b_enc"])
    expected = normalisation.scale * (f @ w["W_dec"] + w["b_dec"]) + normalisation.mean
    raw = normalisation.fold(w)
    values = torch.relu(x @ raw["W_enc"].T + raw["b_enc"])
    torch.testing.assert_close(values, normalisation.scale * f)
    torch.testing.assert_close(values @ raw["W_dec"] + raw["b_dec"], expected)
    assert torch.equal(raw["W_dec"], w["W_dec"])


def test_impossible_rules_and_splits(rows, tmp_path: Path, x):
    with pytest.raises(UserError, match=r"leave no training row at resid\.1, whose blocks have 16 positions"):
        find_outliers(rows, tuple(range(16)), 5.0)
    for name, blocks in (("none", []), ("every", list(range(12)))):
        manifest = write_store(tmp_path, name, {SITE: x}, blocks)
        with pytest.raises(UserError, match="held-out blocks of 12"):
            open_rows(manifest, SITE)
    with pytest.raises(UserError, match=r"no array 'resid\.2'"):
        open_rows(manifest, "resid.2")
