"""The page's tables: columns with units and help, cells with the text to read and the value to sort by."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from circuitflow.circuits.circuit import METRIC
from circuitflow.data.proportions import wilson
from circuitflow.features.descriptions import fires_on, promotes
from circuitflow.features.tokens import visible
from circuitflow.plots.numbers import fixed, interval, number, percent, signed, whole
from circuitflow.plots.tables import Table, node_name, rows, top_nodes
from circuitflow.report.result import NODES_LISTED, Result

EDGES_LISTED = 40


@dataclass(frozen=True)
class Column:
    """Head of a column."""

    title: str
    help: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class Cell:
    """One entry: its text, what it sorts by, and where it leads."""

    text: str
    sort: float | str = ""
    link: str = ""
    detail: str = ""
    """Said more quietly behind the text: an interval."""


NOTHING = Cell("", float("-inf"))


@dataclass(frozen=True)
class PageTable:
    """A table of the page."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]


def anchor(site: str, feature: int) -> str:
    """Where the page describes a feature."""
    return f"{site}-{feature}"


def task_table(result: Result) -> PageTable:
    """Accuracy and margins per structure and split."""
    wrong = "wrong" if result.opposed else "likeliest other token"
    columns = (
        Column("structure", numeric=False),
        Column("split", numeric=False),
        Column("prompts"),
        Column("accuracy", f"share with logit(right) > logit({wrong}); 95 % Wilson interval"),
        Column("logit difference", f"logit(right) − logit({wrong}), median over prompts"),
        Column("probability", "of the right answer, median over prompts"),
        Column("pairs kept", "pairs whose clean prompt passes task.confidence"),
    )
    prompts = result.prompts
    keys = dict.fromkeys(zip(prompts["case"], prompts["split"], strict=True))
    body = tuple(_task_row(rows(prompts, case=case, split=split), case, split) for case, split in keys)
    return PageTable("task", "The task, prompt by prompt", columns, body)


def _task_row(part: Table, case: str, split: str) -> tuple[Cell, ...]:
    n, right = len(part["difference"]), int(np.sum(part["difference"] > 0))
    low, high = wilson(right, n)
    clean = part["side"] == "clean"
    kept = int(part["kept"][clean].sum())
    difference, probability = (float(np.median(part[name])) for name in ("difference", "probability"))
    return (
        Cell(case.replace("_", " "), case),
        Cell(split, split),
        Cell(whole(n), n),
        Cell(percent(right / n, 1), right / n, detail=f"[{percent(low)}, {percent(high)}]"),
        Cell(signed(difference), difference),
        Cell(fixed(probability, 3), probability),
        Cell(f"{kept} of {int(clean.sum())}", kept),
    )


def dropped_table(result: Result) -> PageTable:
    """Pairs that could not be used, by reason."""
    columns = (
        Column("reason", numeric=False),
        Column("structure", numeric=False),
        Column("split", numeric=False),
        Column("pairs"),
    )
    counts = Counter(zip(*(result.dropped[name] for name in ("reason", "case", "split")), strict=True))
    body = tuple(
        (*(Cell(text.replace("_", " "), text) for text in key), Cell(str(count), count))
        for key, count in sorted(counts.items())
    )
    return PageTable("dropped", "Pairs left out before the model saw them", columns, body)


QUALITY = (
    (
        "fvu",
        "kept",
        Column("FVU", "fraction of variance unexplained, outliers left out; 0 is perfect"),
        fixed,
        3,
    ),
    ("l0", "kept", Column("L0", "active features per token"), fixed, 1),
    ("cosine", "kept", Column("cosine", "of a vector and its reconstruction, mean"), fixed, 3),
    (
        "ce_recovered",
        None,
        Column("CE recovered", "(CE reconstructed − CE zeroed) / (CE original − CE zeroed)"),
        percent,
        1,
    ),
    (
        "delta_ce",
        None,
        Column("ΔCE (nats)", "cross-entropy with the reconstruction in place − original"),
        signed,
        3,
    ),
    (
        "kl",
        None,
        Column("KL (nats)", "of the original's predictions from those with the reconstruction"),
        fixed,
        3,
    ),
    (
        "silent_share",
        None,
        Column("silent features", "share never active on the held-out tokens"),
        percent,
        1,
    ),
    (
        "skipped_share",
        None,
        Column("outliers", "share of tokens that the recorded rule leaves out (attention sinks)"),
        percent,
        2,
    ),
)


def quality_table(result: Result) -> PageTable:
    """Each dictionary on held-out text."""
    columns = (
        Column("site", numeric=False),
        *(column for _, _, column, _, _ in QUALITY),
        Column("tokens", "held-out tokens, outliers left out"),
    )
    body = []
    for depth, site in enumerate(result.quality):
        values = [result.measured(site, quantity, tokens)[0] for quantity, tokens, *_ in QUALITY]
        cells = [
            Cell(show(value, digits), value)
            for value, (*_, show, digits) in zip(values, QUALITY, strict=True)
        ]
        n = result.measured(site, "fvu", "kept")[1]
        body.append((Cell(site, depth), *cells, Cell(whole(n), n)))
    return PageTable("quality", "Dictionaries on held-out text", columns, tuple(body))


def layers_table(result: Result) -> PageTable:
    """Effect through each site."""
    columns = (
        Column("site", numeric=False),
        Column("split", numeric=False),
        Column(f"Σ IE features ({result.unit})", "95 % bootstrap interval over pairs"),
        Column(f"Σ IE error ({result.unit})", "95 % bootstrap interval over pairs"),
        Column("error's share of Σ |IE|"),
        Column("pairs"),
    )
    table = result.layers
    sites = list(result.circuit.sites)
    body = []
    for i, (site, split) in enumerate(zip(table["site"], table["split"], strict=True)):
        share = float(table["error_abs"][i] / max(table["error_abs"][i] + table["features_abs"][i], 1e-30))
        sums = (
            Cell(
                signed(table[name][i]),
                float(table[name][i]),
                detail=interval(table[f"{name}_low"][i], table[f"{name}_high"][i]),
            )
            for name in ("features", "error")
        )
        n = int(table["n"][i])
        place = sites.index(site) if site in sites else i
        body.append(
            (Cell(site, place), Cell(split, split), *sums, Cell(percent(share), share), Cell(whole(n), n))
        )
    return PageTable("layers", "Effect through each site", columns, tuple(body))


def agreement_table(result: Result) -> PageTable:
    """Agreement of the splits."""
    columns = (
        Column("site", numeric=False),
        Column("k"),
        Column("overlap of the top k", "95 % interval over resampled test pairs"),
        Column("Spearman", "of |IE| over all nodes of the site"),
    )
    table, sites = result.agreement, list(result.circuit.sites)
    body = tuple(
        (
            Cell(site, sites.index(site) if site in sites else i),
            Cell(str(table["k"][i]), int(table["k"][i])),
            Cell(
                percent(table["overlap"][i]),
                float(table["overlap"][i]),
                detail=_percents(table["low"][i], table["high"][i]),
            ),
            Cell(fixed(table["spearman"][i]), float(table["spearman"][i])),
        )
        for i, site in enumerate(table["site"])
    )
    return PageTable("agreement", "Train and test rankings", columns, body)


def _percents(low: float, high: float) -> str:
    return f"[{percent(low)}, {percent(high)}]" if np.isfinite(low) and np.isfinite(high) else ""


def faithfulness_table(result: Result) -> PageTable:
    """F at every node count."""
    columns = (
        Column("nodes"),
        Column("faithfulness F", "of the circuit of that many nodes; 95 % bootstrap interval over prompts"),
        Column("completeness", "F of everything but the circuit"),
        Column("random circuits", "median F, and 95 % of the draws"),
        Column(f"metric ({result.unit})", "m with only the circuit left; negative: the model is right"),
    )
    chance = result.curve("random")
    both = [
        (result.curve("circuit"), result.curve("complement"), ""),
        (result.assembled("circuit"), result.assembled("complement"), "assembled"),
    ]
    body = [
        _curve_row(circuit, i, complement, chance, source)
        for circuit, complement, source in both
        for i in range(len(circuit["nodes"]))
    ]
    body.sort(key=lambda row: row[0].sort)
    return PageTable("faithfulness", "Faithfulness and completeness", columns, tuple(body))


def _curve_row(circuit: Table, i: int, complement: Table, chance: Table, source: str) -> tuple[Cell, ...]:
    nodes = int(circuit["nodes"][i])
    same = np.flatnonzero(complement["nodes"] == nodes)
    drawn = chance["F"][chance["nodes"] == nodes]
    low, median, high = np.percentile(drawn, (2.5, 50, 97.5)) if len(drawn) else (np.nan,) * 3
    return (
        Cell(whole(nodes), nodes, detail="the circuit of this page" if source else ""),
        _with_interval(circuit, i),
        _with_interval(complement, same[0]) if len(same) else NOTHING,
        Cell(fixed(median), float(median), detail=interval(low, high)) if len(drawn) else NOTHING,
        Cell(signed(circuit["m_circuit"][i]), float(circuit["m_circuit"][i])),
    )


def _with_interval(series: Table, i: int) -> Cell:
    return Cell(
        fixed(series["F"][i]), float(series["F"][i]), detail=interval(series["low"][i], series["high"][i])
    )


def nodes_table(result: Result) -> PageTable:
    """The nodes with the largest effect over all sites."""
    columns = (
        Column("node", numeric=False),
        Column(
            f"IE train ({result.unit})",
            "indirect effect ± standard error over pairs; > 0 supports the clean answer",
        ),
        Column(f"IE test ({result.unit})", "± standard error"),
        Column("active", "share of training pairs in which it changes"),
        Column("in the circuit", numeric=False),
        Column("fires on, in text", numeric=False),
        Column("fires on, in the task", numeric=False),
        Column("promotes", numeric=False),
    )
    members = {node.id for node in result.circuit.nodes}
    return PageTable("nodes", "Nodes with the largest effect", columns, tuple(_node_rows(result, members)))


def _node_rows(result: Result, members: set[str]) -> Iterator[tuple[Cell, ...]]:
    nodes = top_nodes(result.nodes, NODES_LISTED)
    for i, (site, kind, feature) in enumerate(
        zip(nodes["site"], nodes["kind"], nodes["feature"], strict=True)
    ):
        described = result.descriptions.get((site, int(feature)))
        name = f"{site}/{'error' if kind == 'error' else feature}"
        yes = "yes" if name in members else "no"
        effects = (
            Cell(signed(score[i]), float(score[i]), detail=f"± {number(se[i], 2)}")
            for score, se in (
                (nodes["score_train"], nodes["se_train"]),
                (nodes["score_test"], nodes["se_test"]),
            )
        )
        activity = float(nodes["activity_train"][i])
        yield (
            Cell(node_name(site, kind, feature), i, link=anchor(site, feature) if described else ""),
            *effects,
            Cell(percent(activity), activity),
            Cell(yes, yes),
            _words(fires_on(described, 5)),
            _words(fires_on(described, 5, "task")),
            _words(promotes(described, 5)),
        )


def _words(tokens: Sequence[str]) -> Cell:
    text = "  ".join(visible(token) for token in tokens)
    return Cell(text, text)


def edges_table(result: Result) -> PageTable:
    """The strongest edges of the circuit."""
    columns = (
        Column("from", numeric=False),
        Column("to", numeric=False),
        Column(f"weight ({result.unit})", "> 0 supports the clean answer"),
    )
    named = {
        node.id: Cell(node_name(node.site, node.kind, node.feature), node.id) for node in result.circuit.nodes
    }
    links = {
        node.id: anchor(node.site, node.feature)
        for node in result.circuit.nodes
        if (node.site, node.feature) in result.descriptions
    }
    named[METRIC] = Cell("metric", "~")
    strongest = sorted(result.circuit.edges, key=lambda edge: -abs(edge.weight))[:EDGES_LISTED]
    body = tuple(
        (
            *(
                Cell(named[end].text, named[end].sort, link=links.get(end, ""))
                for end in (edge.up, edge.down)
            ),
            Cell(signed(edge.weight), edge.weight),
        )
        for edge in strongest
    )
    return PageTable(
        "edges", f"The strongest {len(body)} of {len(result.circuit.edges)} edges", columns, body
    )
