"""Edges ablated: all of a circuit's edges are its nodes, none is nothing, and what lies between is done by hand."""

import itertools

import numpy as np
import pytest
import torch

from circuitflow.attribution.nodes import ERROR, SUMMED
from circuitflow.attribution.paths import Blocks, neighbours
from circuitflow.circuits.ablation import AblationSite, Prompts, run_interventions
from circuitflow.circuits.edge_ablation import METRIC_NODE, Graph, run_edges
from circuitflow.circuits.interventions import keep, nothing
from circuitflow.circuits.means import Means
from circuitflow.circuits.replacement import Cells, run_values
from circuitflow.dictionaries.dictionary import Skip
from circuitflow.models.running import run
from tests.fixtures.attribution_toy import METRIC, cached_sites, metric_with, toy_dictionary, toy_pairs

LISTS = {
    "residual": ["embed", "resid.0", "resid.1"],
    "every": ["embed", "attn.0", "mlp.0", "resid.0", "attn.1", "mlp.1", "resid.1"],
    "sublayers": ["attn.0", "mlp.0", "attn.1", "mlp.1"],
    "holes": ["embed", "mlp.0", "attn.1"],
}
D_DICT = 24


def graph_of(lm, sites) -> Graph:
    """Sites with means over 12 training pairs, and 5 test prompts."""
    train, test = toy_pairs(12, seed=1), toy_pairs(5, seed=2)
    training, clean = cached_sites(lm, train, sites), cached_sites(lm, test, sites)
    found = {}
    for seed, site in enumerate(sites):
        skip = Skip((0,)) if seed == 1 else Skip()
        dictionary = toy_dictionary(site, lm.width(site), D_DICT, seed=seed, skip=skip)
        means = Means(dictionary, Cells.over(train))
        means.add(training[site].patched, train)
        load = {
            "replacement": lambda means=means: means.values().at(test, means.dictionary),
            "clean": lambda site=site, d=dictionary: run_values(clean[site].clean, test.mask.bool(), d),
        }
        found[site] = AblationSite(site, dictionary, load)
    joined = neighbours(sites, Blocks(lm.n_layers, lm.arch.parallel))
    return Graph(lm, METRIC, found, joined, test)


def some_nodes(sites, position=SUMMED) -> list:
    """Features 0 to 11 of every site, and the error of every second."""
    nodes = [(site, feature, SUMMED) for site in sites for feature in range(12)]
    return [*nodes, *((site, ERROR, position) for site in sites[::2])]


def all_edges(graph: Graph, nodes) -> list:
    """Every edge that the run's sites allow between some nodes."""
    downs = [*nodes, METRIC_NODE]
    return [(up, down) for down in downs for up in nodes if up[0] in graph.neighbours.get(down[0], [])]


def by_nodes(graph: Graph, nodes) -> torch.Tensor:
    """m when all other nodes are ablated."""
    sites = list(graph.sites.values())
    rows = [(0, prompt) for prompt in range(len(graph.pairs))]
    circuit = keep(nodes, list(graph.sites))
    return run_interventions(graph.lm, METRIC, sites, [circuit], Prompts(graph.pairs), rows).double()


@pytest.mark.parametrize("sites", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("model", ["llama", "gpt_neox"])
def test_all_edges_of_a_circuit_are_its_nodes(random_lm, model, sites):
    lm = random_lm(model)
    for nodes in (some_nodes(sites), some_nodes(sites, 3)):
        graph = graph_of(lm, sites)
        edges = all_edges(graph, nodes)
        assert torch.allclose(run_edges(graph, edges), by_nodes(graph, nodes), atol=1e-11)


@pytest.mark.parametrize("sites", LISTS.values(), ids=LISTS)
def test_without_edges_everything_is_ablated(random_lm, sites):
    graph = graph_of(random_lm("llama"), sites)
    empty = by_nodes(graph, [])
    assert torch.allclose(run_edges(graph, []), empty, atol=1e-11)
    inner = [(up, down) for up, down in all_edges(graph, some_nodes(sites)) if down != METRIC_NODE]
    assert torch.allclose(run_edges(graph, inner), empty, atol=1e-11)  # nothing reaches the metric
    assert nothing(sites).keys() == graph.sites.keys()


def test_with_every_node_and_edge_it_is_the_model(random_lm):
    graph = graph_of(random_lm("llama"), LISTS["every"])
    nodes = [(site, feature, SUMMED) for site in graph.sites for feature in [*range(D_DICT), ERROR]]
    m = run_edges(graph, all_edges(graph, nodes))
    assert torch.allclose(m, metric_with(graph.lm, graph.pairs).double(), atol=1e-10)


def test_a_chain_of_edges_by_hand(random_lm):
    """One feature of each site, the most active in what its parent leaves, to the metric; all else is replaced."""
    graph = graph_of(random_lm("llama"), LISTS["residual"])
    lm, pairs, mask = graph.lm, graph.pairs, graph.pairs.mask.bool()
    position = torch.arange(mask.shape[1]).expand(mask.shape)

    def strongest(site, x):
        dictionary = graph.sites[site].dictionary
        codes = dictionary.encode(x.flatten(0, 1), position.flatten()).dense().view(*mask.shape, -1)
        feature = int((codes * mask[..., None]).std((0, 1)).argmax())
        return feature, codes[..., feature]

    def only(site, feature, value):
        known, dictionary = graph.sites[site].known("replacement"), graph.sites[site].dictionary
        mean = known.columns(torch.tensor([feature]))[known.slot][..., 0]
        x = known.whole[known.slot] + (value - mean)[..., None] * dictionary.W_dec[feature]
        return torch.where(mask[..., None], x, 0)

    def after(site, x, following):
        return run(lm, pairs.clean, mask, start=(site, x), capture=[following]).sites[following]

    first, value = strongest("embed", cached_sites(lm, pairs, ["embed"])["embed"].clean)
    middle, value = strongest("resid.0", after("embed", only("embed", first, value), "resid.0"))
    last, value = strongest("resid.1", after("resid.0", only("resid.0", middle, value), "resid.1"))
    expected = metric_with(lm, pairs, start=("resid.1", only("resid.1", last, value))).double()
    chain = [("embed", first, SUMMED), ("resid.0", middle, SUMMED), ("resid.1", last, SUMMED), METRIC_NODE]
    edges = list(itertools.pairwise(chain))
    assert torch.allclose(run_edges(graph, edges), expected, atol=1e-11)
    for missing in range(3):  # what a node without its parent sees differs
        left = [edge for number, edge in enumerate(edges) if number != missing]
        assert not torch.allclose(run_edges(graph, left), expected, atol=1e-6), missing


def test_equal_parents_and_other_sets_share_values_without_changing_them(random_lm):
    lm = random_lm("llama")
    sites = LISTS["every"]
    shared = graph_of(lm, sites)
    edges = all_edges(shared, some_nodes(sites))
    order = np.random.default_rng(0).permutation(len(edges))
    for k in (40, 150, 400):
        chosen = [edges[i] for i in order[:k]]
        fresh = run_edges(graph_of(lm, sites), chosen)
        assert torch.equal(run_edges(shared, chosen), fresh)
    computed = len(shared.values)
    run_edges(shared, [edges[i] for i in order[:150]])
    assert len(shared.values) == computed
