"""Which sites affect which without passing through another site of the run: the shape of a circuit's edges.

The general rule of edges is that the gradient stops at the outputs of exactly those sites between the two ends that are
in the run's list (sparse feature circuits, Marks et al. 2024, "residual double-counting correction", for any list of
sites). Two sites are neighbours if a path joins them that passes no third one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

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


class Way(IntEnum):
    """What the paths from a site's neighbours to it lead through, at most."""

    ADDED = 0
    """All that arrives is just added up: ∂(down)/∂(up) is the identity, and edges have a closed form."""
    BY_TOKEN = 1
    """Norms and MLPs, each token for itself: nodes that are active at different tokens can share a product."""
    MIXING = 2
    """Attention: only nodes that are active in different pairs can."""


def way_into(down: str, sites: Sequence[str], blocks: Blocks) -> Way:
    """What everything that reaches ``down`` without passing another site of the list has passed."""
    end = None if down == METRIC_SITE else parse_site(down)
    return _upstream(end, {parse_site(site) for site in sites}, blocks)[1]


def begin(down: str, sites: Sequence[str]) -> str | None:
    """The deepest full cut of the list before ``down`` (embed or a block's output), from which its paths can be run.

    None if there is none: then the pass starts from the tokens.
    """
    end = None if down == METRIC_SITE else parse_site(down)
    cuts = [parse_site(site) for site in sites if parse_site(site).kind in ("embed", "resid")]
    before = [site for site in cuts if end is None or site < end]
    return str(max(before)) if before else None


def _upstream(target: Site | None, listed: set[Site], blocks: Blocks) -> tuple[set[Site], Way]:
    """Sites of the list that reach ``target`` first, and what the ways there lead through."""
    reached: set[Site] = set()
    passed = Way.ADDED
    seen: set[Site] = set()
    waiting = [target]
    while waiting:
        for site, way in _read_by(waiting.pop(), blocks):
            passed = max(passed, way)
            if site in listed:
                reached.add(site)
            elif site not in seen:
                seen.add(site)
                waiting.append(site)
    return reached, passed


def _read_by(site: Site | None, blocks: Blocks) -> list[tuple[Site, Way]]:
    """The places that a place is computed from, and how."""
    if site is None:
        return [(Site("resid", blocks.layers - 1), Way.MIXING)]
    if site.layer is None:
        return []
    layer = site.layer
    stream = Site("embed") if layer == 0 else Site("resid", layer - 1)
    middle = stream if blocks.parallel else Site("resid_mid", layer)
    attn, mlp = Site("attn", layer), Site("mlp", layer)
    sources = {
        "z": [(stream, Way.MIXING)],
        "attn": [(Site("z", layer), Way.BY_TOKEN)],
        "resid_mid": [(stream, Way.ADDED), (attn, Way.ADDED)],
        "mlp_in": [(middle, Way.BY_TOKEN)],
        "mlp": [(Site("mlp_in", layer), Way.BY_TOKEN)],
        "resid": [(middle, Way.ADDED), (mlp, Way.ADDED), *([(attn, Way.ADDED)] if blocks.parallel else [])],
    }
    return sources[site.kind]
