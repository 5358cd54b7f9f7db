"""Ledgers: what was measured once is not measured again, whatever else is asked for."""

import numpy as np
import pytest

from circuitflow.circuits import measuring
from circuitflow.circuits.interventions import keep, nothing
from circuitflow.circuits.measuring import forget_journals, ledger_for, looked_up, measured
from circuitflow.jobs import Output
from circuitflow.store.cleaning import unreferenced
from circuitflow.store.ledger import key_of, open_ledger
from circuitflow.store.objects import Recipe
from circuitflow.store.tables import write_table

SITES = ("embed", "resid.0")
RECIPE = Recipe("ledger", {"pairs": 4}, {"model": "m"}, "code")


@pytest.fixture
def objects(tmp_path):
    return tmp_path / "results" / "m" / "objects"


def test_what_is_saved_is_known_to_the_same_recipe_alone(objects):
    first = open_ledger(objects, RECIPE)
    assert first.missing(["a", "b", "a"]) == ["a", "b"]
    first.add(["a", "b"], np.array([[1.0, 2.0], [3.0, 4.0]]))
    assert open_ledger(objects, RECIPE).missing(["a"]) == ["a"]  # not saved yet
    first.save()
    again = open_ledger(objects, RECIPE)
    assert again.missing(["a", "c", "b"]) == ["c"]
    assert again.values(["b", "a"]).tolist() == [[3, 4], [1, 2]]
    for other in (
        Recipe("ledger", {"pairs": 5}, {"model": "m"}, "code"),
        Recipe("ledger", {"pairs": 4}, {}, "code"),
    ):
        assert open_ledger(objects, other).missing(["a"]) == ["a"]
    assert open_ledger(objects, RECIPE, anew=True).missing(["a"]) == ["a"]


def test_two_jobs_do_not_lose_each_others_results(objects):
    one, two = open_ledger(objects, RECIPE), open_ledger(objects, RECIPE)
    one.add(["a"], np.array([[1.0]]))
    two.add(["b"], np.array([[2.0]]))
    one.save()
    two.save()
    assert open_ledger(objects, RECIPE).missing(["a", "b"]) == []


def test_saving_the_same_gives_the_same_bytes(objects, tmp_path):
    other = tmp_path / "results" / "n" / "objects"
    for place, order in ((objects, "ab"), (other, "ba")):
        ledger = open_ledger(place, RECIPE)
        for key in order:
            ledger.add([key], np.array([[float(ord(key))]]))
            ledger.save()
    files = [place / RECIPE.fingerprint / "values.parquet" for place in (objects, other)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_outside_a_folder_of_objects_nothing_is_kept(tmp_path):
    ledger = open_ledger(tmp_path, RECIPE)
    ledger.add(["a"], np.array([[1.0]]))
    ledger.save()
    assert list(tmp_path.iterdir()) == []


def test_cleaning_leaves_ledgers_that_a_table_names(objects):
    ledger = open_ledger(objects, RECIPE)
    ledger.add(["a"], np.array([[1.0]]))
    ledger.save()
    results = objects.parent.parent
    found = unreferenced(results)
    assert [(one.path.name, one.partial, one.stage) for one in found] == [(ledger.name, False, "ledger")]
    write_table(objects.parent / "t" / "x.parquet", {"n": [1]}, {"object": "o", "ledgers": [ledger.name]})
    assert unreferenced(results) == []


class Counting:
    """m is the number of kept nodes and the prompt's number; remembers what was run."""

    def __init__(self) -> None:
        self.ran: list[int] = []

    def values(self, interventions, batch_rows, journal=None):
        rows = []
        for one in interventions:
            size = sum(len(state.kept.feature) for state in one.values())
            rows.append(journal.result(lambda size=size: self._run(size)))
        return np.array(rows)

    def _run(self, size: int) -> list[float]:
        self.ran.append(size)
        return [float(size), size + 0.5]


def circuits(*sizes: int) -> list:
    return [keep([("embed", feature, -1) for feature in range(size)], SITES) for size in sizes]


def test_one_more_circuit_runs_that_alone(objects):
    folder = objects / "job"
    folder.mkdir(parents=True)
    here, ledger = Counting(), open_ledger(objects, RECIPE)
    assert measured(here, circuits(1, 2, 2), 9, ledger, folder)[:, 1].tolist() == [1.5, 2.5, 2.5]
    assert here.ran == [1, 2]
    ledger.save()
    forget_journals(folder)
    assert list(folder.iterdir()) == []
    found = measured(here, [nothing(SITES), *circuits(2, 3, 1)], 9, open_ledger(objects, RECIPE), folder)
    assert found[:, 0].tolist() == [0, 2, 3, 1]
    assert here.ran == [1, 2, 0, 3]


def test_a_journal_of_another_list_is_not_mistaken_for_this_one(objects):
    folder = objects / "job"
    folder.mkdir(parents=True)
    measured(Counting(), circuits(1, 2), 9, open_ledger(objects, RECIPE), folder)  # killed before saving
    here = Counting()
    again = measured(here, circuits(1, 2), 9, open_ledger(objects, RECIPE), folder)
    assert (again[:, 0].tolist(), here.ran) == ([1, 2], [])
    other = measured(here, circuits(2, 3), 9, open_ledger(objects, RECIPE), folder)
    assert (other[:, 0].tolist(), here.ran) == ([2, 3], [2, 3])


def test_nothing_missing_runs_nothing(objects):
    ledger = open_ledger(objects, RECIPE)
    ledger.add(["a"], np.array([[1.0]]))

    def run(*_):
        raise AssertionError("nothing is missing")

    assert looked_up(["a", "a"], run, ledger, objects).tolist() == [[1], [1]]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["a", "b", "b"], ["1 of 2 results are known from before"]),
        (["a", "a"], ["1 of 1 results are known from before"]),
        (["b", "b", "c"], []),
    ],
)
def test_the_log_counts_different_experiments(objects, monkeypatch, keys, said):
    told = []
    monkeypatch.setattr(measuring.logger, "info", lambda text, *numbers: told.append(text % numbers))
    ledger = open_ledger(objects, RECIPE)
    ledger.add(["a"], np.array([[1.0]]))
    looked_up(keys, lambda missing, _: np.ones((len(missing), 1)), ledger, objects)
    assert told == said


def test_a_stages_ledger_depends_on_what_decides_m_and_on_nothing_else(objects, monkeypatch):
    monkeypatch.setattr(measuring.CodeReader, "digest", lambda reader, path: "code")
    params = {"sites": ["embed"], "metric": {}, "ablation": "mean", "pairs": 4, "seed": 0, "counts": [1]}
    contents = {"model": "a", "dictionaries": ["b"], "tokens_test": "c", "nodes": "d"}

    def name(split="test", inputs=None, more=None, **changed) -> str:
        provenance = {"stage": "evaluate_circuit", "inputs": contents | (inputs or {})}
        out = Output(objects / "job", {}, provenance)
        return ledger_for(out, params | changed, split, **(more or {})).name

    same = name()
    assert name(counts=[1, 2]) == name(inputs={"nodes": "other", "circuit": "e"}) == same
    others = [
        name(ablation="zero"),
        name(pairs=5),
        name(inputs={"model": "z"}),
        name("train"),
        name(more={"base": 1}),
    ]
    assert len({same, *others}) == 6


def test_recomputing_does_not_look_into_the_ledger(objects, monkeypatch):
    monkeypatch.setattr(measuring.CodeReader, "digest", lambda reader, path: "code")
    out = Output(objects / "job", {}, {"stage": "evaluate_circuit"})
    ledger = ledger_for(out, {}, "test")
    ledger.add(["a"], np.array([[1.0]]))
    ledger.save()
    assert ledger_for(out, {}, "test").missing(["a"]) == []
    monkeypatch.setenv("CIRCUITFLOW_RECOMPUTE", "other,evaluate_circuit")
    assert ledger_for(out, {}, "test").missing(["a"]) == ["a"]


def test_keys_do_not_depend_on_the_order_of_what_they_say():
    assert key_of({"a": 1, "b": [2]}) == key_of({"b": [2], "a": 1}) != key_of({"a": 1, "b": [3]})
