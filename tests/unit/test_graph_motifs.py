"""Chains of features across graphs: found, counted, and held against shuffled graphs."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from circuitflow.errors import UserError
from circuitflow.graphs.chains import Edges, Shuffled, chains, codes_of, possible_chains
from circuitflow.graphs.motifs import corrected, find_motifs, in_at_least, recurring, tail

PARAMS = {"least": 2, "lengths": [2, 3], "shuffles": 60, "swaps": 5, "level": 0.05, "seed": 0}


def _edges(pairs, features, weights=None):
    source, target = np.array(pairs).T
    return Edges(
        source, target, np.ones(len(pairs)) if weights is None else np.array(weights), np.array(features)
    )


def _random_graph(seed, planted=()):
    """Twenty features in four layers, at two positions, with random edges and planted ones."""
    random = np.random.default_rng(seed)
    features = [(layer, position, f) for layer in range(4) for f in range(5) for position in (0, 1)]
    number = {feature: node for node, feature in enumerate(features)}
    possible = [
        (a, b)
        for (i, a), (j, b) in product(enumerate(range(40)), repeat=2)
        if features[i][0] < features[j][0] and features[i][1] <= features[j][1]
    ]
    chosen = {possible[k] for k in random.choice(len(possible), 18, replace=False)}
    chosen |= {(number[a], number[b]) for a, b in planted}
    return _edges(sorted(chosen), features)


def test_chains_by_hand():
    #   0 → 2 → 3, 0 → 3, 1 → 2
    edges = _edges([(0, 2), (0, 3), (1, 2), (2, 3)], [(0, 0, 5), (0, 1, 5), (1, 1, 6), (2, 1, 7)])
    assert chains(edges.source, edges.target, 2).tolist() == [[0, 2], [0, 3], [1, 2], [2, 3]]
    assert sorted(chains(edges.source, edges.target, 3).tolist()) == [[0, 2, 3], [1, 2, 3]]
    keys = edges.keys()
    assert keys.tolist() == [[0, 5], [1, 6], [2, 7]]
    # Features 5 at both positions are one key, so that both chains of three are one.
    number = edges.number(keys)
    assert codes_of(chains(edges.source, edges.target, 3), number, 3).tolist() == [0 * 9 + 1 * 3 + 2]
    assert codes_of(chains(edges.source, edges.target, 2), number, 3).tolist() == [1, 2, 5]
    assert codes_of(chains(edges.source, edges.target, 2), np.array([0, 0, -1, 2]), 3).tolist() == [2]


def test_shuffled_graphs_keep_degrees_layers_and_order():
    edges = _random_graph(3)
    state = Shuffled(edges, 0)
    changed = 0
    for _ in range(20):
        source, target = state.next(10)
        for side, own in ((source, edges.source), (target, edges.target)):
            assert np.bincount(side, minlength=40).tolist() == np.bincount(own, minlength=40).tolist()
        assert len(set(zip(source.tolist(), target.tolist(), strict=True))) == len(edges.source)
        assert (edges.features[source, 0] < edges.features[target, 0]).all()
        assert (edges.features[source, 1] <= edges.features[target, 1]).all()
        changed += int((target != edges.target).any())
    assert changed == 20


def test_shuffled_graphs_are_drawn_evenly():
    """Two edges from one layer to the next: both pairings equally often."""
    edges = _edges([(0, 2), (1, 3)], [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1)])
    state = Shuffled(edges, 1)
    crossed = sum(int(state.next(3)[1][0] == 3) for _ in range(4000))
    assert abs(crossed / 4000 - 0.5) < 0.04  # five standard deviations


def test_poisson_binomial_tail_by_enumeration():
    chances = np.array([0.1, 0.5, 0.25, 1.0])
    for count in range(5):
        wanted = sum(
            np.prod([p if hit else 1 - p for p, hit in zip(chances, hits, strict=True)])
            for hits in product((0, 1), repeat=4)
            if sum(hits) >= count
        )
        assert tail(chances, count) == pytest.approx(wanted)


def test_rates_of_false_discoveries_by_hand():
    # 10 tests, of which the three smallest p are known: 10·.001, 10·.02/2, 10·.021/3.
    np.testing.assert_allclose(corrected(np.array([0.02, 0.001, 0.021]), 10), [0.07, 0.01, 0.07])


def test_counts_over_graphs():
    assert in_at_least([np.array([1, 2]), np.array([2, 3]), np.array([2])]).tolist() == [3, 1, 1]


def test_possible_chains_by_hand():
    features = [(0, 1, 0), (0, 0, 1), (1, 0, 0), (1, 1, 1), (2, 1, 0)]
    edges = [_edges([(0, 3), (1, 2), (2, 4)], features)] * 2
    keys = edges[0].keys()
    found = possible_chains(edges, keys, 2, np.array([0 * 5 + 2, 0 * 5 + 3]))
    # Feature 0 stands at position 1 alone, and feature 2 of layer 1 at position 0.
    assert found.possible.tolist() == [[False, True]] * 2
    # Sources are 0, 1 and 2, targets 3, 2 and 4: 0→3, 0→4, 1→2, 1→3, 1→4, 2→4.
    assert found.total(2) == 6
    assert found.total(3) == 0
    # 3 has no outgoing edge, so that 1→2→4 is the only chain of three.
    assert possible_chains(edges, keys, 3, np.array([(1 * 5 + 2) * 5 + 4])).total(2) == 1


def test_a_planted_chain_is_found_and_nothing_in_random_graphs():
    planted = [((0, 0, 1), (1, 0, 2)), ((1, 0, 2), (3, 1, 0))]
    names = [f"p{i}" for i in range(8)]
    with_it, totals = recurring([_random_graph(i, planted) for i in range(8)], names, PARAMS)
    found = {c for c, yes in zip(with_it["chain"], with_it["recurring"], strict=True) if yes}
    assert found == {"0_1 > 1_2", "1_2 > 3_0", "0_1 > 1_2 > 3_0"}
    at = with_it["chain"].index("0_1 > 1_2 > 3_0")
    assert (with_it["graphs"][at], with_it["of"][at], with_it["third"][at]) == (8, 8, "3_0")
    assert with_it["expected"][at] < 3
    assert with_it["positive"][at] == 1
    in_all = [
        i for i, (length, n) in enumerate(zip(totals["length"], totals["graphs"], strict=True)) if n == 8
    ]
    assert [totals["observed"][i] for i in in_all] == [2, 1]
    assert all(totals["p"][i] < 0.05 for i in in_all)
    without, _ = recurring([_random_graph(i) for i in range(8)], names, PARAMS)
    assert len(without["chain"]) > 20
    assert not any(without["recurring"])


def test_results_are_the_same_every_time():
    graphs = [_random_graph(i) for i in range(3)]
    first, second = (recurring(graphs, ["a", "b", "c"], PARAMS) for _ in range(2))
    assert first[0]["p"] == second[0]["p"]
    assert first[1] == second[1]


def test_weights_are_means_over_places():
    features = [(0, 0, 5), (0, 1, 5), (1, 1, 6), (2, 1, 7)]
    edges = _edges([(0, 2), (1, 2), (2, 3)], features, [2.0, -4.0, 3.0])
    assert edges.mean_weights([(0, 5), (1, 6)]) == [-1.0]
    assert edges.mean_weights([(0, 5), (1, 6), (2, 7)]) == [-1.0, 3.0]


def test_too_few_graphs_is_said(tmp_path):
    with pytest.raises(UserError, match=r"graphs\.motifs\.least"):
        find_motifs({"graphs": ["a"]}, {"names": ["a"], "least": 2}, SimpleNamespace(files={}, provenance={}))
