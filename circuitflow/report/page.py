"""Stage ``build_report``: figures, tables, descriptions and provenance in one HTML file that needs nothing else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.plots.audit import sentences
from circuitflow.report import tables
from circuitflow.report.cards import SHADES, cards
from circuitflow.report.figures import read_figures
from circuitflow.report.findings import findings
from circuitflow.report.overview import overview
from circuitflow.report.result import Result, read_result
from circuitflow.report.sources import artefacts
from circuitflow.store.files import write_text

TABLES = (
    tables.task_table,
    tables.dropped_table,
    tables.quality_table,
    tables.layers_table,
    tables.agreement_table,
    tables.nodes_table,
    tables.edges_table,
    tables.faithfulness_table,
)


def build_report(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Write the page.

    Inputs: tables ``prompts``, ``dropped``, ``quality`` (list), ``layers``, ``agreement``, ``nodes``, ``faithfulness``,
    ``audit`` (summary); ``features`` (list) and ``circuit``; ``figures`` (list of SVGs) and ``captions`` (list), in the
    order of the params' ``plots``; ``templates`` (page.html.j2, page.css, page.js). Params: ``plots`` (names),
    ``config``. Output ``page``.

    :raises UserError: an input is missing or damaged.
    """
    result = read_result(inputs, params["config"])
    figures = read_figures(
        params["plots"], inputs["figures"], inputs["captions"], result.circuit, result.descriptions
    )
    found, versions = artefacts(inputs)
    parts = _templates(inputs["templates"])
    page = _environment().from_string(parts["page.html.j2"])
    text = page.render(
        style=parts["page.css"],
        script=parts["page.js"],
        result=result,
        findings=findings(result),
        overview=overview(result),
        audit=sentences(result.audit, result.unit),
        figures=figures,
        tables={table.name: table for table in (make(result) for make in TABLES)},
        cards=cards(result),
        shades=SHADES,
        config=_as_yaml(result),
        artefacts=found,
        versions=versions,
        provenance=out.provenance,
    )
    write_text(out.files["page"], text)


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )


def _templates(paths: Sequence[Path]) -> dict[str, str]:
    found = {path.name: path.read_text(encoding="utf-8") for path in paths}
    for name in ("page.html.j2", "page.css", "page.js"):
        if name not in found:
            raise UserError(f"The page's template {name} is missing; it belongs to resources/report/.")
    return found


def _as_yaml(result: Result) -> str:
    return yaml.safe_dump(dict(result.config), sort_keys=False, allow_unicode=True, width=100)
