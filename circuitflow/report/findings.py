"""The result in a few sentences, each computed from the tables; nothing is claimed that a number does not say."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from circuitflow.data.proportions import wilson
from circuitflow.plots.numbers import counted, fixed, interval, percent
from circuitflow.plots.tables import Table, rows
from circuitflow.report.result import Result

LEVELS = (0.5, 0.8)
"""Shares of the model's preference for which the page tells how many nodes reach them."""


def findings(result: Result) -> list[str]:
    """Sentences for the top of the page, in the order of the workflow."""
    parts = (_task, _dictionaries, _circuit, _faithfulness, _levels, _error_share, _agreement)
    return [sentence for part in parts for sentence in part(result)]


def _task(result: Result) -> Iterator[str]:
    prompts = result.prompts
    right = prompts["difference"] > 0
    low, high = wilson(int(right.sum()), len(right))
    shares = {case: float(right[prompts["case"] == case].mean()) for case in dict.fromkeys(prompts["case"])}
    worst = min(shares, key=shares.__getitem__)
    largest = "larger" if result.opposed else "largest"
    sentence = (
        f"{result.model} gives the right answer the {largest} logit on {percent(float(right.mean()))} "
        f"(95 % interval {percent(low)} to {percent(high)}) of {counted(len(right), 'prompt')}"
    )
    differ = max(shares.values()) > shares[worst]
    others = f"; the least on {worst.replace('_', ' ')}, {percent(shares[worst])}" if differ else ""
    yield f"{sentence}{others}."


def _dictionaries(result: Result) -> Iterator[str]:
    measured = [site for site in result.quality if result.measured(site, "fvu", "kept")[1]]
    if measured:
        fvu = [result.measured(site, "fvu", "kept")[0] for site in measured]
        recovered = [result.measured(site, "ce_recovered")[0] for site in measured]
        yield (
            f"The dictionaries leave {_span(fvu, percent)} of the variance of held-out text unexplained, outliers left "
            f"out. With their reconstructions in place of one site's vectors, the model keeps "
            f"{_span(recovered, percent)} of what that site is worth to its predictions (cross-entropy recovered)."
        )


def _circuit(result: Result) -> Iterator[str]:
    nodes = result.circuit.nodes
    errors = sum(node.kind == "error" for node in nodes)
    yield (
        f"The circuit has {counted(len(nodes), 'node')} ({counted(len(nodes) - errors, 'feature')}, "
        f"{counted(errors, 'error node')}) at {counted(len({node.site for node in nodes}), 'site')}, and "
        f"{counted(len(result.circuit.edges), 'edge')}."
    )


def _faithfulness(result: Result) -> Iterator[str]:
    own, without, chance = result.assembled("circuit"), result.assembled("complement"), result.curve("random")
    if not len(own["F"]):
        return
    kept = (
        f"With its nodes left and everything else ablated, the model keeps F = {fixed(own['F'][0])} "
        f"{interval(own['low'][0], own['high'][0])} of its preference on {counted(int(own['n'][0]), 'test prompt')}"
    )
    parts = [kept]
    if len(without["F"]):
        spread = interval(without["low"][0], without["high"][0])
        parts.append(f"with only its nodes ablated, {fixed(without['F'][0])} {spread}")
    if len(chance["nodes"]):
        nearest = int(chance["nodes"][np.argmin(np.abs(chance["nodes"] - own["nodes"][0]))])
        drawn = chance["F"][chance["nodes"] == nearest]
        like = f"random circuits of {counted(nearest, 'node')} with the same error nodes"
        parts.append(
            f"{like} keep {fixed(float(np.median(drawn)))} (median of {counted(len(drawn), 'draw')})"
        )
    yield f"{'; '.join(parts)}."


def _levels(result: Result) -> Iterator[str]:
    curve = result.curve("circuit")
    if len(curve["nodes"]):
        yield f"Of the circuits of the strongest nodes, {' and '.join(_level(curve, level) for level in LEVELS)}."


def _level(curve: Table, level: float) -> str:
    reached = curve["nodes"][curve["F"] >= level]
    if not len(reached):
        return f"none reaches F ≥ {level}"
    return f"{counted(int(reached[0]), 'node')} are the fewest tried with F ≥ {level}"


def _error_share(result: Result) -> Iterator[str]:
    train = rows(result.layers, split="train")
    total = train["error_abs"] + train["features_abs"]
    if np.any(total > 0):
        shares = np.divide(train["error_abs"], total, out=np.zeros(len(total)), where=total > 0)
        yield (
            f"Error nodes, which no feature explains, carry {_span(shares, percent)} of Σ |IE| of a site, the most at "
            f"{train['site'][int(np.argmax(shares))]}."
        )


def _agreement(result: Result) -> Iterator[str]:
    ks = np.unique(result.agreement["k"])
    if len(ks):
        k = int(ks[len(ks) // 2])
        part = rows(result.agreement, k=k)
        yield (
            f"Of the top {k} nodes of a site on training pairs, {_span(part['overlap'], percent)} are among its top "
            f"{k} on test pairs; Spearman's correlation of |IE| over all nodes is {_span(part['spearman'], fixed)}."
        )


def _span(values: Sequence[float] | np.ndarray, shown: Callable[[float], str]) -> str:
    low, high = shown(float(np.min(values))), shown(float(np.max(values)))
    return low if low == high else f"{low} to {high}"
