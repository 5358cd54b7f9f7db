"""The sparse parts of a training step are the dense ones, whatever the shape, the ties or the number of threads."""

import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from circuitflow.dictionaries import compiling, gradients, kernels, training_kernels
from circuitflow.dictionaries.codes import Codes, codes_from_dense, empty_codes
from circuitflow.dictionaries.gradients import (
    batch_top_codes,
    codes_above,
    decode_with_pull,
    encoder_chunks,
    pre_activations,
    top_codes,
    weight_gradients,
)
from circuitflow.dictionaries.objective import Context
from circuitflow.dictionaries.topk import AuxK, TopK, annealed

DTYPES = (torch.float32, torch.float64)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an accelerator")
    return request.param


@pytest.fixture
def threads():
    """Sets torch's threads, and sets them back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def small_blocks(monkeypatch):
    """Pre-activations are made three rows at a time."""
    monkeypatch.setattr(gradients, "CPU_ENTRIES", 1)
    monkeypatch.setattr(gradients, "OTHER_ENTRIES", 1)
    monkeypatch.setattr(gradients, "FEWEST_ROWS", 3)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def whole_numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Few different values, so that most are tied."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).double()


def weights(d_model: int = 5, d_dict: int = 12) -> dict[str, torch.Tensor]:
    shapes = {"W_enc": (d_dict, d_model), "b_enc": (d_dict,), "W_dec": (d_dict, d_model), "b_dec": (d_model,)}
    return {name: normal(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


def dense_largest(pre: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest positive entries of each row; of equal ones the first."""
    order = pre.argsort(dim=1, descending=True, stable=True)[:, :k]
    return torch.relu(pre) * torch.zeros_like(pre).scatter_(1, order, 1.0)


def same(codes: Codes, dense: torch.Tensor) -> None:
    expected = codes_from_dense(dense)
    assert codes.d_dict == expected.d_dict
    for name in ("offsets", "features", "values"):
        assert torch.equal(getattr(codes, name), getattr(expected, name)), name


@pytest.mark.parametrize("d_dict", [1, 7, 127, 128, 513, 1030, 2600])
@pytest.mark.parametrize("k", [1, 3, 64, 300, 5000])
def test_the_largest_of_rows(d_dict, k):
    pre = normal(9, d_dict, dtype=torch.float32)
    pre[3] = -pre[3].abs()  # none positive
    pre[4, d_dict // 2 :] = -1.0  # fewer than k, in the first half
    pre[5] = torch.linspace(-1, 1, d_dict)
    pre[6] = torch.linspace(1, -1, d_dict)
    same(kernels.largest_of_rows(pre, k), dense_largest(pre, k))


@pytest.mark.parametrize("d_dict", [40, 1030])
@pytest.mark.parametrize("k", [1, 5, 39, 600])
def test_of_tied_entries_the_first_are_chosen(d_dict, k):
    pre = whole_numbers(20, d_dict)
    same(kernels.largest_of_rows(pre, k), dense_largest(pre, k))


def test_what_is_not_a_number_is_never_chosen():
    pre = normal(4, 1030)
    pre[0, ::3] = torch.nan
    pre[1] = torch.nan
    pre[2, 7] = torch.inf
    codes = kernels.largest_of_rows(pre, 40)
    same(codes, dense_largest(pre.nan_to_num(nan=-1.0, posinf=torch.inf), 40))
    assert codes.counts().tolist() == [40, 0, 40, 40]
    assert kernels.above_threshold(pre, torch.zeros(1030)).counts()[1] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_dict", [5, 512, 1030])
def test_entries_above_a_threshold(d_dict, dtype):
    pre, threshold = normal(7, d_dict, dtype=dtype), 0.5 * normal(d_dict, seed=1, dtype=dtype)
    assert (threshold < 0).any()  # entries of either sign
    same(kernels.above_threshold(pre, threshold), torch.where(pre > threshold, pre, 0.0))
    same(kernels.above_threshold(pre, threshold + 100), torch.zeros_like(pre))


@pytest.mark.parametrize("n", [1, 10, 150, 200])
def test_the_largest_of_all_entries(n):
    pre = torch.relu(whole_numbers(20, 30))
    assert int((pre > 0).sum()) >= n
    flat = dense_largest(pre.reshape(1, -1), n)
    same(training_kernels.keep_largest(codes_from_dense(pre), n), flat.reshape(pre.shape))


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_those_of_the_matrices(dtype):
    codes = kernels.largest_of_rows(normal(9, 40, dtype=dtype), 6)
    directions, vectors = normal(40, 33, seed=1, dtype=dtype), normal(9, 33, seed=2, dtype=dtype)
    dense = (vectors @ directions.T)[codes.rows(), codes.features]
    torch.testing.assert_close(kernels.products(codes, directions, vectors), dense)


def test_the_transpose_is_that_of_the_codes():
    codes = kernels.largest_of_rows(normal(9, 40), 6)
    other = normal(codes.nnz, seed=1)
    values, others, sums = training_kernels.by_feature_with(codes, other)
    same(values, codes.dense().T)
    same(others, codes.with_values(other).dense().T)
    torch.testing.assert_close(sums, codes.with_values(other).dense().sum(0))


def everything(pre: torch.Tensor) -> list[torch.Tensor]:
    """All results of all kernels."""
    codes = kernels.largest_of_rows(pre, 20)
    above = kernels.above_threshold(pre, torch.full((pre.shape[1],), 0.7))
    pulls = kernels.products(codes, pre[:, :40].T.contiguous().repeat(30, 1), pre)
    values, others, sums = training_kernels.by_feature_with(codes, pulls)
    parts = (codes, above, training_kernels.keep_largest(above, 100), values, others)
    return [tensor for part in parts for tensor in (part.offsets, part.features, part.values)] + [sums]


def test_results_do_not_depend_on_threads(threads):
    pre = normal(37, 700, dtype=torch.float32)
    threads(1)
    alone = everything(pre)
    threads(2)
    assert all(map(torch.equal, everything(pre), alone))


def test_kernels_may_be_called_from_several_threads():
    inputs = [normal(37, 700, seed=seed, dtype=torch.float32) for seed in range(4)]
    expected = [everything(pre) for pre in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, wanted in zip(pool.map(everything, inputs), expected, strict=True):
                assert all(map(torch.equal, got, wanted))


def test_without_a_place_for_the_cache_kernels_are_compiled_all_the_same():
    compiled = compiling.compiled()(eval("lambda x: x + 1"))  # of no file: it has no place
    assert compiled(1) == 2


def test_inference_does_not_load_the_kernels():
    modules = "codes, selection, dictionary, splicing, measuring, tensors"
    code = f"import sys; from circuitflow.dictionaries import {modules}; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_blocks_of_pre_activations_are_the_whole(device, small_blocks):
    w = {name: tensor.to(device) for name, tensor in weights().items()}
    x = normal(10, 5).to(device)
    blocks = [(rows, pre.clone()) for rows, pre in encoder_chunks(w, x)]
    assert [rows.stop for rows, _ in blocks] == [3, 6, 9, 10]
    torch.testing.assert_close(torch.cat([pre for _, pre in blocks]), pre_activations(w, x))


def test_autocast_takes_the_product_in_lower_precision():
    w = {name: tensor.float() for name, tensor in weights().items()}
    x = normal(10, 5).float()
    with torch.autocast("cpu", torch.bfloat16):
        (_, lower), *_ = encoder_chunks(w, x)
    assert lower.dtype == torch.float32
    error = (lower - pre_activations(w, x)).abs().max()
    assert 1e-4 < float(error) < 0.1


@pytest.mark.parametrize("k", [1, 4, 12, 40])
def test_codes_of_a_batch(device, small_blocks, k):
    w = {name: tensor.to(device) for name, tensor in weights().items()}
    x = normal(10, 5, seed=9).to(device)
    pre = pre_activations(w, x)
    torch.testing.assert_close(top_codes(w, x, k).dense(), dense_largest(pre, k))
    for threshold in (torch.tensor(0.3), normal(12, seed=5)):
        limit = threshold.to(device)
        torch.testing.assert_close(codes_above(w, x, limit).dense(), torch.where(pre > limit, pre, 0.0))


@pytest.mark.parametrize("guess", [0.0, 0.5, 50.0])
@pytest.mark.parametrize("n", [1, 7, 30, 1000])
def test_the_largest_of_a_batch(device, small_blocks, n, guess):
    w = {name: tensor.to(device) for name, tensor in weights().items()}
    x = normal(20, 5, seed=9).to(device)
    pre = pre_activations(w, x)
    expected = dense_largest(pre.reshape(1, -1), n).reshape(pre.shape)
    torch.testing.assert_close(batch_top_codes(w, x, n, guess).dense(), expected)


def test_of_tied_entries_of_a_batch_the_first_are_chosen(device, small_blocks):
    w = {"W_enc": torch.eye(4, device=device), "b_enc": torch.zeros(4, device=device)}
    x = torch.tensor([[1.0, 2, 2, 0]] * 9, device=device)
    codes = batch_top_codes(w, x, 5)
    assert (codes.rows().tolist(), codes.features.tolist()) == ([0, 0, 1, 1, 2], [1, 2, 1, 2, 1])
    assert codes.values.tolist() == [2.0] * 5


@pytest.mark.parametrize("share", [-1.0, 2.0], ids=["dense", "sparse"])
def test_gradients_are_those_of_autograd(device, small_blocks, monkeypatch, share):
    monkeypatch.setattr(gradients, "CPU_DENSE", share)
    monkeypatch.setattr(gradients, "OTHER_DENSE", share)
    w = {name: tensor.to(device).requires_grad_() for name, tensor in weights().items()}
    x, target = normal(10, 5, seed=9).to(device), normal(10, 5, seed=8).to(device)
    kept = dense_largest(pre_activations(w, x), 6)
    reconstruction = kept @ w["W_dec"] + w["b_dec"]
    ((reconstruction - target) ** 2).sum().backward()

    values = {name: tensor.detach() for name, tensor in w.items()}
    codes = top_codes(values, x, 6)
    decoded, pull = decode_with_pull(codes, values["W_dec"])
    torch.testing.assert_close(decoded + values["b_dec"], reconstruction.detach())
    cotangent = 2 * (decoded + values["b_dec"] - target)
    for name, gradient in weight_gradients(codes, pull(cotangent), x, cotangent).items():
        torch.testing.assert_close(gradient, w[name].grad)


@pytest.mark.parametrize("share", [-1.0, 2.0], ids=["dense", "sparse"])
def test_nothing_active_gives_nothing(device, monkeypatch, share):
    monkeypatch.setattr(gradients, "CPU_DENSE", share)
    monkeypatch.setattr(gradients, "OTHER_DENSE", share)
    w = {name: tensor.to(device) for name, tensor in weights().items()}
    x, codes = normal(10, 5).to(device), empty_codes(10, 12, normal(1).to(device))
    decoded, pull = decode_with_pull(codes, w["W_dec"])
    assert not decoded.any()
    assert pull(x).shape == (0,)
    found = weight_gradients(codes, pull(x), x, x)
    assert [name for name, gradient in found.items() if gradient.any()] == ["b_dec"]


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation of torch gave."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, tuple | list) else [out]
        self.entries = max([self.entries, *(t.numel() for t in tensors if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize("n_dead", [0, 400])
def test_no_step_holds_a_tensor_of_batch_by_features(monkeypatch, n_dead):
    batch, d_dict = 2048, 1024
    monkeypatch.setattr(gradients, "CPU_ENTRIES", 1)
    w = {name: tensor.float() for name, tensor in weights(16, d_dict).items()}
    x, objective = normal(batch, 16).float(), TopK(8, AuxK(8, 0.5))
    context = Context(torch.arange(d_dict) < n_dead, 0.0)
    with Largest():
        objective.step(w, x, context)  # compiles, imports
    tracemalloc.start()
    with Largest() as seen:
        step = objective.step(w, x, context)
    numpy_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (float(step.auxiliary) > 0) == (n_dead > 0)
    assert seen.entries <= gradients.FEWEST_ROWS * d_dict < batch * d_dict
    assert numpy_bytes < 4 * batch * d_dict


def test_k_falls_to_its_last_value():
    assert [annealed(10, 50, 0.5, done) for done in (0.0, 0.25, 0.5, 1.0)] == [50, 30, 10, 10]
    assert annealed(10, None, 0.5, 0.0) == 10
    objective = TopK(2, AuxK(1, 0.0), k_start=10, k_anneal=0.5)
    w, x = weights(), normal(16, 5)
    nobody = torch.zeros(12, dtype=torch.bool)
    pre = pre_activations(w, x)
    for done, k in ((0.0, 10), (0.25, 6), (0.9, 2)):
        assert objective.step(w, x, Context(nobody, done)).active == int((dense_largest(pre, k) > 0).sum())
