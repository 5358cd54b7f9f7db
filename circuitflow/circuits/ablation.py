"""Running the model with everything outside a circuit replaced, many circuits in one forward pass.

At each site the stream that arrives, already changed at the sites before, is encoded. Nodes inside the circuit keep the
values they have there, all others take their replacement r (their mean, or 0). With x̄ = Σ r_i·W_dec[i] + b_dec + r_ε,
membership c_i of feature i and e of the error (1 inside, 0 outside),

    x' = x̄ + Σ_i c_i·(f_i − r_i)·W_dec[i] + e·(ε − r_ε)  =  x̄ + e·(x − x̄) + Σ_i (c_i − e)·(f_i − r_i)·W_dec[i].

The second form needs no error: of a circuit with the error only the features *outside* it are decoded, of one without
it those inside. The complement's factors e − c_i are the same with the other sign. A node may be in a circuit at some
positions only; c and e then depend on the position.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from circuitflow.attribution.cached import trimmed
from circuitflow.attribution.nodes import ERROR, SUMMED
from circuitflow.attribution.readout import answer_logits, metric_of_run
from circuitflow.data.metrics import Metric
from circuitflow.data.token_pairs import TokenPairs
from circuitflow.dictionaries.codes import decode_codes
from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.errors import UserError
from circuitflow.models.running import Change, LanguageModel, run
from circuitflow.models.sites import parse_site

STARTS = ("embed", "resid")
"""Kinds of site that everything after depends on alone: a pass can start there."""


@dataclass(frozen=True)
class Kept:
    """The nodes of one site that a circuit keeps, or all but those."""

    feature: Int64[Tensor, " kept"]
    """Numbers of features; ERROR for the error."""
    position: Int64[Tensor, " kept"]
    """Where each is kept; SUMMED: at every position."""
    complement: bool = False

    @property
    def empty(self) -> bool:
        """Whether every node is replaced."""
        return not (self.complement or len(self.feature))

    @property
    def by_position(self) -> bool:
        """Whether what is kept depends on the position."""
        return bool((self.position != SUMMED).any())

    def members(self, d_dict: int, pos: int) -> Bool[Tensor, "pos d_dict_plus_1"]:
        """c of every feature and e of the error (last column) at every position."""
        inside = torch.zeros(pos, d_dict + 1, dtype=torch.bool, device=self.feature.device)
        column = torch.where(self.feature == ERROR, d_dict, self.feature)
        everywhere = self.position == SUMMED
        inside[:, column[everywhere]] = True
        there = ~everywhere & (self.position < pos)
        inside[self.position[there], column[there]] = True
        return ~inside if self.complement else inside


KeptNodes = Mapping[str, Kept]
"""What a circuit keeps, by site; every site of the run has an entry."""


def complement(circuit: KeptNodes) -> dict[str, Kept]:
    """All other nodes of the same sites."""
    return {site: Kept(kept.feature, kept.position, not kept.complement) for site, kept in circuit.items()}


@dataclass(frozen=True)
class Replacement:
    """What replaced nodes become at one site, by cell (case and position: see :class:`Cells`); NaN where unknown."""

    whole: Float[Tensor, "cells d_model"]
    """x̄: the vector with every node replaced."""
    features: Float[Tensor, "cells d_dict"]


@dataclass(frozen=True)
class Cells:
    """The places that have replacement values of their own: positions within cases."""

    cases: tuple[str, ...]
    pos: int

    @property
    def n(self) -> int:
        """How many there are."""
        return len(self.cases) * self.pos

    def of(self, pairs: TokenPairs) -> Int64[Tensor, "n pos"]:
        """The cell of every token of some prompts.

        :raises UserError: a case without training pairs, or a prompt longer than all training prompts.
        """
        unknown = sorted(set(pairs.case) - set(self.cases))
        if unknown:
            raise UserError(
                f"Case '{unknown[0]}' of the test pairs has no training pairs to take means from; "
                "add training pairs of that case or leave it out."
            )
        if pairs.mask.shape[1] > self.pos:
            raise _too_long()
        case = torch.tensor([self.cases.index(name) for name in pairs.case], device=pairs.mask.device)
        return case[:, None] * self.pos + torch.arange(pairs.mask.shape[1], device=case.device)


class Means:
    """Means of a site over prompts, per cell; prompts may come in any batches."""

    def __init__(self, dictionary: Dictionary, cells: Cells) -> None:
        self.dictionary, self.cells = dictionary, cells
        device = dictionary.W_dec.device
        self._whole = torch.zeros(cells.n, dictionary.d_model, dtype=torch.float64, device=device)
        self._features = torch.zeros(cells.n * dictionary.d_dict, dtype=torch.float64, device=device)
        self._count = torch.zeros(cells.n, dtype=torch.float64, device=device)

    def add(self, x: Float[Tensor, "batch pos d_model"], pairs: TokenPairs) -> None:
        """Take in the activations of some prompts."""
        row, position = pairs.mask.bool().nonzero(as_tuple=True)
        cell = self.cells.of(pairs)[row, position]
        codes = self.dictionary.encode(x[row, position], position)
        self._whole.index_add_(0, cell, x[row, position].double())
        entry = cell[codes.rows()] * self.dictionary.d_dict + codes.features
        self._features.index_add_(0, entry, codes.values.double())
        self._count.index_add_(0, cell, torch.ones_like(cell, dtype=torch.float64))

    def replacement(self) -> Replacement:
        """The means; cells without a token are NaN, so that using one cannot pass unnoticed."""
        count, dtype = self._count[:, None], self.dictionary.W_dec.dtype
        features = self._features.view(self.cells.n, -1) / count
        return Replacement((self._whole / count).to(dtype), features.to(dtype))


def zeros(dictionary: Dictionary, cells: Cells) -> Replacement:
    """Replacement by 0: x̄ is b_dec."""
    features = dictionary.W_dec.new_zeros(cells.n, dictionary.d_dict)
    return Replacement(dictionary.b_dec.expand(cells.n, -1), features)


@dataclass(frozen=True)
class AblationSite:
    """One site of the run, ready for ablation."""

    name: str
    dictionary: Dictionary
    replacement: Replacement


@dataclass(frozen=True)
class Rows:
    """Copies of prompts in one forward pass: the circuit that each row is run with, and the cells of its tokens."""

    circuit: Int64[Tensor, " rows"]
    cell: Int64[Tensor, "rows pos"]
    mask: Bool[Tensor, "rows pos"]


def ablated(
    x: Float[Tensor, "rows pos d_model"], site: AblationSite, kept: Sequence[Kept], rows: Rows
) -> Float[Tensor, "rows pos d_model"]:
    """x' of the module's formula at every real token; padding stays as it is.

    Tokens of circuits that keep all of a site's nodes, or none, are not encoded.

    :raises UserError: there is no replacement for a token.
    """
    dictionary = site.dictionary
    factors, error = _factors(kept, dictionary, rows.mask.shape[1])
    row, position = rows.mask.nonzero(as_tuple=True)
    circuit = rows.circuit[row]
    slot = position if factors.shape[1] > 1 else torch.zeros_like(position)
    cells, cell = rows.cell[row, position].unique(return_inverse=True)
    at = torch.zeros_like(cells).scatter_(0, cell, slot)  # the position of a cell
    here = x[row, position].to(factors.dtype)
    changed = _constants(site.replacement, cells, factors[:, at], error[:, at], dictionary.W_dec)[
        circuit, cell
    ]
    changed = changed + here * error[circuit, slot, None]
    encoded = factors.any(2)[circuit, slot].nonzero()[:, 0]
    if len(encoded):
        codes = dictionary.encode(here[encoded], position[encoded])
        token = encoded[codes.rows()]
        factor = factors[circuit[token], slot[token], codes.features]
        weighted = codes.with_values(codes.values * factor).where(factor != 0)
        changed = changed.index_add(0, encoded, decode_codes(weighted, dictionary.W_dec))
    if bool(changed.isnan().any()):
        raise _too_long()
    result = x.clone()
    result[row, position] = changed.to(x.dtype)
    return result


def _factors(
    kept: Sequence[Kept], dictionary: Dictionary, pos: int
) -> tuple[Float[Tensor, "circuits slots d_dict"], Float[Tensor, "circuits slots"]]:
    """c − e and e of every circuit; one slot serves all positions if no circuit distinguishes them."""
    slots = pos if any(one.by_position for one in kept) else 1
    members = torch.stack([one.members(dictionary.d_dict, slots) for one in kept]).to(dictionary.W_dec)
    error = members[..., -1]
    return members[..., :-1] - error[..., None], error


def _constants(
    replacement: Replacement,
    cells: Int64[Tensor, " used"],
    factors: Float[Tensor, "circuits used d_dict"],
    error: Float[Tensor, "circuits used"],
    W_dec: Float[Tensor, "d_dict d_model"],
) -> Float[Tensor, "circuits used d_model"]:
    """(1 − e)·x̄ − Σ_i (c_i − e)·r_i·W_dec[i]: what does not depend on the prompt."""
    whole, features = replacement.whole[cells], replacement.features[cells]
    used = features.any(0).nonzero()[:, 0]
    features, rows = features[:, used], W_dec[used]
    return torch.stack(
        [
            (1 - keeps)[:, None] * whole - (features * factor[:, used]) @ rows
            for factor, keeps in zip(factors, error, strict=True)
        ]
    )


@dataclass(frozen=True)
class Prompts:
    """What is run: clean prompts, the cells of their tokens, and their activations at the first site."""

    pairs: TokenPairs
    cell: Int64[Tensor, "n pos"]
    first: Float[Tensor, "n pos d_model"] | None
    """None if the first site is no full cut of the model: then passes start from the tokens."""
    reference: Float[Tensor, "n vocab"] | None = None
    """Logits of the clean run, for the metric kl."""


def first_needed(circuit: KeptNodes, sites: Sequence[AblationSite]) -> int:
    """Index of the site from which the circuit has to be run.

    Where a circuit keeps nothing of the residual stream, what happened before is gone: the pass starts there.
    """
    empty = [
        index
        for index, site in enumerate(sites)
        if circuit[site.name].empty and parse_site(site.name).kind in STARTS
    ]
    return max(empty, default=0)


def run_circuits(
    lm: LanguageModel,
    metric: Metric,
    sites: Sequence[AblationSite],
    circuits: Sequence[KeptNodes],
    prompts: Prompts,
    rows: Sequence[tuple[int, int]],
) -> Float[Tensor, " rows"]:
    """m of (circuit, prompt) rows in one forward pass, from the first site that any of the circuits needs.

    Layers before the first site are left free: its clean activations are the same for every circuit.
    """
    index = torch.tensor(rows, device=prompts.cell.device)
    circuit, prompt = index.unbind(1)
    used, local = circuit.unique(return_inverse=True)
    chosen = [circuits[number] for number in used.tolist()]
    begin = 0 if prompts.first is None else min(first_needed(one, sites) for one in chosen)
    pairs = trimmed(prompts.pairs[prompt.cpu()])
    length = pairs.mask.shape[1]
    these = Rows(local, prompts.cell[prompt, :length], pairs.mask.bool())

    def change(site: AblationSite) -> Change:
        kept = [one[site.name] for one in chosen]
        return lambda x: ablated(x, site, kept, these)

    start = None
    if prompts.first is not None:
        # From a later site only empty circuits start, of which nothing that arrives there is kept.
        start = (sites[begin].name, change(sites[begin])(prompts.first[prompt, :length]))
    this = run(
        lm,
        pairs.clean,
        these.mask,
        start=start,
        replace={site.name: change(site) for site in (sites if start is None else sites[begin + 1 :])},
    )
    reference = None if prompts.reference is None else prompts.reference[prompt]
    return metric_of_run(lm, metric, this, pairs, reference)


def clean_logits(lm: LanguageModel, site: str, prompts: Prompts) -> Float[Tensor, "n vocab"]:
    """Logits of the prompts with nothing replaced, run from the cached activations of ``site`` if there are any."""
    start = None if prompts.first is None else (site, prompts.first)
    this = run(lm, prompts.pairs.clean, prompts.pairs.mask, start=start)
    return answer_logits(lm, this, prompts.pairs.position)


def _too_long() -> UserError:
    return UserError(
        "A test prompt is longer than every training prompt of its case, so there are no means for its last positions; "
        "set task.length.mode to modal or add training pairs."
    )
