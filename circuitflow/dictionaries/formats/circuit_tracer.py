"""Single-layer transcoders of circuit-tracer: ``layer_N.safetensors`` with a config.yaml for all of them.

Encoder and decoder hold a row per feature; the skip connection adds x·W_skipᵀ (circuit_tracer 0.5,
transcoder/single_layer_transcoder.py). Its JumpReLU has no ReLU inside. ``k`` makes it TopK: of the k largest
pre-activations, those that are not positive are left out here.
"""

from pathlib import Path
from typing import Any

import yaml

from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.dictionaries.formats.naming import Hint, choose_site, hint_of_hook, hint_of_path, same_layer
from circuitflow.dictionaries.formats.places import Place
from circuitflow.dictionaries.formats.reading import Weights, build, read_weights
from circuitflow.errors import UserError

THRESHOLD = "activation_function.threshold"


def read(place: Place, site: str | None) -> Dictionary:
    """The transcoder of one layer: it reads ``mlp_in.L``, or what config.yaml says, and writes ``mlp.L``.

    :raises UserError: the file is damaged or of a cross-layer transcoder, or the site is another one.
    """
    weights = read_weights(place.weights)
    if any(name.startswith("W_enc_") for name in weights.tensors):
        raise UserError(
            f"File {place.weights} holds a cross-layer transcoder, which writes several sites; only single-layer "
            "transcoders can be imported."
        )
    config = _config(place.beside("config.yaml"))
    reads, writes = _sites(place, config, site)
    return _dictionary(weights, reads, writes)


def _dictionary(weights: Weights, reads: str, writes: str) -> Dictionary:
    dictionary = build(
        reads=reads,
        writes=writes,
        W_enc=weights.take("W_enc", "d_dict", "d_in"),
        W_dec=weights.take("W_dec", "d_dict", "d_out"),
        b_enc=weights.take("b_enc", "d_dict"),
        b_dec=weights.take("b_dec", "d_out"),
        threshold=weights.take(THRESHOLD, "d_dict") if weights.has(THRESHOLD) else None,
        k=int(weights.number("k")) if weights.has("k") else None,
        W_skip=weights.take("W_skip", "d_out", "d_in") if weights.has("W_skip") else None,
        notes={"format": "circuit_tracer"},
    )
    weights.done()
    return dictionary


def _sites(place: Place, config: dict[str, Any], site: str | None) -> tuple[str, str]:
    """Sites read and written; without a config.yaml the MLP's."""
    layer = hint_of_path(place.files[0].rsplit("/", 1)[-1]).layer
    kinds = [
        hint_of_hook(str(place), f"blocks.{layer}.{config[key]}").kind if key in config else usual
        for key, usual in (("feature_input_hook", "mlp_in"), ("feature_output_hook", "mlp"))
    ]
    reads = choose_site(str(place), Hint(kinds[0], layer), site)
    return reads, same_layer(reads, str(kinds[1]))


def _config(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"File {path} is not valid YAML ({' '.join(str(error).split())}); fetch it again."
        ) from None
    if not isinstance(config, dict):
        raise UserError(f"File {path} holds no mapping of keys; fetch it again.")
    return config
