"""Attention patterns applied to gradients of many targets at once, each with as many positions as it can see."""

import numba
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from circuitflow.dictionaries.compiling import LOCK, as_array, compiled, parts_of


def mix(
    z: Float[Tensor, "rows heads d_head"],
    pattern: Float[Tensor, "heads pos pos"],
    starts: Int64[Tensor, " targets_plus_1"],
    first: Int64[Tensor, " targets"],
    out: Float[Tensor, "rows kv_heads d_head"],
) -> None:
    """Pull gradients from heads' outputs back to values.

    out[t, k, g] = Σ over heads h that share g, and positions q ≥ k, of pattern[h, q, k] · z[t, q, h].

    :param starts: where each target's rows begin, one row for each position from 0 to its own.
    :param first: the first position at which a target's z is not 0; rows before it are not read.
    """
    known = z.dtype in (torch.float32, torch.float64)
    if z.device.type == "cpu" and known and z.is_contiguous() and out.is_contiguous():
        # [k, q, h]: read in the order of the loops.
        turned = as_array(pattern.permute(2, 1, 0))
        with LOCK:
            parts = parts_of(len(first))
            _mix(z.numpy(), turned, as_array(starts), as_array(first), parts, out.numpy())
        return
    out.copy_(_padded(z, pattern, starts, first, out.shape[1]))


def _padded(z: Tensor, pattern: Tensor, starts: Tensor, first: Tensor, kv_heads: int) -> Tensor:
    """The same by one product over targets that are all made as long as the longest."""
    targets, pos = len(first), pattern.shape[1]
    lengths = starts.diff()
    target = torch.repeat_interleave(torch.arange(targets, device=z.device), lengths)
    place = torch.arange(len(z), device=z.device) - starts[target]
    dense = z.new_zeros(targets, pos, *z.shape[1:])
    dense[target, place] = torch.where((place >= first[target])[:, None, None], z, 0)
    dense = dense.view(targets, pos, kv_heads, -1, z.shape[2])
    mixed = torch.einsum("vgqk,tqvgd->tkvd", pattern.view(kv_heads, -1, pos, pos), dense)
    return mixed[target, place]


@compiled(parallel=True, fastmath={"contract"})
def _mix(z, pattern, starts, first, parts, out):  # type: ignore[no-untyped-def]
    targets, heads, kv_heads, d_head = len(first), z.shape[1], out.shape[1], z.shape[2]
    shared = heads // kv_heads
    for part in numba.prange(parts):
        for target in range(part * targets // parts, (part + 1) * targets // parts):
            start, end = starts[target], starts[target + 1]
            for k in range(end - start):
                for g in range(kv_heads):
                    sums = out[start + k, g]
                    sums[:] = 0
                    for q in range(max(k, first[target]), end - start):
                        for h in range(g * shared, (g + 1) * shared):
                            weight = pattern[k, q, h]
                            given = z[start + q, h]
                            for i in range(d_head):
                                sums[i] += weight * given[i]
