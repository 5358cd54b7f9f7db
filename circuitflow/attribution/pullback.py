"""Edges of a batch: cotangents of all downstream nodes, pulled back through the blocks between two sites at once.

w(u→d) = ∇_d m · ∇_u d · (u_p − u_c), summed over the positions of both ends. Sites in between are not held fixed: the
effect of u on d runs along every path, which is right if the run has no site there (reference: "General rule").
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from circuitflow.attribution.cached import Cached
from circuitflow.attribution.changes import Changes, changes_of, differing
from circuitflow.attribution.sparse import products
from circuitflow.data.token_pairs import TokenPairs
from circuitflow.dictionaries.codes import decode_codes
from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.models.running import LanguageModel, run

BATCH_TOKENS = 4096
"""Tokens (nodes × pairs × positions) in one batched vector-Jacobian product; bounds memory."""


@dataclass(frozen=True)
class End:
    """One end of a site pair: the dictionary and the features that are nodes of their own (ascending)."""

    site: str
    dictionary: Dictionary
    pool: Int64[Tensor, " pool"]


def edge_effects(
    lm: LanguageModel, pairs: TokenPairs, up: End, down: End, at_up: Cached, at_down: Cached
) -> Float[Tensor, "batch up down"]:
    """Edge weights of every pair, in float64.

    Rows: the upstream pool, then the upstream error. Columns: the downstream pool, the downstream error, and the
    "rest": all downstream features outside the pool together. If every path from ``up`` to the metric leads through
    ``down`` (residual stream), each row sums to the effect that ``up``'s node has on the metric.
    """
    changes = changes_of(up.dictionary, at_up, pairs)
    targets = targets_of(down, at_down, pairs)
    this = run(
        lm, pairs.clean, pairs.mask, start=(up.site, at_up.base), capture=[up.site, down.site], grad=True
    )
    x, y = this.sites[up.site], this.sites[down.site]
    effects = torch.zeros(
        len(pairs.mask), len(up.pool) + 1, len(down.pool) + 2, dtype=torch.float64, device=x.device
    )
    chunks = targets.nodes.split(max(1, BATCH_TOKENS // pairs.mask.numel()))
    for number, nodes in enumerate(chunks):
        pulled = pull_back(y, x, targets.cotangents(nodes, y), keep_graph=number + 1 < len(chunks))
        effects[:, :, nodes] = _received(up, changes, pulled, len(pairs.mask))
    return effects


def pull_back(
    y: Float[Tensor, "batch pos d_model"],
    x: Float[Tensor, "batch pos d_model"],
    cotangents: Float[Tensor, "nodes batch pos d_model"],
    keep_graph: bool = False,
) -> Float[Tensor, "nodes batch pos d_model"]:
    """Σ_y cotangent·∂y/∂x for every node: one batched product, equal to one backward pass per node to rounding.

    Batching the products lets the few pairs in which a node is active fill a matrix product; with as many tokens per
    pass a loop is equally fast (SmolLM2's shape, 6 blocks, CPU: 0.6 ms per node and token either way).
    """
    (pulled,) = torch.autograd.grad(y, x, cotangents, is_grads_batched=True, retain_graph=keep_graph)
    return pulled


@dataclass(frozen=True)
class Targets:
    """∂m/∂(downstream node) · ∂(node)/∂y, at the ``n`` tokens of a batch that can differ."""

    pair: Int64[Tensor, " n"]
    position: Int64[Tensor, " n"]
    W_enc: Float[Tensor, "pool d_model"]
    weights: Float[Tensor, "n pool"]
    """∂m/∂f where the feature is active, else 0."""
    error: Float[Tensor, "n d_model"]
    rest: Float[Tensor, "n d_model"]
    nodes: Int64[Tensor, " nodes"]
    """The columns that are not zero throughout the batch."""

    def cotangents(self, nodes: Int64[Tensor, " m"], like: Tensor) -> Float[Tensor, "m batch pos d_model"]:
        """Cotangents at the downstream site, shaped ``like`` its value; zero at all other tokens."""
        pool = len(self.W_enc)
        full = like.new_zeros(len(nodes), *like.shape)
        for index, node in enumerate(nodes.tolist()):
            rows = (self.error, self.rest)[node - pool] if node >= pool else self._of_feature(node)
            full[index, self.pair, self.position] = rows.to(like.dtype)
        return full

    def _of_feature(self, node: int) -> Float[Tensor, "n d_model"]:
        return self.weights[:, node, None] * self.W_enc[node]


def targets_of(down: End, cached: Cached, pairs: TokenPairs) -> Targets:
    """What every downstream node passes on of the metric's gradient g; over all nodes this sums to g.

    A feature passes (g·W_dec[f])·W_enc[f] where it is active: there the encoder is linear. The error is y − ŷ(y), so
    it passes what all features leave of g.
    """
    pair, position = differing(pairs).nonzero(as_tuple=True)
    gradient = cached.gradient[pair, position]
    dictionary, pool = down.dictionary, down.pool
    codes = dictionary.encode(cached.base[pair, position], position)
    assert dictionary.W_enc is not None  # encode() has refused it otherwise
    passed = codes.with_values(products(codes, gradient, dictionary.W_dec))
    in_pool = torch.zeros(codes.d_dict, dtype=torch.bool, device=pool.device)
    in_pool[pool] = True
    weights = passed.columns(pool)
    rest = decode_codes(passed.select(~in_pool), dictionary.W_enc)
    error = gradient - decode_codes(passed, dictionary.W_enc)
    present = torch.cat([weights.any(0), torch.stack([error.any(), rest.any()])])
    return Targets(pair, position, dictionary.W_enc[pool], weights, error, rest, present.nonzero()[:, 0])


def _received(
    up: End, changes: Changes, pulled: Float[Tensor, "nodes batch pos d_model"], batch: int
) -> Float[Tensor, "batch up nodes"]:
    """Pulled-back gradients times the change of every upstream node, summed over positions."""
    W_dec = up.dictionary.W_dec
    here = pulled[:, changes.pair, changes.position].to(W_dec.dtype)  # (nodes, n, d_model)
    features = torch.matmul(here, W_dec[up.pool].T) * changes.features.columns(up.pool)
    error = torch.einsum("knd,nd->kn", here, changes.error(W_dec))
    each = torch.cat([features, error[..., None]], dim=2).double()  # (nodes, n, up)
    total = each.new_zeros(batch, len(pulled), each.shape[2])
    return total.index_add_(0, changes.pair, each.transpose(0, 1)).transpose(1, 2)
