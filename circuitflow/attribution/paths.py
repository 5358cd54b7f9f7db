"""Which sites affect which without passing through another site of the run: the shape of a circuit's edges.

The general rule of edges is that the gradient stops at the outputs of exactly those sites between the two ends that are
in the run's list (sparse feature circuits, Marks et al. 2024, "residual double-counting correction", for any list of
sites). Two sites are neighbours if a path joins them that passes no third one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from circuitflow.models.sites import Site, parse_site

METRIC_SITE = "metric"
"""The end of every path; written where a downstream site's name stands."""


@dataclass(frozen=True)
class Blocks:
    """What decides the paths of a model: its depth, and whether attention and MLP stand side by side."""

    layers: int
    parallel: bool = False


def neighbours(sites: Sequence[str], blocks: Blocks) -> dict[str, list[str]]:
    """For every site, and for the metric, the sites whose effect reaches it without passing another one.

    Keys and values in order of depth, the metric last. Sites that nothing of the run reaches have empty lists.
    """
    listed = {parse_site(site) for site in sites}
    targets: list[Site | None] = [*sorted(listed), None]
    found: dict[str, list[str]] = {}
    for target in targets:
        reached, _ = _upstream(target, listed, blocks)
        found[METRIC_SITE if target is None else str(target)] = [str(site) for site in sorted(reached)]
    return found


def possible_neighbours(sites: Sequence[str]) -> dict[str, list[str]]:
    """The neighbours in a model of unknown build: those in sequential blocks, of which parallel ones have a part.

    The metric's are those of a model that ends with the deepest block of the list.
    """
    deepest = max((parse_site(site).layer or 0 for site in sites), default=0)
    return neighbours(sites, Blocks(deepest + 1))


def is_direct(down: str, sites: Sequence[str], blocks: Blocks) -> bool:
    """Whether everything that reaches ``down`` without passing another site is just added to the residual stream.

    Then ∂(down)/∂(up) is the identity for each of its neighbours and its edges have a closed form.
    """
    _, computed = _upstream(parse_site(down), {parse_site(site) for site in sites}, blocks)
    return not computed


def begin(down: str, sites: Sequence[str]) -> str | None:
    """The deepest full cut of the list before ``down`` (embed or a block's output), from which its paths can be run.

    None if there is none: then the pass starts from the tokens.
    """
    end = None if down == METRIC_SITE else parse_site(down)
    cuts = [parse_site(site) for site in sites if parse_site(site).kind in ("embed", "resid")]
    before = [site for site in cuts if end is None or site < end]
    return str(max(before)) if before else None


def _upstream(target: Site | None, listed: set[Site], blocks: Blocks) -> tuple[set[Site], bool]:
    """Sites of the list that reach ``target`` first, and whether any way there leads through a sublayer."""
    reached: set[Site] = set()
    computed = False
    seen: set[Site] = set()
    waiting = [target]
    while waiting:
        for site, added in _read_by(waiting.pop(), blocks):
            computed |= not added
            if site in listed:
                reached.add(site)
            elif site not in seen:
                seen.add(site)
                waiting.append(site)
    return reached, computed


def _read_by(site: Site | None, blocks: Blocks) -> list[tuple[Site, bool]]:
    """The places that a place is computed from, and whether they are only added up there."""
    if site is None:
        return [(Site("resid", blocks.layers - 1), False)]
    if site.layer is None:
        return []
    layer = site.layer
    stream = Site("embed") if layer == 0 else Site("resid", layer - 1)
    middle = stream if blocks.parallel else Site("resid_mid", layer)
    attn, mlp = Site("attn", layer), Site("mlp", layer)
    sources = {
        "z": [(stream, False)],
        "attn": [(Site("z", layer), False)],
        "resid_mid": [(stream, True), (attn, True)],
        "mlp_in": [(middle, False)],
        "mlp": [(Site("mlp_in", layer), False)],
        "resid": [(middle, True), (mlp, True), *([(attn, True)] if blocks.parallel else [])],
    }
    return sources[site.kind]
