"""Sites: the places in a model where a vector of known width lives, and their order of computation."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import total_ordering

from circuitflow.errors import UserError, nearest

WITHIN_BLOCK = ("z", "attn", "resid_mid", "mlp_in", "mlp", "resid")
"""Kinds of site that every block has, in the order of computation."""

KINDS = ("embed", *WITHIN_BLOCK)


@total_ordering
@dataclass(frozen=True)
class Site:
    """One place in a model; prints as ``embed`` or ``resid.12``, and sorts by depth.

    ===========  ===================================================================================
    embed        input of the first block (after position embeddings or scaling)
    z.L          input of the attention output projection, width n_heads · d_head
    attn.L       what attention adds to the residual stream, after any post-norm
    resid_mid.L  residual stream between the sublayers (not in parallel blocks)
    mlp_in.L     what the MLP reads, after the norm and its weight
    mlp.L        what the MLP adds to the residual stream, after any post-norm
    resid.L      output of the block
    ===========  ===================================================================================
    """

    kind: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"{self.kind}.{self.layer}"

    def __lt__(self, other: "Site") -> bool:
        return depth_order(self) < depth_order(other)


def parse_site(text: str) -> Site:
    """Read a site's name.

    :raises UserError: the text names no site.
    """
    kind, dot, layer = text.partition(".")
    if kind not in KINDS:
        raise UserError(f"Site '{text}' has an unknown kind '{kind}': {nearest(kind, KINDS)}.")
    if kind == "embed":
        if dot:
            raise UserError(f"Site '{text}' names a layer, but a model has one embedding; write 'embed'.")
        return Site(kind)
    if not (layer.isascii() and layer.isdecimal()) or str(int(layer)) != layer:
        raise UserError(f"Site '{text}' needs a layer, counted from 0; write for example '{kind}.0'.")
    return Site(kind, int(layer))


def layer_of(site: str) -> int:
    """The layer of a site that has one.

    :raises UserError: the text names no site, or one without a layer.
    """
    layer = parse_site(site).layer
    if layer is None:
        raise UserError(f"Site '{site}' has no layer; name one that has, like mlp_in.3.")
    return layer


def depth_order(site: Site) -> tuple[int, int]:
    """Key that sorts sites in the order in which a model computes them."""
    return (-1, 0) if site.layer is None else (site.layer, WITHIN_BLOCK.index(site.kind))


def bare(site: str) -> str:
    """A site without the name of its model: ``resid.12`` for ``tuned:resid.12``."""
    return site.rpartition(":")[2]


def depth(site: str) -> tuple[int, int]:
    """Key that sorts sites by depth, those of another model (``tuned:resid.12``) as their own namesakes."""
    return depth_order(parse_site(bare(site)))


def in_depth_order(sites: Iterable[str]) -> list[str]:
    """Different sites, or sets of sites joined by ``+``, by depth; of one depth the first mentioned comes first."""
    return sorted(dict.fromkeys(map(str, sites)), key=lambda name: [depth(site) for site in name.split("+")])
