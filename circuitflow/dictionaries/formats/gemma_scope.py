"""Gemma Scope: ``params.npz`` of Gemma 2, and ``params.safetensors`` of Gemma Scope 2; JumpReLU throughout.

Sites (Lieberum et al. 2024): "res" is the output of a block; "att" the input of the attention output projection;
"mlp" what the MLP adds, after its norm. Nothing is taken off the input. The SAE of the embeddings was trained on
them before the model scales them by √d: its encoder is divided, its decoder multiplied by that. The transcoders of
the first Gemma Scope read the stream after the norm but before the norm's weight, which is no site here.
"""

import re

from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.dictionaries.formats.naming import Hint, choose_site, hint_of_hook, hint_of_path, same_layer
from circuitflow.dictionaries.formats.places import Place
from circuitflow.dictionaries.formats.reading import Weights, build, read_settings, read_weights, rectified
from circuitflow.errors import UserError

KINDS = {
    r"-res$|^resid_post|^res$": "resid",
    r"-att$|^attn_out|^att$": "z",
    r"-mlp$|^mlp_out|^mlp$": "mlp",
    r"^transcoder": "mlp_in",
}
"""Sites by the names of repositories and folders."""

SKIP = "affine_skip_connection"


def read(place: Place, site: str | None) -> Dictionary:
    """The dictionary of a folder such as ``layer_12/width_16k/average_l0_71``.

    :raises UserError: the file is damaged, not of a single site, or the site is another one.
    """
    weights = read_weights(place.weights)
    reads, writes = _sites(place, site)
    small = weights.has("w_enc")  # Gemma Scope 2 writes small letters
    enc, dec = ("w_enc", "w_dec") if small else ("W_enc", "W_dec")
    _check_single(place, weights, dec)
    W_enc = weights.take(enc, "d_in", "d_dict").T
    W_dec = weights.take(dec, "d_dict", "d_out")
    b_enc, b_dec = weights.take("b_enc", "d_dict"), weights.take("b_dec", "d_out")
    threshold = weights.take("threshold", "d_dict")
    W_skip = weights.take(SKIP, "d_in", "d_out").T if weights.has(SKIP) else None
    weights.done()
    if reads == "embed":
        scale = W_enc.shape[1] ** 0.5
        W_enc, W_dec = W_enc / scale, W_dec * scale
    return build(
        reads=reads,
        writes=writes,
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        threshold=rectified(threshold),
        W_skip=W_skip,
        notes={"format": "gemma_scope"},
    )


def _sites(place: Place, site: str | None) -> tuple[str, str]:
    hint = _hint(place)
    reads = choose_site(str(place), hint, site)
    return reads, same_layer(reads, "mlp") if reads.startswith("mlp_in.") else reads


def _hint(place: Place) -> Hint:
    """The site, by config.json (Gemma Scope 2) or else by the names of repository and folders."""
    config = place.beside("config.json")
    if config is not None:
        hook = read_settings(config, "").get("hf_hook_point_in")
        if isinstance(hook, str):
            return hint_of_hook(str(place), hook)
    parts = place.told.split("/")
    if any(part.endswith("-transcoders") for part in parts):
        raise UserError(
            f"Dictionary {place} is a transcoder of the first Gemma Scope, which reads the normed stream before the "
            "norm's weight; that is no site here (mlp_in.L is after it), so it cannot be imported."
        )
    kinds = [kind for part in parts for pattern, kind in KINDS.items() if re.search(pattern, part)]
    if "embedding" in parts:
        return Hint("embed")
    return Hint(kinds[-1] if kinds else None, hint_of_path(place.told).layer)


def _check_single(place: Place, weights: Weights, dec: str) -> None:
    if weights.has(dec) and weights.tensors[dec].ndim == 3:
        raise UserError(
            f"Dictionary {place} is a cross-layer transcoder, which writes several sites; only dictionaries of one "
            "site can be imported."
        )
