"""Latent scaling on features planted by hand: exclusive, shrunk and decoupled ones get the ratios that they must."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from circuitflow.dictionaries.crosscoding import Crosscoder
from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.diffing.scaling import MIN_FIRINGS, Sums, gather, intervals, ratios

SITES = ("base:resid.0", "tuned:resid.0")
SHARED, EXCLUSIVE, SHRUNK, DECOUPLED, TWIN, SILENT, BASE_ONLY = range(7)
OWNER = np.array([0, 1, 1, 1, 0, 1, 0])
N, D, GROUPS = 4000, 8, 8


def planted() -> tuple[Crosscoder, dict[str, torch.Tensor]]:
    """A crosscoder that reads coordinates of the second model (of the first, for what it has alone), and vectors.

    Concept i is coordinate i. SHARED: both models, half as strong in the second. EXCLUSIVE: the second alone. SHRUNK:
    the first has it too, at 0.4, but no decoder row. DECOUPLED: both have it; the first's part is in the feature TWIN,
    which fires with it. BASE_ONLY: the first alone.
    """
    rng = np.random.default_rng(0)
    values = rng.uniform(0.5, 1.5, (N, 7)) * (rng.random((N, 7)) < 0.2)
    values[:, SILENT] = 0
    values[:, TWIN] = values[:, DECOUPLED]
    base, tuned = np.zeros((N, D)), np.zeros((N, D))
    base[:, SHARED], tuned[:, SHARED] = values[:, SHARED], 0.5 * values[:, SHARED]
    tuned[:, EXCLUSIVE] = values[:, EXCLUSIVE]
    base[:, SHRUNK], tuned[:, SHRUNK] = 0.4 * values[:, SHRUNK], values[:, SHRUNK]
    base[:, DECOUPLED], tuned[:, DECOUPLED] = values[:, DECOUPLED], values[:, DECOUPLED]
    base[:, BASE_ONLY] = values[:, BASE_ONLY]
    encoder, decoders = torch.zeros(7, 2 * D, dtype=torch.float64), torch.zeros(2, 7, D, dtype=torch.float64)
    for feature in (SHARED, EXCLUSIVE, SHRUNK, DECOUPLED):
        encoder[feature, D + feature] = 1
        decoders[1, feature, feature] = 1
    decoders[1, SHARED] *= 0.5
    encoder[SHARED, D + SHARED] = 2
    decoders[0, SHARED, SHARED] = 1
    encoder[TWIN, DECOUPLED] = encoder[BASE_ONLY, BASE_ONLY] = 1
    decoders[0, TWIN, DECOUPLED] = decoders[0, BASE_ONLY, BASE_ONLY] = 1
    zeros = torch.zeros(7, dtype=torch.float64)
    dictionary = Dictionary(
        "relu", SITES, SITES, "threshold", encoder, zeros, torch.cat([*decoders], dim=1),
        torch.zeros(2 * D, dtype=torch.float64), extra={"threshold": zeros},
    )  # fmt: skip
    vectors = {SITES[0]: torch.from_numpy(base), SITES[1]: torch.from_numpy(tuned)}
    return Crosscoder(dictionary, SITES), vectors


def measured(size: int = 500, scales: tuple[float, float] = (1.0, 1.0), mean: float = 0.0) -> Sums:
    """Sums over all rows in batches of ``size``, ``N / GROUPS`` rows to a group."""
    crosscoder, x = planted()

    def batches() -> Iterator[tuple[int, torch.Tensor, dict[str, torch.Tensor]]]:
        for start in range(0, N, size):
            part = slice(start, min(start + size, N))
            yield (
                start * GROUPS // N,
                torch.arange(part.start, part.stop),
                {site: rows[part] for site, rows in x.items()},
            )

    means = {site: torch.full((D,), mean, dtype=torch.float64) for site in SITES}
    return gather(crosscoder, batches(), means, dict(zip(SITES, scales, strict=True)), OWNER, GROUPS)


def test_ratios_of_planted_features() -> None:
    found = ratios(measured(), OWNER)
    assert found.error[EXCLUSIVE] == pytest.approx(0, abs=0.02)
    assert found.error[SHRUNK] == pytest.approx(0.4, abs=0.02)
    assert found.error[DECOUPLED] == pytest.approx(0, abs=0.02)
    assert found.reconstruction[EXCLUSIVE] == pytest.approx(0, abs=0.02)
    assert found.reconstruction[SHRUNK] == pytest.approx(0, abs=0.02)
    assert found.reconstruction[DECOUPLED] == pytest.approx(1, abs=0.02)
    assert found.error[SHARED] == pytest.approx(
        0.5, abs=0.02
    )  # the second model has half of it, and its own row
    assert found.error[BASE_ONLY] == pytest.approx(0, abs=0.02)
    assert found.reconstruction[TWIN] == pytest.approx(1, abs=0.02)  # the other way round
    assert found.strength[[EXCLUSIVE, SHRUNK, DECOUPLED]] == pytest.approx([1, 1, 1], abs=1e-9)
    assert np.isnan(found.error[SILENT])


def test_a_ratio_is_least_squares_with_an_intercept() -> None:
    crosscoder, x = planted()
    joined = torch.cat([x[site] for site in SITES], dim=1)
    codes = crosscoder.dictionary.encode(joined, torch.arange(N))
    decoded = crosscoder.dictionary.decode(codes)
    f = codes.columns(torch.tensor([SHRUNK]))[:, 0].numpy()

    def slope(site: str, own: float) -> float:
        target = (x[site] - crosscoder.part(decoded, site))[:, SHRUNK].numpy() + own * f
        design = np.stack([f, np.ones(N)], axis=1)
        return float(np.linalg.lstsq(design, target, rcond=None)[0][0])

    assert ratios(measured(), OWNER).error[SHRUNK] == pytest.approx(
        slope(SITES[0], 0.0) / slope(SITES[1], 1.0), rel=1e-9
    )


def test_units_and_means_of_a_model_do_not_count() -> None:
    plain, other = ratios(measured(), OWNER), ratios(measured(scales=(3.0, 3.0), mean=2.0), OWNER)
    assert np.allclose(plain.error, other.error, equal_nan=True, atol=1e-9)
    assert np.allclose(plain.reconstruction, other.reconstruction, equal_nan=True, atol=1e-9)
    # In units of its own spread, a model of twice the scale has half of everything.
    halved = ratios(measured(scales=(2.0, 1.0)), OWNER)
    assert halved.error[SHRUNK] == pytest.approx(plain.error[SHRUNK] / 2, rel=1e-9)


def test_batches_do_not_matter() -> None:
    once, often = measured(500), measured(125)
    assert np.allclose(once.products, often.products, atol=1e-9)
    assert np.array_equal(once.fired, often.fired)


def test_intervals_hold_the_ratio_and_close_where_groups_agree() -> None:
    exact = measured()
    bounds = intervals(exact, OWNER, draws=50, seed=0)
    assert np.isnan(bounds["error"][:, SILENT]).all()
    assert bounds["error"][:, SHRUNK] == pytest.approx([0.4, 0.4])  # the same ratio in every group
    noise = np.random.default_rng(0).normal(1, 0.1, exact.products.shape)
    sums = replace(exact, products=exact.products * noise)
    low, high = intervals(sums, OWNER, draws=400, seed=0)["error"]
    point = ratios(sums, OWNER).error[SHRUNK]
    # Products of 8 groups that each scatter by a tenth: the ratio's standard error is about .4·√2·.1/√8.
    assert low[SHRUNK] < point < high[SHRUNK]
    assert 0.02 < high[SHRUNK] - low[SHRUNK] < 0.15


def test_rare_features_have_no_ratio() -> None:
    sums = measured()
    few = np.where(np.arange(7) == SHRUNK, (MIN_FIRINGS - 1) / GROUPS, sums.fired / GROUPS)
    rare = replace(sums, fired=few)
    assert np.isnan(ratios(rare, OWNER).error[SHRUNK])
    assert np.isfinite(ratios(rare, OWNER).error[EXCLUSIVE])
