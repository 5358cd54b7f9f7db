"""Files of weights from elsewhere, read without running anything they carry, and made into dictionaries."""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.dictionaries.tensors import read_tensors
from circuitflow.errors import UserError, nearest

KIND = "pretrained"


@dataclass
class Weights:
    """The tensors of one file; what is asked for is checked, and given in float32."""

    path: Path
    tensors: dict[str, Tensor]
    sizes: dict[str, int] = field(default_factory=dict)
    """Dimensions by name, as the tensors asked for so far have them."""
    used: set[str] = field(default_factory=set)

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self.tensors

    def take(self, name: str, *dimensions: str) -> Tensor:
        """A tensor whose dimensions bear these names; equal names must have equal sizes throughout the file.

        :raises UserError: it is missing, has another shape, or holds what is no number.
        """
        if name not in self.tensors:
            raise UserError(f"File {self.path} has no tensor {name}; {nearest(name, self.tensors)}.")
        self.used.add(name)
        tensor = self.tensors[name]
        expected = [self.sizes.get(dimension, dimension) for dimension in dimensions]
        fits = tensor.ndim == len(expected) and all(
            isinstance(size, str) or size == found for size, found in zip(expected, tensor.shape, strict=True)
        )
        if not fits:
            named = ", ".join(
                name if size == name else f"{name} {size}"
                for name, size in zip(dimensions, expected, strict=True)
            )
            raise UserError(
                f"File {self.path}: {name} has shape {tuple(tensor.shape)}, expected ({named}); the file is damaged "
                "or of another format."
            )
        self.sizes.update(zip(dimensions, tensor.shape, strict=True))
        if bool(tensor.isnan().any()):
            raise UserError(
                f"File {self.path}: {name} holds values that are no numbers (NaN); fetch it again."
            )
        return tensor.to(torch.float32)

    def number(self, name: str) -> float:
        """A tensor of one number.

        :raises UserError: it is missing, or has more.
        """
        self.used.add(name)
        if self.tensors[name].numel() != 1:
            raise UserError(
                f"File {self.path}: {name} has {self.tensors[name].numel()} numbers, expected one."
            )
        return float(self.tensors[name].reshape(()))

    def done(self, *known: str) -> None:
        """Check that no tensor was overlooked, besides those known to shape nothing.

        :raises UserError: one was.
        """
        rest = sorted(set(self.tensors) - self.used - set(known))
        if rest:
            raise UserError(
                f"File {self.path} has a tensor {rest[0]} that its format does not account for; it cannot be imported "
                "exactly."
            )


def read_weights(path: Path) -> Weights:
    """The tensors of a safetensors, NumPy or PyTorch file; pickled code is refused. A bare array is named "".

    :raises UserError: the file is missing, damaged, or holds anything but tensors.
    """
    if path.suffix == ".safetensors":
        return Weights(path, read_tensors(path)[0])
    if not path.is_file():
        raise UserError(f"File {path} does not exist; check the path.")
    return Weights(path, _numpy_arrays(path) if path.suffix in (".npz", ".npy") else _torch_tensors(path))


def read_settings(path: Path | None, missing: str) -> dict[str, Any]:
    """The JSON object of a configuration file.

    :param missing: the sentence for a file that is not there.
    :raises UserError: it is missing, or not a JSON object.
    """
    if path is None or not path.is_file():
        raise UserError(missing)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"File {path} is not valid JSON ({error}); fetch it again.") from None
    if not isinstance(settings, dict):
        raise UserError(f"File {path} holds no JSON object; fetch it again.")
    return settings


def whole_number(settings: Mapping[str, Any], key: str, where: str) -> int:
    """A positive whole number among settings.

    :raises UserError: it is missing, or something else.
    """
    value = settings.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(
            f"Dictionary {where} has {key} = {value!r} in its settings; expected a positive whole number."
        )
    return value


def mapping(settings: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object among settings; empty if it is missing or something else."""
    value = settings.get(key)
    return value if isinstance(value, Mapping) else {}


def build(
    *,
    reads: str,
    writes: str,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    k: int | None = None,
    threshold: Tensor | None = None,
    subtract: Tensor | None = None,
    W_skip: Tensor | None = None,
    notes: Mapping[str, Any],
) -> Dictionary:
    """A dictionary with encoder and decoder rows per feature: TopK if ``k`` is given, else above a threshold (0).

    :param subtract: (d_in,) what is taken off the input before it is encoded; folded into ``b_enc``.
    """
    if subtract is not None:
        b_enc = (b_enc.double() - W_enc.double() @ subtract.double()).float()
    if k is None and threshold is None:
        threshold = torch.zeros_like(b_enc)
    return Dictionary(
        kind=KIND,
        reads=(reads,),
        writes=(writes,),
        select="topk" if k is not None else "threshold",
        W_enc=W_enc.contiguous(),
        b_enc=b_enc,
        W_dec=W_dec.contiguous(),
        b_dec=b_dec,
        settings={"k": k} if k is not None else {},
        notes=notes,
        extra={"threshold": threshold} if threshold is not None and k is None else {},
        W_skip=None if W_skip is None else W_skip.contiguous(),
    )


def rectified(threshold: Tensor) -> Tensor:
    """Thresholds of relu(p)·[p > θ]: a pre-activation that is not positive is never active."""
    return threshold.clamp(min=0)


def _numpy_arrays(path: Path) -> dict[str, Tensor]:
    try:
        with open(path, "rb") as file:  # NumPy leaves it open when it is no archive
            loaded = np.load(file, allow_pickle=False)
            arrays = {"": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"File {path} cannot be read as plain NumPy arrays ({_first_line(error)}); fetch it again, or save it as "
            "safetensors."
        ) from None


def _torch_tensors(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for what is not a plain file of tensors
        raise UserError(
            f"File {path} cannot be read as a file of tensors alone ({type(error).__name__}); save its tensors as "
            "safetensors."
        ) from None
    tensors = loaded if isinstance(loaded, dict) else {"": loaded}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"File {path} holds a {type(value).__name__}{f' {name!r}' if name else ''} where a tensor was "
                "expected; save its tensors as safetensors."
            )
    return {str(name): tensor for name, tensor in tensors.items()}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
