"""SAEs and transcoders of sparsify (EleutherAI): ``{hookpoint}/cfg.json`` and ``sae.safetensors``.

An SAE takes b_dec off its input, a transcoder does not; the skip connection adds x·W_skipᵀ of the input as it is
(sparsify 1.3, sparse_coder.py).
"""

from pathlib import Path
from typing import Any

from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.dictionaries.formats.naming import Hint, choose_site, hint_of_path, same_layer
from circuitflow.dictionaries.formats.places import Place
from circuitflow.dictionaries.formats.reading import (
    build,
    mapping,
    read_settings,
    read_weights,
    whole_number,
)
from circuitflow.dictionaries.formats.writing import check_writable, description, write_folder
from circuitflow.errors import UserError
from circuitflow.models.sites import parse_site

DEFAULTS: dict[str, Any] = {
    "activation": "topk",
    "k": 32,
    "transcode": False,
    "signed": False,
    "skip_connection": False,
}


def read(place: Place, site: str | None) -> Dictionary:
    """The TopK dictionary of a hookpoint; ``layers.L`` is resid.L, ``layers.L.mlp`` the MLP of block L.

    A file that was written here says its site itself.

    :raises UserError: the files are damaged, use another activation, or are for another site.
    """
    missing = f"Dictionary {place} has no cfg.json; fetch it again."
    cfg = DEFAULTS | read_settings(place.beside("cfg.json"), missing)
    _check(place, cfg)
    reads, writes = _sites(place, cfg, site)
    weights = read_weights(place.weights)
    weights.sizes["d_in"] = whole_number(cfg, "d_in", str(place))
    W_enc, b_enc = weights.take("encoder.weight", "d_dict", "d_in"), weights.take("encoder.bias", "d_dict")
    W_dec, b_dec = weights.take("W_dec", "d_dict", "d_in"), weights.take("b_dec", "d_in")
    W_skip = weights.take("W_skip", "d_in", "d_in") if cfg["skip_connection"] else None
    weights.done()
    return build(
        reads=reads,
        writes=writes,
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        k=whole_number(cfg, "k", str(place)),
        subtract=None if cfg["transcode"] else b_dec,
        W_skip=W_skip,
        notes={"format": "sparsify"},
    )


def write(folder: Path, dictionary: Dictionary) -> None:
    """Write a folder as sparsify reads it.

    :raises UserError: the dictionary is not TopK, or changes the width; or the folder is in use.
    """
    check_writable("sparsify", dictionary)
    if dictionary.select != "topk":
        raise UserError(
            f"Format sparsify holds TopK dictionaries only, and this one of kind {dictionary.kind} selects features by "
            f"the rule '{dictionary.select}'; write it as sae_lens or circuitflow."
        )
    if dictionary.d_in != dictionary.d_model:
        raise UserError(
            f"Format sparsify holds dictionaries that write as many numbers as they read, and this one reads "
            f"{dictionary.d_in} and writes {dictionary.d_model}; write it as sae_lens or circuitflow."
        )
    assert dictionary.W_enc is not None
    transcode = dictionary.reads != dictionary.writes
    b_enc = dictionary.b_enc.double()
    if not transcode:  # sparsify encodes x − b_dec
        b_enc = b_enc + dictionary.W_enc.double() @ dictionary.b_dec.double()
    tensors = {
        "encoder.weight": dictionary.W_enc,
        "encoder.bias": b_enc,
        "W_dec": dictionary.W_dec,
        "b_dec": dictionary.b_dec,
    }
    if dictionary.W_skip is not None:
        tensors["W_skip"] = dictionary.W_skip
    cfg = {
        "activation": "topk",
        "expansion_factor": max(1, dictionary.d_dict // dictionary.d_in),
        "normalize_decoder": True,
        "num_latents": dictionary.d_dict,
        "k": min(int(dictionary.settings["k"]), dictionary.d_dict),
        "multi_topk": False,
        "skip_connection": dictionary.W_skip is not None,
        "transcode": transcode,
        "d_in": dictionary.d_in,
        "circuitflow": description(dictionary),
    }
    write_folder(folder, {"cfg.json": cfg}, "sae.safetensors", tensors)


def _check(place: Place, cfg: dict[str, Any]) -> None:
    if cfg["activation"] != "topk":
        raise UserError(
            f"Dictionary {place} has the activation '{cfg['activation']}'; only 'topk' can be imported exactly."
        )
    if cfg["signed"]:
        raise UserError(
            f"Dictionary {place} has signed features; only features that are not can be imported."
        )


def _sites(place: Place, cfg: dict[str, Any], site: str | None) -> tuple[str, str]:
    own = _told(cfg) if site is None else None
    hint = own or hint_of_path(place.told.rsplit("/", 1)[-1])
    if cfg["transcode"] and hint.kind == "mlp":
        hint = Hint("mlp_in", hint.layer)  # a module's input and output
    reads = choose_site(str(place), hint, site)
    return reads, same_layer(reads, "mlp") if cfg["transcode"] else reads


def _told(cfg: dict[str, Any]) -> Hint | None:
    """The site read, as :func:`write` leaves it."""
    reads = mapping(cfg, "circuitflow").get("reads")
    if not isinstance(reads, list) or len(reads) != 1:
        return None
    site = parse_site(str(reads[0]))
    return Hint(site.kind, site.layer)
