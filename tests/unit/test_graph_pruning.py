"""The tables of a pruned graph by hand."""

from dataclasses import replace

import numpy as np

from circuitflow.graphs.graph import NO_TOKEN
from circuitflow.graphs.influence import prune
from circuitflow.graphs.pruning import node_columns, summary
from tests.fixtures.synthetic_graph import small


def test_a_direction_has_a_weight_and_no_probability() -> None:
    graph = replace(small(), logits=np.array([9, NO_TOKEN]))
    kept = prune(graph, 1.0, 1.0)
    columns = node_columns(graph, kept)
    np.testing.assert_array_equal(columns["probability"][-2:], [0.75, np.nan])
    np.testing.assert_array_equal(columns["weight"][-3:], [np.nan, 0.75, 0.125])
    assert summary(graph, kept)["logits"] == [
        {"token": " d", "probability": 0.75},
        {"token": ' "e"', "weight": 0.125},
    ]
