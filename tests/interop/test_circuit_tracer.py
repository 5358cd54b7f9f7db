"""circuit-tracer writes and we read: the same features and reconstructions, of Gemma Scope's files too."""

from pathlib import Path

import pytest

from circuitflow.dictionaries.formats.places import detect, locate
from circuitflow.dictionaries.formats.registry import read_dictionary
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
