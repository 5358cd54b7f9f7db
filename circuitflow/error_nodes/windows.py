"""Stretches of layers whose nodes are ablated or restored together: windows, and what grows from either end."""

from collections.abc import Sequence
from dataclasses import dataclass

from circuitflow.errors import UserError, nearest
from circuitflow.models.sites import depth_order, parse_site

RESIDUAL = ("embed", "resid_mid", "resid")
"""Kinds of site that lie on the residual stream itself."""


@dataclass(frozen=True)
class Level:
    """The sites of one layer that experiments are about."""

    sites: tuple[str, ...]
    """In order of depth; mostly one."""

    @property
    def first(self) -> str:
        """The earliest of the sites."""
        return self.sites[0]

    @property
    def last(self) -> str:
        """The latest."""
        return self.sites[-1]


@dataclass(frozen=True)
class Window:
    """The levels from ``first`` to ``last``, both included, by their places in a list of levels."""

    first: int
    last: int

    @property
    def width(self) -> int:
        """How many levels it has."""
        return self.last - self.first + 1

    def sites(self, levels: Sequence[Level]) -> list[str]:
        """All its sites, in order of depth."""
        return [site for level in levels[self.first : self.last + 1] for site in level.sites]


def levels_of(sites: Sequence[str], kinds: Sequence[str] | None, start: str | None = None) -> list[Level]:
    """The run's sites of some kinds, layer by layer, from ``start`` on (None: all).

    :param kinds: None for ``resid``, or for all kinds where the run has no ``resid`` site.
    :raises UserError: there is no such site.
    """
    present = list(dict.fromkeys(parse_site(site).kind for site in sites))
    if kinds is None:
        kinds = ["resid"] if "resid" in present else present
    for kind in kinds:
        if kind not in present:
            raise UserError(
                f"Key error_nodes.kinds names '{kind}', but no site of this run is of that kind; "
                f"{nearest(kind, present)}."
            )
    first = depth_order(parse_site(start)) if start is not None else (-1, 0)
    layers: dict[int | None, list[str]] = {}
    for site in sorted(sites, key=lambda name: depth_order(parse_site(name))):
        parsed = parse_site(site)
        if parsed.kind in kinds and depth_order(parsed) >= first:
            layers.setdefault(parsed.layer, []).append(site)
    if not layers:
        raise UserError(
            f"Key error_nodes.start is {start}, behind every site of the kinds {', '.join(kinds)}; "
            "name an earlier site or null."
        )
    return [Level(tuple(found)) for found in layers.values()]


def sliding(count: int, width: int, step: int = 1) -> list[Window]:
    """Windows of ``width`` levels that begin at every ``step``-th level; none if there are fewer levels."""
    return [Window(first, first + width - 1) for first in range(0, count - width + 1, step)]


def expanding_right(count: int, step: int = 1) -> list[Window]:
    """From the first level on, ever further: the left edge stays."""
    return [Window(0, last) for last in _stops(count, step)]


def expanding_left(count: int, step: int = 1) -> list[Window]:
    """From the last level back, ever further: the right edge stays."""
    return [Window(count - 1 - last, count - 1) for last in _stops(count, step)]


def named(ranges: Sequence[Sequence[str]], levels: Sequence[Level], key: str) -> list[Window]:
    """Windows given by their first and last site.

    :param key: of the configuration, for the message.
    :raises UserError: a site is none of the levels', or the first lies behind the last.
    """
    place = {site: number for number, level in enumerate(levels) for site in level.sites}
    found = []
    for first, last in ranges:
        for site in (first, last):
            if site not in place:
                raise UserError(
                    f"Key {key} names the site '{site}', whose error nodes are not studied; "
                    f"{nearest(site, list(place))}."
                )
        if place[first] > place[last]:
            raise UserError(
                f"Key {key} has the range {first} to {last}, which runs backwards; write [{last}, {first}]."
            )
        found.append(Window(place[first], place[last]))
    return found


def _stops(count: int, step: int) -> list[int]:
    """Every ``step``-th of the places 0 to ``count`` − 1, and the last."""
    return sorted({*range(0, count, step), count - 1})
