"""The configuration's section on attribution graphs."""

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from circuitflow.config_base import Name, Positive, Section, check_different, mistake
from circuitflow.config_graph_experiments import (
    HeadsSection,
    InterventionsSection,
    MotifsSection,
    SupernodesSection,
    check_names,
)
from circuitflow.config_graph_export import GraphExportSection, GraphFeaturesSection, GraphFigureSection


def _kind(target: Any) -> str | None:
    if isinstance(target, (dict, CombinationSection)):
        return "combination"
    if isinstance(target, str):
        return "text"
    return "id" if isinstance(target, int) and not isinstance(target, bool) else None


class CombinationSection(Section):
    """A combination of logits as one target, such as the difference of two answers."""

    name: str | None = None
    """In tables and figures; null: the combination as text."""
    tokens: dict[str, float] = Field(min_length=1)
    """Coefficient of each token's logit, by the token's text: {" is": 1.0, " are": -1.0}."""
    weight: float = Field(default=1.0, gt=0)
    """Its weight where influence begins, beside the other targets', whose weights are their probabilities."""

    @model_validator(mode="after")
    def _combines(self) -> "CombinationSection":
        if not any(self.tokens.values()):
            raise mistake(("tokens",), self.tokens, "one coefficient at least should not be 0")
        return self


Target = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[int, Field(ge=0), Tag("id")]
    | Annotated[CombinationSection, Tag("combination")],
    Discriminator(
        _kind,
        custom_error_type="target",
        custom_error_message='it should be a token (its text or its id) or a combination, as in {tokens: {" is": 1.0}}',
    ),
]


class PromptSection(Section):
    """One prompt, one graph."""

    name: Name
    """Folder of the graph."""
    text: str = Field(min_length=1)
    """The prompt; the graph explains what comes next."""
    targets: list[Target] | None = Field(default=None, min_length=1)
    """What is explained: tokens (text with its leading space, or id) or combinations; null: the likeliest tokens."""

    @model_validator(mode="after")
    def _targets_differ(self) -> "PromptSection":
        targets = self.targets or []
        for number, target in enumerate(targets):
            if target in targets[:number]:
                raise mistake(("targets", number), target, "an earlier target is the same; remove one")
        return self


class VirtualSection(Section):
    """Weights between features that hold in any context (target `graphs`)."""

    features: Positive = 24
    """Features of each graph, those of most influence, whose virtual weights are listed."""
    strongest: Positive = 50
    """Weights listed per feature and side."""
    blocks: Positive = 64
    """Blocks of the corpus over which it is counted which features are active together."""


class GraphsSection(Section):
    """Attribution graphs of single prompts, from transcoders (target `graphs`)."""

    prompts: list[PromptSection] = Field(min_length=1)
    """A graph each."""
    prepend_bos: bool = False
    """Start prompts with the tokenizer's start token."""
    max_logits: Positive = 10
    """At most this many of the likeliest next tokens are explained."""
    probability: float = Field(default=0.95, gt=0, le=1)
    """The fewest tokens are explained that have this probability together."""
    max_nodes: Positive | None = 2048
    """Features whose incoming effects are computed, the most influential first; null: all active ones."""
    reorder_every: Positive = 512
    """Features after which the order of influence is computed again."""
    batch: Positive = 256
    """Features computed at once: memory, not results."""
    keep_all: bool = False
    """Keep active features beyond max_nodes as sources (large files); otherwise what they add is kept as one number."""
    node_share: float = Field(default=0.8, gt=0, le=1)
    """Pruning: the nodes that have this share of all influence stay."""
    edge_share: float = Field(default=0.98, gt=0, le=1)
    """Pruning: the edges that have this share of influence among them stay."""
    virtual: VirtualSection = VirtualSection()
    """Weights that hold in any context."""
    features: GraphFeaturesSection = GraphFeaturesSection()
    """How the features of pruned graphs are described."""
    export: GraphExportSection = GraphExportSection()
    """graph.json, for viewers."""
    figure: GraphFigureSection = GraphFigureSection()
    """How a pruned graph is drawn."""
    supernodes: SupernodesSection = SupernodesSection()
    """Groups of features (target `graph_experiments`)."""
    interventions: InterventionsSection = InterventionsSection()
    """Features held at other values (target `graph_experiments`)."""
    heads: HeadsSection = HeadsSection()
    """Shares of attention heads (target `graph_experiments`)."""
    motifs: MotifsSection = MotifsSection()
    """Chains of features that recur over prompts (target `graph_experiments`)."""

    @model_validator(mode="after")
    def _names_differ(self) -> "GraphsSection":
        check_different("prompts", [prompt.name for prompt in self.prompts])
        return self

    @model_validator(mode="after")
    def _experiments_name_what_there_is(self) -> "GraphsSection":
        check_names([prompt.name for prompt in self.prompts], self.supernodes, self.interventions)
        return self
