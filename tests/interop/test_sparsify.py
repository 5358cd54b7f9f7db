"""sparsify writes and we read: the same features and reconstructions. We write and sparsify reads: the same again."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.dictionaries.formats.places import detect, locate
from circuitflow.dictionaries.formats.registry import read_dictionary, write_dictionary
from tests.fixtures.exchange import dictionary_of
from tests.fixtures.peers import check_same, run_peer

pytestmark = [pytest.mark.peers, pytest.mark.slow]
SIDE = Path(__file__).with_name("sparsify_side.py")
SITES = {
    "sae": ("resid.3", "resid.3"),
    "expanded": ("resid.3", "resid.3"),
    "skip_sae": ("resid.3", "resid.3"),
    "transcoder": ("mlp_in.3", "mlp.3"),
    "skip_transcoder": ("mlp_in.3", "mlp.3"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sparsify")
    run_peer("eai-sparsify", SIDE, "write", folder)
    return folder


@pytest.mark.parametrize("name", SITES)
def test_reads_what_the_library_writes(written: Path, name: str) -> None:
    place = locate("sparsify", written / name)
    assert detect(place.weights.parent) == "sparsify"
    dictionary = read_dictionary("sparsify", place)
    assert (dictionary.reads, dictionary.writes) == tuple((site,) for site in SITES[name])
    check_same(dictionary, written / f"{name}.safetensors")


def test_every_case_was_tried(written: Path) -> None:
    assert {folder.name for folder in written.iterdir() if folder.is_dir()} == set(SITES)


EXPORTED: dict[str, Dictionary] = {
    "topk": dictionary_of("topk"),
    "mlp": replace(dictionary_of("topk"), reads=("mlp.2",), writes=("mlp.2",)),
    "more_than_there_are": dictionary_of("topk", k=50),
    "transcoder": dictionary_of("topk", d_out=12),
    "skip_transcoder": dictionary_of("topk", d_out=12, skip=True),
}


@pytest.fixture(scope="module")
def read_back(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    for name, dictionary in EXPORTED.items():
        write_dictionary("sparsify", folder / name, dictionary)
        x = torch.randn(50, dictionary.d_in, generator=torch.Generator().manual_seed(1))
        save_file({"x": x}, folder / f"{name}.x.safetensors")
    run_peer("eai-sparsify", SIDE, "read", folder)
    return folder


@pytest.mark.parametrize("name", EXPORTED)
def test_the_library_reads_what_we_write(read_back: Path, name: str) -> None:
    check_same(EXPORTED[name], read_back / f"{name}.safetensors")
    again = read_dictionary("sparsify", locate("sparsify", read_back / name), EXPORTED[name].reads[0])
    assert (again.reads, again.writes) == (EXPORTED[name].reads, EXPORTED[name].writes)
    check_same(again, read_back / f"{name}.safetensors")
