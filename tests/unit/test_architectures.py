"""Every architecture, on a random two-layer model in float64: sites are where their names say."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from circuitflow.errors import UserError
from circuitflow.models.architectures import ARCHITECTURES, architecture_of, check_site, site_width
from circuitflow.models.running import run
from circuitflow.models.sites import WITHIN_BLOCK, parse_site

CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in ARCHITECTURES}
CASES |= {
    "gpt_neox_sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "gemma2_short_window": ("gemma2", {"sliding_window": 3}),
    "gemma2_strong_caps": ("gemma2", {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.5}),
    "gemma3_mixed_windows": (
        "gemma3_text",
        {"sliding_window": 3, "layer_types": ("sliding_attention", "full_attention")},
    ),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
}


@pytest.fixture(params=CASES)
def lm(request: pytest.FixtureRequest, random_lm: Callable[..., Any]) -> Any:
    name, settings = CASES[request.param]
    return random_lm(name, **settings)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(3, 800, (2, 9), generator=torch.Generator().manual_seed(0))


def all_sites(lm: Any) -> list[str]:
    kinds = [kind for kind in WITHIN_BLOCK if kind != "resid_mid" or not lm.arch.parallel]
    return ["embed", *(f"{kind}.{layer}" for layer in range(lm.n_layers) for kind in kinds)]


def full_run(lm: Any, tokens: Tensor) -> dict[str, Tensor]:
    return run(lm, tokens, torch.ones_like(tokens, dtype=torch.bool), capture=all_sites(lm)).sites


def test_stream_is_the_sum_of_its_parts(lm: Any, tokens: Tensor) -> None:
    x = full_run(lm, tokens)
    stream = x["embed"]
    for layer in range(lm.n_layers):
        if not lm.arch.parallel:
            torch.testing.assert_close(
                stream + x[f"attn.{layer}"], x[f"resid_mid.{layer}"], rtol=0, atol=1e-12
            )
        stream = stream + x[f"attn.{layer}"] + x[f"mlp.{layer}"]
        torch.testing.assert_close(stream, x[f"resid.{layer}"], rtol=0, atol=1e-12)
        assert all(x[f"{kind}.{layer}"].std() > 1e-3 for kind in ("attn", "mlp"))


def test_sites_are_what_the_model_itself_reports(lm: Any, tokens: Tensor) -> None:
    x = full_run(lm, tokens)
    own = lm.hf(tokens, output_hidden_states=True, use_cache=False)
    assert torch.equal(x["embed"], own.hidden_states[0])
    assert torch.equal(x["resid.0"], own.hidden_states[1])
    torch.testing.assert_close(lm.unembed(x["resid.1"]), own.logits, rtol=0, atol=1e-12)


def test_sublayers_read_z_and_mlp_in(lm: Any, tokens: Tensor) -> None:
    x = full_run(lm, tokens)
    block = lm.blocks[1]
    attn = block.get_submodule(lm.arch.z)(x["z.1"])
    mlp = block.get_submodule(lm.arch.mlp_in)(x["mlp_in.1"])
    if lm.arch.name in ("gemma2", "gemma3_text"):
        attn = block.get_submodule(lm.arch.attn)(attn)
        mlp = block.get_submodule(lm.arch.mlp)(mlp)
    torch.testing.assert_close(attn, x["attn.1"], rtol=0, atol=1e-12)
    torch.testing.assert_close(mlp, x["mlp.1"], rtol=0, atol=1e-12)


def test_mlp_in_is_the_normed_stream(lm: Any, tokens: Tensor) -> None:
    x = full_run(lm, tokens)
    norm = lm.blocks[1].get_submodule(lm.arch.resid_mid)
    read = x["resid.0"] if lm.arch.parallel else x["resid_mid.1"]
    torch.testing.assert_close(norm(read), x["mlp_in.1"], rtol=0, atol=1e-12)


def test_widths(lm: Any, tokens: Tensor) -> None:
    x = full_run(lm, tokens)
    assert {site: value.shape[-1] for site, value in x.items()} == {site: lm.width(site) for site in x}


def test_attention_agrees_with_that_of_transformers(lm: Any, tokens: Tensor) -> None:
    """The eager functions take the softmax in float32, hence the tolerance (and no padding that is all masked)."""
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 7:] = False
    ours = run(lm, tokens, mask).last
    lm.hf.set_attn_implementation("eager")
    theirs = run(lm, tokens, mask).last
    lm.hf.set_attn_implementation("circuitflow")
    assert ours is not None
    assert theirs is not None
    torch.testing.assert_close(ours[mask], theirs[mask], rtol=1e-5, atol=1e-5)


def test_arithmetic_is_truly_double(lm: Any, tokens: Tensor) -> None:
    """A float32 cast anywhere would make the smallest steps vanish or leave noise of 1e-7."""
    mask = torch.ones_like(tokens, dtype=torch.bool)
    x = run(lm, tokens, mask, stop_at="embed", capture=["embed"]).sites["embed"]
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)

    def last(step: float) -> Tensor:
        value = run(lm, tokens, mask, start=("embed", x + step * direction)).last
        assert value is not None
        return lm.unembed(value)

    small, large = ((last(step) - last(-step)) / (2 * step) for step in (1e-6, 1e-5))
    torch.testing.assert_close(small, large, rtol=1e-6, atol=1e-7 * large.abs().max().item())


def test_strong_caps_matter(random_lm: Callable[..., Any], tokens: Tensor) -> None:
    capped, free = (
        full_run(random_lm("gemma2", **CASES[case][1]), tokens) for case in ("gemma2_strong_caps", "gemma2")
    )
    assert (capped["attn.0"] - free["attn.0"]).abs().max() > 1e-3


def test_short_windows_matter(random_lm: Callable[..., Any], tokens: Tensor) -> None:
    windowed, free = (
        full_run(random_lm("gemma2", **CASES[c][1]), tokens) for c in ("gemma2_short_window", "gemma2")
    )
    difference = (windowed["attn.0"] - free["attn.0"]).abs().amax(dim=(0, 2))
    assert (difference[:3] < 1e-12).all()
    assert (difference[3:] > 1e-6).all()


def test_unknown_architecture_lists_the_known() -> None:
    with pytest.raises(
        UserError, match=r"'gptj' is not supported \(.*llama, gpt2, gpt_neox.*model.architecture"
    ):
        architecture_of(SimpleNamespace(model_type="gptj"))


def test_architecture_chosen_by_hand() -> None:
    assert architecture_of(SimpleNamespace(model_type="mistral"), "llama") == ARCHITECTURES["llama"]


def test_sites_a_model_does_not_have(random_lm: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"'mlp.2' is beyond .* 2 layers.*'mlp.1'"):
        random_lm("llama").check_site("mlp.2")
    with pytest.raises(UserError, match=r"'resid_mid.1' does not exist .* 'resid.1', 'attn.1' or 'mlp.1'"):
        random_lm("gpt_neox").check_site("resid_mid.1")
    check_site(parse_site("resid_mid.1"), random_lm("gpt_neox", use_parallel_residual=False).arch, 2)


def test_width_of_z_from_a_configuration_without_head_dim() -> None:
    config = SimpleNamespace(hidden_size=64, num_attention_heads=8, head_dim=None)
    assert site_width(parse_site("z.0"), config) == 64
    assert (
        site_width(parse_site("z.0"), SimpleNamespace(hidden_size=64, num_attention_heads=8, head_dim=16))
        == 128
    )
