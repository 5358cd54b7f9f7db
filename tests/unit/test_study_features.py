"""The study of one dictionary: planted activations whose statistics are known, and brute force."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.dictionaries.rows import open_rows
from circuitflow.errors import UserError
from circuitflow.features import study
from circuitflow.features.held_out import HeldOut, encode_kept
from circuitflow.features.statistics import NOISE, Usage, strength, usage
from circuitflow.features.study import study_features
from circuitflow.jobs import Output
from circuitflow.store.tables import read_provenance, read_table
from tests.fixtures.activation_store import SITE
from tests.fixtures.planted_study import (
    BLOCK,
    HELD_OUT,
    SKIP,
    WIDTH,
    Letters,
    Planted,
    exact,
    planted_text,
    write_activations,
    write_corpus,
    write_dictionary,
)

TABLES = ("features", "emergence", "checkpoints", "correlation", "heatmap", "projection")
COMPUTE = {"threads": 1, "device": "cpu", "deterministic": True}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "load_tokenizer", lambda manifest: Letters())


@pytest.fixture(scope="module")
def planted() -> Planted:
    return planted_text()


def rough(seed: int = 0, d_dict: int = 9) -> Dictionary:
    """Random directions around the mean: values, errors and norms of every sign and size."""
    generator = torch.Generator().manual_seed(seed)
    enc, dec = (torch.randn(d_dict, WIDTH, generator=generator) / 4 for _ in range(2))
    text = planted_text()
    mean = torch.from_numpy(text.x[text.held_out].mean(axis=0))
    kind = ("topk", (SITE,), (SITE,), "topk")
    return Dictionary(*kind, enc, -enc @ mean, enc + dec, mean, SKIP, {"k": 3}, {"step": 5, "tokens": 50})


def held_out_of(root: Path, planted: Planted) -> HeldOut:
    return HeldOut(open_rows(write_activations(root, planted.x), SITE), SKIP, torch.device("cpu"))


def studied(
    root: Path,
    planted: Planted,
    dictionary: Dictionary,
    checkpoints: dict[int, Dictionary] | None = None,
    name: str = "study",
    **params: Any,
) -> dict[str, dict[str, np.ndarray]]:
    inputs = {
        "dictionary": write_dictionary(root, name, dictionary, checkpoints),
        "activations": write_activations(root, planted.x),
        "corpus": write_corpus(root),
        "model": root / "model.json",
    }
    params = {
        "site": SITE,
        "settings": {"kind": "relu"},
        "features": 4,
        "seed": 0,
        "compute": COMPUTE,
        **params,
    }
    folder = root / name
    out = Output(folder, {table: folder / f"{table}.parquet" for table in TABLES}, {"params": params})
    study_features(inputs, params, out)
    return {table: read_table(path) for table, path in out.files.items()}


def test_planted_densities_and_strengths_are_found(tmp_path, planted):
    tables = studied(tmp_path, planted, exact(planted))
    found, kept = tables["features"], planted.held_out
    assert len(kept) == len(HELD_OUT) * (BLOCK - 1) - 1  # without first positions and the outlier
    values = planted.values[kept]
    active = values > 0
    np.testing.assert_array_equal(found["feature"], np.arange(6))
    np.testing.assert_allclose(found["density"], active.mean(axis=0), rtol=1e-12)
    quarters = [[1, 4], [5], [8], [9]]
    for number, blocks in enumerate(quarters, 1):
        here = np.isin(kept // BLOCK, blocks)
        np.testing.assert_allclose(found[f"density_q{number}"], active[here].mean(axis=0), rtol=1e-12)
    mean = np.divide(values.sum(axis=0), active.sum(axis=0), out=np.full(6, np.nan), where=active.any(axis=0))
    np.testing.assert_allclose(found["mean_active"], mean, rtol=1e-5)
    np.testing.assert_allclose(found["max_value"], values.max(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found["decoder_norm"], 1, rtol=1e-6)
    np.testing.assert_allclose(found["enc_dec_cosine"], 1, rtol=1e-6)
    np.testing.assert_allclose(found["nearest_cosine"], 0, atol=1e-6)
    # orthogonal features, errors outside their space: removing one costs its squared values
    variance = np.square(planted.x[kept] - planted.x[kept].mean(axis=0)).sum()
    np.testing.assert_allclose(
        found["importance"], np.square(values).sum(axis=0) / variance, rtol=1e-4, atol=1e-7
    )
    assert found["rank"].tolist() == (1 + np.argsort(np.argsort(-found["importance"]))).tolist()
    assert np.isnan(found["map_x"]).all()  # five features are no map
    assert (found["cluster"] == -1).all()
    facts = read_provenance(tmp_path / "study" / "features.parquet")["facts"]
    assert facts["n"] == len(kept)
    assert facts["quarter_tokens"] == [int(np.isin(kept // BLOCK, blocks).sum()) for blocks in quarters]


def test_importance_is_what_removing_a_feature_costs(tmp_path, planted):
    dictionary, held_out = rough(), held_out_of(tmp_path, planted)
    x = torch.from_numpy(planted.x[planted.held_out])
    codes = encode_kept(dictionary, x)
    error = (x - dictionary.decode(codes)).double().square().sum()
    variance = (x - x.mean(dim=0)).double().square().sum()
    expected = []
    for feature in range(dictionary.d_dict):
        without = codes.select(torch.arange(dictionary.d_dict) != feature)
        expected.append(float(((x - dictionary.decode(without)).double().square().sum() - error) / variance))
    used = usage(dictionary, held_out)
    found = strength(dictionary, held_out, 0).columns(used.sums.variance)
    np.testing.assert_allclose(found["importance"], expected, rtol=1e-4)
    assert min(expected) < 0 < max(expected)
    assert used.summary()["fvu"] == pytest.approx(float(error / variance), rel=1e-5)


def test_sensitivity_is_the_share_of_activity_that_noise_changes(tmp_path, planted):
    dictionary, held_out = rough(), held_out_of(tmp_path, planted)
    kept = planted.held_out
    x = torch.from_numpy(planted.x[kept])
    reach = NOISE * (x - x.mean(dim=0)).norm(dim=1, keepdim=True)
    noise = reach * held_out.noise(kept, 3) / WIDTH**0.5
    assert float((noise.norm(dim=1) / reach[:, 0]).mean()) == pytest.approx(1, rel=0.1)
    before, after = (encode_kept(dictionary, moved).dense().double() for moved in (x, x + noise))
    expected = (after - before).abs().sum(dim=0) / before.abs().sum(dim=0)
    found = strength(dictionary, held_out, 3).columns(1.0)["sensitivity"]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert ((before == 0) != (after == 0)).any(), "noise should also start and stop some firing"
    assert np.isnan(strength(exact(planted), held_out, 3).columns(1.0)["sensitivity"][-1])


def test_a_linear_feature_moves_as_far_as_the_noise_along_its_encoder_row(tmp_path, planted):
    """Always active: f = v + 50, so that the mean of |Δf| is ‖w‖·√(2/π) of the noise's standard deviation."""
    held_out, plain = held_out_of(tmp_path, planted), exact(planted)
    for length in (1, 2):
        linear = replace(plain, W_enc=length * plain.W_enc, b_enc=torch.full((6,), 50.0))
        found = strength(linear, held_out, 0).columns(1.0)
        x = planted.x[planted.held_out]
        deviation = NOISE * np.linalg.norm(x - x.mean(axis=0), axis=1).mean() / WIDTH**0.5
        moved = found["sensitivity"] * found["mean_active"]
        assert moved.mean() == pytest.approx(length * deviation * (2 / np.pi) ** 0.5, rel=0.1)


def test_tables_do_not_depend_on_chunks(tmp_path, planted, monkeypatch):
    whole = studied(tmp_path, planted, rough(), name="whole")
    monkeypatch.setattr("circuitflow.features.held_out.CHUNK_ROWS", 5)
    parts = studied(tmp_path, planted, rough(), name="parts")
    for table in TABLES:
        for column, values in whole[table].items():
            if values.dtype.kind == "f":
                np.testing.assert_allclose(parts[table][column], values, rtol=1e-4, atol=1e-6, err_msg=column)
            else:
                np.testing.assert_array_equal(parts[table][column], values, err_msg=column)


def test_training_tokens_and_outliers_change_nothing(tmp_path, planted):
    other = planted.x.copy()
    row = np.arange(len(other))
    other[~np.isin(row // BLOCK, HELD_OUT)] = 7.0
    other[row % BLOCK == 0] *= -3
    for name, x in (("a", planted.x), ("b", other)):
        studied(tmp_path / name, replace(planted, x=x), rough())
    for table in TABLES:
        a, b = (tmp_path / name / "study" / f"{table}.parquet" for name in ("a", "b"))
        assert a.read_bytes() == b.read_bytes(), table


def test_renumbered_features_keep_their_rows(tmp_path, planted):
    order = np.random.default_rng(1).permutation(9)
    plain = rough()
    renumbered = replace(plain, W_enc=plain.W_enc[order], b_enc=plain.b_enc[order], W_dec=plain.W_dec[order])
    a, b = (
        studied(tmp_path, planted, each, name=name)
        for each, name in ((plain, "plain"), (renumbered, "renumbered"))
    )
    for column in ("density", "mean_active", "importance", "sensitivity", "nearest_cosine", "rank"):
        np.testing.assert_allclose(
            b["features"][column], a["features"][column][order], rtol=1e-5, err_msg=column
        )
    np.testing.assert_array_equal(order[b["features"]["nearest"]], a["features"]["nearest"][order])
    np.testing.assert_allclose(b["correlation"]["correlation"], a["correlation"]["correlation"], atol=1e-6)


def test_correlations_are_those_of_dense_values(tmp_path, planted):
    tables = studied(tmp_path, planted, rough())
    rank = tables["features"]["rank"]
    top = np.argsort(rank)[:4]
    x = torch.from_numpy(planted.x[planted.held_out])
    expected = np.corrcoef(encode_kept(rough(), x).dense()[:, top].double().numpy().T)
    found = tables["correlation"]
    np.testing.assert_array_equal(found["feature_a"], np.repeat(top, 4))
    np.testing.assert_array_equal(found["feature_b"], np.tile(top, 4))
    np.testing.assert_allclose(found["correlation"].reshape(4, 4), expected, atol=1e-6)


def test_planted_correlation_signs():
    """Two features that fire together, one that fires instead, one that always fires alike."""
    from circuitflow.features.together import _correlation

    together = np.array([1.0, 2, 0, 0, 3, 0])
    values = np.stack([together, 2 * together, 3 - together, np.full(6, 4.0)], axis=1)
    found = _correlation(6, values.sum(axis=0), values.T @ values)
    np.testing.assert_allclose(found[:3, :3], [[1, 1, -1], [1, 1, -1], [-1, -1, 1]], atol=1e-9)
    assert np.isnan(found[3]).all()


def test_heat_map_shows_the_text_where_most_features_fire(tmp_path, planted):
    values = planted.values.copy()
    for block, kept in ((1, 0), (4, 1), (5, 3), (8, 4), (9, 2)):  # how many features may fire there
        values[block * BLOCK :][:BLOCK, kept:] = 0
    planted = replace(planted, x=planted.x + (values - planted.values) @ planted.rows, values=values)
    tables = studied(tmp_path, planted, exact(planted))
    found, top = tables["heatmap"], np.argsort(tables["features"]["rank"])[:4]
    dense = np.zeros_like(planted.values)
    dense[planted.held_out] = planted.values[planted.held_out]
    in_block = {block: (dense[block * BLOCK :][:BLOCK][:, top] > 0).any(axis=0).sum() for block in HELD_OUT}
    best = max(HELD_OUT, key=in_block.__getitem__)
    assert list(in_block.values()).count(in_block[best]) == 1
    assert set(found["block"]) == {best}
    rows = best * BLOCK + np.arange(BLOCK)
    np.testing.assert_allclose(found["value"].reshape(4, BLOCK), dense[rows][:, top].T, rtol=1e-4, atol=1e-6)
    assert found["token"].tolist() == 4 * [chr(97 + row % 26) for row in rows]
    assert found["position"].tolist() == 4 * list(range(BLOCK))
    np.testing.assert_array_equal(found["feature"], np.repeat(top, BLOCK))


def test_projection_names_the_strongest_feature_of_each_token(tmp_path, planted):
    dictionary = rough()
    found, kept = studied(tmp_path, planted, dictionary)["projection"], planted.held_out
    np.testing.assert_array_equal(found["block"] * BLOCK + found["position"], kept)
    assert found["token"].tolist() == [chr(97 + row % 26) for row in kept]
    codes = encode_kept(dictionary, torch.from_numpy(planted.x[kept])).dense()
    np.testing.assert_array_equal(found["top_feature"], (codes * dictionary.W_dec.norm(dim=1)).argmax(dim=1))
    facts = read_provenance(tmp_path / "study" / "projection.parquet")["facts"]
    assert sum(facts["cluster_sizes"]) == len(kept)
    silent = replace(dictionary, b_enc=torch.full((9,), -1e6))
    assert set(studied(tmp_path, planted, silent, name="silent")["projection"]["top_feature"]) == {-1}


def test_emergence_finds_features_wherever_they_were(tmp_path, planted):
    """Half of the features stood at step 9 under other numbers, all at step 10; steps are ordered as numbers."""
    final = exact(planted)
    order = torch.tensor([3, 4, 5, 0, 1, 2])
    rows = torch.from_numpy(np.linalg.qr(np.random.default_rng(5).standard_normal((WIDTH, 6)))[0].T).float()
    early = torch.cat([rows[:3], final.W_dec[:3]])  # features 0, 1, 2 are rows 3, 4, 5
    steps = {
        10: replace(
            final, W_enc=final.W_enc[order], W_dec=final.W_dec[order], notes={"step": 10, "tokens": 1000}
        ),
        9: replace(final, W_dec=early, W_enc=early, notes={"step": 9, "tokens": 900}),
    }
    tables = studied(tmp_path, planted, final, steps)
    found = {name: values.reshape(3, 6) for name, values in tables["emergence"].items()}
    assert found["step"][:, 0].tolist() == [9, 10, 20]
    assert found["tokens"][:, 0].tolist() == [900, 1000, 2000]
    cosines = (planted.rows.astype(np.float64) @ early.T.double().numpy()).max(axis=1)
    np.testing.assert_allclose(found["match"], [cosines, np.ones(6), np.ones(6)], rtol=1e-5, atol=1e-6)
    assert found["matched"][0, :3].tolist() == [3, 4, 5]
    assert found["matched"][1:].tolist() == [[3, 4, 5, 0, 1, 2], list(range(6))]
    density = tables["features"]["density"]
    np.testing.assert_allclose(found["density"][1:], [density, density])
    np.testing.assert_allclose(found["density"][0, :3], density[:3])
    table = tables["checkpoints"]
    assert table["step"].tolist() == [9, 10, 20]
    alive = density > 0
    assert table["present_share"].tolist() == [(cosines[alive] > 0.9).mean(), 1, 1]
    assert 0 < table["present_share"][0] < 1
    np.testing.assert_allclose(table["match_mean"], [cosines[alive].mean(), 1, 1], rtol=1e-5)
    np.testing.assert_allclose(table["silent_share"][1:], 1 / 6)
    np.testing.assert_allclose(table["high_frequency_share"][2], (density > 0.1).mean())
    np.testing.assert_allclose(table["density_p50"][2], np.median(density[alive]))
    assert table["fvu"][0] > 2 * table["fvu"][2] > 0
    assert table["l0"][2] == pytest.approx((planted.values[planted.held_out] > 0).sum(axis=1).mean())
    np.testing.assert_allclose(table["decoder_cosine_mean"][1:], 0, atol=1e-6)


def test_a_dictionary_without_checkpoints_has_one_step(tmp_path, planted):
    tables = studied(tmp_path, planted, exact(planted, notes={}))
    assert tables["checkpoints"]["step"].tolist() == [0]
    np.testing.assert_allclose(tables["emergence"]["match"], 1, rtol=1e-6)


def test_stability_compares_the_halves_of_the_text():
    used = Usage(5)
    used.fired[:] = [[1, 2, 4, 0, 9], [0, 2, 4, 3, 0], [2, 5, 5, 0, 0], [0, 3, 11, 0, 0]]
    # firings by half: (1, 4, 8, 3, 9) and (2, 8, 16, 0, 0); twice as many in the second for those in both
    assert used.stability == pytest.approx(1)
    used.fired[3, 0] = 30
    assert used.stability == pytest.approx(np.corrcoef(np.log([1, 4, 8]), np.log([32, 8, 16]))[0, 1])
    assert np.isnan(Usage(5).stability)


def test_equal_studies_give_equal_bytes(tmp_path, planted):
    for name in ("a", "b"):
        studied(tmp_path / name, planted, rough(), {2: rough(1)})
    for table in TABLES:
        a, b = (tmp_path / name / "study" / f"{table}.parquet" for name in ("a", "b"))
        assert a.read_bytes() == b.read_bytes(), table


def test_a_bare_decoder_cannot_be_studied(tmp_path, planted):
    with pytest.raises(UserError, match="decoder only"):
        studied(tmp_path, planted, exact(planted, W_enc=None))


def test_a_transcoder_cannot_be_studied(tmp_path, planted):
    with pytest.raises(UserError, match=r"reads mlp_in\.1 and writes mlp\.1"):
        studied(tmp_path, planted, exact(planted, reads=("mlp_in.1",), writes=("mlp.1",)))


def test_text_of_outliers_alone_is_refused(tmp_path, planted):
    with pytest.raises(UserError, match="Every held-out token"):
        studied(tmp_path, replace(planted, x=planted.x + 1e6), exact(planted))
