"""Settings of one dictionary as plain values: what the configuration's section ``dictionaries`` hands to the stage."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from circuitflow.errors import UserError, nearest

T = TypeVar("T", bound="Training | Settings")

DATA = ("outlier_ratio", "skip_positions")
"""Training keys that every kind uses: they say which vectors a dictionary is for."""

LOOP = (
    *DATA, "epochs", "batch", "learning_rate", "warmup", "decay", "clip_norm", "precision", "dead_after", "buffer_rows",
    "checkpoints", "evaluate_every", "resample_every", "resample_until",
)  # fmt: skip
"""Training keys of every trained kind."""

PENALISED = (*LOOP, "sparsity_warmup")
LARGEST = (*LOOP, "auxk", "auxk_weight", "k_start", "k_anneal")

USED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "topk": (("d_dict", "seed", "k"), LARGEST),
    "batchtopk": (("d_dict", "seed", "k"), LARGEST),
    "matryoshka": (("d_dict", "seed", "k", "prefixes"), LARGEST),
    "relu": (("d_dict", "seed", "penalty"), PENALISED),
    "jumprelu": (("d_dict", "seed", "penalty", "target_l0", "bandwidth", "first_threshold"), PENALISED),
    "gated": (("d_dict", "seed", "penalty"), PENALISED),
    "random": (("d_dict", "seed", "k"), DATA),
    "identity": ((), DATA),
    "none": ((), DATA),
    "pretrained": (("source",), DATA),
}
"""Keys that each kind uses, of the dictionary and of its training."""

ARCHITECTURES = ("single", "cross_layer", "crosscoder")
"""Dictionaries that write other sites than they read, or several."""

SPANNING = ("topk", "batchtopk", "relu", "jumprelu")
"""Kinds that they can have."""

SATURATING = ("d_dict", "seed", "penalty", "saturation", "dead_penalty")
CROSS_LAYER: dict[str, tuple[str, ...]] = {
    "relu": SATURATING,
    "jumprelu": (*SATURATING, "bandwidth", "first_threshold"),
}
"""Keys of kinds that are others in a cross-layer transcoder."""

LEARNING_RATE = 2.5e-3
LEARNING_RATES = {"relu": 5e-3, "gated": 5e-3}
"""Kinds with another rate: an L1 penalty takes long to act, and this is better at every L0."""
CLIP_NORMS = {"topk": 0.01, "batchtopk": 0.01, "matryoshka": 0.01}
"""Kinds whose gradient is clipped: below its norm of every step, so that early steps weigh no more than late ones in
Adam's second moment; FVU after equal tokens is 2 % lower."""


@dataclass(frozen=True)
class Training:
    """How a dictionary is trained; keys and meanings are those of the configuration. Left out means off."""

    outlier_ratio: float | None
    """Tokens with a norm above ratio × median are left out; None keeps them."""
    skip_positions: tuple[int, ...]
    """Positions of a block that are left out."""
    epochs: float = 1.0
    """Passes over the training rows."""
    batch: int = 1024
    """Tokens per step."""
    learning_rate: float = LEARNING_RATE
    """Peak learning rate of Adam, for inputs scaled to mean ‖x‖² = 1."""
    warmup: float = 0.0
    """Share of the steps over which the learning rate rises."""
    decay: float = 0.0
    """Share of the steps, at the end, over which it falls to zero."""
    sparsity_warmup: float = 0.0
    """Share of the steps over which sparsity penalties rise."""
    k_start: int | None = None
    """Active features per token at the first step; None is k."""
    k_anneal: float = 0.0
    """Share of the steps over which k_start falls to k."""
    clip_norm: float | None = None
    """Largest norm of the gradient of all weights together, for inputs scaled to mean ‖x‖² = 1; None clips nothing."""
    precision: str = "float32"
    """Of the products: float32 or bfloat16 (weights and sums stay float32)."""
    auxk_weight: float = 0.0
    """Weight of the auxiliary loss; 0 turns it off."""
    auxk: int | None = None
    """Dead features used per token; None is d_model / 2."""
    dead_after: int = 1 << 60
    """Tokens without firing after which a feature counts as dead."""
    resample_every: int | None = None
    """Steps between resamplings of dead features; None never resamples."""
    resample_until: float = 0.0
    """Share of the steps after which nothing is resampled."""
    buffer_rows: int = 262_144
    """Rows shuffled together: bounds memory."""
    checkpoints: tuple[float, ...] = ()
    """Shares of the training after which weights are kept, besides the end."""
    evaluate_every: int = 1 << 60
    """Steps between held-out measurements."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Training":
        """From plain JSON values.

        :raises UserError: a key is unknown.
        """
        sequences = {key: tuple(values.get(key, ())) for key in ("skip_positions", "checkpoints")}
        return _of(cls, {"outlier_ratio": None, **values, **sequences}, "training.")

    def checkpoint_steps(self, steps: int) -> frozenset[int]:
        """Step counts after which weights are kept, of a training of ``steps`` steps."""
        chosen = {max(1, round(share * steps)) for share in self.checkpoints}
        return frozenset(chosen - {steps})


@dataclass(frozen=True)
class Settings:
    """What a dictionary is; keys and meanings are those of the configuration. A kind reads only its own (``USED``)."""

    kind: str
    training: Training
    d_dict: int = 0
    """Number of features."""
    seed: int = 0
    """Of weights and of the order of the data."""
    k: int = 0
    """Active features per token."""
    penalty: float | None = None
    """Weight of the sparsity penalty; None is the kind's own default."""
    target_l0: float | None = None
    """JumpReLU: the L0 that the penalty aims at; None penalises L0 itself."""
    bandwidth: float | None = None
    """JumpReLU: width of the window in which thresholds get a gradient; None is the default."""
    first_threshold: float | None = None
    """JumpReLU: thresholds at first; None is the default."""
    prefixes: tuple[float, ...] = ()
    """Matryoshka: ends of the nested prefixes, as shares of d_dict, ascending to 1."""
    source: Mapping[str, Any] | None = None
    """Pretrained: format, and path or hub id and revision."""
    skip: bool = False
    """Transcoders: a linear map of what is read is added to the reconstruction."""
    saturation: float | None = None
    """Cross-layer ReLU and JumpReLU: c of the penalty tanh(c‖W_dec‖f), for mean ‖x‖² = d_model; None is the default."""
    dead_penalty: float | None = None
    """Cross-layer ReLU and JumpReLU: weight of pre-activations below the threshold on dead features, for mean ‖x‖² =
    d_model; None is the default, 0 turns it off."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Settings":
        """From plain JSON values, :func:`used_settings` or all of them.

        No learning rate or clip_norm means the kind's own; a clip_norm of 0 clips nothing.

        :raises UserError: a key is unknown.
        """
        training_values = dict(values.get("training", {}))
        if training_values.get("learning_rate") is None:
            training_values["learning_rate"] = LEARNING_RATES.get(values.get("kind", ""), LEARNING_RATE)
        if training_values.get("clip_norm") is None:
            training_values["clip_norm"] = CLIP_NORMS.get(values.get("kind", ""))
        training_values["clip_norm"] = training_values["clip_norm"] or None
        training = Training.of(training_values)
        return _of(cls, {**values, "training": training, "prefixes": tuple(values.get("prefixes") or ())}, "")


def used_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the kind uses: a change of any other shapes nothing, so it must not retrain.

    :raises UserError: the kind is unknown.
    """
    kind = values["kind"]
    if kind not in USED:
        raise UserError(f"Kind of dictionary {kind!r} is unknown; {nearest(kind, USED)}.")
    own, training = USED[kind]
    kept = {key: values[key] for key in own if key in values}
    used = {key: value for key, value in values.get("training", {}).items() if key in training}
    return {"kind": kind, **kept, "training": used}


def used_family_settings(values: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """:func:`used_settings` of transcoders (``single``), a cross-layer transcoder or a crosscoder.

    :raises UserError: the kind is not one that they can have.
    """
    kind = values["kind"]
    if kind not in SPANNING:
        raise UserError(
            f"Kind {kind!r} is not one of {architecture} dictionaries; {nearest(kind, SPANNING)}."
        )
    used = used_settings(values)
    if architecture == "cross_layer" and kind in CROSS_LAYER:
        own = {key: values[key] for key in CROSS_LAYER[kind] if key in values}
        used = {"kind": kind, **own, "training": used["training"]}
    if architecture != "crosscoder":
        used["skip"] = bool(values.get("skip", False))
        for key in ("resample_every", "resample_until"):  # new directions are drawn from what is read
            used["training"].pop(key, None)
    return used


def check_values(settings: Settings, where: str = "") -> None:
    """Check the values of a known kind, each by itself and against d_dict.

    :param where: the configuration's section and a dot, for messages.
    :raises UserError: one cannot be.
    """
    used = USED[settings.kind][0]
    if "d_dict" in used and settings.d_dict < 1:
        raise UserError(f"Key {where}d_dict is {settings.d_dict}; choose the number of features, at least 1.")
    if "k" in used:
        _check_k(settings, where)
    for key in ("penalty", "target_l0", "bandwidth", "first_threshold", "saturation"):
        value = getattr(settings, key)
        if (key in used or key == "saturation") and value is not None and not value > 0:
            raise UserError(f"Key {where}{key} is {value}; choose a number above 0, or null for the default.")
    if "target_l0" in used and (settings.target_l0 or 0) > settings.d_dict:
        raise UserError(
            f"Key {where}target_l0 is {settings.target_l0}, more than d_dict, which is {settings.d_dict}; lower it."
        )


def _check_k(settings: Settings, where: str) -> None:
    if not 1 <= settings.k <= settings.d_dict:
        raise UserError(
            f"Key {where}k is {settings.k}; choose a number from 1 to d_dict, which is {settings.d_dict}."
        )
    start = settings.training.k_start
    if start is not None and not settings.k <= start <= settings.d_dict:
        raise UserError(
            f"Key {where}training.k_start is {start}; choose a number from k, which is {settings.k}, to d_dict, which "
            f"is {settings.d_dict}."
        )


def _of(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    names = [field.name for field in fields(cls)]
    for key in values:
        if key not in names:
            raise UserError(f"Key {where}{key} is unknown; {nearest(key, names, limit=len(names))}.")
    return cls(**values)
