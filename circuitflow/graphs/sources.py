"""What writes into the stream of one prompt: active features, what dictionaries leave over, and biases."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from circuitflow.dictionaries.codes import Codes
from circuitflow.dictionaries.family import Family
from circuitflow.errors import UserError
from circuitflow.models.frozen import FrozenPrompt
from circuitflow.models.sites import layer_of, parse_site


class Written(NamedTuple):
    """What features write at one layer."""

    columns: Int64[Tensor, " n"]
    """Their columns, ascending: first by position, so those of a position follow each other."""
    directions: Float[Tensor, "n d_model"]
    """Activation × decoder row."""
    bounds: list[int]
    """(n_pos + 1): where the columns of each position begin here."""


@dataclass(frozen=True)
class Sources:
    """Features, errors and tokens of one prompt.

    Features are numbered by layer read, position, feature. While rows are computed their columns stand in another
    order, by position first, so that what is written at one place is a block whatever the dictionaries.
    """

    frozen: FrozenPrompt
    family: Family
    layers: tuple[int, ...]
    """Layer that each member reads."""
    features: Int64[Tensor, "n 3"]
    """Layer, position, feature."""
    members: Int64[Tensor, " n"]
    """Member of the family that each feature belongs to."""
    activations: Float[Tensor, " n"]
    errors: Float[Tensor, "layers pos d_model"]
    """MLP output − reconstruction, with b_dec and skip connection; the whole output where no dictionary writes."""
    constants: Float[Tensor, "layers d_model"]
    """What dictionaries write whatever they read: b_dec, and the skip connection's of the norm's bias."""

    @classmethod
    def of(cls, frozen: FrozenPrompt, family: Family) -> "Sources":
        """Encode the prompt.

        :raises UserError: a dictionary is no transcoder of this model's MLPs.
        """
        layers = tuple(_layer_read(family, member, frozen.n_layers) for member in range(len(family.members)))
        if len(set(layers)) < len(layers):
            raise UserError("Two transcoders read the same layer; name one for each layer.")
        x = {f"mlp_in.{layer}": frozen.sites[f"mlp_in.{layer}"] for layer in layers}
        positions = torch.arange(frozen.n_pos, device=frozen.embed.device)
        codes = family.encode(x, positions) if layers else ()
        errors = torch.stack([frozen.sites[f"mlp.{layer}"] for layer in range(frozen.n_layers)])
        for site, written in (family.reconstruct(codes, x) if layers else {}).items():
            errors[layer_of(site)] -= written
        return cls(
            frozen,
            family,
            layers,
            *_listed(codes, layers, frozen.embed),
            errors=errors,
            constants=_constants(frozen, family, layers),
        )

    @property
    def n_features(self) -> int:
        """Active features."""
        return len(self.features)

    @cached_property
    def order(self) -> Int64[Tensor, " n"]:
        """Feature of each column: by position, layer, feature."""
        position = self.features[:, 1]
        return torch.argsort(position, stable=True)

    def skips(self, layer: int) -> Float[Tensor, "d_model d_model"] | None:
        """Skip connection of the transcoder that reads this layer, if it has one: mlp.L gets W_skip·x."""
        if layer not in self.layers:
            return None
        return self.family.members[self.layers.index(layer)].W_skip

    def skipped(self) -> list[list[int]]:
        """Layers and positions that a dictionary's outlier rule leaves out: errors alone."""
        positions = torch.arange(self.frozen.n_pos, device=self.errors.device)
        found = []
        for member, layer in zip(self.family.members, self.layers, strict=True):
            out = member.skip.mask(self.frozen.sites[f"mlp_in.{layer}"], positions)
            found += [[layer, position] for position in out.nonzero()[:, 0].tolist()]
        return sorted(found)

    def encoder(self, features: Int64[Tensor, " n"]) -> Float[Tensor, "n d_model"]:
        """Encoder row of each feature."""
        rows = self.errors.new_empty(len(features), self.errors.shape[2])
        for member, which in self._by_member(features):
            rows[which] = self._weights(member, "W_enc")[self.features[features[which], 2]]
        return rows

    def encoder_bias(self, features: Int64[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Encoder bias of each feature."""
        found = self.errors.new_empty(len(features))
        for member, which in self._by_member(features):
            found[which] = self._weights(member, "b_enc")[self.features[features[which], 2]]
        return found

    @cached_property
    def written(self) -> tuple[Written, ...]:
        """What features write at the MLP output of each layer."""
        return tuple(map(self._written_at, range(self.frozen.n_layers)))

    def _written_at(self, layer: int) -> Written:
        site = f"mlp.{layer}"
        writers = [m for m, member in enumerate(self.family.members) if site in member.writes]
        ordered = self.members[self.order]
        columns = torch.isin(ordered, torch.tensor(writers, device=ordered.device)).nonzero()[:, 0]
        features = self.order[columns]
        directions = self.errors.new_empty(len(columns), self.errors.shape[2])
        for member in writers:
            which = (self.members[features] == member).nonzero()[:, 0]
            rows = self.family.decoder(member, site)[self.features[features[which], 2]]
            directions[which] = rows.to(directions.dtype)
        directions *= self.activations[features, None]
        positions = self.features[features, 1].contiguous()
        ends = torch.arange(self.frozen.n_pos + 1, device=positions.device)
        return Written(columns, directions, torch.searchsorted(positions, ends).tolist())

    def _by_member(self, features: Int64[Tensor, " n"]) -> list[tuple[int, Tensor]]:
        of = self.members[features]
        return [(member, (of == member).nonzero()[:, 0]) for member in of.unique().tolist()]

    def _weights(self, member: int, name: str) -> Tensor:
        found: Tensor = getattr(self.family.members[member], name)
        return found


def _listed(
    codes: Sequence[Codes], layers: Sequence[int], like: Tensor
) -> tuple[Int64[Tensor, "n 3"], Int64[Tensor, " n"], Float[Tensor, " n"]]:
    """Features, their members and their activations, by layer, position, feature."""
    features, members, values = (
        [like.new_empty(0, 3, dtype=torch.int64)],
        [like.new_empty(0, dtype=torch.int64)],
        [like[:0, 0]],
    )
    for member in sorted(range(len(layers)), key=layers.__getitem__):
        found = codes[member]
        layer = torch.full_like(found.features, layers[member])
        features.append(torch.stack([layer, found.rows(), found.features], dim=1))
        members.append(torch.full_like(found.features, member))
        values.append(found.values.to(like.dtype))
    return torch.cat(features), torch.cat(members), torch.cat(values)


def _constants(
    frozen: FrozenPrompt, family: Family, layers: Sequence[int]
) -> Float[Tensor, "layers d_model"]:
    constants = frozen.embed.new_zeros(frozen.n_layers, frozen.embed.shape[1])
    for member, layer in zip(family.members, layers, strict=True):
        constant = member.b_dec.to(constants.dtype)
        bias = frozen.layers[layer].mlp_norm.bias
        if member.W_skip is not None and bias is not None:
            constant = constant + member.W_skip.to(constants.dtype) @ bias
        for site, part in zip(member.writes, constant.view(len(member.writes), -1), strict=True):
            constants[layer_of(site)] += part
    return constants


def _layer_read(family: Family, number: int, n_layers: int) -> int:
    """The layer that a transcoder reads.

    :raises UserError: it reads or writes something else than MLPs of this model do, or has no encoder.
    """
    member = family.members[number]
    told = f"A dictionary that reads {', '.join(member.reads)} and writes {', '.join(member.writes)}"
    reads, writes = [parse_site(site) for site in member.reads], [parse_site(site) for site in member.writes]
    layer = reads[0].layer if len(reads) == 1 and reads[0].kind == "mlp_in" else None
    if layer is None or not all(site.kind == "mlp" and (site.layer or 0) >= layer for site in writes):
        raise UserError(f"{told} is no transcoder; attribution graphs need mlp_in.L → mlp.L, mlp.L+1 …")
    if max(site.layer or 0 for site in writes) >= n_layers:
        raise UserError(f"{told} is beyond the model's {n_layers} layers; use transcoders of this model.")
    if member.W_enc is None:
        raise UserError(f"{told} has no encoder, only a decoder; attribution graphs need active features.")
    if member.W_skip is not None and member.writes != (f"mlp.{layer}",):
        raise UserError(f"{told} has a skip connection to several layers, which graphs cannot follow.")
    return layer
