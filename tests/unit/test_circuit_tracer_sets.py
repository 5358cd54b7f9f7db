"""Transcoders of circuit-tracer: what is written is read again, cross-layer ones by hand, and what it cannot hold."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from circuitflow.converting import convert, convert_all
from circuitflow.dictionaries.dictionary import NO_SKIP, Skip, save_dictionary
from circuitflow.dictionaries.family import Family, load_family
from circuitflow.dictionaries.formats.circuit_tracer_sets import read_cross_layer, write_set
from circuitflow.dictionaries.formats.families import detect_family, fetch_family, read_family, write_family
from circuitflow.dictionaries.formats.places import detect, locate
from circuitflow.dictionaries.formats.registry import read_dictionary, write_dictionary
from circuitflow.errors import UserError
from tests.fixtures.exchange import FEATURES as F
from tests.fixtures.exchange import WIDTH as D
from tests.fixtures.exchange import transcoder


def single(count: int = 3, **how: Any) -> Family:
    return Family(tuple(transcoder(layer, **how) for layer in range(count)))


def cross_layer(count: int = 3) -> Family:
    return Family(tuple(transcoder(layer, count) for layer in range(count)))


def topk() -> Family:
    return Family(
        tuple(replace(member, select="topk", settings={"k": 2}, extra={}) for member in single().members)
    )


def same(left: Family, right: Family) -> None:
    """The same features and reconstructions of random vectors."""
    draw = torch.Generator().manual_seed(9)
    x = {site: torch.randn(20, D, generator=draw) for site in left.reads}
    positions = torch.ones(20, dtype=torch.int64)
    codes = [family.encode(x, positions) for family in (left, right)]
    assert sum(code.nnz for code in codes[0]) > 20
    for one, other in zip(*codes, strict=True):
        torch.testing.assert_close(one.dense(), other.dense())
    written = [family.reconstruct(found, x) for family, found in zip((left, right), codes, strict=True)]
    assert list(written[0]) == list(written[1])
    for site in written[0]:
        torch.testing.assert_close(written[0][site], written[1][site])


@pytest.mark.parametrize(
    "family",
    [single(), single(skip=True), single(threshold=0.0), topk(), cross_layer()],
    ids=["jump", "skip", "relu", "topk", "clt"],
)
def test_what_is_written_is_read_again(tmp_path: Path, family: Family) -> None:
    write_family("circuit_tracer", tmp_path / "set", family)
    assert detect_family(tmp_path / "set") == "circuit_tracer"
    same(read_family("circuit_tracer", tmp_path / "set"), family)


def test_one_layer_by_itself(tmp_path: Path) -> None:
    dictionary = replace(transcoder(4, skip=True), notes={"model": "toy"}, skip=Skip((0,), 3.0))
    write_dictionary("circuit_tracer", tmp_path / "one", dictionary)
    assert detect(tmp_path / "one" / "layer_4.safetensors") == "circuit_tracer"
    again = read_dictionary("circuit_tracer", locate("circuit_tracer", tmp_path / "one"))
    assert again.reads == ("mlp_in.4",)
    assert again.skip == NO_SKIP
    same(Family((again,)), Family((replace(dictionary, skip=NO_SKIP),)))
    config = yaml.safe_load((tmp_path / "one" / "config.yaml").read_text())
    told = config.pop("circuitflow")[0]
    assert config == {
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
        "model_kind": "transcoder_set",
        "model_name": "toy",
        "scan": "toy",
    }
    assert told["skip"]["positions"] == [0]
    assert told["skip"]["max_norm"] == 3.0


def test_the_tensors_of_a_cross_layer_transcoder_by_hand(tmp_path: Path) -> None:
    """Two layers, one feature each: the first writes 2 and 3 to its own layer and the next."""
    save_file(
        {"W_enc_0": torch.tensor([[1.0]]), "b_enc_0": torch.zeros(1), "b_dec_0": torch.tensor([10.0])},
        tmp_path / "W_enc_0.safetensors",
    )
    save_file({"W_dec_0": torch.tensor([[[2.0], [3.0]]])}, tmp_path / "W_dec_0.safetensors")
    save_file(
        {"W_enc_1": torch.tensor([[1.0]]), "b_enc_1": torch.tensor([-1.0]), "b_dec_1": torch.tensor([100.0])},
        tmp_path / "W_enc_1.safetensors",
    )
    save_file({"W_dec_1": torch.tensor([[[5.0]]])}, tmp_path / "W_dec_1.safetensors")
    family = read_cross_layer(locate("circuit_tracer", tmp_path))
    assert (family.reads, family.writes) == (("mlp_in.0", "mlp_in.1"), ("mlp.0", "mlp.1"))
    x = {"mlp_in.0": torch.tensor([[4.0]]), "mlp_in.1": torch.tensor([[3.0]])}
    found = family.reconstruct(family.encode(x, torch.ones(1, dtype=torch.int64)), x)
    assert found["mlp.0"].item() == 10 + 4 * 2
    assert found["mlp.1"].item() == 100 + 4 * 3 + (3 - 1) * 5
    config = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert fetch_family(source(tmp_path), ["resid_mid.1"]).reads == ("resid_mid.0", "resid_mid.1")


def source(path: Path) -> dict[str, Any]:
    return {"format": "circuit_tracer", "path": str(path), "id": None, "revision": None}


def test_biases_are_written_where_the_library_adds_them(tmp_path: Path) -> None:
    """Wherever members keep b_dec, the file of layer L holds all that is added at mlp.L."""
    family = cross_layer(2)
    moved = replace(family.members[0], b_dec=torch.tensor([1.0, 2, 3, 4, 5, 6]))
    write_set(
        tmp_path / "clt", Family((moved, replace(family.members[1], b_dec=torch.tensor([10.0, 20, 30]))))
    )
    assert load_file(tmp_path / "clt" / "W_enc_0.safetensors")["b_dec_0"].tolist() == [1, 2, 3]
    assert load_file(tmp_path / "clt" / "W_enc_1.safetensors")["b_dec_1"].tolist() == [14, 25, 36]
    assert load_file(tmp_path / "clt" / "W_dec_0.safetensors")["W_dec_0"].shape == (F, 2, D)


def test_a_skip_connection_of_a_cross_layer_transcoder_is_not_transposed(tmp_path: Path) -> None:
    write_set(tmp_path / "clt", cross_layer(2))
    file, skip = tmp_path / "clt" / "W_enc_0.safetensors", torch.arange(9.0).reshape(3, 3)
    save_file({**load_file(file), "W_skip_0": skip}, file)
    family = read_cross_layer(locate("circuit_tracer", tmp_path / "clt"))
    x = {"mlp_in.0": torch.tensor([[1.0, 2, 3]]), "mlp_in.1": torch.zeros(1, D)}
    plain = {**x, "mlp_in.0": x["mlp_in.0"]}
    codes = family.encode(x, torch.ones(1, dtype=torch.int64))
    without = cross_layer(2).reconstruct(codes, plain)
    found = family.reconstruct(codes, x)
    torch.testing.assert_close(found["mlp.0"] - without["mlp.0"], x["mlp_in.0"] @ skip)
    torch.testing.assert_close(found["mlp.1"], without["mlp.1"])


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (
            Family((replace(transcoder(0, 2), select="topk"), transcoder(1))),
            r"batchtopk\), and this .*selects them by the rule 'topk'",
        ),
        (Family((transcoder(0), transcoder(2))), "every layer from 0 on, and here are those of layers 0, 2"),
        (
            Family((replace(transcoder(0), reads=("resid.0",), writes=("resid.0",)),)),
            "holds transcoders, and this",
        ),
        (Family((transcoder(0), transcoder(1, skip=True))), "all with a skip connection or all without"),
        (
            Family((transcoder(0, 3), transcoder(1, 2), transcoder(2, 3))),
            "the one at mlp_in.1 writes mlp.1 of",
        ),
        (Family((transcoder(0, 2, threshold=0), replace(transcoder(1), W_enc=None))), "a decoder alone"),
    ],
)
def test_what_the_format_cannot_hold(tmp_path: Path, family: Family, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_family("circuit_tracer", tmp_path / "set", family)
    assert not (tmp_path / "set").exists()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    for family in (single(), cross_layer()):
        with pytest.raises(UserError, match="is in use; name a folder"):
            write_family("circuit_tracer", tmp_path, family)


def test_numbers_of_features_must_agree(tmp_path: Path) -> None:
    wide = transcoder(1)
    assert wide.W_enc is not None
    fewer = replace(
        wide,
        W_enc=wide.W_enc[:4],
        b_enc=wide.b_enc[:4],
        W_dec=wide.W_dec[:4],
        extra={"threshold": torch.zeros(4)},
    )
    with pytest.raises(UserError, match="these have 4, 5"):
        write_set(tmp_path / "set", Family((transcoder(0), fewer)))


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    write_set(tmp_path / "clt", cross_layer())
    with pytest.raises(UserError, match="here a dictionary of one site is wanted"):
        read_dictionary("circuit_tracer", locate("circuit_tracer", tmp_path / "clt"))
    with pytest.raises(UserError, match=r"reads mlp_in.0 to mlp_in.2, not mlp_in.7"):
        fetch_family(source(tmp_path / "clt"), ["mlp_in.7"])
    decoder = tmp_path / "clt" / "W_dec_1.safetensors"
    save_file({"W_dec_1": torch.zeros(F, 1, D)}, decoder)
    with pytest.raises(
        UserError, match=r"W_dec_1 has shape \(5, 1, 3\), expected \(d_dict 5, later 2, d_out 3\)"
    ):
        read_family("circuit_tracer", tmp_path / "clt")
    decoder.unlink()
    with pytest.raises(UserError, match=r"has no W_dec_1.safetensors"):
        read_family("circuit_tracer", tmp_path / "clt")
    (tmp_path / "clt" / "W_enc_0.safetensors").unlink()
    with pytest.raises(UserError, match="has files of layers 1, 2; expected every layer from 0 on"):
        read_family("circuit_tracer", tmp_path / "clt")


def test_an_activation_that_only_the_configuration_names(tmp_path: Path) -> None:
    """After 0.5 a set says in config.yaml that it is TopK."""
    write_dictionary("circuit_tracer", tmp_path / "one", transcoder(0, threshold=0.0))
    file = tmp_path / "one" / "config.yaml"
    config = yaml.safe_load(file.read_text())
    for activation, more in (("topk", {"k": 2}), ("relu", {})):
        file.write_text(yaml.safe_dump({**config, "activation": activation, **more}))
        read = read_dictionary("circuit_tracer", locate("circuit_tracer", tmp_path / "one"))
        assert (read.select, dict(read.settings)) == (("topk", {"k": 2}) if more else ("threshold", {}))
    file.write_text(yaml.safe_dump({**config, "activation": "topk"}))
    with pytest.raises(UserError, match="has k = None in its settings"):
        read_dictionary("circuit_tracer", locate("circuit_tracer", tmp_path / "one"))
    file.write_text(yaml.safe_dump({**config, "activation": "gelu"}))
    with pytest.raises(UserError, match="has the activation 'gelu'"):
        read_dictionary("circuit_tracer", locate("circuit_tracer", tmp_path / "one"))


def test_converting_whole_sets(tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    for member in single().members:
        save_dictionary(ours / f"{member.reads[0]}.safetensors", member)
    told = convert_all(ours, tmp_path / "theirs", "circuitflow", "circuit_tracer")
    assert "3 dictionaries with 15 features, mlp_in.0 to mlp.2" in told
    assert "(circuitflow) to circuit_tracer" in told
    convert_all(tmp_path / "theirs", tmp_path / "back", None, "circuitflow")
    same(load_family(sorted((tmp_path / "back").iterdir())), single())
    with pytest.raises(UserError, match="exists; name a folder that does not"):
        convert_all(ours, tmp_path / "back", None, "circuitflow")
    with pytest.raises(UserError, match=r"Path .*nowhere does not exist"):
        convert_all(tmp_path / "nowhere", tmp_path / "new", None, "circuitflow")
    (tmp_path / "single").mkdir()
    save_dictionary(tmp_path / "single" / "mlp_in.0.safetensors", single().members[0])
    assert "1 dictionary with 5 features" in convert_all(
        tmp_path / "single", tmp_path / "d", None, "circuitflow"
    )
    one = convert(str(tmp_path / "theirs" / "layer_1.safetensors"), tmp_path / "one", None, "circuit_tracer")
    assert "5 features at mlp_in.1 → mlp.1" in one
    with pytest.raises(UserError, match="Format 'gemma_scope' cannot be written"):
        convert_all(ours, tmp_path / "new", None, "gemma_scope")
