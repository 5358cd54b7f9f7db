"""The frozen model of one prompt: its written-out backward is the true model's, with patterns and scales held."""

from copy import deepcopy

import pytest
import torch

from circuitflow.errors import UserError
from circuitflow.models.architectures import ARCHITECTURES
from circuitflow.models.attention import ATTENTION
from circuitflow.models.attention_weights import frozen_norm, norms
from circuitflow.models.frozen import FrozenPrompt
from circuitflow.models.linear import LINEAR, linearised
from circuitflow.models.running import run

CASES = [
    *((architecture, ()) for architecture in ARCHITECTURES),
    ("gpt_neox", (("use_parallel_residual", False),)),
    ("gemma2", (("sliding_window", 3),)),
]
TOKENS = torch.tensor([3, 17, 9, 40, 11, 25, 8, 31])  # more than d_head, so that patterns are read in blocks


@pytest.fixture(params=CASES, ids=str)
def held(request, random_lm):
    architecture, settings = request.param
    lm = random_lm(architecture, **dict(settings))
    extra = ["resid.0", "resid.1", "attn.0", "attn.1", *(() if lm.arch.parallel else ("resid_mid.1",))]
    return lm, FrozenPrompt.of(lm, TOKENS, capture=extra)


def some_gradient(frozen, batch=2):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, frozen.n_pos, frozen.embed.shape[1])
    return torch.randn(shape, generator=generator, dtype=frozen.dtype)


def test_attention_is_its_linear_part_and_its_constant(held):
    lm, frozen = held
    for layer, stream in enumerate((frozen.embed, frozen.sites["resid.0"])):
        G = some_gradient(frozen)
        whole = (frozen.pull_attention(layer, G) * stream).sum((1, 2))
        if (constant := frozen.layers[layer].constant) is not None:
            whole += (G * constant).sum((1, 2))
        assert torch.allclose(whole, (G * frozen.sites[f"attn.{layer}"]).sum((1, 2)), rtol=1e-10)
    assert lm.hf.config._attn_implementation == ATTENTION


def test_pulling_back_is_the_gradient_of_the_linearised_model(held):
    lm, frozen = held
    G = some_gradient(frozen, batch=1)
    with linearised(lm, LINEAR):
        this = run(
            lm, TOKENS[None], torch.ones(1, 8, dtype=torch.bool), grad=True, capture=["embed", "attn.0"]
        )
    (expected,) = torch.autograd.grad(this.sites["attn.0"], this.sites["embed"], G)
    assert torch.allclose(frozen.pull_attention(0, G), expected, atol=1e-12)


def test_heads_add_up_to_the_whole_and_differ(held):
    _, frozen = held
    G = some_gradient(frozen)
    single = [frozen.pull_attention(1, G, heads=[head]) for head in range(frozen.layers[1].heads)]
    whole = frozen.pull_attention(1, G)
    assert torch.allclose(sum(single), whole, atol=1e-11)
    assert torch.allclose(single[0] + single[2], frozen.pull_attention(1, G, heads=[0, 2]), atol=1e-11)
    assert not torch.allclose(single[0], single[1])


def test_what_an_mlp_reads_is_linear_in_the_stream(held):
    _, frozen = held
    stream = frozen.sites["resid.0" if frozen.parallel else "resid_mid.1"]
    rows = some_gradient(frozen)[0]
    positions = torch.tensor([4, 0, 7, 1, 1, 2, 3, 5])
    found = (frozen.mlp_input(1, positions, rows) * stream[positions]).sum(1)
    if (bias := frozen.layers[1].mlp_norm.bias) is not None:
        found += rows @ bias
    assert torch.allclose(found, (rows * frozen.sites["mlp_in.1"][positions]).sum(1), rtol=1e-10)


def test_logits_are_linear_in_the_last_stream(held):
    lm, frozen = held
    some = torch.tensor([5, 30, 2])
    rows = frozen.logit_rows(some)
    found = frozen.final(rows) @ frozen.sites["resid.1"][-1] + frozen.logit_biases(some)
    if frozen.final_norm.bias is not None:
        found += rows @ frozen.final_norm.bias
    cap = lm._softcap
    logits = frozen.logits if cap is None else cap * torch.atanh(frozen.logits / cap)
    assert torch.allclose(found, logits[some] - logits.mean(), rtol=1e-9)


def test_float32_agrees_with_float64(random_lm):
    exact = FrozenPrompt.of(random_lm("gemma3_text"), TOKENS)
    single = FrozenPrompt.of(random_lm("gemma3_text", dtype="float32"), TOKENS)
    G = some_gradient(exact)
    found = single.pull_attention(1, G.float())
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), exact.pull_attention(1, G), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("architecture", "added"), [("llama", 0.0), ("gemma2", 1.0), ("gemma3_text", 1.0)])
def test_norms_of_bfloat16_models_keep_their_weights(random_lm, architecture, added):
    """Gemma multiplies by 1 + weight in float32."""
    norm = deepcopy(norms(random_lm(architecture, dtype="bfloat16"), 0).before_mlp)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.01, 0.3, 16))
        found = frozen_norm(norm, torch.randn(3, 16), torch.float32)
    assert found.weight.dtype == torch.float32
    assert torch.allclose(found.weight, norm.weight.float() + added, rtol=1e-5)


def test_an_empty_prompt_is_refused(random_lm):
    with pytest.raises(UserError, match="no token"):
        FrozenPrompt.of(random_lm("llama"), torch.tensor([], dtype=torch.int64))
