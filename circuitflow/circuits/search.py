"""The smallest circuit that is as faithful as wanted."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from circuitflow.circuits.conventions import conventions
from circuitflow.circuits.evaluation import prepared
from circuitflow.circuits.interventions import Triple, keep
from circuitflow.circuits.statistics import bootstrap, faithfulness
from circuitflow.circuits.sweep import ranked_nodes
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.progress import logger
from circuitflow.store.journal import Journal
from circuitflow.store.tables import read_table, write_table

JOURNAL = "searched.jsonl"

LEFT_OUT = ("random", "further_starts", "errors", "neurons", "areas")
"""Conventions of the evaluation that the search has no use for."""

SEARCH = (
    "counts are doubled until one reaches the wanted F, then bisected from the last that did not; F need not grow "
    "with the nodes, so fewer than chosen may do as well, at a count that was not tried"
)


def search_circuit(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. The number of strongest nodes that makes a circuit as faithful as wanted, on training pairs.

    Inputs ``model``, ``nodes`` (table of rank_features), ``tokens_train``, ``gradients_train``, ``dictionaries`` (list,
    in the order of ``sites``); params ``sites``, ``metric``, ``faithfulness`` (the wanted F), ``pool`` (features per
    site that are candidates, beside the errors), ``ranking`` (absolute | signed), ``pairs`` (training pairs used),
    ``ablation``, ``aggregate``, ``bootstrap``, ``seed``, ``batch_rows``, ``dtype``, ``compute``.

    Output ``search``, one row per node count that was tried, ascending: nodes, F, low, high (95 % bootstrap over
    prompts), chosen (the smallest count with F of at least the wanted one), n (pairs). Doubling and bisection
    (``search`` in the provenance) try about 2·log2 of the chosen count.

    :raises UserError: no count that was tried reaches the wanted F, all nodes together among them.
    """
    here = prepared(inputs, params, "train")
    ranked = ranked_nodes(read_table(inputs["nodes"]), params["sites"], params["ranking"]).pooled(
        params["pool"]
    )
    journal = Journal(out.folder / JOURNAL)

    def measured(nodes: list[Triple]) -> np.ndarray:
        circuit = keep(nodes, params["sites"])
        return here.values([circuit], params["batch_rows"], journal)[0]

    nothing = measured([])
    found: dict[int, np.ndarray] = {}

    def reaches(count: int) -> bool:
        found[count] = measured(ranked.top(count))
        reached = float(faithfulness(found[count], nothing, here.full, params["aggregate"]))
        logger.info("%d nodes: F %.3f", count, reached)
        return reached >= float(params["faithfulness"])

    chosen = smallest(len(ranked.nodes), reaches)
    counts = sorted(found)
    values = np.stack([found[count] for count in counts]) if counts else np.zeros((0, len(here.full)))
    F = faithfulness(values, nothing, here.full, params["aggregate"])
    if chosen is None:
        raise _unreached(params["faithfulness"], dict(zip(counts, F.tolist(), strict=True)))
    arguments = (here.full, params["aggregate"], params["bootstrap"], params["seed"])
    low, high = bootstrap(values, nothing, *arguments)
    columns = {
        "nodes": np.array(counts, np.int64),
        "F": F,
        "low": low,
        "high": high,
        "chosen": np.array(counts) == chosen,
        "n": np.full(len(counts), len(here.full), np.int64),
    }
    said = {name: text for name, text in conventions(params).items() if name not in LEFT_OUT}
    facts = {"conventions": {**said, "search": SEARCH}, "candidates": len(ranked.nodes)}
    write_table(out.files["search"], columns, {**out.provenance, **facts})
    journal.remove()


def smallest(most: int, reaches: Callable[[int], bool]) -> int | None:
    """The smallest count tried, from 1 to ``most``, that ``reaches``; None if none does.

    Doubling finds the first power of two (or ``most``) that does, bisection between it and the one before goes on. Each
    count is tried once at most, and the one returned was itself tried: nothing is assumed about those between.
    """
    below, count = 0, 1
    while count < most and not reaches(count):
        below, count = count, count * 2
    above = min(count, most)
    if above == 0 or (count >= most and not reaches(above)):
        return None
    while above - below > 1:
        middle = (below + above) // 2
        if reaches(middle):
            above = middle
        else:
            below = middle
    return above


def _unreached(wanted: float, tried: Mapping[int, float]) -> UserError:
    known = {count: F for count, F in tried.items() if not np.isnan(F)}
    if not known:
        return UserError(
            "No node has an effect that ablation shows, so no circuit is faithful; check the task and the sites."
        )
    best = max(known, key=lambda count: known[count])
    return UserError(
        f"No circuit reaches circuit.nodes.faithfulness {wanted}: the largest F is {known[best]:.3f}, with {best} of "
        f"{max(tried)} nodes; ask for less, raise edges.pool, or add the sites that carry the rest."
    )
