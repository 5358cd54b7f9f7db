"""The kinds of dictionary: which are trained and with what objective, which are made, and how.

A new trained kind adds a selection rule for inference (:mod:`~circuitflow.dictionaries.selection`) if none of
them serves, an objective (:mod:`~circuitflow.dictionaries.objective`), the keys it uses
(:mod:`~circuitflow.dictionaries.settings`) and a line here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.dictionaries.batchtopk import BatchTopK, prefix_ends
from circuitflow.dictionaries.dictionary import NO_SKIP, Dictionary, Skip
from circuitflow.dictionaries.gated import Gated
from circuitflow.dictionaries.joint import Joint, Skipping
from circuitflow.dictionaries.jumprelu import JumpReLU
from circuitflow.dictionaries.objective import Member, Objective
from circuitflow.dictionaries.relu import ReLU
from circuitflow.dictionaries.saturating import Saturating
from circuitflow.dictionaries.settings import CROSS_LAYER, SPANNING, Settings, check_values
from circuitflow.dictionaries.topk import AuxK, TopK
from circuitflow.dictionaries.trainer import FIRST_ENCODER_SCALE
from circuitflow.dictionaries.wiring import Wiring
from circuitflow.errors import UserError, nearest

# Default penalties give an L0 of about 32 at the middle of a small model (d_model 576, d_dict 4608).
FIRST_L0 = 32  # features active before training, for kinds with thresholds or biases


@dataclass(frozen=True)
class Request:
    """The dictionary wanted."""

    site: str
    """The site, or sites, for messages."""
    d_model: int
    """Width of what one dictionary reads: that of all its sites, side by side."""
    settings: Settings
    wiring: Wiring | None = None
    """What is read and written, where it is not one and the same site."""

    @property
    def sites(self) -> int:
        """Sites written by one dictionary."""
        return 1 if self.wiring is None else len(self.wiring.members[0].writes)

    @property
    def width(self) -> int:
        """Width of each site."""
        return self.d_model if self.wiring is None else self.d_model // len(self.wiring.members[0].reads)


@dataclass(frozen=True)
class Data:
    """What a dictionary that is made, not trained, may take from the activations."""

    mean: Float[Tensor, " d_model"]
    skip: Skip


def topk(request: Request) -> Objective:
    """TopK with AuxK."""
    settings, training = request.settings, request.settings.training
    return TopK(settings.k, _auxk(request), training.k_start, training.k_anneal)


def batchtopk(request: Request) -> Objective:
    """BatchTopK with AuxK."""
    settings, training = request.settings, request.settings.training
    return BatchTopK(settings.k, _auxk(request), (1.0,), training.k_start, training.k_anneal)


def matryoshka(request: Request) -> Objective:
    """BatchTopK with AuxK, whose features reconstruct in nested prefixes."""
    settings, training = request.settings, request.settings.training
    return BatchTopK(settings.k, _auxk(request), settings.prefixes, training.k_start, training.k_anneal)


def relu(request: Request) -> Objective:
    """ReLU with an L1 penalty."""
    settings = request.settings
    level = first_level(request.width, settings.d_dict)
    return ReLU(_or(settings.penalty, 0.055), -level, sites=request.sites)


def jumprelu(request: Request) -> Objective:
    """JumpReLU with a penalty on L0, or one that aims at an L0."""
    settings = request.settings
    aims = settings.target_l0 is not None
    return JumpReLU(
        penalty=_or(settings.penalty, (1.0 if aims else 1.2e-3) * request.sites),  # beside as many errors
        bandwidth=_or(settings.bandwidth, 0.5 / request.width**0.5),
        first_threshold=_or(settings.first_threshold, first_level(request.width, settings.d_dict)),
        target_l0=settings.target_l0,
    )


def gated(request: Request) -> Objective:
    """Gated with an L1 penalty on the gate."""
    settings = request.settings
    return Gated(_or(settings.penalty, 0.13), -first_level(request.d_model, settings.d_dict))


def first_level(d_model: int, d_dict: int) -> float:
    """The level that about ``FIRST_L0`` features of a vector exceed before training, a tenth of them at most.

    Inputs have mean ‖x‖² = 1 and encoder rows random directions, so that pre-activations are about normal with
    standard deviation (norm of the rows)/√d_model.
    """
    share = min(FIRST_L0 / d_dict, 0.1)
    return NormalDist().inv_cdf(1 - share) * FIRST_ENCODER_SCALE / d_model**0.5


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _auxk(request: Request) -> AuxK:
    training, wiring = request.settings.training, request.wiring
    most = max(1, request.width // 2)
    if (
        wiring is not None and len(wiring.members) > 1
    ):  # a feature's decoder row spans all later layers: costly
        most = min(most, 2 * request.settings.k)
    return AuxK(training.auxk or most, training.auxk_weight)


def random(request: Request, data: Data) -> Dictionary:
    """Random decoder rows of norm 1, the encoder along them, TopK: what training has to beat."""
    settings, at = request.settings, (request.site,)
    draw = torch.randn(
        settings.d_dict, request.d_model, generator=torch.Generator().manual_seed(settings.seed)
    )
    rows = draw / draw.norm(dim=1, keepdim=True)
    offset = -rows @ data.mean
    return Dictionary("random", at, at, "topk", rows, offset, rows, data.mean, data.skip, {"k": settings.k})


def identity(request: Request, data: Data) -> Dictionary:
    """Features are coordinates, of either sign; the error is 0 at every token, sinks included."""
    zeros, rows, at = torch.zeros(request.d_model), torch.eye(request.d_model), (request.site,)
    return Dictionary("identity", at, at, "nonzero", rows, zeros, rows, zeros, NO_SKIP)


def none(request: Request, data: Data) -> Dictionary:
    """No features: the site is one error node, the whole vector."""
    zeros, at = torch.zeros(request.d_model), (request.site,)
    rows, biases = torch.zeros(0, request.d_model), torch.zeros(0)
    return Dictionary("none", at, at, "nonzero", rows, biases, rows, zeros, NO_SKIP)


TRAINED: dict[str, Callable[[Request], Objective]] = {
    "topk": topk,
    "batchtopk": batchtopk,
    "matryoshka": matryoshka,
    "relu": relu,
    "jumprelu": jumprelu,
    "gated": gated,
}


def saturating(request: Request) -> Saturating:
    """ReLU or JumpReLU with the penalty of cross-layer transcoders.

    Its published constants are for mean ‖x‖² = d_model; those of the objective for 1. Thresholds begin higher than the
    published .03, which leaves half of all features active at first: short trainings do not come down from there.
    """
    settings, unit = request.settings, request.width**0.5
    jumps, level = settings.kind == "jumprelu", first_level(request.width, settings.d_dict)
    return Saturating(
        penalty=_or(settings.penalty, 4e-4 if jumps else 1.2e-3),  # about 20 features a layer on SmolLM2
        saturation=_or(settings.saturation, 4.0) * unit,
        dead_weight=_or(settings.dead_penalty, 3e-6) / unit,
        first_bias=0.0 if jumps else -level,
        first_threshold=_or(settings.first_threshold, level / 2) if jumps else None,
        bandwidth=_or(settings.bandwidth, 1.0 / unit),
    )


def objective_of(request: Request) -> Objective:
    """The objective of a trained kind, for one dictionary or for several that reconstruct together."""
    settings, wiring = request.settings, request.wiring
    if wiring is None or len(wiring.members) == 1:
        objective = TRAINED[settings.kind](request)
        if settings.skip and wiring is not None:
            return Skipping(objective, request.d_model, request.width * request.sites)
        return objective
    make = saturating if settings.kind in CROSS_LAYER else TRAINED[settings.kind]
    member = make(request)
    assert isinstance(member, Member)
    first = tuple(wiring.writes.index(each.writes[0]) for each in wiring.members)
    members = (member,) * len(first)
    return Joint(members, request.width, first, len(wiring.writes), settings.d_dict, settings.skip)


MADE: dict[str, Callable[[Request, Data], Dictionary]] = {
    "random": random,
    "identity": identity,
    "none": none,
}


def check_request(request: Request) -> None:
    """Check what the configuration cannot know, or a notebook may get wrong.

    :raises UserError: the kind is unknown, or one of its settings cannot be.
    """
    settings = request.settings
    if settings.kind not in TRAINED and settings.kind not in MADE:
        raise UserError(
            f"Kind of dictionary {settings.kind!r} is unknown; {nearest(settings.kind, [*TRAINED, *MADE])}."
        )
    if request.wiring is not None and settings.kind not in SPANNING:
        raise UserError(
            f"Kind {settings.kind!r} is for one site alone, not for {request.site}; {nearest(settings.kind, SPANNING)}."
        )
    check_values(settings)
    if settings.kind == "matryoshka":
        _check_prefixes(settings)


def _check_prefixes(settings: Settings) -> None:
    shares = settings.prefixes
    if not shares or shares[0] <= 0 or shares[-1] != 1 or any(a >= b for a, b in pairwise(shares)):
        raise UserError(
            f"Key prefixes is {list(shares)}; give shares of d_dict in ascending order, above 0, that end with 1.0."
        )
    ends = prefix_ends(shares, settings.d_dict)
    if any(a == b for a, b in pairwise((0, *ends))):
        raise UserError(
            f"Key prefixes is {list(shares)}, which gives prefixes of {', '.join(map(str, ends))} features: each needs "
            "more than the one before; leave some out or raise d_dict."
        )
