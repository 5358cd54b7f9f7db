"""How many layers a model has, as far as that is known before it is loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from circuitflow.errors import UserError
from circuitflow.store.files import read_json
from circuitflow.store.objects import read_manifest


def known_layers(source: Mapping[str, Any], manifest: Path | None = None) -> int | None:
    """Layers of the model of a source: as configured, in its folder, or as prepared before; None if nothing says it.

    :param manifest: of the prepared model, if there is one; it counts where it was made from this source.
    """
    if source["kind"] == "toy":
        return int(source["layers"])
    if manifest is not None and manifest.is_file():
        prepared = read_manifest(manifest, "model")
        if prepared.provenance["params"]["source"] == source:
            return int(prepared.details["layers"])
    config = Path(str(source.get("path", ""))) / "config.json"
    if source["kind"] == "path" and config.is_file():
        layers = read_json(config).get("num_hidden_layers")
        return None if layers is None else int(layers)
    return None


def chosen_layers(
    wanted: Sequence[int] | None, source: Mapping[str, Any], manifest: Path, key: str
) -> list[int]:
    """The layers wanted, ascending; all of the model by default.

    :param key: of the configuration, for messages.
    :raises UserError: the model has no such layer, or all are wanted and their number is not known yet.
    """
    layers = known_layers(source, manifest)
    if wanted is None:
        if layers is None:
            raise UserError(
                f"Key {key} is null, all layers, but their number is known only once the model is there; run "
                f"`snakemake --cores 1 {manifest}` first, or list the layers."
            )
        return list(range(layers))
    missing = [layer for layer in wanted if layers is not None and layer >= layers]
    if missing:
        raise UserError(
            f"Key {key} has {missing[0]}, but the model has {layers} layers; the deepest is {(layers or 1) - 1}."
        )
    return sorted(wanted)
