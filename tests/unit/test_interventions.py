"""Interventions say what they are asked to, and equal ones have equal keys."""

import pytest
import torch

from circuitflow.attribution.nodes import ERROR, SUMMED
from circuitflow.circuits.interventions import (
    Kept,
    State,
    complement,
    everything,
    from_site,
    hold,
    keep,
    key,
    nothing,
    remove,
)
from circuitflow.errors import UserError

SITES = ("embed", "attn.0", "resid.0", "resid.1")
NODES = [("embed", 3, SUMMED), ("resid.0", ERROR, 2), ("resid.0", 7, SUMMED)]


def listed(state):
    return list(zip(state.kept.feature.tolist(), state.kept.position.tolist(), strict=True))


def test_nodes_are_kept_or_removed_at_their_sites():
    kept, removed = keep(NODES, SITES), remove(NODES, SITES)
    assert list(kept) == list(removed) == list(SITES)
    assert listed(kept["resid.0"]) == listed(removed["resid.0"]) == [(ERROR, 2), (7, SUMMED)]
    assert [state.kept.complement for state in (kept["embed"], removed["embed"])] == [False, True]
    assert [kept[site].blind for site in SITES] == [False, True, False, True]
    assert [removed[site].untouched for site in SITES] == [False, True, False, True]
    assert [kept[site].by_position for site in SITES] == [False, False, True, False]


def test_all_and_nothing():
    assert all(state.untouched for state in everything(SITES).values())
    assert all(state.blind for state in nothing(SITES).values())
    assert key(complement(nothing(SITES))) == key(everything(SITES)) != key(nothing(SITES))


def test_held_nodes_stay_held_in_the_complement_and_touch_a_site():
    held = hold(everything(SITES), [("resid.0", 7, 1)], "clean")
    assert [held[site].untouched for site in SITES] == [True, True, False, True]
    assert held["resid.0"].by_position
    other = complement(held)
    assert other["resid.0"].held == held["resid.0"].held
    assert all(state.blind for state in other.values())


@pytest.mark.parametrize("start", ["resid.0", "z.0", None])
def test_sites_before_the_start_are_free(start):
    intervention = hold(keep(NODES, SITES), [("embed", 1, SUMMED)], 2.0)
    found = from_site(intervention, start, SITES)
    before = {"resid.0": 2, "z.0": 1, None: 0}[start]
    assert [found[site].untouched for site in SITES] == [place < before for place in range(4)]
    assert all(found[site] is intervention[site] for site in SITES[before:])


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"lies at resid.5, which is no site of this run; they are embed"):
        keep([("resid.5", 0, SUMMED)], SITES)
    with pytest.raises(UserError, match="held at 'zero'; name 'clean'"):
        hold(nothing(SITES), NODES, "zero")
    with pytest.raises(UserError, match=r"error of resid.0 is a vector and cannot be held at 1.5"):
        hold(nothing(SITES), NODES, 1.5)


def test_equal_interventions_have_equal_keys():
    one = keep([*NODES, ("embed", 3, 4)], SITES)
    assert key(one) == key(keep(NODES[::-1] + NODES, dict.fromkeys(SITES)))
    twice = hold(hold(one, [("attn.0", 2, 1)], 1.0), [("attn.0", 2, SUMMED), ("embed", 3, SUMMED)], 2)
    straight = hold(keep(NODES[1:], SITES), [("embed", 3, SUMMED), ("attn.0", 2, SUMMED)], 2.0)
    assert key(twice) == key(straight)
    again = hold(straight, [("attn.0", 2, 3)], 2.0)
    assert key(again) == key(straight)


def test_other_interventions_have_other_keys():
    base = keep(NODES, SITES)
    held = hold(base, [("attn.0", 2, SUMMED)], "clean")
    different = [
        base,
        remove(NODES, SITES),
        keep(NODES[:2], SITES),
        keep([("embed", 3, 0), *NODES[1:]], SITES),
        {**base, "resid.1": State(Kept(torch.tensor([7]), torch.tensor([SUMMED])))},
        held,
        hold(base, [("attn.0", 2, SUMMED)], "patched"),
        hold(base, [("attn.0", 2, SUMMED)], 1.0),
        hold(base, [("attn.0", 2, 0)], "clean"),
        hold(held, [("attn.0", 2, 1)], "patched"),
    ]
    assert len(set(map(key, different))) == len(different)
