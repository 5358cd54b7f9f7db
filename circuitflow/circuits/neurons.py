"""Neurons in place of features: the coordinates of the same sites, scored and ablated in the same way."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from circuitflow.attribution.cached import batches
from circuitflow.attribution.changes import differing
from circuitflow.attribution.nodes import SUMMED
from circuitflow.circuits.ablation import KNOWN, AblationSite
from circuitflow.circuits.replacement import Known, zeros
from circuitflow.circuits.sweep import Ranked, ranked_nodes
from circuitflow.data.token_pairs import TokenPairs, load_token_pairs
from circuitflow.dictionaries.codes import codes_from_dense
from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.store.arrays import open_store

BATCH_PAIRS = 32


def neuron_scores(
    gradients: Path, tokens: Path, sites: Sequence[str], positions: str = "sum"
) -> dict[str, np.ndarray]:
    """AtP effect of every coordinate of every site, averaged over pairs: columns site, feature, position, score_train.

    IE_i = Σ_positions g_i·(x_p − x_c)_i; a pair without a patched prompt has x_p = 0. As everywhere, positive means
    that the clean value supports the clean answer.

    :param gradients: manifest of cache_gradients; ``tokens``, the table of its pairs.
    :param positions: "last" counts the answer's token alone, all else every token.
    """
    store, pairs = open_store(gradients), load_token_pairs(tokens)
    totals = {site: np.zeros(store.shape(f"{site}/clean")[-1]) for site in sites}
    for batch in batches(store, sites, pairs, BATCH_PAIRS):
        counted = differing(batch.pairs, "last" if positions == "last" else "sum")
        paired = batch.pairs.has_patch[:, None, None]
        for site, cached in batch.sites.items():
            change = torch.where(paired, cached.patched, 0) - cached.clean
            totals[site] += (cached.gradient.double() * change.double())[counted].sum(0).numpy()
    return {
        "site": np.concatenate([np.full(len(total), site, object) for site, total in totals.items()]),
        "feature": np.concatenate([np.arange(len(total)) for total in totals.values()]),
        "position": np.concatenate([np.full(len(total), SUMMED) for total in totals.values()]),
        "score_train": np.concatenate([total / len(pairs) for total in totals.values()]),
    }


def ranked_neurons(
    inputs: Mapping[str, Path], sites: Sequence[str], ranking: str, positions: str = "sum"
) -> Ranked:
    """All coordinates that have an effect on the training pairs, by falling strength.

    Inputs ``gradients_train``, ``tokens_train``.
    """
    scores = neuron_scores(inputs["gradients_train"], inputs["tokens_train"], sites, positions)
    return ranked_nodes(scores, sites, ranking)


def as_neurons(site: AblationSite, pairs: TokenPairs, ablation: str) -> AblationSite:
    """The same site with its coordinates for features; replaced ones take what the whole vector takes there.

    Under zero ablation that is 0, where a dictionary would leave its b_dec.
    """
    identity = identity_of(site.name, site.dictionary.d_model, site.dictionary.W_dec)

    def known(source: str) -> Known:
        if source == "replacement" and ablation == "zero":
            return zeros(identity, pairs)
        whole, slot = site.known(source).whole, site.known(source).slot
        return Known(whole, slot, lambda: codes_from_dense(whole.nan_to_num()), identity.W_dec)

    return AblationSite(site.name, identity, {name: partial(known, name) for name in KNOWN.values()})


def identity_of(site: str, width: int, like: torch.Tensor) -> Dictionary:
    """The dictionary whose features are coordinates; it leaves no error."""
    rows, zero = torch.eye(width, dtype=like.dtype, device=like.device), like.new_zeros(width)
    return Dictionary("identity", (site,), (site,), "nonzero", rows, zero, rows, zero)
