"""Sparse codes agree with the dense matrices they stand for."""

import pytest
import torch

from circuitflow.dictionaries.codes import (
    Codes,
    codes_from_dense,
    codes_from_lists,
    concatenate_codes,
    decode_codes,
    empty_codes,
)

DENSE = torch.tensor(
    [[0.0, 2.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.5, 4.0]], dtype=torch.float64
)


@pytest.fixture
def codes() -> Codes:
    return codes_from_dense(DENSE)


def test_layout_of_a_hand_worked_example(codes):
    assert codes.offsets.tolist() == [0, 2, 2, 5]
    assert codes.features.tolist() == [1, 3, 0, 3, 4]
    assert codes.values.tolist() == [2, 1, 3, 0.5, 4]
    assert codes.rows().tolist() == [0, 0, 2, 2, 2]
    assert (codes.n, codes.nnz, codes.counts().tolist()) == (3, 5, [2, 0, 3])
    assert codes.fired().tolist() == [True, True, False, True, True]


def test_dense_is_the_inverse(codes):
    assert torch.equal(codes.dense(), DENSE)
    assert torch.equal(empty_codes(3, 5, DENSE).dense(), torch.zeros_like(DENSE))


def test_lists_are_sorted_and_lose_what_is_not_positive():
    features = torch.tensor([[4, 0, 3], [2, 1, 0]])
    values = torch.tensor([[4.0, 3.0, 0.5], [0.0, -1.0, 7.0]])
    codes = codes_from_lists(features, values, 5)
    assert codes.features.tolist() == [0, 3, 4, 0]
    assert codes.values.tolist() == [3.0, 0.5, 4.0, 7.0]
    assert codes.offsets.tolist() == [0, 3, 4]


def test_select_where_take_and_columns(codes):
    keep = torch.tensor([True, False, False, True, False])
    assert torch.equal(codes.select(keep).dense(), DENSE * keep)
    large = codes.where(codes.values > 1)
    assert torch.equal(large.dense(), torch.where(DENSE > 1, DENSE, torch.zeros_like(DENSE)))
    index = torch.tensor([2, 0, 1, 2])
    assert torch.equal(codes.take(index).dense(), DENSE[index])
    features = torch.tensor([4, 2, 3])
    assert torch.equal(codes.columns(features), DENSE[:, features])


def test_transpose_and_concatenation(codes):
    assert torch.equal(codes.by_feature().dense(), DENSE.T)
    assert codes.by_feature().features.tolist() == [2, 0, 0, 2, 2]
    values, others = codes.by_feature_with(codes.values**2)
    assert torch.equal(others.dense(), DENSE.T**2)
    assert torch.equal(values.offsets, others.offsets)
    joined = concatenate_codes([codes, codes.take(torch.tensor([1])), codes])
    assert torch.equal(joined.dense(), torch.cat([DENSE, DENSE[1:2], DENSE]))


def test_decode_is_the_matrix_product(codes):
    directions = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(decode_codes(codes, directions), DENSE @ directions, rtol=1e-14, atol=1e-14)
    nothing = decode_codes(empty_codes(3, 5, DENSE), directions)
    assert torch.equal(nothing, torch.zeros(3, 4, dtype=torch.float64))


def test_to_changes_the_type_of_values_alone(codes):
    narrow = codes.to(torch.float32)
    assert narrow.values.dtype == torch.float32
    assert narrow.features.dtype == torch.int64
    assert torch.equal(codes.to("cpu").dense(), DENSE)
