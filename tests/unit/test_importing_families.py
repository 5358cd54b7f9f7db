"""The stage ``import_family``: transcoders of a layer and cross-layer ones, the run's outlier rule, and refusals."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from circuitflow.dictionaries.describing import files_of
from circuitflow.dictionaries.dictionary import Dictionary, Skip, save_dictionary
from circuitflow.dictionaries.family import Family, load_family
from circuitflow.dictionaries.formats.families import write_family
from circuitflow.dictionaries.importing_families import import_family
from circuitflow.dictionaries.outliers import find_outliers
from circuitflow.dictionaries.rows import open_rows
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from tests.fixtures.activation_store import write_store
from tests.fixtures.exchange import WIDTH, transcoder

RULE = {"outlier_ratio": 5.0, "skip_positions": [0]}
LAYERS = 3


def store(folder: Path, width: int = WIDTH, layers: int = LAYERS) -> Path:
    rng = np.random.default_rng(0)
    arrays = {
        f"{kind}.{layer}": (layer + 1) * rng.standard_normal((256, width)).astype(np.float32)
        for kind in ("mlp_in", "mlp")
        for layer in range(layers)
    }
    return write_store(folder, "activations", arrays, held_out_blocks=[3])


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store(tmp_path_factory.mktemp("store"))


def exported(folder: Path, members: int = 0) -> dict[str, Any]:
    """Transcoders of every layer as circuit_tracer has them, or with ``members`` a cross-layer one of so many."""
    count = members or LAYERS
    write_family(
        "circuit_tracer", folder, Family(tuple(transcoder(layer, members) for layer in range(count)))
    )
    return {"format": "circuit_tracer", "path": str(folder), "id": None, "revision": None}


def own(path: Path, dictionary: Dictionary) -> dict[str, Any]:
    save_dictionary(path, dictionary)
    return {"format": "circuitflow", "path": str(path), "id": None, "revision": None}


def run(manifest: Path, folder: Path, source: dict[str, Any], layers: Sequence[int]) -> Output:
    folder.mkdir(parents=True)
    out = Output(folder, {}, {})
    params = {"layers": list(layers), "settings": {"source": source, "training": RULE}, "compute": {}}
    import_family({"activations": manifest, "source": []}, params, out)
    return out


def check_members(folder: Path, manifest: Path, expected: Sequence[Dictionary]) -> None:
    members = load_family([folder / name for name in files_of(len(expected))]).members
    for member, before in zip(members, expected, strict=True):
        assert (member.reads, member.writes) == (before.reads, before.writes)
        assert torch.equal(member.W_dec, before.W_dec)
        found = find_outliers(open_rows(manifest, member.reads[0]), (0,), 5.0)
        assert member.skip == found.skip == Skip((0,), found.skip.max_norm)
        assert member.notes["share_left_out"] == found.share > 0


def test_the_transcoder_of_one_layer(manifest: Path, tmp_path: Path) -> None:
    out = run(manifest, tmp_path / "run", exported(tmp_path / "set"), [1])
    check_members(tmp_path / "run", manifest, [transcoder(1)])
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == b""
    assert out.details["reads"] == [["mlp_in.1"]]


def test_a_cross_layer_transcoder_comes_whole(manifest: Path, tmp_path: Path) -> None:
    run(manifest, tmp_path / "run", exported(tmp_path / "clt", LAYERS), range(LAYERS))
    check_members(tmp_path / "run", manifest, [transcoder(layer, LAYERS) for layer in range(LAYERS)])


def test_our_own_keep_their_rule(manifest: Path, tmp_path: Path) -> None:
    source = own(tmp_path / "own.safetensors", replace(transcoder(1), skip=Skip((0, 1), 7.0)))
    run(manifest, tmp_path / "run", source, [1])
    assert load_family([tmp_path / "run" / "weights.safetensors"]).members[0].skip == Skip((0, 1), 7.0)


@pytest.mark.parametrize("layers", [[0], [0, 1]])
def test_some_layers_of_a_cross_layer_transcoder_are_refused(
    manifest: Path, tmp_path: Path, layers: list[int]
) -> None:
    asked = ", ".join(f"mlp_in.{layer}" for layer in layers)
    sentence = rf"reads mlp_in\.0 to mlp_in\.2, and what was asked for is {asked}; .*layers to null"
    with pytest.raises(UserError, match=sentence):
        run(manifest, tmp_path / "run", exported(tmp_path / "clt", LAYERS), layers)


def test_layers_that_a_cross_layer_transcoder_lacks(manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reads mlp_in\.0 to mlp_in\.1, not mlp_in\.2"):
        run(manifest, tmp_path / "run", exported(tmp_path / "clt", 2), range(LAYERS))


def test_another_width_is_told_with_both_numbers(tmp_path: Path) -> None:
    wide = store(tmp_path, WIDTH + 1)
    sentence = (
        r"at mlp_in\.1 is made for vectors at mlp_in\.1 that are 3 wide, and in this model they are 4 wide"
    )
    with pytest.raises(UserError, match=sentence):
        run(wide, tmp_path / "run", exported(tmp_path / "set"), [1])


def test_what_is_written_has_to_fit_too(manifest: Path, tmp_path: Path) -> None:
    before = transcoder(1)
    later = own(tmp_path / "later.safetensors", replace(before, writes=("mlp.7",)))
    with pytest.raises(UserError, match=r"at mlp_in\.1 writes mlp\.7, which is not among the layers asked"):
        run(manifest, tmp_path / "a", later, [1])
    wider = replace(before, W_dec=torch.ones(before.d_dict, 5), b_dec=torch.zeros(5))
    with pytest.raises(UserError, match=r"made for vectors at mlp\.1 that are 5 wide, and in this .* 3 wide"):
        run(manifest, tmp_path / "b", own(tmp_path / "wider.safetensors", wider), [1])
