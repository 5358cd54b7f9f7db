"""The stage ``describe_graph_features``: what the features of pruned graphs fire on in text, and promote."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.dictionaries.family import load_family, site_width
from circuitflow.features.contexts import CONVENTIONS, Reader, add_text, open_text
from circuitflow.features.logit_weights import extremes, logit_weights
from circuitflow.graphs.graph import Graph
from circuitflow.graphs.influence import prune
from circuitflow.jobs import Output, progress
from circuitflow.models.loading import load_model
from circuitflow.models.running import LanguageModel
from circuitflow.models.sites import layer_of
from circuitflow.store.files import write_json

TOLD = ("fires_on", "contexts", "histogram", "logits")
"""Conventions of describe_features that hold here too."""


def describe_graph_features(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Describe the features of most influence in the pruned graphs of all prompts, as JSON.

    Inputs ``model``, ``dictionaries`` (list of manifests), ``activations`` (store with the sites that they read),
    ``corpus``, ``graphs`` (list); params ``node_share`` and ``edge_share`` (of pruning), ``features`` (at most so many
    over all graphs), ``contexts`` (per feature), ``window`` (tokens on each side of the peak), ``logits`` (tokens
    listed per side), ``dtype`` (of the model), ``compute``. Output ``features``: {sites: [{site, dictionary,
    features}], conventions, tokens}.

    The logit weights of a feature that writes several layers are those of all that it writes together.
    """
    chosen = chosen_features(list(map(Path, inputs["graphs"])), params)
    family = load_family(list(map(Path, inputs["dictionaries"])))
    device = params["compute"]["device"]
    lm = load_model(Path(inputs["model"]), params["dtype"], device)
    members = {layer_of(member.reads[0]): member for member in family.members}
    sites, tokens = [], 0
    for number, (layer, features) in enumerate(sorted(chosen.items())):
        member = members[layer].to(device)
        described = _with_logits(lm, member, features, params["logits"])
        reader = Reader(
            member.reads[0],
            member,
            torch.tensor(features, dtype=torch.int64, device=device),
            lm.tokenizer,
            int(lm.hf.config.vocab_size),
        )
        text = open_text(member.reads, Path(inputs["activations"]), Path(inputs["corpus"]))
        tokens = add_text(described, reader, text, params)
        facts = {"kind": member.kind, "d_dict": member.d_dict, "settings": dict(member.settings)}
        sites.append({"site": member.reads[0], "dictionary": facts, "features": described})
        progress("layers described", number + 1, len(chosen))
    conventions = {name: CONVENTIONS[name] for name in TOLD}
    value = {"sites": sites, "tokens": tokens, "conventions": conventions}
    write_json(out.files["features"], {**value, "provenance": out.provenance})


def chosen_features(paths: Sequence[Path], params: Mapping[str, Any]) -> dict[int, list[int]]:
    """Features to describe, ascending, by layer: those of most influence in any of the pruned graphs."""
    strongest: dict[tuple[int, int], float] = {}
    for path in paths:
        graph = Graph.load(path)
        kept = prune(graph, params["node_share"], params["edge_share"])
        for node in kept.nodes[: graph.first_error].nonzero()[0].tolist():
            layer, _, feature = graph.features[node].tolist()
            value = float(kept.influence[node])
            strongest[layer, feature] = max(strongest.get((layer, feature), 0.0), value)
    order = sorted(strongest, key=lambda name: (-strongest[name], name))[: int(params["features"])]
    return {layer: sorted(f for at, f in order if at == layer) for layer in sorted({at for at, _ in order})}


def _with_logits(
    lm: LanguageModel, member: Dictionary, features: Sequence[int], count: int
) -> list[dict[str, Any]]:
    """An entry a feature, with the tokens that it raises and lowers most."""
    rows = member.W_dec[torch.tensor(features, dtype=torch.int64, device=member.W_dec.device)]
    together = rows.reshape(len(features), -1, site_width(member)).sum(dim=1)
    reader = Reader(member.reads[0], member, torch.empty(0, dtype=torch.int64), lm.tokenizer, 0)
    entries = []
    for feature, weights in zip(features, logit_weights(lm, together), strict=True):
        sides = extremes(weights, count)
        logits = {side: reader.named(tokens) for side, tokens in sides.items()}
        entries.append({"feature": feature, "logits": logits})
    return entries
