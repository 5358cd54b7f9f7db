"""The search over node counts, where the answer of every count is known."""

import pytest

from circuitflow.circuits.search import smallest


def searched(most, reaching):
    tried = []

    def reaches(count):
        tried.append(count)
        return reaching(count)

    return smallest(most, reaches), tried


@pytest.mark.parametrize("most", [1, 2, 3, 8, 37, 100])
def test_where_faithfulness_grows_the_smallest_count_is_found(most):
    for wanted in range(1, most + 1):
        found, tried = searched(most, lambda count, wanted=wanted: count >= wanted)
        assert found == wanted
        assert len(tried) == len(set(tried)) <= 2 * wanted.bit_length() + 1
        assert max(tried) <= min(most, 2 * wanted)


def test_where_nothing_reaches_all_nodes_were_tried():
    assert searched(5, lambda count: False) == (None, [1, 2, 4, 5])
    assert searched(1, lambda count: False) == (None, [1])
    assert searched(0, lambda count: True) == (None, [])


def test_where_faithfulness_falls_again_the_chosen_count_was_itself_tried():
    """7 reaches and 8 too, but 6 does not although 5 does: nothing is said of counts that were not tried."""
    found, tried = searched(100, {1: 0, 2: 0, 4: 0, 5: 1, 6: 0, 7: 1, 8: 1}.__getitem__)
    assert found == 7
    assert tried == [1, 2, 4, 8, 6, 7]
    found, tried = searched(100, lambda count: count == 4)
    assert (found, tried) == (4, [1, 2, 4, 3])
