"""Edges measured: one upstream node is patched alone, the blocks run again, and every downstream node is read.

All other sites of the run that lie before the downstream one keep their clean values, so that this is the direct
effect, of which :mod:`circuitflow.attribution.pullback` takes the first order.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from circuitflow.attribution.cached import Cached
from circuitflow.attribution.changes import changes_of, differing
from circuitflow.attribution.ends import End, Sources, sources_of
from circuitflow.attribution.nodes import ERROR
from circuitflow.attribution.pullback import Into, linked, metric_values
from circuitflow.data.token_pairs import TokenPairs
from circuitflow.dictionaries.codes import Codes, decode_codes
from circuitflow.models.running import LanguageModel

ROWS = 256
"""Prompts, with one node patched in each, in one pass."""


def exact_effects(
    lm: LanguageModel, pairs: TokenPairs, into: Into, cached: Mapping[str, Cached], budget: int
) -> dict[str, Float[Tensor, "batch up down"]]:
    """Σ over tokens of ∂m/∂d · (d with u patched − d), in float64, for the first ``budget`` nodes of every site.

    Errors come first; rows of other nodes are NaN. Into the metric it is the
    difference of m itself. Rows and columns are those of :func:`circuitflow.attribution.pullback.edge_effects`.
    """
    columns = 1 if into.end is None else len(into.end) + 1
    found = {}
    for up in into.ups:
        sources = sources_of(up, changes_of(up.dictionary, cached[up.site], pairs, into.positions))
        effects = torch.full((len(pairs), len(up), columns), torch.nan, dtype=torch.float64)
        for nodes, values in _patched(lm, pairs, into, cached, sources, budget):
            effects[:, nodes] = values
        found[up.site] = effects
    return found


def _patched(
    lm: LanguageModel,
    pairs: TokenPairs,
    into: Into,
    cached: Mapping[str, Cached],
    sources: Sources,
    budget: int,
) -> Iterator[tuple[list[int], Float[Tensor, "batch nodes down"]]]:
    base = _read(lm, pairs, into, cached)
    nodes = _first(sources.end, budget)
    at_once = max(1, ROWS // len(pairs))
    for start in range(0, len(nodes), at_once):
        some = nodes[start : start + at_once]
        copies = torch.arange(len(pairs)).repeat(len(some))
        many = pairs[copies]
        repeated = {site: _copied(one, copies) for site, one in cached.items()}
        x = cached[sources.end.site].base
        moved = torch.cat([x + move(sources, node, x) for node in some])
        after = _read(lm, many, into, repeated, {sources.end.site: moved})
        values = after.view(len(some), len(pairs), -1) - base
        yield some, values.transpose(0, 1).cpu()


def _first(end: End, budget: int) -> list[int]:
    """Errors, then features in the order of the end: a stage makes it that of strength."""
    errors = (end.feature == ERROR).nonzero()[:, 0].tolist()
    return [*errors, *(node for node in range(len(end)) if node not in errors)][:budget]


def move(sources: Sources, node: int, like: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
    """What patching one node adds to its site."""
    moved = torch.zeros_like(like)
    moved[sources.pair, sources.position] = sources.rows(node).to(like.dtype)
    return moved


def _copied(cached: Cached, copies: Int64[Tensor, " rows"]) -> Cached:
    index = copies.to(cached.clean.device)
    return replace(
        cached, clean=cached.clean[index], patched=cached.patched[index], gradient=cached.gradient[index]
    )


def _read(
    lm: LanguageModel,
    pairs: TokenPairs,
    into: Into,
    cached: Mapping[str, Cached],
    moved: Mapping[str, Tensor] | None = None,
) -> Float[Tensor, "rows down"]:
    """Value of every downstream node, in units of the metric: Σ over tokens of its gradient · itself."""
    with torch.no_grad():
        this = linked(lm, pairs, into, cached, moved, grad=False)
        if into.end is None:
            return metric_values(lm, this, pairs, into, cached)[:, None].double()
    return worth(into.end, this.sites[into.down], cached[into.down].gradient, pairs, into.positions)


def worth(
    end: End,
    y: Float[Tensor, "rows pos d_model"],
    gradient: Float[Tensor, "rows pos d_model"],
    pairs: TokenPairs,
    positions: str,
) -> Float[Tensor, "rows down"]:
    """Σ over tokens of g·(part of y) for the part of every node, then of the rest; g is that of the clean run."""
    row, position = differing(pairs, positions).nonzero(as_tuple=True)
    here, g = y[row, position].to(gradient.dtype), gradient[row, position]
    codes: Codes = end.dictionary.encode(here, position)
    features = end.features
    each = codes.columns(features).double() * (g @ end.dictionary.W_dec[features].T).double()
    decoded = decode_codes(codes, end.dictionary.W_dec)
    all_features = (g * decoded).sum(1).double()
    error = (g * (here - decoded - end.dictionary.b_dec)).sum(1).double()
    sources = Sources(row, position, end, each, each, error)
    nodes = sources.by_node(torch.cat([each, error[:, None]], dim=1)[..., None], pairs.mask.shape)[..., 0]
    total = all_features.new_zeros(len(pairs)).index_add_(0, row, all_features)
    rest = total - nodes[:, end.feature != ERROR].sum(1)
    return torch.cat([nodes, rest[:, None]], dim=1)
