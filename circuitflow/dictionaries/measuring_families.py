"""The stage ``measure_family``: dictionaries that span sites on held-out text, by themselves and inside the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from circuitflow.dictionaries.codes import Codes, empty_codes
from circuitflow.dictionaries.family import Family, load_family, read_by, site_width
from circuitflow.dictionaries.measuring import held_out_batches
from circuitflow.dictionaries.quality import HIGH_FREQUENCY, Draws, Sums, intervals, ratio
from circuitflow.dictionaries.replacing import CONVENTIONS, Replacements
from circuitflow.dictionaries.rows import SiteRows, open_sites, read_together
from circuitflow.jobs import Output, progress
from circuitflow.models.loading import load_model
from circuitflow.models.sites import depth_order, parse_site
from circuitflow.store.tables import write_table

CHUNK_ROWS = 2048  # of every site at once: fixed, so that sums do not depend on a setting
NONE = float("nan")
OF_SITE = ("fvu", "cosine", "norm_ratio")

MEANINGS = {
    "fvu": "Σ‖y − ŷ‖² / Σ‖y − ȳ‖² at the site that is written, with the mean over the same tokens",
    "l0": "active features of the member that reads the site named",
    "dead_share": "features that had not fired for dead_after tokens at the end of training",
    "silent_share": "features active in no held-out token",
    "high_frequency_share": f"features active in more than {HIGH_FREQUENCY:g} of held-out tokens",
    "kept": "tokens that are outliers at none of the sites read or written",
    "interval": "95 % bootstrap over held-out blocks, drawn with replacement",
}


class Line(NamedTuple):
    """One row of the table."""

    quantity: str
    site: str
    """A site written, the sites read (with ``+`` between several), or "all" sites at once."""
    tokens: str
    """"kept", "all", or "weights"."""
    value: float
    n: int
    ci_low: float = NONE
    ci_high: float = NONE


def measure_family(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Measure transcoders, a cross-layer transcoder or a crosscoder on held-out blocks.

    Inputs ``dictionaries`` (manifests), ``activations`` (all sites), ``corpus`` and ``model``; params ``blocks``
    (held-out blocks the model runs on), ``batch_blocks``, ``bootstrap``, ``seed``, ``dtype``, ``compute``. Output
    ``quality``, a table with columns quantity, site, tokens, value, n (tokens, or features), ci_low and ci_high.
    Predictions are measured
    with one site replaced at a time and, where each is written after it is read (transcoders), with all at once;
    not at sites of two models (``base:resid.12``).

    :raises UserError: a file is missing, or does not fit the model.
    """
    family = load_family(_paths(inputs["dictionaries"])).to(params["compute"]["device"])
    sites = list(dict.fromkeys([*family.reads, *family.writes]))
    quality = _measure(family, open_sites(inputs["activations"], sites))
    lines = quality.lines(params["bootstrap"], params["seed"])
    if not any(":" in site for site in sites):
        lines += _replacement_lines(family, inputs, params)
    columns = {name: [getattr(line, name) for line in lines] for name in Line._fields}
    write_table(out.files["quality"], columns, {**out.provenance, "conventions": {**CONVENTIONS, **MEANINGS}})


@dataclass
class FamilyQuality:
    """Sums over held-out vectors, by block of text."""

    family: Family
    blocks: int
    sums: dict[tuple[str, str], Sums] = field(init=False)
    """By site written and tokens."""
    active: Float[Tensor, "members blocks"] = field(init=False)
    kept: Float[Tensor, " blocks"] = field(init=False)
    fired: list[Int64[Tensor, " d_dict"]] = field(init=False)
    biases: dict[str, Float[Tensor, " d"]] = field(init=False)
    """b_dec of each site written: near the mean there."""

    def __post_init__(self) -> None:
        family = self.family
        self.sums = {
            (site, tokens): Sums(self.blocks) for site in family.writes for tokens in ("kept", "all")
        }
        self.active = torch.zeros(len(family.members), self.blocks, dtype=torch.float64)
        self.kept = torch.zeros(self.blocks, dtype=torch.float64)
        self.fired = [torch.zeros(member.d_dict, dtype=torch.int64) for member in family.members]
        like, width = family.members[0].W_dec, site_width(family.members[0])
        zeros = {site: like.new_zeros(1, width) for site in family.reads}
        nothing = [empty_codes(1, member.d_dict, like) for member in family.members]
        self.biases = {site: row[0] for site, row in family.reconstruct(nothing, zeros).items()}

    def add(
        self,
        x: Mapping[str, Float[Tensor, "n d"]],
        positions: Int64[Tensor, " n"],
        blocks: Int64[Tensor, " n"],
    ) -> None:
        """Encode and reconstruct vectors of all sites and add what comes of it."""
        codes = self.family.encode(x, positions)
        made = self.family.reconstruct(codes, x)
        kept = kept_tokens(self.family, x, positions)
        none = torch.zeros_like(blocks)
        for site, decoded in made.items():
            center = self.biases[site]
            self.sums[site, "all"].add(x[site], decoded, none, center, blocks)
            if bool(kept.any()):
                self.sums[site, "kept"].add(x[site][kept], decoded[kept], none[kept], center, blocks[kept])
        self._count(codes, kept, blocks)

    def _count(self, codes: Sequence[Codes], kept: Bool[Tensor, " n"], blocks: Int64[Tensor, " n"]) -> None:
        at = blocks[kept].cpu()
        self.kept.index_add_(0, at, torch.ones(len(at), dtype=torch.float64))
        for number, own in enumerate(codes):
            self.active[number].index_add_(0, at, own.counts()[kept].double().cpu())
            among = own.take(kept.nonzero()[:, 0])
            self.fired[number] += torch.bincount(among.features, minlength=own.d_dict).cpu()

    def lines(self, draws: int, seed: int) -> list[Line]:
        """Rows of the table."""
        found = []
        for (site, tokens), sums in self.sums.items():
            bounds = intervals(self.blocks, draws, seed, sums.drawn)
            values = sums.values()
            found += [
                Line(name, site, tokens, values[name], sums.n, *bounds[name])
                for name in OF_SITE
                if name in values
            ]
        n = int(self.kept.sum())
        for number, member in enumerate(self.family.members):
            bounds = intervals(self.blocks, draws, seed, lambda drawn, m=number: self._l0(drawn, m))  # type: ignore[misc]
            name, rates = "+".join(member.reads), self.fired[number].double() / max(1, n)
            found += [
                Line("l0", name, "kept", float(self.active[number].sum() / max(1, n)), n, *bounds["l0"]),
                Line("silent_share", name, "kept", float((rates == 0).double().mean()), n),
                Line(
                    "high_frequency_share", name, "kept", float((rates > HIGH_FREQUENCY).double().mean()), n
                ),
                Line(
                    "dead_share", name, "weights", float(member.notes.get("dead_share", NONE)), member.d_dict
                ),
            ]
        return found

    def _l0(self, draws: Draws, member: int) -> dict[str, np.ndarray]:
        return {"l0": ratio(draws @ self.active[member].numpy(), draws @ self.kept.numpy())}


def kept_tokens(
    family: Family, x: Mapping[str, Float[Tensor, "n d"]], positions: Int64[Tensor, " n"]
) -> Bool[Tensor, " n"]:
    """Tokens that no member skips and that are no outliers at the sites written, by the limits of their training."""
    skipped = torch.zeros(len(positions), dtype=torch.bool, device=positions.device)
    for member in family.members:
        skipped |= member.skip.mask(read_by(member, x), positions)
        limits = member.notes.get("max_norm")
        by_site = limits if isinstance(limits, Mapping) else {}
        for site in member.writes:
            if by_site.get(site) is not None:
                skipped |= x[site].norm(dim=1) > by_site[site]
    return ~skipped


def _paths(given: Any) -> list[Path]:
    return list(given) if isinstance(given, list | tuple) else [Path(given)]


def _measure(family: Family, rows: Sequence[SiteRows]) -> FamilyQuality:
    first = rows[0]
    held_out, device = first.held_out_blocks, family.members[0].W_dec.device
    quality, total, done = FamilyQuality(family, len(held_out)), int(first.held_out.sum()), 0
    for index, vectors in read_together(rows, first.held_out, device=device, chunk_rows=CHUNK_ROWS):
        block = torch.from_numpy(np.searchsorted(held_out, index.numpy() // first.block))
        x = {one.site: part for one, part in zip(rows, vectors, strict=True)}
        quality.add(x, (index % first.block).to(device), block.to(device))
        done += len(index)
        progress("held-out tokens", done, total)
    return quality


def _replacement_lines(family: Family, inputs: Mapping[str, Any], params: Mapping[str, Any]) -> list[Line]:
    lm = load_model(inputs["model"], params["dtype"], params["compute"]["device"])
    replacements = Replacements(family, together=_in_order(family))
    batches = held_out_batches(inputs["corpus"], params["blocks"], params["batch_blocks"])
    total = sum(len(batch) for batch in batches)
    for batch in batches:
        with torch.no_grad():
            replacements.add(lm, batch.to(lm.device, torch.int64))
        progress("blocks through the model", len(next(iter(replacements.splices.values())).sums), total)
    lines = []
    for site, splice in replacements.splices.items():
        bounds = intervals(len(splice.sums), params["bootstrap"], params["seed"], splice.drawn)
        lines += [
            Line(name, site, "all", value, splice.tokens, *bounds[name])
            for name, value in splice.values().items()
        ]
    return lines


def _in_order(family: Family) -> bool:
    """Whether every member has read all it reads before anything is written that it writes."""
    return all(
        max(depth_order(parse_site(site)) for site in member.reads)
        < min(depth_order(parse_site(site)) for site in member.writes)
        for member in family.members
    )
