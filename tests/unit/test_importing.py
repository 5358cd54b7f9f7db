"""The stage ``import_dictionary`` and ``circuitflow convert``."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from circuitflow.converting import convert
from circuitflow.dictionaries.dictionary import NO_SKIP, Dictionary, Skip, load_dictionary, save_dictionary
from circuitflow.dictionaries.formats.places import LAYOUTS, formats_help, locate
from circuitflow.dictionaries.formats.registry import read_dictionary, write_dictionary
from circuitflow.dictionaries.importing import import_dictionary
from circuitflow.dictionaries.outliers import find_outliers
from circuitflow.dictionaries.rows import open_rows
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from tests.fixtures.activation_store import planted, with_sinks, write_store
from tests.fixtures.exchange import dictionary_of
from tests.fixtures.hub import fill_cache

D_MODEL, SITE = 12, "resid.2"
RULE = {"outlier_ratio": 5.0, "skip_positions": [0]}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    x = with_sinks(planted(512, D_MODEL, 20, 3, seed=0)[0])
    narrow = planted(512, D_MODEL - 2, 20, 3, seed=0)[0]
    arrays = {SITE: x, "mlp_in.2": x.copy(), "resid.3": x.copy(), "resid.4": narrow}
    return write_store(tmp_path_factory.mktemp("store"), "activations", arrays, held_out_blocks=[3, 20])


def run(manifest: Path, folder: Path, source: dict[str, Any], site: str = SITE, **more: Any) -> Output:
    folder.mkdir(parents=True)
    out = Output(folder, {}, {})
    settings = {"kind": "pretrained", "source": source, "training": RULE}
    params = {"site": site, "settings": settings, "compute": {"threads": 1}}
    import_dictionary({"activations": manifest, "source": []} | more, params, out)
    return out


def exported(folder: Path, name: str = "sparsify", dictionary: Dictionary | None = None) -> dict[str, Any]:
    write_dictionary(name, folder, dictionary or dictionary_of("topk"))
    return {"format": name, "path": str(folder), "id": None, "revision": None}


def foreign(folder: Path) -> dict[str, Any]:
    """One of sparsify's own making, which does not say its site as those written here do."""
    source = exported(folder)
    cfg = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    del cfg["circuitflow"]
    (folder / "cfg.json").write_text(json.dumps(cfg), encoding="utf-8")
    return source


def test_an_imported_dictionary_looks_like_a_trained_one(manifest: Path, tmp_path: Path) -> None:
    source = exported(tmp_path / "layers.2")
    out = run(manifest, tmp_path / "run", source)
    loaded = load_dictionary(tmp_path / "run" / "weights.safetensors", width=D_MODEL)
    outliers = find_outliers(open_rows(manifest, SITE), (0,), 5.0)
    assert loaded.skip == outliers.skip
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == b""
    details = out.details
    assert {
        key: details[key] for key in ("kind", "site", "d_model", "d_dict", "settings", "last", "checkpoints")
    } == {
        "kind": "pretrained",
        "site": SITE,
        "d_model": D_MODEL,
        "d_dict": 40,
        "settings": {"k": 5},
        "last": None,
        "checkpoints": [],
    }
    assert details["skip"] == {"positions": [0], "max_norm": outliers.skip.max_norm}
    assert details["notes"]["format"] == "sparsify"
    assert details["notes"]["share_left_out"] == outliers.share > 0
    x, positions = torch.randn(20, D_MODEL, generator=torch.Generator().manual_seed(3)), torch.ones(20).long()
    expected = dictionary_of("topk").encode(x, positions)
    assert torch.equal(replace(loaded, skip=NO_SKIP).encode(x, positions).features, expected.features)


def test_equal_imports_have_equal_content(manifest: Path, tmp_path: Path) -> None:
    one = run(manifest, tmp_path / "one", exported(tmp_path / "a" / "layers.2"))
    other = run(manifest, tmp_path / "two", exported(tmp_path / "b" / "layers.2"))
    assert one.content == other.content
    folders = [tmp_path / name / "weights.safetensors" for name in ("one", "two")]
    assert folders[0].read_bytes() == folders[1].read_bytes()


def test_a_decoder_alone_leaves_no_vector_out(manifest: Path, tmp_path: Path) -> None:
    save_file({"W_dec": torch.eye(D_MODEL)}, tmp_path / "layer_2.safetensors")
    source = {"format": "decoder", "path": str(tmp_path / "layer_2.safetensors")}
    out = run(manifest, tmp_path / "run", source)
    loaded = load_dictionary(tmp_path / "run" / "weights.safetensors")
    assert loaded.W_enc is None
    assert loaded.skip == NO_SKIP
    assert out.details["skip"] == {"positions": [], "max_norm": None}


def test_our_own_dictionary_keeps_the_rule_it_was_made_with(manifest: Path, tmp_path: Path) -> None:
    saved = replace(dictionary_of("threshold"), skip=Skip((0, 1), 7.0), notes={"step": 3})
    save_dictionary(tmp_path / "own.safetensors", saved)
    run(manifest, tmp_path / "run", {"format": "circuitflow", "path": str(tmp_path / "own.safetensors")})
    loaded = load_dictionary(tmp_path / "run" / "weights.safetensors")
    assert (loaded.kind, loaded.skip, loaded.notes) == ("jumprelu", Skip((0, 1), 7.0), {"step": 3})


def test_a_transcoder_keeps_its_sites_and_its_skip_connection(manifest: Path, tmp_path: Path) -> None:
    source = exported(tmp_path / "sae", "sae_lens", dictionary_of("threshold", d_out=7, skip=True))
    run(manifest, tmp_path / "run", source, "mlp_in.2")
    loaded = load_dictionary(tmp_path / "run" / "weights.safetensors", width=D_MODEL)
    assert (loaded.reads, loaded.writes, loaded.d_in, loaded.d_model) == (
        ("mlp_in.2",),
        ("mlp.2",),
        D_MODEL,
        7,
    )
    assert loaded.W_skip is not None


def test_a_dictionary_of_the_hub(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    exported(tmp_path / "layers.2")
    files = {f"layers.2/{file.name}": file.read_bytes() for file in (tmp_path / "layers.2").iterdir()}
    fill_cache(tmp_path / "hub", "some/saes", files)
    source = {"format": "sparsify", "id": "some/saes", "revision": "main", "path": None}
    assert run(manifest, tmp_path / "run", source).details["d_dict"] == 40
    with pytest.raises(UserError, match=r"at 'layers.4' in the cached part of .* did you mean 'layers.2'"):
        run(manifest, tmp_path / "other", source | {"path": "layers.4"})


def test_another_site_or_width_is_one_sentence(manifest: Path, tmp_path: Path) -> None:
    source = exported(tmp_path / "layers.2")
    with pytest.raises(UserError, match=r"layers.2/?\.? was made for resid.2, not for resid.3; use it there"):
        run(manifest, tmp_path / "a", source, "resid.3")
    source = foreign(tmp_path / "bare" / "coder")
    with pytest.raises(UserError, match=r"is 12 wide, but resid.4 is 10 wide in this model"):
        run(manifest, tmp_path / "b", source, "resid.4")
    with pytest.raises(
        UserError, match=r"none does not exist; dictionaries of format sparsify in .*: valid: "
    ):
        run(manifest, tmp_path / "c", source | {"path": str(tmp_path / "bare" / "none")})


# convert


def test_converts_there_and_back(tmp_path: Path) -> None:
    save_dictionary(tmp_path / "own.safetensors", replace(dictionary_of("topk"), skip=Skip((0,), 3.0)))
    told = convert(str(tmp_path / "own.safetensors"), tmp_path / "sae", None, "sae_lens")
    assert told.startswith(f"{tmp_path / 'sae'}: 40 features at resid.2, 12 wide, from ")
    convert(str(tmp_path / "sae"), tmp_path / "layers.2", None, "sparsify")
    told = convert(str(tmp_path / "layers.2"), tmp_path / "back.safetensors", "sparsify", "circuitflow", SITE)
    assert told.endswith("(sparsify) to circuitflow")
    back = load_dictionary(tmp_path / "back.safetensors")
    x, positions = torch.randn(20, D_MODEL, generator=torch.Generator().manual_seed(3)), torch.ones(20).long()
    codes, expected = (dictionary.encode(x, positions) for dictionary in (back, dictionary_of("topk")))
    torch.testing.assert_close(codes.dense(), expected.dense())


def test_a_transcoder_tells_both_sites(tmp_path: Path) -> None:
    save_dictionary(tmp_path / "own.safetensors", dictionary_of("threshold", d_out=7))
    told = convert(str(tmp_path / "own.safetensors"), tmp_path / "sae", None, "sae_lens")
    assert "at mlp_in.2 → mlp.2, 12 wide" in told


def test_the_site_is_needed_where_the_files_do_not_tell_it(tmp_path: Path) -> None:
    exported(tmp_path / "told")
    assert "at resid.2" in convert(str(tmp_path / "told"), tmp_path / "back.safetensors", None, "circuitflow")
    foreign(tmp_path / "coder")
    target = tmp_path / "out.safetensors"
    with pytest.raises(UserError, match=r"does not tell its site; name it \(one of embed, z.L"):
        convert(str(tmp_path / "coder"), target, None, "circuitflow")
    convert(str(tmp_path / "coder"), target, None, "circuitflow", "resid.9")
    assert load_dictionary(target).reads == ("resid.9",)


def test_convert_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    exported(tmp_path / "coder")
    files = {f"layers.2/{file.name}": file.read_bytes() for file in (tmp_path / "coder").iterdir()}
    fill_cache(tmp_path / "hub", "some/saes", files)
    target = tmp_path / "out.safetensors"
    with pytest.raises(UserError, match=r"not known before it is here; name it \(--from\)"):
        convert("layers.2", target, None, "circuitflow", repository="some/saes")
    told = convert("layers.2", target, "sparsify", "circuitflow", repository="some/saes")
    assert "from some/saes layers.2 (sparsify)" in told


@pytest.mark.parametrize(
    ("target", "to", "message"),
    [
        ("out", "circuitflow", r"is no name for a circuitflow dictionary; end it with .safetensors"),
        ("own.safetensors", "circuitflow", "own.safetensors exists; name a file or folder that does not"),
        (
            "out",
            "gemma_scope",
            "Format 'gemma_scope' cannot be written; valid: circuitflow, sae_lens, sparsify",
        ),
        (
            "out",
            "sparsify",
            r"holds TopK dictionaries only, and this one of kind jumprelu .*write it as sae_lens",
        ),
    ],
)
def test_convert_refusals(tmp_path: Path, target: str, to: str, message: str) -> None:
    save_dictionary(tmp_path / "own.safetensors", dictionary_of("threshold"))
    with pytest.raises(UserError, match=message):
        convert(str(tmp_path / "own.safetensors"), tmp_path / target, None, to)


def test_the_help_names_every_format() -> None:
    lines = formats_help().split("\n\n")
    assert [line.split(" ")[0] for line in lines] == list(LAYOUTS)
    assert "gemma_scope (read): JumpReLU" in formats_help()


def test_written_folders_tell_the_rule_that_they_cannot_hold(manifest: Path, tmp_path: Path) -> None:
    run(manifest, tmp_path / "run", exported(tmp_path / "layers.2"))
    convert(str(tmp_path / "run" / "weights.safetensors"), tmp_path / "sae", None, "sae_lens")
    skip = json.loads((tmp_path / "sae" / "cfg.json").read_text())["metadata"]["circuitflow"]["skip"]
    assert skip["positions"] == [0]
    assert skip["max_norm"] > 0
    assert read_dictionary("sae_lens", locate("sae_lens", tmp_path / "sae")).skip == NO_SKIP
