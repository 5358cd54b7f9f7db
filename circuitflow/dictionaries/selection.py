"""From pre-activations to codes: the rule by which a dictionary decides which features are active.

A rule is what inference needs of a kind of dictionary, and nothing else: training-only parts (penalties,
straight-through gradients, thresholds being learned) live in :mod:`circuitflow.dictionaries.kinds`, so that
editing the trainer invalidates no stage that merely encodes. On the active set every rule passes the
pre-activation on as it is, so that ∂f_i/∂x = 1[i active]·W_enc[i]; kinds that scale it (Gated) fold the scale
into the weights when saved.
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


def largest(pre: Float[Tensor, "n d_dict"], k: int) -> Codes:
    """The ``k`` largest pre-activations of each vector, those not positive left out."""
    values, features = pre.topk(min(k, pre.shape[1]), dim=1, sorted=False)
    return codes_from_lists(features, values, pre.shape[1])


def above(pre: Float[Tensor, "n d_dict"], threshold: Float[Tensor, " d_dict"]) -> Codes:
    """The pre-activations above a threshold of each feature's own."""
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
