"""The typed configuration: one model per section, every key documented.

:func:`circuitflow.config_checks.parse_config` makes a :class:`Config` of what Snakemake read from YAML, before any job
starts. Stages never see this module: rules hand them plain values.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from circuitflow.config_base import Name, Positive, Section, Seed, Share
from circuitflow.config_circuits import CircuitSection, EdgesSection, EvaluationSection, ScoresSection
from circuitflow.config_dictionaries import (
    DictionariesSection,
    DictionarySettings,
    MeasureSection,
    StudySection,
    combinations,
    label,
    merge,
)
from circuitflow.config_diffing import DiffingSection
from circuitflow.config_error_nodes import ErrorNodesSection
from circuitflow.config_graphs import GraphsSection
from circuitflow.config_model import ModelSection, ModelSource
from circuitflow.config_transcoders import CrosscoderSection, TranscodersSection
from circuitflow.config_validation import AuditSection, ComparisonSection, EffectsSection

Structure = Literal["simple", "prepositional", "across_relative", "within_relative"]
PaletteColour = Literal[
    "positive", "negative", "feature", "error", "train", "test", "circuit", "complement", "random", "text", "muted",
    "grid", "paper",
]  # fmt: skip


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


class TextPairs(Section):
    """Contexts of the corpus's text, unpaired: the right answer is the token that follows."""

    kind: Literal["text"]
    train: Positive = 400
    """Contexts for scoring and circuits, from documents that dictionaries are trained on."""
    test: Positive = 100
    """Contexts for evaluation, from held-out documents."""
    length: Positive = 24
    """Tokens of a context, without the start token that task.prepend_bos adds."""
    seed: Seed = 0
    """Seed of the draw."""


class ClustersSection(Section):
    """Groups of contexts that are alike inside the model; each gets a circuit of its own."""

    by: Literal["activations", "gradients"] = "gradients"
    """activations: the site's vector at the answer's position | gradients: the metric's, summed over positions."""
    site: str
    """One of sites."""
    count: int = Field(default=4, ge=2)
    """Clusters of k-means."""
    components: Positive | None = None
    """Principal components that k-means sees; null: whole vectors."""
    seed: Seed = 0
    """Seed of k-means."""


class MetricSection(Section):
    """What is attributed: m = wrong − right, negative when the model is right."""

    kind: Literal["logit_difference", "logit", "log_probability", "kl"] = "logit_difference"
    """logit_difference: logit(patch answer) − logit(clean answer) | logit: −logit(clean answer) | log_probability:
    −log p(clean answer) | kl: from the clean run's predictions. Contexts of text need logit or log_probability."""
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
    """Least logit(right) − logit(wrong) on the clean prompt; for contexts of text, wrong is the likeliest other token.
    null keeps every pair."""
    min_probability: Share = 0.0
    """Least probability of the right answer."""
    max_rank: Positive | None = None
    """Greatest rank of the right answer (1 = the model's first choice)."""


class TaskSection(Section):
    """The behaviour under study."""

    name: Name
    """Folder under results/{model}/."""
    pairs: Annotated[GeneratedPairs | ImportedPairs | TextPairs, Field(discriminator="kind")]
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
    clusters: ClustersSection | None = None
    """Groups of the pairs' clean prompts, each with a circuit of its own; null makes one circuit."""


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
    case: str | None = None
    """Kind of prompt (a task's case) over whose tokens the circuit is laid out; null is the first."""
    max_nodes: Positive = 60
    """Nodes laid out over tokens, the strongest first."""
    position_share: Share = 0.3
    """A node summed over positions stands at each that has at least this share of its score."""
    max_rows: Positive = 30
    """Nodes, and edges, in the figure of stability."""


class WandbSection(Section):
    """A project of Weights & Biases that follows trainings (extra `tracking`)."""

    project: str
    """Project."""
    entity: str | None = None
    """User or team; null is the account's own."""
    mode: Literal["offline", "online"] = "offline"
    """offline: kept beside the job's log, for `wandb sync`; online: as it runs, kept offline without a connection."""
    group: str | None = None
    """Group that runs are shown in."""


class TrackingSection(Section):
    """Who follows trainings; shapes no result."""

    wandb: WandbSection | None = None
    """Weights & Biases; null: log.jsonl alone."""


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
    study: StudySection | None = None
    """Several dictionaries of one site side by side; null studies nothing."""
    scores: ScoresSection = ScoresSection()
    """Node scores."""
    edges: EdgesSection = EdgesSection()
    """Edges between neighbouring sites."""
    circuit: CircuitSection = CircuitSection()
    """Which nodes and edges make the circuit."""
    evaluation: EvaluationSection = EvaluationSection()
    """Faithfulness."""
    error_nodes: ErrorNodesSection = ErrorNodesSection()
    """Experiments on error nodes."""
    audit: AuditSection = AuditSection()
    """The circuit held against truly patched nodes and edges."""
    comparison: ComparisonSection = ComparisonSection()
    """Contenders at equal node budgets."""
    effects: EffectsSection = EffectsSection()
    """What the circuit does on single prompts."""
    transcoders: TranscodersSection | None = None
    """Transcoders, of which attribution graphs are made."""
    graphs: GraphsSection | None = None
    """Attribution graphs of single prompts (target `graphs`)."""
    crosscoder: CrosscoderSection | None = None
    """A dictionary across sites (target `crosscoder`)."""
    diffing: DiffingSection | None = None
    """A second model and what it has that the first has not (target `diff`)."""
    features: FeaturesSection = FeaturesSection()
    """Descriptions of the top features."""
    plots: PlotsSection = PlotsSection()
    """Looks."""
    tracking: TrackingSection = TrackingSection()
    """Who follows trainings."""
    recompute: str = ""
    """Stages (comma-separated) that ignore kept results; for the command line: --config recompute=train_dictionary."""

    def models(self) -> dict[str, ModelSource]:
        """Where models come from, by key: the run's own, and the second one of model diffing."""
        found: dict[str, ModelSource] = {"model.source": self.model.source}
        if self.diffing is not None and self.diffing.model is not None:
            found["diffing.model"] = self.diffing.model
        return found

    def dictionary(self, site: str) -> DictionarySettings:
        """The settings of one site's dictionary, overrides applied."""
        return self._settings(self.dictionaries.overrides.get(site, {}))

    def variants(self) -> dict[str, DictionarySettings]:
        """The study's dictionaries by label: every combination of the lists, with every seed; none without a study."""
        if self.study is None:
            return {}
        site = self.dictionaries.overrides.get(self.study.site, {})
        found = {}
        for variant in self.study.variants:
            for chosen in combinations({"seed": self.study.seeds, **variant}):
                settings = self._settings(merge(site, chosen))
                found[label(settings.kind, chosen)] = settings
        return found

    def every_dictionary(self) -> list[tuple[str, str, DictionarySettings]]:
        """Set, site and settings of every dictionary: the run's own, the contenders', and the variants of the study."""
        own = [(self.dictionaries.name, site, self.dictionary(site)) for site in self.sites]
        own += [
            (f"compare/{name}", site, self._settings(merge(self.dictionaries.overrides.get(site, {}), keys)))
            for name, keys in self.comparison.sets().items()
            for site in self.sites
        ]
        if self.study is None:
            return own
        return own + [
            (f"{self.study.name}/{name}", self.study.site, settings)
            for name, settings in self.variants().items()
        ]

    def _settings(self, over: Mapping[str, Any]) -> DictionarySettings:
        shared = self.dictionaries.model_dump(exclude={"name", "overrides"})
        return DictionarySettings.model_validate(merge(shared, over))


def json_schema() -> dict[str, Any]:
    """JSON schema of the configuration, for editors."""
    return Config.model_json_schema()
