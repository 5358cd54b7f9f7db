"""The forward pass: padding, starting, stopping, replacing and differentiating, in float64 on every architecture."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from circuitflow.errors import UserError
from circuitflow.models.architectures import ARCHITECTURES
from circuitflow.models.attention import attend
from circuitflow.models.running import run

CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in ARCHITECTURES}
CASES |= {
    "gpt_neox_sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "gemma2_short_window": ("gemma2", {"sliding_window": 3}),
}


@pytest.fixture(params=CASES)
def lm(request: pytest.FixtureRequest, random_lm: Callable[..., Any]) -> Any:
    name, settings = CASES[request.param]
    return random_lm(name, **settings)


@pytest.fixture
def llama(random_lm: Callable[..., Any]) -> Any:
    return random_lm("llama")


def a_batch(rows: int = 2, pos: int = 6) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(3, 700, (rows, pos), generator=torch.Generator().manual_seed(0))
    return tokens, torch.ones_like(tokens, dtype=torch.bool)


def noise(like: Tensor, seed: int = 7) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)


def close(left: Tensor | None, right: Tensor | None, atol: float = 1e-11) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=atol)


# Padding


@pytest.mark.parametrize("dtype", ["float64", "float16"])
@pytest.mark.parametrize("case", CASES)
def test_padding_changes_nothing(case: str, dtype: str, random_lm: Callable[..., Any]) -> None:
    """Also where a sliding window leaves padded positions nothing to attend to."""
    lm = random_lm(CASES[case][0], dtype=dtype, **CASES[case][1])
    tokens, mask = a_batch(3, 11)
    lengths = (11, 4, 1)
    for row, length in enumerate(lengths):
        mask[row, length:] = False
    padded = run(lm, tokens, mask).last
    assert padded is not None
    assert padded.isfinite().all()
    for row, length in enumerate(lengths):
        alone = run(lm, tokens[row : row + 1, :length], mask[row : row + 1, :length]).last
        assert alone is not None
        # Half precision rounds differently in products of another shape.
        tolerance = 1e-11 if dtype == "float64" else 0.02 * alone.abs().max().item()
        close(padded[row, :length], alone[0], atol=tolerance)


def test_padding_on_the_left_is_refused(llama: Any) -> None:
    tokens, mask = a_batch()
    mask[0, 0] = False
    with pytest.raises(ValueError, match="followed by padding"):
        run(llama, tokens, mask)
    for row in ([True, True, False, True, True, True], [False] * 6):
        mask[0] = torch.tensor(row)
        with pytest.raises(ValueError, match="followed by padding"):
            run(llama, tokens, mask)


def test_a_fully_masked_row_stays_finite_in_half_precision() -> None:
    """Strongly negative scores on top of float16's lowest value would otherwise give −inf everywhere, hence NaN."""
    query = torch.full((1, 1, 3, 4), 10.0, dtype=torch.float16)
    mask = torch.full((1, 1, 3, 3), torch.finfo(torch.float16).min, dtype=torch.float16).triu(1)
    mask[..., 2, :] = torch.finfo(torch.float16).min
    out, _ = attend(torch.nn.Identity(), query, -query, query, mask)
    assert out.isfinite().all()


# Starting and stopping


@pytest.mark.parametrize("site", ["embed", "resid.0", "resid.1"])
def test_starting_from_a_captured_value_equals_the_full_run(lm: Any, site: str) -> None:
    tokens, mask = a_batch()
    mask[1, 4:] = False
    full = run(lm, tokens, mask, capture=[site, "resid.1"])
    again = run(lm, tokens, mask, start=(site, full.sites[site]))
    assert again.last is not None
    assert torch.equal(again.last, full.sites["resid.1"])


def test_starting_value_is_used(lm: Any) -> None:
    """Another value at resid.0 gives what the second block makes of that value."""
    tokens, mask = a_batch()
    x = noise(run(lm, tokens, mask, capture=["resid.0"]).sites["resid.0"])
    started = run(lm, tokens, mask, start=("resid.0", x), capture=["resid.0", "resid.1"])
    replaced = run(lm, tokens, mask, replace={"resid.0": lambda _: x})
    assert started.sites["resid.0"] is x
    close(started.sites["resid.1"], replaced.last)


def blocks_run(lm: Any, monkeypatch: pytest.MonkeyPatch, **how: Any) -> list[int]:
    """Layers whose attention was computed during a run."""
    seen: list[int] = []
    for layer, block in enumerate(lm.blocks):
        module = block.get_submodule(lm.arch.z)
        monkeypatch.setattr(
            module, "forward", lambda x, old=module.forward, layer=layer: (seen.append(layer), old(x))[1]
        )
    tokens, mask = a_batch()
    run(lm, tokens, mask, **how)
    return seen


def test_only_the_blocks_between_start_and_stop_are_computed(
    lm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, mask = a_batch()
    x = run(lm, tokens, mask, capture=["resid.0"]).sites["resid.0"]
    with monkeypatch.context() as patch:
        assert blocks_run(lm, patch) == [0, 1]
    with monkeypatch.context() as patch:
        assert blocks_run(lm, patch, capture=["resid.0"]) == [0]
    with monkeypatch.context() as patch:
        assert blocks_run(lm, patch, stop_at="mlp.0") == [0]
    with monkeypatch.context() as patch:
        assert blocks_run(lm, patch, capture=["z.0"]) == []
    with monkeypatch.context() as patch:
        assert blocks_run(lm, patch, stop_at="embed") == []
    with monkeypatch.context() as patch:
        assert blocks_run(lm, patch, start=("resid.0", x)) == [1]


def test_last_is_given_only_if_the_last_block_was_run(llama: Any) -> None:
    tokens, mask = a_batch()
    assert run(llama, tokens, mask, capture=["resid.0"]).last is None
    assert run(llama, tokens, mask, capture=["mlp.1"]).last is None
    whole = run(llama, tokens, mask, capture=["resid.0"], stop_at="resid.1")
    assert whole.last is not None
    close(llama.unembed(whole.last), llama.hf(tokens).logits)


def test_sites_out_of_reach_are_refused(llama: Any) -> None:
    tokens, mask = a_batch()
    x = run(llama, tokens, mask, capture=["resid.0"]).sites["resid.0"]
    with pytest.raises(ValueError, match=r"from embed to resid.0 does not reach mlp.1"):
        run(llama, tokens, mask, capture=["resid.0"], replace={"mlp.1": lambda value: value})
    with pytest.raises(ValueError, match=r"from resid.0 to resid.1 does not reach attn.0"):
        run(llama, tokens, mask, start=("resid.0", x), capture=["attn.0", "resid.1"])
    with pytest.raises(ValueError, match=r"from resid.0 to mlp.0 does not reach mlp.0"):
        run(llama, tokens, mask, start=("resid.0", x), stop_at="mlp.0")
    with pytest.raises(ValueError, match=r"not from mlp.0"):
        run(llama, tokens, mask, start=("mlp.0", x))
    with pytest.raises(
        (ValueError, TypeError), match="start"
    ):  # TypeError where shapes are checked at every call
        run(llama, tokens, mask, start=("resid.0", x[:1]))
    with pytest.raises(UserError, match=r"beyond the model's depth"):
        run(llama, tokens, mask, capture=["resid.2"])


# Replacing


def test_replacing_by_the_same_value_changes_nothing(lm: Any) -> None:
    tokens, mask = a_batch()
    kinds = [
        kind
        for kind in ("z", "attn", "resid_mid", "mlp_in", "mlp", "resid")
        if kind != "resid_mid" or not lm.arch.parallel
    ]
    sites = ["embed", *(f"{kind}.{layer}" for layer in (0, 1) for kind in kinds)]
    plain = run(lm, tokens, mask).last
    same = run(lm, tokens, mask, replace={site: lambda value: value.clone() for site in sites}).last
    close(same, plain)


@pytest.mark.parametrize("kind", ["attn", "mlp"])
def test_replaced_sublayer_output_enters_the_stream(lm: Any, kind: str) -> None:
    tokens, mask = a_batch()
    site = f"{kind}.1"
    x = run(lm, tokens, mask, capture=["resid.0", "attn.1", "mlp.1"]).sites
    new = noise(x[site])
    changed = run(
        lm, tokens, mask, replace={site: lambda _: new}, capture=[site, "attn.1", "mlp.1", "resid.1"]
    ).sites
    assert changed[site] is new
    close(changed["resid.1"], x["resid.0"] + changed["attn.1"] + changed["mlp.1"])
    if kind == "attn" and not lm.arch.parallel:
        assert not torch.allclose(changed["mlp.1"], x["mlp.1"])
    else:
        close(
            changed["attn.1"] if kind == "mlp" else changed["mlp.1"],
            x["attn.1"] if kind == "mlp" else x["mlp.1"],
        )


@pytest.mark.parametrize("case", [case for case in CASES if case != "gpt_neox"])
def test_replaced_stream_between_the_sublayers(case: str, random_lm: Callable[..., Any]) -> None:
    """Both the MLP and the block's output go on from the new value."""
    lm = random_lm(CASES[case][0], **CASES[case][1])
    tokens, mask = a_batch()
    x = run(lm, tokens, mask, capture=["resid.0", "resid_mid.1"]).sites
    new = noise(x["resid_mid.1"])
    sites = ["mlp_in.1", "mlp.1", "resid.1"]
    changed = run(lm, tokens, mask, replace={"resid_mid.1": lambda _: new}, capture=sites).sites
    by_attention = run(
        lm,
        tokens,
        mask,
        start=("resid.0", x["resid.0"]),
        replace={"attn.1": lambda _: new - x["resid.0"]},
        capture=sites,
    ).sites
    for site in sites:
        close(changed[site], by_attention[site])


def test_replacements_combine_in_one_block(llama: Any) -> None:
    tokens, mask = a_batch()
    x = run(llama, tokens, mask, capture=["resid.0"]).sites["resid.0"]
    middle, mlp = noise(x, 1), noise(x, 2)
    last = run(
        llama,
        tokens,
        mask,
        replace={"resid_mid.1": lambda _: middle, "mlp.1": lambda _: mlp, "resid.1": lambda value: 2 * value},
    ).last
    close(last, 2 * (middle + mlp))


def hooks_on(lm: Any) -> list[tuple[int, int]]:
    return [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in lm.hf.modules()]


def test_nothing_is_left_behind(lm: Any) -> None:
    """Hooks and skipped blocks are undone, also when a replacement fails."""
    tokens, mask = a_batch()
    hooks = hooks_on(lm)  # transformers leaves some of its own on models that have given hidden states
    before = run(lm, tokens, mask, capture=["resid.0"], stop_at="resid.1")

    def fail(_: Tensor) -> Tensor:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        run(
            lm, tokens, mask, start=("resid.0", before.sites["resid.0"] + 1), replace={"z.1": fail}, grad=True
        )
    assert hooks_on(lm) == hooks
    assert not any("forward" in vars(block) for block in lm.blocks)
    assert torch.is_grad_enabled()
    assert torch.equal(run(lm, tokens, mask).last, before.last)  # type: ignore[arg-type]


# Gradients


def scalar(lm: Any, last: Tensor | None) -> Tensor:
    assert last is not None
    logits = lm.unembed(last[:, -1])
    return (logits[:, 5] - logits[:, 6]).sum()


def test_gradients_equal_finite_differences(lm: Any) -> None:
    """At every kind of site: the derivative along a random direction, with the rest of the model following."""
    tokens, mask = a_batch()
    kinds = [
        kind
        for kind in ("z", "attn", "resid_mid", "mlp_in", "mlp", "resid")
        if kind != "resid_mid" or not lm.arch.parallel
    ]
    sites = ["embed", *(f"{kind}.0" for kind in kinds)]
    this = run(lm, tokens, mask, capture=sites, stop_at="resid.1", grad=True)
    gradients = torch.autograd.grad(scalar(lm, this.last), [this.sites[site] for site in sites])
    for site, gradient in zip(sites, gradients, strict=True):
        direction = noise(gradient)

        def moved(step: float, site: str = site, direction: Tensor = direction) -> Tensor:
            return scalar(
                lm, run(lm, tokens, mask, replace={site: lambda value: value + step * direction}).last
            )

        measured = (moved(1e-5) - moved(-1e-5)) / 2e-5
        close((gradient * direction).sum(), measured, atol=1e-6 * max(1.0, measured.abs().item()))


def test_start_is_the_leaf(llama: Any) -> None:
    tokens, mask = a_batch()
    x = run(llama, tokens, mask, capture=["resid.0"]).sites["resid.0"]
    this = run(llama, tokens, mask, start=("resid.0", x), capture=["resid.0", "resid.1"], grad=True)
    leaf = this.sites["resid.0"]
    assert leaf.is_leaf
    assert leaf.requires_grad
    assert not x.requires_grad
    (started,) = torch.autograd.grad(scalar(llama, this.last), leaf)
    full = run(llama, tokens, mask, capture=["resid.0"], stop_at="resid.1", grad=True)
    close(started, torch.autograd.grad(scalar(llama, full.last), full.sites["resid.0"])[0])
    assert not any(parameter.requires_grad for parameter in llama.hf.parameters())


def test_a_start_that_carries_a_gradient_keeps_it(llama: Any) -> None:
    tokens, mask = a_batch()
    x = run(llama, tokens, mask, capture=["resid.0"]).sites["resid.0"]
    alpha = torch.zeros((), dtype=x.dtype, requires_grad=True)
    direction = noise(x)
    this = run(
        llama,
        tokens,
        mask,
        start=("resid.0", x + alpha * direction),
        capture=["resid.0"],
        stop_at="resid.1",
        grad=True,
    )
    along, at_site = torch.autograd.grad(scalar(llama, this.last), [alpha, this.sites["resid.0"]])
    close(along, (at_site * direction).sum())


def test_replaced_values_can_be_differentiated_by(llama: Any) -> None:
    tokens, mask = a_batch()
    x = run(llama, tokens, mask, capture=["mlp.0"]).sites["mlp.0"]
    this = run(
        llama,
        tokens,
        mask,
        replace={"mlp.0": lambda _: 0.5 * x},
        capture=["mlp.0", "embed"],
        stop_at="resid.1",
        grad=True,
    )
    at_mlp, at_embed = torch.autograd.grad(
        scalar(llama, this.last), [this.sites["mlp.0"], this.sites["embed"]]
    )
    assert at_mlp.abs().max() > 0
    assert at_embed.abs().max() > 0


def test_gradients_pass_through_replacements(llama: Any) -> None:
    tokens, mask = a_batch()
    how = {"capture": ["resid.0", "resid.1"], "stop_at": "resid.1", "grad": True}
    plain = run(llama, tokens, mask, **how)
    doubled = run(llama, tokens, mask, replace={"resid.1": lambda value: 2 * value}, **how)
    cotangent = noise(plain.sites["resid.1"])
    expected, found = (
        torch.autograd.grad(this.sites["resid.1"], this.sites["resid.0"], cotangent)[0]
        for this in (plain, doubled)
    )
    close(found, 2 * expected)


def test_batched_vector_jacobian_products_equal_single_ones(lm: Any) -> None:
    tokens, mask = a_batch()
    this = run(lm, tokens, mask, capture=["resid.0", "resid.1"], grad=True).sites
    cotangents = torch.stack([noise(this["resid.1"], seed) for seed in range(3)])
    (batched,) = torch.autograd.grad(
        this["resid.1"], this["resid.0"], cotangents, is_grads_batched=True, retain_graph=True
    )
    for cotangent, together in zip(cotangents, batched, strict=True):
        (alone,) = torch.autograd.grad(this["resid.1"], this["resid.0"], cotangent, retain_graph=True)
        close(together, alone)


def test_second_derivatives(lm: Any) -> None:
    """The curvature along a direction equals a second difference of the metric."""
    tokens, mask = a_batch()
    x = run(lm, tokens, mask, capture=["embed"]).sites["embed"]
    direction = noise(x)

    def metric(step: Tensor) -> Tensor:
        return scalar(lm, run(lm, tokens, mask, start=("embed", x + step * direction), grad=True).last)

    step = torch.zeros((), dtype=x.dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(metric(step), step, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, step)
    h = 1e-3
    points = [metric(torch.tensor(k * h, dtype=x.dtype)).item() for k in (-2, -1, 0, 1, 2)]
    measured = (-points[0] + 16 * points[1] - 30 * points[2] + 16 * points[3] - points[4]) / (12 * h * h)
    assert curvature.item() == pytest.approx(measured, rel=1e-3, abs=1e-3 * max(map(abs, points)))


def test_without_gradients_nothing_is_recorded(llama: Any) -> None:
    tokens, mask = a_batch()
    this = run(llama, tokens, mask, capture=["embed", "resid.1"])
    assert not any(value.requires_grad for value in this.sites.values())


def test_the_same_numbers_with_and_without_gradients(lm: Any) -> None:
    tokens, mask = a_batch()
    with_gradients, without = (run(lm, tokens, mask, grad=grad).last for grad in (True, False))
    assert torch.equal(with_gradients, without)  # type: ignore[arg-type]
