"""SAEs of dictionary_learning: ``ae.pt`` and ``config.json``, whose trainer.dict_class names the class.

Each class as the package's own loader gives it (dictionary_learning 0.1, dictionary.py and trainers/): AutoEncoder is
loaded with decoder rows of norm 1; BatchTopK and Matryoshka use their threshold; a threshold of −1 was never set.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.dictionaries.folding import gate_as_threshold, unit_rows
from circuitflow.dictionaries.formats.naming import Hint, choose_site, hint_of_path
from circuitflow.dictionaries.formats.places import Place
from circuitflow.dictionaries.formats.reading import (
    Weights,
    build,
    mapping,
    read_settings,
    read_weights,
    rectified,
)
from circuitflow.errors import UserError, nearest

Parts = dict[str, Any]
"""Arguments of :func:`~circuitflow.dictionaries.formats.reading.build`."""


def read(place: Place, site: str | None) -> Dictionary:
    """The SAE of a folder; its site is told by trainer.layer and trainer.submodule_name, or by the folder's name.

    :raises UserError: the file holds more than tensors, or is of an unknown class, or for another site.
    """
    config = place.beside("config.json")
    trainer = dict(mapping(read_settings(config, ""), "trainer")) if config else {}
    reads = choose_site(str(place), _hint(place, trainer), site)
    weights = read_weights(place.weights)
    name = trainer.get("dict_class") or _class_by_names(place, weights)
    if name not in CLASSES:
        raise UserError(f"Dictionary {place} is of class {name}, which is unknown; {nearest(name, CLASSES)}.")
    parts = CLASSES[name](weights, trainer)
    weights.done("k", "threshold", "group_sizes")  # k and threshold of the classes that do not use them
    return build(reads=reads, writes=reads, notes={"format": "dictionary_learning", "class": name}, **parts)


def _linear(weights: Weights) -> Parts:
    """Weights of linear layers: decoder.weight holds a column per feature."""
    parts: Parts = {
        "W_enc": weights.take("encoder.weight", "d_dict", "d_model"),
        "W_dec": weights.take("decoder.weight", "d_model", "d_dict").T,
    }
    if weights.has("encoder.bias"):
        parts["b_enc"] = weights.take("encoder.bias", "d_dict")
    return parts


def _matrices(weights: Weights) -> Parts:
    return {
        "W_enc": weights.take("W_enc", "d_model", "d_dict").T,
        "b_enc": weights.take("b_enc", "d_dict"),
        "W_dec": weights.take("W_dec", "d_dict", "d_model"),
        "b_dec": weights.take("b_dec", "d_model"),
    }


def _auto_encoder(weights: Weights, trainer: Parts) -> Parts:
    parts, bias = _linear(weights), weights.take("bias", "d_model")
    W_enc, b_enc, W_dec = unit_rows(parts["W_enc"], parts["b_enc"], parts["W_dec"])
    return {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": bias, "subtract": bias}


def _auto_encoder_new(weights: Weights, trainer: Parts) -> Parts:
    return {**_linear(weights), "b_dec": weights.take("decoder.bias", "d_model")}


def _gated(weights: Weights, trainer: Parts) -> Parts:
    parts, bias = _linear(weights), weights.take("decoder_bias", "d_model")
    b_mag, b_gate = weights.take("mag_bias", "d_dict"), weights.take("gate_bias", "d_dict")
    W_enc, b_enc, threshold = gate_as_threshold(
        parts["W_enc"], weights.take("r_mag", "d_dict"), b_gate, b_mag
    )
    return {
        "W_enc": W_enc,
        "b_enc": b_enc,
        "W_dec": parts["W_dec"],
        "b_dec": bias,
        "threshold": threshold,
        "subtract": bias,
    }


def _topk(weights: Weights, trainer: Parts) -> Parts:
    bias, k = weights.take("b_dec", "d_model"), _k(weights, trainer)
    return {**_linear(weights), "b_dec": bias, "k": k, "subtract": bias}


def _batchtopk(weights: Weights, trainer: Parts) -> Parts:
    bias, parts = weights.take("b_dec", "d_model"), _linear(weights)
    return {**parts, "b_dec": bias, "threshold": _one_threshold(weights, parts), "subtract": bias}


def _matryoshka(weights: Weights, trainer: Parts) -> Parts:
    parts = _matrices(weights)
    return {**parts, "threshold": _one_threshold(weights, parts), "subtract": parts["b_dec"]}


def _jumprelu(weights: Weights, trainer: Parts) -> Parts:
    return {**_matrices(weights), "threshold": rectified(weights.take("threshold", "d_dict"))}


CLASSES: dict[str, Callable[[Weights, Parts], Parts]] = {
    "AutoEncoder": _auto_encoder,
    "AutoEncoderNew": _auto_encoder_new,
    "GatedAutoEncoder": _gated,
    "JumpReluAutoEncoder": _jumprelu,
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batchtopk,
    "MatryoshkaBatchTopKSAE": _matryoshka,
}
"""What each class needs, as its loader has it."""


def _one_threshold(weights: Weights, parts: Parts) -> Tensor:
    """The threshold of all features together."""
    return rectified(torch.full_like(parts["b_enc"], weights.number("threshold")))


def _k(weights: Weights, trainer: Parts) -> int:
    """Active features, which config.json and the file must agree on.

    :raises UserError: they do not, or neither tells.
    """
    told = [int(weights.number("k"))] if weights.has("k") else []
    told += [int(trainer["k"])] if "k" in trainer else []
    if len(set(told)) != 1:
        raise UserError(
            f"File {weights.path}: k is {' here and '.join(map(str, told)) or 'nowhere'} in config.json; correct it."
        )
    return told[0]


def _class_by_names(place: Place, weights: Weights) -> str:
    """The class of a file without config.json, where its tensors leave no choice.

    :raises UserError: TopK and BatchTopK have the same tensors.
    """
    signs = {
        "bias": "AutoEncoder",
        "decoder.bias": "AutoEncoderNew",
        "r_mag": "GatedAutoEncoder",
        "group_sizes": "MatryoshkaBatchTopKSAE",
    }
    for name, chosen in signs.items():
        if weights.has(name):
            return chosen
    if weights.has("W_enc") and not weights.has("k"):
        return "JumpReluAutoEncoder"
    raise UserError(
        f"Dictionary {place} has no config.json that names its class (trainer.dict_class), and its tensors do not "
        f"tell it; add one with one of {', '.join(CLASSES)}."
    )


def _hint(place: Place, trainer: Parts) -> Hint:
    folder = hint_of_path(place.told.rsplit("/", 1)[-1])
    layer = trainer.get("layer")
    named = hint_of_path(str(trainer.get("submodule_name") or ""))
    kind = named.kind or folder.kind
    return Hint(kind, None if kind == "embed" else layer if isinstance(layer, int) else folder.layer)
