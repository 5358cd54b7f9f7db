"""Single-layer transcoders of circuit-tracer: ``layer_N.safetensors`` with a config.yaml for all of them.

Encoder and decoder hold a row per feature; the skip connection adds x·W_skipᵀ (circuit_tracer 0.5,
transcoder/single_layer_transcoder.py). Its JumpReLU has no ReLU inside. ``k``, in the file or (after 0.5, with
``activation: topk``) in config.yaml, makes it TopK: of the k largest pre-activations, those that are not positive are
left out here, where the library keeps them. Sets of them and cross-layer transcoders: circuit_tracer_sets.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.dictionaries.formats.naming import (
    Hint,
    choose_site,
    hint_of_hook,
    hint_of_path,
    hook_of_site,
    same_layer,
)
from circuitflow.dictionaries.formats.places import Place
from circuitflow.dictionaries.formats.reading import Weights, build, read_weights, whole_number
from circuitflow.dictionaries.formats.writing import check_writable, description, write_folder
from circuitflow.errors import UserError
from circuitflow.models.sites import parse_site
from circuitflow.store.files import write_text

CONFIG = "config.yaml"
THRESHOLD = "activation_function.threshold"
HOOKS = ("feature_input_hook", "feature_output_hook")
USUAL = ("mlp_in", "mlp")


def read(place: Place, site: str | None) -> Dictionary:
    """The transcoder of one layer: it reads ``mlp_in.L``, or what config.yaml says, and writes ``mlp.L``.

    :raises UserError: the file is damaged or of a cross-layer transcoder, or the site is another one.
    """
    weights = read_weights(place.weights)
    if any(name.startswith("W_enc_") for name in weights.tensors):
        raise UserError(
            f"File {place.weights} holds a cross-layer transcoder, which writes several sites; here a dictionary of "
            "one site is wanted: name it as transcoders.source, or convert it with --all."
        )
    config = read_config(place.beside(CONFIG))
    layer = hint_of_path(place.files[0].rsplit("/", 1)[-1]).layer
    reads, writes = sites_of(place, config, layer, site)
    return _dictionary(weights, reads, writes, _k_of(place, config))


def write(folder: Path, dictionary: Dictionary) -> None:
    """Write a folder of one layer, ``layer_N.safetensors`` and config.yaml.

    :raises UserError: it selects features in a way of its own, or reads or writes sites that the library does not
        name; or the folder is in use.
    """
    check_writable("circuit_tracer", dictionary)
    check_rule(dictionary)
    layer = parse_site(dictionary.reads[0]).layer
    if layer is None or dictionary.writes[0] == dictionary.reads[0]:
        raise UserError(
            f"Format circuit_tracer holds transcoders, and this dictionary at {dictionary.reads[0]} is none; write it "
            "as sae_lens or circuitflow."
        )
    config = config_of(dictionary.reads[0], dictionary.writes[0], "transcoder_set", [dictionary])
    write_folder(folder, {}, f"layer_{layer}.safetensors", tensors_of(dictionary))
    write_config(folder, config)


def tensors_of(dictionary: Dictionary) -> dict[str, Tensor]:
    """The tensors of ``layer_N.safetensors``."""
    assert dictionary.W_enc is not None
    found = {
        "W_enc": dictionary.W_enc,
        "b_enc": dictionary.b_enc,
        "W_dec": dictionary.W_dec,
        "b_dec": dictionary.b_dec,
    }
    if needs_threshold(dictionary):
        found[THRESHOLD] = dictionary.extra["threshold"]
    if dictionary.W_skip is not None:
        found["W_skip"] = dictionary.W_skip
    return found


def needs_threshold(dictionary: Dictionary) -> bool:
    """Whether it is a JumpReLU: with thresholds of 0 it is a ReLU, which its files do not name."""
    return dictionary.select == "threshold" and bool((dictionary.extra["threshold"] != 0).any())


def check_rule(dictionary: Dictionary, rules: tuple[str, ...] = ("threshold", "topk")) -> None:
    """Check that features are selected in a way that the library knows.

    :raises UserError: they are selected in another one.
    """
    if dictionary.select not in rules:
        held = "features above a threshold (kinds relu, jumprelu, batchtopk)"
        held += " or the k largest (topk)" if "topk" in rules else ""
        raise UserError(
            f"Format circuit_tracer holds {held}, and this dictionary of kind {dictionary.kind} at "
            f"{', '.join(dictionary.reads)} selects them by the rule '{dictionary.select}'; write it as circuitflow."
        )


def config_of(reads: str, writes: str, kind: str, dictionaries: list[Dictionary]) -> dict[str, Any]:
    """What config.yaml says; the key ``circuitflow`` holds what the library has no place for.

    :raises UserError: it reads or writes across layers within one member, or what no hook of a block names.
    """
    layers = {parse_site(site).layer for site in (reads, writes)}
    if len(layers) > 1 or None in layers:
        raise UserError(
            f"Format circuit_tracer holds transcoders within one block, and this one reads {reads} and writes "
            f"{writes}; write it as circuitflow."
        )
    hooks = {
        key: hook_of_site(site).split(".", 2)[2] for key, site in zip(HOOKS, (reads, writes), strict=True)
    }
    name = str(dictionaries[0].notes.get("model", "unknown"))
    told = [description(dictionary) for dictionary in dictionaries]
    config: dict[str, Any] = {
        "model_name": name,
        "model_kind": kind,
        "scan": name,
        **hooks,
        "circuitflow": told,
    }
    if dictionaries[0].select == "topk":  # read so after 0.5, which takes it for a ReLU
        config |= {"activation": "topk", "k": int(dictionaries[0].settings["k"])}
    return config


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.yaml; equal configurations give equal bytes."""
    write_text(folder / CONFIG, yaml.safe_dump(dict(config), sort_keys=True, allow_unicode=True))


def _k_of(place: Place, config: Mapping[str, Any]) -> int | None:
    """k of a TopK set that only config.yaml calls so."""
    if config.get("activation", "relu") in ("relu", "jump_relu", "jumprelu", None):
        return None
    if config["activation"] == "topk":
        return whole_number(config, "k", str(place))
    raise UserError(
        f"Dictionary {place} has the activation '{config['activation']}'; only relu, JumpReLU and topk can be imported "
        "exactly."
    )


def _dictionary(weights: Weights, reads: str, writes: str, k: int | None) -> Dictionary:
    dictionary = build(
        reads=reads,
        writes=writes,
        W_enc=weights.take("W_enc", "d_dict", "d_in"),
        W_dec=weights.take("W_dec", "d_dict", "d_out"),
        b_enc=weights.take("b_enc", "d_dict"),
        b_dec=weights.take("b_dec", "d_out"),
        threshold=weights.take(THRESHOLD, "d_dict") if weights.has(THRESHOLD) else None,
        k=int(weights.number("k")) if weights.has("k") else k,
        W_skip=weights.take("W_skip", "d_out", "d_in") if weights.has("W_skip") else None,
        notes={"format": "circuit_tracer"},
    )
    weights.done()
    return dictionary


def sites_of(place: Place, config: dict[str, Any], layer: int | None, site: str | None) -> tuple[str, str]:
    """Sites read and written by the transcoder of a layer; without a config.yaml the MLP's."""
    kinds = [
        hint_of_hook(str(place), f"blocks.{layer}.{config[key]}").kind if key in config else usual
        for key, usual in zip(HOOKS, USUAL, strict=True)
    ]
    reads = choose_site(str(place), Hint(kinds[0], layer), site)
    return reads, same_layer(reads, str(kinds[1]))


def read_config(path: Path | None) -> dict[str, Any]:
    """The mapping in config.yaml; empty without one.

    :raises UserError: it is damaged.
    """
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
