"""Formats that are only read, and SAELens: files written by hand, features computed by hand, every refusal."""

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.dictionaries.formats.places import locate
from circuitflow.dictionaries.formats.registry import read_dictionary
from circuitflow.errors import UserError

Tensors = dict[str, torch.Tensor]

# Three features in two dimensions; x − b_dec is (2, 2).
X = torch.tensor([[3.0, 2.0]])
ENC = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]])  # a row per feature
B_ENC = torch.tensor([0.0, -1.0, 0.5])
DEC = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
B_DEC = torch.tensor([1.0, 0.0])
SKIP = torch.tensor([[0.0, 1.0], [2.0, 0.0]])  # W_skip·x = (2, 6)
THRESHOLD = torch.tensor([2.0, 0.5, 10.0])
SAE = {"W_enc": ENC.T, "b_enc": B_ENC, "W_dec": DEC, "b_dec": B_DEC}
GATED = {
    "W_enc": ENC.T,
    "W_dec": DEC,
    "b_dec": B_DEC,
    "r_mag": torch.tensor([math.log(2), 0.0, 0.0]),
    "b_gate": torch.tensor([-3.0, 0.0, 0.0]),
    "b_mag": torch.tensor([1.0, -1.0, 0.0]),
}


def contiguous(tensors: Tensors) -> Tensors:
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def check(dictionary: Dictionary, features: list[float], reconstruction: list[float]) -> None:
    codes = dictionary.encode(X, torch.ones(1, dtype=torch.int64))
    torch.testing.assert_close(codes.dense(), torch.tensor([features], dtype=torch.float32))
    torch.testing.assert_close(
        dictionary.decode(codes, X), torch.tensor([reconstruction], dtype=torch.float32)
    )


def load(name: str, path: Path, site: str | None = None) -> Dictionary:
    return read_dictionary(name, locate(name, path, site), site)


# SAELens

META = {"sae_lens_version": "6.2.0", "hook_name": "blocks.3.hook_resid_post"}
PAIR = META | {"hook_name": "blocks.3.mlp.hook_in", "hook_name_out": "blocks.3.hook_mlp_out"}


def sae_lens(folder: Path, tensors: Tensors | None = None, meta: dict[str, Any] = META, **cfg: Any) -> Path:
    folder.mkdir(parents=True)
    values = {"architecture": "standard", "d_in": 2, "d_sae": 3, "dtype": "float32", "metadata": meta} | cfg
    (folder / "cfg.json").write_text(json.dumps(values))
    save_file(contiguous(tensors or SAE), folder / "sae_weights.safetensors")
    return folder


SAE_LENS: dict[str, tuple[dict[str, Any], Tensors, list[float], list[float]]] = {
    "relu": ({}, SAE, [2, 1, 6.5], [9.5, 7.5]),
    "raw input": ({"apply_b_dec_to_input": False}, SAE, [3, 1, 8.5], [12.5, 9.5]),
    "jumprelu": ({"architecture": "jumprelu"}, SAE | {"threshold": THRESHOLD}, [0, 1, 0], [1, 1]),
    "negative threshold": (
        {"architecture": "jumprelu"},
        SAE | {"threshold": -THRESHOLD},
        [2, 1, 6.5],
        [9.5, 7.5],
    ),
    "topk": ({"architecture": "topk", "k": 1}, SAE, [0, 0, 6.5], [7.5, 6.5]),
    "topk by norms": (
        {"architecture": "topk", "k": 1, "rescale_acts_by_decoder_norm": True},
        SAE | {"W_dec": DEC * torch.tensor([[10.0], [1.0], [1.0]])},  # 20 · 1, 1, 6.5 · √2
        [20, 0, 0],
        [21, 0],
    ),
    "gated": ({"architecture": "gated"}, GATED, [0, 1, 6], [7, 7]),
    "batchtopk": (
        {"architecture": "batchtopk", "k": 2},
        SAE | {"topk_threshold": torch.tensor(1.5, dtype=torch.float64)},
        [2, 0, 6.5],
        [9.5, 6.5],
    ),
    "rounded": ({"dtype": "bfloat16"}, SAE | {"b_enc": B_ENC + 1e-4}, [2.0001, 1, 6.5], [9.5001, 7.5]),
    "tuned": ({}, SAE | {"scaling_factor": torch.tensor([1.0, 2.0, 1.0])}, [2, 1, 6.5], [9.5, 8.5]),
    "earlier threshold": (
        {"architecture": "jumprelu"},
        SAE | {"log_threshold": THRESHOLD.log()},
        [0, 1, 0],
        [1, 1],
    ),
}


@pytest.mark.parametrize("case", SAE_LENS)
def test_sae_lens(tmp_path: Path, case: str) -> None:
    cfg, tensors, features, reconstruction = SAE_LENS[case]
    dictionary = load("sae_lens", sae_lens(tmp_path / "sae", tensors, **cfg))
    assert (dictionary.kind, dictionary.reads, dictionary.writes) == (
        "pretrained",
        ("resid.3",),
        ("resid.3",),
    )
    check(dictionary, features, reconstruction)


@pytest.mark.parametrize(
    ("architecture", "more", "features", "reconstruction"),
    [
        ("transcoder", {}, [3, 1, 8.5], [12.5, 9.5]),
        ("skip_transcoder", {"W_skip": SKIP}, [3, 1, 8.5], [14.5, 15.5]),
        ("jumprelu_transcoder", {"threshold": THRESHOLD}, [3, 1, 0], [4, 1]),
        ("jumprelu_skip_transcoder", {"threshold": THRESHOLD, "W_skip": SKIP}, [3, 1, 0], [6, 7]),
    ],
)
def test_sae_lens_transcoders(
    tmp_path: Path, architecture: str, more: Tensors, features: list[float], reconstruction: list[float]
) -> None:
    folder = sae_lens(tmp_path / "sae", SAE | more, PAIR, architecture=architecture, d_out=2)
    dictionary = load("sae_lens", folder)
    assert (dictionary.reads, dictionary.writes) == (("mlp_in.3",), ("mlp.3",))
    check(dictionary, features, reconstruction)


@pytest.mark.parametrize(
    ("keys", "site", "features"),
    [
        ({"hook_point": "blocks.3.hook_resid_pre"}, "resid.2", [2, 1, 6.5]),
        ({"hook_point": "blocks.0.hook_resid_pre", "normalize_activations": False}, "embed", [2, 1, 6.5]),
        ({"hook_name": "blocks.1.attn.hook_z", "apply_b_dec_to_input": False}, "z.1", [3, 1, 8.5]),
        (
            {
                "hook_name": "blocks.1.hook_resid_mid",
                "activation_fn_str": "topk",
                "activation_fn_kwargs": {"k": 1, "signed": False},
            },
            "resid_mid.1",
            [0, 0, 6.5],
        ),
    ],
)
def test_sae_lens_before_version_6(
    tmp_path: Path, keys: dict[str, Any], site: str, features: list[float]
) -> None:
    folder = sae_lens(tmp_path / "sae")
    old = {"d_in": 2, "d_sae": 3, "dtype": "torch.float32", "hook_point_layer": 0, "prepend_bos": True} | keys
    (folder / "cfg.json").write_text(json.dumps(old))
    dictionary = load("sae_lens", folder)
    assert dictionary.reads == (site,)
    codes = dictionary.encode(X, torch.ones(1, dtype=torch.int64))
    torch.testing.assert_close(codes.dense(), torch.tensor([features], dtype=torch.float32))


def test_module_names_tell_the_site_where_hooks_are_vague(tmp_path: Path) -> None:
    """SAELens calls the normed input of Gemma's MLP hook_mlp_in, which in TransformerLens is before the norm."""
    meta = META | {
        "hook_name": "blocks.3.hook_mlp_in",
        "hf_hook_name": "model.layers.3.pre_feedforward_layernorm.output",
        "hook_name_out": "blocks.3.hook_mlp_out",
    }
    assert load("sae_lens", sae_lens(tmp_path / "a", SAE, meta, architecture="transcoder")).reads == (
        "mlp_in.3",
    )
    del meta["hf_hook_name"]
    assert load("sae_lens", sae_lens(tmp_path / "b", SAE, meta, architecture="transcoder")).reads == (
        "resid_mid.3",
    )


@pytest.mark.parametrize(
    ("cfg", "meta", "message"),
    [
        (
            {"architecture": "temporal"},
            META,
            r"architecture 'temporal', which cannot be imported; .*standard",
        ),
        ({"architecture": "jumpreul"}, META, r"did you mean 'jumprelu'"),
        ({"normalize_activations": "layer_norm"}, META, "reads activations standardised token by token"),
        ({"normalize_activations": "constant_norm_rescale"}, META, "scaled to one norm token by token"),
        ({"normalize_activations": "expected_average_only_in"}, META, "fold_activation_norm_scaling_factor"),
        ({"normalize_activations": True}, META, "scaled by a factor that its files do not hold"),
        ({"normalize_activations": "covariance_whitening"}, META, "fold_activation_whitening"),
        ({"normalize_activations": "new"}, META, "activations changed by 'new'"),
        ({"activation_fn": "tanh-relu"}, META, "activation_fn 'tanh-relu'; only relu and topk"),
        (
            {"architecture": "topk", "k": 0},
            META,
            "has k = 0 in its settings; expected a positive whole number",
        ),
        ({"dtype": "int8"}, META, "dtype 'int8' in cfg.json"),
        ({"d_in": 4}, META, r"W_enc has shape \(2, 3\), expected \(d_in 4, d_sae 3\)"),
        ({"architecture": "jumprelu"}, META, "has no tensor threshold; .*valid: W_dec, W_enc"),
        ({}, META | {"hook_head_index": 1}, r"reads one attention head \(1\)"),
        (
            {},
            META | {"hook_name": "blocks.3.ln2.hook_normalized"},
            r"no site here \(the normed stream before",
        ),
        ({}, META | {"hook_name": "blocks.3.mlp.hook_post"}, r"hook_post, which is no site here; choose one"),
        ({}, {}, "cfg.json has no hook_name"),
        ({"architecture": "transcoder"}, META, "cfg.json has no hook_name_out"),
    ],
)
def test_sae_lens_refusals(tmp_path: Path, cfg: dict[str, Any], meta: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load("sae_lens", sae_lens(tmp_path / "sae", None, meta, **cfg))


def test_a_tensor_that_nothing_accounts_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has a tensor W_skip that its format does not account for"):
        load("sae_lens", sae_lens(tmp_path / "sae", SAE | {"W_skip": SKIP}))


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"b_enc holds values that are no numbers \(NaN\)"):
        load("sae_lens", sae_lens(tmp_path / "sae", SAE | {"b_enc": B_ENC * float("nan")}))


def test_the_options_of_the_model_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    meta = META | {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    load("sae_lens", sae_lens(tmp_path / "sae", None, meta))
    assert "trained on a model loaded with center_writing_weights=True" in caplog.text


# Gemma Scope


def gemma_scope(folder: Path, more: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    arrays = {name: tensor.numpy() for name, tensor in SAE.items()} | {"threshold": THRESHOLD.numpy()}
    np.savez(folder / "params.npz", **(arrays | (more or {})))
    return folder


@pytest.mark.parametrize(("kind", "site"), [("res", "resid.12"), ("att", "z.12"), ("mlp", "mlp.12")])
def test_gemma_scope(tmp_path: Path, kind: str, site: str) -> None:
    root = tmp_path / f"gemma-scope-2b-pt-{kind}"
    gemma_scope(root / "layer_12" / "width_16k" / "average_l0_71")
    dictionary = load("gemma_scope", root)
    assert dictionary.reads == dictionary.writes == (site,)
    check(dictionary, [3, 1, 0], [4, 1])  # nothing is taken off the input


def test_gemma_scope_embeddings_are_read_before_scaling(tmp_path: Path) -> None:
    folder = gemma_scope(tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_6")
    dictionary = load("gemma_scope", folder)
    assert dictionary.reads == ("embed",)
    pre = [3 / 2**0.5, 2 / 2**0.5 - 1, 8 / 2**0.5 + 0.5]  # thresholds 2, 0.5, 10
    check(dictionary, [pre[0], 0, 0], [2**0.5 * pre[0] + 1, 0])


def test_gemma_scope_2(tmp_path: Path) -> None:
    folder = tmp_path / "transcoder_all" / "layer_12_width_16k_l0_small_affine"
    folder.mkdir(parents=True)
    tensors = {name.lower(): tensor for name, tensor in SAE.items()} | {"threshold": THRESHOLD}
    save_file(contiguous(tensors | {"affine_skip_connection": SKIP.T}), folder / "params.safetensors")
    dictionary = load("gemma_scope", tmp_path)
    assert (dictionary.reads, dictionary.writes) == (("mlp_in.12",), ("mlp.12",))
    check(dictionary, [3, 1, 0], [6, 7])
    hook = {"hf_hook_point_in": "model.layers.12.self_attn.o_proj.input", "architecture": "jump_relu"}
    (folder / "config.json").write_text(json.dumps(hook))
    assert load("gemma_scope", tmp_path).reads == ("z.12",)


def test_gemma_scope_refusals(tmp_path: Path) -> None:
    first = gemma_scope(tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_1" / "width_16k" / "average_l0_7")
    with pytest.raises(UserError, match=r"before the norm's weight; .*cannot be imported"):
        load("gemma_scope", first, "mlp_in.1")
    with pytest.raises(UserError, match=r"does not tell its site; name it \(one of embed, z.L"):
        load("gemma_scope", gemma_scope(tmp_path / "renamed"))
    named = gemma_scope(tmp_path / "gemma-scope-2b-pt-att" / "layer_4" / "width_16k" / "average_l0_7")
    with pytest.raises(UserError, match=r"was made for z.4, not for resid.4; use it there"):
        load("gemma_scope", named, "resid.4")
    whole = gemma_scope(tmp_path / "clt" / "layer_1", {"W_dec": np.zeros((3, 4, 2), np.float32)})
    with pytest.raises(UserError, match="cross-layer transcoder, which writes several sites"):
        load("gemma_scope", whole, "resid.1")


def test_pickled_arrays_are_not_loaded(tmp_path: Path) -> None:
    objects = np.array([Trap(tmp_path / "ran")], dtype=object)
    folder = gemma_scope(tmp_path / "layer_1", {"threshold": objects})
    with pytest.raises(
        UserError, match=r"cannot be read as plain NumPy arrays \(Object arrays cannot be loaded"
    ):
        load("gemma_scope", folder, "resid.1")
    (folder / "params.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(UserError, match="cannot be read as plain NumPy arrays"):
        load("gemma_scope", folder, "resid.1")
    assert not (tmp_path / "ran").exists()


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


# dictionary_learning

LINEAR = {"encoder.weight": ENC, "encoder.bias": B_ENC, "decoder.weight": DEC.T}
OF_BATCH = LINEAR | {"b_dec": B_DEC, "k": torch.tensor(1), "threshold": torch.tensor(1.5)}


def auto_encoder(folder: Path, tensors: Any, dict_class: str | None, **trainer: Any) -> Path:
    folder.mkdir(parents=True)
    torch.save(tensors, folder / "ae.pt")
    if dict_class is not None:
        config = {
            "trainer": {"dict_class": dict_class, "layer": 3, "submodule_name": "resid_post_layer_3"}
            | trainer
        }
        (folder / "config.json").write_text(json.dumps(config))
    return folder


AUTO_ENCODERS: dict[str, tuple[Tensors, list[float], list[float]]] = {
    # The loader gives decoder rows norm 1: the third feature is larger by √2.
    "AutoEncoder": (LINEAR | {"bias": B_DEC}, [2, 1, 6.5 * 2**0.5], [9.5, 7.5]),
    "AutoEncoderNew": (LINEAR | {"decoder.bias": B_DEC}, [3, 1, 8.5], [12.5, 9.5]),
    "GatedAutoEncoder": (
        {
            "decoder_bias": B_DEC,
            "encoder.weight": ENC,
            "decoder.weight": DEC.T,
            "r_mag": GATED["r_mag"],
            "gate_bias": GATED["b_gate"],
            "mag_bias": GATED["b_mag"],
        },
        [0, 1, 6],
        [7, 7],
    ),
    "JumpReluAutoEncoder": (SAE | {"threshold": THRESHOLD}, [3, 1, 0], [4, 1]),
    "AutoEncoderTopK": (OF_BATCH, [0, 0, 6.5], [7.5, 6.5]),
    "BatchTopKSAE": (OF_BATCH, [2, 0, 6.5], [9.5, 6.5]),
    "MatryoshkaBatchTopKSAE": (
        SAE | {"k": torch.tensor(1), "threshold": torch.tensor(1.5), "group_sizes": torch.tensor([1, 2])},
        [2, 0, 6.5],
        [9.5, 6.5],
    ),
}


@pytest.mark.parametrize("dict_class", AUTO_ENCODERS)
def test_dictionary_learning(tmp_path: Path, dict_class: str) -> None:
    tensors, features, reconstruction = AUTO_ENCODERS[dict_class]
    k = {"k": 1} if "k" in tensors else {}
    dictionary = load("dictionary_learning", auto_encoder(tmp_path / "a", tensors, dict_class, **k))
    assert dictionary.reads == dictionary.writes == ("resid.3",)
    check(dictionary, features, reconstruction)
    alike = dict_class in ("AutoEncoderTopK", "BatchTopKSAE")
    bare = auto_encoder(tmp_path / "mlp_out_layer2", tensors, None)
    if alike:
        with pytest.raises(UserError, match=r"names its class \(trainer.dict_class\)"):
            load("dictionary_learning", bare)
    else:
        found = load("dictionary_learning", bare)
        assert found.reads == ("mlp.2",)
        check(found, features, reconstruction)


def test_dictionary_learning_refusals(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"class AutoEncoderTopQ, which is unknown; did you mean 'AutoEncoderTopK'"
    ):
        load("dictionary_learning", auto_encoder(tmp_path / "a", OF_BATCH, "AutoEncoderTopQ"))
    with pytest.raises(UserError, match=r"k is 1 here and 2 in config.json"):
        load("dictionary_learning", auto_encoder(tmp_path / "b", OF_BATCH, "AutoEncoderTopK", k=2))
    with pytest.raises(UserError, match=r"was made for resid.3, not for resid.4"):
        load("dictionary_learning", auto_encoder(tmp_path / "c", OF_BATCH, "BatchTopKSAE"), "resid.4")
    with pytest.raises(UserError, match=r"holds a int 'k' where a tensor was expected"):
        load("dictionary_learning", auto_encoder(tmp_path / "d", OF_BATCH | {"k": 1}, "BatchTopKSAE"))
    trapped = auto_encoder(tmp_path / "e", {"W_dec": Trap(tmp_path / "ran")}, "BatchTopKSAE")
    with pytest.raises(UserError, match=r"cannot be read as a file of tensors alone \(UnpicklingError\)"):
        load("dictionary_learning", trapped)
    (trapped / "ae.pt").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    with pytest.raises(UserError, match="cannot be read as a file of tensors alone"):
        load("dictionary_learning", trapped)
    assert not (tmp_path / "ran").exists()
