"""Finding dictionaries on disk: by name, by a file of theirs, by the site's layer; and telling their format."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from circuitflow.dictionaries.dictionary import save_dictionary
from circuitflow.dictionaries.formats.naming import (
    HOOKS,
    Hint,
    choose_site,
    hint_of_hook,
    hint_of_module,
    hint_of_path,
    hook_of_site,
)
from circuitflow.dictionaries.formats.places import detect, local_files, locate
from circuitflow.errors import UserError
from tests.fixtures.exchange import dictionary_of

LEVELS = [f"layer_{layer}/width_16k/average_l0_{l0}" for layer in (3, 12) for l0 in (9, 71, 141)]


@pytest.fixture
def scope(tmp_path: Path) -> Path:
    for level in LEVELS:
        (tmp_path / "scope" / level).mkdir(parents=True)
        (tmp_path / "scope" / level / "params.npz").touch()
    return tmp_path / "scope"


def test_a_folder_or_a_file_names_the_same_dictionary(scope: Path) -> None:
    folder = locate("gemma_scope", scope / LEVELS[1])
    file = locate("gemma_scope", scope / LEVELS[1] / "params.npz")
    assert folder == file
    assert folder.weights == scope / LEVELS[1] / "params.npz"
    assert str(folder) == str(scope / LEVELS[1])


def test_a_wrong_path_lists_the_nearest(scope: Path) -> None:
    with pytest.raises(
        UserError, match=r"average_l0_72 does not exist; dictionaries of format gemma_scope in .*: "
    ):
        locate("gemma_scope", scope / "layer_12/width_16k/average_l0_72")
    with pytest.raises(UserError, match=r"did you mean 'average_l0_71'\? valid: average_l0_71, average_l0_"):
        locate("gemma_scope", scope / "layer_12/width_16k/average_l0_72")
    with pytest.raises(
        UserError, match=r"layer_13/width_16k does not exist; .*valid: layer_3/width_16k/average_l0_9, "
    ):
        locate("gemma_scope", scope / "layer_13/width_16k")


def test_a_folder_of_many_lists_them(scope: Path) -> None:
    with pytest.raises(
        UserError, match=rf"^6 dictionaries of format gemma_scope are in .*; name one; .*{LEVELS[0]}"
    ):
        locate("gemma_scope", scope)
    with pytest.raises(UserError, match=r"^6 dictionaries .*name one"):
        locate("gemma_scope", scope, "resid.12")  # three of that layer
    with pytest.raises(
        UserError, match=r"No dictionary of format sparsify is in .* \(cfg.json, sae.safetensors\)"
    ):
        locate("sparsify", scope)


def test_the_layer_of_the_site_leaves_one(scope: Path) -> None:
    for level in LEVELS[1:3]:
        (scope / level / "params.npz").unlink()
    assert locate("gemma_scope", scope, "resid.3").id == LEVELS[0]


@pytest.mark.parametrize(
    ("site", "found"),
    [
        ("resid.3", "layers.3"),
        ("mlp.3", "layers.3.mlp"),
        ("mlp_in.3", "layers.3.mlp"),
        ("embed", "embed_tokens"),
    ],
)
def test_the_kind_of_the_site_counts_too(tmp_path: Path, site: str, found: str) -> None:
    for name in ("layers.3", "layers.3.mlp", "layers.30", "embed_tokens"):
        (tmp_path / name).mkdir()
        for file in ("cfg.json", "sae.safetensors"):
            (tmp_path / name / file).touch()
    assert locate("sparsify", tmp_path, site).id == found


def test_files_that_a_workflow_tracks(tmp_path: Path) -> None:
    for layer in (1, 2):
        (tmp_path / f"layer_{layer}.safetensors").touch()
    (tmp_path / "config.yaml").touch()
    source = {"format": "circuit_tracer", "path": str(tmp_path), "id": None}
    assert local_files(source, "mlp_in.2") == [tmp_path / "layer_2.safetensors", tmp_path / "config.yaml"]
    assert local_files(source | {"id": "some/repository"}) == []
    with pytest.raises(UserError, match="2 dictionaries of format circuit_tracer"):
        local_files(source)


def test_detects_formats(tmp_path: Path, scope: Path) -> None:
    assert detect(scope / LEVELS[0]) == detect(scope / LEVELS[0] / "params.npz") == "gemma_scope"
    save_dictionary(tmp_path / "own.safetensors", dictionary_of("topk"))
    assert detect(tmp_path / "own.safetensors") == "circuitflow"
    (tmp_path / "resid.3.json").touch()
    assert detect(tmp_path / "resid.3.json") == "circuitflow"
    rows = torch.zeros(2, 2)
    save_file(
        {"W_enc": rows, "W_dec": rows.clone(), "b_enc": rows[0].clone()}, tmp_path / "layer_1.safetensors"
    )
    assert detect(tmp_path / "layer_1.safetensors") == "circuit_tracer"
    save_file({"W_dec": rows}, tmp_path / "layer_2.safetensors")
    np.save(tmp_path / "layer_3.npy", rows.numpy())
    assert detect(tmp_path / "layer_2.safetensors") == detect(tmp_path / "layer_3.npy") == "decoder"


def test_formats_that_files_do_not_tell(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"is of no format that its files tell; name it \(--from\): valid: circuitflow"
    ):
        detect(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"is of no format .*; if it holds dictionaries, take all with --all"):
        detect(tmp_path)
    for name in ("cfg.json", "sae.safetensors", "sae_weights.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="may be of formats sae_lens, sparsify; name it"):
        detect(tmp_path)
    with pytest.raises(UserError, match="does not exist; check it"):
        detect(tmp_path / "none")
    (tmp_path / "torn.safetensors").write_bytes(b"\x08")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        detect(tmp_path / "torn.safetensors")


# Names of sites


@pytest.mark.parametrize("site", ["embed", *(f"{kind}.7" for kind in dict.fromkeys(HOOKS.values()))])
def test_hooks_and_sites_are_one_to_one(site: str) -> None:
    hint = hint_of_hook("d", hook_of_site(site))
    assert choose_site("d", hint, None) == site


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("gpt_neox.layers.4", "resid", 4),
        ("transformer.h.4.attn", "attn", 4),
        ("model.layers.4.output", "resid", 4),
        ("model.layers.4.self_attn.o_proj.input", "z", 4),
        ("model.layers.4.pre_feedforward_layernorm.output", "mlp_in", 4),
        ("model.layers.4.post_feedforward_layernorm.output", "mlp", 4),
        ("model.layers.4.mlp.gate_proj", None, 4),
        ("model.embed_tokens", "embed", None),
    ],
)
def test_modules(name: str, kind: str | None, layer: int | None) -> None:
    assert hint_of_module(name) == Hint(kind, layer)


@pytest.mark.parametrize(
    ("path", "kind", "layer"),
    [
        ("resid_post_layer_4/trainer_0", "resid", 4),
        ("attn_out_layer3", "attn", 3),
        ("layer_12/width_16k/average_l0_71", None, 12),
        ("layer_7.safetensors", None, 7),
        ("mlp_in.4.safetensors", "mlp_in", 4),
        ("layers.4.mlp", "mlp", 4),
        ("embedding/width_4k", "embed", None),
        ("width_4k", None, None),
        ("players.4", None, None),
        ("blocks.4.hook_resid_pre", "resid", 3),
        ("blocks.0.hook_resid_pre", "embed", None),
        ("blocks.4.attn.hook_z", "z", 4),
    ],
)
def test_folders(path: str, kind: str | None, layer: int | None) -> None:
    assert hint_of_path(path) == Hint(kind, layer)


def test_what_is_known_of_a_site_is_held_against_what_is_asked() -> None:
    assert choose_site("d", Hint(None, 4), "mlp.4") == "mlp.4"
    assert choose_site("d", Hint("embed"), None) == "embed"
    with pytest.raises(UserError, match=r"Dictionary d was made for mlp, not for resid.4"):
        choose_site("d", Hint("mlp"), "resid.4")
    with pytest.raises(
        UserError, match=r"^Dictionary d does not tell its site; name it \(one of .*\) with --site"
    ):
        choose_site("d", Hint(), None)
    with pytest.raises(UserError, match="unknown kind 'residual'"):
        choose_site("d", Hint(), "residual.4")
