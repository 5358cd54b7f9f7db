"""Everything the page tells about, read from the run's tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from circuitflow.circuits.circuit import Circuit, read_circuit
from circuitflow.features.descriptions import Descriptions, read_descriptions
from circuitflow.models.sites import in_depth_order
from circuitflow.plots.conditions import main_rows
from circuitflow.plots.tables import ASSEMBLED, Table, rows, swept, top_nodes, unit_of
from circuitflow.store.tables import read_provenance, read_table

NODES_LISTED = 40
"""Nodes in the page's table of the strongest."""


@dataclass(frozen=True)
class Result:
    """A finished run."""

    config: Mapping[str, Any]
    prompts: Table
    dropped: Table
    quality: Mapping[str, Table]
    """Quality of each site's dictionary, in order of depth; empty tables for dictionaries without an encoder."""
    layers: Table
    agreement: Table
    nodes: Table
    descriptions: Descriptions
    """Of the features that the page tells about: those of the circuit, and those among the strongest nodes."""
    circuit: Circuit
    audit: Table
    """How much nodes and edges in and out of the circuit truly do: the table ``summary`` of audit_circuit."""
    faithfulness: Table
    conventions: Mapping[str, Any]
    """What the numbers of ``faithfulness`` mean."""

    @property
    def model(self) -> str:
        """Name of the model."""
        return str(self.config["model"]["name"])

    @property
    def task(self) -> str:
        """Name of the task, or of one of its clusters."""
        return str(self.circuit.provenance.get("task", self.config["task"]["name"]))

    @property
    def unit(self) -> str:
        """Unit of the metric and of effects on it."""
        return unit_of(self.config["task"].get("metric"))

    @property
    def opposed(self) -> bool:
        """Whether prompts have wrong answers; if not, the likeliest other token takes their place."""
        return bool(np.any(self.prompts["wrong_answer"] != ""))

    def curve(self, series: str) -> dict[str, np.ndarray]:
        """One series of the faithfulness table ("circuit", "complement", "random"), by rising number of nodes."""
        return swept(self.faithfulness, series)

    def assembled(self, series: str) -> dict[str, np.ndarray]:
        """The row of the circuit itself ("circuit") or of everything but it ("complement"); no row if not evaluated."""
        return rows(self.faithfulness, series=series, source=ASSEMBLED)

    def measured(self, site: str, quantity: str, tokens: str | None = None) -> tuple[float, int]:
        """A quality of a site's dictionary and the number of tokens behind it; (NaN, 0) if it was not measured."""
        found = rows(self.quality[site], quantity=quantity, **({"tokens": tokens} if tokens else {}))
        return (float(found["value"][0]), int(found["n"][0])) if len(found["value"]) else (float("nan"), 0)


def read_result(inputs: Mapping[str, Any], config: Mapping[str, Any]) -> Result:
    """Read the inputs of the stage build_report.

    :raises UserError: a file is missing or damaged.
    """
    nodes, circuit = read_table(inputs["nodes"]), read_circuit(inputs["circuit"])
    return Result(
        config=config,
        prompts=read_table(inputs["prompts"]),
        dropped=read_table(inputs["dropped"]),
        quality=_by_site(inputs["quality"]),
        layers=read_table(inputs["layers"]),
        agreement=read_table(inputs["agreement"]),
        nodes=nodes,
        descriptions=_told(read_descriptions(inputs["features"]), nodes, circuit),
        circuit=circuit,
        audit=read_table(inputs["audit"]),
        faithfulness=main_rows(read_table(inputs["faithfulness"])),
        conventions=read_provenance(inputs["faithfulness"]).get("conventions", {}),
    )


def _told(descriptions: Descriptions, nodes: Table, circuit: Circuit) -> Descriptions:
    top = top_nodes(nodes, NODES_LISTED)
    wanted = set(zip(top["site"], top["feature"].tolist(), strict=True))
    wanted |= {(node.site, node.feature) for node in circuit.nodes}
    return {key: described for key, described in descriptions.items() if key in wanted}


def _by_site(paths: Sequence[Path]) -> dict[str, Table]:
    found = {str(read_provenance(path)["params"]["site"]): read_table(path) for path in paths}
    return {site: found[site] for site in in_depth_order(found)}
