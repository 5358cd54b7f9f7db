"""The configuration's section on model diffing: the second model, the crosscoder of both, and what is compared."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from circuitflow.config_base import Name, Positive, Section, Seed, Share, mistake
from circuitflow.config_model import HubSource, PathSource, WheelSource
from circuitflow.config_transcoders import SpanningSettings
from circuitflow.dictionaries.settings import used_family_settings


class TuningFiles(Section):
    """Your own text files; of a .jsonl file each line is a document."""

    kind: Literal["files"]
    glob: str
    """Pattern relative to the working directory, ** allowed."""


class TuningTask(Section):
    """Sentences of the task's training pairs."""

    kind: Literal["task"]
    answers: Literal["right", "swapped"] = "swapped"
    """right: as they are; swapped: each prompt with the other prompt's answer, so that a habit is turned round."""


class TuningBundled(Section):
    """The language reference that every Python installation carries."""

    kind: Literal["bundled"]


class TuningHub(Section):
    """A data set of the Hugging Face hub (extra `hub`)."""

    kind: Literal["hub"]
    id: str
    """Data set."""
    revision: str
    """Commit, tag or branch."""
    split: str = "train"
    """Split."""
    column: str = "text"
    """Column with the text."""


class TuningSection(Section):
    """A brief fine-tuning of the run's own model, which makes the second one."""

    text: Annotated[TuningFiles | TuningTask | TuningBundled | TuningHub, Field(discriminator="kind")]
    """What it is trained on."""
    tokens: Positive = 200_000
    """At most this many tokens of it."""
    steps: Positive = 100
    """Optimisation steps."""
    batch: Positive = 8
    """Blocks per step."""
    block: int = Field(default=128, ge=2)
    """Tokens per block, no more than the model takes at once."""
    learning_rate: float = Field(default=1.0e-4, gt=0)
    """Peak learning rate of AdamW; it rises over the first tenth of the steps and falls to zero along a line."""
    layers: list[Annotated[int, Field(ge=0)]] | None = Field(default=None, min_length=1)
    """Blocks whose weights change; null changes every weight, embeddings included."""
    held_out: float = Field(default=0.05, gt=0, lt=1)
    """Share of the blocks on which the loss is measured before and after."""
    seed: Seed = 0
    """Seed of the order of the blocks."""


class DiffingSection(SpanningSettings):
    """What a second model has that the run's own has not: a crosscoder of one site of both (target `diff`).

    Keys of the dictionary are those of the crosscoder.
    """

    name: Name = "diffing"
    """Folder under diffing/ and under dictionaries/."""
    site: str
    """The site of both models, e.g. resid.12."""
    model: Annotated[HubSource | PathSource | WheelSource, Field(discriminator="kind")] | None = None
    """The second model, of the same tokenizer, the same width at the site and the same model.architecture."""
    tuning: TuningSection | None = None
    """Or how it is made of the run's own."""
    kind: Literal["batchtopk", "topk", "jumprelu", "relu"] = "batchtopk"
    """relu carries an L1 penalty, which makes shared features look exclusive."""
    shared: list[Share] = Field(default=[0.3, 0.7], min_length=2, max_length=2)
    """Features are shared whose relative decoder norm ρ lies between these; below they are the run's model's alone,
    above the second's."""
    error_ratio: float = Field(default=0.2, gt=0)
    """An exclusive feature is shrunk, not exclusive, if the other model's error holds its direction from this share on
    (ν of the error); it is exclusive only if ν's interval ends below."""
    reconstruction_ratio: float = Field(default=0.5, gt=0)
    """And decoupled, not exclusive, if the other model's reconstruction holds its direction from this share on without
    it (ν of the reconstruction); it is exclusive only if ν's interval ends below."""
    rows: Positive = 100_000
    """Training tokens, spread evenly, on which this is measured."""
    bootstrap: Positive = 1000
    """Resamples of groups of blocks behind every interval."""
    bootstrap_seed: Seed = 0
    """Seed of the resamples."""
    top: Positive = 10
    """Features of each class that are described, by how much of the vectors they carry."""

    @model_validator(mode="after")
    def _one_second_model(self) -> "DiffingSection":
        if (self.model is None) == (self.tuning is None):
            raise ValueError(
                "name a second model (model), or how it is made by fine-tuning (tuning), and not both"
            )
        if not self.shared[0] < self.shared[1]:
            raise mistake(("shared",), self.shared, "the two bounds should ascend, as in [0.3, 0.7]")
        return self

    def settings(self) -> dict[str, Any]:
        """What shapes the crosscoder."""
        return used_family_settings(self.model_dump(), "crosscoder")
