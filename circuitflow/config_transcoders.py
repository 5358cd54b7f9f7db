"""The configuration's sections about dictionaries that span sites: transcoders, cross-layer ones, and crosscoders."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from circuitflow.config_base import Name, Positive, Section, Seed, below, mistake
from circuitflow.config_dictionaries import DictionarySource, TrainingSection, merge
from circuitflow.dictionaries.settings import used_family_settings
from circuitflow.errors import UserError

Kind = Literal["topk", "batchtopk", "relu", "jumprelu"]
Layer = Annotated[int, Field(ge=0)]


class SpanningTraining(TrainingSection):
    """How a dictionary that spans sites is trained: as the others, with more tokens held at once and fewer epochs."""

    epochs: float = Field(default=4.0, gt=0)
    """Passes over the training rows."""
    buffer_rows: Positive = 65_536
    """Rows shuffled together, of every site that is read or written: bounds memory."""
    checkpoints: list[Annotated[float, Field(ge=0, le=1)]] = []
    """Shares of the training after which weights are kept, besides the end."""


class SpanningSettings(Section):
    """What transcoders and crosscoders have in common; a kind reads the keys that name it."""

    d_dict: Positive = 4608
    """Number of features (of each layer)."""
    k: Positive = 32
    """Active features per token and layer (topk; batchtopk: on average over a batch)."""
    seed: Seed = 0
    """Seed of weights and of the order of the data."""
    penalty: float | None = Field(default=None, gt=0)
    """Weight of the sparsity penalty, for vectors scaled to mean ‖x‖² = 1 at every site (relu, jumprelu); null is the
    kind's own default."""
    bandwidth: float | None = Field(default=None, gt=0)
    """jumprelu: width of the window around a threshold in which it gets a gradient; null is the default."""
    first_threshold: float | None = Field(default=None, gt=0)
    """jumprelu: thresholds at first; null is the default."""
    target_l0: float | None = Field(default=None, gt=0)
    """jumprelu, but not cross_layer: the mean L0 that the penalty aims at; null penalises L0 itself."""
    training: SpanningTraining = SpanningTraining()
    """Training."""


class TranscoderSettings(SpanningSettings):
    """Settings of transcoders that may differ from layer to layer."""

    kind: Kind | Literal["pretrained"] = "topk"
    """topk, batchtopk, relu, jumprelu: trained; pretrained: read from source."""
    skip: bool = False
    """Add a linear map of the MLP's input to the reconstruction."""
    saturation: float | None = Field(default=None, gt=0)
    """cross_layer relu and jumprelu: c of the penalty tanh(c·‖W_dec‖·f), for mean ‖x‖² = d_model; null is 4."""
    dead_penalty: float | None = Field(default=None, ge=0)
    """cross_layer relu and jumprelu: weight that raises pre-activations of dead features, for mean ‖x‖² = d_model; null
    is 3e-6, 0 turns it off."""
    source: DictionarySource | None = None
    """pretrained: where the weights come from."""


class TranscodersSection(TranscoderSettings):
    """Transcoders: features that read what an MLP reads and write what it writes; attribution graphs need them."""

    name: Name
    """Folder under dictionaries/, activations/ and graphs/."""
    architecture: Literal["single", "cross_layer"] = "single"
    """single: one transcoder a layer, each for its own MLP | cross_layer: features of a layer write to its MLP and to
    those of all later layers, trained together."""
    layers: list[Layer] | None = None
    """Layers; null is all of the model. In graphs the MLPs of other layers are errors."""
    overrides: dict[int, dict[str, Any]] = {}
    """single: settings that differ for a layer, e.g. {0: {k: 64}}."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """Element type of their store of activations."""

    @model_validator(mode="after")
    def _fits(self) -> "TranscodersSection":
        if (self.kind == "pretrained") != (self.source is not None):
            raise ValueError("kind pretrained and source belong together")
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise mistake(
                ("layers",), self.layers, "it should name each layer once, and at least one; null names all"
            )
        if self.architecture == "cross_layer" and self.overrides:
            message = "overrides are of single transcoders; those of cross_layer are trained together"
            raise mistake(("overrides",), self.overrides, message)
        if self.architecture == "cross_layer" and self.kind == "jumprelu" and self.target_l0 is not None:
            message = "cross_layer jumprelu aims at no L0; remove it, and set penalty"
            raise mistake(("target_l0",), self.target_l0, message)
        for layer, values in self.overrides.items():
            self._check_override(layer, values)
        _check_kind(self, self.architecture)
        return self

    def of_layer(self, layer: int | None = None) -> dict[str, Any]:
        """What shapes the transcoder of a layer, by default one without overrides, or the cross-layer transcoder."""
        over = {} if layer is None else self.overrides.get(layer, {})
        return _used(self._merged(over), self.architecture)

    def sources(self, layers: Sequence[int]) -> dict[str, dict[str, Any]]:
        """Where pretrained ones of these layers come from, by the site that is read; a cross-layer one comes once."""
        if self.kind != "pretrained":
            return {}
        first = layers[:1] if self.architecture == "cross_layer" else layers
        return {f"mlp_in.{layer}": self.of_layer(layer)["source"] for layer in first}

    def _check_override(self, layer: int, values: dict[str, Any]) -> None:
        try:
            kind = self._merged(values)["kind"]
        except ValidationError as error:
            raise below(("overrides", layer), error) from None
        if (kind == "pretrained") != (self.kind == "pretrained"):
            message = "overrides cannot make some layers pretrained and train the others"
            raise mistake(("overrides", layer, "kind"), kind, message)

    def _merged(self, over: dict[str, Any]) -> dict[str, Any]:
        values = self.model_dump(include=set(TranscoderSettings.model_fields))
        return TranscoderSettings.model_validate(merge(values, over)).model_dump()


class CrosscoderSection(SpanningSettings):
    """A crosscoder: features that read several sites and write them all (acausal), to see where features live."""

    name: Name
    """Folder under dictionaries/ and activations/."""
    sites: list[str] = Field(min_length=2)
    """Sites of one width, as in [resid.4, resid.8, resid.12]."""
    kind: Kind = "batchtopk"
    """topk, batchtopk, relu, jumprelu. An L1 penalty (relu) makes features look exclusive that are not."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """Element type of their store of activations."""

    @model_validator(mode="after")
    def _fits(self) -> "CrosscoderSection":
        if len(set(self.sites)) < len(self.sites):
            raise mistake(("sites",), self.sites, "it should name each site once")
        _check_kind(self, "crosscoder")
        return self

    def settings(self) -> dict[str, Any]:
        """What shapes it."""
        return _used(self.model_dump(exclude={"name", "sites", "dtype"}), "crosscoder")


def _used(values: dict[str, Any], architecture: str) -> dict[str, Any]:
    if values.get("kind") == "pretrained":
        training = {key: values["training"][key] for key in ("outlier_ratio", "skip_positions")}
        return {"kind": "pretrained", "source": values["source"], "training": training}
    return used_family_settings(values, architecture)


def _check_kind(section: SpanningSettings, architecture: str) -> None:
    values = section.model_dump()
    if architecture != "crosscoder" and section.training.resample_every is not None:
        message = "new features would be drawn from what is written back; null it here"
        raise mistake(("training", "resample_every"), section.training.resample_every, message)
    try:
        _used(values, architecture)
    except UserError as error:
        raise ValueError(str(error)) from None
