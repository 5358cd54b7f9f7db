"""Figures inside the page: the SVG with ids of its own, and the caption that ``snakemake --report`` shows too."""

import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from circuitflow.circuits.circuit import METRIC, Circuit
from circuitflow.errors import UserError
from circuitflow.features.descriptions import Descriptions, fires_on
from circuitflow.features.tokens import visible
from circuitflow.plots.numbers import signed
from circuitflow.plots.tables import node_name
from circuitflow.report.tables import anchor

TITLES = {
    "task_accuracy": "The task",
    "training_curves": "Training of the dictionaries",
    "layer_importance": "Effect through each site",
    "agreement": "Agreement of train and test",
    "top_features": "Top nodes and what they fire on",
    "faithfulness": "Faithfulness and completeness",
    "circuit": "The circuit",
    "audit": "Audit of the circuit",
    "clusters": "Clusters of contexts",
    "circuit_positions": "The circuit over the tokens of a prompt",
    "stability": "Stability of the circuit",
    "methods": "Methods of scoring nodes",
}


@dataclass(frozen=True)
class Figure:
    """One figure of the page."""

    name: str
    title: str
    svg: str
    """Markup, ready to stand in HTML."""
    caption: str
    """Markup."""


def read_figures(
    names: Sequence[str],
    svgs: Sequence[Path],
    captions: Sequence[Path],
    circuit: Circuit,
    descriptions: Descriptions,
) -> dict[str, Figure]:
    """Figures by name; the circuit's nodes and edges get tips and lead to their descriptions."""
    figures = {}
    for name, svg, caption in zip(names, svgs, captions, strict=True):
        title = TITLES.get(name, name.replace("_", " "))
        drawn = inline(svg, name, title)
        if name == "circuit":
            drawn = _with_tips(drawn, circuit, descriptions)
        figures[name] = Figure(
            name, title, drawn, rendered(caption.read_text(encoding="utf-8"), str(caption))
        )
    return figures


def inline(path: Path, name: str, title: str) -> str:
    """An SVG file's picture for use inside HTML.

    Ids get the prefix ``{name}-``, since those of several figures would clash; header and metadata go.

    :raises UserError: the file is missing or holds no picture.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"Figure {path} does not exist; run the stage plot_{name}.") from None
    start = text.find("<svg")
    if start < 0:
        raise UserError(f"Figure {path} is not an SVG picture; delete it and run again.")
    text = re.sub(r"<metadata>.*?</metadata>", "", text[start:], flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    label = html.escape(title, quote=True)
    return re.sub(r"<svg", f'<svg role="img" aria-label="{label}" class="plot {name}"', text, count=1)


def rendered(caption: str, source: str) -> str:
    """A caption in reStructuredText as HTML; files and raw HTML in it are refused."""
    from docutils.core import publish_parts  # type: ignore[import-untyped]

    settings = {"file_insertion_enabled": False, "raw_enabled": False, "report_level": 5}
    parts = publish_parts(caption, source_path=source, writer="html5", settings_overrides=settings)
    return str(parts["body"])


def _with_tips(svg: str, circuit: Circuit, descriptions: Descriptions) -> str:
    """Nodes become links to their descriptions; nodes and edges get a line of text for the pointer to rest on."""
    names = {node.id: node_name(node.site, node.kind, node.feature) for node in circuit.nodes} | {
        METRIC: METRIC
    }
    places = {node.id: str(number) for number, node in enumerate(circuit.nodes)} | {METRIC: "m"}
    tips, links = {}, {}
    for node in circuit.nodes:
        described = descriptions.get((node.site, node.feature))
        words = "  ".join(visible(token) for token in fires_on(described, 6))
        key = f"circuit-node-{places[node.id]}"
        tips[key] = f"{names[node.id]}: IE {signed(node.score)}" + (f"; fires on {words}" if words else "")
        if described:
            links[key] = anchor(node.site, node.feature)
    for edge in circuit.edges:
        key = f"circuit-edge-{places[edge.up]}-{places[edge.down]}"
        tips[key] = f"{names[edge.up]} → {names[edge.down]}: {signed(edge.weight)}"
    return re.sub(
        r'<g id="(circuit-(?:node|edge)-[^"]+)">(.*?)</g>', _tipped(tips, links), svg, flags=re.DOTALL
    )


def _tipped(tips: Mapping[str, str], links: Mapping[str, str]) -> Callable[[re.Match[str]], str]:
    def replace(match: re.Match[str]) -> str:
        key, inner = match.groups()
        group = f'<g id="{key}"><title>{html.escape(tips.get(key, key))}</title>{inner}</g>'
        link = links.get(key)
        return f'<a href="#{html.escape(link, quote=True)}">{group}</a>' if link else group

    return replace
