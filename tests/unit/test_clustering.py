"""Clusters of contexts: planted groups come back, and each cluster's tables hold its pairs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from circuitflow.attribution.clustering import (
    among,
    cluster_contexts,
    directions,
    find_clusters,
    read_vectors,
)
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.plots.context_clusters import ending, plot_clusters
from circuitflow.store.arrays import ArraySpec, StoreWriter, open_store
from circuitflow.store.objects import Manifest, ObjectFolder, Recipe
from circuitflow.store.tables import read_provenance, read_table, write_table

POS, WIDTH = 6, 12
SIZES = {"train": (20, 12, 7), "test": (6, 4, 3)}
PARAMS = {"by": "gradients", "site": "resid.1", "clusters": 3, "components": None, "seed": 0}


def planted(
    split: str, seed: int, sizes: dict[str, tuple[int, ...]] = SIZES
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors near three orthogonal directions, of very different lengths, and their groups, in random order."""
    rng = np.random.default_rng([seed, len(split)])
    group = rng.permutation(np.repeat(np.arange(3), sizes[split]))
    vectors = 3 * np.eye(WIDTH)[group] + 0.15 * rng.normal(size=(len(group), WIDTH))
    return vectors * rng.uniform(0.1, 50, (len(group), 1)), group


def store_of(root: Path, name: str, gradients: np.ndarray, clean: np.ndarray) -> Path:
    recipe = Recipe("cache_gradients", {"name": name}, {}, code="test")
    arrays = {"resid.1/gradient": gradients, "resid.1/clean": clean}
    with ObjectFolder(root, recipe) as kept:
        specs = {array: ArraySpec(values.shape, "float32") for array, values in arrays.items()}
        writer = StoreWriter(kept.path, specs, len(clean), {})
        for index in writer.missing():
            writer.write_shard(index, {array: values.astype(np.float32) for array, values in arrays.items()})
        content, details = writer.finish()
        kept.finish(content, details)
    path = root / f"{name}.json"
    Manifest("store", recipe.fingerprint, content, recipe.as_dict(), details).write(path)
    return path


def table(split: str, n: int, position: np.ndarray) -> dict[str, Any]:
    return {
        "pair": np.arange(100, 100 + n),
        "position": position,
        "clean_text": [f"{split} text {i}\nof more than one line" for i in range(n)],
        "right_tokens": [[f" {i}"] for i in range(n)],
    }


@pytest.fixture
def made(tmp_path: Path) -> dict[str, Any]:
    """Inputs of the stage, whose gradients' sums and whose activations at the answer are the planted vectors."""
    inputs: dict[str, Any] = {}
    groups, prompts = {}, {"split": [], "pair": [], "side": []}
    for split in ("train", "test"):
        vectors, groups[split] = planted(split, 0)
        n = len(vectors)
        rng = np.random.default_rng(5)
        position = rng.integers(0, POS, n)
        gradients, clean = rng.normal(size=(2, n, POS, WIDTH))
        gradients += (vectors - gradients.sum(1))[:, None] / POS
        clean[np.arange(n), position] = vectors
        inputs[f"gradients_{split}"] = store_of(tmp_path, split, gradients, clean)
        inputs[f"tokens_{split}"] = tmp_path / f"{split}.in.parquet"
        write_table(inputs[f"tokens_{split}"], table(split, n, position))
        for pair in range(99, 100 + n):  # 99 is not confident
            prompts["split"] += [split] * 2
            prompts["pair"] += [pair] * 2
            prompts["side"] += ["clean", "patched"]
    inputs["prompts"] = tmp_path / "prompts.in.parquet"
    write_table(inputs["prompts"], prompts)
    return {"inputs": inputs, "groups": groups}


def run(made: dict[str, Any], folder: Path, **params: Any) -> dict[str, Path]:
    folder.mkdir()
    count = params.get("clusters", 3)
    names = [f"{name}_{i}" for i in range(count) for name in ("train", "test", "prompts")]
    files = {name: folder / f"{name}.parquet" for name in (*names, "clusters")}
    given = {**PARAMS, **params}
    cluster_contexts(made["inputs"], given, Output(folder, files, {"params": given}))
    return files


@pytest.mark.parametrize("by", ["gradients", "activations"])
@pytest.mark.parametrize("components", [None, 3])
def test_planted_groups_are_recovered_largest_first(
    made: dict[str, Any], tmp_path: Path, by: str, components: int | None
) -> None:
    files = run(made, tmp_path / "out", by=by, components=components)
    found = read_table(files["clusters"])
    for split in ("train", "test"):
        here = found["split"] == split
        assert found["cluster"][here].tolist() == made["groups"][split].tolist()
    facts = read_provenance(files["clusters"])["clusters"]
    assert facts["sizes"] == {split: list(sizes) for split, sizes in SIZES.items()}
    assert facts["silhouette"] > 0.5


def test_each_clusters_tables_are_the_rows_of_the_tasks_in_order(
    made: dict[str, Any], tmp_path: Path
) -> None:
    files = run(made, tmp_path / "out")
    seen = []
    for number in range(3):
        for split in ("train", "test"):
            whole, part = (
                read_table(made["inputs"][f"tokens_{split}"]),
                read_table(files[f"{split}_{number}"]),
            )
            members = made["groups"][split] == number
            assert list(part) == list(whole)
            for name in whole:
                assert [str(value) for value in part[name]] == [str(value) for value in whole[name][members]]
            prompts = read_table(files[f"prompts_{number}"])
            clean = (prompts["split"] == split) & (prompts["side"] == "clean")
            assert prompts["pair"][clean].tolist() == part["pair"].tolist()
            assert np.sum(prompts["split"] == split) == 2 * members.sum()
            seen += [(split, pair) for pair in part["pair"].tolist()]
    assert len(seen) == len(set(seen)) == sum(map(sum, SIZES.values()))


def test_equal_seeds_give_equal_bytes(made: dict[str, Any], tmp_path: Path) -> None:
    first, again = run(made, tmp_path / "a"), run(made, tmp_path / "b")
    for name, file in first.items():
        assert file.read_bytes() == again[name].read_bytes()


def test_distances_are_to_the_own_centre(made: dict[str, Any], tmp_path: Path) -> None:
    found = read_table(run(made, tmp_path / "out")["clusters"])
    raw = {
        split: read_vectors(
            open_store(made["inputs"][f"gradients_{split}"]), "resid.1", "gradients", np.zeros(0, np.int64)
        )
        for split in ("train", "test")
    }
    vectors = directions(raw, "gradients")
    centres = np.stack([vectors["train"][made["groups"]["train"] == i].mean(0) for i in range(3)])
    for split in ("train", "test"):
        expected = np.linalg.norm(vectors[split] - centres[made["groups"][split]], axis=1)
        np.testing.assert_allclose(found["distance"][found["split"] == split], expected, rtol=1e-9)


def test_vectors_are_the_answers_activation_or_the_summed_gradient(made: dict[str, Any]) -> None:
    store = open_store(made["inputs"]["gradients_train"])
    position = read_table(made["inputs"]["tokens_train"])["position"]
    for by in ("gradients", "activations"):
        found = read_vectors(store, "resid.1", by, position)
        np.testing.assert_allclose(found, planted("train", 0)[0], rtol=1e-3, atol=1e-4)


def test_activations_lose_the_training_mean_and_all_have_length_1() -> None:
    rng = np.random.default_rng(0)
    vectors = {"train": rng.normal(size=(9, 4)) + 100, "test": rng.normal(size=(5, 4)) + 100}
    moved = directions(vectors, "activations")
    for values in moved.values():
        np.testing.assert_allclose(np.linalg.norm(values, axis=1), 1)
    unit = directions(vectors, "gradients")["train"]
    away = unit - unit.mean(0)
    np.testing.assert_allclose((moved["train"] * away).sum(1), np.linalg.norm(away, axis=1))
    assert np.ptp(directions(vectors, "gradients")["train"]) < 0.1, "gradients keep their mean"


def test_small_clusters_are_refused_with_a_smaller_number(made: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"too few for a circuit \(it needs 4 and 2\); (lower|leave) task.clusters"
    ):
        run(made, tmp_path / "out", clusters=9)


def test_more_clusters_than_contexts_are_refused() -> None:
    vectors = {"train": np.repeat(np.eye(4), 3, axis=0), "test": np.eye(4)}
    with pytest.raises(UserError, match=r"count is 5, but there are only 4 different training contexts"):
        find_clusters(vectors, 5, None, 0)


def test_prompts_belong_by_split_and_pair() -> None:
    prompts = {"split": np.array(["train", "test", "train"], object), "pair": np.array([1, 1, 2])}
    pairs = {"train": np.array([2]), "test": np.array([1])}
    assert among(prompts, pairs).tolist() == [False, True, True]


def test_the_figure_is_drawn_with_its_subject(made: dict[str, Any], tmp_path: Path) -> None:
    files = run(made, tmp_path / "out")
    drawn = {}
    for name in ("first", "again"):
        out = {kind: tmp_path / f"{name}.{kind}" for kind in ("png", "svg")}
        style = {"dpi": 60, "subject": "tiny · text"}
        plot_clusters(
            {"clusters": files["clusters"]}, {"style": style}, Output(tmp_path, out, {"stage": "x"})
        )
        drawn[name] = [path.read_bytes() for path in out.values()]
    assert drawn["first"] == drawn["again"]


def test_a_long_context_keeps_its_end() -> None:
    assert ending("short", 5, 8) == "short"
    cut = ending("a very long context whose end matters most", 1, 8)
    assert cut.startswith("…")
    assert cut.endswith("most")
    assert len(cut) < 30
