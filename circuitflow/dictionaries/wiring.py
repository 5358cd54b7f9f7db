"""Which sites the dictionaries that are trained together read and write."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from circuitflow.errors import UserError
from circuitflow.models.sites import bare, in_depth_order


@dataclass(frozen=True)
class Member:
    """One dictionary: the sites it reads and those it writes."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass(frozen=True)
class Wiring:
    """One dictionary, or several in order of depth, each of which writes to its first site and all that follow."""

    members: tuple[Member, ...]

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """Every site that is read, once, in order of depth."""
        return tuple(in_depth_order(site for member in self.members for site in member.reads))

    @cached_property
    def writes(self) -> tuple[str, ...]:
        """Every site that is written, once, in order of depth."""
        return tuple(in_depth_order(site for member in self.members for site in member.writes))

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """What a training needs of every token: the sites read, and after them those written, if they are others."""
        return self.reads if self.same else (*self.reads, *self.writes)

    @property
    def same(self) -> bool:
        """Whether what is read is what is written, as by SAEs and crosscoders."""
        return self.reads == self.writes

    @property
    def name(self) -> str:
        """For people: ``resid.1``, ``mlp_in.3 → mlp.3``, ``mlp_in.0 … mlp_in.5 → mlp.0 … mlp.5``."""
        return _several(self.reads) if self.same else f"{_several(self.reads)} → {_several(self.writes)}"

    @classmethod
    def of(cls, members: Sequence[Sequence[Sequence[str]]]) -> "Wiring":
        """From plain lists, ``[[reads, writes], …]``.

        :raises UserError: sites that no dictionary of this program can read and write together.
        """
        wiring = cls(
            tuple(
                Member(tuple(in_depth_order(reads)), tuple(in_depth_order(writes)))
                for reads, writes in members
            )
        )
        if not wiring.members or not all(each.reads and each.writes for each in wiring.members):
            raise UserError("A dictionary needs at least one site to read and one to write; name them.")
        wiring._check()
        return wiring

    def _check(self) -> None:
        if not self.same and set(self.reads) & set(self.writes):
            raise UserError(
                f"Dictionaries read {', '.join(self.reads)} and write {', '.join(self.writes)}: the two must be the "
                "same sites or have none in common; change the lists."
            )
        starts = [self.writes.index(member.writes[0]) for member in self.members]
        whole = all(
            member.writes == self.writes[start:] for member, start in zip(self.members, starts, strict=True)
        )
        if len(self.members) > 1 and (not whole or starts != list(range(len(self.writes)))):
            raise UserError(
                "In a cross-layer transcoder the dictionary of each layer writes its own layer and all later ones; "
                f"change what is written: {'; '.join(', '.join(member.writes) for member in self.members)}."
            )


def one_site(site: str) -> Wiring:
    """That of an SAE."""
    return Wiring((Member((site,), (site,)),))


def transcoder(layer: int) -> list[list[list[str]]]:
    """A layer's transcoder, as plain lists."""
    return [[[f"mlp_in.{layer}"], [f"mlp.{layer}"]]]


def cross_layer(layers: Sequence[int]) -> list[list[list[str]]]:
    """A cross-layer transcoder of these layers, as plain lists."""
    ordered = sorted(layers)
    writes = [f"mlp.{layer}" for layer in ordered]
    return [[[f"mlp_in.{layer}"], writes[m:]] for m, layer in enumerate(ordered)]


def crosscoder(sites: Sequence[str]) -> list[list[list[str]]]:
    """A crosscoder of these sites, as plain lists."""
    return [[in_depth_order(sites)] * 2]


def _several(sites: Sequence[str]) -> str:
    if len(sites) < 4:
        return ", ".join(sites)
    return f"{sites[0]} … {sites[-1]}" if bare(sites[0]) == sites[0] else ", ".join(sites)
