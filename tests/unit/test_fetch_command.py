"""``circuitflow fetch``: everything that a configuration takes from elsewhere is brought here beforehand."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from typer.testing import CliRunner

from circuitflow.cli import app
from circuitflow.config import Config
from circuitflow.config_base import Section
from circuitflow.config_dictionaries import DictionarySource
from circuitflow.config_model import HubSource

CONFIG = yaml.safe_load((Path(__file__).parents[2] / "configs/tiny.yaml").read_text(encoding="utf-8"))
HUB = {"kind": "hub", "revision": "r"}
SCOPE = {"format": "gemma_scope", "revision": "r"}
FETCHED = {"model.source", "diffing.model", "dictionaries.source", "transcoders.source"}
"""Keys of what the command fetches."""


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is asked of the hub: repository, and key or site."""
    found: list[tuple[str, str]] = []
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 2}))

    def fetch(source: dict[str, Any], key: str) -> Path:
        found.append((source["id"], key))
        return tmp_path

    def fetch_dictionary(source: dict[str, Any], site: str) -> str:
        found.append((source["id"], site))
        return "there"

    monkeypatch.setattr("circuitflow.models.fetching.fetch", fetch)
    monkeypatch.setattr("circuitflow.dictionaries.formats.hub.fetch_dictionary", fetch_dictionary)
    return found


@pytest.mark.parametrize("architecture", ["single", "cross_layer"])
def test_all_of_them_are_fetched(tmp_path: Path, asked: list[tuple[str, str]], architecture: str) -> None:
    values = {name: section for name, section in CONFIG.items() if name != "graphs"}
    values["model"] = {"name": "m", "source": {**HUB, "id": "first"}}
    values["sites"] = ["resid.1"]
    values["dictionaries"] = {"name": "d", "kind": "pretrained", "source": {**SCOPE, "id": "saes"}}
    values["comparison"] = {"contenders": []}
    theirs = {
        "name": "t",
        "kind": "pretrained",
        "architecture": architecture,
        "source": {**SCOPE, "id": "theirs"},
    }
    values["transcoders"] = theirs
    values["diffing"] = {"site": "resid.1", "model": {**HUB, "id": "second"}}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    done = CliRunner().invoke(app, ["fetch", "--configfile", str(file)], catch_exceptions=False)
    assert done.exit_code == 0
    models = [("first", "model.source"), ("second", "diffing.model")]
    layers = ["mlp_in.0"] if architecture == "cross_layer" else ["mlp_in.0", "mlp_in.1"]
    assert asked == [*models, ("saes", "resid.1"), *(("theirs", site) for site in layers)]
    assert "diffing.model: " in done.output


def test_no_other_key_names_a_model_or_dictionary_of_the_hub() -> None:
    assert set(places(Config)) == FETCHED


def places(section: type[Section], key: str = "") -> Iterator[str]:
    """Keys whose value may be a model or dictionary of the hub."""
    for name, field in section.model_fields.items():
        for kind in kinds(field.annotation):
            if kind in (HubSource, DictionarySource):
                yield f"{key}{name}"
            elif isinstance(kind, type) and issubclass(kind, Section):
                yield from places(kind, f"{key}{name}.")


def kinds(annotation: Any) -> list[Any]:
    inside = get_args(annotation)
    return [found for part in inside for found in kinds(part)] if inside else [annotation]
