"""How alike the features of one graph are, and what they fire on: what supernodes are made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

from circuitflow.dictionaries.family import load_family
from circuitflow.features.tokens import token_text
from circuitflow.graphs.graph import Graph
from circuitflow.graphs.grouping import (
    Activity,
    Square,
    activity,
    combined,
    virtual_similarity,
    virtual_weights,
)
from circuitflow.graphs.sources import Sources
from circuitflow.models.frozen import FrozenPrompt
from circuitflow.models.loading import load_model
from circuitflow.store.arrays import open_store

TOKENS_SAID = 3


@dataclass(frozen=True)
class Likeness:
    """Similarities between features, one row for each different (layer, number), and which row a node has."""

    nodes: Int64[np.ndarray, " n"]
    """Features of a graph, ascending."""
    place: Int64[np.ndarray, " n"]
    """Row of each."""
    virtual: Square
    coactive: Square
    """NaN with a feature that is never active over the text."""
    similarity: Square
    activity: Activity
    tokenizer: Any

    def of(self, square: Square, nodes: Sequence[int]) -> Square:
        """The part of one of the matrices that belongs to some nodes."""
        at = self._rows(nodes)
        return np.asarray(square[np.ix_(at, at)])

    def label(self, nodes: Sequence[int]) -> str:
        """The tokens that some nodes' features fire on most, as text."""
        tokens = self.activity.fires_on(np.unique(self._rows(nodes)), TOKENS_SAID)
        return " ".join(repr(token_text(self.tokenizer, token)) for token in tokens)

    def _rows(self, nodes: Sequence[int]) -> np.ndarray:
        return np.asarray(self.place[np.searchsorted(self.nodes, np.asarray(nodes, dtype=np.int64))])


def likeness(
    inputs: Mapping[str, Any], params: Mapping[str, Any], graph: Graph, nodes: Int64[np.ndarray, " n"]
) -> Likeness:
    """Compare features of a graph by virtual weights and by their activity over the corpus.

    :param inputs: ``model``, ``dictionaries``, ``activations``, ``corpus``.
    :param params: ``dtype``, ``compute``, ``contexts`` (blocks of the corpus), ``virtual_weight`` (share).
    """
    lm = load_model(Path(inputs["model"]), params["dtype"], params["compute"]["device"])
    keys, place = np.unique(graph.features[nodes][:, [0, 2]], axis=0, return_inverse=True)
    place = place.reshape(-1)
    if not len(nodes):
        none = np.zeros((0, 0))
        silent = Activity(np.zeros((0, 0), np.float32), np.zeros(0, np.int64))
        return Likeness(nodes, place, none, none, none, silent, lm.tokenizer)
    usual = np.bincount(place, weights=graph.activations[nodes]) / np.bincount(place)
    with torch.no_grad():
        frozen = FrozenPrompt.of(lm, torch.from_numpy(graph.token_ids))
        family = load_family([Path(path) for path in inputs["dictionaries"]])
        family = family.to(frozen.dtype).to(frozen.embed.device)
        virtual = virtual_similarity(virtual_weights(Sources.of(frozen, family), graph, keys, usual))
        store, corpus = (open_store(Path(inputs[name])) for name in ("activations", "corpus"))
        fired = activity(family, keys, store, corpus, params["contexts"])
    coactive = fired.similarity()
    both = combined(virtual, coactive, params["virtual_weight"])
    return Likeness(nodes, place, virtual, coactive, both, fired, lm.tokenizer)
