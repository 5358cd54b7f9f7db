"""Stores of two models as one: the same shard files under two names, read like any other store."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from circuitflow.diffing.joining import join_activations, joint_layout
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.store.arrays import open_store
from circuitflow.store.objects import Manifest
from circuitflow.store.shuffle import ROW, ShuffledRows
from tests.fixtures.activation_store import write_store

SITE = "resid.1"


@pytest.fixture
def inputs(tmp_path: Path, toy_manifest: Callable[..., Path]) -> dict[str, Path]:
    rng = np.random.default_rng(0)
    stores = {
        name: write_store(tmp_path, name, {SITE: rows, "resid.2": rows + 1}, [7], 48)
        for name, rows in zip(("base", "tuned"), rng.normal(size=(2, 128, 6)).astype(np.float32), strict=True)
    }
    return {**stores, "model_base": toy_manifest(), "model_tuned": toy_manifest()}


def joined(root: Path, inputs: dict[str, Path], name: str = "joint") -> Path:
    """Run the stage; gives the manifest."""
    folder = root / "objects" / name
    folder.mkdir(parents=True, exist_ok=True)
    out = Output(folder, {}, {})
    join_activations(inputs, {"site": SITE}, out)
    assert out.content is not None
    manifest = root / name / "manifest.json"
    Manifest("store", name, out.content, {}, out.details).write(manifest)
    return manifest


def test_rows_of_both_models_stand_side_by_side(tmp_path: Path, inputs: dict[str, Path]) -> None:
    store = open_store(joined(tmp_path, inputs))
    assert sorted(store.arrays) == ["base:resid.1", "tuned:resid.1"]
    assert store.attrs == {"block": 16, "held_out_blocks": [7]}
    for name in ("base", "tuned"):
        assert np.array_equal(store.read(f"{name}:{SITE}"), open_store(inputs[name]).read(SITE))
        store.check_shard(f"{name}:{SITE}", 2)
    batch = ShuffledRows(store, sorted(store.arrays), 10, 100, seed=0).batch_at(3)
    assert np.array_equal(batch[f"tuned:{SITE}"], open_store(inputs["tuned"]).read(SITE)[batch[ROW]])


def test_shards_are_not_copied_and_joining_again_changes_nothing(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    store = open_store(joined(tmp_path, inputs))
    file = store.layout.file(store.folder, f"base:{SITE}", 0)
    source = open_store(inputs["base"])
    assert file.samefile(source.layout.file(source.folder, SITE, 0))
    again = open_store(joined(tmp_path, inputs))
    assert again.content == store.content
    assert not list(store.folder.rglob("*.tmp"))


def test_the_content_of_each_array_is_its_own(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """So that a training that reads one model alone does not hang on the other."""
    first = Manifest(**_json(joined(tmp_path, inputs)))
    other = np.random.default_rng(1).normal(size=(128, 6)).astype(np.float32)
    inputs["tuned"] = write_store(tmp_path, "other", {SITE: other}, [7], 48)
    second = Manifest(**_json(joined(tmp_path, inputs, "second")))
    before, after = (manifest.details["contents"] for manifest in (first, second))
    assert before[f"base:{SITE}"] == after[f"base:{SITE}"]
    assert before[f"tuned:{SITE}"] != after[f"tuned:{SITE}"]


def test_a_damaged_shard_is_not_spread(tmp_path: Path, inputs: dict[str, Path]) -> None:
    source = open_store(inputs["tuned"])
    file = source.layout.file(source.folder, SITE, 1)
    data = bytearray(file.read_bytes())
    data[10] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"circuitflow verify --repair .*tuned"):
        joined(tmp_path, inputs)


def test_stores_that_do_not_belong_together_are_refused(tmp_path: Path, inputs: dict[str, Path]) -> None:
    rows = np.zeros((128, 6), np.float32)
    cases = {
        "is 7 wide at resid.1, but the run's is 6": write_store(
            tmp_path, "wide", {SITE: np.zeros((128, 7), np.float32)}, [7], 48
        ),
        "different text, or cut": write_store(tmp_path, "split", {SITE: rows}, [6], 48),
        "or cut differently": write_store(tmp_path, "cut", {SITE: rows}, [7], 64),
    }
    for sentence, other in cases.items():
        with pytest.raises(UserError, match=sentence):
            joint_layout({"base": open_store(inputs["base"]), "tuned": open_store(other)}, SITE)


def test_another_tokenizer_is_refused(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tokenizer:
        def __init__(self, words: dict[str, int]) -> None:
            self.get_vocab = lambda: words

    vocabularies = iter([{"a": 0, "b": 1}, {"a": 0, "c": 1, "d": 2}])
    monkeypatch.setattr(
        "circuitflow.diffing.joining.load_tokenizer", lambda manifest: Tokenizer(next(vocabularies))
    )
    with pytest.raises(UserError, match="another tokenizer: 1 of 2 tokens differ, for example 'b'"):
        joined(tmp_path, inputs)


def _json(path: Path) -> Any:
    return json.loads(path.read_text())
