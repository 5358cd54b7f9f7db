"""Cleaning: what nothing points to goes, what is in use or unfinished stays."""

from pathlib import Path

import pytest

from circuitflow.errors import UserError
from circuitflow.store.cleaning import REMOVED, Leftover, remove, unreferenced
from circuitflow.store.files import write_json
from circuitflow.store.objects import Manifest, ObjectFolder, Recipe
from circuitflow.store.tables import write_table

SIZES = {"pointed": 10, "copied": 20, "drawn": 30, "old": 500, "older": 400, "half": 300}


def recipe(name: str) -> Recipe:
    return Recipe(name, {}, {}, "code")


def path_of(model: Path, name: str) -> Path:
    return ObjectFolder(model, recipe(name)).path


@pytest.fixture
def model(tmp_path) -> Path:
    """A model's folder with objects that a manifest, a table or a drawing's JSON names, two old ones and a half one."""
    model = tmp_path / "results" / "m"
    for name, size in SIZES.items():
        with ObjectFolder(model, recipe(name)) as kept:
            (kept.path / "deep").mkdir()
            (kept.path / "deep" / "data").write_bytes(bytes(size))
            if name != "half":
                kept.finish("content", {})
    Manifest("store", recipe("pointed").fingerprint, "c", {}, {}).write(
        model / "activations" / "manifest.json"
    )
    write_table(model / "task" / "x.quality.parquet", {"n": [1]}, {"object": recipe("copied").fingerprint})
    write_json(
        model / "task" / "sae" / "circuit.json", {"provenance": {"object": recipe("drawn").fingerprint}}
    )
    write_json(model / "task" / "list.json", [1, 2])
    (tmp_path / "results" / "benchmarks").mkdir()
    return model


def clean(results: Path, partial: bool = False) -> list[Leftover]:
    """What ``circuitflow clean`` does once the user has agreed."""
    return remove(leftover for leftover in unreferenced(results) if partial or not leftover.partial)


def names(leftovers) -> list[str]:
    known = {recipe(name).fingerprint: name for name in SIZES}
    return [known[leftover.path.name] for leftover in leftovers]


def test_lists_what_nothing_points_to_with_sizes(model):
    found = unreferenced(model.parent)
    assert names(found) == ["old", "older", "half"]
    assert [leftover.partial for leftover in found] == [False, False, True]
    assert [leftover.stage for leftover in found] == ["old", "older", None]
    assert 500 <= found[0].size < 1000
    assert found[2].size == 300


def test_unfinished_objects_go_with_partial_only(model):
    assert names(clean(model.parent)) == ["old", "older"]
    assert not path_of(model, "old").exists()
    assert path_of(model, "half").is_dir()
    assert names(clean(model.parent, partial=True)) == ["half"]
    assert sorted(path.name for path in (model / "objects").iterdir()) == sorted(
        recipe(name).fingerprint for name in ("pointed", "copied", "drawn")
    )


def test_an_object_in_work_is_neither_listed_nor_removed(model):
    with ObjectFolder(model, recipe("half")), ObjectFolder(model, recipe("old")):
        assert names(unreferenced(model.parent)) == ["older"]
        assert names(clean(model.parent, partial=True)) == ["older"]
    assert path_of(model, "half").is_dir()
    assert names(clean(model.parent, partial=True)) == ["old", "half"]


def test_what_comes_into_use_after_the_list_was_shown_stays(model):
    """A job takes one object up again while the user reads the list; another gets its manifest back."""
    old, older = ObjectFolder(model, recipe("old")), ObjectFolder(model, recipe("older"))
    listed = unreferenced(model.parent)
    Manifest("store", older.recipe.fingerprint, "c", {}, {}).write(model / "activations" / "again.json")
    with old:
        assert names(remove(listed)) == ["half"]
    assert (old.path / "deep" / "data").is_file()
    assert (older.path / "deep" / "data").is_file()


def test_a_removal_that_was_interrupted_is_finished(model):
    path_of(model, "old").rename(model / "objects" / f"{REMOVED}{recipe('old').fingerprint}")
    clean(model.parent)
    assert not list((model / "objects").glob(f"{REMOVED}*"))


def test_an_unreadable_manifest_stops_everything(model):
    (model / "activations" / "manifest.json").write_text('{"object": "12')
    with pytest.raises(UserError, match=r"manifest\.json is not valid JSON"):
        clean(model.parent, partial=True)
    assert path_of(model, "old").is_dir()


def test_what_kept_results_were_made_with_stays(model):
    """Another task's dictionaries of the same name have replaced the manifest; the first task's circuit is kept."""
    made, again = recipe("made"), Recipe("made", {}, {}, "newer code")
    for one in (made, again):
        with ObjectFolder(model, one) as kept:
            (kept.path / "data").write_bytes(bytes(900))
            kept.finish("digest-of-weights", {})
    provenance = {"object": recipe("drawn").fingerprint, "dictionaries": {"resid.0": "digest-of-weights"}}
    circuit = model / "task" / "sae" / "circuit.json"
    write_json(circuit, {"provenance": provenance})
    left = {leftover.path.name for leftover in unreferenced(model.parent)}
    assert len(left & {made.fingerprint, again.fingerprint}) == 1, "one of two with equal content is enough"
    inputs = {"dictionaries": ["digest-of-weights"]}
    write_table(model / "task" / "faithfulness.parquet", {"n": [1]}, {"inputs": inputs})
    circuit.unlink()
    assert {leftover.path.name for leftover in unreferenced(model.parent)} - left == {
        recipe("drawn").fingerprint
    }
    Manifest("dictionary", again.fingerprint, "digest-of-weights", {}, {}).write(
        model / "dictionaries" / "x.json"
    )
    left = {leftover.path.name for leftover in unreferenced(model.parent)}
    assert made.fingerprint in left
    assert again.fingerprint not in left
    (model / "dictionaries" / "x.json").unlink()
    (model / "task" / "faithfulness.parquet").unlink()
    left = {leftover.path.name for leftover in unreferenced(model.parent)}
    assert {made.fingerprint, again.fingerprint} <= left
