"""Which features of a graph are alike: virtual weights in and out, activity over text, and groups of both."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from circuitflow.dictionaries.family import Family
from circuitflow.graphs.directions import combined_row, parts_of
from circuitflow.graphs.graph import Graph
from circuitflow.graphs.sources import Sources
from circuitflow.models.sites import layer_of
from circuitflow.progress import progress
from circuitflow.store.arrays import Store

NEVER = 1e6
"""Distance of features that may not be in one group: average linkage then keeps their groups apart."""

Square = Float[np.ndarray, "m m"]


@dataclass(frozen=True)
class Virtual:
    """Virtual weights between some features, the prompt's tokens and the graph's logits, as effects would be.

    W_enc,t · Σ W_dec,s with the weights of norms, without their scales and without attention (context-free); times
    the source's activation and divided by the target's, so that no scale of a dictionary counts.
    """

    layers: Int64[np.ndarray, " m"]
    between: Square
    """[t, s]; 0 where s does not write before t reads."""
    tokens: Float[np.ndarray, "m pos"]
    """From embeddings."""
    logits: Float[np.ndarray, "logits m"]
    """To logits less their mean, and combinations of such."""


def virtual_weights(
    sources: Sources, graph: Graph, keys: Int64[np.ndarray, "m 2"], activations: Float[np.ndarray, " m"]
) -> Virtual:
    """Virtual weights between features (layer, number) with these usual activations."""
    frozen, family = sources.frozen, sources.family
    reads, writes = [], []
    for layer, feature in keys.tolist():
        number = sources.layers.index(layer)
        member = family.members[number]
        assert member.W_enc is not None
        reads.append(frozen.layers[layer].mlp_norm.fold(member.W_enc[feature][None].to(frozen.dtype))[0])
        sites = {layer_of(site): site for site in member.writes}
        writes.append(
            {at: family.decoder(number, site)[feature].to(frozen.dtype) for at, site in sites.items()}
        )
    encoders = torch.stack(reads)
    written = _written(writes, frozen.n_layers, encoders)
    first = keys[:, 0].tolist()
    between = torch.stack(
        [written[layer] @ row for layer, row in zip(first, encoders, strict=True)]
    )  # written[layer]: what reaches the stream before the MLP of that layer reads
    outputs = [combined_row(frozen, parts) for parts in parts_of(graph) if parts]
    rows = frozen.final_norm.fold(torch.stack(outputs) if outputs else encoders[:0])
    scale = activations.astype(np.float64)
    return Virtual(
        layers=keys[:, 0],
        between=_array(between) * scale[None, :] / scale[:, None],
        tokens=_array(encoders @ frozen.embed.T) / scale[:, None],
        logits=_array(rows @ written[frozen.n_layers].T) * scale[None, :],
    )


def _written(
    writes: list[dict[int, Tensor]], n_layers: int, like: Tensor
) -> list[Float[Tensor, "m d_model"]]:
    """[layer]: the sum of what each feature writes at MLPs before that layer's."""
    so_far = torch.zeros_like(like)
    found = []
    for layer in range(n_layers):
        found.append(so_far.clone())
        for number, rows in enumerate(writes):
            if layer in rows:
                so_far[number] += rows[layer]
    return [*found, so_far]


def virtual_similarity(virtual: Virtual) -> Square:
    """Mean of two cosines: of what features get (from tokens and earlier features), and of what they give.

    Only sources before both features, and targets behind both, are compared; tokens and logits always are.
    """
    m = len(virtual.layers)
    out = np.zeros((m, m))
    for layer in np.unique(virtual.layers):
        before = np.concatenate([virtual.tokens, virtual.between[:, virtual.layers < layer]], axis=1)
        pairs = np.minimum.outer(virtual.layers, virtual.layers) == layer
        out += np.where(pairs, cosines(before), 0) / 2
        after = np.concatenate([virtual.logits, virtual.between[virtual.layers > layer]], axis=0)
        pairs = np.maximum.outer(virtual.layers, virtual.layers) == layer
        out += np.where(pairs, cosines(after.T), 0) / 2
    return out


def cosines(rows: Float[np.ndarray, "m n"]) -> Square:
    """Cosine of every two rows; 0 with a row of zeros."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = rows / np.where(lengths > 0, lengths, 1)
    return np.asarray(unit @ unit.T)


@dataclass(frozen=True)
class Activity:
    """Activations of some features over text."""

    values: Float[np.ndarray, "n m"]
    tokens: Int64[np.ndarray, " n"]

    def similarity(self) -> Square:
        """Pearson's correlation over tokens, zeros included; NaN with a feature that is never active."""
        centred = self.values - self.values.mean(axis=0)
        size = np.linalg.norm(centred, axis=0)
        known = size > 0
        unit = centred / np.where(known, size, 1)
        return np.where(np.outer(known, known), unit.T @ unit, np.nan)

    def fires_on(self, members: np.ndarray, count: int) -> list[int]:
        """Tokens with the largest Σ (activation / feature's largest)² over some features."""
        values = self.values[:, members]
        largest = values.max(axis=0, initial=0)
        strength = np.square(values / np.where(largest > 0, largest, 1)).sum(axis=1)
        ids, place = np.unique(self.tokens, return_inverse=True)
        total = np.bincount(place, weights=strength, minlength=len(ids))
        order = np.argsort(-total, kind="stable")[:count]
        return [int(ids[i]) for i in order if total[i] > 0]


def activity(
    family: Family, keys: Int64[np.ndarray, "m 2"], store: Store, corpus: Store, blocks: int
) -> Activity:
    """Activations of features (layer, number) over blocks of the corpus, spread evenly."""
    ids = corpus.read("tokens").astype(np.int64)
    chosen = np.unique(np.linspace(0, len(ids) - 1, min(blocks, len(ids))).round().astype(np.int64))
    length = ids.shape[1]
    values = np.zeros((len(chosen) * length, len(keys)), dtype=np.float32)
    positions = torch.arange(length)
    for number, member in enumerate(family.members):
        layer = layer_of(member.reads[0])
        columns = np.flatnonzero(keys[:, 0] == layer)
        if not len(columns):
            continue
        features, place = np.unique(keys[columns, 1], return_inverse=True)
        for at, block in enumerate(chosen.tolist()):
            x = store.read(member.reads[0], block * length, (block + 1) * length)
            codes = member.encode(torch.from_numpy(np.asarray(x)).to(member.W_dec), positions)
            found = codes.columns(torch.from_numpy(features).to(codes.features.device))
            values[at * length : (at + 1) * length, columns] = found[:, place].float().cpu().numpy()
        progress("layers encoded", number + 1, len(family.members))
    return Activity(values, ids[chosen].ravel())


@dataclass(frozen=True)
class Nodes:
    """What grouping needs to know of each node."""

    layer: Int64[np.ndarray, " n"]
    position: Int64[np.ndarray, " n"]


def combined(virtual: Square, coactive: Square | None, share: float) -> Square:
    """share · virtual + (1 − share) · co-activation; virtual alone where the latter is not known."""
    if coactive is None or share == 1:
        return virtual
    return np.where(np.isnan(coactive), virtual, share * virtual + (1 - share) * np.nan_to_num(coactive))


def groups(
    similarity: Square, nodes: Nodes, least: float, positions: str, max_layers: int | None
) -> Int64[np.ndarray, " n"]:
    """Number of each node's group, by average linkage: groups join while their mean similarity is at least ``least``.

    :param positions: "same" keeps positions apart.
    :param max_layers: a group spans at most so many layers; None: any number.
    """
    n = len(similarity)
    if n < 2:
        return np.zeros(n, np.int64)
    distance = 1 - (similarity + similarity.T) / 2
    apart = np.zeros((n, n), dtype=bool)
    if positions == "same":
        apart |= nodes.position[:, None] != nodes.position[None]
    if max_layers is not None:
        apart |= np.abs(nodes.layer[:, None] - nodes.layer[None]) >= max_layers
    distance = np.where(apart, NEVER, np.maximum(distance, 0))
    np.fill_diagonal(distance, 0)
    joined = linkage(squareform(distance, checks=False), method="average")
    return np.asarray(fcluster(joined, t=1 - least + 1e-9, criterion="distance") - 1, dtype=np.int64)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()
