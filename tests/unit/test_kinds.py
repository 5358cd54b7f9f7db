"""Kinds of dictionary: what is made without training, and the gradients of what is trained."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from circuitflow.dictionaries.codes import decode_codes
from circuitflow.dictionaries.dictionary import NO_SKIP, Skip
from circuitflow.dictionaries.gradients import decode_with_pull, pre_activations
from circuitflow.dictionaries.kinds import MADE, TRAINED, Data, Request, check_request
from circuitflow.dictionaries.objective import Context
from circuitflow.dictionaries.selection import largest, selection
from circuitflow.dictionaries.settings import Training
from circuitflow.dictionaries.topk import AuxK, TopK
from circuitflow.errors import UserError

TRAINING = Training(
    epochs=1.0, batch=8, learning_rate=1e-3, warmup=0.1, decay=0.2, auxk_weight=0.5, auxk=None, dead_after=100,
    outlier_ratio=5.0, skip_positions=(0,), buffer_rows=64, checkpoints=(), evaluate_every=1,
)  # fmt: skip
REQUEST = Request("topk", "resid.1", d_model=6, d_dict=10, k=2, seed=0, training=TRAINING)
DATA = Data(torch.arange(6.0), Skip((0,), 50.0))


def weights(d_model: int = 5, d_dict: int = 12) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    shapes = {"W_enc": (d_dict, d_model), "b_enc": (d_dict,), "W_dec": (d_dict, d_model), "b_dec": (d_model,)}
    return {name: torch.randn(*shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}


def batch(n: int = 16, d_model: int = 5) -> torch.Tensor:
    return torch.randn(n, d_model, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def dense_topk(pre: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest of each row where positive, as a dense differentiable matrix."""
    kept = torch.zeros_like(pre).scatter(1, pre.topk(min(k, pre.shape[1]), dim=1).indices, 1.0)
    return torch.relu(pre) * kept


def dense_loss(
    w: dict[str, torch.Tensor], x: torch.Tensor, k: int, aux: AuxK, dead: torch.Tensor
) -> torch.Tensor:
    """The same loss written densely, for autograd."""
    pre = x @ w["W_enc"].T + w["b_enc"]
    error = x - dense_topk(pre, k) @ w["W_dec"] - w["b_dec"]
    loss = error.square().sum() / x.shape[0]
    if dead.any():
        target = error.detach()
        left = target - dense_topk(pre[:, dead], aux.k) @ w["W_dec"][dead]
        loss = loss + aux.weight * left.square().sum() / target.square().sum()
    return loss


@pytest.mark.parametrize("n_dead", [0, 1, 5])
def test_topk_gradients_are_those_of_autograd(n_dead):
    w, x, aux = weights(), batch(), AuxK(k=2, weight=0.5)
    dead = torch.arange(12) < n_dead
    step = TopK(3, aux).step(w, x, Context(dead, 0.0))
    leaves = {name: tensor.clone().requires_grad_(True) for name, tensor in w.items()}
    loss = dense_loss(leaves, x, 3, aux, dead)
    loss.backward()
    torch.testing.assert_close(step.reconstruction + step.auxiliary, loss.detach(), rtol=1e-12, atol=0)
    assert (float(step.auxiliary) > 0) == (n_dead > 0)
    for name, leaf in leaves.items():
        torch.testing.assert_close(step.gradients[name], leaf.grad, rtol=1e-10, atol=1e-12)


def test_topk_gradient_is_that_of_finite_differences():
    w, x, objective = weights(), batch(), TopK(3, AuxK(2, 0.0))
    nobody = Context(torch.zeros(12, dtype=torch.bool), 0.0)
    step = objective.step(w, x, nobody)
    for name, place in (("W_enc", (4, 2)), ("b_enc", (4,)), ("W_dec", (7, 1)), ("b_dec", (3,))):
        losses = []
        for move in (1e-6, -1e-6):
            moved = {**w, name: w[name].clone()}
            moved[name][place] += move
            losses.append(float(objective.step(moved, x, nobody).reconstruction))
        assert float(step.gradients[name][place]) == pytest.approx(
            (losses[0] - losses[1]) / 2e-6, rel=1e-5, abs=1e-8
        )


def test_step_reports_what_fired():
    w, x = weights(), batch()
    step = TopK(3, AuxK(2, 0.0)).step(w, x, Context(torch.zeros(12, dtype=torch.bool), 0.0))
    dense = dense_topk(pre_activations(w, x), 3)
    assert torch.equal(step.fired, (dense > 0).any(dim=0))
    assert step.active == int((dense > 0).sum())


def test_pull_of_nothing_is_nothing():
    w = weights()
    codes = largest(-torch.ones(3, 12, dtype=torch.float64), 2)
    decoded, pull = decode_with_pull(codes, w["W_dec"])
    assert torch.equal(decoded, torch.zeros(3, 5, dtype=torch.float64))
    assert pull(torch.ones_like(decoded)).shape == (0,)


def test_identity_is_exact_everywhere():
    dictionary = MADE["identity"](replace(REQUEST, kind="identity"), DATA)
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    x[2, 3] = 0.0
    x[4] *= 1e6
    codes = dictionary.encode(x, torch.arange(9) % 3)
    assert torch.equal(codes.dense(), x)
    assert codes.nnz == 9 * 6 - 1
    assert torch.equal(dictionary.error(x, codes), torch.zeros_like(x))
    assert dictionary.skip == NO_SKIP


def test_random_has_unit_rows_centred_on_the_data():
    dictionary = MADE["random"](replace(REQUEST, kind="random"), DATA)
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(10))
    assert torch.equal(dictionary.W_enc, dictionary.W_dec)
    assert dictionary.skip == DATA.skip
    along = DATA.mean + 2 * dictionary.W_dec[4]
    codes = dictionary.encode(along[None], torch.tensor([1]))
    assert codes.columns(torch.tensor([4])).item() == pytest.approx(2.0, abs=1e-5)
    assert torch.equal(MADE["random"](REQUEST, DATA).W_dec, dictionary.W_dec)
    assert not torch.equal(MADE["random"](replace(REQUEST, seed=1), DATA).W_dec, dictionary.W_dec)


@pytest.mark.parametrize("kind", ["safetensors", "tensor.pt", "dict.pt"])
def test_decoder_only_reads_a_bare_decoder(tmp_path: Path, kind: str):
    rows = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    path = tmp_path / f"decoder.{kind}"
    if kind == "safetensors":
        save_file({"W_dec": rows}, path)
    else:
        torch.save(rows if kind == "tensor.pt" else {"W_dec": rows}, path)
    dictionary = MADE["decoder_only"](replace(REQUEST, kind="decoder_only", weights=path), DATA)
    assert torch.equal(dictionary.W_dec, rows)
    assert dictionary.W_enc is None
    assert (dictionary.d_dict, dictionary.b_dec.tolist()) == (7, [0.0] * 6)


def test_decoder_files_that_cannot_be(tmp_path: Path):
    make, request = MADE["decoder_only"], replace(REQUEST, kind="decoder_only")
    with pytest.raises(UserError, match="needs key weights"):
        make(request, DATA)
    save_file({"W_dec": torch.zeros(7, 5)}, tmp_path / "narrow.safetensors")
    with pytest.raises(UserError, match=r"shape \(7, 5\), expected \(d_dict, 6\) for resid\.1"):
        make(replace(request, weights=tmp_path / "narrow.safetensors"), DATA)
    save_file({"decoder": torch.zeros(7, 6)}, tmp_path / "named.safetensors")
    with pytest.raises(UserError, match=r"has no tensor W_dec \(it has decoder\)"):
        make(replace(request, weights=tmp_path / "named.safetensors"), DATA)
    (tmp_path / "text.pt").write_text("not tensors")
    with pytest.raises(UserError, match="cannot be read as a file of tensors"):
        make(replace(request, weights=tmp_path / "text.pt"), DATA)


def test_pickled_code_is_not_run(tmp_path: Path):
    np.save(tmp_path / "x.npy", np.zeros(1))

    class Evil:
        def __reduce__(self):
            return (Path.unlink, (tmp_path / "x.npy",))

    torch.save({"W_dec": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="cannot be read"):
        MADE["decoder_only"](replace(REQUEST, weights=tmp_path / "evil.pt"), DATA)
    assert (tmp_path / "x.npy").exists()


def test_unknown_names_and_impossible_k():
    with pytest.raises(UserError, match="did you mean 'topk'"):
        check_request(replace(REQUEST, kind="topkk"))
    with pytest.raises(UserError, match="k is 11; choose a number from 1 to d_dict, which is 10"):
        check_request(replace(REQUEST, k=11))
    with pytest.raises(UserError, match="did you mean 'topk'"):
        selection("top_k")
    for kind in (*TRAINED, *MADE):
        check_request(replace(REQUEST, kind=kind))


def test_decode_of_selected_codes_is_dense_decode():
    w, x = weights(), batch()
    pre = pre_activations(w, x)
    decoded = decode_codes(largest(pre, 4), w["W_dec"])
    torch.testing.assert_close(decoded, dense_topk(pre, 4) @ w["W_dec"], rtol=1e-12, atol=1e-12)
