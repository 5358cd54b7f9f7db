"""From pre-activations to codes: the rule by which a dictionary decides which features are active.

A rule is what inference needs of a kind of dictionary, and nothing else: training-only parts (penalties,
straight-through gradients, thresholds being learned) live in :mod:`circuitflow.dictionaries.kinds`, so that
editing the trainer invalidates no stage that merely encodes. On the active set every rule passes the
pre-activation on as it is, so that ∂f_i/∂x = 1[i active]·W_enc[i]; kinds that scale it (Gated) fold the scale
into the weights when saved. Large inputs on the CPU go through compiled loops, which choose the same features.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.dictionaries.codes import Codes, codes_from_dense, codes_from_lists
from circuitflow.errors import UserError, nearest

Select = Callable[[Tensor, Mapping[str, Any], Mapping[str, Tensor]], Codes]
"""From pre-activations (n, d_dict), the rule's numbers and its per-feature tensors to codes."""


COMPILED_FROM = 1 << 19
"""Pre-activations from which the compiled loops are worth loading."""


def is_compiled(values: Tensor, entries: int) -> bool:
    """Whether :mod:`circuitflow.dictionaries.kernels` does the work: on the CPU, and if there is enough of it."""
    known = values.dtype in (torch.float32, torch.float64)
    return values.device.type == "cpu" and known and entries >= COMPILED_FROM and not values.requires_grad


def largest(pre: Float[Tensor, "n d_dict"], k: int) -> Codes:
    """The ``k`` largest pre-activations of each vector, those not positive left out."""
    if is_compiled(pre, pre.numel()):
        from circuitflow.dictionaries import kernels

        return kernels.largest_of_rows(pre, k)
    values, features = pre.topk(min(k, pre.shape[1]), dim=1, sorted=False)
    return codes_from_lists(features, values, pre.shape[1])


def above(pre: Float[Tensor, "n d_dict"], threshold: Float[Tensor, " d_dict"]) -> Codes:
    """The pre-activations above a threshold of each feature's own."""
    if is_compiled(pre, pre.numel()):
        from circuitflow.dictionaries import kernels

        return kernels.above_threshold(pre, threshold)
    return codes_from_dense(torch.where(pre > threshold, pre, torch.zeros_like(pre)))


SELECTIONS: dict[str, Select] = {
    "topk": lambda pre, settings, extra: largest(pre, int(settings["k"])),
    "threshold": lambda pre, settings, extra: above(pre, extra["threshold"]),
    "nonzero": lambda pre, settings, extra: codes_from_dense(pre),  # of either sign
}
"""Rules by name. ``threshold`` serves ReLU, JumpReLU, and at inference BatchTopK and Gated."""


def selection(name: str) -> Select:
    """The rule of that name.

    :raises UserError: there is none.
    """
    if name not in SELECTIONS:
        raise UserError(f"Selection rule {name!r} is unknown; {nearest(name, SELECTIONS)}.")
    return SELECTIONS[name]
