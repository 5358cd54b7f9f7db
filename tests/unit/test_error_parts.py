"""Components of the errors' scores and their linear part, against definitions written out densely."""

import numpy as np
import pytest
import torch

from circuitflow.attribution.cached import Cached
from circuitflow.attribution.scores import score_pairs
from circuitflow.dictionaries.dictionary import Skip, save_dictionary
from circuitflow.dictionaries.rows import open_rows
from circuitflow.error_nodes import components as component_stage
from circuitflow.error_nodes import decomposition as decomposition_stage
from circuitflow.error_nodes.components import (
    PARTS,
    components,
    mean_and_interval,
    measure_components,
    resampled,
)
from circuitflow.error_nodes.decomposition import (
    EFFECTS,
    LinearMap,
    decompose_errors,
    effects,
    errors_of,
    fit,
)
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.store.tables import read_provenance, read_table
from tests.fixtures.activation_store import write_store
from tests.fixtures.attribution_toy import (
    cached_sites,
    cut,
    identity_dictionary,
    toy_dictionary,
    toy_pairs,
    write_gradients,
)

WIDTH, D_DICT, SITE = 16, 24, "resid.0"
SKIP = Skip((0,), 5.0)


@pytest.fixture(scope="module", params=["paired", "unpaired"])
def setting(request, random_lm):
    """A site's cached values in float64, its pairs, and a dictionary with outliers."""
    pairs = toy_pairs(7, paired=request.param == "paired", seed=3)
    cached = cached_sites(random_lm("llama"), pairs, [SITE])[SITE]
    limit = float(cached.clean[pairs.mask].norm(dim=1).median())  # half of the tokens are outliers
    return cached, pairs, toy_dictionary(SITE, WIDTH, D_DICT, skip=Skip((0,), limit))


def by_definition(cached, pairs, dictionary):
    """Changes of the error and the whole at every token that counts, densely, and the mask."""
    pos = pairs.mask.shape[1]
    place = torch.arange(pos)

    def split(x):
        flat = x.reshape(-1, WIDTH)
        codes = dictionary.encode(flat, place.repeat(len(pairs)))
        return (flat - dictionary.decode(codes)).reshape(x.shape)

    whole, error = cached.patched - cached.clean, split(cached.patched) - split(cached.clean)
    alone = ~pairs.has_patch[:, None, None]
    whole = torch.where(alone, dictionary.b_dec - cached.clean, whole)
    error = torch.where(alone, -split(cached.clean), error)
    counts = pairs.mask & (place <= pairs.position[:, None])
    counts &= (place >= pairs.first_change[:, None]) | ~pairs.has_patch[:, None]
    return error * counts[..., None], whole * counts[..., None], counts


def test_components_are_norms_and_angle_of_the_changes(setting):
    cached, pairs, dictionary = setting
    found = components(dictionary, cached, pairs)
    error, whole, counts = by_definition(cached, pairs, dictionary)
    gradient = cached.gradient * counts[..., None]
    for place, change in enumerate((error, whole - error, whole)):
        delta = change.flatten(1).norm(dim=1)
        score = (gradient * change).flatten(1).sum(1)
        torch.testing.assert_close(found["delta"][:, place], delta)
        torch.testing.assert_close(found["gradient"][:, place], gradient.flatten(1).norm(dim=1))
        torch.testing.assert_close(found["score"][:, place], score)
        product = found["delta"] * found["gradient"] * found["cosine"]
        torch.testing.assert_close(product[:, place].nan_to_num(), score)
    assert found["tokens"][:, 0].tolist() == counts.sum(1).tolist()
    torch.testing.assert_close(found["score"][:, 0] + found["score"][:, 1], found["score"][:, 2])


def test_scores_are_those_of_the_scoring_stage(setting):
    cached, pairs, dictionary = setting
    nodes = score_pairs(dictionary, SITE, cut(pairs, {SITE: cached}, 3), pairs).nodes
    error = nodes["score"][nodes["kind"] == "error"]
    found = components(dictionary, cached, pairs)["score"].mean(0)
    assert float(found[0]) == pytest.approx(float(error[0]))
    assert float(found[1]) == pytest.approx(nodes["score"][nodes["kind"] == "feature"].sum())


def test_an_identity_dictionary_has_no_error_and_no_angle(setting):
    cached, pairs, _ = setting
    found = components(identity_dictionary(SITE, WIDTH), cached, pairs)
    assert float(found["delta"][:, 0].max()) < 1e-12
    exact = components(
        identity_dictionary(SITE, WIDTH), Cached(cached.clean, cached.clean, cached.gradient), pairs
    )
    if bool(pairs.has_patch.all()):  # nothing changes: no length, no angle
        assert bool((exact["delta"] == 0).all())
        assert bool(exact["cosine"].isnan().all())


def test_means_leave_out_what_is_unknown():
    counts = resampled(4, {"seed": 0, "bootstrap": 300})
    assert counts.shape == (300, 4)
    assert (counts.sum(1) == 4).all()
    mean, low, high = mean_and_interval(np.array([1.0, np.nan, 3.0, 2.0]), counts)
    assert mean == 2
    assert low < 2 < high
    assert np.isnan(mean_and_interval(np.full(4, np.nan), counts)).all()
    assert mean_and_interval(np.full(4, 0.5), counts) == (0.5, 0.5, 0.5)


def chunks(x, error, size):
    index = torch.arange(len(x))
    return (
        (index[at : at + size], x[at : at + size], error[at : at + size]) for at in range(0, len(x), size)
    )


def linear_data(n=400, seed=0, noise=0.0):
    generator = torch.Generator().manual_seed(seed)
    x = 3 + torch.randn(n, 5, generator=generator, dtype=torch.float64)
    A, b = torch.randn(5, 5, generator=generator, dtype=torch.float64), torch.arange(5.0)
    return x, x @ A + b + noise * torch.randn(n, 5, generator=generator, dtype=torch.float64), A


def test_a_linear_error_is_found_exactly_however_it_is_cut():
    x, error, A = linear_data()
    for size in (7, 400):
        fitted = fit(chunks(x, error, size), ridge=1e-14)
        torch.testing.assert_close(fitted.error(x), error)
        torch.testing.assert_close(fitted.weights[:, :-1], A)
        assert fitted.n == 400


def test_the_penalty_is_in_units_of_the_variance():
    """Against ridge regression written out; scaling x by 10 leaves predictions as they are."""
    x, error, _ = linear_data(noise=1.0)
    ridge = 0.3
    centred, target = x - x.mean(0), error - error.mean(0)
    covariance = centred.T @ centred / len(x)
    penalty = ridge * covariance.diagonal().mean() * torch.eye(5)
    wanted = error.mean(0) + centred @ torch.linalg.inv(covariance + penalty) @ (centred.T @ target / len(x))
    torch.testing.assert_close(fit(chunks(x, error, 64), ridge).error(x), wanted)
    torch.testing.assert_close(fit(chunks(10 * x, error, 64), ridge).error(10 * x), wanted)


def test_no_token_to_fit_on_is_told():
    with pytest.raises(UserError, match="add text"):
        fit(iter(()), 0.1)


def test_effects_split_into_linear_rest_and_skipped(setting):
    cached, pairs, dictionary = setting
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(WIDTH, WIDTH + 1, generator=generator, dtype=torch.float64)
    fitted = LinearMap(torch.ones(WIDTH), weights, torch.arange(WIDTH + 1.0), 1)
    found = effects(dictionary, fitted, cached, pairs)
    error, _, counts = by_definition(cached, pairs, dictionary)
    position = torch.arange(pairs.mask.shape[1]).repeat(len(pairs))

    def skipped(x):
        return dictionary.skip.mask(x.reshape(-1, WIDTH), position).view(counts.shape)

    out = skipped(cached.clean) | (skipped(cached.patched) & pairs.has_patch[:, None])
    assert bool((out & counts).any())
    assert bool((~out & counts).any())
    linear = fitted.error(cached.patched) * pairs.has_patch[:, None, None] - fitted.error(cached.clean)
    whole = (cached.gradient * error).sum(2)
    through = (cached.gradient * linear).sum(2) * counts * ~out
    wanted = torch.stack(
        [whole.sum(1), through.sum(1), (whole * ~out - through).sum(1), (whole * out).sum(1)], 1
    )
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found[:, 1:].sum(1), found[:, 0])
    if bool(pairs.has_patch.all()):  # a linear map of the change: its offset plays no part
        moved = LinearMap(fitted.centre + 1, weights, fitted.offset - 2, 1)
        torch.testing.assert_close(effects(dictionary, moved, cached, pairs), found)


@pytest.fixture
def files(random_lm, tmp_path, monkeypatch):
    """Inputs of both stages."""
    lm, splits = random_lm("llama"), {"train": toy_pairs(9, seed=1), "test": toy_pairs(5, seed=2)}
    inputs = {}
    for split, pairs in splits.items():
        inputs |= {f"tokens_{split}": split}
        inputs[f"gradients_{split}"] = write_gradients(tmp_path, split, cached_sites(lm, pairs, [SITE]))
    for module in (component_stage, decomposition_stage):
        monkeypatch.setattr(module, "load_token_pairs", splits.__getitem__)
    generator = np.random.default_rng(0)
    x = generator.normal(size=(16 * 40, WIDTH)).astype(np.float32)
    inputs["activations"] = write_store(tmp_path, "activations", {SITE: x}, [3, 9, 20, 31])
    inputs["dictionaries"] = [tmp_path / "dictionary.safetensors"]
    save_dictionary(
        inputs["dictionaries"][0], toy_dictionary(SITE, WIDTH, D_DICT, skip=SKIP).to(torch.float32)
    )
    return inputs, tmp_path


PARAMS = {
    "sites": [SITE],
    "bootstrap": 100,
    "seed": 0,
    "ridge": 1e-3,
    "rows": 10_000,
    "compute": {"device": "cpu"},
}


def test_the_stage_of_components_writes_means_and_pairs(files):
    inputs, folder = files
    out = {name: folder / f"{name}.parquet" for name in ("components", "pairs")}
    measure_components(inputs, PARAMS, Output(folder, out, {}))
    table, pairs = (read_table(out[name]) for name in ("components", "pairs"))
    assert list(table["part"]) == [*PARTS, *PARTS]
    assert list(table["n"]) == [9] * 3 + [5] * 3
    here = (pairs["split"] == "test") & (pairs["part"] == "error")
    row = np.flatnonzero((table["split"] == "test") & (table["part"] == "error"))[0]
    for name in ("delta", "gradient", "cosine", "score"):
        assert table[name][row] == pytest.approx(pairs[name][here].mean())
        assert table[f"{name}_low"][row] < table[name][row] < table[f"{name}_high"][row]
    assert list(pairs["pair"][here]) == [10, 11, 12, 13, 14]
    assert "cosine" in read_provenance(out["components"])["conventions"]


def test_the_stage_of_the_decomposition_holds_out_text(files):
    inputs, folder = files
    out = {"decomposition": folder / "decomposition.parquet"}
    decompose_errors(inputs, PARAMS, Output(folder, out, {}))
    table = read_table(out["decomposition"])
    value = {(d, q): v for d, q, v in zip(table["data"], table["quantity"], table["value"], strict=True)}
    assert set(value) == {
        *(("corpus", name) for name in ("fvu", "linear_share", "norm_share")),
        *((split, name) for split in ("train", "test") for name in EFFECTS),
    }
    rest = sum(value["train", name] for name in EFFECTS[1:])
    assert value["train", "effect"] == pytest.approx(rest, rel=1e-5)
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()
    # by the definition, on held-out rows alone
    rows = open_rows(inputs["activations"], SITE)
    dictionary = toy_dictionary(SITE, WIDTH, D_DICT, skip=SKIP).to(torch.float32)
    fitted = fit(errors_of(dictionary, rows, ~rows.held_out), PARAMS["ridge"])
    _, x, error = next(errors_of(dictionary, rows, rows.held_out))
    error = error.double()
    share = 1 - (error - fitted.error(x)).square().sum() / (error - error.mean(0)).square().sum()
    assert value["corpus", "linear_share"] == pytest.approx(float(share), rel=1e-6)
    assert table["n"][0] == len(x) < 4 * 16  # position 0 of each block is skipped


def test_an_error_that_is_not_there_has_no_share(files, tmp_path):
    inputs, folder = files
    path = tmp_path / "identity.safetensors"
    save_dictionary(path, identity_dictionary(SITE, WIDTH).to(torch.float32))
    out = {"decomposition": folder / "decomposition.parquet"}
    decompose_errors({**inputs, "dictionaries": [path]}, PARAMS, Output(folder, out, {}))
    table = read_table(out["decomposition"])
    value = dict(zip(zip(table["data"], table["quantity"], strict=True), table["value"], strict=True))
    assert value["corpus", "fvu"] < 1e-12
    assert np.isnan(value["corpus", "linear_share"])
    assert value["train", "effect"] == pytest.approx(0, abs=1e-6)
