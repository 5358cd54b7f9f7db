"""Stage ``cluster_contexts``: groups of contexts that are alike inside the model, each a task of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score
from threadpoolctl import threadpool_limits

from circuitflow.data.token_pairs import SPLITS
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.progress import logger
from circuitflow.store.arrays import Store, open_store
from circuitflow.store.tables import read_table, write_table

LEAST = {"train": 4, "test": 2}
"""Contexts that a cluster needs in each split: fewer give no intervals."""

RESTARTS = 10
CHUNK = 64  # pairs read at once

Vectors = Float[np.ndarray, "n width"]
Table = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Clusters:
    """Groups of vectors, the largest of the training split first."""

    label: dict[str, Int64[np.ndarray, " n"]]
    """By split."""
    distance: dict[str, Float[np.ndarray, " n"]]
    """To the centre of the own cluster; vectors have length 1."""
    plane: dict[str, Float[np.ndarray, "n 2"]]
    """Coordinates along the two principal components of the training vectors."""
    explained: tuple[float, float]
    """Shares of their variance."""
    silhouette: float | None
    """Mean over training vectors; None where it is not defined."""

    def sizes(self, split: str, count: int) -> list[int]:
        """Vectors per cluster."""
        return np.bincount(self.label[split], minlength=count).tolist()


def cluster_contexts(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """Stage: split a task's pairs into clusters, by k-means on what one site holds of each clean prompt.

    ``by`` "activations" takes the direction of the site's vector at the position of the answer, less the mean over
    training pairs; "gradients" that of the metric's gradient summed over positions. Centres are fitted on training
    pairs; test pairs go to the nearest. Clusters are numbered by falling number of training pairs.

    Inputs: ``tokens_train``, ``tokens_test``, ``prompts`` (tables of filter_pairs), ``gradients_train``,
    ``gradients_test`` (stores). Params: ``by``, ``site``, ``clusters`` (their number), ``components`` (principal
    components that k-means sees; None: whole vectors), ``seed``. Outputs: ``train_{i}``, ``test_{i}``, ``prompts_{i}``
    (the rows of cluster i), and ``clusters``: split, pair, cluster, distance (to the centre), x, y (principal plane),
    text, answer; sizes, explained and silhouette are in its provenance.

    :raises UserError: a cluster is too small for a circuit.
    """
    tables = {split: read_table(inputs[f"tokens_{split}"]) for split in SPLITS}
    raw = {
        split: read_vectors(
            open_store(inputs[f"gradients_{split}"]), params["site"], params["by"], tables[split]["position"]
        )
        for split in SPLITS
    }
    found = find_clusters(
        directions(raw, params["by"]), params["clusters"], params["components"], params["seed"]
    )
    check_sizes(found, params["clusters"])
    prompts = read_table(inputs["prompts"])
    for number in range(params["clusters"]):
        members = {split: found.label[split] == number for split in SPLITS}
        for split in SPLITS:
            write_table(out.files[f"{split}_{number}"], chosen(tables[split], members[split]), out.provenance)
        pairs = {split: tables[split]["pair"][members[split]] for split in SPLITS}
        write_table(out.files[f"prompts_{number}"], chosen(prompts, among(prompts, pairs)), out.provenance)
    facts = {
        "sizes": {split: found.sizes(split, params["clusters"]) for split in SPLITS},
        "silhouette": found.silhouette,
        "explained": list(found.explained),
    }
    logger.info("clusters of %(train)s train and %(test)s test contexts", facts["sizes"])
    write_table(out.files["clusters"], _columns(tables, found), {**out.provenance, "clusters": facts})


def read_vectors(store: Store, site: str, by: str, position: Int64[np.ndarray, " n"]) -> Vectors:
    """One vector per pair: the clean activation at ``position``, or the gradient summed over positions.

    :raises UserError: the store lacks the site.
    """
    parts = []
    for start in range(0, store.rows, CHUNK):
        stop = min(start + CHUNK, store.rows)
        if by == "gradients":
            parts.append(store.read(f"{site}/gradient", start, stop).sum(1, dtype=np.float64))
        else:
            here = store.read(f"{site}/clean", start, stop)
            parts.append(here[np.arange(stop - start), position[start:stop]].astype(np.float64))
    return np.concatenate(parts)


def directions(vectors: Mapping[str, Vectors], by: str) -> dict[str, Vectors]:
    """Vectors of length 1; activations then lose their training mean, which all contexts share, and get length 1 again.

    Lengths go first, so that a few long vectors do not make the mean.
    """
    unit = {split: _unit(values) for split, values in vectors.items()}
    if by == "gradients":
        return unit
    middle = unit["train"].mean(0)
    return {split: _unit(values - middle) for split, values in unit.items()}


def _unit(vectors: Vectors) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, np.finfo(np.float64).tiny)


def find_clusters(vectors: Mapping[str, Vectors], count: int, components: int | None, seed: int) -> Clusters:
    """K-means of the training vectors, on one thread so that sums do not depend on their number.

    :raises UserError: there are fewer different training vectors than clusters.
    """
    train = vectors["train"]
    different = len(np.unique(train, axis=0))
    if different < count:
        raise UserError(
            f"Key task.clusters.count is {count}, but there are only {different} different training contexts; lower it "
            "or draw more contexts."
        )
    with threadpool_limits(1):
        most = min(train.shape)
        axes = PCA(min(max(components or 2, 2), most), svd_solver="full").fit(train)
        placed = {split: axes.transform(values) for split, values in vectors.items()}
        seen = {split: placed[split][:, :components] if components else vectors[split] for split in vectors}
        means = KMeans(count, n_init=RESTARTS, random_state=seed).fit(seen["train"])
        order = np.argsort(-np.bincount(means.labels_, minlength=count), kind="stable")
        renamed = np.argsort(order)
        label = {split: renamed[means.predict(values)].astype(np.int64) for split, values in seen.items()}
        away = {split: means.transform(values).min(1) for split, values in seen.items()}
        split_up = 1 < len(np.unique(label["train"])) < len(train)
        silhouette = float(silhouette_score(seen["train"], label["train"])) if split_up else None
    shares = [*axes.explained_variance_ratio_.tolist(), 0.0][:2]
    plane = {
        split: np.pad(values[:, :2], ((0, 0), (0, 2 - values[:, :2].shape[1])))
        for split, values in placed.items()
    }
    return Clusters(label, away, plane, (shares[0], shares[1]), silhouette)


def check_sizes(found: Clusters, count: int) -> None:
    """Refuse clusters that are too small for a circuit.

    :raises UserError: names the smallest and suggests a count.
    """
    train, test = (found.sizes(split, count) for split in SPLITS)
    small = [i for i in range(count) if train[i] < LEAST["train"] or test[i] < LEAST["test"]]
    if not small:
        return
    least = min(small, key=lambda i: (train[i], test[i]))
    fewer = count - len(small)
    advice = f"lower task.clusters.count to {fewer}, or" if fewer > 1 else "leave task.clusters out, or"
    raise UserError(
        f"Cluster {least} of {count} has {train[least]} train and {test[least]} test contexts, too few for a circuit "
        f"(it needs {LEAST['train']} and {LEAST['test']}); {advice} give the task more contexts (task.pairs)."
    )


def among(prompts: Table, pairs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which rows of a table of prompts are of the given pairs of each split, (n,) bool."""
    wanted = {(split, int(pair)) for split in pairs for pair in pairs[split]}
    rows = zip(prompts["split"], prompts["pair"].tolist(), strict=True)
    return np.array([row in wanted for row in rows], bool)


def chosen(table: Table, keep: np.ndarray) -> dict[str, np.ndarray]:
    """Some rows of a table, in order."""
    return {name: column[keep] for name, column in table.items()}


def _columns(tables: Mapping[str, Table], found: Clusters) -> dict[str, np.ndarray]:
    parts = [
        {
            "split": np.array([split] * len(table["pair"]), object),
            "pair": table["pair"],
            "cluster": found.label[split],
            "distance": found.distance[split],
            "x": found.plane[split][:, 0],
            "y": found.plane[split][:, 1],
            "text": table["clean_text"],
            "answer": np.array([" | ".join(tokens) for tokens in table["right_tokens"]], object),
        }
        for split, table in tables.items()
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
