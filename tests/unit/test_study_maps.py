"""Maps and clusters: planted groups come out as groups, and equal inputs give equal places."""

import numpy as np
import pytest
import torch

from circuitflow.features.maps import (
    COMPONENTS,
    SMALLEST_MAP,
    activation_map,
    direction_map,
    map_clusters,
    principal_components,
)

GROUPS, SIZE = 4, 20


@pytest.fixture
def groups() -> np.ndarray:
    return np.repeat(np.arange(GROUPS), SIZE)


def around(centres: np.ndarray, spread: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.repeat(centres, SIZE, axis=0) + spread * rng.standard_normal((GROUPS * SIZE, centres.shape[1]))


def pure(labels: np.ndarray, groups: np.ndarray) -> bool:
    """Whether no cluster has members of two groups."""
    return all(len(set(groups[labels == label])) == 1 for label in set(labels.tolist()) - {-1})


def test_principal_components_by_hand():
    """Four points on a tilted ellipse: the long axis comes first, and its largest loading is positive."""
    along, across = np.array([0.8, -0.6, 0.0]), np.array([0.6, 0.8, 0.0])
    x = 5 + np.array([3 * along, -3 * along, across, -across])
    scores, shares = principal_components(x, 4)
    np.testing.assert_allclose(shares, [0.9, 0.1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(scores[:, :2], [[3, 0], [-3, 0], [0, 1], [0, -1]], atol=1e-9)
    np.testing.assert_allclose(scores[:, 2:], 0, atol=1e-6)
    assert scores.shape == (4, 4)


def test_principal_components_keep_the_distances_of_a_plane():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 2)) @ np.linalg.qr(rng.standard_normal((6, 6)))[0][:2]
    scores, shares = principal_components(x, 2)
    assert shares.sum() == pytest.approx(1)
    assert shares[0] > shares[1]
    before, after = (np.linalg.norm(each[:, None] - each[None], axis=2) for each in (x, scores))
    np.testing.assert_allclose(after, before, atol=1e-9)


def test_k_means_finds_planted_groups(groups):
    rng = np.random.default_rng(2)
    found = activation_map(around(10 * rng.standard_normal((GROUPS, 30)), 0.5), seed=0)
    assert pure(found.cluster, groups)
    assert found.facts["components"] == COMPONENTS
    assert sum(found.facts["cluster_sizes"]) == GROUPS * SIZE
    assert found.facts["inertia_share"] < 0.05
    assert found.facts["silhouette"] > 0
    again = activation_map(around(10 * np.random.default_rng(2).standard_normal((GROUPS, 30)), 0.5), seed=0)
    np.testing.assert_array_equal(found.cluster, again.cluster)


def test_few_different_vectors_make_few_clusters():
    found = activation_map(np.repeat([[0.0, 1.0], [2.0, 0.0]], 3, axis=0), seed=0)
    assert found.facts["clusters"] == 2
    assert found.facts["inertia_share"] == pytest.approx(0)
    one = activation_map(np.ones((3, 2)), seed=0)
    assert one.facts["clusters"] == 1
    assert one.facts["silhouette"] is None


def test_groups_of_a_map_are_told_apart(groups):
    places = around(np.array([[0.0, 0], [6, 0], [0, 6], [6, 6]]), 0.3)
    places[7] = np.nan
    labels = map_clusters(places)
    assert labels[7] == -1
    assert pure(labels, groups)
    assert {*groups[labels >= 0]} == set(range(GROUPS))
    assert map_clusters(np.full((5, 2), np.nan)).tolist() == 5 * [-1]


def test_too_few_directions_have_no_map():
    assert np.isnan(direction_map(torch.randn(SMALLEST_MAP - 1, 3), 0)).all()


@pytest.mark.slow  # umap-learn compiles itself
def test_directions_of_a_group_lie_together_on_the_map(groups):
    centres = np.linalg.qr(np.random.default_rng(3).standard_normal((12, 12)))[0][:GROUPS]
    lengths = np.random.default_rng(4).uniform(0.5, 5, (GROUPS * SIZE, 1))  # only directions matter
    directions = around(centres, 0.1)
    places = direction_map(torch.from_numpy(lengths * directions).float(), 0)
    distance = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    assert (groups[distance.argmin(axis=1)] == groups).all()
    assert pure(map_clusters(places), groups)
    again = direction_map(torch.from_numpy(lengths * directions).float(), 0)
    np.testing.assert_array_equal(again, places)
    assert not np.array_equal(direction_map(torch.from_numpy(directions).float(), 1), places)
    few = direction_map(
        torch.from_numpy(directions[:SMALLEST_MAP]).float(), 0
    )  # fewer than neighbours are wanted
    assert np.isfinite(few).all()
    twins = torch.from_numpy(np.repeat(directions[:8], 3, axis=0)).float()
    assert np.isfinite(direction_map(twins, 0)).all()
