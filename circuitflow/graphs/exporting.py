"""The stage ``export_graph``: the pruned graph of a prompt in the form that viewers, figures and the page read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from circuitflow.graphs.formats.viewer import Told, write_viewer
from circuitflow.graphs.graph import Graph
from circuitflow.graphs.influence import prune, scores
from circuitflow.graphs.labels import labels, read_descriptions
from circuitflow.jobs import Output
from circuitflow.store.files import read_json


def export_graph(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Write the pruned graph as circuit-tracer's viewer and Neuronpedia read it.

    Inputs ``graph``, optionally ``features`` (of describe_graph_features) and ``supernodes`` (of group_features);
    params ``slug``, ``scan`` (null: a folder beside the file, ``./data/features/…``), ``feature_url`` (null: none),
    ``node_share`` and ``edge_share`` (of pruning). Output ``json``.
    """
    graph = Graph.load(Path(inputs["graph"]))
    kept = prune(graph, params["node_share"], params["edge_share"])
    features, supernodes = (_only(inputs.get(name)) for name in ("features", "supernodes"))
    described = read_descriptions(features) if features else {}
    found = scores(graph)
    told = Told(
        slug=str(params["slug"]),
        scan=str(params.get("scan") or local_scan(graph)),
        labels=labels(described),
        supernodes=_supernodes(supernodes, graph) if supernodes else {},
        pruning={"node_threshold": params["node_share"], "edge_threshold": params["edge_share"]},
        feature_url=params.get("feature_url"),
        facts={
            "scores": found._asdict(),
            "sizes": sizes(graph),
            "provenance": out.provenance,
        },
    )
    write_viewer(out.files["json"], graph, kept, told)


def _only(given: Any) -> Path | None:
    """An input that may be left out: a path, a list of one, or an empty list."""
    if isinstance(given, list | tuple):
        return Path(given[0]) if given else None
    return None if given is None else Path(given)


def local_scan(graph: Graph) -> str:
    """Where circuit-tracer's viewer looks for feature files when they lie beside the graphs."""
    name = str(graph.facts.get("dictionaries") or "features")
    return f"./data/features/{name.replace('/', '_')}"


def sizes(graph: Graph) -> dict[str, int]:
    """Nodes before pruning, for figures: features that are active, those beyond the cap too, and errors."""
    return {
        "features": int(graph.facts.get("active_features", len(graph.features))),
        "errors": len(graph.errors),
    }


def _supernodes(path: Path, graph: Graph) -> dict[str, list[int]]:
    """Node numbers by the name of the supernode, with what it fires on where that is known."""
    value = read_json(path)
    number = {name: node for node, name in enumerate(graph.node_ids())}
    words = value.get("labels", {})
    return {
        f"{name}: {words[name]}" if words.get(name) else name: [
            number[node] for node in members if node in number
        ]
        for name, members in value["supernodes"].items()
    }
