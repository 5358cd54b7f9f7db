"""The harvest: the model's own values, one pass per batch and no deeper than needed, whole after any interruption."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.harvest_memory import ROW_BYTES, peak
from circuitflow.data import activations
from circuitflow.data.activations import cache_activations
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.store.arrays import ArraySpec, Store, StoreWriter
from circuitflow.store.objects import Manifest

BLOCKS, BLOCK = 23, 8
SITES = ["resid.0", "z.0", "embed", "mlp.0"]
PARAMS: dict[str, Any] = {
    "sites": SITES,
    "dtype": "float32",
    "shard_rows": 5 * BLOCK,
    "batch_blocks": 2,
    "model_dtype": "float64",
    "compute": {"threads": 1, "device": "cpu", "deterministic": True},
}


@pytest.fixture
def lm(random_lm, monkeypatch) -> Any:
    model = random_lm("llama")
    monkeypatch.setattr(activations, "load_model", lambda manifest, dtype, device: model)
    return model


@pytest.fixture
def corpus(tmp_path, lm) -> Path:
    tokens = np.random.default_rng(0).integers(0, lm.hf.config.vocab_size, (BLOCKS, BLOCK))
    writer = StoreWriter(
        tmp_path / "objects" / "c", {"tokens": ArraySpec(tokens.shape, "int32")}, 100, {"held_out_blocks": 2}
    )
    writer.write_shard(0, {"tokens": tokens})
    content, details = writer.finish()
    Manifest("store", "c", content, {}, details).write(tmp_path / "corpus" / "manifest.json")
    return tmp_path / "corpus" / "manifest.json"


@pytest.fixture
def harvest(corpus, tmp_path) -> Callable[..., Output]:
    def run(name: str = "h", **changes: Any) -> Output:
        out = Output(tmp_path / name, {}, {})
        cache_activations({"model": Path("unused"), "corpus": corpus}, {**PARAMS, **changes}, out)
        return out

    return run


def tokens_of(corpus: Path) -> torch.Tensor:
    folder = corpus.parent.parent / "objects" / "c"
    return torch.from_numpy(Store(folder, corpus).read("tokens")).long()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_rows_are_the_models_own_values_in_the_order_of_the_corpus(harvest, corpus, lm):
    out = harvest()
    store = Store(out.folder, corpus)
    with torch.no_grad():
        reference = lm.hf(tokens_of(corpus), output_hidden_states=True).hidden_states
    for site, expected in (("embed", reference[0]), ("resid.0", reference[1])):
        read = store.read(site)
        assert read.shape == (BLOCKS * BLOCK, lm.d_model)
        np.testing.assert_allclose(read, expected.flatten(0, 1).float().numpy(), rtol=2e-6, atol=1e-6)
    assert store.shape("z.0") == (BLOCKS * BLOCK, lm.width("z.0"))
    assert lm.width("z.0") != lm.d_model
    assert store.attrs == {"held_out_blocks": 2, "block": BLOCK}
    assert out.content == store.content


def test_one_pass_per_batch_no_deeper_than_the_deepest_site(harvest, lm):
    entered = [0, 0]

    def enter(index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            entered[index] += 1

        return hook

    hooks = [block.register_forward_pre_hook(enter(index)) for index, block in enumerate(lm.blocks)]
    try:
        harvest()
    finally:
        for hook in hooks:
            hook.remove()
    assert entered == [14, 0]  # four shards of 5 blocks in 3 batches each, one of 3 blocks in 2


def test_batches_do_not_cross_shards_and_every_block_is_run_once(harvest, monkeypatch):
    batches = []
    real = activations.run

    def counting(lm, tokens, mask, **options):
        batches.append(len(tokens))
        assert mask.all()
        assert list(options["capture"]) == SITES
        return real(lm, tokens, mask, **options)

    monkeypatch.setattr(activations, "run", counting)
    harvest()
    assert batches == [2, 2, 1] * 4 + [2, 1]


@pytest.mark.parametrize("after", range(1, 14))
def test_an_interrupted_harvest_goes_on_at_the_shard_with_identical_bytes(
    harvest, monkeypatch, caplog, after
):
    whole = harvest("whole")
    passes = []
    real = activations.run

    def dying(*args, **options):
        if len(passes) == after:
            raise KeyboardInterrupt
        passes.append(None)
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(activations, "run", dying)
        with pytest.raises(KeyboardInterrupt):
            harvest("broken")
    passes.clear()
    monkeypatch.setattr(
        activations, "run", lambda *args, **options: (passes.append(None), real(*args, **options))[1]
    )
    monkeypatch.setattr(activations.logger, "propagate", True)
    with caplog.at_level(logging.INFO, "circuitflow"):
        resumed = harvest("broken")
    kept = after // 3  # shards of 3 batches that were done
    assert len(passes) == 14 - 3 * kept
    assert (f"{5 * kept} of {BLOCKS} blocks are kept" in caplog.text) == (kept > 0)
    assert (resumed.content, resumed.details) == (whole.content, whole.details)
    assert files(resumed.folder) == files(whole.folder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_on_disk_is_the_rounded_value(harvest, corpus, dtype):
    exact = Store(harvest("exact").folder, corpus).read("resid.0")
    half = harvest("half", dtype=dtype)
    rounded = torch.from_numpy(exact).to(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(Store(half.folder, corpus).read("resid.0"), rounded)
    shard = half.folder / "store.zarr" / "resid.0" / "c" / "0" / "0"
    assert shard.stat().st_size < 0.6 * (harvest("exact").folder / "store.zarr/resid.0/c/0/0").stat().st_size


def test_values_too_large_for_half_precision_are_one_sentence(harvest, lm, monkeypatch):
    real = activations.run

    def huge(*args, **options):
        result = real(*args, **options)
        result.sites["resid.0"] *= 1e7
        return result

    monkeypatch.setattr(activations, "run", huge)
    with pytest.raises(
        UserError, match=r"'resid\.0', rows 0 to 39 reach .* set dtype to bfloat16 or float32"
    ):
        harvest(dtype="float16")


def test_mistakes_are_told_before_the_model_runs(harvest, monkeypatch):
    monkeypatch.setattr(activations, "run", None)
    with pytest.raises(UserError, match=r"activations\.shard_rows is 30, .* set it to 24"):
        harvest(shard_rows=30)
    with pytest.raises(UserError, match=r"resid\.9"):
        harvest(sites=["resid.9"])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_peak_memory_does_not_grow_with_the_corpus():
    """Of the values added, a quarter in memory would already be too much."""
    once, eight_times = peak(64), peak(512)
    assert eight_times.rows == 8 * once.rows
    added = (eight_times.rows - once.rows) * ROW_BYTES / 2**20
    assert eight_times.megabytes - once.megabytes < added / 4
