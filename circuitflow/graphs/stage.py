"""The stage build_attribution_graph: the graph of one prompt, whole."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from circuitflow.dictionaries.family import load_family
from circuitflow.graphs.building import Settings, build_graph
from circuitflow.jobs import Output
from circuitflow.models.loading import load_model

BUILT = ("max_logits", "probability", "max_nodes", "reorder_every", "batch", "keep_all", "prepend_bos")


def build_attribution_graph(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """Stage: attribute the next token of one prompt to features, errors and tokens.

    Inputs: ``model``, ``dictionaries`` (manifests of transcoders, or of one cross-layer transcoder). Params: ``model``
    and ``dictionaries`` (names), ``prompt`` {name, text, targets}, the fields of :class:`Settings`, ``dtype``,
    ``compute``. Output: ``graph`` (safetensors), whole: another pruning needs no other graph.

    :raises UserError: the prompt has no token, a target is not one token, or a dictionary is no transcoder of the
        model.
    """
    lm = load_model(Path(inputs["model"]), params["dtype"], params["compute"]["device"])
    family = load_family([Path(path) for path in inputs["dictionaries"]])
    prompt = params["prompt"]
    graph = build_graph(
        lm,
        family,
        prompt["text"],
        targets=prompt.get("targets"),
        settings=Settings(**{name: params[name] for name in BUILT}),
        facts={
            "name": prompt["name"],
            "model": params["model"],
            "dictionaries": params["dictionaries"],
        },
    )
    graph.save(out.files["graph"])
