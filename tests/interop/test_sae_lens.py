"""sae-lens writes and we read: the same features and reconstructions. We write and sae-lens reads: the same again."""

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
SIDE = Path(__file__).with_name("sae_lens_side.py")

SITES = {
    "standard": "resid.3",
    "standard_raw": "resid.3",
    "hook_z": "z.3",
    "jumprelu": "resid.3",
    "topk": "resid.3",
    "topk_rescaled": "resid.3",
    "gated": "resid.3",
    "transcoder": "mlp_in.3",
    "skip_transcoder": "mlp_in.3",
    "jumprelu_transcoder": "mlp_in.3",
    "jumprelu_skip_transcoder": "mlp_in.3",
    **{
        f"{kind}{rescaled}_{state}": "resid.3"
        for kind in ("batchtopk", "matryoshka_batchtopk")
        for rescaled in ("", "_rescaled")
        for state in ("finished", "unfinished")
    },
    "earlier_relu": "resid.2",
    "earlier_topk": "resid.3",
    "earlier_z": "z.3",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sae_lens")
    run_peer("sae-lens", SIDE, "write", folder)
    return folder


@pytest.mark.parametrize("name", SITES)
def test_reads_what_the_library_writes(written: Path, name: str) -> None:
    assert detect(written / name) == "sae_lens"
    dictionary = read_dictionary("sae_lens", locate("sae_lens", written / name))
    assert dictionary.reads == (SITES[name],)
    assert dictionary.writes == (("mlp.3",) if "transcoder" in name else (SITES[name],))
    check_same(dictionary, written / f"{name}.safetensors")


GEMMA_SCOPE = {
    "res/layer_12/width_4k/average_l0_71": "resid.12",
    "res/embedding/width_4k/average_l0_6": "embed",
    "att/layer_3/width_4k/average_l0_9": "z.3",
    "mlp/layer_3/width_4k/average_l0_9": "mlp.3",
}


@pytest.mark.parametrize("name", GEMMA_SCOPE)
def test_reads_gemma_scope_as_the_library_does(written: Path, name: str) -> None:
    folder = written / f"gemma-scope-2b-pt-{name}"
    dictionary = read_dictionary("gemma_scope", locate("gemma_scope", folder))
    assert dictionary.reads == dictionary.writes == (GEMMA_SCOPE[name],)
    check_same(dictionary, folder / "computed.safetensors")


def test_every_case_was_tried(written: Path) -> None:
    folders = {folder.name for folder in written.iterdir() if folder.is_dir()}
    assert {name for name in folders if not name.startswith("gemma-scope")} == set(SITES)


EXPORTED: dict[str, Dictionary] = {
    "topk": dictionary_of("topk"),
    "jumprelu": dictionary_of("threshold"),
    "relu": dictionary_of("threshold", threshold=0.0),
    "z": replace(dictionary_of("topk"), reads=("z.2",), writes=("z.2",)),
    "embed": replace(dictionary_of("topk"), reads=("embed",), writes=("embed",)),
    "transcoder": dictionary_of("threshold", threshold=0.0, d_out=7),
    "skip_transcoder": dictionary_of("threshold", threshold=0.0, d_out=7, skip=True),
    "jumprelu_transcoder": dictionary_of("threshold", d_out=7),
    "jumprelu_skip_transcoder": dictionary_of("threshold", d_out=7, skip=True),
}


@pytest.fixture(scope="module")
def read_back(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    for name, dictionary in EXPORTED.items():
        write_dictionary("sae_lens", folder / name, dictionary)
        x = torch.randn(50, dictionary.d_in, generator=torch.Generator().manual_seed(1))
        save_file({"x": x}, folder / f"{name}.x.safetensors")
    run_peer("sae-lens", SIDE, "read", folder)
    return folder


@pytest.mark.parametrize("name", EXPORTED)
def test_the_library_reads_what_we_write(read_back: Path, name: str) -> None:
    check_same(EXPORTED[name], read_back / f"{name}.safetensors")
    again = read_dictionary("sae_lens", locate("sae_lens", read_back / name))
    assert (again.reads, again.writes) == (EXPORTED[name].reads, EXPORTED[name].writes)
    check_same(again, read_back / f"{name}.safetensors")
