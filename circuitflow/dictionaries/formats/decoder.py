"""A decoder alone: its rows are directions, for scores that need no feature to be active."""

import torch

from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.dictionaries.formats.naming import choose_site, hint_of_path
from circuitflow.dictionaries.formats.places import Place
from circuitflow.dictionaries.formats.reading import KIND, read_weights
from circuitflow.errors import UserError


def read(place: Place, site: str | None) -> Dictionary:
    """Rows (d_dict, d_model) of a bare tensor or of W_dec, with b_dec if it is there; other tensors are left.

    :raises UserError: no such file, no such tensor, or not of two dimensions.
    """
    weights = read_weights(place.weights)
    name = "" if weights.has("") else "W_dec"
    if not weights.has(name):
        found = ", ".join(weights.tensors) or "nothing"
        raise UserError(
            f"File {place.weights} has no tensor W_dec (it has {found}); rename the decoder to W_dec."
        )
    rows = weights.take(name, "d_dict", "d_model")
    offset = weights.take("b_dec", "d_model") if weights.has("b_dec") else torch.zeros(rows.shape[1])
    at = (choose_site(str(place), hint_of_path(place.files[0].rsplit("/", 1)[-1]), site),)
    return Dictionary(
        KIND, at, at, "topk", None, torch.zeros(rows.shape[0]), rows, offset, notes={"format": "decoder"}
    )
