"""The list of experiments on error nodes: what each ablates and restores. Nothing is run here."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from circuitflow.attribution.nodes import ERROR, SUMMED
from circuitflow.circuits.interventions import Intervention, Triple, everything, hold, remove
from circuitflow.error_nodes.baselines import ScoredNodes, rules
from circuitflow.error_nodes.windows import (
    Level,
    Window,
    expanding_left,
    expanding_right,
    levels_of,
    named,
    sliding,
)
from circuitflow.models.sites import parse_site

ERRORS = "errors"
ALL_POSITIONS = -1


@dataclass(frozen=True)
class Experiment:
    """Nodes that are ablated, features that are restored, and why."""

    name: str
    """"all", "every_site", "layer", "threshold", "position", "sliding", "expanding_right", "expanding_left", "range",
    "restore" or "heatmap"."""
    what: str
    """What is ablated: "errors", or the features that a baseline picks in their place."""
    sites: tuple[str, str]
    """First and last site of the window in which nodes are ablated."""
    removed: tuple[Triple, ...]
    restored_sites: tuple[str, str] = ("", "")
    """First and last site of the range in which features are restored; empty: none are."""
    restored: tuple[Triple, ...] = ()
    k: int = 0
    """Features restored per site."""
    threshold: float = float("nan")
    position: int = ALL_POSITIONS
    """Tokens before the answer's at which the nodes are ablated; −1: everywhere."""

    def intervention(self, sites: Sequence[str], absolute: int = SUMMED) -> Intervention:
        """What becomes of every node; restored features are held at their clean values.

        :param absolute: position in the prompt at which nodes are ablated.
        """
        nodes = [
            (site, feature, position if absolute == SUMMED else absolute)
            for site, feature, position in self.removed
        ]
        found = remove(sorted(set(nodes)), sites) if nodes else everything(sites)
        return hold(found, self.restored, "clean") if self.restored else found


@dataclass(frozen=True)
class Study:
    """The levels whose error nodes are studied, and all nodes with their scores."""

    levels: list[Level]
    nodes: ScoredNodes
    params: Mapping[str, Any]

    @property
    def whole(self) -> Window:
        """From the first to the last level."""
        return Window(0, len(self.levels) - 1)

    def ends(self, window: Window) -> tuple[str, str]:
        """Names of its first and last site."""
        return self.levels[window.first].first, self.levels[window.last].last

    def errors(self, window: Window) -> tuple[Triple, ...]:
        """Its error nodes, at all positions."""
        return tuple((site, ERROR, SUMMED) for site in window.sites(self.levels))

    def picked(self, rule: str, window: Window) -> tuple[Triple, ...]:
        """Features of all its sites."""
        return tuple(node for site in window.sites(self.levels) for node in self.nodes.chosen(rule, site))


def study_of(nodes: ScoredNodes, params: Mapping[str, Any]) -> Study:
    """Params ``sites``, ``kinds``, ``start`` and those of :func:`planned`.

    :raises UserError: they name what this run does not have.
    """
    return Study(levels_of(params["sites"], params["kinds"], params["start"]), nodes, params)


def planned(study: Study, tokens: int) -> list[Experiment]:
    """All experiments in order. Equal interventions among them are run once.

    Params ``widths``, ``ranges``, ``step``, ``thresholds``, ``positions``, ``baselines``, ``restore_top``,
    ``restore_width``, ``restore_ranges``, ``bound``, ``heatmap_top``.

    :param tokens: of the longest prompt up to the answer.
    :raises UserError: a param names a site or baseline that there is not.
    """
    return [
        *_whole(study),
        *_layers(study),
        *_thresholds(study),
        *(_positions(study, tokens) if study.params["positions"] else ()),
        *_windows(study),
        *_restored(study),
        *_heatmap(study),
    ]


def windows(study: Study) -> Iterator[tuple[str, Window]]:
    """Sliding windows of every width, windows that grow from either end, and those given by name."""
    params, count = study.params, len(study.levels)
    for width in sorted(set(params["widths"])):
        yield from (("sliding", window) for window in sliding(count, width, params["step"]))
    yield from (("expanding_right", window) for window in expanding_right(count, params["step"]))
    yield from (("expanding_left", window) for window in expanding_left(count, params["step"]))
    given = named(params["ranges"], study.levels, "error_nodes.ranges")
    yield from (("range", window) for window in given)


def ranges(study: Study) -> list[Window]:
    """Ranges in which features are restored, each once: sliding ones, all levels, and those given by name."""
    count, params = len(study.levels), study.params
    given = named(params["restore_ranges"], study.levels, "error_nodes.restore_ranges")
    return _once([*sliding(count, params["restore_width"], params["step"]), study.whole, *given])


def _whole(study: Study) -> Iterator[Experiment]:
    ends = study.ends(study.whole)
    yield Experiment("all", ERRORS, ends, study.errors(study.whole))
    if (
        everywhere := levels_of(study.params["sites"], _present(study), study.params["start"])
    ) != study.levels:
        sites = [site for level in everywhere for site in level.sites]
        yield Experiment(
            "every_site", ERRORS, (sites[0], sites[-1]), tuple((s, ERROR, SUMMED) for s in sites)
        )


def _present(study: Study) -> list[str]:
    return list(dict.fromkeys(parse_site(site).kind for site in study.params["sites"]))


def _layers(study: Study) -> Iterator[Experiment]:
    for window in sliding(len(study.levels), 1):
        yield Experiment("layer", ERRORS, study.ends(window), study.errors(window))


def _thresholds(study: Study) -> Iterator[Experiment]:
    """Errors at least as strong as a share of the strongest node; what no error reaches is left out."""
    nodes, ends = study.nodes, study.ends(study.whole)
    sizes = {site: nodes.error_size(site) for site in study.whole.sites(study.levels)}
    strongest = max((abs(score) for score in nodes.scores["train"].values()), default=0.0)
    for threshold in sorted(set(study.params["thresholds"])):
        removed = tuple(
            (site, ERROR, SUMMED) for site, size in sizes.items() if size >= threshold * strongest
        )
        if removed:
            yield Experiment("threshold", ERRORS, ends, removed, threshold=threshold)


def _positions(study: Study, tokens: int) -> Iterator[Experiment]:
    """Each level and all levels together, at each token up to the answer's."""
    for window in _once([*sliding(len(study.levels), 1), study.whole]):
        for position in range(tokens):
            yield Experiment("position", ERRORS, study.ends(window), study.errors(window), position=position)


def _windows(study: Study) -> Iterator[Experiment]:
    """The errors of every window, and in their place the features of every baseline."""
    for name, window in windows(study):
        yield Experiment(name, ERRORS, study.ends(window), study.errors(window))
        for rule in rules(study.params["baselines"]):
            yield Experiment(name, rule, study.ends(window), study.picked(rule, window))


def _restored(study: Study) -> Iterator[Experiment]:
    """Errors ablated up to one bound; top K features of every range restored, and none at all."""
    bound = study.params["bound"]
    last = len(study.levels) - 1
    if bound is not None:
        last = named([[bound, bound]], study.levels, "error_nodes.bound")[0].last
    for window in ranges(study):
        for k in sorted({0, *study.params["restore_top"]}):
            yield _restoration("restore", study, Window(0, last), window, k)


def _heatmap(study: Study) -> Iterator[Experiment]:
    """Every bound up to which errors are ablated, and every range in which top features are restored, or none."""
    for ablated in expanding_right(len(study.levels), study.params["step"]):
        yield _restoration("heatmap", study, ablated, None, 0)
        for window in ranges(study):
            yield _restoration("heatmap", study, ablated, window, study.params["heatmap_top"])


def _restoration(name: str, study: Study, ablated: Window, window: Window | None, k: int) -> Experiment:
    restored = study.picked(f"top-{k}", window) if window is not None and k else ()
    ends = ("", "") if window is None else study.ends(window)
    return Experiment(name, ERRORS, study.ends(ablated), study.errors(ablated), ends, restored, k)


def _once(found: Iterable[Window]) -> list[Window]:
    return list(dict.fromkeys(found))
