"""The rules of selection by hand-computed values and at their boundaries."""

import numpy as np
import pytest

from circuitflow.circuits.selection import RULES, chosen
from circuitflow.errors import UserError

STRENGTHS = [1.0, 4.0, 0.0, 2.0, 3.0]  # mean 2, standard deviation sqrt(2)


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ({"top": 2}, [1, 4]),
        ({"top": 0}, []),
        ({"top": 99}, [1, 4, 3, 0, 2]),
        ({"threshold": 2.0}, [1, 4]),
        ({"threshold": 1.9}, [1, 4, 3]),
        ({"threshold": -1}, [1, 4, 3, 0, 2]),
        ({"percentile": 75}, [1, 4]),
        ({"percentile": 76}, [1]),
        ({"percentile": 0}, [1, 4, 3, 0, 2]),
        ({"percentile": 100}, [1]),
        ({"zscore": 0.7}, [1, 4]),
        ({"zscore": 0.71}, [1]),
        ({"zscore": 2}, []),
        ({"zscore": -0.1}, [1, 4, 3]),
        ({"effect_share": 0.4}, [1]),
        ({"effect_share": 0.41}, [1, 4]),
        ({"effect_share": 0.9}, [1, 4, 3]),
        ({"effect_share": 1}, [1, 4, 3, 0]),
        ({"effect_share": 0}, []),
    ],
)
def test_every_rule_by_hand(rule, kept):
    assert chosen(STRENGTHS, rule) == kept
    assert chosen(np.array(STRENGTHS), rule) == kept


@pytest.mark.parametrize(
    ("sparsity", "total", "kept"),
    [(0.98, 100, [1, 4]), (0.97, 100, [1, 4, 3]), (0.9, 15, [1]), (1, 100, []), (0, 100, [1, 4, 3, 0, 2])],
)
def test_sparsity_is_of_all_nodes(sparsity, total, kept):
    assert chosen(STRENGTHS, {"sparsity": sparsity}, total) == kept


def test_whole_numbers_survive_rounding():
    assert len(chosen(np.arange(100.0), {"sparsity": 0.9}, 100)) == 10  # (1 − 0.9) · 100 is 9.999…
    assert len(chosen([0.1] * 10, {"effect_share": 0.3})) == 3  # and 0.1 + 0.1 + 0.1 is above 0.3
    assert len(chosen([0.1] * 10, {"effect_share": 1})) == 10


def test_ties_go_by_the_order_given_or_together():
    equal = [1.0, 2.0, 2.0, 2.0]
    assert chosen(equal, {"top": 2}) == [1, 2]
    assert chosen(equal, {"percentile": 100}) == [1, 2, 3]
    assert chosen(equal, {"threshold": 2.0}) == []
    assert chosen([0.1] * 3, {"zscore": 0}) == chosen([0.1] * 3, {"zscore": -1}) == []


def test_signed_strengths_keep_their_sign():
    signed = [-5.0, 1.0, 3.0]
    assert chosen(signed, {"top": 2}) == [2, 1]
    assert chosen(signed, {"threshold": 0.0}) == [2, 1]
    assert chosen(signed, {"effect_share": 0.75}) == [2]
    assert chosen([-5.0, -1.0], {"effect_share": 1}) == []


@pytest.mark.parametrize("rule", RULES)
def test_without_candidates_nothing_is_chosen(rule):
    assert chosen([], {rule: 0.5}, total=10) == []


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({}, "exactly one of top, threshold.* but none"),
        ({"top": 1, "zscore": 2}, "but top, zscore were given"),
        ({"percentil": 9}, "did you mean 'percentile'"),
        ({"percentile": 101}, "percentile: 101 is out of range; give a number from 0 to 100"),
        ({"effect_share": 1.5}, "from 0 to 1"),
        ({"top": -1}, "out of range"),
        ({"threshold": float("nan")}, "out of range"),
        ({"sparsity": 0.5}, "given as None beside 5 candidates"),
    ],
)
def test_what_cannot_be_is_refused(rule, said):
    with pytest.raises(UserError, match=said):
        chosen(STRENGTHS, rule)


def test_a_missing_strength_is_refused():
    with pytest.raises(UserError, match="1 of 2 candidates have no strength"):
        chosen([1.0, float("nan")], {"top": 1})
    with pytest.raises(UserError, match="given as 4 beside 5"):
        chosen(STRENGTHS, {"sparsity": 0.5}, 4)
