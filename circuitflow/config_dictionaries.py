"""The configuration's sections about dictionaries: what they are, how they are trained, measured and compared."""

import re
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from circuitflow.config_base import Name, Positive, Section, Seed, Share
from circuitflow.provenance import canonical_json, digest

Kind = Literal[
    "topk", "batchtopk", "matryoshka", "relu", "jumprelu", "gated", "random", "identity", "none", "pretrained"
]  # fmt: skip
Format = Literal[
    "circuitflow", "sae_lens", "gemma_scope", "dictionary_learning", "sparsify", "circuit_tracer", "decoder"
]  # fmt: skip
LISTS = ("prefixes", "checkpoints", "skip_positions")
"""Keys of a study's variants whose values are lists by themselves."""

SHORT = {"d_dict": "d", "penalty": "p", "target_l0": "l0_", "learning_rate": "lr"}
"""Keys in the labels of variants."""


class TrainingSection(Section):
    """How a dictionary is trained."""

    epochs: float = Field(default=8.0, gt=0)
    """Passes over the training rows."""
    batch: Positive = 1024
    """Tokens per step."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of Adam; null is the kind's own: 2.5e-3, and 5e-3 for relu and gated."""
    warmup: Share = 0.05
    """Share of steps over which the learning rate rises."""
    decay: Share = 0.2
    """Share of steps, at the end, over which it falls to zero."""
    sparsity_warmup: Share = 0.2
    """Share of steps over which the sparsity penalty rises (relu, jumprelu, gated)."""
    k_start: Positive | None = None
    """Active features per token at the first step, more than k (topk, batchtopk, matryoshka); null is k itself."""
    k_anneal: Share = 0.1
    """Share of steps over which k_start falls to k."""
    clip_norm: float | None = Field(default=None, ge=0)
    """Largest norm of the gradient of all weights together; 0 clips nothing, null is the kind's own: 0.01 for topk,
    batchtopk and matryoshka, 0 for the others."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products, for GPUs; weights, Adam and sums stay float32."""
    resample_every: Positive | None = None
    """Steps between resamplings of dead features, drawn from the inputs with most loss; null never resamples."""
    resample_until: Share = 0.5
    """Share of steps after which nothing is resampled."""
    auxk_weight: float = Field(default=0.03125, ge=0)
    """Weight of the auxiliary loss that revives dead features (topk, batchtopk, matryoshka)."""
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


class DictionarySource(Section):
    """Where a pretrained dictionary comes from: a path, or a repository of the Hugging Face hub."""

    format: Format
    """The library that wrote it; `circuitflow convert --help` lists what each holds."""
    path: str | None = None
    """File or folder on disk, or the place inside the hub repository."""
    id: str | None = None
    """Repository of the hub, as in "google/gemma-scope-2b-pt-res"."""
    revision: str | None = None
    """Commit, tag or branch of the hub repository; a commit makes the run repeatable."""

    @model_validator(mode="after")
    def _one_place(self) -> "DictionarySource":
        if self.id is None and self.path is None:
            raise ValueError("it should have a path on disk, or the id of a hub repository")
        if (self.id is None) != (self.revision is None):
            raise ValueError("id and revision of a hub repository belong together")
        return self


class DictionarySettings(Section):
    """One site's dictionary; `overrides` may change any of these for a site. A kind reads the keys that name it."""

    kind: Kind = "topk"
    """topk, batchtopk, matryoshka, relu, jumprelu, gated: trained; random, identity (features are coordinates), none
    (the error alone): made; pretrained: read from source."""
    d_dict: Positive = 4608
    """Number of features."""
    k: Positive = 32
    """Active features per token (topk; batchtopk, matryoshka: on average over a batch)."""
    seed: Seed = 0
    """Seed of weights and of the order of the data."""
    penalty: float | None = Field(default=None, gt=0)
    """Weight of the sparsity penalty, for vectors scaled to mean ‖x‖² = 1 (relu, jumprelu, gated); null is the kind's
    own default."""
    target_l0: float | None = Field(default=None, gt=0)
    """jumprelu: the mean L0 that the penalty aims at; null penalises L0 itself."""
    bandwidth: float | None = Field(default=None, gt=0)
    """jumprelu: width of the window around a threshold in which it gets a gradient; null is the default."""
    first_threshold: float | None = Field(default=None, gt=0)
    """jumprelu: thresholds at first; null is the default."""
    prefixes: list[Annotated[float, Field(gt=0, le=1)]] = [0.0625, 0.125, 0.25, 0.5, 1.0]
    """matryoshka: ends of the nested prefixes, as shares of d_dict, ascending to 1."""
    source: DictionarySource | None = None
    """pretrained: where the weights come from."""
    training: TrainingSection = TrainingSection()
    """Training."""


class DictionariesSection(DictionarySettings):
    """The set of dictionaries, one per site."""

    name: Name
    """Folder under dictionaries/ and under the task."""
    overrides: dict[str, dict[str, Any]] = {}
    """Settings that differ for a site, e.g. {resid.12: {k: 64}}."""


class StudySection(Section):
    """Several dictionaries of one site side by side (target `study`)."""

    name: Name
    """Folder under studies/ and under dictionaries/."""
    site: str
    """The site, one of sites."""
    seeds: list[Seed] = [0]
    """Every variant is trained once with each, unless it has a key `seed` of its own."""
    variants: list[dict[str, Any]] = Field(min_length=1)
    """Keys of dictionaries that differ; a list of values makes one variant each, e.g. {kind: topk, k: [16, 32]}."""
    features: Positive = 40
    """Features, by importance, in heat maps and correlations."""
    seed: Seed = 0
    """Seed of samples, maps and intervals."""


class MeasureSection(Section):
    """Quality of dictionaries on held-out text."""

    blocks: Positive = 16
    """Held-out blocks through which the model runs with each dictionary spliced in."""
    batch_blocks: Positive = 8
    """Blocks per forward pass."""
    bootstrap: Positive = 1000
    """Resamples of held-out blocks behind every interval."""
    seed: Seed = 0
    """Seed of the resamples."""


def combinations(variant: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every choice of one value for each key whose value is a list; keys of `training` count as keys of their own."""
    keys: dict[tuple[str, ...], Any] = {(key,): value for key, value in variant.items() if key != "training"}
    keys |= {("training", key): value for key, value in variant.get("training", {}).items()}
    choices = [
        value if isinstance(value, list) and key[-1] not in LISTS else [value] for key, value in keys.items()
    ]
    for chosen in product(*choices):
        values: dict[str, Any] = {}
        for key, value in zip(keys, chosen, strict=True):
            values = merge(values, {key[0]: value} if len(key) == 1 else {key[0]: {key[1]: value}})
        yield values


def label(kind: str, chosen: Mapping[str, Any]) -> str:
    """Name of a variant, usable as a folder: its kind, the other keys that it sets, and its seed."""
    keys = {key: value for key, value in chosen.items() if key not in ("kind", "seed", "training")}
    keys |= {**chosen.get("training", {}), "seed": chosen.get("seed", 0)}
    return "-".join([kind, *(f"{SHORT.get(key, key)}{_plain(value)}" for key, value in keys.items())])


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the keys of ``over`` in its place, section by section."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        value = digest(canonical_json(dict(value)))[:6]
    elif isinstance(value, list):
        value = "_".join(map(str, value))
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", f"{value:g}" if isinstance(value, float) else str(value))
