"""Rows of an attribution graph: what every source adds to each of a batch of targets.

One pass goes from the deepest target's layer down to the embeddings. A target joins at its own layer and position,
and holds a row for every position that it can see and no other, so nothing is computed where no effect can come from.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from circuitflow.graphs.mixing import mix
from circuitflow.graphs.sources import Sources


@dataclass(frozen=True)
class Targets:
    """Places where effects are measured: encoders of features, or the unembedding."""

    layers: Int64[Tensor, " n"]
    """Layer whose MLP input is read; the number of layers for what the unembedding reads."""
    positions: Int64[Tensor, " n"]
    rows: Float[Tensor, "n d_model"]
    """Direction that is read after the norm: encoder row, or row of the unembedding."""
    biases: Float[Tensor, " n"]
    """Added to what is read."""

    def __len__(self) -> int:
        return len(self.layers)


@dataclass(frozen=True)
class Rows:
    """Effects on a batch of targets."""

    features: Float[Tensor, "n features"]
    """By column: features in the order of ``Sources.order``."""
    errors: Float[Tensor, "n layers pos"]
    tokens: Float[Tensor, "n pos"]
    bias: Float[Tensor, " n"]


def feature_targets(sources: Sources, features: Int64[Tensor, " n"]) -> Targets:
    """Active features as targets; a row is the encoder's, its sum with the bias the pre-activation."""
    layers, positions = sources.features[features, 0], sources.features[features, 1]
    return Targets(layers, positions, sources.encoder(features), sources.encoder_bias(features))


def compute_rows(sources: Sources, targets: Targets, buffers: "Buffers | None" = None) -> Rows:
    """Direct effects of every source on each target, with attention patterns and norm scales held.

    :param buffers: memory of an earlier call to use again.
    """
    order = torch.argsort(targets.layers * (sources.frozen.n_pos + 1) - targets.positions, descending=True)
    walk = _Walk(sources, targets, order, buffers or Buffers())
    for layer in range(sources.frozen.n_layers - 1, -1, -1):
        walk.down(layer)
    walk.tokens()
    found = walk.found
    back = torch.argsort(order)
    return Rows(found.features[back], found.errors[back], found.tokens[back], found.bias[back])


@dataclass
class Buffers:
    """Memory that one batch after another works in, so that the system gives it once."""

    held: dict[str, Tensor] = field(default_factory=dict)

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """An uninitialised tensor of this shape."""
        size = 1
        for part in shape:
            size *= part
        known = self.held.get(name)
        if known is None or known.numel() < size or known.dtype != like.dtype:
            known = self.held[name] = like.new_empty(size)
        return known[:size].view(shape)


class _Walk:
    """A batch of targets on its way down; targets by falling layer, so that those on their way are the first ones."""

    def __init__(self, sources: Sources, targets: Targets, order: Tensor, buffers: Buffers) -> None:
        frozen = self.frozen = sources.frozen
        self.sources, self.buffers = sources, buffers
        self.layers, self.positions = targets.layers[order], targets.positions[order]
        self.read = targets.rows[order].to(frozen.dtype)
        self.starts = torch.nn.functional.pad((self.positions + 1).cumsum(0), (1, 0))
        self.own = self.starts[1:] - 1  # each target's row at its own position
        rows, n = int(self.starts[-1]), len(targets)
        like, pos = frozen.embed, frozen.n_pos
        self.target = torch.repeat_interleave(
            torch.arange(n, device=like.device), self.positions + 1, output_size=rows
        )
        self.position = torch.arange(rows, device=like.device) - self.starts[self.target]
        self.seen = [(self.positions >= q).nonzero()[:, 0] for q in range(pos)]
        self.G = buffers.take("G", like, rows, like.shape[1]).zero_()
        self.found = Rows(
            like.new_zeros(n, sources.n_features),
            like.new_zeros(n, frozen.n_layers, pos),
            like.new_zeros(n, pos),
            targets.biases[order].to(frozen.dtype, copy=True),
        )
        self.active = 0  # targets on their way
        self.spread = 0  # targets that attention has spread over positions
        self._join(frozen.n_layers)

    def down(self, layer: int) -> None:
        """Pass one block: from its output to its input."""
        self._collect(layer)
        skipped = self._skip(layer)
        if self.frozen.parallel:
            self._attention(layer)
            self._join(layer, skipped)
        else:
            self._join(layer, skipped)
            self._attention(layer)

    def tokens(self) -> None:
        """Collect what the embeddings add."""
        for q, targets, rows in self._slots():
            self.found.tokens[targets, q] = self.G[rows] @ self.frozen.embed[q]

    def _slots(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Every position with the targets on their way that see it, and their rows there."""
        for q, seen in enumerate(self.seen):
            targets = seen[: int(torch.searchsorted(seen, self.active))]
            if len(targets):
                yield q, targets, self.starts[targets] + q

    def _join(self, layer: int, skipped: Tensor | None = None) -> None:
        """At the stream that MLPs read: add what comes through the skip connection; targets of this layer begin."""
        if skipped is not None:
            self.G[: len(skipped)] += skipped
        first, self.active = self.active, int((self.layers >= layer).sum())
        new = slice(first, self.active)
        if first == self.active:
            return
        last = layer == self.frozen.n_layers
        norm = self.frozen.final_norm if last else self.frozen.layers[layer].mlp_norm
        self.G[self.own[new]] = norm.pull(self.read[new], self.positions[new])
        if norm.bias is not None:
            self.found.bias[new] += self.read[new] @ norm.bias

    def _collect(self, layer: int) -> None:
        """What is written at this layer's MLP output."""
        sources, found = self.sources, self.found
        columns, directions, bounds = sources.written[layer]
        constant = sources.constants[layer]
        for q, targets, rows in self._slots():
            here = slice(bounds[q], bounds[q + 1])
            written = torch.cat([directions[here], sources.errors[layer, q][None], constant[None]])
            effects = self.G[rows] @ written.T
            found.errors[targets, layer, q] = effects[:, -2]
            found.bias[targets] += effects[:, -1]
            found.features[targets[:, None], columns[here]] += effects[:, :-2]

    def _skip(self, layer: int) -> Tensor | None:
        """Gradient that goes past the MLP through a transcoder's skip connection."""
        skip = self.sources.skips(layer)
        if skip is None or not self.active:
            return None
        rows = int(self.starts[self.active])
        pulled = self.G[:rows] @ skip.to(self.G.dtype)
        return self.frozen.layers[layer].mlp_norm.pull(pulled, self.position[:rows])

    def _attention(self, layer: int) -> None:
        """Add what comes through attention; targets that meet their first have a gradient at one position alone."""
        if not self.active:
            return
        before, self.spread = self.spread, self.active
        held, rows, old = self.frozen.layers[layer], int(self.starts[self.active]), int(self.starts[before])
        G = self.G[:rows]
        z = self.buffers.take("z", G, rows, held.output.shape[1])
        torch.mm(G[:old], held.output, out=z[:old])
        new = self.own[before : self.active]
        z[new] = G[new] @ held.output
        if held.constant is not None:
            self._attention_constant(held.constant, rows)
        mixed = self.buffers.take("mixed", G, rows, held.kv_heads, held.d_head)
        first = torch.zeros(self.active, dtype=torch.int64, device=G.device)
        first[before:] = self.positions[before : self.active]
        mix(z.view(rows, held.heads, held.d_head), held.pattern, self.starts[: self.active + 1], first, mixed)
        G.addmm_(mixed.view(rows, -1), held.value)

    def _attention_constant(self, constant: Float[Tensor, "pos d_model"], rows: int) -> None:
        """Biases of attention, at every position that is seen."""
        told = (self.G[:rows] @ constant.T).gather(1, self.position[:rows, None])[:, 0]
        self.found.bias.index_add_(0, self.target[:rows], told)
