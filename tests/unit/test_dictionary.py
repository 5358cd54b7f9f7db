"""The dictionary object: encoding, decoding, the outlier rule, and its file."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from circuitflow.dictionaries.dictionary import Dictionary, Skip, load_dictionary, save_dictionary
from circuitflow.dictionaries.tensors import write_tensors
from circuitflow.errors import UserError
from circuitflow.store.objects import Manifest

SITE = ("resid.3",)


def some(d_model: int = 6, d_dict: int = 20, k: int = 3, skip: Skip | None = None) -> Dictionary:
    draw = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    weights = normal(d_dict, d_model), normal(d_dict), normal(d_dict, d_model), normal(d_model)
    return Dictionary("topk", SITE, SITE, "topk", *weights, skip or Skip((0,), 4.0), {"k": k})


def vectors(n: int = 40, d_model: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(n, d_model, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x[7] *= 10 / x[7].norm()
    return x, torch.arange(n) % 8


def test_hand_worked_topk():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    dictionary = Dictionary(
        "topk", SITE, SITE, "topk", rows, torch.tensor([0.0, 0.0, -1.5]), rows, torch.tensor([10.0, 0.0]),
        settings={"k": 2},
    )  # fmt: skip
    codes = dictionary.encode(torch.tensor([[2.0, 1.0], [-1.0, -2.0], [0.0, 3.0]]), torch.zeros(3).long())
    # pre-activations: (2, 1, 1.5), (−1, −2, −4.5), (0, 3, 1.5)
    assert torch.equal(codes.dense(), torch.tensor([[2.0, 0, 1.5], [0, 0, 0], [0, 3, 1.5]]))
    assert torch.equal(dictionary.decode(codes), torch.tensor([[13.5, 1.5], [10, 0], [11.5, 4.5]]))


def test_codes_are_the_k_largest_positive_pre_activations():
    dictionary, (x, positions) = some(skip=Skip()), vectors()
    codes = dictionary.encode(x, positions)
    pre = x @ dictionary.W_enc.T + dictionary.b_enc
    kth = pre.sort(dim=1, descending=True).values[:, 2:3]
    torch.testing.assert_close(codes.dense(), torch.where((pre >= kth) & (pre > 0), pre, 0.0))


def test_encoder_is_linear_on_the_active_set():
    dictionary, (x, positions) = some(skip=Skip()), vectors()
    codes = dictionary.encode(x, positions)
    moved = dictionary.encode(x + 1e-9, positions)
    assert torch.equal(codes.features, moved.features)
    expected = 1e-9 * dictionary.W_enc[codes.features].sum(dim=1)
    torch.testing.assert_close(moved.values - codes.values, expected, rtol=1e-4, atol=1e-14)


def test_skipped_vectors_have_no_features_and_leave_all_but_the_offset_as_error():
    dictionary, (x, positions) = some(), vectors()
    codes = dictionary.encode(x, positions)
    skipped = (positions == 0) | (x.norm(dim=1) > 4)
    assert skipped[7]
    assert not skipped.all()
    assert (codes.counts()[skipped] == 0).all()
    assert (codes.counts()[~skipped] > 0).all()
    error = dictionary.error(x, codes)
    assert torch.equal(error[skipped], (x - dictionary.b_dec)[skipped])
    torch.testing.assert_close(dictionary.decode(codes) + error, x)


def test_encoding_does_not_depend_on_blocks(monkeypatch):
    dictionary, (x, positions) = some(), vectors()
    whole = dictionary.encode(x, positions)
    monkeypatch.setattr("circuitflow.dictionaries.dictionary.ENCODE_ENTRIES", 60)
    parts = dictionary.encode(x, positions)
    assert torch.equal(whole.offsets, parts.offsets)
    assert torch.equal(whole.features, parts.features)
    torch.testing.assert_close(whole.values, parts.values)


def test_active_looks_at_chosen_features():
    dictionary, (x, positions) = some(), vectors()
    codes = dictionary.encode(x, positions)
    features = torch.tensor([3, 11])
    assert torch.equal(dictionary.active(codes, features), codes.dense()[:, features] > 0)


def test_no_vectors_at_all():
    codes = some().encode(torch.zeros(0, 6, dtype=torch.float64), torch.zeros(0).long())
    assert (codes.n, codes.nnz) == (0, 0)


def test_file_keeps_everything_and_has_equal_bytes(tmp_path: Path):
    dictionary = replace(some(), notes={"step": 3})
    for name in ("a", "b"):
        save_dictionary(tmp_path / f"{name}.safetensors", dictionary)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    loaded = load_dictionary(tmp_path / "a.safetensors", width=6)
    assert (loaded.kind, loaded.reads, loaded.writes, loaded.skip) == ("topk", SITE, SITE, Skip((0,), 4.0))
    assert (loaded.settings, loaded.notes) == ({"k": 3}, {"step": 3})
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(loaded, name), getattr(dictionary, name))


def test_thresholds_are_features_own_and_are_saved(tmp_path: Path):
    threshold = torch.linspace(0, 2, 20, dtype=torch.float64)
    dictionary = replace(some(skip=Skip()), select="threshold", settings={}, extra={"threshold": threshold})
    save_dictionary(tmp_path / "d.safetensors", dictionary)
    loaded, (x, positions) = load_dictionary(tmp_path / "d.safetensors"), vectors()
    pre = x @ dictionary.W_enc.T + dictionary.b_enc
    codes = loaded.encode(x, positions)
    torch.testing.assert_close(codes.dense(), torch.where(pre > threshold, pre, 0.0))
    assert 0 < codes.nnz < (pre > 0).sum()
    assert loaded.to(torch.float32).extra["threshold"].dtype == torch.float32


def test_tied_weights_can_be_saved(tmp_path: Path):
    dictionary = replace(some(), W_enc=some().W_dec)
    dictionary = replace(dictionary, W_dec=dictionary.W_enc)
    save_dictionary(tmp_path / "tied.safetensors", dictionary)
    assert torch.equal(load_dictionary(tmp_path / "tied.safetensors").W_enc, dictionary.W_dec)


def test_loads_by_manifest(tmp_path: Path):
    save_dictionary(tmp_path / "objects" / "f00" / "weights.safetensors", some())
    manifest = tmp_path / "dictionaries" / "main" / "resid.3.json"
    Manifest("dictionary", "f00", "content", {}, {}).write(manifest)
    assert load_dictionary(manifest).d_dict == 20


def test_a_decoder_alone_has_no_codes(tmp_path: Path):
    dictionary = replace(some(), kind="pretrained", W_enc=None)
    save_dictionary(tmp_path / "d.safetensors", dictionary)
    loaded = load_dictionary(tmp_path / "d.safetensors", width=6)
    assert (loaded.d_in, loaded.d_model) == (6, 6)
    with pytest.raises(UserError, match=r"'pretrained' at resid\.3 has no encoder"):
        loaded.encode(*vectors())


def transcoder(d_in: int = 6, d_out: int = 4) -> Dictionary:
    """Reads mlp_in.3, six wide, and writes mlp.3, four wide."""
    draw = torch.Generator().manual_seed(4)
    skip = torch.randn(d_out, d_in, generator=draw, dtype=torch.float64)
    wide = some(d_model=d_in)
    narrow = some(d_model=d_out)
    return replace(
        wide, reads=("mlp_in.3",), writes=("mlp.3",), W_dec=narrow.W_dec, b_dec=narrow.b_dec, W_skip=skip
    )


def test_a_skip_connection_passes_the_input_on():
    rows, skip = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 2.0]])
    dictionary = Dictionary(
        "topk", ("mlp_in.3",), ("mlp.3",), "topk", rows, torch.zeros(2), torch.tensor([[10.0], [1.0]]),
        torch.tensor([0.5]), Skip((0,)), {"k": 1}, W_skip=skip,
    )  # fmt: skip
    x = torch.tensor([[3.0, 2.0], [3.0, 2.0]])
    codes = dictionary.encode(x, torch.tensor([1, 0]))
    # 3·10 + 0.5 + 2·2; the second is skipped: its features are 0, its input is passed on all the same
    assert dictionary.decode(codes, x).tolist() == [[34.5], [4.5]]
    written = torch.tensor([[40.0], [4.0]])
    assert dictionary.error(x, codes, written).tolist() == [[5.5], [-0.5]]


def test_a_skip_connection_needs_the_input_and_a_transcoder_what_it_writes():
    dictionary, (x, positions) = transcoder(), vectors()
    codes = dictionary.encode(x, positions)
    with pytest.raises(ValueError, match=r"at mlp_in\.3 has a skip connection: decode needs x"):
        dictionary.decode(codes)
    with pytest.raises(ValueError, match=r"writes mlp\.3: error needs what is there"):
        dictionary.error(x, codes)
    without = replace(dictionary, W_skip=None)
    assert torch.equal(without.decode(codes), without.decode(codes, x))
    torch.testing.assert_close(dictionary.decode(codes, x) - without.decode(codes), x @ dictionary.W_skip.T)


def test_an_sae_with_a_skip_connection_has_an_error_by_itself():
    skip = 0.5 * torch.eye(6, dtype=torch.float64)
    dictionary, (x, positions) = replace(some(), W_skip=skip), vectors()
    codes = dictionary.encode(x, positions)
    plain = replace(dictionary, W_skip=None)
    torch.testing.assert_close(dictionary.error(x, codes), plain.error(x, codes) - 0.5 * x)


def test_a_transcoder_is_saved_and_its_shapes_are_checked(tmp_path: Path):
    save_dictionary(tmp_path / "d.safetensors", transcoder())
    loaded = load_dictionary(tmp_path / "d.safetensors", width=6)
    assert (loaded.reads, loaded.writes) == (("mlp_in.3",), ("mlp.3",))
    assert (loaded.d_in, loaded.d_model, loaded.d_dict, dict(loaded.extra)) == (6, 4, 20, {})
    assert torch.equal(loaded.W_skip, transcoder().W_skip)
    assert loaded.to(torch.float32).W_skip.dtype == torch.float32
    with pytest.raises(UserError, match="6 wide but the site is 4 wide"):
        load_dictionary(tmp_path / "d.safetensors", width=4)
    save_dictionary(tmp_path / "turned.safetensors", replace(transcoder(), W_skip=transcoder().W_skip.T))
    with pytest.raises(UserError, match=r"W_skip has shape \(6, 4\), expected \(4, 6\)"):
        load_dictionary(tmp_path / "turned.safetensors")


def test_another_width_is_one_sentence(tmp_path: Path):
    save_dictionary(tmp_path / "d.safetensors", some())
    with pytest.raises(UserError, match="6 wide but the site is 8 wide"):
        load_dictionary(tmp_path / "d.safetensors", width=8)
    with pytest.raises(UserError, match="6 wide but was given vectors of width 8"):
        some().encode(torch.zeros(2, 8, dtype=torch.float64), torch.zeros(2).long())


def test_edited_shapes_are_refused(tmp_path: Path):
    save_dictionary(tmp_path / "d.safetensors", some())
    raw = (tmp_path / "d.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["W_dec"]["shape"] = [6, 20]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    (tmp_path / "d.safetensors").write_bytes(raw[:8] + text + raw[8 + length :])
    with pytest.raises(UserError, match=r"W_dec has shape \(6, 20\), expected \(20, 6\)"):
        load_dictionary(tmp_path / "d.safetensors")


def test_missing_damaged_and_foreign_files(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        load_dictionary(tmp_path / "none.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\x08")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load_dictionary(tmp_path / "torn.safetensors")
    save_file({"W_dec": torch.zeros(2, 2)}, tmp_path / "foreign.safetensors")
    tensors = {name: torch.zeros(2, 2) for name in ("b_enc", "W_dec", "b_dec")}
    write_tensors(tmp_path / "state.safetensors", tensors, {"done": 3})
    for name in ("foreign", "state"):
        with pytest.raises(UserError, match="not a circuitflow dictionary"):
            load_dictionary(tmp_path / f"{name}.safetensors")
