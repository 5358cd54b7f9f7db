"""Edges of attribution graphs split by attention head."""

import numpy as np
import pytest
import torch

from circuitflow.graphs.building import Settings, build_graph
from circuitflow.graphs.head_paths import Enter, Read, split
from circuitflow.graphs.heads import by_head, enter_of, read_of, strongest, table
from circuitflow.graphs.influence import prune
from circuitflow.graphs.sources import Sources
from circuitflow.graphs.targets import Direction
from circuitflow.models.frozen import FrozenPrompt
from tests.fixtures.graph_examples import random_family

TOKENS = [5, 9, 3, 12, 7]
FAMILIES = ("llama", "gpt2", "gpt_neox", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3")


def _made(lm, **kind):
    family = random_family(lm, **kind)
    graph = build_graph(lm, family, TOKENS, targets=[4, 11], settings=Settings(max_nodes=None))
    with torch.no_grad():
        return graph, Sources.of(FrozenPrompt.of(lm, torch.tensor(TOKENS)), family)


def _every_edge(graph):
    row, source = np.nonzero(graph.weights)
    return np.stack([graph.targets[row], source], axis=1), graph.weights[row, source]


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [*((name, {}) for name in FAMILIES), ("gpt_neox sequential", {}), ("llama", {"cross": True}),
     ("llama", {"skip": True}), ("gpt_neox", {"skip": True})],
)  # fmt: skip
def test_heads_and_the_direct_part_sum_to_the_edge(random_lm, architecture, kind):
    name, _, way = architecture.partition(" ")
    lm = random_lm(name, **({"use_parallel_residual": False} if way else {}))
    graph, sources = _made(lm, **kind)
    edges, weights = _every_edge(graph)
    assert {graph.kind(node) for node in edges[:, 1]} == {"feature", "error", "token"}
    with torch.no_grad():
        found = by_head(sources, graph, edges, batch=7)
    total, direct, last = (
        np.array([float(getattr(one, part).sum()) for one in found]) for part in ("total", "direct", "last")
    )
    np.testing.assert_allclose(total, weights, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(direct + last, weights, rtol=1e-8, atol=1e-10)
    # Between different positions something must carry it.
    apart = graph.positions()[edges[:, 0]] != graph.positions()[edges[:, 1]]
    assert apart.any()
    assert (direct[apart] == 0).all()
    assert (direct[~apart] != 0).all()


def test_edges_into_combinations_of_logits_are_split_too(random_lm, caplog):
    lm = random_lm("gemma2")
    family = random_family(lm)
    words = build_graph(lm, family, TOKENS, targets=[4, 11]).logit_tokens
    difference = {"tokens": {words[0]: 1.0, words[1]: -2.0}}
    row = Direction("row", torch.ones(lm.d_model, dtype=torch.float64))
    graph = build_graph(lm, family, TOKENS, targets=[difference, row], settings=Settings(max_nodes=None))
    with caplog.at_level("INFO", logger="circuitflow"):
        edges, _ = strongest(graph, 10**6, 1.0, 1.0)
    into = edges[:, 0] >= graph.first_logit
    assert set(edges[into, 0]) == {graph.first_logit}
    others = (prune(graph, 1.0, 1.0).edges[:, 0] == graph.n_nodes - 1).sum()
    assert others > 10
    assert f"{others} edges into directions are left out" in caplog.text
    edges = edges[into][:40]
    with torch.no_grad():
        sources = Sources.of(FrozenPrompt.of(lm, torch.tensor(TOKENS)), family)
        found = by_head(sources, graph, edges, batch=7)
    parts = np.array([float(one.direct.sum() + one.last.sum()) for one in found])
    np.testing.assert_allclose(parts, graph.weights[-2, edges[:, 1]], rtol=1e-8, atol=1e-10)


def test_what_goes_through_a_head_is_what_is_lost_without_it(random_lm):
    """Patterns of one head set to zero, everything else held."""
    lm = random_lm("llama")
    graph, sources = _made(lm)
    edges, weights = _every_edge(graph)
    with torch.no_grad():
        found = by_head(sources, graph, edges, batch=50)
        for layer, head in ((0, 2), (1, 3)):
            through = np.array([float(one.through[0, 0, layer, head]) for one in found])
            pattern = sources.frozen.layers[layer].pattern
            before = pattern[head].clone()
            pattern[head] = 0
            without = by_head(sources, graph, edges, batch=50)
            pattern[head] = before
            lost = weights - np.array([float(one.total) for one in without])
            assert np.abs(lost).max() > 1e-3
            np.testing.assert_allclose(through, lost, rtol=1e-7, atol=1e-10)


def test_by_hand_with_two_heads_of_one_layer():
    """Width 2, one head for each coordinate; the source is (1, 2) at position 0, and position 1 is read by (3, 5)."""
    from circuitflow.models.attention_weights import FrozenNorm
    from circuitflow.models.frozen import FrozenLayer

    plain = FrozenNorm(torch.ones(2), torch.ones(2), None, False)
    pattern = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [0.25, 0.75]]])
    layer = FrozenLayer(torch.eye(2), pattern, torch.eye(2), None, plain)
    frozen = FrozenPrompt(
        tokens=torch.tensor([0, 1]), parallel=False, layers=(layer,), embed=torch.zeros(2, 2), sites={},
        final_norm=plain, unembed=torch.eye(2), unembed_bias=None, logits=torch.zeros(2),
    )  # fmt: skip
    sources = Sources(
        frozen,
        None,
        (),
        torch.zeros(0, 3),
        torch.zeros(0),
        torch.zeros(0),
        torch.zeros(1, 2, 2),
        torch.zeros(1, 2),
    )
    source, row = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    found = split(sources, [Read(1, 1, row), Read(1, 0, row)], [Enter(0, {-1: source})])
    # To position 1: head 0 carries .5·1·3, head 1 .25·2·5. At position 0 both have weight 1, and the stream goes by.
    assert found.through[:, 0, 0].tolist() == [[1.5, 2.5], [3.0, 10.0]]
    assert found.last[:, 0, 0].tolist() == [[1.5, 2.5], [3.0, 10.0]]
    assert found.direct[:, 0].tolist() == [0.0, 13.0]
    assert found.total[:, 0].tolist() == [4.0, 26.0]


def test_the_table_has_the_strongest_edges_of_the_pruned_graph(random_lm):
    graph, sources = _made(random_lm("llama"))
    edges, flow = strongest(graph, 10, 0.8, 0.98)
    assert len(edges) == 10
    assert (np.diff(flow) <= 0).all()
    assert 0 < flow.sum() <= 1
    with torch.no_grad():
        columns = table(graph, edges, flow, by_head(sources, graph, edges, 64))
    for target, source in edges:
        mine = (columns["source"] == graph.node_id(source)) & (columns["target"] == graph.node_id(target))
        assert columns["last"][mine].sum() == pytest.approx(columns["weight"][mine][0])
        assert (columns["layer"][mine] == -1).sum() == 1
    assert set(columns["target_kind"]) <= {"feature", "logit"}


def test_ends_of_edges(random_lm):
    graph, sources = _made(random_lm("llama"), cross=True)
    feature = int(np.flatnonzero(graph.features[:, 0] == 0)[0])
    entered = enter_of(sources, graph, feature)
    assert sorted(entered.added) == [0, 1]
    assert entered.position == graph.features[feature, 1]
    assert read_of(sources, graph, graph.first_logit).layer == 2
    token = enter_of(sources, graph, graph.first_token + 3)
    torch.testing.assert_close(token.added[-1], sources.frozen.embed[3])
