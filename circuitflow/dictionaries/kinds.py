"""The kinds of dictionary: which are trained and with what objective, which are made, and how.

A new trained kind (ReLU, JumpReLU, BatchTopK, Gated, Matryoshka …) adds a selection rule for inference
(:mod:`~circuitflow.dictionaries.selection`), an objective (:mod:`~circuitflow.dictionaries.objective`) and a
line here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.dictionaries.dictionary import NO_SKIP, Dictionary, Skip
from circuitflow.dictionaries.objective import Objective
from circuitflow.dictionaries.settings import Training
from circuitflow.dictionaries.tensors import read_tensors
from circuitflow.dictionaries.topk import AuxK, TopK
from circuitflow.errors import UserError, nearest


@dataclass(frozen=True)
class Request:
    """The dictionary wanted."""

    kind: str
    site: str
    d_model: int
    d_dict: int
    k: int
    seed: int
    training: Training
    weights: Path | None = None
    """File that a decoder is read from."""


@dataclass(frozen=True)
class Data:
    """What a dictionary that is made, not trained, may take from the activations."""

    mean: Float[Tensor, " d_model"]
    skip: Skip


def topk(request: Request) -> Objective:
    """TopK with AuxK."""
    training = request.training
    return TopK(request.k, AuxK(training.auxk or max(1, request.d_model // 2), training.auxk_weight))


def random(request: Request, data: Data) -> Dictionary:
    """Random decoder rows of norm 1, the encoder along them, TopK: what training has to beat."""
    draw = torch.randn(request.d_dict, request.d_model, generator=torch.Generator().manual_seed(request.seed))
    rows = draw / draw.norm(dim=1, keepdim=True)
    return _dictionary(request, "topk", rows, rows, -rows @ data.mean, data.mean, data.skip, k=request.k)


def identity(request: Request, data: Data) -> Dictionary:
    """Features are coordinates, of either sign; the error is 0 at every token, sinks included."""
    zeros, rows = torch.zeros(request.d_model), torch.eye(request.d_model)
    return _dictionary(request, "nonzero", rows, rows, zeros, zeros, NO_SKIP)


def decoder_only(request: Request, data: Data) -> Dictionary:
    """A bare decoder from a file: decoder-only scores, no features.

    :raises UserError: no file is named, or it holds no W_dec of the site's width.
    """
    if request.weights is None:
        raise UserError(
            "Kind decoder_only needs key weights: a safetensors or .pt file with W_dec; name one."
        )
    tensors = _read_decoder(request.weights)
    rows = tensors["W_dec"].float()
    if rows.ndim != 2 or rows.shape[1] != request.d_model:
        raise UserError(
            f"File {request.weights}: W_dec has shape {tuple(rows.shape)}, expected (d_dict, {request.d_model}) for "
            f"{request.site}; use a decoder of this model and site, one row per feature."
        )
    offset = tensors.get("b_dec", torch.zeros(request.d_model)).float()
    return _dictionary(request, "topk", None, rows, torch.zeros(rows.shape[0]), offset, NO_SKIP)


TRAINED: dict[str, Callable[[Request], Objective]] = {"topk": topk}
MADE: dict[str, Callable[[Request, Data], Dictionary]] = {
    "random": random,
    "identity": identity,
    "decoder_only": decoder_only,
}


def check_request(request: Request) -> None:
    """Check what the configuration cannot know, or a notebook may get wrong.

    :raises UserError: the kind is unknown, or k is impossible.
    """
    if request.kind not in TRAINED and request.kind not in MADE:
        raise UserError(
            f"Kind of dictionary {request.kind!r} is unknown; {nearest(request.kind, [*TRAINED, *MADE])}."
        )
    if not 1 <= request.k <= request.d_dict:
        raise UserError(f"Key k is {request.k}; choose a number from 1 to d_dict, which is {request.d_dict}.")


def _dictionary(
    request: Request,
    select: str,
    encoder: Tensor | None,
    rows: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    skip: Skip,
    **settings: int,
) -> Dictionary:
    at = (request.site,)
    return Dictionary(request.kind, at, at, select, encoder, b_enc, rows, b_dec, skip, settings)


def _read_decoder(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        tensors, _ = read_tensors(path)
    else:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many types for what is not a plain file of tensors
            raise UserError(
                f"File {path} cannot be read as a file of tensors ({type(error).__name__}); "
                "give a safetensors file with W_dec."
            ) from None
        tensors = loaded if isinstance(loaded, dict) else {"W_dec": loaded}
    if not isinstance(tensors.get("W_dec"), Tensor):
        found = ", ".join(map(str, tensors)) or "nothing"
        raise UserError(f"File {path} has no tensor W_dec (it has {found}); rename the decoder to W_dec.")
    return tensors
