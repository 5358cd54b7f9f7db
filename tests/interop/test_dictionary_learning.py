"""dictionary_learning writes and we read: the features and reconstructions of the SAE that its own loader gives."""

from pathlib import Path

import pytest

from circuitflow.dictionaries.formats.places import detect, locate
from circuitflow.dictionaries.formats.registry import read_dictionary
from tests.fixtures.peers import check_same, run_peer

pytestmark = [pytest.mark.peers, pytest.mark.slow]
SIDE = Path(__file__).with_name("dictionary_learning_side.py")
NAMES = ("relu", "relu_new", "gated", "jumprelu", "topk", "batchtopk", "batchtopk_untrained", "matryoshka")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dictionary_learning")
    run_peer("dictionary-learning", SIDE, "write", folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_reads_what_the_library_writes(written: Path, name: str) -> None:
    assert detect(written / name) == "dictionary_learning"
    dictionary = read_dictionary(
        "dictionary_learning", locate("dictionary_learning", written / name), "resid.3"
    )
    assert dictionary.reads == dictionary.writes == ("resid.3",)
    check_same(dictionary, written / f"{name}.safetensors")


def test_every_case_was_tried(written: Path) -> None:
    assert {folder.name for folder in written.iterdir() if folder.is_dir()} == set(NAMES)
