"""Values of a few listed features, without the pre-activations of all the others.

Only rules that decide about each feature alone allow it. A module of its own, so that no training imports it.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from circuitflow.dictionaries.dictionary import Dictionary, linear

Rule = Callable[[Dictionary, Int64[Tensor, " m"], Float[Tensor, "n m"]], Float[Tensor, "n m"]]


def _above(dictionary: Dictionary, features: Tensor, pre: Tensor) -> Tensor:
    return torch.where(pre > dictionary.extra["threshold"][features], pre, 0)


RULES: dict[str, Rule] = {"threshold": _above, "nonzero": lambda dictionary, features, pre: pre}
"""What becomes of the pre-activations of listed features, by rule of selection."""


def lists(dictionary: Dictionary) -> bool:
    """Whether features can be encoded alone: not where they compete, as in TopK."""
    return dictionary.W_enc is not None and dictionary.select in RULES


def encode_listed(
    dictionary: Dictionary,
    x: Float[Tensor, "n d_in"],
    positions: Int64[Tensor, " n"],
    features: Int64[Tensor, " m"],
) -> Float[Tensor, "n m"]:
    """Values of ``features`` in each vector, as ``Dictionary.encode`` gives them; 0 where the outlier rule skips.

    :param positions: of each vector within its prompt.
    :raises ValueError: the rule needs all pre-activations.
    """
    if dictionary.W_enc is None or dictionary.select not in RULES:
        raise ValueError(f"features chosen by the rule {dictionary.select} cannot be encoded alone")
    pre = linear(x.to(dictionary.W_enc.dtype), dictionary.W_enc[features], dictionary.b_enc[features])
    values = RULES[dictionary.select](dictionary, features, pre)
    skipped = dictionary.skip.mask(x, positions)
    return values.masked_fill_(skipped[:, None], 0) if bool(skipped.any()) else values
