"""Interventions: what every node of every site becomes in one run of the model.

A node is kept (as the arriving stream has it), replaced (by the mean, zero, or another run: see
:mod:`circuitflow.circuits.ablation`), or held at a value whatever it was. Circuits, their complements, windows of error
nodes, restorations and response curves are all interventions; they are built here and run there.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int64
from torch import Tensor

from circuitflow.attribution.nodes import ERROR, SUMMED
from circuitflow.errors import UserError
from circuitflow.models.sites import depth_order, parse_site

Triple = tuple[str, int, int]
"""A node: site, feature number (ERROR, −1, for the error), position (SUMMED, −1, for all together)."""

Value = str | float
"""What nodes are held at: "clean" or "patched", their own value in that run of the prompt, or a number."""

RUNS = ("clean", "patched")


@dataclass(frozen=True)
class Kept:
    """The nodes of one site that stay as they arrive, or all but those."""

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
    def everything(self) -> bool:
        """Whether every node is kept."""
        return self.complement and not len(self.feature)

    @property
    def by_position(self) -> bool:
        """Whether what is kept depends on the position."""
        return bool((self.position != SUMMED).any())


@dataclass(frozen=True)
class Held:
    """Nodes of one site that take a value, kept or not."""

    feature: Int64[Tensor, " held"]
    position: Int64[Tensor, " held"]
    value: Value

    @property
    def by_position(self) -> bool:
        """Whether what is held depends on the position."""
        return bool((self.position != SUMMED).any())


@dataclass(frozen=True)
class State:
    """What one site's nodes become: kept ones stay, all others are replaced, held ones take their value.

    Of two values that hold one node the later counts.
    """

    kept: Kept
    held: tuple[Held, ...] = ()

    @property
    def untouched(self) -> bool:
        """Whether the stream goes on as it arrives."""
        return self.kept.everything and not self.held

    @property
    def blind(self) -> bool:
        """Whether nothing depends on the arriving stream."""
        return self.kept.empty

    @property
    def by_position(self) -> bool:
        """Whether anything depends on the position."""
        return self.kept.by_position or any(held.by_position for held in self.held)


Intervention = Mapping[str, State]
"""A state for every site of the run, in order of depth."""


def keep(nodes: Sequence[Triple], sites: Sequence[str]) -> dict[str, State]:
    """A circuit: these nodes stay, all others are replaced.

    :raises UserError: a node lies at another site.
    """
    return {site: State(Kept(*found)) for site, found in _by_site(nodes, sites).items()}


def remove(nodes: Sequence[Triple], sites: Sequence[str]) -> dict[str, State]:
    """Everything but these nodes stays.

    :raises UserError: a node lies at another site.
    """
    return complement(keep(nodes, sites))


def everything(sites: Sequence[str]) -> dict[str, State]:
    """M: the model as it is."""
    return remove([], sites)


def nothing(sites: Sequence[str]) -> dict[str, State]:
    """∅: every node replaced."""
    return keep([], sites)


def complement(intervention: Intervention) -> dict[str, State]:
    """Kept and replaced nodes exchanged; held nodes stay held."""
    return {
        site: replace(state, kept=replace(state.kept, complement=not state.kept.complement))
        for site, state in intervention.items()
    }


def hold(intervention: Intervention, nodes: Sequence[Triple], value: Value) -> dict[str, State]:
    """The same with some nodes held, over whatever held them before.

    :param value: "clean" or "patched": each node's own value in that run of the prompt; or a number, for features, in
        units of their activation.
    :raises UserError: a node lies at another site, the value is none of these, or an error is to be a number.
    """
    if isinstance(value, str) and value not in RUNS:
        raise UserError(f"Nodes cannot be held at '{value}'; name 'clean', 'patched' or a number.")
    found = {}
    for site, (feature, position) in _by_site(nodes, list(intervention)).items():
        if not isinstance(value, str) and bool((feature == ERROR).any()):
            raise UserError(
                f"The error of {site} is a vector and cannot be held at {value}; name 'clean' or 'patched'."
            )
        state = intervention[site]
        more = (Held(feature, position, value),) if len(feature) else ()
        found[site] = replace(state, held=(*state.held, *more))
    return found


def from_site(intervention: Intervention, start: str | None, sites: Sequence[str]) -> dict[str, State]:
    """The same with everything kept at the sites before ``start`` (None: at none).

    Held nodes there are let go. For a start layer do it to C and ∅ alike; M keeps everything anyway.
    """
    if start is None:
        return dict(intervention)
    first, free = depth_order(parse_site(start)), everything(sites)
    return {
        site: free[site] if depth_order(parse_site(site)) < first else intervention[site] for site in sites
    }


def key(intervention: Intervention) -> str:
    """A digest that equal interventions share, however they were put together."""
    said = {site: _canonical(state) for site, state in intervention.items()}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:32]


def _by_site(nodes: Sequence[Triple], sites: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Features and positions of the nodes of every site."""
    found: dict[str, list[tuple[int, int]]] = {site: [] for site in sites}
    for site, feature, position in nodes:
        if site not in found:
            raise UserError(
                f"A node lies at {site}, which is no site of this run; they are {', '.join(sites)}."
            )
        found[site].append((feature, position))
    pairs = {
        site: torch.tensor(here, dtype=torch.int64).reshape(-1, 2).unbind(1) for site, here in found.items()
    }
    return {site: (feature, position) for site, (feature, position) in pairs.items()}


def _canonical(state: State) -> list[object]:
    """What a state says, each thing once and in order; whether a held node is kept says nothing."""
    held = _held_values(state.held)
    listed = set(zip(state.kept.feature.tolist(), state.kept.position.tolist(), strict=True))
    everywhere = {feature for feature, position in listed if position == SUMMED}
    kept = [
        (feature, position)
        for feature, position in sorted(listed)
        if (position == SUMMED or feature not in everywhere)
        and (feature, SUMMED) not in held
        and (feature, position) not in held
    ]
    return [state.kept.complement, kept, [[*node, value] for node, value in sorted(held.items())]]


def _held_values(groups: Sequence[Held]) -> dict[tuple[int, int], str]:
    """The value of every held (feature, position) in words; positions whose value is that of all are left out."""
    found: dict[tuple[int, int], str] = {}
    for held in groups:
        value = held.value if isinstance(held.value, str) else repr(float(held.value))
        for feature, position in zip(held.feature.tolist(), held.position.tolist(), strict=True):
            if position == SUMMED:
                found = {node: said for node, said in found.items() if node[0] != feature}
            if found.get((feature, SUMMED)) == value:
                found.pop((feature, position), None)
            else:
                found[feature, position] = value
    return found
