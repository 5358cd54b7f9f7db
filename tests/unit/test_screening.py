"""Encoding in two steps chooses the features of the float32 product, to the last bit where sums are exact."""

import pytest
import torch

from circuitflow.dictionaries import dictionary as module
from circuitflow.dictionaries import kernels
from circuitflow.dictionaries.codes import Codes, codes_from_dense
from circuitflow.dictionaries.dictionary import Dictionary, Skip, linear
from circuitflow.dictionaries.screening import screened
from circuitflow.dictionaries.selection import largest


def whole(*shape: int, most: int, seed: int) -> torch.Tensor:
    """Whole numbers: their products and sums are exact in float32, but bfloat16 cannot hold those above 256."""
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(found: Codes, expected: Codes) -> None:
    for name in ("offsets", "features", "values"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("d_dict", [3, 130, 700, 2600])
@pytest.mark.parametrize("most", [1, 900])
def test_the_largest_are_those_of_the_exact_product(d_dict: int, k: int, most: int) -> None:
    """Ties too (many with ``most`` 1): of equal ones the first."""
    x, W_enc, b_enc = (
        whole(70, 12, most=most, seed=0),
        whole(d_dict, 12, most=most, seed=1),
        whole(d_dict, most=most, seed=2),
    )
    pre = x @ W_enc.T + b_enc
    order = pre.argsort(dim=1, descending=True, stable=True)[:, :k]
    expected = codes_from_dense(pre.relu() * torch.zeros_like(pre).scatter_(1, order, 1.0))
    assert expected.nnz > 0
    same(screened(x, W_enc, b_enc, k=k), expected)


@pytest.mark.parametrize("d_dict", [3, 700, 2600])
def test_those_above_thresholds_are_those_of_the_exact_product(d_dict: int) -> None:
    x, W_enc, b_enc = (
        whole(70, 12, most=900, seed=0),
        whole(d_dict, 12, most=900, seed=1),
        whole(d_dict, most=900, seed=2),
    )
    pre = x @ W_enc.T + b_enc
    threshold = pre[7].clone()  # one row sits on its thresholds exactly
    expected = codes_from_dense(torch.where(pre > threshold, pre, 0.0))
    found = screened(x, W_enc, b_enc, threshold=threshold)
    assert 0 < found.nnz < pre.numel()
    same(found, expected)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_real_numbers_far_from_zero(scale: float) -> None:
    """A large common part, as residual streams have it, taken back by the bias: bounds are loose there but hold."""
    W_enc = normal(3000, 64, seed=1) / 8
    common = 20 * normal(64, seed=3)
    x = scale * (common + normal(80, 64, seed=0))
    b_enc = -scale * (W_enc @ common)
    expected, found = largest(linear(x, W_enc, b_enc), 20), screened(x, W_enc, b_enc, k=20)
    exact = x.double() @ W_enc.double().T + b_enc.double()
    kept = exact.topk(21, dim=1).values
    clear = kept[:, 19] - kept[:, 20] > 1e-4 * scale  # elsewhere rounding decides
    assert clear.float().mean() > 0.9
    rows = clear.nonzero()[:, 0]
    assert torch.equal(found.take(rows).features, expected.take(rows).features)
    assert torch.allclose(found.dense()[clear].double(), expected.dense()[clear].double(), atol=1e-4 * scale)


def test_few_entries_are_computed_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Screening rules out all but a few times k."""
    counted = []
    products = kernels.products
    monkeypatch.setattr(
        kernels, "products", lambda codes, *rest: counted.append(codes.nnz) or products(codes, *rest)
    )
    screened(normal(80, 256, seed=0), normal(4096, 256, seed=1), torch.zeros(4096), k=32)
    assert 80 * 32 <= counted[0] < 80 * 32 * 3


def test_what_is_not_a_number_has_no_features() -> None:
    x, W_enc = normal(70, 16, seed=0), normal(600, 16, seed=1)
    x[3, 0] = float("nan")
    found = screened(x, W_enc, torch.zeros(600), k=4)
    assert found.counts()[3] == 0
    assert (found.counts()[torch.arange(70) != 3] == 4).all()


@pytest.mark.parametrize("select", ["topk", "threshold"])
def test_a_dictionary_encodes_in_two_steps_where_that_is_quicker(
    monkeypatch: pytest.MonkeyPatch, select: str
) -> None:
    """Codes do not depend on the batch, to the last bit, and are those of the plain product."""
    d_dict, W_enc = 8192, normal(8192, 32, seed=1)
    one = Dictionary(
        select, ("resid.0",), ("resid.0",), select, W_enc, normal(d_dict, seed=2), W_enc, torch.zeros(32),
        skip=Skip((2,)), settings={"k": 8}, extra={"threshold": torch.full((d_dict,), 9.0)},
    )  # fmt: skip
    x, positions = normal(200, 32, seed=0), torch.arange(200) % 10
    calls = []
    monkeypatch.setattr(module, "is_native", lambda: True)
    monkeypatch.setattr(module, "screened", lambda *a, **kw: calls.append(1) or screened(*a, **kw))
    whole_batch = one.encode(x, positions)
    assert calls
    some = torch.arange(30, 150)
    same(one.encode(x[some], positions[some]), whole_batch.take(some))
    monkeypatch.setattr(module, "is_native", lambda: False)
    plain = one.encode(x, positions)
    assert torch.equal(plain.features, whole_batch.features)
    assert torch.allclose(plain.values, whole_batch.values, atol=1e-4)
