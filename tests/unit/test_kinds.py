"""Kinds of dictionary: the settings they take and refuse, what is made without training, where training starts."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from circuitflow.dictionaries.batchtopk import BatchTopK
from circuitflow.dictionaries.dictionary import NO_SKIP, Skip
from circuitflow.dictionaries.gradients import pre_activations
from circuitflow.dictionaries.jumprelu import JumpReLU
from circuitflow.dictionaries.kinds import MADE, TRAINED, Data, Request, check_request
from circuitflow.dictionaries.selection import SELECTIONS, selection
from circuitflow.dictionaries.settings import USED, Settings, used_settings
from circuitflow.dictionaries.topk import TopK
from circuitflow.dictionaries.trainer import first_weights
from circuitflow.errors import UserError

DATA = Data(torch.arange(6.0), Skip((0,), 50.0))
EVERY = {
    "d_dict": 10, "k": 2, "seed": 0, "penalty": None, "target_l0": None, "bandwidth": None, "first_threshold": None,
    "prefixes": [0.5, 1.0], "source": None,
    "training": {
        "epochs": 2.0, "auxk_weight": 0.5, "auxk": None, "k_start": 8, "k_anneal": 0.5, "sparsity_warmup": 0.1,
    },
}  # fmt: skip
"""Values of every key of the section, as a configuration has them."""


def request(kind: str, d_model: int = 6, training: dict[str, Any] | None = None, **changes: Any) -> Request:
    values = {**EVERY, "kind": kind, **changes}
    values["training"] = {**EVERY["training"], **(training or {})}
    return Request("resid.1", d_model, Settings.of(used_settings(values)))


def test_every_kind_can_be_asked_for_and_ends_in_a_selection_rule():
    assert {*TRAINED, *MADE, "pretrained"} == set(USED)
    for kind, make in TRAINED.items():
        check_request(request(kind))
        assert make(request(kind)).select in SELECTIONS
    for kind, make in MADE.items():
        check_request(request(kind))
        assert make(request(kind), DATA).select in SELECTIONS


def test_only_the_settings_of_a_kind_reach_it():
    used = used_settings({**EVERY, "kind": "gated"})
    assert set(used) == {"kind", "d_dict", "seed", "penalty", "training"}
    assert used["training"] == {"epochs": 2.0, "sparsity_warmup": 0.1}
    assert set(used_settings({**EVERY, "kind": "matryoshka"})["training"]) == set(EVERY["training"]) - {
        "sparsity_warmup"
    }
    with pytest.raises(UserError, match="did you mean 'jumprelu'"):
        used_settings({**EVERY, "kind": "jumprelus"})


def test_settings_become_objectives():
    topk = TRAINED["topk"](request("topk"))
    assert isinstance(topk, TopK)
    assert (topk.k, topk.k_start, topk.k_anneal, topk.aux.k, topk.aux.weight) == (2, 8, 0.5, 3, 0.5)
    batch = TRAINED["batchtopk"](request("batchtopk", training={"auxk": 5}))
    assert isinstance(batch, BatchTopK)
    assert (batch.k, batch.shares, batch.k_start, batch.aux.k) == (2, (1.0,), 8, 5)
    nested = TRAINED["matryoshka"](request("matryoshka"))
    assert nested == replace(batch, shares=(0.5, 1.0), aux=topk.aux)
    own = {"penalty": 0.7, "target_l0": 4.0, "bandwidth": 0.3, "first_threshold": 0.2}
    assert TRAINED["jumprelu"](request("jumprelu", **own)) == JumpReLU(0.7, 0.3, 0.2, 4.0)
    for kind in ("relu", "gated"):
        assert TRAINED[kind](request(kind, penalty=0.7)).penalty == 0.7


def test_kinds_have_learning_rates_of_their_own():
    def rate(kind: str, **training: Any) -> float:
        return request(kind, training=training).settings.training.learning_rate

    assert rate("gated") == rate("relu", learning_rate=None) == 5e-3
    assert rate("topk") == rate("jumprelu", learning_rate=None) == 2.5e-3
    assert rate("gated", learning_rate=1e-3) == 1e-3


def test_the_topk_family_is_clipped_unless_told_otherwise():
    def clip(kind: str, **training: Any) -> float | None:
        return request(kind, training=training).settings.training.clip_norm

    assert clip("topk") == clip("batchtopk") == clip("matryoshka", clip_norm=None) == 0.01
    assert clip("relu") is None
    assert clip("topk", clip_norm=0) is None
    assert clip("gated", clip_norm=0.5) == 0.5


def test_a_penalty_that_aims_at_an_l0_has_a_default_of_its_own():
    plain, aiming = (TRAINED["jumprelu"](request("jumprelu", target_l0=target)) for target in (None, 4.0))
    assert aiming.penalty > 100 * plain.penalty


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "gated"])
@pytest.mark.parametrize(("d_model", "d_dict"), [(64, 512), (400, 3200)])
def test_thresholds_and_biases_start_with_about_32_active_features(kind, d_model, d_dict):
    objective = TRAINED[kind](request(kind, d_model=d_model, d_dict=d_dict))
    weights = first_weights(objective, d_model, d_dict, seed=0)
    x = torch.randn(200, d_model, generator=torch.Generator().manual_seed(1)) / d_model**0.5
    done = objective.finish(weights)
    codes = selection(objective.select)(pre_activations(done.weights, x), done.settings, done.extra)
    assert 24 < codes.nnz / 200 < 40


def test_identity_is_exact_everywhere():
    dictionary = MADE["identity"](request("identity"), DATA)
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    x[2, 3] = 0.0
    x[4] *= 1e6
    codes = dictionary.encode(x, torch.arange(9) % 3)
    assert torch.equal(codes.dense(), x)
    assert codes.nnz == 9 * 6 - 1
    assert torch.equal(dictionary.error(x, codes), torch.zeros_like(x))
    assert dictionary.skip == NO_SKIP


def test_random_has_unit_rows_centred_on_the_data():
    dictionary = MADE["random"](request("random"), DATA)
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(10))
    assert dictionary.W_enc is not None
    assert torch.equal(dictionary.W_enc, dictionary.W_dec)
    assert dictionary.skip == DATA.skip
    along = DATA.mean + 2 * dictionary.W_dec[4]
    codes = dictionary.encode(along[None], torch.tensor([1]))
    assert codes.columns(torch.tensor([4])).item() == pytest.approx(2.0, abs=1e-5)
    assert torch.equal(MADE["random"](request("random"), DATA).W_dec, dictionary.W_dec)
    assert not torch.equal(MADE["random"](request("random", seed=1), DATA).W_dec, dictionary.W_dec)


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka", "random"])
def test_impossible_k(kind):
    for k in (0, 11):
        with pytest.raises(UserError, match=f"k is {k}; choose a number from 1 to d_dict, which is 10"):
            check_request(request(kind, k=k))
    if kind != "random":
        for start in (1, 11):
            with pytest.raises(
                UserError, match=f"k_start is {start}; .* from k, which is 2, to d_dict, which is 10"
            ):
                check_request(request(kind, training={"k_start": start}))


@pytest.mark.parametrize("prefixes", [[], [0.0, 1.0], [0.5], [1.0, 0.5], [0.5, 0.5, 1.0], [0.5, 1.0, 2.0]])
def test_impossible_prefixes(prefixes):
    with pytest.raises(UserError, match=r"prefixes is \[.*ascending order, above 0, that end with 1\.0"):
        check_request(request("matryoshka", prefixes=prefixes))


def test_prefixes_of_the_same_number_of_features():
    with pytest.raises(UserError, match="prefixes of 5, 5, 10 features: each needs more than the one before"):
        check_request(request("matryoshka", prefixes=[0.5, 0.52, 1.0]))
    check_request(request("batchtopk", prefixes=[0.5, 0.52, 1.0]))


@pytest.mark.parametrize(
    ("kind", "key"),
    [("relu", "penalty"), ("gated", "penalty"), ("jumprelu", "penalty"), ("jumprelu", "target_l0"),
     ("jumprelu", "bandwidth"), ("jumprelu", "first_threshold")],
)  # fmt: skip
def test_numbers_that_must_be_positive(kind, key):
    for value in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match=f"{key} is {value}; choose a number above 0, or null"):
            check_request(request(kind, **{key: value}))


def test_impossible_target_and_size():
    with pytest.raises(UserError, match=r"target_l0 is 10\.5, more than d_dict, which is 10"):
        check_request(request("jumprelu", target_l0=10.5))
    with pytest.raises(UserError, match="d_dict is 0; choose the number of features"):
        check_request(request("relu", d_dict=0))


def test_unknown_names():
    with pytest.raises(UserError, match="did you mean 'topk'"):
        check_request(Request("resid.1", 6, replace(request("topk").settings, kind="topkk")))
    with pytest.raises(UserError, match="did you mean 'topk'"):
        selection("top_k")
