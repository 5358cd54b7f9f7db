"""Contenders held against each other: faithfulness at equal budgets, areas, all with paired intervals, and circuits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from circuitflow.attribution.intervals import INTERVAL
from circuitflow.circuits.circuit import read_circuit
from circuitflow.circuits.comparison import Matched, compare_two, matched_features
from circuitflow.circuits.statistics import areas, faithfulness, resampled
from circuitflow.dictionaries.dictionary import load_dictionary
from circuitflow.errors import UserError
from circuitflow.jobs import Output, progress
from circuitflow.store.objects import content_of
from circuitflow.store.tables import read_provenance, read_table, write_table

CONVENTIONS = {
    "F": "(m(C) - m(empty)) / (m(M) - m(empty)); the empty circuit is each contender's own",
    "difference": "contender - reference at the same number of nodes; the same prompts resampled for both (paired), "
    "or each its own where the prompts, the ablation or the split of its means differ",
    "cpr": "area under F over the share of the contender's own nodes (a large one is good); cmd: under |1 - F|",
    "circuits": "as many nodes of each; where dictionaries differ, features that are each other's nearest by decoder "
    "direction count as the same; n: train pairs behind the scores of both, the fewer of n_a and n_b (0: not recorded)",
    "intervals": "95 % bootstrap over prompts",
}
WHOLE = "all"
"""Site of the rows that compare circuits as a whole."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Contender:
    """The results of one contender."""

    name: str
    method: str
    nodes: np.ndarray
    """(budgets,), rising."""
    share: np.ndarray
    errors: np.ndarray
    source: np.ndarray
    values: np.ndarray
    """m(C), (budgets, n)."""
    empty: np.ndarray
    full: np.ndarray
    candidates: int
    prompts: tuple[tuple[int, str, float], ...]
    """Pair, case and m(M) of every prompt: contenders with the same ones, evaluated alike, are paired."""
    how: Mapping[str, Any] = field(default_factory=dict)
    """``metric``, ``ablation`` and ``means`` (split) of its evaluation; empty where the table does not say."""


def compare_budgets(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Contenders at equal budgets.

    Inputs ``values`` (list of tables of evaluate_budget, the reference first), ``circuits`` (their circuits), and
    ``dictionaries`` (manifests by which features are matched: those of all contenders, in any order); params ``names``
    (of the contenders, in that order), ``sites``, ``aggregate``, ``bootstrap``, ``seed``, ``least_cosine``.

    Outputs, n prompts in every row (``circuits``: train pairs behind the scores):

    - ``comparison``: contender, method, source, nodes, share, errors, F, low, high, m_circuit, m_empty, m_full, n;
    - ``differences``: contender, reference, nodes, difference, low, high, paired, n;
    - ``areas``: contender, method, candidates, points, cpr, cmd and their difference to the reference
      (``cpr_difference``), each with ``_low`` and ``_high``; paired, n;
    - ``circuits``: a, b, site ("all": together), compared, nodes_a, nodes_b, both, jaccard, matched, pearson, spearman,
      weighted_jaccard, effect_share_a, effect_share_b, error_share_a, error_share_b, n_a, n_b, n.

    :raises UserError: fewer than two contenders, two of the same name, or one evaluated with another metric.
    """
    names = list(params["names"])
    if len(names) < 2 or len(set(names)) < len(names):
        raise UserError(
            "Key comparison.contenders needs two contenders or more of different names; the run itself is the first."
        )
    found = [read_contender(name, Path(path)) for name, path in zip(names, inputs["values"], strict=True)]
    check_metrics(found)
    tables = {
        "comparison": [row for one in found for row in budget_rows(one, params)],
        "differences": [row for one in found[1:] for row in difference_rows(one, found[0], params)],
        "areas": [area_row(one, found[0], params) for one in found],
        "circuits": circuit_rows(names, inputs, params),
    }
    said = {"aggregate": params["aggregate"], "differently": different(found)}
    facts = {**out.provenance, "conventions": {**CONVENTIONS, **said}}
    for name, rows in tables.items():
        columns = {key: [row[key] for row in rows] for key in rows[0]} if rows else {}
        write_table(out.files[name], columns, facts)


def read_contender(name: str, path: Path) -> Contender:
    """One table of evaluate_budget, under the name that it has here."""
    table = read_table(path)
    count, first = np.unique(table["nodes"], return_index=True)
    n = int((table["nodes"] == count[0]).sum())
    one = slice(first[0], first[0] + n)
    prompts = zip(*(table[key][one].tolist() for key in ("pair", "case", "m_full")), strict=True)
    return Contender(
        name=name,
        method=str(table["method"][0]),
        nodes=count,
        share=table["share"][first],
        errors=table["errors"][first],
        source=table["source"][first],
        values=np.stack([table["m"][table["nodes"] == nodes] for nodes in count]),
        empty=table["m_empty"][one],
        full=table["m_full"][one],
        candidates=int(table["candidates"][0]),
        prompts=tuple(prompts),
        how=evaluated_how(path),
    )


def evaluated_how(path: Path) -> dict[str, Any]:
    """With which metric, ablation and split of the means a table was made; empty if it does not say."""
    params = read_provenance(path).get("params") or {}
    if "ablation" not in params:
        return {}
    found = {name: params.get(name) for name in ("metric", "ablation")}
    return {**found, "means": params.get("means", "train") if params["ablation"] == "mean" else None}


def check_metrics(found: Sequence[Contender]) -> None:
    """Refuse contenders whose m is another quantity.

    :raises UserError: a metric differs from the reference's.
    """
    reference = found[0].how.get("metric") or {}
    for one in found[1:]:
        metric = one.how.get("metric") or {}
        other = [key for key in reference if key in metric and metric[key] != reference[key]]
        if other:
            raise UserError(
                f"Contender {one.name} was evaluated with task.metric.{other[0]} {metric[other[0]]}, the run with "
                f"{reference[other[0]]}: their faithfulness cannot be compared; leave it out of comparison.others, or "
                "run both with the same metric."
            )


def alike(one: Contender, other: Contender) -> bool:
    """Whether two were evaluated on the same prompts under the same ablation, so that prompts can be paired."""
    known = one.how and other.how
    same = not known or all(one.how[name] == other.how[name] for name in ("ablation", "means"))
    return one.prompts == other.prompts and same


def different(found: Sequence[Contender]) -> dict[str, str]:
    """In words, by name, under what contenders were evaluated whose ablation or means are not the reference's."""
    reference = found[0]
    return {
        one.name: _under(one)
        for one in found[1:]
        if one.how and reference.how and _under(one) != _under(reference)
    }


def _under(one: Contender) -> str:
    means = one.how["means"]
    return f"ablation {one.how['ablation']}" + (f" over the {means} pairs" if means else "")


def budget_rows(one: Contender, params: Mapping[str, Any]) -> Rows:
    """F of every budget with its interval."""
    how = (one.values, one.empty, one.full, params["aggregate"])
    low, high = np.percentile(_drawn(one, one, params), INTERVAL, axis=1)
    F = faithfulness(*how)
    return [
        {
            "contender": one.name,
            "method": one.method,
            "source": str(one.source[i]),
            "nodes": int(nodes),
            "share": float(one.share[i]),
            "errors": int(one.errors[i]),
            "F": float(F[i]),
            "low": float(low[i]),
            "high": float(high[i]),
            "m_circuit": float(one.values[i].mean()),
            "m_empty": float(one.empty.mean()),
            "m_full": float(one.full.mean()),
            "n": len(one.full),
        }
        for i, nodes in enumerate(one.nodes)
    ]


def difference_rows(one: Contender, reference: Contender, params: Mapping[str, Any]) -> Rows:
    """F of the contender − F of the reference at the node counts that both have."""
    _, mine, theirs = np.intersect1d(one.nodes, reference.nodes, return_indices=True)
    F = [faithfulness(x.values, x.empty, x.full, params["aggregate"]) for x in (one, reference)]
    change = F[0][mine] - F[1][theirs]
    drawn = _drawn(one, reference, params)[mine] - _drawn(reference, reference, params)[theirs]
    spread = np.percentile(drawn, INTERVAL, axis=1)
    paired = alike(one, reference)
    return [
        {
            "contender": one.name,
            "reference": reference.name,
            "nodes": int(one.nodes[at]),
            "difference": float(change[i]),
            "low": float(spread[0, i]),
            "high": float(spread[1, i]),
            "paired": paired,
            "n": len(one.full),
        }
        for i, at in enumerate(mine.tolist())
    ]


def area_row(one: Contender, reference: Contender, params: Mapping[str, Any]) -> dict[str, Any]:
    """CPR and CMD with intervals, and how far they are from those of the reference."""
    row: dict[str, Any] = {"contender": one.name, "method": one.method, "candidates": one.candidates}
    row |= {"points": len(one.nodes), "paired": alike(one, reference), "n": len(one.full)}
    whole, draws = [], []
    for x in (one, reference):
        F = faithfulness(x.values, x.empty, x.full, params["aggregate"])
        whole.append(areas(x.share, F))
        draws.append(areas(x.share, _drawn(x, reference, params)))
    for index, name in enumerate(("cpr", "cmd")):
        mine, theirs = (float(found[index]) for found in whole)
        ours, others = (found[index] for found in draws)
        for key, value, drawn in ((name, mine, ours), (f"{name}_difference", mine - theirs, ours - others)):
            low, high = np.percentile(drawn, INTERVAL)
            row |= {key: value, f"{key}_low": float(low), f"{key}_high": float(high)}
    return row


def _drawn(one: Contender, reference: Contender, params: Mapping[str, Any]) -> np.ndarray:
    """F on resampled prompts; those that are not paired with the reference's are drawn independently of them."""
    seed = params["seed"] if alike(one, reference) else params["seed"] + 1
    how = (one.values, one.empty, one.full, params["aggregate"])
    return resampled(*how, params["bootstrap"], seed)


def circuit_rows(names: Sequence[str], inputs: Mapping[str, Any], params: Mapping[str, Any]) -> Rows:
    """Every two circuits compared, in all and per site."""
    circuits = {name: read_circuit(Path(path)) for name, path in zip(names, inputs["circuits"], strict=True)}
    paths = {content_of(Path(path)): Path(path) for path in inputs["dictionaries"]}
    rows: Rows = []
    pairs = list(combinations(names, 2))
    for done, (a, b) in enumerate(pairs):
        made = [circuits[name].provenance.get("dictionaries") or {} for name in (a, b)]
        matches = {
            site: matched
            for site in params["sites"]
            if (matched := _matched(made[0].get(site), made[1].get(site), paths, params["least_cosine"]))
        }
        found = compare_two(circuits[a], circuits[b], matches)
        counts = [int(circuits[name].selection.get("pairs") or 0) for name in (a, b)]
        behind = {"n_a": counts[0], "n_b": counts[1], "n": min(counts)}
        rows.append({**_compared(a, b, WHOLE, found, sum(found["matched"].values())), **behind})
        for site in found["per_site"]:
            here = found["matched"].get(site["site"], 0)
            rows.append({**_compared(a, b, site["site"], site, here), **behind})
        progress("circuits compared", done + 1, len(pairs))
    return rows


def _matched(a: str | None, b: str | None, paths: Mapping[str, Path], least: float) -> Matched | None:
    """Which features of two different dictionaries belong together; None where there is nothing to match."""
    if a is None or b is None or a == b or not {a, b} <= paths.keys():
        return None
    first, second = (load_dictionary(paths[name]) for name in (a, b))
    if not (first.d_dict and second.d_dict) or first.d_model != second.d_model:
        return None
    if "identity" in (first.kind, second.kind):
        return None
    return matched_features(first.W_dec.float().numpy(), second.W_dec.float().numpy(), least)


def _compared(a: str, b: str, site: str, found: Mapping[str, Any], matched: int) -> dict[str, Any]:
    nodes, scores = found.get("nodes") or {}, found.get("scores") or {}

    def number(source: Mapping[str, Any], name: str) -> float:
        value = source.get(name)
        return float("nan") if value is None else float(value)

    return {
        "a": a,
        "b": b,
        "site": site,
        "compared": bool(nodes),
        "nodes_a": number(nodes, "a"),
        "nodes_b": number(nodes, "b"),
        "both": number(nodes, "both"),
        "jaccard": number(nodes, "jaccard"),
        "matched": matched,
        **{name: number(scores, name) for name in ("pearson", "spearman", "weighted_jaccard")},
        **{
            f"{what}_share_{side}": number(found, f"{what}_share_{side}")
            for what in ("effect", "error")
            for side in ("a", "b")
        },
    }
