"""Changed backward rules: values stay, derivatives follow the rule, and the fully frozen model is affine."""

import pytest
import torch

from circuitflow.models.architectures import ARCHITECTURES
from circuitflow.models.linear import LINEAR, RELP, Rules, linearised
from circuitflow.models.running import run
from tests.fixtures.attribution_toy import toy_pairs

CASES = [
    *((architecture, ()) for architecture in ARCHITECTURES),
    ("gpt_neox", (("use_parallel_residual", False),)),
]


def lm_of(random_lm, case):
    architecture, settings = case
    return random_lm(architecture, **dict(settings))


def end_of(lm, pairs, **options):
    """The unembedding's input (after the final norm) at the answer, summed with fixed weights: one number per pair."""
    this = run(lm, pairs.clean, pairs.mask, grad=True, **options)
    rows = this.last[torch.arange(len(pairs)), pairs.position]
    weights = torch.linspace(-1, 1, rows.shape[1], dtype=rows.dtype)
    with torch.enable_grad():
        return this, lm._final_norm(rows) @ weights


def every_rule():
    return [
        RELP,
        LINEAR,
        Rules(attention="half"),
        Rules(norms="frozen"),
        Rules(activations="frozen"),
        Rules(products="half"),
    ]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_stay_and_the_model_is_left_as_it_was(random_lm, case):
    lm, pairs = lm_of(random_lm, case), toy_pairs()
    this, plain = end_of(lm, pairs, capture=["embed"], stop_at="resid.1")
    (expected,) = torch.autograd.grad(plain.sum(), this.sites["embed"])
    for rules in every_rule():
        with linearised(lm, rules):
            assert torch.equal(end_of(lm, pairs)[1], plain)
    this, plain = end_of(lm, pairs, capture=["embed"], stop_at="resid.1")
    assert torch.equal(torch.autograd.grad(plain.sum(), this.sites["embed"])[0], expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_frozen_model_is_affine(random_lm, case):
    """Its second derivative is 0, and gradient × input plus every bias's gradient × bias is its output."""
    lm, pairs = lm_of(random_lm, case), toy_pairs()
    biases = [value for name, value in lm.hf.named_parameters() if name.endswith("bias")]
    for bias in biases:
        bias.requires_grad_(True)
    try:
        with linearised(lm, LINEAR):
            this, value = end_of(lm, pairs, capture=["embed"], stop_at="resid.1")
        x = this.sites["embed"]
        first = torch.autograd.grad(value.sum(), [x, *biases], create_graph=True, allow_unused=True)
    finally:
        for bias in biases:
            bias.requires_grad_(False)
    total = (first[0] * x).sum() + sum(
        (g * b).sum() for g, b in zip(first[1:], biases, strict=True) if g is not None
    )
    assert torch.isclose(total, value.sum(), rtol=1e-10)
    assert not first[0].requires_grad or not _second(first[0], x).any()


def _second(gradient, x):
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype)
    (second,) = torch.autograd.grad(gradient, x, direction, allow_unused=True)
    return torch.zeros(()) if second is None else second


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("rule", ["norms", "activations", "products", "attention"])
def test_each_rule_changes_the_derivative_where_it_applies(random_lm, case, rule):
    lm, pairs = lm_of(random_lm, case), toy_pairs()
    gradients = []
    for rules in (Rules(), Rules(**{rule: "half" if rule == "products" else "frozen"})):
        with linearised(lm, rules):
            this, value = end_of(lm, pairs, capture=["embed"], stop_at="resid.1")
        gradients.append(torch.autograd.grad(value.sum(), this.sites["embed"])[0])
    plain = rule == "products" and case[0] in ("gpt2", "gpt_neox")
    assert torch.allclose(*gradients) == plain


def test_frozen_norms_are_finite_differences_of_a_model_with_its_scales_held(random_lm):
    """For the final norm alone, worked out by hand."""
    lm, pairs = random_lm("llama"), toy_pairs()
    with linearised(lm, Rules(norms="frozen")):
        this, value = end_of(lm, pairs, capture=["resid.1"])
    (gradient,) = torch.autograd.grad(value.sum(), this.sites["resid.1"])
    x = this.sites["resid.1"].detach()
    scale = (x.square().mean(-1, keepdim=True) + lm._final_norm.variance_epsilon).rsqrt()
    expected = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype) * lm._final_norm.weight * scale
    read = torch.arange(x.shape[1]) == pairs.position[:, None]
    assert torch.allclose(gradient, expected * read[..., None], atol=1e-14)


def test_half_attention_passes_half_to_patterns_and_half_to_values(random_lm):
    lm, pairs = random_lm("llama"), toy_pairs()
    found = {}
    for name in ("free", "frozen", "half"):
        with linearised(lm, Rules(attention=name)):
            this = run(lm, pairs.clean, pairs.mask, grad=True, capture=["embed", "z.0"])
        total = this.sites["z.0"].square().sum()
        found[name] = torch.autograd.grad(total, this.sites["embed"])[0]
    # free = through patterns + through values; frozen = through values; half = half of both
    assert torch.allclose(found["half"], found["free"] / 2, atol=1e-12)
    assert not torch.allclose(found["frozen"], found["free"])


def test_a_rule_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="rule norms is 'half'; expected free or frozen"):
        Rules(norms="half")
