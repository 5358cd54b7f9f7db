"""Composition of circuits and counts of confident prompts: stages on small tables, against counts by hand."""

import numpy as np
import pytest

from circuitflow.circuits.circuit import Circuit, Node, write_circuit
from circuitflow.circuits.composition import compose
from circuitflow.data.confident import count_confident, export_confident
from circuitflow.data.pairs import Pair, read_pairs, write_pairs
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.store.tables import read_table, write_table

SITES = ["mlp.0", "resid.0"]


def out(folder, *names, ending="parquet") -> Output:
    return Output(folder, {name: folder / f"{name}.{ending}" for name in names}, {})


def test_every_circuit_has_shares_that_sum_to_one(tmp_path):
    nodes = {
        "site": np.array(["mlp.0", "resid.0", "resid.0", "mlp.0", "resid.0"], object),
        "feature": np.array([3, 4, -1, -1, 9]),
        "position": np.full(5, -1),
        "score_train": np.array([4.0, -3.0, 2.0, 1.0, 0.5]),
    }
    write_table(tmp_path / "nodes.parquet", nodes)
    write_circuit(tmp_path / "circuit.json", Circuit(tuple(SITES), (Node("resid.0", "error", -1, 2.0),), ()))
    inputs = {"nodes": tmp_path / "nodes.parquet", "circuit": tmp_path / "circuit.json"}
    params = {"sites": SITES, "ranking": "absolute", "counts": [2, 4], "thresholds": [], "shares": [0.6]}
    compose(inputs, params, out(tmp_path, "composition"))
    table = read_table(tmp_path / "composition.parquet")
    circuits = list(dict.fromkeys(zip(table["source"], table["nodes"].tolist(), strict=True)))
    assert circuits == [("count", 2), ("share", 3), ("count", 4), ("all", 5), ("assembled", 1)]
    for source, size in circuits:
        here = (table["source"] == source) & (table["nodes"] == size)
        assert table["share"][here].sum() == pytest.approx(1)
        assert table["strength_share"][here].sum() == pytest.approx(1)
    four = (table["nodes"] == 4) & (table["count"] > 0)
    told = dict(
        zip(
            zip(table["site"][four], table["kind"][four], strict=True),
            table["strength_share"][four],
            strict=True,
        )
    )
    assert told == {
        ("mlp.0", "feature"): 0.4,
        ("mlp.0", "other_error"): 0.1,
        ("resid.0", "feature"): 0.3,
        ("resid.0", "residual_error"): 0.2,
    }


def test_confident_prompts_are_counted_by_case(tmp_path):
    table = {
        "split": np.array(["train"] * 4 + ["test"] * 2, object),
        "case": np.array(["a", "a", "b", "b", "a", "b"], object),
        "side": np.array(["clean", "clean", "clean", "patched", "clean", "clean"], object),
        "difference": np.array([2.0, 0.5, 1.0, 9.0, -1.0, 3.0]),
        "probability": np.array([0.5, 0.1, 0.05, 0.9, 0.0, 0.2]),
        "rank": np.array([1, 2, 5, 1, 40, 1]),
    }
    write_table(tmp_path / "prompts.parquet", table)
    params = {"differences": [0.0, 1.0], "probabilities": [0.1], "ranks": [2]}
    count_confident({"prompts": tmp_path / "prompts.parquet"}, params, out(tmp_path, "confidence"))
    found = read_table(tmp_path / "confidence.parquet")
    names = ("split", "case", "quantity", "threshold")
    counts = dict(
        zip(
            zip(*(found[name].tolist() for name in names), strict=True),
            zip(found["count"].tolist(), found["n"].tolist(), strict=True),
            strict=True,
        )
    )
    assert counts["train", "all cases", "difference", 0.0] == (3, 3)
    assert counts["train", "all cases", "difference", 1.0] == (2, 3)
    assert counts["train", "a", "probability", 0.1] == (2, 2)
    assert counts["train", "b", "rank", 2.0] == (0, 1)
    assert counts["test", "all cases", "rank", 2.0] == (1, 2)
    assert len(counts) == 2 * 3 * 4
    assert ((found["low"] <= found["share"]) & (found["share"] <= found["high"])).all()


def test_confident_pairs_are_written_as_they_came(tmp_path):
    pairs = [Pair("c", f"clean {i}", f"patch {i}", (f" a{i}",), (f" b{i}",), " end.", "v") for i in range(4)]
    inputs = {}
    for split, numbers in (("train", [2, 0]), ("test", [3])):
        inputs[f"pairs_{split}"] = tmp_path / f"{split}.in.jsonl"
        write_pairs(inputs[f"pairs_{split}"], pairs)
        inputs[f"tokens_{split}"] = tmp_path / f"{split}.parquet"
        write_table(inputs[f"tokens_{split}"], {"pair": numbers})
    export_confident(inputs, {}, out(tmp_path, "train", "test", ending="jsonl"))
    assert read_pairs(tmp_path / "train.jsonl") == [pairs[2], pairs[0]]
    assert read_pairs(tmp_path / "test.jsonl") == [pairs[3]]
    write_table(inputs["tokens_test"], {"pair": [4]})
    with pytest.raises(UserError, match=r"Pair 4 is confident, but .* has 4 pairs"):
        export_confident(inputs, {}, out(tmp_path, "train", "test", ending="jsonl"))
