"""Encoding in two steps, for processors that multiply bfloat16 natively.

A product in bfloat16, by about half the time of one in float32, says which entries can matter; only these are computed
in float32. Rounding x and W_enc to bfloat16 moves a pre-activation by a known amount at most, so that what is ruled out
is ruled out for certain: the chosen features are those of the float32 product. Values are dot products of their own,
which unlike those of a matrix product do not depend on the other vectors of a batch.
"""

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.dictionaries.codes import Codes

FEWEST_VECTORS = 64
"""From here on rounding the weights is made up for."""
ROUNDING = 2.0**-9
"""Largest relative error of rounding to bfloat16."""
SAFETY = 1.02
"""Covers the product of two roundings, and the rounding of the bounds."""


@cache
def is_native() -> bool:
    """Whether the processor multiplies bfloat16 itself."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def screened(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_dict d_in"],
    b_enc: Float[Tensor, " d_dict"],
    k: int = 0,
    threshold: Float[Tensor, " d_dict"] | None = None,
) -> Codes:
    """Pre-activations x·W_encᵀ + b_enc, float32 on the CPU: the ``k`` largest of each vector that are positive, or all
    above a threshold of each feature's own.

    |Σ x̃·w̃ − Σ x·w| ≤ Σ|x·w|·(2u + u²) ≤ ‖x‖·‖w‖·(2u + u²) with u the rounding, and less than d_in·2⁻²³ of it for sums
    in float32; the result is rounded once more.
    """
    from circuitflow.dictionaries import kernels

    rough = x.bfloat16() @ W_enc.bfloat16().T
    unit = SAFETY * (2 * ROUNDING + x.shape[1] * 2.0**-23)
    slack = (x.norm(dim=1) * unit, W_enc.norm(dim=1), SAFETY * ROUNDING)
    limits = torch.zeros_like(b_enc) if threshold is None else threshold
    found = kernels.in_reach(rough, b_enc, slack, limits, min(k, len(W_enc)))
    exact = found.with_values(kernels.products(found, W_enc, x) + b_enc[found.features])
    if threshold is None:
        return kernels.largest_of_lists(exact, min(k, len(W_enc)))
    return exact.where(exact.values > threshold[exact.features])
