"""Maps and clusters: UMAP of feature directions, principal components and k-means of activations.

Libraries run on one thread, so that a map depends on its inputs and seed alone.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int64
from sklearn.cluster import HDBSCAN, KMeans
from sklearn.metrics import silhouette_score
from threadpoolctl import threadpool_limits
from torch import Tensor

from circuitflow.dictionaries.geometry import nearest_several, unit_rows

NEIGHBOURS = 15
MIN_DISTANCE = 0.1
SMALLEST_MAP = 10
"""Fewer features than this get no map."""

LARGEST_MAP = 20_000
"""More features than this are not mapped: time grows with their number."""

EXTENT = 10.0  # of the first layout, as umap-learn's own
SMALLEST_CLUSTER = 5

ACTIVATION_CLUSTERS = 8
COMPONENTS = 20
"""Principal components that k-means sees."""

Labels = Int64[np.ndarray, " n"]


def direction_map(directions: Float[Tensor, "n d_model"], seed: int) -> Float[np.ndarray, "n 2"]:
    """UMAP of the directions of rows by cosine distance, from exact neighbours and from their principal plane.

    NaN for fewer rows than :data:`SMALLEST_MAP`.
    """
    n = directions.shape[0]
    if n < SMALLEST_MAP:
        return np.full((n, 2), np.nan)
    umap = _umap()
    neighbours = min(NEIGHBOURS, n - 1)
    index, cosine = nearest_several(directions, neighbours)
    unit = unit_rows(directions).cpu().numpy()
    state = np.random.RandomState(seed)
    with threadpool_limits(1):
        graph, *_ = umap.fuzzy_simplicial_set(
            unit,
            neighbours,
            state,
            "cosine",
            knn_indices=index.cpu().numpy().astype(np.int32),
            knn_dists=(1 - cosine).clamp_min(0).cpu().numpy(),
        )
        plane = principal_components(unit, 2)[0]
        first = EXTENT * plane / max(float(np.abs(plane).max()), 1e-12)
        a, b = umap.find_ab_params(1.0, MIN_DISTANCE)
        placed, _ = umap.simplicial_set_embedding(
            unit, graph, 2, 1.0, a, b, 1.0, 5, None, first.astype(np.float32), state, "cosine", {}, False, {}, False
        )  # fmt: skip
    return np.asarray(placed, np.float64)


def map_clusters(places: Float[np.ndarray, "n 2"]) -> Labels:
    """HDBSCAN of a map: its densest groups (leaves), of at least a hundredth of the places, or five; −1: in none."""
    known = ~np.isnan(places).any(axis=1)
    labels = np.full(len(places), -1, np.int64)
    smallest = max(SMALLEST_CLUSTER, int(known.sum()) // 100)
    if known.sum() > smallest:
        with threadpool_limits(1):
            model = HDBSCAN(
                min_cluster_size=smallest,
                min_samples=SMALLEST_CLUSTER,
                cluster_selection_method="leaf",
                n_jobs=1,
                copy=True,
            )
            labels[known] = model.fit_predict(places[known])
    return labels


def principal_components(
    x: Float[np.ndarray, "n d_model"], components: int
) -> tuple[Float[np.ndarray, "n components"], Float[np.ndarray, " components"]]:
    """Coordinates of vectors along their first principal components, and the share of variance of each.

    The largest loading of each component is positive. Components that do not exist are zero.
    """
    centred = np.asarray(x, np.float64) - np.mean(x, axis=0, dtype=np.float64)
    with threadpool_limits(1):
        sizes, loadings = np.linalg.eigh(centred.T @ centred)
        sizes, loadings = np.maximum(sizes[::-1], 0), loadings[:, ::-1][:, :components]
        found = loadings.shape[1]
        signs = np.sign(loadings[np.abs(loadings).argmax(axis=0), np.arange(found)])
        scores, shares = np.zeros((len(x), components)), np.zeros(components)
        scores[:, :found] = centred @ loadings * signs
    shares[:found] = sizes[:found] / max(float(sizes.sum()), np.finfo(np.float64).tiny)
    return scores, shares


def _umap() -> Any:
    """umap-learn, imported where it is needed: it compiles for seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ImportWarning
        )  # of TensorFlow, which only a part of it needs that we do not
        from umap import umap_
    return umap_


@dataclass(frozen=True)
class ActivationMap:
    """Vectors in their principal plane, and their groups."""

    places: Float[np.ndarray, "n 2"]
    cluster: Labels
    facts: dict[str, object]
    """explained (shares of variance of the two components), components and clusters of k-means, cluster_sizes,
    inertia_share (of the components' variance, within clusters), silhouette (mean; NaN for one cluster)."""


def activation_map(x: Float[np.ndarray, "n d_model"], seed: int) -> ActivationMap:
    """Principal components of vectors, and k-means on the first of them."""
    scores, shares = principal_components(x, COMPONENTS)
    different = len(np.unique(scores, axis=0))
    with threadpool_limits(1):
        groups = KMeans(min(ACTIVATION_CLUSTERS, different), n_init=10, random_state=seed).fit(scores)
        labels = groups.labels_.astype(np.int64)
        sizes = np.bincount(labels)
        split = 1 < len(sizes) < len(x)
        silhouette = float(silhouette_score(scores, labels)) if split else None
    total = float(np.square(scores).sum())
    facts = {
        "explained": [float(share) for share in shares[:2]],
        "components": COMPONENTS,
        "clusters": len(sizes),
        "cluster_sizes": sizes.tolist(),
        "inertia_share": float(groups.inertia_) / total if total else 0.0,
        "silhouette": silhouette,
    }
    return ActivationMap(scores[:, :2], labels, facts)
