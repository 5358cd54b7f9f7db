"""Checks of the sections on transcoders, attribution graphs, crosscoders and model diffing."""

from collections.abc import Iterator, Sequence
from typing import Any

from circuitflow.config import Config, TextPairs
from circuitflow.config_model import ToySource
from circuitflow.dictionaries.formats.places import local_files
from circuitflow.dictionaries.settings import Settings, check_values
from circuitflow.errors import UserError
from circuitflow.models.depth import known_layers
from circuitflow.models.sites import parse_site


def check_spanning(config: Config, folders_of_stages: set[str]) -> None:
    """Check what dictionaries that span sites, and what is made of them, ask for.

    :param folders_of_stages: names under results/{model} that stages write to.
    :raises UserError: a name is taken, a site or layer is beyond the model, a setting cannot be, or a section lacks
        another.
    """
    _check_names(config, folders_of_stages)
    if config.graphs is not None and config.transcoders is None:
        raise UserError(
            "Section graphs needs the section transcoders, of which attribution graphs are made; add it "
            "(docs/graphs.md shows how)."
        )
    _check_depth(config)
    for key, values in _settings(config):
        settings = Settings.of(values)
        check_values(settings, key)
        check_positions(settings.training.skip_positions, config.corpus.block, key)
    if config.diffing is not None:
        parse_site(config.diffing.site)
        tuning = config.diffing.tuning
        if tuning is not None and tuning.text.kind == "task" and isinstance(config.task.pairs, TextPairs):
            raise UserError(
                "Key diffing.tuning.text.kind is task, but task.pairs.kind is text, whose contexts have no answers to "
                "train on; choose files, bundled or hub."
            )


def check_positions(positions: Sequence[int], block: int, key: str, where: str = "") -> None:
    """Check positions of a block that training leaves out.

    :param key: the section and a dot, for messages; ``where`` says more of the dictionary.
    :raises UserError: a block has no such position.
    """
    beyond = [position for position in positions if position >= block]
    if beyond:
        raise UserError(
            f"Key {key}training.skip_positions{where} has {beyond[0]}, but a block has {block} positions, 0 to "
            f"{block - 1} (corpus.block); leave it out."
        )


def check_transcoder_files(config: Config, layers: int | None = None) -> None:
    """Check that pretrained transcoders on disk are there, one for each layer.

    :param layers: how many the model has, where that is known; by default as the configuration tells.
    :raises UserError: they are not.
    """
    section = config.transcoders
    if section is None or section.kind != "pretrained":
        return
    layers = layers or known_layers(config.model.source.model_dump())
    wanted = section.layers if section.layers is not None else range(layers or 0)
    for site, source in section.sources(list(wanted)).items():
        local_files(source, site)


def _settings(config: Config) -> Iterator[tuple[str, dict[str, Any]]]:
    """What shapes each dictionary, after the key of its section and a dot."""
    if config.transcoders is not None:
        yield "transcoders.", config.transcoders.of_layer()
        for layer in config.transcoders.overrides:
            yield f"transcoders.overrides.{layer}.", config.transcoders.of_layer(layer)
    if config.crosscoder is not None:
        yield "crosscoder.", config.crosscoder.settings()
    if config.diffing is not None:
        yield "diffing.", config.diffing.settings()


def _check_names(config: Config, folders_of_stages: set[str]) -> None:
    named = {
        "dictionaries.name": config.dictionaries.name,
        "transcoders.name": config.transcoders.name if config.transcoders else None,
        "crosscoder.name": config.crosscoder.name if config.crosscoder else None,
        "diffing.name": config.diffing.name if config.diffing else None,
    }
    seen: dict[str, str] = {}
    for key, name in named.items():
        if name is None:
            continue
        if name in seen:
            raise UserError(f"Keys {seen[name]} and {key} are both {name}; give each a name of its own.")
        seen[name] = key
        if key != "dictionaries.name" and name in folders_of_stages - {"diffing"}:
            raise UserError(
                f"Key {key} is {name}, the name of a folder that stages write to; choose another."
            )


def _check_depth(config: Config) -> None:
    """Sites and layers, where the configuration itself tells the model's depth."""
    for site in config.crosscoder.sites if config.crosscoder else []:
        parse_site(site)
    source = config.model.source
    if not isinstance(source, ToySource):
        return
    named = [("crosscoder.sites", site) for site in (config.crosscoder.sites if config.crosscoder else [])]
    named += [("diffing.site", config.diffing.site)] if config.diffing else []
    asked = [(key, site, parse_site(site).layer) for key, site in named]
    if config.transcoders and config.transcoders.layers:
        asked += [("transcoders.layers", str(layer), layer) for layer in config.transcoders.layers]
    if config.diffing and config.diffing.tuning and config.diffing.tuning.layers:
        asked += [("diffing.tuning.layers", str(layer), layer) for layer in config.diffing.tuning.layers]
    for key, text, layer in asked:
        if layer is not None and layer >= source.layers:
            raise UserError(
                f"Key {key} has {text}, but model {config.model.name} has {source.layers} layers, counted from 0; the "
                f"deepest is {source.layers - 1}."
            )
