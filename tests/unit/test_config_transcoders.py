"""The sections transcoders and crosscoder: what each kind uses, what is refused, which layers there are."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from circuitflow.config_transcoders import CrosscoderSection, TranscodersSection
from circuitflow.dictionaries.settings import Settings, used_family_settings
from circuitflow.errors import UserError
from circuitflow.models.depth import chosen_layers, known_layers
from circuitflow.store.objects import Manifest

TOY = {"kind": "toy", "layers": 4}


def section(**values: object) -> TranscodersSection:
    return TranscodersSection.model_validate({"name": "mine", **values})


def test_settings_hold_what_the_kind_and_the_architecture_use():
    single, across = section(kind="jumprelu"), section(kind="jumprelu", architecture="cross_layer")
    assert "target_l0" in single.of_layer(0)
    assert "saturation" not in single.of_layer(0)
    assert {"saturation", "dead_penalty", "bandwidth"} <= set(across.of_layer(0))
    assert "target_l0" not in across.of_layer(0)
    assert "resample_every" not in single.of_layer(0)["training"]
    assert section(target_l0=4.0).of_layer(0) == section().of_layer(0)  # what the kind does not use
    own = CrosscoderSection(name="c", sites=["resid.1", "resid.2"]).settings()
    assert own["kind"] == "batchtopk"
    assert "skip" not in own
    assert "resample_every" in own["training"]
    for values in (single.of_layer(0), across.of_layer(0), own):
        Settings.of(values)  # the trainer knows every key


def test_a_layer_may_differ_and_others_do_not_notice():
    given = section(overrides={2: {"k": 64, "training": {"epochs": 1.0}}})
    assert (given.of_layer(2)["k"], given.of_layer(2)["training"]["epochs"]) == (64, 1.0)
    assert given.of_layer(1) == section().of_layer(1)


def test_pretrained_ones_keep_their_source_and_the_outlier_rule():
    source = {"format": "circuit_tracer", "path": "files"}
    found = section(kind="pretrained", source=source).of_layer(3)
    assert set(found) == {"kind", "source", "training"}
    assert set(found["training"]) == {"outlier_ratio", "skip_positions"}


def test_sources_are_those_of_layers_and_come_once_where_layers_belong_together():
    source, other = ({"format": "circuit_tracer", "path": path} for path in ("files", "others"))
    single = section(kind="pretrained", source=source, overrides={3: {"source": other}}).sources([1, 3])
    assert {site: found["path"] for site, found in single.items()} == {
        "mlp_in.1": "files",
        "mlp_in.3": "others",
    }
    across = section(kind="pretrained", source=source, architecture="cross_layer")
    assert list(across.sources([1, 3])) == ["mlp_in.1"]
    assert section().sources([1]) == {}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"kind": "pretrained"}, "kind pretrained and source belong together"),
        ({"source": {"format": "circuit_tracer", "path": "x"}}, "kind pretrained and source belong together"),
        ({"layers": []}, "should name each layer once"),
        ({"layers": [1, 1]}, "should name each layer once"),
        ({"architecture": "cross_layer", "overrides": {0: {"k": 3}}}, "trained together"),
        ({"overrides": {0: {"kk": 3}}}, "kk"),
        (
            {"overrides": {0: {"kind": "pretrained", "source": {"format": "decoder", "path": "x"}}}},
            "pretrained",
        ),
        ({"kind": "gated"}, "kind"),
        ({"kind": "jumprelu", "architecture": "cross_layer", "target_l0": 4.0}, "aims at no L0"),
        ({"training": {"resample_every": 10}}, "training.resample_every"),
    ],
)
def test_mistakes_are_told(values, sentence):
    with pytest.raises(ValidationError) as failed:
        section(**values)
    assert sentence in str(failed.value)


def test_kinds_that_span_no_sites_are_named():
    with pytest.raises(UserError, match=r"Kind 'gated' is not one of single dictionaries"):
        used_family_settings({"kind": "gated"}, "single")
    with pytest.raises(ValidationError, match="each site once"):
        CrosscoderSection(name="c", sites=["resid.1", "resid.1"])


def test_layers_are_those_of_the_model(tmp_path: Path):
    manifest = tmp_path / "model" / "manifest.json"
    assert chosen_layers(None, TOY, manifest, "transcoders.layers") == [0, 1, 2, 3]
    assert chosen_layers([3, 1], TOY, manifest, "transcoders.layers") == [1, 3]
    with pytest.raises(
        UserError, match=r"^Key transcoders\.layers has 4, but the model has 4 layers; the deepest is 3"
    ):
        chosen_layers([4], TOY, manifest, "transcoders.layers")
    hub = {"kind": "hub", "id": "a/b", "revision": "c"}
    with pytest.raises(
        UserError, match=r"^Key transcoders\.layers is null, all layers, but .* list the layers\.$"
    ):
        chosen_layers(None, hub, manifest, "transcoders.layers")
    assert chosen_layers([7], hub, manifest, "transcoders.layers") == [7]
    Manifest("model", "o", "c", {"params": {"source": hub}}, {"layers": 6}).write(manifest)
    assert known_layers(hub, manifest) == 6
    assert known_layers({**hub, "revision": "d"}, manifest) is None
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 9}))
    assert known_layers({"kind": "path", "path": str(folder)}, tmp_path / "none.json") == 9
