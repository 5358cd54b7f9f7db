"""Edges of a batch: cotangents of all downstream nodes, pulled back to every neighbouring upstream site at once.

w(u→d) = ∇_d m · ∇_u d · (u_p − u_c). The gradient stops at the other sites of the run between u and d. Here every
upstream neighbour of d is a leaf of one graph, so one product per downstream node gives its edges from all of them,
each without the paths through another (the residual double-counting correction of sparse feature circuits, in a
constant number of passes). Pairs do not mix either, nor tokens where no attention lies between, so that nodes active
at different places share a product.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.attribution.cached import Cached
from circuitflow.attribution.changes import changes_of
from circuitflow.attribution.ends import End, Sources, Targets, sources_of, targets_of
from circuitflow.attribution.nodes import SUMMED
from circuitflow.attribution.paths import METRIC_SITE, Way, begin
from circuitflow.attribution.readout import answer_logits, metric_of_run
from circuitflow.data.metrics import Metric
from circuitflow.data.token_pairs import TokenPairs
from circuitflow.models.running import Change, LanguageModel, Run, run


@dataclass(frozen=True)
class Into:
    """What edges into one site are computed from."""

    down: str
    """A site, or "metric"."""
    ups: tuple[End, ...]
    """Ends at all neighbours."""
    end: End | None
    """The downstream end; None for the metric."""
    sites: tuple[str, ...]
    """Every site of the run."""
    way: Way
    """What lies between (:func:`circuitflow.attribution.paths.way_into`)."""
    metric: Metric | None = None
    """The metric, if edges lead there."""
    positions: str = "sum"


def edge_effects(
    lm: LanguageModel, pairs: TokenPairs, into: Into, cached: Mapping[str, Cached], nodes_at_once: int = 64
) -> dict[str, Float[Tensor, "batch up down"]]:
    """Edge weights of every pair, in float64, by upstream site.

    Rows: the upstream nodes. Columns: the downstream nodes, then the "rest": all downstream features that are no nodes
    together; or one column for the metric. Over all downstream sites and the metric, each row sums to the effect that
    its node has on the metric.
    """
    sources = {
        up.site: sources_of(up, changes_of(up.dictionary, cached[up.site], pairs, into.positions))
        for up in into.ups
    }
    if not sources:
        return {}
    if into.end is None:
        return _into_metric(lm, pairs, into, cached, sources)
    targets = targets_of(into.end, cached[into.down], pairs, into.positions)
    if into.way is Way.ADDED:
        shape = pairs.mask.shape
        return {site: closed_form(source, targets, shape) for site, source in sources.items()}
    this = linked(lm, pairs, into, cached)
    y, leaves = this.sites[into.down], [this.sites[site] for site in sources]
    columns = len(into.end) + 1
    effects = {
        site: torch.zeros(len(pairs), len(source.end), columns, dtype=torch.float64, device=y.device)
        for site, source in sources.items()
    }
    chunks = [rows for rows in targets.shared(into.way is Way.BY_TOKEN).split(nodes_at_once) if len(rows)]
    for number, nodes in enumerate(chunks):
        pulled = pull_back(y, leaves, targets.cotangents(nodes, y), keep_graph=number + 1 < len(chunks))
        for (site, source), gradient in zip(sources.items(), pulled, strict=True):
            effects[site] += source.effects_through(gradient, nodes, columns)
    return effects


def linked(
    lm: LanguageModel,
    pairs: TokenPairs,
    into: Into,
    cached: Mapping[str, Cached],
    moved: Mapping[str, Tensor] | None = None,
    grad: bool = True,
) -> Run:
    """A pass from the deepest full cut before ``into.down``, with every upstream neighbour a leaf of its own.

    :param moved: values that some of the neighbours take in place of the cached ones.
    """
    ups = [up.site for up in into.ups]
    fixed = {site: cached[site].base for site in ups} | dict(moved or {})
    cut = begin(into.down, into.sites)
    start = None if cut is None else (cut, fixed.get(cut, cached[cut].base))
    final = f"resid.{lm.n_layers - 1}"
    to_metric = into.down == METRIC_SITE
    on_clean = all(one.gradient_run == "clean" for one in cached.values())
    return run(
        lm,
        pairs.clean if on_clean else pairs.patch,
        pairs.mask,
        start=start,
        replace={site: _held(value) for site, value in fixed.items() if site != cut},
        capture=ups if to_metric else [*ups, into.down],
        stop_at=final if to_metric else into.down,
        grad=grad,
    )


def _held(value: Tensor) -> Change:
    """Go on from ``value``, whatever arrives."""
    return lambda arrived: value.to(arrived.device, arrived.dtype)


def pull_back(
    y: Float[Tensor, "batch pos d_model"],
    leaves: Sequence[Float[Tensor, "batch pos width"]],
    cotangents: Float[Tensor, "nodes batch pos d_model"],
    keep_graph: bool = False,
) -> list[Float[Tensor, "nodes batch pos width"]]:
    """Σ_y cotangent·∂y/∂x for every node and leaf: one batched product, equal to a backward pass per node to rounding.

    Batching the products lets the few pairs in which a node is active fill a matrix product.
    """
    pulled: Sequence[Tensor | None] = torch.autograd.grad(
        y, leaves, cotangents, is_grads_batched=True, retain_graph=keep_graph, allow_unused=True
    )
    return [
        cotangents.new_zeros(len(cotangents), *leaf.shape) if gradient is None else gradient
        for gradient, leaf in zip(pulled, leaves, strict=True)
    ]


def closed_form(sources: Sources, targets: Targets, shape: torch.Size) -> Float[Tensor, "batch up down"]:
    """Edges where the upstream vector is only added to the downstream one: no pass and no product at all.

    Between features w = ∂m/∂d · 1[d active] · (W_dec[u]·W_enc[d]) · Δu, at the same position; errors likewise with
    their vectors.
    """
    dense = torch.stack([targets.error, targets.rest], dim=1)  # (n, 2, d_model)
    values, change = targets.values, sources.values
    crossing = sources.directions @ targets.directions.T
    features = change[:, :, None] * torch.cat(
        [values[:, None, :] * crossing, torch.einsum("ud,nkd->nuk", sources.directions, dense)], dim=2
    )
    error = torch.cat(
        [values * (sources.error @ targets.directions.T), torch.einsum("nd,nkd->nk", sources.error, dense)],
        dim=1,
    )
    each = torch.cat([features, error[:, None]], dim=1).double()  # (n, up columns, down columns)
    down = torch.cat([targets.end.column, targets.end.column.new_tensor([values.shape[1] + 1])])
    weights = each[:, :, down]
    if not targets.end.summed:
        place = torch.cat([targets.end.position, targets.end.position.new_tensor([SUMMED])])
        weights = weights * ((targets.position[:, None] == place) | (place == SUMMED))[:, None]
    return sources.by_node(weights, shape)


def _into_metric(
    lm: LanguageModel,
    pairs: TokenPairs,
    into: Into,
    cached: Mapping[str, Cached],
    sources: Mapping[str, Sources],
) -> dict[str, Float[Tensor, "batch up 1"]]:
    """Effects that reach the metric past every other site of the run: one backward pass."""
    this = linked(lm, pairs, into, cached)
    values = metric_values(lm, this, pairs, into, cached)
    leaves = [this.sites[site] for site in sources]
    gradients: Sequence[Tensor | None] = torch.autograd.grad(values.sum(), leaves, allow_unused=True)
    return {
        site: source.effects((torch.zeros_like(leaf) if gradient is None else gradient)[None])
        for (site, source), gradient, leaf in zip(sources.items(), gradients, leaves, strict=True)
    }


def metric_values(
    lm: LanguageModel, this: Run, pairs: TokenPairs, into: Into, cached: Mapping[str, Cached]
) -> Float[Tensor, " batch"]:
    """m of every prompt of a pass that went on to the end."""
    assert into.metric is not None
    reference = _clean_logits(lm, pairs, into, cached) if into.metric.kind == "kl" else None
    return metric_of_run(lm, into.metric, this, pairs, reference)


def _clean_logits(
    lm: LanguageModel, pairs: TokenPairs, into: Into, cached: Mapping[str, Cached]
) -> Float[Tensor, "batch vocab"]:
    cut = begin(into.down, into.sites)
    start = None if cut is None else (cut, cached[cut].clean)
    return answer_logits(lm, run(lm, pairs.clean, pairs.mask, start=start), pairs.position)
