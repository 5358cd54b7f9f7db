"""Several dictionaries that reconstruct together: transcoders of many layers, a cross-layer transcoder, a crosscoder.

Each member reads and writes sites of its own; what several members write to one site adds up there.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from circuitflow.dictionaries.codes import Codes
from circuitflow.dictionaries.dictionary import WEIGHTS_FILE, Dictionary, load_dictionary, save_dictionary
from circuitflow.errors import UserError, nearest
from circuitflow.models.sites import depth, in_depth_order
from circuitflow.store.objects import read_manifest

MEMBER = re.compile(r"member_(\d+)\.safetensors")


@dataclass(frozen=True)
class Family:
    """Dictionaries in order of depth of what they read: ŷ_s = Σ over members that write s of Σ_i f_i·W_dec[i, s].

    Member ``m`` reads the concatenation of its ``reads``, all of one width; its ``W_dec`` and ``b_dec`` are the
    concatenation of its ``writes``, likewise.
    """

    members: tuple[Dictionary, ...]

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """Every site that a member reads, once, in order of depth."""
        return tuple(in_depth_order(site for member in self.members for site in member.reads))

    @cached_property
    def writes(self) -> tuple[str, ...]:
        """Every site that a member writes, once, in order of depth."""
        return tuple(in_depth_order(site for member in self.members for site in member.writes))

    def encode(
        self, x: Mapping[str, Float[Tensor, "n d"]], positions: Int64[Tensor, " n"]
    ) -> tuple[Codes, ...]:
        """Active features of every member at each of ``n`` tokens.

        :param x: vectors at the sites that are read, in raw units.
        :param positions: of each token within its prompt or block.
        :raises UserError: a member has no encoder, or is of another width than its vectors.
        """
        return tuple(member.encode(read_by(member, x), positions) for member in self.members)

    def reconstruct(
        self, codes: Sequence[Codes], x: Mapping[str, Float[Tensor, "n d"]] | None = None
    ) -> dict[str, Float[Tensor, "n d"]]:
        """What the members write to each site together, biases and skip connections included.

        :param x: the vectors that were encoded; needed by skip connections alone.
        :raises ValueError: there is a skip connection and no ``x``, or not one set of codes a member.
        """
        found: dict[str, Tensor] = {}
        for member, own in zip(self.members, codes, strict=True):
            add_written(found, member, own, x)
        return {site: found[site] for site in self.writes}

    def decoder(self, member: int, site: str) -> Float[Tensor, "d_dict d"]:
        """Decoder rows of one member at one of the sites that it writes: a view of its ``W_dec``.

        :raises ValueError: it does not write that site.
        """
        of = self.members[member]
        if site not in of.writes:
            raise ValueError(f"member {member} writes {', '.join(of.writes)}, not {site}")
        width, at = site_width(of), of.writes.index(site)
        return of.W_dec[:, at * width : (at + 1) * width]

    def to(self, target: torch.device | str | torch.dtype) -> "Family":
        """The family on another device or in another floating-point type."""
        return Family(tuple(member.to(target) for member in self.members))


def site_width(dictionary: Dictionary) -> int:
    """Width of each of the sites that a dictionary writes."""
    return dictionary.d_model // len(dictionary.writes)


def read_by(dictionary: Dictionary, x: Mapping[str, Float[Tensor, "n d"]]) -> Float[Tensor, "n d_in"]:
    """The vectors that a dictionary reads, side by side.

    :raises UserError: the vectors of a site that it reads are not there.
    """
    for site in dictionary.reads:
        if site not in x:
            raise UserError(f"Vectors at {site} are needed to encode; {nearest(site, list(x))}.")
    if len(dictionary.reads) == 1:
        return x[dictionary.reads[0]]
    return torch.cat([x[site] for site in dictionary.reads], dim=1)


def add_written(
    found: dict[str, Tensor],
    dictionary: Dictionary,
    codes: Codes,
    x: Mapping[str, Float[Tensor, "n d"]] | None = None,
) -> None:
    """Add what a dictionary writes to each of its sites, bias and skip connection included, to what is there so far.

    :param x: the vectors that were encoded; needed by a skip connection alone.
    :raises ValueError: there is a skip connection and no ``x``.
    """
    given = None if x is None or dictionary.W_skip is None else read_by(dictionary, x)
    decoded = dictionary.decode(codes, given)
    for site, part in zip(dictionary.writes, decoded.split(site_width(dictionary), dim=1), strict=True):
        found[site] = found[site] + part if site in found else part


def load_family(paths: Sequence[Path]) -> Family:
    """Read a family from manifests, of one member or of several, or straight from safetensors files.

    :raises UserError: no path, a file is missing or damaged, or the members cannot be one family.
    """
    if not paths:
        raise UserError("No dictionary was named; name at least one manifest or safetensors file.")
    files = [(path, file) for path in paths for file in member_files(Path(path))]
    return family_of([(str(path), load_dictionary(file)) for path, file in files])


def family_of(named: Sequence[tuple[str, Dictionary]]) -> Family:
    """A family of dictionaries, each with the file that it is from, in order of depth.

    :raises UserError: two read the same sites, or write one site in different widths.
    """
    ordered = sorted(named, key=lambda one: tuple(map(depth, one[1].reads)))
    files: dict[tuple[str, ...], str] = {}
    widths: dict[str, int] = {}
    for file, member in ordered:
        if member.reads in files:
            raise UserError(
                f"{files[member.reads]} and {file} both read {', '.join(member.reads)}: what they write would add up; "
                "name one dictionary for each site."
            )
        files[member.reads] = file
        for site in member.writes:
            if widths.setdefault(site, site_width(member)) != site_width(member):
                raise UserError(
                    f"Dictionaries write {site} in widths {widths[site]} and {site_width(member)}; use dictionaries "
                    "of one model."
                )
    return Family(tuple(member for _, member in ordered))


def member_files(path: Path) -> list[Path]:
    """The weights behind a manifest, one file a member, or the safetensors file itself.

    :raises UserError: the manifest is of something else, or its files are gone.
    """
    if path.suffix != ".json":
        return [path]
    folder = read_manifest(path, kind="dictionary").folder(path)
    found = {int(match[1]): file for file in folder.iterdir() if (match := MEMBER.fullmatch(file.name))}
    return [found[number] for number in sorted(found)] or [folder / WEIGHTS_FILE]


def save_family(folder: Path, family: Family) -> None:
    """Write ``weights.safetensors`` of a single member, or ``member_0.safetensors`` and so on."""
    single = len(family.members) == 1
    for number, member in enumerate(family.members):
        save_dictionary(folder / (WEIGHTS_FILE if single else f"member_{number}.safetensors"), member)
