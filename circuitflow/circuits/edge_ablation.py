"""Running a circuit along some of its edges only: every node sees of its neighbours what its parents are, no more.

A node's value is computed where it stands: a pass runs from the neighbouring sites of the run, at each of which all
nodes are replaced but the node's parents, and those have the values that were computed for them in the same way. The
metric is a node like others. Nodes at sites that no other site reaches have their clean values. So

- with every edge between the nodes of a circuit, this is the ablation of all other nodes: F is that of the circuit;
- with none, the metric sees replaced nodes only: F is 0.

Of x̄, the vector with every node replaced, r_i and r_ε, the replacement of a feature and of the error, and v, the
computed values, a node sees x̄ + Σ_{parents i} (v_i − r_i)·W_dec[i] + [ε is a parent]·(v_ε − r_ε).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from circuitflow.attribution.cached import Cached
from circuitflow.attribution.ends import End
from circuitflow.attribution.nodes import ERROR, SUMMED
from circuitflow.attribution.paths import METRIC_SITE, Way, begin
from circuitflow.attribution.pullback import Into, linked
from circuitflow.attribution.readout import metric_of_run
from circuitflow.circuits.ablation import AblationSite
from circuitflow.circuits.interventions import Triple
from circuitflow.data.metrics import Metric
from circuitflow.data.token_pairs import TokenPairs
from circuitflow.models.running import LanguageModel

Link = tuple[Triple, Triple]
"""An edge: the upstream node and the downstream node, or :data:`METRIC_NODE`."""

METRIC_NODE: Triple = (METRIC_SITE, 0, SUMMED)

Parents = frozenset[int]
"""Numbers of computed values."""


@dataclass(frozen=True)
class Graph:
    """What edges are ablated in: a model's sites, how they are joined, and the prompts."""

    lm: LanguageModel
    metric: Metric
    sites: Mapping[str, AblationSite]
    """By name, in order of depth."""
    neighbours: Mapping[str, Sequence[str]]
    """Upstream sites by downstream site, the metric among them (attribution.paths.neighbours)."""
    pairs: TokenPairs
    reference: Float[Tensor, "n vocab"] | None = None
    """Logits of the clean run, for the metric kl."""
    known: dict[tuple[Triple, Parents], int] = field(default_factory=dict)
    """Numbers of the values computed so far, by node and its parents' values."""
    values: list[Tensor] = field(default_factory=list)
    """(n, pos) of a feature, (n, pos, width) of an error, (n,) of the metric."""
    nodes: list[Triple] = field(default_factory=list)
    """Whose value each is."""


def run_edges(graph: Graph, edges: Iterable[Link]) -> Float[Tensor, " n"]:
    """m of every prompt when only some edges carry anything.

    Values that an earlier set of edges led to as well are taken from there: a node's value is decided by its parents'.
    """
    parents: dict[Triple, list[Triple]] = {}
    for up, down in edges:
        parents.setdefault(down, []).append(up)
    needed = _above_metric(parents)
    number: dict[Triple, int] = {}
    for site in [*graph.sites, METRIC_SITE]:
        here = [node for node in needed if node[0] == site]
        wanted = {node: frozenset(number[up] for up in parents.get(node, [])) for node in here}
        _compute(graph, site, [(node, ups) for node, ups in wanted.items() if (node, ups) not in graph.known])
        number |= {node: graph.known[node, ups] for node, ups in wanted.items()}
    return graph.values[number[METRIC_NODE]]


def _above_metric(parents: Mapping[Triple, Sequence[Triple]]) -> list[Triple]:
    """The metric and all nodes from which edges lead there, in no order that matters but always the same."""
    found, waiting = {METRIC_NODE: None}, [METRIC_NODE]
    while waiting:
        for up in parents.get(waiting.pop(), []):
            if up not in found:
                found[up] = None
                waiting.append(up)
    return list(found)


def _compute(graph: Graph, site: str, wanted: Sequence[tuple[Triple, Parents]]) -> None:
    """Compute the values of nodes of one site; nodes with equal parents share the rows of a pass."""
    if not wanted:
        return
    if site != METRIC_SITE and not graph.neighbours.get(site):
        _read(graph, site, clean(graph, site), wanted)
        return
    groups: dict[Parents, list[tuple[Triple, Parents]]] = {}
    for node, ups in wanted:
        groups.setdefault(ups, []).append((node, ups))
    for ups, nodes in groups.items():
        _read(graph, site, _passed(graph, site, ups), nodes)


def _passed(graph: Graph, site: str, parents: Parents) -> Tensor:
    """What arrives at a site (the metric: m of every prompt) when the parents are all that is kept.

    One pass for each set of parents: what it gives, to the last bit, does not depend on what else is computed, so that
    an interrupted job and one that knows some results from before find the same.
    """
    pairs, order = graph.pairs, tuple(graph.sites)
    moved = {up: stream(graph, up, parents) for up in graph.neighbours[site]}
    cut = begin(site, order)
    starts = moved if cut is None or cut in moved else {**moved, cut: clean(graph, cut)}
    ends = tuple(_bare_end(graph.sites[up]) for up in moved)
    into = Into(site, ends, None, order, Way.MIXING, graph.metric)
    cached = {name: Cached(value, value, value) for name, value in starts.items()}
    with torch.no_grad():
        this = linked(graph.lm, pairs, into, cached, grad=False)
        if site != METRIC_SITE:
            return this.sites[site]
        return metric_of_run(graph.lm, graph.metric, this, pairs, graph.reference)


def clean(graph: Graph, site: str) -> Float[Tensor, "n pos width"]:
    """A site's vectors in the clean run, 0 at padding."""
    known, mask = graph.sites[site].known("clean"), graph.pairs.mask.bool()
    return torch.where(mask[..., None], known.whole[known.slot], 0)


def _bare_end(site: AblationSite) -> End:
    """A site as an end of edges without nodes: all that a pass needs is its name."""
    none = torch.zeros(0, dtype=torch.int64, device=site.dictionary.W_dec.device)
    return End(site.name, site.dictionary, none, none)


def stream(graph: Graph, site: str, parents: Parents) -> Float[Tensor, "n pos width"]:
    """A site's vector with all of its nodes replaced but some, which have computed values."""
    here, mask = graph.sites[site], graph.pairs.mask.bool()
    replacement, dictionary = here.known("replacement"), here.dictionary
    slot = replacement.slot
    result = replacement.whole[slot].clone()
    kept = [(graph.nodes[number], graph.values[number]) for number in parents]
    kept = sorted(((node, value) for node, value in kept if node[0] == site), key=lambda one: one[0])
    features = sorted({node[1] for node, _ in kept if node[1] != ERROR})
    if features:
        numbers = torch.tensor(features, device=result.device)
        r, rows = replacement.columns(numbers)[slot], dictionary.W_dec[numbers]  # (n, pos, features)
    for (_, feature, position), value in kept:
        there = _there(position, mask)
        if feature == ERROR:
            r_error = replacement.whole - replacement.decoded - dictionary.b_dec
            result[there] += (value - r_error[slot])[there]
        else:
            place = features.index(feature)
            result[there] += (value - r[..., place])[there][:, None] * rows[place]
    return torch.where(mask[..., None], result, 0)


def _there(position: int, mask: Tensor) -> Tensor:
    """The tokens that a node stands for."""
    return (
        mask if position == SUMMED else mask & (torch.arange(mask.shape[1], device=mask.device) == position)
    )


def _read(graph: Graph, site: str, arrived: Tensor, wanted: Sequence[tuple[Triple, Parents]]) -> None:
    """Take the values of nodes from what has arrived."""
    values: Iterable[Tensor]
    if site == METRIC_SITE:
        values = [arrived.double()]
    else:
        values = node_values(graph.sites[site], arrived, graph.pairs, [node for node, _ in wanted])
    for (node, ups), value in zip(wanted, values, strict=True):
        graph.known[node, ups] = len(graph.values)
        graph.values.append(value)
        graph.nodes.append(node)


def node_values(
    site: AblationSite, x: Float[Tensor, "n pos width"], pairs: TokenPairs, nodes: Sequence[Triple]
) -> Iterator[Tensor]:
    """The value of each node in a stream: (n, pos) of features, (n, pos, width) of the error; 0 at padding."""
    dictionary = site.dictionary
    row, position = pairs.mask.bool().nonzero(as_tuple=True)
    here = x[row, position].to(dictionary.W_dec.dtype)
    codes = dictionary.encode(here, position)
    features: Int64[Tensor, " m"] = torch.tensor(
        sorted({node[1] for node in nodes} - {ERROR}), dtype=torch.int64
    )
    columns = codes.columns(features.to(here.device)) if len(features) else None
    for _, feature, _ in nodes:
        if feature == ERROR:
            value = here.new_zeros(*pairs.mask.shape, here.shape[1])
            value[row, position] = dictionary.error(here, codes)
        else:
            assert columns is not None
            value = here.new_zeros(pairs.mask.shape)
            value[row, position] = columns[:, int(torch.searchsorted(features, feature))]
        yield value
