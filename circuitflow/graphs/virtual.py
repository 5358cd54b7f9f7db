"""Virtual weights: what one feature would give another in any context, and how much of that is interference.

The weight from s to t is W_enc,t · Σ_ℓ W_dec,s^ℓ over the layers ℓ that s writes before t reads, the weight (and
centring) of t's norm included and its scale, which depends on the context, left at 1. Ways through attention depend on
the context altogether and are left out. Most such weights join features that are never active together and only
interfere; weighting by joint activity tells them apart (Ameisen et al. 2025: target-weighted expected residual
attribution, w · E[a_s a_t] / E[a_t]).
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.dictionaries.codes import Codes
from circuitflow.dictionaries.family import Family, load_family
from circuitflow.errors import UserError
from circuitflow.graphs.graph import Graph
from circuitflow.graphs.influence import whole_influence
from circuitflow.jobs import Output
from circuitflow.models.attention_weights import FrozenNorm, frozen_norm, norms
from circuitflow.models.loading import load_model
from circuitflow.models.running import LanguageModel
from circuitflow.models.sites import layer_of
from circuitflow.progress import progress
from circuitflow.store.arrays import Store, open_store
from circuitflow.store.tables import write_table

QUANTILES = (0.5, 0.9, 0.99, 0.999)
SIDES = ("in", "out")


class Joint(NamedTuple):
    """How some features are active together with all features of each member, over text."""

    products: tuple[Float[Tensor, "m d_dict"], ...]
    """By member: Σ over tokens of the product of both activations."""
    totals: tuple[Float[Tensor, " d_dict"], ...]
    """By member: Σ over tokens of the activation."""
    own: Float[Tensor, " m"]
    """Σ over tokens of each chosen feature's own activation."""
    tokens: int


class Weights:
    """Virtual weights of one family of transcoders in one model."""

    def __init__(self, lm: LanguageModel, family: Family) -> None:
        self.family = family
        self.layers = tuple(layer_of(member.reads[0]) for member in family.members)
        ones = torch.ones(1, lm.d_model, device=lm.device)
        self.norms: dict[int, FrozenNorm] = {
            layer: frozen_norm(norms(lm, layer).before_mlp, ones, torch.float32) for layer in self.layers
        }

    def member(self, layer: int, feature: int) -> int:
        """The member that reads a layer.

        :raises UserError: there is none, or it has no such feature.
        """
        if layer not in self.layers:
            raise UserError(
                f"No transcoder reads layer {layer}; those that there are read {list(self.layers)}."
            )
        number = self.layers.index(layer)
        if not 0 <= feature < (size := self.family.members[number].d_dict):
            raise UserError(f"Layer {layer} has no feature {feature}; its transcoder has 0 to {size - 1}.")
        return number

    def incoming(self, layer: int, feature: int) -> dict[int, Float[Tensor, " d_dict"]]:
        """From all features of each member (by its number) into one feature."""
        encoder = self.family.members[self.member(layer, feature)].W_enc
        assert encoder is not None
        row = self.norms[layer].fold(encoder[feature][None].float())[0]
        found = {}
        for number, member in enumerate(self.family.members):
            if sites := _before(member.writes, layer):
                parts = [self.family.decoder(number, site).float() @ row for site in sites]
                found[number] = torch.stack(parts).sum(0)
        return found

    def outgoing(self, layer: int, feature: int) -> dict[int, Float[Tensor, " d_dict"]]:
        """From one feature to all features of each member (by its number)."""
        own, found = self.member(layer, feature), {}
        for number, member in enumerate(self.family.members):
            at = self.layers[number]
            if sites := _before(self.family.members[own].writes, at):
                written = torch.stack([self.family.decoder(own, site)[feature].float() for site in sites])
                assert member.W_enc is not None
                found[number] = member.W_enc.float() @ self._read(at, written.sum(0))
        return found

    def _read(self, layer: int, vector: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
        """A vector of the stream as the MLP of a layer reads it, at scale 1."""
        norm = self.norms[layer]
        return (vector - vector.mean() if norm.centred else vector) * norm.weight


def joint_activity(
    family: Family, wanted: Sequence[tuple[int, int]], blocks: Iterator[Mapping[str, Tensor]]
) -> Joint:
    """Joint activity of some features (member, number) with all, over blocks of vectors at the sites that are read."""
    products = tuple(torch.zeros(len(wanted), member.d_dict) for member in family.members)
    totals = tuple(torch.zeros(member.d_dict) for member in family.members)
    own, tokens = torch.zeros(len(wanted)), 0
    for x in blocks:
        n = len(next(iter(x.values())))
        codes = [found.to("cpu") for found in family.encode(x, torch.arange(n))]
        values = torch.stack([codes[member].columns(torch.tensor([at]))[:, 0] for member, at in wanted])
        for number, found in enumerate(codes):
            _add(found, values, products[number], totals[number])
        own += values.sum(1)
        tokens += n
    return Joint(products, totals, own, tokens)


def virtual_weights(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """Stage: virtual weights of a graph's most influential features, and how much of them is interference.

    Inputs: ``model``, ``dictionaries``, ``graph``, ``activations`` (store of the sites that they read), ``corpus``.
    Params: ``features`` (how many), ``strongest`` (weights listed of each side), ``blocks`` (of the corpus), ``dtype``,
    ``compute``. Outputs: ``weights``: one row per listed weight, by falling |weight|; ``features``: one per feature
    and side.
    """
    lm = load_model(Path(inputs["model"]), params["dtype"], params["compute"]["device"])
    family = load_family([Path(path) for path in inputs["dictionaries"]]).to(lm.device)
    weights = Weights(lm, family)
    chosen = most_influential(Graph.load(Path(inputs["graph"])), params["features"])
    wanted = [(weights.member(*feature), feature[1]) for feature in chosen]
    stores = open_store(Path(inputs["activations"])), open_store(Path(inputs["corpus"]))
    joint = joint_activity(family, wanted, _blocks(family, *stores, params["blocks"]))
    listed: dict[str, list[Any]] = {}
    described: dict[str, list[Any]] = {}
    for place, (layer, feature) in enumerate(chosen):
        for side in SIDES:
            found = weights.incoming(layer, feature) if side == "in" else weights.outgoing(layer, feature)
            table = pairs(weights, found, joint, place, side)
            facts = {"layer": layer, "feature": feature, "side": side}
            _append(described, facts | distribution(table))
            for row in np.argsort(-np.abs(table["weight"]), kind="stable")[: params["strongest"]]:
                _append(listed, facts | {name: values[row] for name, values in table.items()})
    write_table(out.files["weights"], listed, out.provenance)
    write_table(out.files["features"], described, out.provenance)


def most_influential(graph: Graph, count: int) -> list[tuple[int, int]]:
    """The features (layer, number) of most influence, summed over positions."""
    found = whole_influence(graph)[: graph.first_error]
    keys, place = np.unique(graph.features[:, [0, 2]], axis=0, return_inverse=True)
    total = np.bincount(place.reshape(-1), weights=found, minlength=len(keys))
    return [(int(layer), int(feature)) for layer, feature in keys[np.argsort(-total, kind="stable")[:count]]]


def pairs(
    weights: Weights, found: Mapping[int, Tensor], joint: Joint, place: int, side: str
) -> dict[str, np.ndarray]:
    """One row per other feature: its layer and number, the weight, and the weight × joint activity.

    ``expected`` is w · Σ a_s a_t / Σ a_t, what the source gives the target on average, weighted by the target's
    activity (0 where the target is never active over the text); ``together`` says whether both were ever active at
    once.
    """
    columns: dict[str, list[np.ndarray]] = {name: [] for name in PAIRS}
    for number, weight in found.items():
        products = joint.products[number][place]
        target = joint.own[place].expand(len(weight)) if side == "in" else joint.totals[number]
        expected = torch.where(target > 0, weight.cpu() * products / target.clamp(min=1e-30), 0)
        values = (weights.layers[number], torch.arange(len(weight)), weight, expected, products > 0)
        for name, value in zip(PAIRS, values, strict=True):
            columns[name].append(np.broadcast_to(np.asarray(_plain(value)), len(weight)))
    return {name: np.concatenate(parts) if parts else np.zeros(0) for name, parts in columns.items()}


PAIRS = ("other_layer", "other_feature", "weight", "expected", "together")


def distribution(table: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Number and quantiles of |w|, and interference.

    ``together_share``: share of Σ|w| between features that were ever active at once: the rest can only interfere.
    ``top_together``: that share among the 20 strongest. ``expected``: Σ|expected|.
    """
    size = np.abs(table["weight"]).astype(np.float64)
    met = table["together"].astype(bool)
    quantiles = np.quantile(size, QUANTILES) if len(size) else np.full(len(QUANTILES), np.nan)
    top = np.argsort(-size, kind="stable")[:20]
    return {
        "n": len(size),
        **{f"q{str(q)[2:]}": float(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
        "largest": float(size.max(initial=0.0)),
        "together_share": float(size[met].sum() / size.sum()) if size.any() else np.nan,
        "top_together": float(size[top][met[top]].sum() / size[top].sum()) if size.any() else np.nan,
        "expected": float(np.abs(table["expected"]).sum()),
    }


def _add(codes: Codes, values: Tensor, products: Tensor, totals: Tensor) -> None:
    """Add one block's products with the chosen features' activations, in place, over active entries alone."""
    rows = codes.rows()
    given = codes.values.float()
    totals.index_add_(0, codes.features, given)
    products.index_add_(1, codes.features, values[:, rows] * given)


def _blocks(family: Family, store: Store, corpus: Store, count: int) -> Iterator[dict[str, Tensor]]:
    """Vectors of blocks of the corpus, spread evenly, at the sites that are read."""
    n, length = corpus.shape("tokens")
    device = family.members[0].W_dec.device
    for done, block in enumerate(
        np.unique(np.linspace(0, n - 1, min(count, n)).round().astype(int)).tolist()
    ):
        rows = block * length, (block + 1) * length
        yield {site: torch.from_numpy(store.read(site, *rows)).float().to(device) for site in family.reads}
        progress("co-activation blocks", done + 1, min(count, n))


def _before(writes: Sequence[str], layer: int) -> list[str]:
    return [site for site in writes if layer_of(site) < layer]


def _plain(value: Any) -> Any:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value


def _append(columns: dict[str, list[Any]], row: Mapping[str, Any]) -> None:
    for name, value in row.items():
        columns.setdefault(name, []).append(value)
