"""What attention heads carry of the direct effects between nodes of one prompt.

With patterns and scales held, an effect is a sum over paths, and a path is a list of heads. Two ways to split it:
*through* a head, all paths that use it, at whatever place, so that the heads of one layer and the way past that
layer's attention sum to the whole; and by the *last* head of a path, the one nearest to the target, so that all heads
of all layers and the paths without a head sum to the whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from circuitflow.graphs.directions import Parts, combined_row
from circuitflow.graphs.sources import Sources
from circuitflow.models.frozen import FrozenLayer, FrozenPrompt


@dataclass(frozen=True)
class Enter:
    """A source: vectors added to the stream at one position, by the layer after whose MLP (−1: the embedding)."""

    position: int
    added: dict[int, Float[Tensor, " d_model"]]


@dataclass(frozen=True)
class Read:
    """A target: the row that reads the stream at one position, before the MLP of ``layer`` (n_layers: the end)."""

    layer: int
    position: int
    row: Float[Tensor, " d_model"]


@dataclass(frozen=True)
class Split:
    """Effects of some sources on some targets, by head."""

    total: Float[Tensor, "targets sources"]
    direct: Float[Tensor, "targets sources"]
    """Along paths without a head."""
    through: Float[Tensor, "targets sources layers heads"]
    last: Float[Tensor, "targets sources layers heads"]


def split(sources: Sources, targets: Sequence[Read], entering: Sequence[Enter]) -> Split:
    """Every effect of ``entering`` on ``targets``, by head."""
    frozen = sources.frozen
    mixed, streams = push(sources, entering)
    rows = torch.stack([target.row for target in targets])
    at = torch.tensor([target.layer for target in targets], device=rows.device)
    place = torch.tensor([target.position for target in targets], device=rows.device)
    each = torch.arange(len(targets), device=rows.device)
    shape = (len(targets), len(entering), frozen.n_layers, max(layer.heads for layer in frozen.layers))
    through, last = rows.new_zeros(shape), rows.new_zeros(shape)
    total = rows.new_zeros(shape[:2])
    G = rows.new_zeros(len(targets), frozen.n_pos, rows.shape[1])
    alone = rows.new_zeros(len(targets), rows.shape[1])  # at the target's position, past all attention
    begins = at == frozen.n_layers
    G[each[begins], place[begins]] = rows[begins]
    alone[begins] = rows[begins]
    total += torch.einsum("tnd,snd->ts", G, streams[frozen.n_layers])
    direct = _entered(alone, place, entering, frozen.n_layers - 1, rows.new_zeros(shape[:2]))
    for layer in range(frozen.n_layers - 1, -1, -1):
        held, here = frozen.layers[layer], at == layer
        out_G, out_alone = G, alone  # at the block's output, which attention of parallel blocks writes to
        G = G + _skipped(sources, layer, G)
        alone = alone + _skipped_at(sources, layer, alone, place)
        G[each[here], place[here]] += rows[here]
        alone = torch.where(here[:, None], alone + rows, alone)
        if frozen.parallel:
            read, read_alone = out_G, out_alone
            total += _dot(here, place, rows, streams[layer])
        else:
            read, read_alone = G, alone
            total += _dot(here, place, rows, streams[layer] + _summed(held, mixed[layer]))
        through[:, :, layer] = _carried(held, read, mixed[layer])
        last[:, :, layer] = _carried_from(held, read_alone, place, mixed[layer])
        G = G + frozen.pull_attention(layer, read)
        direct = _entered(alone, place, entering, layer - 1, direct)
    return Split(total, direct, through, last)


def push(
    sources: Sources, entering: Sequence[Enter]
) -> tuple[list[Float[Tensor, "s pos z"]], list[Float[Tensor, "s pos d_model"]]]:
    """What sources change: values mixed by each layer's attention, head by head, and every block's input (and the end).

    ``streams[layer]`` is the change of the input of block ``layer``; ``mixed[layer]`` what its heads hold of it
    before the output projection, z.
    """
    frozen = sources.frozen
    stream = frozen.embed.new_zeros(len(entering), frozen.n_pos, frozen.embed.shape[1])
    mixed, streams = [], []
    _enter(stream, entering, -1)
    for layer, held in enumerate(frozen.layers):
        streams.append(stream)
        mixed.append(_mixed(held, stream))
        middle = stream + _summed(held, mixed[layer])
        after = middle.clone()
        matrix = sources.skips(layer)
        if matrix is not None:
            norm, read = held.mlp_norm, stream if frozen.parallel else middle
            centred = read - read.mean(-1, keepdim=True) if norm.centred else read
            after += (centred * norm.weight * norm.scale[:, None]) @ matrix.to(read.dtype).T
        _enter(after, entering, layer)
        stream = after
    return mixed, [*streams, stream]


def _enter(stream: Tensor, entering: Sequence[Enter], layer: int) -> None:
    for number, source in enumerate(entering):
        if layer in source.added:
            stream[number, source.position] += source.added[layer]


def _entered(
    alone: Tensor, place: Tensor, entering: Sequence[Enter], layer: int, direct: Tensor
) -> Float[Tensor, "targets sources"]:
    """``direct`` and what sources that enter after a layer add to it at the targets' own positions."""
    added = direct.clone()
    for number, source in enumerate(entering):
        if layer in source.added:
            added[:, number] += torch.where(place == source.position, alone @ source.added[layer], 0.0)
    return added


def _mixed(held: FrozenLayer, stream: Tensor) -> Float[Tensor, "s pos z"]:
    values = (stream @ held.value.T).view(*stream.shape[:2], held.kv_heads, held.d_head)
    pattern = held.pattern.view(held.kv_heads, -1, *held.pattern.shape[1:])
    return torch.einsum("vgqk,skvd->sqvgd", pattern, values).reshape(*stream.shape[:2], -1)


def _summed(held: FrozenLayer, mixed: Tensor) -> Float[Tensor, "s pos d_model"]:
    return mixed @ held.output.T


def _carried(held: FrozenLayer, G: Tensor, mixed: Tensor) -> Float[Tensor, "t s heads"]:
    """What each head passes on to the gradients at the attention's output, summed over positions."""
    read = (G @ held.output).unflatten(-1, (held.heads, held.d_head))
    return torch.einsum("tqhd,sqhd->tsh", read, mixed.unflatten(-1, (held.heads, held.d_head)))


def _carried_from(
    held: FrozenLayer, alone: Tensor, place: Int64[Tensor, " t"], mixed: Tensor
) -> Float[Tensor, "t s heads"]:
    """The same for gradients at one position each."""
    read = (alone @ held.output).unflatten(-1, (held.heads, held.d_head))
    by_head = mixed.unflatten(-1, (held.heads, held.d_head))[:, place]
    return torch.einsum("thd,sthd->tsh", read, by_head)


def _skipped(sources: Sources, layer: int, G: Tensor) -> Tensor | float:
    """Gradient at what the layer's MLP reads of the stream, through a transcoder's skip connection."""
    matrix = sources.skips(layer)
    return 0.0 if matrix is None else sources.frozen.layers[layer].mlp_norm.pull(G @ matrix.to(G.dtype))


def _skipped_at(sources: Sources, layer: int, alone: Tensor, place: Tensor) -> Tensor | float:
    matrix = sources.skips(layer)
    if matrix is None:
        return 0.0
    return sources.frozen.layers[layer].mlp_norm.pull(alone @ matrix.to(alone.dtype), place)


def _dot(here: Tensor, place: Tensor, rows: Tensor, stream: Tensor) -> Float[Tensor, "targets sources"]:
    """Effects on the targets that read here."""
    return torch.where(here[:, None], torch.einsum("td,std->ts", rows, stream[:, place]), 0.0)


def feature_read(frozen: FrozenPrompt, layer: int, position: int, row: Tensor) -> Read:
    """A feature as a target, from its encoder row."""
    return Read(layer, position, frozen.mlp_input(layer, position, row[None])[0])


def logit_read(frozen: FrozenPrompt, parts: Parts) -> Read:
    """A combination of logits, each less the vocabulary's mean, as a target."""
    row = combined_row(frozen, parts)
    return Read(frozen.n_layers, frozen.n_pos - 1, frozen.final(row[None])[0])
