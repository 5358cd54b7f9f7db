"""Layers and features that the section on attribution graphs, and overrides of transcoders, name."""

from collections.abc import Iterator

from circuitflow.config import Config
from circuitflow.config_graph_experiments import FEATURE
from circuitflow.config_graphs import GraphsSection
from circuitflow.config_transcoders import TranscodersSection
from circuitflow.errors import UserError
from circuitflow.models.depth import known_layers


def check_graph_layers(config: Config, layers: int | None = None) -> None:
    """Check layers and features against the transcoders there will be; nothing where there are none.

    :param layers: how many the model has, where that is known; by default as the configuration tells.
    :raises UserError: a layer is beyond the model or has no transcoder, or a transcoder has no such feature.
    """
    section = config.transcoders
    if section is None:
        return
    layers = layers or known_layers(config.model.source.model_dump())
    for layer in section.overrides:
        _check_layer(section, layer, layers, f"transcoders.overrides names layer {layer}")
    if config.graphs is None:
        return
    for key, feature in _features(config.graphs):
        _check_feature(section, key, feature, layers)
    for number, mode in enumerate(config.graphs.interventions.modes):
        if isinstance(mode.up_to, int) and layers is not None and mode.up_to >= layers:
            raise UserError(
                f"Key graphs.interventions.modes.{number}.up_to is {mode.up_to}, but the model has {layers} layers; "
                f"the deepest is {layers - 1}."
            )


def _features(graphs: GraphsSection) -> Iterator[tuple[str, str]]:
    """Ids of features, after their keys."""
    supernodes = graphs.supernodes
    named = [(f"by_hand.{name}", ids) for name, ids in supernodes.by_hand.items()]
    named += [
        (f"prompts.{prompt}.{name}", ids)
        for prompt, own in supernodes.prompts.items()
        for name, ids in own.items()
    ]
    for key, ids in named:
        yield from ((f"graphs.supernodes.{key}", feature) for feature in ids)
    for number, one in enumerate(graphs.interventions.wanted):
        for change in one.changes:
            ids = [node for node in change.nodes if FEATURE.fullmatch(node)]
            yield from ((f"graphs.interventions.wanted.{number}.changes", feature) for feature in ids)


def _check_feature(section: TranscodersSection, key: str, feature: str, layers: int | None) -> None:
    layer, index = map(int, feature.split("_")[:2])
    _check_layer(section, layer, layers, f"{key} names {feature}")
    size = section.of_layer(layer).get("d_dict")
    if size is not None and index >= size:
        raise UserError(
            f"Key {key} names {feature}, but the transcoder of layer {layer} has {size} features, 0 to {size - 1}."
        )


def _check_layer(section: TranscodersSection, layer: int, layers: int | None, named: str) -> None:
    if section.layers is not None and layer not in section.layers:
        listed = ", ".join(map(str, section.layers))
        raise UserError(f"Key {named}, but only the layers of transcoders.layers have transcoders: {listed}.")
    if layer < 0:
        raise UserError(f"Key {named}, but layers count from 0.")
    if layers is not None and layer >= layers:
        raise UserError(f"Key {named}, but the model has {layers} layers; the deepest is {layers - 1}.")
