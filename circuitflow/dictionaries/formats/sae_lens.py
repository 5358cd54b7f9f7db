"""SAEs and transcoders of SAELens: ``cfg.json`` and ``sae_weights.safetensors``, of version 6 and of earlier ones.

What each architecture computes: sae_lens 6.54, saes/*.py; keys of earlier versions: its
loading/pretrained_sae_loaders.py (handle_pre_6_0_config). Unfinished BatchTopK and Matryoshka checkpoints
(topk_threshold) are read as SAELens itself finishes them, with a threshold.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.dictionaries.folding import gate_as_threshold, unit_rows
from circuitflow.dictionaries.formats.naming import choose_site, hint_of_hook, hint_of_module, hook_of_site
from circuitflow.dictionaries.formats.places import Place
from circuitflow.dictionaries.formats.reading import (
    Weights,
    build,
    mapping,
    read_settings,
    read_weights,
    rectified,
    whole_number,
)
from circuitflow.dictionaries.formats.writing import check_writable, description, write_folder
from circuitflow.errors import UserError, nearest
from circuitflow.progress import logger

VERSION = "6.54.12"  # whose keys are written
RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
TRAINING_ONLY = ("batchtopk", "matryoshka_batchtopk")
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
ARCHITECTURES = ("standard", "jumprelu", "topk", "gated", *TRAINING_ONLY, *TRANSCODERS)

NORMALISED = {
    "expected_average_only_in": "activations scaled by a factor that its files do not hold (fold it with SAELens's "
    "fold_activation_norm_scaling_factor and save again)",
    "constant_norm_rescale": "activations scaled to one norm token by token",
    "layer_norm": "activations standardised token by token",
    "covariance_whitening": "whitened activations (fold the whitening with SAELens's fold_activation_whitening and "
    "save again)",
}
"""What a normalisation that is no part of the weights does to the input."""


@dataclass(frozen=True)
class _Settings:
    """``cfg.json`` in the words of version 6; ``about`` holds its metadata, or all keys of earlier versions."""

    architecture: str
    values: Mapping[str, Any]
    about: Mapping[str, Any]


def read(place: Place, site: str | None) -> Dictionary:
    """The dictionary of a folder; its site is told by hook_name.

    :raises UserError: the files are damaged, or hold what a linear encoder with a selection cannot do exactly.
    """
    settings = _settings(place)
    _check(place, settings)
    reads, writes = _sites(place, settings, site)
    weights = _weights(place, settings)
    parts = _parts(settings, weights)
    weights.done()
    options = mapping(settings.about, "model_from_pretrained_kwargs")
    if any(options.values()):
        logger.warning(
            "%s was trained on a model loaded with %s: if that changes activations, features differ here",
            place,
            ", ".join(f"{key}={value}" for key, value in options.items()),
        )
    return build(
        reads=reads,
        writes=writes,
        notes={"format": "sae_lens", "architecture": settings.architecture},
        **parts,
    )


def write(folder: Path, dictionary: Dictionary) -> None:
    """Write a folder as SAELens 6 reads it.

    :raises UserError: SAELens has nothing that computes the same; or the folder is in use.
    """
    check_writable("sae_lens", dictionary)
    assert dictionary.W_enc is not None
    architecture, more = _architecture(dictionary)
    reads, writes = dictionary.reads[0], dictionary.writes[0]
    metadata = {
        "sae_lens_version": VERSION,
        "hook_name": hook_of_site(reads),
        **({"hook_name_out": hook_of_site(writes)} if reads != writes else {}),
        "circuitflow": description(dictionary),
    }
    cfg = {
        "architecture": architecture,
        "d_in": dictionary.d_in,
        "d_sae": dictionary.d_dict,
        **({"d_out": dictionary.d_model} if architecture in TRANSCODERS else {}),
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if reads.startswith("z.") and reads == writes else "none",
        **more,
        "metadata": metadata,
    }
    tensors = {
        "W_enc": dictionary.W_enc.T,
        "b_enc": dictionary.b_enc,
        "W_dec": dictionary.W_dec,
        "b_dec": dictionary.b_dec,
    }
    if "jumprelu" in architecture:
        tensors["threshold"] = dictionary.extra["threshold"]
    if dictionary.W_skip is not None:
        tensors["W_skip"] = dictionary.W_skip
    write_folder(folder, {"cfg.json": cfg}, "sae_weights.safetensors", tensors)


def _architecture(dictionary: Dictionary) -> tuple[str, dict[str, Any]]:
    """The architecture that computes the same, and the keys of its own."""
    one_site = dictionary.reads == dictionary.writes and dictionary.W_skip is None
    if dictionary.select == "topk" and one_site:
        k = min(int(dictionary.settings["k"]), dictionary.d_dict)
        return "topk", {"k": k, "rescale_acts_by_decoder_norm": False}
    threshold = dictionary.extra.get("threshold")
    if dictionary.select != "threshold" or threshold is None or bool((threshold < 0).any()):
        negative = dictionary.select == "threshold"
        what = (
            "with negative thresholds"
            if negative
            else f"that selects features by the rule '{dictionary.select}'"
        )
        in_sparsify = dictionary.select == "topk" and dictionary.d_in == dictionary.d_model
        other = "sparsify or circuitflow" if in_sparsify else "circuitflow"
        raise UserError(
            f"Format sae_lens has no {'dictionary' if one_site else 'transcoder'} {what}; write it as {other}."
        )
    jump = bool((threshold > 0).any())
    if one_site:
        return ("jumprelu" if jump else "standard"), {}
    skip = "skip_" if dictionary.W_skip is not None else ""
    return f"{'jumprelu_' if jump else ''}{skip}transcoder", {}


def _settings(place: Place) -> _Settings:
    cfg = read_settings(place.beside("cfg.json"), f"Dictionary {place} has no cfg.json; fetch it again.")
    values = {RENAMED.get(key, key): value for key, value in cfg.items()}
    about = {**values, **mapping(values, "metadata")}
    architecture = str(values.get("architecture") or "standard")
    if values.get("activation_fn") == "topk" and architecture == "standard":
        architecture = "topk"
    values = {"k": 100, **mapping(values, "activation_fn_kwargs"), **values}  # 100 is SAELens's default
    normalised = values.get("normalize_activations") or "none"
    values["normalize_activations"] = "expected_average_only_in" if normalised is True else normalised
    return _Settings(architecture, values, about)


def _check(place: Place, settings: _Settings) -> None:
    """Refuse what cannot be imported exactly."""
    values = settings.values
    if settings.architecture not in ARCHITECTURES:
        known = nearest(settings.architecture, ARCHITECTURES, limit=len(ARCHITECTURES))
        raise UserError(
            f"Dictionary {place} has the architecture '{settings.architecture}', which cannot be imported; {known}."
        )
    normalised = values["normalize_activations"]
    if normalised != "none":
        why = NORMALISED.get(normalised, f"activations changed by '{normalised}'")
        raise UserError(f"Dictionary {place} reads {why}; it cannot be imported exactly.")
    if values.get("activation_fn", "relu") not in ("relu", "topk"):
        raise UserError(
            f"Dictionary {place} has the activation_fn '{values['activation_fn']}'; only relu and topk can be imported."
        )
    if settings.about.get("hook_head_index") is not None:
        raise UserError(
            f"Dictionary {place} reads one attention head ({settings.about['hook_head_index']}); sites hold all heads."
        )


def _sites(place: Place, settings: _Settings, site: str | None) -> tuple[str, str]:
    def told(key: str) -> str:
        module = str(settings.about.get(f"hf_{key}") or "")
        known = hint_of_module(module)
        return module if known is not None and known.kind else str(settings.about.get(key) or "")

    hook, out = told("hook_name"), told("hook_name_out")
    if not hook:
        raise UserError(f"Dictionary {place} does not tell its site: cfg.json has no hook_name; add it.")
    reads = choose_site(str(place), hint_of_hook(str(place), hook), site)
    if settings.architecture not in TRANSCODERS:
        return reads, reads
    if not out:
        raise UserError(
            f"Dictionary {place} does not tell what it writes: cfg.json has no hook_name_out; add it."
        )
    return reads, choose_site(str(place), hint_of_hook(str(place), out), None)


def _weights(place: Place, settings: _Settings) -> Weights:
    """The file's tensors, rounded to the precision that cfg.json names, as SAELens does."""
    weights = read_weights(place.weights)
    named = str(settings.values.get("dtype") or "float32").removeprefix("torch.")
    dtype = getattr(torch, named, None) if re.fullmatch(r"b?float\d+", named) else None
    if not isinstance(dtype, torch.dtype):
        raise UserError(
            f"Dictionary {place} has the dtype '{named}' in cfg.json; expected float32 or another float."
        )
    weights.tensors = {name: tensor.to(dtype) for name, tensor in weights.tensors.items()}
    for key in ("d_in", "d_sae", "d_out"):
        if isinstance(settings.values.get(key), int):
            weights.sizes[key] = settings.values[key]
    return weights


def _parts(settings: _Settings, weights: Weights) -> dict[str, Any]:
    """Arguments of :func:`~circuitflow.dictionaries.formats.reading.build`."""
    values, architecture = settings.values, settings.architecture
    d_out = "d_out" if architecture in TRANSCODERS else "d_in"
    W_enc, W_dec = weights.take("W_enc", "d_in", "d_sae").T, weights.take("W_dec", "d_sae", d_out)
    parts: dict[str, Any] = {"b_dec": weights.take("b_dec", d_out)}
    if values.get("apply_b_dec_to_input", True) and architecture not in TRANSCODERS:
        parts["subtract"] = parts["b_dec"]
    if architecture == "gated":
        r_mag, b_gate, b_mag = (weights.take(name, "d_sae") for name in ("r_mag", "b_gate", "b_mag"))
        W_enc, b_enc, parts["threshold"] = gate_as_threshold(W_enc, r_mag, b_gate, b_mag)
    else:
        b_enc = weights.take("b_enc", "d_sae")
    if architecture == "topk":
        parts["k"] = whole_number(values, "k", str(weights.path))
    if values.get("rescale_acts_by_decoder_norm") and architecture in ("topk", *TRAINING_ONLY):
        W_enc, b_enc, W_dec = unit_rows(W_enc, b_enc, W_dec)
    if architecture in TRAINING_ONLY or "jumprelu" in architecture:
        parts["threshold"] = rectified(_threshold(weights))
    if "skip" in architecture:
        parts["W_skip"] = weights.take("W_skip", "d_out", "d_in")
    return {"W_enc": W_enc, "b_enc": b_enc, "W_dec": _scaled(weights, W_dec), **parts}


def _threshold(weights: Weights) -> Tensor:
    if weights.has("topk_threshold"):
        threshold = torch.full((weights.sizes["d_sae"],), weights.number("topk_threshold"))
    elif weights.has("log_threshold"):  # of earlier checkpoints
        threshold = weights.take("log_threshold", "d_sae").exp()
    else:
        threshold = weights.take("threshold", "d_sae")
    return threshold


def _scaled(weights: Weights, W_dec: Tensor) -> Tensor:
    """Earlier versions could multiply features by a tuned factor before decoding."""
    if not weights.has("scaling_factor"):
        return W_dec
    return W_dec * weights.take("scaling_factor", "d_sae")[:, None]
