"""``circuitflow convert-graph`` and ``export-graphs``: attribution graphs from one program's files to another's."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from circuitflow.errors import UserError, nearest
from circuitflow.graphs.exporting import local_scan, sizes
from circuitflow.graphs.formats.circuit_tracer import KEY, read_circuit_tracer, write_circuit_tracer
from circuitflow.graphs.formats.feature_files import write_features
from circuitflow.graphs.formats.viewer import Told, shown, write_viewer
from circuitflow.graphs.formats.viewer_reading import read_viewer
from circuitflow.graphs.graph import Graph
from circuitflow.graphs.influence import prune, scores
from circuitflow.graphs.labels import labels, read_descriptions
from circuitflow.plots.numbers import counted
from circuitflow.store.files import read_json, write_json

FORMATS = ("circuitflow", "viewer", "circuit_tracer")
"""graph.safetensors, the JSON of viewers, and circuit-tracer's graphs as plain tensors."""
ENDINGS = {"circuitflow": ".safetensors", "viewer": ".json", "circuit_tracer": ".safetensors"}
"""Names by which files are read again."""


def convert_graph(
    source: Path,
    target: Path,
    to_format: str,
    *,
    scan: str | None = None,
    model: Path | None = None,
    features: Path | None = None,
    shares: tuple[float, float] = (0.8, 0.98),
) -> str:
    """Convert one graph and tell what was done, in a sentence.

    :param scan: for viewers: the model on Neuronpedia, or a folder of feature files.
    :param model: folder with the model's config.json, for circuit_tracer.
    :param features: descriptions of describe_graph_features, for viewers.
    :param shares: of influence that pruned nodes and edges keep, for viewers; a viewer's file is pruned already.
    :raises UserError: it is not there, of no known form, or the target exists or has another form's name; or a share
        is none.
    """
    if to_format not in FORMATS:
        raise UserError(f"Format '{to_format}' of graphs is unknown; {nearest(to_format, FORMATS)}.")
    if target.exists():
        raise UserError(f"{target} exists; name a file that does not.")
    if target.suffix != ENDINGS[to_format]:
        raise UserError(f"{target} is no name for a {to_format} graph; end it with {ENDINGS[to_format]}.")
    _check_shares(shares)
    given = detected(source)
    viewed = read_viewer(source) if given == "viewer" else None
    if viewed is not None:
        graph = viewed.graph
    else:
        graph = read_circuit_tracer(source) if given == "circuit_tracer" else Graph.load(source)
    there = np.ones(graph.n_nodes, dtype=bool)
    if to_format == "circuitflow":
        graph.save(target)
    elif to_format == "circuit_tracer":
        write_circuit_tracer(target, graph, model)
    elif viewed is not None:
        told = Told(viewed.slug, scan or viewed.scan, viewed.labels, viewed.supernodes, viewed.pinned)
        told = replace(told, pruning=graph.facts["pruned"], facts=_kept_facts(viewed.facts))
        write_viewer(target, graph, viewed.kept, told)
        there = shown(graph, viewed.kept)
    else:
        said = labels(read_descriptions(features)) if features is not None else {}
        facts = {"scores": scores(graph)._asdict(), "sizes": sizes(graph)}
        pruning = {"node_threshold": shares[0], "edge_threshold": shares[1]}
        told = Told(target.stem, scan or local_scan(graph), said, pruning=pruning, facts=facts)
        kept = prune(graph, *shares)
        write_viewer(target, graph, kept, told)
        there = shown(graph, kept)
    return f"{target}: {_counts(graph, there)}, from {source} ({given}) to {to_format}"


def detected(path: Path) -> str:
    """The form of a graph's file.

    :raises UserError: it is missing, a pickle, or of no known form.
    """
    if path.is_dir():
        raise UserError(f"Graph {path} is a folder; name a file in it, such as {path / 'graph.safetensors'}.")
    if not path.is_file():
        raise UserError(f"Graph {path} does not exist; check the path.")
    if path.suffix == ".pt":
        raise UserError(
            f"{path} is a pickle, which is not opened here; where circuit-tracer is installed, run "
            f"`python resources/exchange/circuit_tracer_graph.py to-plain {path} PLAIN.safetensors`."
        )
    if path.suffix == ".json":
        return "viewer"
    try:
        with safe_open(path, framework="np") as opened:
            return "circuit_tracer" if KEY in (opened.metadata() or {}) else "circuitflow"
    except SafetensorError as error:
        with open(path, "rb") as file:
            if file.read(64).lstrip().startswith(b"{"):
                return "viewer"
        raise UserError(f"Graph {path} is neither safetensors ({error}) nor JSON; make it again.") from None


def export_graphs(source: Path, target: Path, scan: str | None = None) -> str:
    """Gather the graphs of a run in a folder that circuit-tracer's viewer serves; tells how.

    The folder has ``{slug}.json`` of every prompt, ``graph-metadata.json``, and a file for each described feature.

    :param source: ``results/{model}/graphs/{dictionaries}``.
    :param scan: what graphs name as their features: a model on Neuronpedia; None: the files in this folder.
    :raises UserError: there are no graphs, or the target is in use.
    """
    files = sorted(source.glob("*/graph.json"))
    if not files:
        raise UserError(
            f"{source} holds no graphs (PROMPT/graph.json); name results/MODEL/graphs/DICTIONARIES of a run that made "
            "graphs."
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is in use; name a folder that does not exist yet, or is empty.")
    known, written = [], 0
    for file in files:
        value: dict[str, Any] = read_json(file)
        metadata = value["metadata"]
        if scan is not None:
            metadata["scan"] = scan
        known.append(metadata)
        write_json(target / f"{metadata['slug']}.json", value)
    described = source / "features.json"
    if described.exists():
        name = str(known[0]["scan"])
        folder = name.removeprefix("./data/") if name.startswith("./data/") else "features"
        written = len(write_features(target / folder, read_descriptions(described), name))
    write_json(target / "graph-metadata.json", {"graphs": known})
    serve = f"circuit-tracer start-server --graph_file_dir {target}"
    told = f"{counted(len(files), 'graph')} and {counted(written, 'feature')}"
    return f"{target}: {told}; view them with `{serve}`"


def _check_shares(shares: tuple[float, float]) -> None:
    for option, share in zip(("--nodes", "--edges"), shares, strict=True):
        if not 0 < share <= 1:
            raise UserError(f"Option {option} is {share:g}, but it should be a share, above 0 and at most 1.")


def _counts(graph: Graph, there: np.ndarray) -> str:
    """How many nodes of each kind a file has, and of how many where it was pruned."""
    parts = []
    for kind, start, end in (
        ("feature", 0, graph.first_error),
        ("error", graph.first_error, graph.first_token),
        ("token", graph.first_token, graph.first_logit),
        ("output", graph.first_logit, graph.n_nodes),
    ):
        written, whole = int(there[start:end].sum()), end - start
        parts.append(f"{written} of {counted(whole, kind)}" if written < whole else counted(whole, kind))
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _kept_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a file of ours said, what is not said anew."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(facts)))
    return {key: value for key, value in plain.items() if key not in ("n_layers", "facts")}
