"""Features encoded alone have the values that the whole encoder gives them."""

from dataclasses import replace

import pytest
import torch

from circuitflow.dictionaries.dictionary import Skip
from circuitflow.dictionaries.listed import encode_listed, lists
from tests.fixtures.attribution_toy import identity_dictionary, toy_dictionary

WIDTH, D_DICT = 16, 24
SKIP = Skip((0,), 5.0)


def jumprelu():
    """Thresholds of either sign, position 0 and long vectors skipped."""
    threshold = torch.linspace(-0.5, 1.5, D_DICT, dtype=torch.float64)
    made = toy_dictionary("resid.0", WIDTH, D_DICT, skip=SKIP)
    return replace(made, select="threshold", settings={}, extra={"threshold": threshold})


@pytest.mark.parametrize(
    "make", [jumprelu, lambda: replace(identity_dictionary("resid.0", WIDTH), skip=SKIP)]
)
def test_listed_features_are_columns_of_all(make):
    dictionary = make()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, WIDTH, generator=generator, dtype=torch.float64) * 1.2
    positions = torch.arange(30) % 5
    features = torch.tensor([2, 15, 7])
    expected = dictionary.encode(x, positions).dense()[:, features]
    got = encode_listed(dictionary, x, positions, features)
    assert torch.allclose(got, expected, atol=1e-12)
    skipped = (positions == 0) | (x.norm(dim=1) > 5)
    assert not got[skipped].any()
    assert got[~skipped].any(0).all()
    assert 6 < skipped.sum() < 30
    assert encode_listed(dictionary, x, positions, features[:0]).shape == (30, 0)


def test_features_that_compete_cannot_be_encoded_alone():
    topk = toy_dictionary("resid.0", WIDTH, D_DICT)
    assert lists(jumprelu())
    assert not lists(topk)
    assert not lists(replace(jumprelu(), W_enc=None))
    with pytest.raises(ValueError, match="chosen by the rule topk cannot be encoded alone"):
        encode_listed(topk, torch.zeros(1, WIDTH), torch.zeros(1, dtype=torch.int64), torch.tensor([0]))
