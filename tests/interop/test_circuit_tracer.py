"""circuit-tracer writes and we read: the same features and reconstructions, of Gemma Scope's files too; and back."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.dictionaries.family import Family
from circuitflow.dictionaries.formats.families import read_family, write_family
from circuitflow.dictionaries.formats.places import detect, locate
from circuitflow.dictionaries.formats.registry import read_dictionary
from tests.fixtures.exchange import transcoder
from tests.fixtures.peers import check_same, run_peer

pytestmark = [pytest.mark.peers, pytest.mark.slow]
SIDE = Path(__file__).with_name("circuit_tracer_side.py")
NAMES = ("relu", "jumprelu", "skip", "jumprelu_skip")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("circuit_tracer")
    run_peer("circuit-tracer", SIDE, "write", folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_reads_what_the_library_writes(written: Path, name: str) -> None:
    assert detect(written / name / "layer_1.safetensors") == "circuit_tracer"
    dictionary = read_dictionary(
        "circuit_tracer", locate("circuit_tracer", written / name, "mlp_in.1"), "mlp_in.1"
    )
    assert (dictionary.reads, dictionary.writes) == (("mlp_in.1",), ("mlp.1",))
    check_same(dictionary, written / f"{name}.safetensors")


def test_gemma_scope_2_transcoder(written: Path) -> None:
    dictionary = read_dictionary("gemma_scope", locate("gemma_scope", written / "gemma_scope_2"))
    assert (dictionary.reads, dictionary.writes) == (("mlp_in.1",), ("mlp.1",))
    check_same(dictionary, written / "gemma_scope_2.safetensors")


def test_gemma_scope_arrays(written: Path) -> None:
    """Read as an SAE, whose arrays and activation are the same."""
    dictionary = read_dictionary("gemma_scope", locate("gemma_scope", written / "gemma_scope"), "resid.1")
    check_same(dictionary, written / "gemma_scope.safetensors")


def check_family(family: Family, reference: Path) -> None:
    """Features and reconstructions of every layer are those that the library put beside its vectors."""
    expected = load_file(reference)
    x = dict(zip(family.reads, expected["x"], strict=True))
    codes = family.encode(x, torch.ones(expected["x"].shape[1], dtype=torch.int64))
    features = torch.stack([code.dense() for code in codes])
    assert features.count_nonzero() > expected["x"].shape[1], "too few active features to compare"
    torch.testing.assert_close(features, expected["features"], rtol=1e-5, atol=1e-5)
    written = torch.stack(list(family.reconstruct(codes, x).values()))
    torch.testing.assert_close(written, expected["reconstruction"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["clt_relu", "clt_jumprelu"])
def test_reads_cross_layer_transcoders(written: Path, name: str) -> None:
    assert detect(written / name) == "circuit_tracer"
    family = read_family("circuit_tracer", written / name)
    assert family.members[0].writes == ("mlp.0", "mlp.1", "mlp.2")
    check_family(family, written / f"{name}.safetensors")


def topk(layer: int) -> Dictionary:
    """All pre-activations are positive: of others the library keeps those among the k largest, and we do not."""
    made = transcoder(layer)
    return replace(made, select="topk", settings={"k": 2}, extra={}, b_enc=torch.full_like(made.b_enc, 12.0))


EXPORTED = {
    "relu": [transcoder(layer, threshold=0.0) for layer in range(3)],
    "jumprelu": [transcoder(layer) for layer in range(3)],
    "skip": [transcoder(layer, skip=True) for layer in range(3)],
    "topk": [topk(layer) for layer in range(3)],
    "cross_layer": [transcoder(layer, 3) for layer in range(3)],
    "cross_layer_relu": [transcoder(layer, 3, threshold=0.0) for layer in range(3)],
}


@pytest.fixture(scope="module")
def read_back(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    for name, members in EXPORTED.items():
        write_family("circuit_tracer", folder / name, Family(tuple(members)))
    run_peer("circuit-tracer", SIDE, "read", folder)
    return folder


@pytest.mark.parametrize("name", EXPORTED)
def test_the_library_reads_what_we_write(read_back: Path, name: str) -> None:
    check_family(Family(tuple(EXPORTED[name])), read_back / f"{name}.safetensors")
