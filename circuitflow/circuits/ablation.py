"""Running the model under interventions, many of them in one forward pass.

At each site the stream that arrives, already changed at the sites before, is encoded. Every node takes its value from
a source: the arriving stream (kept), the replacement (see :mod:`circuitflow.circuits.replacement`), the prompt's own
clean or patched run, or a number. With s(i) the source of feature i, s(ε) that of the error, and x^s, f^s a source's
vector and features,

    x' = Σ_i f_i^s(i)·W_dec[i] + b_dec + ε^s(ε)  =  x^s(ε) + Σ_i (f_i^s(i) − f_i^s(ε))·W_dec[i].

The second form needs no error, and features whose source is the error's own drop out: of a circuit with the error only
the features outside it are decoded, of one without it those inside. What s(i) is may depend on the position.

Two things keep this cheap. Interventions name few features and treat all others alike, so everything is laid out over
the named ones and one column for the rest. And where the rest drops out of the arriving stream's share, dictionaries
that decide about each feature alone encode the named features only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from circuitflow.attribution.cached import trimmed
from circuitflow.attribution.nodes import ERROR, SUMMED
from circuitflow.attribution.readout import answer_logits, metric_of_run
from circuitflow.circuits.interventions import Held, Intervention, Kept, State
from circuitflow.circuits.replacement import Known
from circuitflow.data.metrics import Metric
from circuitflow.data.token_pairs import TokenPairs
from circuitflow.dictionaries.codes import Codes, decode_codes
from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.dictionaries.listed import encode_listed, lists
from circuitflow.models.running import LanguageModel, Run, run
from circuitflow.models.sites import parse_site

STARTS = ("embed", "resid")
"""Kinds of site that everything after depends on alone: a pass can start there."""

ARRIVING, REPLACEMENT, CLEAN, PATCHED, NUMBER = range(5)
"""Sources of a node's value."""
KNOWN = {REPLACEMENT: "replacement", CLEAN: "clean", PATCHED: "patched"}
"""Sources that are known before the pass."""
LISTED_SHARE = 0.25
"""Share of a dictionary's features up to which encoding listed ones alone is cheaper than encoding all."""
COLUMN_GAIN = 4
"""How many times quicker a product's entry is than a decoded one, roughly."""


class AblationSite:
    """One site of the run and the known values its nodes can take; each is loaded when first asked for."""

    def __init__(self, name: str, dictionary: Dictionary, load: Mapping[str, Callable[[], Known]]) -> None:
        self.name, self.dictionary = name, dictionary
        self._load = dict(load)
        self._loaded: dict[str, Known] = {}

    @property
    def cut(self) -> bool:
        """Whether everything after the site depends on it alone."""
        return parse_site(self.name).kind in STARTS

    def known(self, source: str) -> Known:
        """Values of "replacement", "clean" or "patched"."""
        if source not in self._loaded:
            self._loaded[source] = self._load[source]()
        return self._loaded[source]


@dataclass(frozen=True)
class Prompts:
    """What is run: clean prompts and, for the metric kl, the logits of their clean run."""

    pairs: TokenPairs
    reference: Float[Tensor, "n vocab"] | None = None


@dataclass(frozen=True)
class Tokens:
    """The real tokens of the rows of one pass."""

    row: Int64[Tensor, " tokens"]
    position: Int64[Tensor, " tokens"]
    intervention: Int64[Tensor, " tokens"]
    """Which of the pass's interventions each is run under."""
    prompt: Int64[Tensor, " tokens"]

    @classmethod
    def of(
        cls,
        intervention: Int64[Tensor, " rows"],
        prompt: Int64[Tensor, " rows"],
        mask: Bool[Tensor, "rows pos"],
    ) -> "Tokens":
        """The tokens that ``mask`` marks."""
        row, position = mask.nonzero(as_tuple=True)
        return cls(row, position, intervention[row], prompt[row])

    def __getitem__(self, some: Tensor) -> "Tokens":
        return Tokens(self.row[some], self.position[some], self.intervention[some], self.prompt[some])


@dataclass(frozen=True)
class Sources:
    """Where each node of a site takes its value from, by setting: an intervention, at a position if any depends on it.

    Columns are the features that any state names, all other features together, and the error.
    """

    features: Int64[Tensor, " named"]
    table: Int64[Tensor, "settings named_plus_2"]
    number: Float[Tensor, "settings named"]
    """Values of features whose source is NUMBER, else 0."""
    slots: int
    """Settings per intervention: positions, or 1."""

    @property
    def error(self) -> Int64[Tensor, " settings"]:
        """s(ε)."""
        return self.table[:, -1]

    def setting(self, tokens: Tokens) -> Int64[Tensor, " tokens"]:
        """Each token's row of the table."""
        if self.slots == 1:
            return tokens.intervention
        return tokens.intervention * self.slots + tokens.position

    def weight(self, source: int) -> Float[Tensor, "settings named_plus_1"]:
        """The factor of f_i^source in the sum: 1, −1 or 0."""
        nodes, error = self.table[:, :-1], self.table[:, -1:]
        foreign = nodes != error
        signed = (foreign & (nodes == source)).to(torch.int8) - (foreign & (error == source)).to(torch.int8)
        return signed.to(self.number.dtype)


def sources_of(states: Sequence[State], pos: int, like: Tensor) -> Sources:
    """The sources of a site's nodes under several interventions, on the device and in the precision of ``like``."""
    named = [like.new_empty(0, dtype=torch.int64)]
    for state in states:
        named += [state.kept.feature.to(like.device), *(held.feature.to(like.device) for held in state.held)]
    features = torch.cat(named).unique()
    features = features[features != ERROR]
    slots = pos if any(state.by_position for state in states) else 1
    width = len(features)
    table = torch.empty(len(states), slots, width + 2, dtype=torch.int64, device=like.device)
    number = like.new_zeros(len(states), slots, width + 2)
    for index, state in enumerate(states):
        inside, outside = (REPLACEMENT, ARRIVING) if state.kept.complement else (ARRIVING, REPLACEMENT)
        table[index] = outside
        _assign(table[index], state.kept, features, inside)
        for held in state.held:
            if isinstance(held.value, str):
                _assign(table[index], held, features, CLEAN if held.value == "clean" else PATCHED)
            else:
                _assign(table[index], held, features, NUMBER)
                _assign(number[index], held, features, held.value)
    number = number.where(table == NUMBER, 0)
    return Sources(features, table.flatten(0, 1), number.flatten(0, 1)[:, :width], slots)


def _assign(table: Tensor, group: Kept | Held, features: Int64[Tensor, " named"], value: int | float) -> None:
    """Write ``value`` into the cells of a group's nodes, in a table (slots, named + 2)."""
    feature, position = group.feature.to(features.device), group.position.to(features.device)
    column = torch.where(
        feature == ERROR, len(features) + 1, torch.searchsorted(features, feature.contiguous())
    )
    everywhere = position == SUMMED
    table[:, column[everywhere]] = value
    there = ~everywhere & (position < len(table))
    table[position[there], column[there]] = value


def ablated(
    x: Float[Tensor, "rows pos d_model"], site: AblationSite, states: Sequence[State], tokens: Tokens
) -> Float[Tensor, "rows pos d_model"]:
    """x' of the module's formula at the real tokens; padding stays as it is, and so do untouched states' tokens."""
    sources = sources_of(states, x.shape[1], site.dictionary.W_dec)
    touched = (sources.table != ARRIVING).any(1)
    if not bool(touched.all()):
        tokens = tokens[touched[sources.setting(tokens)]]
    if not len(tokens.row):
        return x
    here = x[tokens.row, tokens.position].to(site.dictionary.W_dec)
    result = x.clone()
    result[tokens.row, tokens.position] = _changed(here, site, sources, tokens).to(x.dtype)
    return result


def _changed(
    here: Float[Tensor, "tokens d_model"], site: AblationSite, sources: Sources, tokens: Tokens
) -> Float[Tensor, "tokens d_model"]:
    """x' of some tokens."""
    used = {
        source: site.known(name) for source, name in KNOWN.items() if bool((sources.table == source).any())
    }
    changed = _vectors(here, used, sources, tokens)
    for source, known in used.items():
        _add_known(changed, known, site.dictionary, sources, tokens, source)
    if bool((sources.table == NUMBER).any()):
        held = sources.number @ site.dictionary.W_dec[sources.features]
        changed += held[sources.setting(tokens)]
    arrives = sources.weight(ARRIVING)
    if bool(arrives.any()):
        _add_arriving(changed, here, site.dictionary, sources, tokens, arrives)
    return changed


def _vectors(
    here: Float[Tensor, "tokens d_model"], used: Mapping[int, Known], sources: Sources, tokens: Tokens
) -> Float[Tensor, "tokens d_model"]:
    """x^s(ε)."""
    error, found = sources.error[sources.setting(tokens)], here.clone()
    for source, known in used.items():
        some = (error == source).nonzero()[:, 0]
        found[some] = known.whole[known.slot[tokens.prompt[some], tokens.position[some]]]
    return found


def _add_known(
    changed: Float[Tensor, "tokens d_model"],
    known: Known,
    dictionary: Dictionary,
    sources: Sources,
    tokens: Tokens,
    source: int,
) -> None:
    """A known source's share beyond its vector: its features by their factors, once for tokens that share them.

    Of few named features the columns are read; all others together are what the source's vector decodes to, less the
    named ones. Of many, the active ones are decoded.
    """
    weight = sources.weight(source)
    some = weight.any(1)[sources.setting(tokens)].nonzero()[:, 0]
    if not len(some):
        return
    slots, tokens = len(known.whole), tokens[some]
    shared, place = (sources.setting(tokens) * slots + known.slot[tokens.prompt, tokens.position]).unique(
        return_inverse=True
    )
    setting, slot = shared // slots, shared % slots
    if COLUMN_GAIN * known.features.nnz < slots * len(sources.features):
        share = _decoded(known.features.take(slot), weight, setting, sources, dictionary)
    else:
        others = weight[:, -1:]
        factor = (weight[:, :-1] - others)[setting]
        share = (factor * known.columns(sources.features)[slot]) @ dictionary.W_dec[sources.features]
        if bool(others.any()):
            share += others[setting] * known.decoded[slot]
    changed.index_add_(0, some, share[place])


def _add_arriving(
    changed: Float[Tensor, "tokens d_model"],
    here: Float[Tensor, "tokens d_model"],
    dictionary: Dictionary,
    sources: Sources,
    tokens: Tokens,
    weight: Float[Tensor, "settings named_plus_1"],
) -> None:
    """The arriving stream's share beyond its vector: its features by their factors."""
    setting = sources.setting(tokens)
    whole, part = weight[:, -1] != 0, weight.any(1)
    if lists(dictionary) and len(sources.features) <= LISTED_SHARE * dictionary.d_dict:
        some = (part & ~whole)[setting].nonzero()[:, 0]
        used = weight[setting[some].unique(), :-1].any(0).nonzero()[:, 0]
        features = sources.features[used]
        values = encode_listed(dictionary, here[some], tokens.position[some], features)
        values *= weight[:, used][setting[some]]
        changed.index_add_(0, some, values @ dictionary.W_dec[features])
        part = whole
    some = part[setting].nonzero()[:, 0]
    if len(some):
        codes = dictionary.encode(here[some], tokens.position[some])
        changed.index_add_(0, some, _decoded(codes, weight, setting[some], sources, dictionary))


def _decoded(
    codes: Codes,
    weight: Float[Tensor, "settings named_plus_1"],
    setting: Int64[Tensor, " n"],
    sources: Sources,
    dictionary: Dictionary,
) -> Float[Tensor, "n d_model"]:
    """Σ_i weight·f_i·W_dec[i] for every vector."""
    named = len(sources.features)
    column = torch.full((dictionary.d_dict,), named, device=setting.device)
    column[sources.features] = torch.arange(named, device=setting.device)
    factor = weight[setting[codes.rows()], column[codes.features]]
    weighted = codes.with_values(codes.values * factor)
    if not bool(weight[:, -1].any()):  # else most entries count
        weighted = weighted.where(factor != 0)
    return decode_codes(weighted, dictionary.W_dec)


def start_of(intervention: Intervention, sites: Sequence[AblationSite]) -> int:
    """Index of the site from whose clean activations an intervention is run; −1: from the tokens.

    The deepest full cut of the model up to which everything is kept, or at which nothing of what arrives is: what
    happened before is then known, or gone.
    """
    found, free = -1, True
    for index, site in enumerate(sites):
        state = intervention[site.name]
        if site.cut and (free or state.blind):
            found = index
        free = free and state.untouched
    return found


def intervened(
    lm: LanguageModel,
    sites: Sequence[AblationSite],
    interventions: Sequence[Intervention],
    prompts: Prompts,
    rows: Sequence[tuple[int, int]],
) -> tuple[Run, TokenPairs, Int64[Tensor, " rows"]]:
    """One forward pass of (intervention, prompt) rows, from the first site that any of them needs.

    Gives the run, the pairs in the order of its rows, and the prompt of each row.
    """
    index = torch.tensor(rows, device=prompts.pairs.mask.device)
    intervention, prompt = index.unbind(1)
    used, local = intervention.unique(return_inverse=True)
    chosen = [interventions[number] for number in used.tolist()]
    begin = min(start_of(one, sites) for one in chosen)
    pairs = trimmed(prompts.pairs[prompt.cpu()])
    mask = pairs.mask.bool()
    tokens = Tokens.of(local, prompt, mask)

    def changed(x: Tensor, site: AblationSite) -> Tensor:
        return ablated(x, site, [one[site.name] for one in chosen], tokens)

    start = None
    if begin >= 0:
        # Of interventions that start later nothing that arrives there counts, or it is the clean run.
        clean = sites[begin].known("clean")
        x = clean.whole.new_zeros(*mask.shape, clean.whole.shape[1])
        x[tokens.row, tokens.position] = clean.whole[clean.slot[tokens.prompt, tokens.position]]
        start = (sites[begin].name, changed(x, sites[begin]))
    replaced = {
        site.name: partial(changed, site=site)
        for site in sites[begin + 1 :]
        if not all(one[site.name].untouched for one in chosen)
    }
    return run(lm, pairs.clean, mask, start=start, replace=replaced), pairs, prompt


def run_interventions(
    lm: LanguageModel,
    metric: Metric,
    sites: Sequence[AblationSite],
    interventions: Sequence[Intervention],
    prompts: Prompts,
    rows: Sequence[tuple[int, int]],
) -> Float[Tensor, " rows"]:
    """m of (intervention, prompt) rows in one forward pass."""
    this, pairs, prompt = intervened(lm, sites, interventions, prompts, rows)
    reference = None if prompts.reference is None else prompts.reference[prompt]
    return metric_of_run(lm, metric, this, pairs, reference)


def logits_of_interventions(
    lm: LanguageModel,
    sites: Sequence[AblationSite],
    interventions: Sequence[Intervention],
    prompts: Prompts,
    rows: Sequence[tuple[int, int]],
) -> Float[Tensor, "rows vocab"]:
    """Logits, where the answer is read, of (intervention, prompt) rows in one forward pass."""
    this, pairs, _ = intervened(lm, sites, interventions, prompts, rows)
    return answer_logits(lm, this, pairs.position)
