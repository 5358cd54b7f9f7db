"""The configuration's sections on what is done with attribution graphs: interventions, supernodes, heads, motifs."""

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from circuitflow.config_base import Name, Positive, Section, Seed, Share, check_different
from circuitflow.errors import UserError, nearest

Operation = Literal["set", "scale", "remove"]

FEATURE = re.compile(r"\d+_\d+(_\d+)?")
"""Ids of features."""
GROUP = re.compile(r"group-\d+")
"""Names of groups that are found."""
TAKEN = re.compile(rf"{FEATURE.pattern}|[TL]_\d+|E_\d+_\d+|errors_\d+|{GROUP.pattern}")
"""Names of nodes, and of groups that are found."""


def _quoted(value: object) -> object:
    if isinstance(value, int):
        raise ValueError(
            'it should be text in quotes, such as "3_1021": without quotes YAML reads 3_1021 as the number 31021'
        )
    return value


def _id(value: str) -> str:
    if not FEATURE.fullmatch(value):
        raise ValueError(
            'it should be the id of a feature: layer_feature_position, such as "3_1021_5", or "3_1021" for every '
            "position"
        )
    return value


def _layer(value: object) -> object:
    counted = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not counted and value not in (None, "touched", "all"):
        raise ValueError("it should be a layer, counted from 0, or touched, all or null")
    return value


Quoted = Annotated[str, BeforeValidator(_quoted)]
"""Text that YAML reads as a number where its quotes are missing."""
FeatureId = Annotated[Quoted, AfterValidator(_id)]
FeatureIds = Annotated[list[FeatureId], Field(min_length=1)]
Layer = Annotated[int, Field(ge=0)]


class ChangeSection(Section):
    """What becomes of some features in an intervention."""

    nodes: list[Quoted] = Field(min_length=1)
    """Names of supernodes, or ids of features, in quotes: "3_1021_5" is feature 1021 of layer 3 at position 5, and
    "3_1021" the same wherever it is active in the prompt. Features that are no nodes of the graph may be named too."""
    operation: Operation = "remove"
    """remove: their activations are 0 | scale: multiples of their own | set: absolute activations."""
    value: float | None = None
    """scale: the multiple (2 doubles, -1 turns round) | set: the activation."""

    @model_validator(mode="after")
    def _has_its_value(self) -> "ChangeSection":
        if (self.value is None) != (self.operation == "remove"):
            needs = "takes no value" if self.operation == "remove" else "needs a value"
            raise ValueError(f"operation {self.operation} {needs}")
        return self


class InterventionSection(Section):
    """Changes that are made together."""

    name: Name
    """In tables and figures."""
    changes: list[ChangeSection] = Field(min_length=1)
    """What is changed; of two that name one feature at one position the later counts."""
    prompts: list[Name] = []
    """Graphs (names of graphs.prompts) that it is made on; empty: all."""


class ModeSection(Section):
    """What may respond to an intervention."""

    name: Name
    """In tables and figures."""
    attention: Literal["frozen", "free"] = "frozen"
    """frozen: patterns are those of the prompt as it is."""
    norms: Literal["frozen", "free"] = "frozen"
    """frozen: the scales of all norms are those of the prompt as it is."""
    up_to: Annotated[Layer | Literal["touched", "all"] | None, BeforeValidator(_layer)] = None
    """The last layer whose MLPs keep to the prompt as it is, so that effects go on through later ones alone;
    touched: the deepest layer of a changed feature | all: no MLP responds | null: every MLP responds."""


class InterventionsSection(Section):
    """Features held at other values, and what the model then says (target `graph_experiments`)."""

    wanted: list[InterventionSection] = []
    """Interventions by hand."""
    each: int = Field(default=24, ge=0)
    """The features of most influence, removed one at a time, to hold what the graph predicts against the model."""
    groups: int = Field(default=8, ge=0)
    """The supernodes of most influence, removed one at a time."""
    modes: list[ModeSection] = Field(
        default=[
            ModeSection(name="direct", up_to="all"),
            ModeSection(name="frozen", norms="free"),
            ModeSection(name="free", attention="free", norms="free"),
        ],
        min_length=1,
    )
    """Every intervention is made under each of these. Frozen norms do not hold large changes in check: where MLPs
    respond, these can grow without bounds from layer to layer."""
    targets: Positive = 100
    """Features of most influence whose pre-activations are compared with the prediction, beside the logits."""
    tokens: Positive = 5
    """Likeliest tokens listed per intervention, beside the graph's."""
    bootstrap: Positive = 1000
    """Resamples of interventions behind the intervals of r and slope."""
    seed: Seed = 0
    """Seed of the resamples."""

    @model_validator(mode="after")
    def _different(self) -> "InterventionsSection":
        check_different("modes", [one.name for one in self.modes])
        check_different("wanted", [one.name for one in self.wanted])
        return self


class SupernodesSection(Section):
    """Features of a graph that are read as one (target `graph_experiments`)."""

    by_hand: dict[str, FeatureIds] = {}
    """Ids of features, in quotes, by the supernode's name: "3_1021_5", or "3_1021" for every position. What is no node
    of a graph is left out there."""
    prompts: dict[Name, dict[str, FeatureIds]] = {}
    """The same for single graphs, by name of the prompt."""
    automatic: bool = True
    """Group the other features of the pruned graph."""
    similarity: float = Field(default=0.5, gt=0, le=1)
    """Groups join while the mean similarity of their features is above this."""
    virtual_weight: Share = 0.5
    """Share of the virtual weights' cosine in the similarity; the rest is co-activation over the corpus."""
    positions: Literal["same", "any"] = "same"
    """same: a group stands at one position | any: features of all positions can be one."""
    max_layers: Positive | None = None
    """Groups span at most so many layers; null: any number."""
    contexts: Positive = 128
    """Blocks of the corpus, spread evenly, over which co-activation is taken."""
    drawn: Positive = 30
    """Supernodes and single features in the figure, those of most influence."""

    @model_validator(mode="after")
    def _names_are_free(self) -> "SupernodesSection":
        for name in [*self.by_hand, *(name for own in self.prompts.values() for name in own)]:
            if TAKEN.fullmatch(name):
                raise ValueError(
                    f"supernode {name!r} has a name that nodes or found groups can have; choose another, such as "
                    f"{'capital'!r}"
                )
        return self


class HeadsSection(Section):
    """What attention heads carry of a graph's edges (target `graph_experiments`)."""

    edges: Positive = 200
    """Strongest edges of the pruned graph, by the influence that flows along them."""
    batch: Positive = 64
    """Targets pulled back at once."""


class MotifsSection(Section):
    """Chains of features that recur across the graphs of many prompts (target `graph_motifs`)."""

    least: int = Field(default=2, ge=2)
    """Graphs that a chain must be in to be listed."""
    edges: Positive = 1000
    """Edges between features of each graph, those with most influence along them."""
    lengths: list[Literal[2, 3]] = [2, 3]
    """Features in a chain: 2 is an edge, 3 a feature between two others."""
    shuffles: Positive = 200
    """Shuffled graphs per graph: every feature keeps how many edges come in and go out."""
    swaps: Positive = 10
    """Swaps tried per edge between one shuffled graph and the next."""
    level: float = Field(default=0.05, gt=0, lt=1)
    """False discovery rate below which a chain counts as recurring."""
    seed: Seed = 0
    """Seed of the swaps."""


def check_names(
    prompts: Sequence[str], supernodes: SupernodesSection, interventions: InterventionsSection
) -> None:
    """Check that experiments name prompts and supernodes that there are.

    :raises UserError: the first that is not.
    """
    for prompt in supernodes.prompts:
        _check_prompt(prompt, prompts, "graphs.supernodes.prompts")
    for number, one in enumerate(interventions.wanted):
        key = f"graphs.interventions.wanted.{number}"
        for prompt in one.prompts:
            _check_prompt(prompt, prompts, f"{key}.prompts")
        for prompt in one.prompts or prompts:
            known = [*supernodes.by_hand, *supernodes.prompts.get(prompt, {})]
            for name in (name for change in one.changes for name in change.nodes):
                found = supernodes.automatic and GROUP.fullmatch(name)
                if not (name in known or FEATURE.fullmatch(name) or found):
                    raise UserError(
                        f'Key {key}.changes names {name!r}, which is neither the id of a feature (such as "3_1021") '
                        f"nor a supernode of prompt {prompt}; {nearest(name, known)}."
                    )


def _check_prompt(name: str, prompts: Sequence[str], key: str) -> None:
    if name not in prompts:
        raise UserError(f"Key {key} names {name}, which is not in graphs.prompts; {nearest(name, prompts)}.")
