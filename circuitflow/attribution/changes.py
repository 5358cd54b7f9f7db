"""How the features and the error of a site change from the clean to the patched run, and what each change is worth.

Everything here is flat: one entry per active feature of a token that can differ, never a (pairs, pos, d_dict) tensor.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from circuitflow.attribution.cached import Cached
from circuitflow.attribution.sparse import products
from circuitflow.data.token_pairs import TokenPairs
from circuitflow.dictionaries.codes import Codes, decode_codes, empty_codes
from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.dictionaries.selection import is_compiled


@dataclass(frozen=True)
class Changes:
    """A site at the ``n`` tokens of a batch where clean and patched run can differ.

    Clean and patched values are x = Σ f_i·W_dec[i] + b_dec + ε. A pair without a patched prompt has the patch state
    f = 0, ε = 0 (so its patched x is b_dec), as in feature-circuits.
    """

    pair: Int64[Tensor, " n"]
    """Which pair of the batch a token belongs to."""
    position: Int64[Tensor, " n"]
    gradient: Float[Tensor, "n d_model"]
    """∂m/∂x."""
    whole: Float[Tensor, "n d_model"]
    """x_p − x_c."""
    features: Codes
    """f_p − f_c, with an entry for every feature that is active in either run."""

    def error(self, W_dec: Float[Tensor, "d_dict d_model"]) -> Float[Tensor, "n d_model"]:
        """ε_p − ε_c."""
        return self.whole - decode_codes(self.features, W_dec)


def differing(pairs: TokenPairs, positions: str = "sum") -> Bool[Tensor, "batch pos"]:
    """The tokens at which a change can have an effect on the metric.

    Before the first changed token both runs are equal; after the position where the metric is read nothing counts.

    :param positions: "last" leaves only the token where the metric is read; "sum" and "none" all.
    """
    place = torch.arange(pairs.mask.shape[1], device=pairs.mask.device)
    if positions == "last":
        return place == pairs.position[:, None]
    started = (place >= pairs.first_change[:, None]) | ~pairs.has_patch[:, None]
    return pairs.mask.bool() & started & (place <= pairs.position[:, None])


def changes_of(
    dictionary: Dictionary,
    cached: Cached,
    pairs: TokenPairs,
    positions: str = "sum",
) -> Changes:
    """Encode the tokens of a batch that can differ; those the dictionary skips have f = 0 and ε = x − b_dec.

    :param positions: see :func:`differing`.
    :raises UserError: the dictionary has no encoder, or is of another width.
    """
    pair, position = differing(pairs, positions).nonzero(as_tuple=True)
    before = cached.clean[pair, position]
    paired = pairs.has_patch[pair]
    if bool(paired.any()):
        patched = cached.patched[pair, position]
        codes, patched_codes = _encoded(dictionary, before, patched, position)
        if not bool(paired.all()):
            patched_codes = patched_codes.where(paired[patched_codes.rows()])
            patched = torch.where(paired[:, None], patched, dictionary.b_dec)
        after = patched
    else:
        codes = dictionary.encode(before, position)
        patched_codes = empty_codes(codes.n, codes.d_dict, codes.values)
        after = dictionary.b_dec.expand_as(before)
    return Changes(
        pair=pair,
        position=position,
        gradient=cached.gradient[pair, position],
        whole=after - before,
        features=difference(codes, patched_codes),
    )


def _encoded(
    dictionary: Dictionary,
    clean: Float[Tensor, "n d_model"],
    patched: Float[Tensor, "n d_model"],
    position: Int64[Tensor, " n"],
) -> tuple[Codes, Codes]:
    """Codes of both runs from one product with the encoder; equal vectors have equal codes, to the last bit."""
    n, moved = len(clean), (clean != patched).any(1)
    if not bool(moved.all()):
        both = dictionary.encode(torch.cat([clean, patched[moved]]), torch.cat([position, position[moved]]))
        own = torch.arange(n, device=moved.device)
        return both.take(own), both.take(torch.where(moved, n - 1 + moved.cumsum(0), own))
    both = dictionary.encode(torch.cat([clean, patched]), position.repeat(2))
    middle = int(both.offsets[n])
    return (
        Codes(both.offsets[: n + 1], both.features[:middle], both.values[:middle], both.d_dict),
        Codes(both.offsets[n:] - middle, both.features[middle:], both.values[middle:], both.d_dict),
    )


def difference(first: Codes, second: Codes) -> Codes:
    """second − first, with an entry for every feature that is active in either."""
    if is_compiled(first.values, first.n * first.d_dict):
        from circuitflow.dictionaries import kernels

        return kernels.difference(first, second)
    keys = torch.cat([codes.rows() * codes.d_dict + codes.features for codes in (first, second)])
    signed = torch.cat([-first.values, second.values])
    union, place = torch.unique(keys, return_inverse=True)
    values = signed.new_zeros(union.shape[0]).index_add_(0, place, signed)
    counts = torch.bincount(union // first.d_dict, minlength=first.n)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return Codes(offsets, union % first.d_dict, values, first.d_dict)


@dataclass(frozen=True)
class Effects:
    """First-order effects (IE) on the metric, one entry per node and token; node ``d_dict`` is the error."""

    pair: Int64[Tensor, " entries"]
    position: Int64[Tensor, " entries"]
    node: Int64[Tensor, " entries"]
    effect: Float[Tensor, " entries"]
    """float64; positive: the clean value supports the clean answer."""
    d_dict: int


def effects_of(changes: Changes, W_dec: Float[Tensor, "d_dict d_model"]) -> Effects:
    """IE_f = (g·W_dec[f])·(f_p − f_c) and IE_ε = g·(ε_p − ε_c), for every changing feature and every token's error.

    x̂ + ε = x and the decoder is affine, so this is what dictionaries spliced into the model's forward and backward pass
    (errors added back, gradients passed through) would give. For the same reason Σ_f IE_f + IE_ε = g·(x_p − x_c)
    at every token, from which the error's effect follows without decoding anything. With the mean gradient between
    clean and patched run in place of g this is integrated gradients.
    """
    features = changes.features
    rows = features.rows()
    effect = products(features, changes.gradient, W_dec).double() * features.values.double()
    whole = (changes.gradient.double() * changes.whole.double()).sum(1)
    error = whole.index_add(0, rows, -effect)
    return Effects(
        pair=torch.cat([changes.pair[rows], changes.pair]),
        position=torch.cat([changes.position[rows], changes.position]),
        node=torch.cat([features.features, torch.full_like(changes.pair, features.d_dict)]),
        effect=torch.cat([effect, error]),
        d_dict=features.d_dict,
    )
