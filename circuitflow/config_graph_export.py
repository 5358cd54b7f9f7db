"""The configuration's sections on describing, exporting and drawing attribution graphs."""

from pydantic import Field

from circuitflow.config_base import Positive, Section


class GraphFeaturesSection(Section):
    """Descriptions of the features of pruned graphs."""

    features: int = Field(default=200, ge=0)
    """Features described over all graphs, those of most influence; 0 describes none."""
    contexts: Positive = 5
    """Contexts shown per feature."""
    window: Positive = 12
    """Tokens on each side of the strongest one."""
    logits: Positive = 8
    """Tokens that a feature raises and lowers most, listed per side."""


class GraphExportSection(Section):
    """graph.json of every prompt, as circuit-tracer's viewer and Neuronpedia read it."""

    scan: str | None = None
    """The model that Neuronpedia has the features under; null is a folder of feature files beside the graphs."""
    feature_url: str | None = None
    """Address below which feature files lie, for Neuronpedia."""
    supernodes: bool = False
    """Include the supernodes of graph_experiments, pinned."""


class GraphFigureSection(Section):
    """The figure of a pruned graph."""

    max_nodes: Positive = 80
    """Features and errors drawn, those of most influence."""
    max_edges: Positive = 150
    """Edges drawn, those with the largest share of the influence."""
