"""What a model loses when MLPs are replaced by transcoders, or sites by what a crosscoder makes of them.

The other parts of the model run as they are: attention sees the changed stream, its patterns are its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.dictionaries.family import Family, add_written, read_by
from circuitflow.dictionaries.splicing import Splice, compared, run_with, wanted
from circuitflow.models.running import Change, LanguageModel, run
from circuitflow.models.sites import parse_site

ALL = "all"
"""Name of the splice of all sites at once."""

CONVENTIONS = {
    "replaced": "the vectors at the site named are replaced by their reconstruction, those at the other sites are the "
    "model's own; all: those of every site at once, each member reading the stream as it is then",
    "ce_zero": "the vectors at the same places are zeros",
    "kept_as_error_share": "tokens that the outlier rule of what writes there first skips keep their own vector, both "
    "when the others are reconstructions and when they are zeros",
}


def by_token(value: Float[Tensor, "batch pos d"]) -> Float[Tensor, "n d"]:
    """Vectors of all tokens in one list."""
    return value.flatten(0, 1)


def owner(family: Family, site: str) -> Dictionary:
    """The member whose outlier rule counts at a site: the one that writes there first, or one that writes there."""
    writing = [member for member in family.members if site in member.writes]
    return next((member for member in writing if member.writes[0] == site), writing[0])


@dataclass
class Replacements:
    """Splices by site, and of all sites at once where every site is written after it is read."""

    family: Family
    together: bool
    splices: dict[str, Splice] = field(init=False)

    def __post_init__(self) -> None:
        names = [*self.family.writes, *([ALL] if self.together else [])]
        self.splices = {name: Splice() for name in names}

    def add(self, lm: LanguageModel, tokens: Int64[Tensor, "batch pos"]) -> None:
        """Run the model as it is and, for each site and for all, with reconstructions and with zeros."""
        family, mask = self.family, torch.ones_like(tokens, dtype=torch.bool)
        before = [name for site in family.writes if (name := _before(site)) is not None]
        sites = list(dict.fromkeys([*family.reads, *family.writes, *before]))
        plain = run(lm, tokens, mask, capture=sites, stop_at=f"resid.{lm.n_layers - 1}")
        end, dtype = wanted(plain.last), family.members[0].W_dec.dtype
        x = {site: by_token(plain.sites[site]).to(dtype) for site in family.reads}
        positions = torch.arange(tokens.shape[1], device=lm.device).repeat(len(tokens))
        made = family.reconstruct(family.encode(x, positions), x)
        replaced: dict[str, Tensor] = {}
        for site in family.writes:
            own, first = plain.sites[site], owner(family, site)
            replaced[site] = ~first.skip.mask(read_by(first, x), positions).view(*tokens.shape, 1)
            value = made[site].view_as(own).to(own.dtype)
            ends = [
                _end(lm, tokens, mask, site, torch.where(replaced[site], new, own), plain.sites)
                for new in (value, torch.zeros_like(own))
            ]
            self._count(lm, tokens, site, [end, *ends], [replaced[site]])
        if self.together:
            both = [all_replaced(lm, family, tokens, zero=zero) for zero in (False, True)]
            self._count(lm, tokens, ALL, [end, *both], list(replaced.values()))

    def _count(
        self,
        lm: LanguageModel,
        tokens: Int64[Tensor, "batch pos"],
        name: str,
        ends: Sequence[Float[Tensor, "batch pos d_model"]],
        replaced: Sequence[Bool[Tensor, "batch pos 1"]],
    ) -> None:
        for block, each in enumerate(tokens):
            kept = sum(float((~one[block]).sum()) for one in replaced)
            counts = {"skipped": kept, "positions": float(len(replaced) * each.numel())}
            plain, new, zero = (end[block] for end in ends)
            self.splices[name].sums.append({**counts, **compared(lm, each, plain, new, zero)})


def all_replaced(
    lm: LanguageModel, family: Family, tokens: Int64[Tensor, "batch pos"], zero: bool = False
) -> Float[Tensor, "batch pos d_model"]:
    """The last block's output with all written sites replaced, every member reading the stream as it then is.

    :param zero: by zeros instead of reconstructions.
    """
    positions = torch.arange(tokens.shape[1], device=lm.device).repeat(len(tokens))
    x: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}
    encoded: set[int] = set()

    def record(site: str) -> Change:
        def change(value: Tensor) -> Tensor:
            x[site] = by_token(value).to(family.members[0].W_dec.dtype)
            for m, member in enumerate(family.members):
                if m not in encoded and all(name in x for name in member.reads):
                    encoded.add(m)
                    add_written(made, member, member.encode(read_by(member, x), positions), x)
            return value

        return change

    def replace(site: str) -> Change:
        def change(value: Tensor) -> Tensor:
            member = owner(family, site)
            skipped = member.skip.mask(read_by(member, x), positions).view(*tokens.shape, 1)
            new = torch.zeros_like(value) if zero else made[site].view_as(value).to(value)
            return torch.where(skipped, value, new)

        return change

    changes = {site: record(site) for site in family.reads} | {site: replace(site) for site in family.writes}
    return wanted(run(lm, tokens, torch.ones_like(tokens, dtype=torch.bool), replace=changes).last)


def _before(site: str) -> str | None:
    """The block output from which a pass that changes this site can start; None if it has to start at the tokens."""
    parsed = parse_site(site)
    if parsed.kind in ("embed", "resid") or not parsed.layer:
        return None
    return f"resid.{parsed.layer - 1}"


def _end(
    lm: LanguageModel, tokens: Tensor, mask: Tensor, site: str, value: Tensor, captured: Mapping[str, Tensor]
) -> Tensor:
    """The last block's output with a value at a site and all before it as captured."""
    before = _before(site)
    if before is None:
        return run_with(lm, tokens, mask, site, value)
    start = before, captured[before]
    return wanted(run(lm, tokens, mask, replace={site: lambda _: value}, start=start).last)
