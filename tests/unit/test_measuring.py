"""Quality of dictionaries: against whole-array formulas, and inside a small model."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from circuitflow.dictionaries.dictionary import NO_SKIP, Dictionary, Skip, save_dictionary
from circuitflow.dictionaries.geometry import nearest_rows, nearest_several, own_cosines
from circuitflow.dictionaries.measuring import measure_dictionary, quality_lines, splice_lines
from circuitflow.dictionaries.quality import DENSITY_EDGES, Quality, Sums, intervals, weight_statistics
from circuitflow.dictionaries.splicing import Splice
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.models.running import run
from circuitflow.store.objects import Manifest
from circuitflow.store.tables import read_provenance, read_table
from tests.fixtures.activation_store import write_store

BLOCK, BLOCKS = 12, 10
HELD_OUT = [2, 5, 7, 9]


def unit(
    d_model: int, site: str = "resid.1", skip: Skip = NO_SKIP, dtype: torch.dtype = torch.float32
) -> Dictionary:
    """Features are coordinates: the reconstruction is exact."""
    rows, zeros = torch.eye(d_model, dtype=dtype), torch.zeros(d_model, dtype=dtype)
    return Dictionary("identity", (site,), (site,), "nonzero", rows, zeros, rows, zeros, skip)


def rough(d_model: int, site: str = "resid.1", skip: Skip = NO_SKIP) -> Dictionary:
    """A random dictionary that explains a part."""
    rows = torch.randn(3 * d_model, d_model, generator=torch.Generator().manual_seed(0))
    rows /= rows.norm(dim=1, keepdim=True)
    offset = torch.linspace(-1, 1, d_model)
    kind = "random", (site,), (site,), "topk"
    return Dictionary(*kind, 0.5 * rows, torch.zeros(3 * d_model), rows, offset, skip, {"k": 4})


def silenced(dictionary: Dictionary) -> Dictionary:
    """Reconstructs every vector as zero."""
    nothing = torch.full_like(dictionary.b_enc, -1e9)
    return replace(dictionary, select="topk", b_enc=nothing, b_dec=0 * dictionary.b_dec, settings={"k": 1})


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokens(toy_lm: Callable[..., Any]) -> torch.Tensor:
    vocab = toy_lm().hf.config.vocab_size
    return torch.randint(vocab, (BLOCKS, BLOCK), generator=torch.Generator().manual_seed(0))


def spliced(lm: Any, dictionary: Dictionary, tokens: torch.Tensor, batch: int = BLOCKS) -> dict[str, float]:
    splice = Splice()
    with torch.no_grad():
        for part in tokens.split(batch):
            splice.add(lm, dictionary, part)
    return splice.values()


def test_streamed_quality_is_that_of_the_whole_array():
    dictionary, n = rough(8, skip=Skip((0,), 9.0)), 70
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(1)) + 2 * (torch.arange(8) == 3)
    x[13] *= 20
    positions = torch.arange(n) % 10
    skipped = (positions == 0) | (x.norm(dim=1) > 9)
    codes = dictionary.encode(x, positions)
    wide, decoded = x.double(), dictionary.decode(codes).double()
    blocks = torch.arange(n) // 10
    for step in (1, 9, n):
        quality = Quality(dictionary, 7)
        for part in zip(x.split(step), positions.split(step), blocks.split(step), strict=True):
            quality.add(*part)
        for sums, chosen in ((quality.kept, ~skipped), (quality.all, torch.ones(n, dtype=torch.bool))):
            a, b = wide[chosen], decoded[chosen]
            found = sums.values()
            expected = {
                "fvu": (a - b).square().sum() / (a - a.mean(0)).square().sum(),
                "l0": codes.counts()[chosen].double().mean(),
                "cosine": torch.cosine_similarity(a, b).mean(),
                "norm_ratio": (b.norm(dim=1) / a.norm(dim=1)).mean(),
            }
            assert found == pytest.approx({key: float(value) for key, value in expected.items()}, rel=1e-6)
        assert quality.skipped_share == pytest.approx(8 / n)
        density = (codes.dense() != 0).double().sum(dim=0) / int((~skipped).sum())
        assert quality.silent_share == float((density == 0).double().mean())
        assert quality.high_frequency_share == float((density > 0.1).double().mean()) > 0


def test_fvu_uses_the_mean_over_all_vectors_not_that_of_a_batch():
    """Two batches that differ in their means: batch means would give FVU 1 for a dictionary that gives 0.5."""
    x = torch.tensor([[0.0, 0.0], [0.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    zeros, rows = torch.zeros(2), torch.eye(2)
    at = ("resid.0",)
    half = Dictionary("topk", at, at, "nonzero", rows, zeros, rows * 0.5, torch.tensor([0.0, 0.0]))
    quality = Quality(half, 2)
    for block, part in enumerate(x.split(2)):
        quality.add(part, torch.ones(2, dtype=torch.int64), torch.full((2,), block))
    # errors: 0, 0, 1, 1; variance around the global mean (1, 0): 4
    assert quality.kept.values()["fvu"] == 0.5


def test_density_histogram_counts_features():
    quality, zeros = Quality(rough(8), 1), torch.zeros(1000, dtype=torch.int64)
    quality.add(torch.randn(1000, 8, generator=torch.Generator().manual_seed(1)), zeros, zeros)
    histogram = quality.density_histogram()
    alive = int((quality.fired > 0).sum())
    assert histogram.sum() == alive == round((1 - quality.silent_share) * 24)
    rates = quality.fired[quality.fired > 0] / 1000
    low = DENSITY_EDGES[-3]
    assert histogram[-2:].sum() == int((rates.double() >= 10**low).sum())
    lines = [line for line in quality_lines(quality) if line[0] == "features_by_log10_density"]
    assert [(line.low, line.high) for line in lines] == list(pairwise(DENSITY_EDGES))


def test_intervals_draw_whole_blocks():
    """By hand: three blocks of one, one and two vectors; every draw of three blocks in proportion to its chance."""
    x = torch.tensor([[0.0], [1.0], [4.0], [6.0]])
    sums = Sums(3)
    sums.add(x, 0.5 * x, torch.tensor([1, 2, 3, 5]), torch.tensor([2.0]), torch.tensor([0, 1, 2, 2]))
    draws = np.array([[1.0, 1, 1], [2, 1, 0], [0, 0, 3], [3, 0, 0]])
    found = sums.drawn(draws)
    # second draw: 0, 0, 1 with mean 1/3; third: 4, 6 three times with mean 5
    expected = [13.25 / 22.75, 0.25 / (2 / 3), 39 / 6, np.nan]
    np.testing.assert_allclose(found["fvu"], expected, rtol=1e-12)
    np.testing.assert_allclose(found["l0"], [11 / 4, 4 / 3, 4, 1], rtol=1e-12)
    counts = [(a, b, 3 - a - b) for a in range(4) for b in range(4 - a)]
    weights = [np.prod([1 / np.prod(range(1, count + 1)) for count in one]) for one in counts]
    l0 = sums.drawn(np.array(counts, float))["l0"]
    order = np.argsort(l0)
    reached = np.cumsum(np.array(weights)[order]) / np.sum(weights)
    low, high = intervals(3, 4000, 0, sums.drawn)["l0"]
    assert low == l0[order][np.searchsorted(reached, 0.025)] == 1
    assert high == l0[order][np.searchsorted(reached, 0.975)] == 4


def test_intervals_narrow_with_the_number_of_blocks():
    """The spread of a mean over 400 independent blocks: ± 1.96 σ / √400."""
    sums, generator = Sums(400), torch.Generator().manual_seed(3)
    x = torch.randn(400, 1, generator=generator)
    active = (100 + 10 * torch.randn(400, generator=generator)).round().long()
    sums.add(x, x, active, torch.zeros(1), torch.arange(400))
    low, high = intervals(400, 1000, 1, sums.drawn)["l0"]
    assert high - low == pytest.approx(2 * 1.96 * float(active.double().std()) / 20, rel=0.1)
    assert low < sums.values()["l0"] < high
    assert intervals(400, 1000, 1, sums.drawn)["l0"] == (low, high)


def test_one_block_has_no_interval():
    sums = Sums(1)
    sums.add(*2 * [torch.ones(2, 1)], torch.ones(2), torch.zeros(1), torch.zeros(2, dtype=torch.int64))
    assert np.isnan(intervals(1, 10, 0, sums.drawn)["l0"]).all()


def test_cosines_of_rows_by_hand(monkeypatch):
    rows = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0], [-1.0, -1.0], [3.0, 4.0]])
    half = 0.5**0.5
    for entries in (1, 1 << 20):
        monkeypatch.setattr("circuitflow.dictionaries.geometry.ENTRIES", entries)
        nearest, mean = own_cosines(rows)
        pairs = [0.0, half, 0.6, half, 0.8, 1.4 * half]
        assert mean == pytest.approx(np.mean(pairs), rel=1e-6)
        np.testing.assert_allclose(nearest.cosine, [0.6, 0.8, np.nan, -half, 0.8], rtol=1e-6)
        assert nearest.index.tolist() == [4, 4, -1, 0, 1]
        other = nearest_rows(rows, -rows)
        np.testing.assert_allclose(other.cosine, [half, half, np.nan, 1.4 * half, 1.4 * half], rtol=1e-6)
        assert other.index.tolist() == [3, 3, -1, 4, 3]
        index, cosine = nearest_several(rows[[0, 1, 4]], 2)
        assert index.tolist() == [[0, 2], [1, 2], [2, 1]]
        np.testing.assert_allclose(cosine, [[1, 0.6], [1, 0.8], [1, 0.8]], rtol=1e-6)


def test_nothing_is_near_without_others():
    nearest, mean = own_cosines(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert np.isnan(mean)
    assert nearest.cosine.isnan().all()
    assert nearest.index.tolist() == [-1, -1]
    assert nearest_rows(torch.ones(2, 3), torch.zeros(0, 3)).index.tolist() == [-1, -1]


def test_weight_statistics_of_known_weights():
    """Coordinates are orthogonal; a copy of one of them turns up as its neighbour; encoders may point elsewhere."""
    found = weight_statistics(unit(4))
    assert found["decoder_cosine_mean"] == found["nearest_cosine_max"] == 0
    assert found["enc_dec_cosine_p05"] == 1
    rows = torch.cat([torch.eye(4), torch.eye(4)[:1]])
    twins = replace(unit(4), W_dec=rows, W_enc=rows.roll(1, dims=1), b_enc=torch.zeros(5))
    found = weight_statistics(twins)
    assert found["nearest_cosine_max"] == 1
    assert found["nearest_cosine_mean"] == pytest.approx(0.4)
    assert found["decoder_cosine_mean"] == pytest.approx(0.1)  # 1 of 10 pairs
    assert found["enc_dec_cosine_max"] == 0
    assert all(np.isnan(value) for value in weight_statistics(silent_weights(4)).values())


def silent_weights(d_model: int) -> Dictionary:
    nothing = torch.zeros(d_model, d_model)
    return replace(unit(d_model), W_dec=nothing, W_enc=nothing)


@pytest.mark.parametrize("site", ["embed", "resid.1", "resid.3", "mlp.1"])
def test_an_exact_dictionary_loses_nothing(toy_lm, tokens, site):
    lm = toy_lm()
    values = spliced(lm, unit(32, site), tokens)
    assert values["delta_ce"] == pytest.approx(0, abs=1e-6)
    assert values["kl"] == pytest.approx(0, abs=1e-6)
    assert values["ce_recovered"] == pytest.approx(1, abs=1e-5)
    assert values["kept_as_error_share"] == 0
    own = lm.hf(tokens, labels=tokens).loss
    assert values["ce_original"] == pytest.approx(float(own), rel=1e-5)


@pytest.mark.parametrize("site", ["resid.1", "mlp.1"])
def test_a_silent_dictionary_recovers_nothing(toy_lm, tokens, site):
    values = spliced(toy_lm(), silenced(unit(32, site)), tokens)
    assert values["ce_recovered"] == 0
    assert values["ce_reconstructed"] == values["ce_zero"] != values["ce_original"]
    assert values["kl"] > 0.1


def test_values_do_not_depend_on_batches(toy_lm, tokens):
    dictionary = rough(32, skip=Skip((0,), None))
    whole, parts = (spliced(toy_lm(), dictionary, tokens, batch) for batch in (BLOCKS, 3))
    assert whole == pytest.approx(parts, rel=1e-5, abs=1e-7)
    assert whole["kl"] > 0
    assert whole["kept_as_error_share"] == pytest.approx(1 / BLOCK)


def test_kept_sinks_stay_as_they_are(toy_lm, tokens):
    """Splicing by hand with position 0 left alone gives the same cross-entropy."""
    lm, dictionary = toy_lm(), rough(32, skip=Skip((0,), None))

    def change(x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)
        decoded = dictionary.decode(
            dictionary.encode(flat, torch.ones(len(flat), dtype=torch.int64))
        ).view_as(x)
        return torch.cat([x[:, :1], decoded[:, 1:]], dim=1)

    last = run(lm, tokens, torch.ones_like(tokens, dtype=torch.bool), replace={"resid.1": change}).last
    logits = lm.unembed(last[:, :-1]).flatten(0, 1)
    by_hand = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
    assert spliced(lm, dictionary, tokens)["ce_reconstructed"] == pytest.approx(float(by_hand), rel=1e-5)


@pytest.fixture(scope="module")
def inputs(toy_manifest, toy_lm, tokens) -> dict[str, Path]:
    model = toy_manifest()
    root = model.parent.parent
    everything = torch.ones_like(tokens, dtype=torch.bool)
    x = run(toy_lm(), tokens, everything, capture=["resid.1"]).sites["resid.1"].flatten(0, 1).numpy()
    return {
        "model": model,
        "corpus": write_store(
            root, "corpus", {"tokens": tokens.numpy().astype(np.int32)}, HELD_OUT, 4, BLOCK
        ),
        "activations": write_store(root, "activations", {"resid.1": x}, HELD_OUT, 24, BLOCK),
    }


def measured(
    inputs: dict[str, Path],
    dictionary: Dictionary,
    folder: Path,
    details: dict[str, Any] | None = None,
    **params: Any,
) -> Path:
    root = inputs["model"].parent.parent
    name = folder.name
    save_dictionary(root / "objects" / name / "weights.safetensors", dictionary)
    manifest = root / "dictionaries" / f"{name}.json"
    Manifest("dictionary", name, "content", {}, details or {}).write(manifest)
    out = Output(folder, {"quality": folder / "quality.parquet"}, {"seed": 0})
    compute = {"threads": 1, "device": "cpu", "deterministic": True}
    params = {
        "site": "resid.1",
        "blocks": 3,
        "batch_blocks": 2,
        "dtype": "float32",
        "compute": compute,
        "bootstrap": 100,
        "seed": 7,
        **params,
    }
    measure_dictionary({**inputs, "dictionary": manifest}, params, out)
    return out.files["quality"]


def test_stage_writes_a_table_about_held_out_tokens_alone(inputs, tokens, toy_lm, tmp_path):
    dictionary = rough(32, skip=Skip((0,), None))
    path = measured(inputs, dictionary, tmp_path)
    table = read_table(path)
    found = {
        (q, t): (v, n)
        for q, t, v, n in zip(*(table[c] for c in ("quantity", "tokens", "value", "n")), strict=True)
    }
    held_out = tokens[HELD_OUT]
    x = run(toy_lm(), held_out, torch.ones_like(held_out, dtype=torch.bool), capture=["resid.1"]).sites[
        "resid.1"
    ]
    quality = Quality(dictionary, len(HELD_OUT))
    blocks = torch.arange(len(HELD_OUT)).repeat_interleave(BLOCK)
    quality.add(x.flatten(0, 1), torch.arange(BLOCK).repeat(len(HELD_OUT)), blocks)
    assert found["fvu", "kept"] == pytest.approx((quality.kept.values()["fvu"], 4 * (BLOCK - 1)), rel=1e-5)
    assert found["fvu", "all"] == pytest.approx((quality.all.values()["fvu"], 4 * BLOCK), rel=1e-5)
    assert found["skipped_share", "all"][0] == pytest.approx(1 / BLOCK)
    spread = held_out[[0, 1, 3]]  # three of four blocks, first and last among them
    expected = spliced(toy_lm(), dictionary, spread)
    assert found["ce_recovered", "all"] == pytest.approx(
        (expected["ce_recovered"], 3 * (BLOCK - 1)), rel=1e-4
    )
    assert "ce_recovered" in read_provenance(path)["conventions"]
    bounds = {(line.quantity, line.tokens): line[-2:] for line in quality_lines(quality, 100, 7)}
    splice = Splice()
    with torch.no_grad():
        splice.add(toy_lm(), dictionary, spread)
    bounds |= {(line.quantity, line.tokens): line[-2:] for line in splice_lines(splice, 100, 7)}
    for key in (("fvu", "kept"), ("l0", "all"), ("ce_recovered", "all"), ("kl", "all"), ("delta_ce", "all")):
        row = list(zip(table["quantity"], table["tokens"], strict=True)).index(key)
        low, value, high = (table[name][row] for name in ("ci_low", "value", "ci_high"))
        assert low <= value <= high, key
        assert (low, high) == pytest.approx(bounds[key], rel=1e-4), key
    assert found["nearest_cosine_max", "weights"] == (
        pytest.approx(weight_statistics(dictionary)["nearest_cosine_max"]),
        dictionary.d_dict,
    )


def test_stage_gives_equal_bytes_and_bounds_its_blocks(inputs, tmp_path):
    dictionary = rough(32)
    first = measured(inputs, dictionary, tmp_path / "a").read_bytes()
    assert measured(inputs, dictionary, tmp_path / "b").read_bytes() == first
    table = read_table(measured(inputs, dictionary, tmp_path / "c", blocks=100))
    assert table["n"][table["quantity"].tolist().index("kl")] == len(HELD_OUT) * (BLOCK - 1)


def test_a_bare_decoder_has_an_empty_table(inputs, tmp_path):
    bare = replace(rough(32), kind="pretrained", W_enc=None)
    table = read_table(measured(inputs, bare, tmp_path))
    assert list(table) == ["quantity", "tokens", "low", "high", "value", "n", "ci_low", "ci_high"]
    assert len(table["value"]) == 0


def test_dead_features_are_those_of_the_training(inputs, tmp_path):
    table = read_table(measured(inputs, rough(32), tmp_path / "made"))
    assert np.isnan(table["value"][table["quantity"].tolist().index("dead_share")])
    trained = read_table(measured(inputs, rough(32), tmp_path / "trained", details={"last": {"dead": 0.25}}))
    assert trained["value"][trained["quantity"].tolist().index("dead_share")] == 0.25


def test_another_seed_moves_intervals_alone(inputs, tmp_path):
    first, second = (
        read_table(measured(inputs, rough(32), tmp_path / str(seed), seed=seed, bootstrap=50))
        for seed in (0, 1)
    )
    np.testing.assert_array_equal(first["value"], second["value"])
    assert not np.array_equal(first["ci_low"], second["ci_low"], equal_nan=True)


def test_a_dictionary_that_writes_elsewhere_is_refused(inputs, tmp_path):
    transcoder = replace(rough(32), kind="pretrained", reads=("mlp_in.1",), writes=("mlp.1",))
    with pytest.raises(UserError, match=r"reads mlp_in\.1 and writes mlp\.1"):
        measured(inputs, transcoder, tmp_path)
