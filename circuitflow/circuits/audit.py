"""Auditing a circuit: nodes and edges in and out of it truly patched, and what it may have missed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from circuitflow.attribution.intervals import correlation, interval
from circuitflow.circuits import strata
from circuitflow.circuits.audit_edges import Edges, edge_population, measured_edges
from circuitflow.circuits.audit_nodes import Nodes, measured_nodes, node_population
from circuitflow.circuits.circuit import Circuit, read_circuit
from circuitflow.circuits.statistics import spread_over_cases
from circuitflow.data.metrics import metric_of
from circuitflow.data.token_pairs import load_token_pairs
from circuitflow.dictionaries.dictionary import load_dictionary
from circuitflow.jobs import Output
from circuitflow.models.loading import load_model
from circuitflow.progress import logger
from circuitflow.store.arrays import open_store
from circuitflow.store.journal import Journal
from circuitflow.store.tables import write_table

JOURNAL = "audited.jsonl"
CONFIDENCE = 0.95

CONVENTIONS = {
    "exact_nodes": "m with the node alone patched - m clean, mean over the audit's pairs; for the metric kl, which is "
    "flat on the clean run, m patched - m with the node alone back at its clean value in the patched run",
    "exact_edges": "the metric's gradient by the downstream node x its change when the upstream node alone is patched "
    "and the blocks between run again, all other sites clean; into the metric the change of m; for the metric kl all "
    "of this on the patched run, the node going back to its clean value",
    "score": "AtP effect of a node on the audit's pairs; weight of an edge on the training pairs",
    "linear": "weight of an edge on the audit's pairs",
    "population": "nodes that change in some pair of the audit; edges between candidates of the circuit, to the metric "
    "too, those of all other features together (rest) left out",
    "effects": "of single nodes and edges; they need not add up to the effect of all together",
    **strata.CONVENTIONS,
}

Columns = dict[str, Any]


def audit_circuit(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. True effects of a stratified sample of nodes and edges, inside and outside of a circuit.

    Inputs ``model``, ``circuit``, ``tokens`` and ``gradients`` (of the test pairs), ``dictionaries`` and ``pairs``
    (per-pair tables of the AtP scores; lists in the order of ``sites``), ``edges`` (list of tables of score_edges, in
    the order of ``downs``); params ``sites``, ``downs``, ``metric``, ``positions``, ``pairs`` (how many are used,
    spread over the cases), ``nodes`` and ``edges`` (how many are measured), ``inside`` (share of them that lies in the
    circuit), ``middle`` (see :func:`circuitflow.circuits.strata.sample`), ``bootstrap``, ``seed``, ``batch_rows``,
    ``dtype``, ``compute``.

    Outputs, effects in units of the metric, n pairs in every row:

    - ``summary``: what (nodes | edges), side (inside | outside), stratum ("all": together), population, measured,
      score_sum (Σ|score| of the population), exact_sum (Σ|exact| of the measured), estimate and upper (Σ|exact| of
      the population; ``upper`` only for "all"), share and share_upper (of that sum inside and outside; "all" only),
      threshold (the weakest measured |exact| in the circuit),
      beyond, beyond_upper, largest (|exact|), pearson, slope (exact on
      score through the origin), n, and residual, relative (conservation, the worst over the sites);
    - ``nodes``: site, kind, feature, position, inside, stratum, score, exact, low, high, n;
    - ``edges``: up_site, up_kind, up_feature, up_position, down_site, down_kind, down_feature, down_position, and
      inside, stratum, score, linear, exact, low, high, n.
    """
    lm = load_model(inputs["model"], dtype=params["dtype"], device=params["compute"]["device"])
    circuit, everything = read_circuit(Path(inputs["circuit"])), load_token_pairs(inputs["tokens"])
    rows = spread_over_cases(everything.case, params["pairs"])
    store, metric = open_store(inputs["gradients"]), metric_of(params["metric"])
    dictionaries = {
        site: load_dictionary(Path(path), lm.width(site)).to(lm.device)
        for site, path in zip(params["sites"], inputs["dictionaries"], strict=True)
    }
    journal = Journal(out.folder / JOURNAL)
    work = Work(circuit, params)
    nodes = node_population(params["sites"], inputs["pairs"], everything.pair[rows].tolist())
    picked = work.sampled("nodes", nodes)
    effects = measured_nodes(
        lm, metric, store, everything, rows, dictionaries, nodes, picked.chosen, params, journal
    )
    edges = edge_population(params["downs"], inputs["edges"])
    drawn = work.sampled("edges", edges)
    through, linear = measured_edges(
        lm, metric, store, everything, rows, dictionaries, edges, drawn.chosen, params, journal
    )
    tables = {
        "nodes": {**nodes.columns(picked.chosen), **work.columns(picked, effects)},
        "edges": {**edges.columns(drawn.chosen), **work.columns(drawn, through), "linear": linear.mean(0)},
        "summary": _stacked(
            [*work.summary("nodes", picked, effects), *work.summary("edges", drawn, through)]
        ),
    }
    for name, columns in tables.items():
        write_table(out.files[name], columns, {**out.provenance, "conventions": CONVENTIONS})
    journal.remove()
    logger.info(verdict(tables["summary"]))


@dataclass(frozen=True)
class Drawn:
    """A population, on which side of the circuit each unit lies, and the samples of both sides."""

    score: np.ndarray
    """(units,)."""
    inside: np.ndarray
    """(units,)."""
    sides: dict[str, tuple[np.ndarray, strata.Sample]]
    """By side: which units, and the sample among them."""
    chosen: np.ndarray
    """(measured,) units, ascending."""

    def stratum(self) -> np.ndarray:
        """Name of every measured unit's stratum."""
        names = np.empty(len(self.score), object)
        for units, drawn in self.sides.values():
            names[units] = np.array(strata.NAMES, object)[drawn.stratum]
        return np.asarray(names[self.chosen])

    def effects(self, side: str, effects: np.ndarray) -> np.ndarray:
        """Of all measured units, in the order of ``chosen``, those of one side's sample, in its order."""
        units, drawn = self.sides[side]
        return np.asarray(effects[..., np.searchsorted(self.chosen, units[drawn.chosen])])


@dataclass(frozen=True)
class Work:
    """The circuit that is audited, and how."""

    circuit: Circuit
    params: Mapping[str, Any]

    def sampled(self, what: str, population: Nodes | Edges) -> Drawn:
        """The sample of a population: the circuit's own part first, what it does not use goes to the rest."""
        inside, budget = population.inside(self.circuit), int(self.params[what])
        seed = [self.params["seed"], ("nodes", "edges").index(what)]
        generator, sides = np.random.default_rng(seed), {}
        left = budget
        for side, share in (("inside", self.params["inside"]), ("outside", 1.0)):
            units = np.flatnonzero(inside == (side == "inside"))
            others = int((~population.errors[units]).sum())
            take = min(others, round(budget * share) if side == "inside" else left)
            sizes = np.abs(population.score[units])
            sides[side] = (
                units,
                strata.sample(sizes, population.errors[units], take, self.params["middle"], generator),
            )
            left -= take
        chosen = np.sort(np.concatenate([units[drawn.chosen] for units, drawn in sides.values()]))
        return Drawn(population.score, inside, sides, chosen)

    def columns(self, drawn: Drawn, effects: np.ndarray) -> Columns:
        """What both tables say of every measured unit."""
        mean = effects.mean(0)
        draws = strata.resampled(effects, self.params["bootstrap"], self.params["seed"])
        spread = [interval(draws[:, i], mean[i]) for i in range(len(mean))]
        low, high = np.array(spread).reshape(-1, 2).T
        return {
            "inside": drawn.inside[drawn.chosen],
            "stratum": drawn.stratum(),
            "score": drawn.score[drawn.chosen],
            "exact": mean,
            "low": low,
            "high": high,
            "n": np.full(len(mean), len(effects), np.int64),
        }

    def summary(self, what: str, drawn: Drawn, effects: np.ndarray) -> list[Columns]:
        """Rows of the summary: every stratum of both sides, and each side in all."""
        mean = effects.mean(0)
        # Effects, not scores: the two differ in scale, so that one is no bar for the other.
        threshold = float(np.abs(drawn.effects("inside", mean)).min(initial=np.inf))
        threshold = threshold if np.isfinite(threshold) else 0.0
        sums = {
            side: strata.estimate_sum(sample, drawn.effects(side, mean), CONFIDENCE)
            for side, (_, sample) in drawn.sides.items()
        }
        rows = []
        for side, (units, sample) in drawn.sides.items():
            here, score = drawn.effects(side, mean), drawn.score[units]
            for name in (*strata.NAMES, "all"):
                number = None if name == "all" else strata.NAMES.index(name)
                row = _part(sample, here, score, number)
                row |= {
                    "what": what,
                    "side": side,
                    "stratum": name,
                    "threshold": threshold,
                    "n": len(effects),
                }
                row |= (
                    _whole(sums, side, sample, here, threshold)
                    if name == "all"
                    else dict.fromkeys(WHOLE, np.nan)
                )
                rows.append({**row, **self._conservation()})
        return rows

    def _conservation(self) -> dict[str, float]:
        found = self.circuit.selection.get("conservation") or {}
        return {
            name: max((float(site[name]) for site in found.values()), default=float("nan"))
            for name in ("residual", "relative")
        }


WHOLE = ("upper", "share", "share_upper", "beyond", "beyond_upper")


def _part(sample: strata.Sample, effects: np.ndarray, score: np.ndarray, stratum: int | None) -> Columns:
    """What one stratum, or all (None), add to the summary."""
    members = np.ones(len(score), bool) if stratum is None else sample.stratum == stratum
    measured = members[sample.chosen]
    exact, known = effects[measured], score[sample.chosen][measured]
    size = float(known @ known)
    if stratum is None:
        estimate = strata.estimate_sum(sample, effects, CONFIDENCE).value
    else:
        estimate = (
            float(members.sum() * np.abs(exact).mean())
            if len(exact)
            else 0.0
            if not members.sum()
            else np.nan
        )
    return {
        "population": int(members.sum()),
        "measured": int(measured.sum()),
        "score_sum": float(np.abs(score[members]).sum()),
        "exact_sum": float(np.abs(exact).sum()),
        "estimate": estimate,
        "largest": float(np.abs(exact).max(initial=0)),
        "pearson": correlation(known, exact) if len(exact) > 2 else float("nan"),
        "slope": float(known @ exact) / size if size > 0 else float("nan"),
    }


def _whole(
    sums: Mapping[str, strata.Estimate],
    side: str,
    sample: strata.Sample,
    effects: np.ndarray,
    threshold: float,
) -> Columns:
    here, other = sums[side], sums["inside" if side == "outside" else "outside"]
    return {
        "upper": here.upper,
        "share": _share(here.value, other.value),
        "share_upper": _share(here.upper, other.value),
        "beyond": float((np.abs(effects) > threshold).sum()),
        "beyond_upper": float(strata.most_beyond(sample, effects, threshold, CONFIDENCE)),
    }


def _share(part: float, rest: float) -> float:
    if np.isinf(part):
        return 1.0
    return part / (part + rest) if part + rest > 0 else float("nan")


def verdict(summary: Mapping[str, Any]) -> str:
    """One sentence per kind of unit on what lies outside of the circuit, from the table ``summary``."""
    said = []
    for what in ("nodes", "edges"):
        keep = (
            (np.asarray(summary["what"]) == what)
            & (np.asarray(summary["side"]) == "outside")
            & (np.asarray(summary["stratum"]) == "all")
        )
        if keep.any():
            share, upper, measured, population, n = (
                float(np.asarray(summary[name])[keep][0])
                for name in ("share", "share_upper", "measured", "population", "n")
            )
            bound = "" if everything_measured(summary, what) else f", at most {upper:.0%} (95 %)"
            said.append(
                f"{what} outside carry {share:.0%} of the summed single effects{bound}, of these {n:.0f} pairs "
                f"({measured:.0f} of {population:.0f} measured)"
            )
    return "; ".join(said)


def everything_measured(summary: Mapping[str, Any], what: str) -> bool:
    """Whether all nodes (or edges) were measured, in and out of the circuit, so that nothing is estimated."""
    keep = (np.asarray(summary["what"]) == what) & (np.asarray(summary["stratum"]) == "all")
    return bool((np.asarray(summary["measured"])[keep] == np.asarray(summary["population"])[keep]).all())


def _stacked(rows: Sequence[Columns]) -> Columns:
    text = ("what", "side", "stratum")
    return {
        name: np.array([row[name] for row in rows], object if name in text else None)
        for name in ("what", "side", "stratum", *(name for name in rows[0] if name not in text))
    }
