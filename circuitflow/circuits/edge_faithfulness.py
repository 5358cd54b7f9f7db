"""How much of the model's behaviour a circuit's strongest edges keep when no other edge carries anything."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from circuitflow.attribution.paths import Blocks, neighbours
from circuitflow.circuits import edge_ablation
from circuitflow.circuits.circuit import METRIC, Circuit, Edge, read_circuit
from circuitflow.circuits.columns import ordered, stacked
from circuitflow.circuits.conventions import BECOME
from circuitflow.circuits.edge_ablation import METRIC_NODE, Graph, Link, run_edges
from circuitflow.circuits.evaluation import Evaluation, prepared
from circuitflow.circuits.interventions import Triple, keep
from circuitflow.circuits.measuring import forget_journals, ledger_for, looked_up
from circuitflow.circuits.members import circuit_nodes, edges_between
from circuitflow.circuits.statistics import bootstrap, faithfulness
from circuitflow.jobs import Output, progress
from circuitflow.store.journal import Journal
from circuitflow.store.ledger import key_of
from circuitflow.store.tables import write_table

CONVENTIONS = {
    "edges": "every node sees of each neighbouring site what its parents are, all other nodes there replaced; "
    "the metric likewise",
    "values": "parents have the values computed for them in the same way; nodes without neighbours clean ones",
    "selection": "edges between the circuit's nodes, and into the metric, by |weight| on train",
    "random": "as many edges between each pair of sites, drawn from those with a weight",
    "nodes": "all edges: the ablation of every node outside the circuit",
    "empty_circuit": "no edge: the metric sees replaced nodes alone",
}


@dataclass(frozen=True)
class EdgeSet:
    """Edges that carry something, and where the set came from."""

    series: str
    """"circuit" or "random"."""
    source: str
    """"count" (the k strongest), "assembled" (the circuit's own), "all", "draw" or "none"."""
    edges: tuple[Edge, ...]
    draw: int = -1

    @property
    def threshold(self) -> float:
        """Weight of the weakest edge."""
        return min((abs(edge.weight) for edge in self.edges), default=float("nan"))


def evaluate_edges(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Faithfulness of the circuit's nodes when only its strongest edges carry anything, on test pairs.

    Inputs ``model``, ``circuit``, ``edges`` (list of tables of score_edges), ``tokens_{split}``, ``gradients_{split}``,
    ``dictionaries`` and ``means`` (lists, in the order of ``sites``); params ``sites``, ``metric``, ``counts`` (of
    edges), ``random_counts``, ``random_draws``, ``ablation``, ``aggregate``, ``pairs``, ``bootstrap``, ``seed``,
    ``batch_rows``, ``dtype``, ``compute``.

    Output ``edge_faithfulness``, one row per set of edges and aggregate: series ("circuit", "random"; "nodes" is the
    circuit by nodes), source ("count", "all", "assembled", "draw", "none"), threshold (least |weight|), edges, nodes
    (from which edges lead to the metric), draw, ablation, aggregate, main, F, low, high, m_circuit, m_empty, m_full, n.

    :raises UserError: test prompts have no means, or a dictionary has no encoder.
    """
    here = prepared(inputs, params, "test")
    circuit = read_circuit(Path(inputs["circuit"]))
    ids = {node.id: triple for node, triple in zip(circuit.nodes, circuit_nodes(circuit)[0], strict=True)}
    possible = [edge for path in inputs["edges"] for edge in edges_between(Path(path), circuit.nodes)]
    sets = [EdgeSet("circuit", "none", ()), *edge_sets(circuit, possible, params)]
    ledger = ledger_for(out, params, "test", Path(edge_ablation.__file__), what="edges")
    graph = _graph(here, params)
    links = {key_of({"edges": sorted(_names(one))}): one for one in sets}

    def run(missing: Sequence[str], journal: Journal) -> np.ndarray:
        rows = []
        for number, key in enumerate(missing):
            rows.append(journal.result(partial(_measured, graph, links[key], ids)))
            progress("sets of edges", number + 1, len(missing))
        return np.array(rows)

    values = looked_up([key_of({"edges": sorted(_names(one))}) for one in sets], run, ledger, out.folder)
    by_nodes = here.values([keep(list(ids.values()), params["sites"])], params["batch_rows"])
    columns = _columns(sets, values, by_nodes, here.full, ids, params)
    conventions = {**CONVENTIONS, "ablation": f"{params['ablation']}: replaced nodes become their "}
    conventions["ablation"] += BECOME[params["ablation"]]
    facts = {"conventions": conventions, "possible_edges": len(possible)}
    facts["ledgers"] = [ledger.name] if ledger.folder is not None else []
    write_table(out.files["edge_faithfulness"], columns, {**out.provenance, **facts})
    ledger.save()
    forget_journals(out.folder)


def edge_sets(circuit: Circuit, possible: Sequence[Edge], params: Mapping[str, Any]) -> list[EdgeSet]:
    """The k strongest edges for every count, all, the circuit's own, and random ones; fewer first."""
    strongest = sorted(possible, key=lambda edge: (-abs(edge.weight), edge.up, edge.down))
    total = len(strongest)
    sizes = {min(k, total): "count" for k in params["counts"]} | {total: "all"}
    found = [EdgeSet("circuit", source, tuple(strongest[:k])) for k, source in sorted(sizes.items()) if k]
    found.append(EdgeSet("circuit", "assembled", circuit.edges))
    for k in sorted({min(k, total) for k in params["random_counts"]}):
        for draw in range(params["random_draws"]):
            chosen = _drawn(strongest, k, np.random.default_rng([params["seed"], k, draw]))
            found.append(EdgeSet("random", "draw", tuple(chosen), draw))
    return found


def _drawn(strongest: Sequence[Edge], k: int, generator: np.random.Generator) -> list[Edge]:
    """As many edges between each pair of sites as among the k strongest."""
    possible: dict[tuple[str, str], list[Edge]] = {}
    wanted: dict[tuple[str, str], int] = {}
    for number, edge in enumerate(strongest):
        place = _site(edge.up), _site(edge.down)
        possible.setdefault(place, []).append(edge)
        wanted[place] = wanted.get(place, 0) + (number < k)
    chosen = []
    for place in sorted(possible):
        index = generator.choice(len(possible[place]), wanted[place], replace=False)
        chosen += [possible[place][i] for i in sorted(index.tolist())]
    return chosen


def _site(name: str) -> str:
    return name.partition("/")[0]


def _names(one: EdgeSet) -> list[list[str]]:
    return [[edge.up, edge.down] for edge in one.edges]


def _graph(here: Evaluation, params: Mapping[str, Any]) -> Graph:
    blocks = Blocks(here.lm.n_layers, here.lm.arch.parallel)
    return Graph(
        lm=here.lm,
        metric=here.metric,
        sites={site.name: site for site in here.sites},
        neighbours=neighbours(params["sites"], blocks),
        pairs=here.prompts.pairs,
        reference=here.prompts.reference,
    )


def _measured(graph: Graph, one: EdgeSet, ids: Mapping[str, Triple]) -> list[float]:
    """m of every prompt; growing sets share values, while a random one's would only take up memory."""
    if one.series == "random":
        graph = replace(graph, known={}, values=[], nodes=[])
    return [float(value) for value in run_edges(graph, _links(one, ids))]


def _links(one: EdgeSet, ids: Mapping[str, Triple]) -> list[Link]:
    ends = {**ids, METRIC: METRIC_NODE}
    return [(ends[edge.up], ends[edge.down]) for edge in one.edges]


def _columns(
    sets: Sequence[EdgeSet],
    values: np.ndarray,
    by_nodes: np.ndarray,
    full: np.ndarray,
    ids: Mapping[str, Triple],
    params: Mapping[str, Any],
) -> dict[str, Any]:
    empty, every = values[0], np.concatenate([values, by_nodes])
    size, nan = len(every), float("nan")
    told = {
        "series": [*(one.series for one in sets), "nodes"],
        "source": [*(one.source for one in sets), "assembled"],
        "threshold": [*(one.threshold for one in sets), nan],
        "edges": [*(len(one.edges) for one in sets), -1],
        "nodes": [*(_reaching(one.edges) for one in sets), len(ids)],
        "draw": [*(one.draw for one in sets), -1],
        "ablation": [params["ablation"]] * size,
    }
    parts = []
    for aggregate in ordered(params["aggregate"]):
        low, high = bootstrap(every, empty, full, aggregate, params["bootstrap"], params["seed"])
        numbers = {"F": faithfulness(every, empty, full, aggregate), "low": low, "high": high}
        means = {"m_circuit": every.mean(1), "m_empty": [empty.mean()] * size, "m_full": [full.mean()] * size}
        said = {"aggregate": [aggregate] * size, "main": [aggregate == params["aggregate"]] * size}
        parts.append({**told, **said, **numbers, **means, "n": [len(full)] * size})
    return stacked(parts)


def _reaching(edges: Sequence[Edge]) -> int:
    """Nodes from which edges of the set lead to the metric."""
    into: dict[str, list[str]] = {}
    for edge in edges:
        into.setdefault(edge.down, []).append(edge.up)
    found, waiting = set(), [METRIC]
    while waiting:
        fresh = [up for up in into.get(waiting.pop(), []) if up not in found]
        found.update(fresh)
        waiting.extend(fresh)
    return len(found)
