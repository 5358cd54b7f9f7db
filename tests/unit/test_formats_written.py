"""sparsify, circuit-tracer, decoders and our own files read by hand; what is written, and what cannot be."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from circuitflow.config_dictionaries import Format
from circuitflow.dictionaries.dictionary import Dictionary, Skip, save_dictionary
from circuitflow.dictionaries.formats.places import locate
from circuitflow.dictionaries.formats.registry import READERS, WRITERS, read_dictionary, write_dictionary
from circuitflow.errors import UserError
from tests.fixtures.exchange import dictionary_of

X = torch.tensor([[3.0, 2.0]])
ENC = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
B_ENC = torch.tensor([0.0, -1.0, 0.5])
DEC = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
B_DEC = torch.tensor([1.0, 0.0])
SKIP = torch.tensor([[0.0, 1.0], [2.0, 0.0]])  # W_skip·x = (2, 6)
CODER = {"encoder.weight": ENC, "encoder.bias": B_ENC, "W_dec": DEC, "b_dec": B_DEC}
LAYER = {"W_enc": ENC, "b_enc": B_ENC, "W_dec": DEC, "b_dec": B_DEC}
FORMATS = ["sae_lens", "sparsify"]  # of circuit_tracer, which holds transcoders: test_circuit_tracer_sets.py


def check(dictionary: Dictionary, features: list[float], reconstruction: list[float]) -> None:
    codes = dictionary.encode(X, torch.ones(1, dtype=torch.int64))
    torch.testing.assert_close(codes.dense(), torch.tensor([features], dtype=torch.float32))
    torch.testing.assert_close(
        dictionary.decode(codes, X), torch.tensor([reconstruction], dtype=torch.float32)
    )


def load(name: str, path: Path, site: str | None = None) -> Dictionary:
    return read_dictionary(name, locate(name, path, site), site)


def same_codes(left: Dictionary, right: Dictionary) -> None:
    x, positions = (
        torch.randn(30, left.d_in, generator=torch.Generator().manual_seed(2)),
        torch.ones(30).long(),
    )
    codes = [dictionary.encode(x, positions) for dictionary in (left, right)]
    assert codes[0].nnz > 30
    torch.testing.assert_close(codes[0].dense(), codes[1].dense())
    torch.testing.assert_close(left.decode(codes[0], x), right.decode(codes[1], x))


# sparsify


def sparsify(folder: Path, tensors: dict[str, torch.Tensor] = CODER, **cfg: Any) -> Path:
    folder.mkdir(parents=True)
    values = {"expansion_factor": 2, "normalize_decoder": True, "num_latents": 3, "k": 1, "d_in": 2} | cfg
    (folder / "cfg.json").write_text(json.dumps(values))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "sae.safetensors")
    return folder


@pytest.mark.parametrize(
    ("hookpoint", "cfg", "more", "sites", "features", "reconstruction"),
    [
        ("layers.5", {}, {}, ("resid.5", "resid.5"), [0, 0, 6.5], [7.5, 6.5]),
        ("h.5", {"k": 2}, {}, ("resid.5", "resid.5"), [2, 0, 6.5], [9.5, 6.5]),
        ("layers.5.mlp", {}, {}, ("mlp.5", "mlp.5"), [0, 0, 6.5], [7.5, 6.5]),
        ("layers.5.self_attn", {}, {}, ("attn.5", "attn.5"), [0, 0, 6.5], [7.5, 6.5]),
        ("layers.5.mlp", {"transcode": True}, {}, ("mlp_in.5", "mlp.5"), [0, 0, 8.5], [9.5, 8.5]),
        (
            "layers.5.mlp",
            {"transcode": True, "skip_connection": True},
            {"W_skip": SKIP},
            ("mlp_in.5", "mlp.5"),
            [0, 0, 8.5],
            [11.5, 14.5],
        ),
    ],
)
def test_sparsify(
    tmp_path: Path,
    hookpoint: str,
    cfg: dict[str, Any],
    more: dict[str, torch.Tensor],
    sites: tuple[str, str],
    features: list[float],
    reconstruction: list[float],
) -> None:
    dictionary = load("sparsify", sparsify(tmp_path / hookpoint, CODER | more, **cfg))
    assert (dictionary.reads, dictionary.writes) == tuple((site,) for site in sites)
    check(dictionary, features, reconstruction)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"activation": "groupmax"}, "activation 'groupmax'; only 'topk' can be imported"),
        ({"signed": True}, "has signed features"),
        ({"k": "1"}, "has k = '1' in its settings"),
        ({"d_in": 3}, r"encoder.weight has shape \(3, 2\), expected \(d_dict, d_in 3\)"),
        ({"skip_connection": True}, "has no tensor W_skip"),
    ],
)
def test_sparsify_refusals(tmp_path: Path, cfg: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load("sparsify", sparsify(tmp_path / "layers.5", **cfg))


def test_settings_that_are_no_json_object(tmp_path: Path) -> None:
    folder = sparsify(tmp_path / "layers.5")
    for text, message in (("{", "is not valid JSON"), ("[]", "holds no JSON object")):
        (folder / "cfg.json").write_text(text)
        with pytest.raises(UserError, match=message):
            load("sparsify", folder)


# circuit-tracer


def transcoder(folder: Path, tensors: dict[str, torch.Tensor], layer: int = 4, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, folder / f"layer_{layer}.safetensors"
    )
    if config:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / f"layer_{layer}.safetensors"


@pytest.mark.parametrize(
    ("more", "features", "reconstruction"),
    [
        ({}, [3, 1, 8.5], [12.5, 9.5]),
        ({"activation_function.threshold": torch.tensor([3.0, 0.5, 8.0])}, [0, 1, 8.5], [9.5, 9.5]),
        ({"activation_function.threshold": torch.full((3,), 9.0), "W_skip": SKIP}, [0, 0, 0], [3, 6]),
        ({"k": torch.tensor(1)}, [0, 0, 8.5], [9.5, 8.5]),
    ],
)
def test_circuit_tracer(
    tmp_path: Path, more: dict[str, torch.Tensor], features: list[float], reconstruction: list[float]
) -> None:
    dictionary = load("circuit_tracer", transcoder(tmp_path, LAYER | more), "mlp_in.4")
    assert (dictionary.reads, dictionary.writes) == (("mlp_in.4",), ("mlp.4",))
    check(dictionary, features, reconstruction)


def test_a_jump_below_zero_keeps_negative_values(tmp_path: Path) -> None:
    tensors = LAYER | {
        "b_enc": torch.tensor([-4.0, 0, 0]),
        "activation_function.threshold": torch.full((3,), -2.0),
    }
    check(load("circuit_tracer", transcoder(tmp_path, tensors)), [-1, 2, 8], [8, 10])


def test_circuit_tracer_hooks(tmp_path: Path) -> None:
    hooks = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    found = load("circuit_tracer", transcoder(tmp_path, LAYER, **hooks))
    assert (found.reads, found.writes) == (("resid_mid.4",), ("mlp.4",))
    with pytest.raises(UserError, match=r"was made for resid_mid.4, not for mlp_in.4"):
        load("circuit_tracer", tmp_path, "mlp_in.4")
    file = transcoder(tmp_path, LAYER, **(hooks | {"feature_input_hook": "ln2.hook_normalized"}))
    with pytest.raises(UserError, match=r"reads blocks.4.ln2.hook_normalized, which is no site here"):
        load("circuit_tracer", file)
    for text, message in (("a: b: c", "is not valid YAML"), ("- 1", "holds no mapping of keys")):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            load("circuit_tracer", file)


def test_the_layer_of_the_site_chooses_the_file(tmp_path: Path) -> None:
    for layer in (3, 4):
        transcoder(tmp_path, LAYER | {"b_dec": torch.full((2,), float(layer))}, layer)
    assert load("circuit_tracer", tmp_path, "mlp_in.3").b_dec[0] == 3
    with pytest.raises(
        UserError, match=r"2 dictionaries of format circuit_tracer are in .*; name one; valid: layer_3"
    ):
        load("circuit_tracer", tmp_path, "mlp_in.5")
    with pytest.raises(UserError, match=r"was made for mlp_in.4, not for mlp_in.5"):
        load("circuit_tracer", tmp_path / "layer_4.safetensors", "mlp_in.5")


def test_a_cross_layer_transcoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a cross-layer transcoder"):
        load("circuit_tracer", transcoder(tmp_path, {"W_enc_4": ENC}))


# Decoders


@pytest.mark.parametrize("name", ["layer_2.pt", "tensor.pt", "layer_2.safetensors", "layer_2.npy"])
def test_a_bare_decoder_is_read_and_encodes_nothing(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "layer_2.npy":
        np.save(path, DEC.numpy())
    elif name == "layer_2.safetensors":
        save_file({"W_dec": DEC, "b_dec": B_DEC, "W_enc": ENC}, path)
    else:
        torch.save(DEC.double() if name == "tensor.pt" else {"W_dec": DEC, "b_dec": B_DEC}, path)
    dictionary = load("decoder", path, "resid.2")
    torch.testing.assert_close(dictionary.W_dec, DEC)
    assert torch.equal(dictionary.b_dec, torch.zeros(2) if name in ("tensor.pt", "layer_2.npy") else B_DEC)
    with pytest.raises(UserError, match=r"'pretrained' at resid.2 has no encoder"):
        dictionary.encode(X, torch.ones(1).long())


def test_decoder_refusals(tmp_path: Path) -> None:
    save_file({"decoder": DEC}, tmp_path / "named.safetensors")
    with pytest.raises(UserError, match=r"has no tensor W_dec \(it has decoder\); rename"):
        load("decoder", tmp_path / "named.safetensors", "resid.2")
    torch.save(torch.zeros(3), tmp_path / "flat.pt")
    with pytest.raises(UserError, match=r"has shape \(3,\), expected \(d_dict, d_model\)"):
        load("decoder", tmp_path / "flat.pt", "resid.2")
    torch.save(DEC, tmp_path / "layer_5.pt")
    with pytest.raises(UserError, match=r"was made for layer 5, not for resid.2"):
        load("decoder", tmp_path / "layer_5.pt", "resid.2")
    with pytest.raises(UserError, match="was made for layer 5 and does not tell its site"):
        load("decoder", tmp_path / "layer_5.pt")
    (tmp_path / "text.npy").write_text("no")
    with pytest.raises(UserError, match="cannot be read as plain NumPy arrays"):
        load("decoder", tmp_path / "text.npy", "resid.2")
    torch.save([DEC], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds a list where a tensor was expected"):
        load("decoder", tmp_path / "list.pt", "resid.2")


# Our own


def test_our_own_dictionaries_keep_their_rule(tmp_path: Path) -> None:
    saved = replace(dictionary_of("topk"), skip=Skip((0,), 3.0))
    save_dictionary(tmp_path / "one.safetensors", saved)
    loaded = load("circuitflow", tmp_path / "one.safetensors")
    assert (loaded.kind, loaded.skip, loaded.settings) == ("topk", Skip((0,), 3.0), {"k": 5})
    with pytest.raises(UserError, match=r"was made for resid.2, not for resid.3"):
        load("circuitflow", tmp_path / "one.safetensors", "resid.3")


# Writing


@pytest.mark.parametrize("name", ["circuitflow", *FORMATS])
def test_what_is_written_is_read_again(tmp_path: Path, name: str) -> None:
    dictionary = replace(dictionary_of("topk"), skip=Skip((0,), 3.0))
    path = tmp_path / ("d.safetensors" if name == "circuitflow" else "d")
    write_dictionary(name, path, dictionary)
    again = load(name, path, "resid.2")
    same_codes(replace(again, skip=Skip()), replace(dictionary, skip=Skip()))


@pytest.mark.parametrize("sites", [("resid.2", "resid.2"), ("mlp_in.2", "mlp.2")])
@pytest.mark.parametrize("folder", ["d", "layers.5"])
def test_sparsify_folders_that_we_wrote_tell_their_sites(
    tmp_path: Path, sites: tuple[str, str], folder: str
) -> None:
    reads, writes = sites
    write_dictionary(
        "sparsify", tmp_path / folder, replace(dictionary_of("topk"), reads=(reads,), writes=(writes,))
    )
    again = load("sparsify", tmp_path / folder)
    assert (again.reads, again.writes) == ((reads,), (writes,))


@pytest.mark.parametrize("name", FORMATS)
def test_equal_dictionaries_give_equal_bytes_and_tell_their_rule(tmp_path: Path, name: str) -> None:
    dictionary = replace(dictionary_of("topk"), skip=Skip((0,), 3.0), notes={"step": 7})
    for folder in ("a", "b"):
        write_dictionary(name, tmp_path / folder, dictionary)
    files = [sorted((tmp_path / folder).iterdir()) for folder in ("a", "b")]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
    cfg = json.loads((tmp_path / "a" / "cfg.json").read_text())
    told = cfg.get("metadata", cfg)["circuitflow"]
    assert told["skip"] == {"positions": [0], "max_norm": 3.0}
    assert (told["kind"], told["reads"], told["notes"]) == ("topk", ["resid.2"], {"step": 7})


def test_sparsify_takes_the_offset_off_its_input(tmp_path: Path) -> None:
    """Its encoder sees x − b_dec, so the bias that is written makes up for that."""
    at = ("resid.2",)
    dictionary = Dictionary("topk", at, at, "topk", ENC, B_ENC, DEC, B_DEC, settings={"k": 1})
    write_dictionary("sparsify", tmp_path / "layers.2", dictionary)
    written = load_file(tmp_path / "layers.2" / "sae.safetensors")
    assert written["encoder.bias"].tolist() == [1.0, -1.0, 2.5]  # B_ENC + ENC @ (1, 0)


@pytest.mark.parametrize(
    ("name", "dictionary", "message"),
    [
        (
            "sparsify",
            dictionary_of("threshold"),
            r"TopK dictionaries only, .*'threshold'; write it as sae_lens",
        ),
        (
            "sparsify",
            dictionary_of("topk", d_out=7),
            "reads 12 and writes 7; write it as sae_lens or circuitflow",
        ),
        (
            "sae_lens",
            dictionary_of("topk", d_out=12),
            r"no transcoder that selects .* 'topk'; write it as sparsify",
        ),
        (
            "sae_lens",
            dictionary_of("topk", d_out=7),
            r"no transcoder that selects .* 'topk'; write it as circuitflow",
        ),
        (
            "sae_lens",
            dictionary_of("threshold", threshold=-1.0),
            "with negative thresholds; write it as circuitflow",
        ),
        (
            "sae_lens",
            replace(dictionary_of("topk"), select="nonzero"),
            "by the rule 'nonzero'; write it as circuitf",
        ),
        (
            "gemma_scope",
            dictionary_of("topk"),
            "can be read but not written; valid: circuitflow, sae_lens, sparsify",
        ),
        ("saelens", dictionary_of("topk"), "Format 'saelens' is unknown; did you mean 'sae_lens'"),
    ],
)
def test_what_a_format_cannot_hold(tmp_path: Path, name: str, dictionary: Dictionary, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_dictionary(name, tmp_path / "d", dictionary)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("name", FORMATS)
def test_no_other_format_holds_a_decoder_alone_or_several_sites(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="needs an encoder, and this dictionary is a decoder alone"):
        write_dictionary(name, tmp_path / "d", replace(dictionary_of("topk"), W_enc=None))
    with pytest.raises(
        UserError, match=r"one reads resid.2 and writes mlp.2, mlp.3; write it as circuitflow"
    ):
        write_dictionary(name, tmp_path / "d", replace(dictionary_of("topk"), writes=("mlp.2", "mlp.3")))


@pytest.mark.parametrize("name", FORMATS)
def test_a_folder_in_use_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "kept").touch()
    with pytest.raises(UserError, match="is in use; name a folder"):
        write_dictionary(name, tmp_path, dictionary_of("topk"))


def test_an_unknown_format() -> None:
    with pytest.raises(UserError, match=r"Format 'gemma' is unknown; .*valid: .*gemma_scope.*decoder"):
        locate("gemma", Path())
    assert {"circuitflow", "circuit_tracer", *FORMATS} == set(WRITERS) < set(READERS) == set(get_args(Format))
