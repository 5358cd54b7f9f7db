"""Crosscoders of two models: planted shared and exclusive features, L1's false ones found, tables and descriptions."""

import json
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from circuitflow.dictionaries.crosscoding import Crosscoder, load_crosscoder
from circuitflow.dictionaries.dictionary import Dictionary, Skip, save_dictionary
from circuitflow.dictionaries.rows import open_sites
from circuitflow.dictionaries.settings import used_family_settings
from circuitflow.dictionaries.spanning import train_family
from circuitflow.dictionaries.wiring import crosscoder
from circuitflow.diffing import describing
from circuitflow.diffing.comparison import compare_models, held_out_fvu, verdicts
from circuitflow.diffing.describing import chosen_features, describe_differences
from circuitflow.diffing.scaling import Ratios
from circuitflow.errors import UserError
from circuitflow.features.logit_weights import logit_weights
from circuitflow.jobs import Output
from circuitflow.models.loading import load_model
from circuitflow.store.tables import read_table, write_table
from tests.fixtures.activation_store import write_store

SITE = "resid.1"
NAMES = (f"base:{SITE}", f"tuned:{SITE}")
ROWS, WIDTH, BLOCK = 6144, 16, 16
SHARED, BASE, TUNED, FAINT = range(5), range(5, 7), range(7, 9), range(9, 12)
"""Planted concepts: of both models, of one alone, and of both but faint in the first."""
STRENGTH = 0.3
"""Of FAINT concepts in the first model."""
COMPUTE = {"threads": 1, "device": "cpu", "deterministic": True}
PARAMS: dict[str, Any] = {
    "site": SITE,
    "shared": [0.2, 0.8],
    "error_ratio": 0.2,
    "reconstruction_ratio": 0.5,
    "rows": 4000,
    "bootstrap": 50,
    "bootstrap_seed": 0,
    "compute": COMPUTE,
}


def directions() -> np.ndarray:
    """(12, width) orthogonal."""
    return np.linalg.qr(np.random.default_rng(1).normal(size=(WIDTH, 12)))[0].T


def two_models(root: Path) -> Path:
    """A joint store in which each concept fires on a tenth of the tokens, on its own."""
    rng = np.random.default_rng(0)
    values = rng.uniform(0.5, 1.5, (ROWS, 12)) * (rng.random((ROWS, 12)) < 0.1)
    strengths = np.ones((2, 12))
    strengths[0, TUNED] = strengths[1, BASE] = 0
    strengths[0, FAINT] = STRENGTH
    rows = [(values * strength) @ directions() + 0.3 for strength in strengths]
    arrays = {name: x.astype(np.float32) for name, x in zip(NAMES, rows, strict=True)}
    held_out = list(range(ROWS // BLOCK - 40, ROWS // BLOCK))
    return write_store(root, "joint", arrays, held_out, 1024, BLOCK)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """``trained(kind)``: store, weights and the tables of the comparison."""
    root = tmp_path_factory.mktemp("diffing")
    store = two_models(root)

    @cache
    def made(kind: str) -> Any:
        folder = root / kind
        folder.mkdir()
        training = {
            "epochs": 24.0, "batch": 256, "learning_rate": 5e-3, "warmup": 0.05, "decay": 0.3, "sparsity_warmup": 0.1,
            "auxk_weight": 0.03125, "auxk": None, "dead_after": 3000, "outlier_ratio": None, "skip_positions": [0],
            "buffer_rows": 100_000, "checkpoints": [], "evaluate_every": 1000, "clip_norm": 0.0,
        }  # fmt: skip
        values = {"kind": kind, "d_dict": 24, "k": 1, "seed": 1, "penalty": 0.7, "training": training}
        params = {
            "members": crosscoder(NAMES),
            "settings": used_family_settings(values, "crosscoder"),
            "compute": COMPUTE,
        }
        torch.set_num_threads(1)
        train_family({"activations": store}, params, Output(folder, {}, {}))
        weights = folder / "weights.safetensors"
        files = {"features": folder / "features.parquet", "summary": folder / "summary.json"}
        compare_models({"crosscoder": weights, "activations": store}, PARAMS, Output(folder, files, {}))
        return store, weights, read_table(files["features"]), json.loads(files["summary"].read_text())

    return made


def feature_of(weights: Path, concepts: range, name: str) -> list[int]:
    """The feature nearest to each concept at one site."""
    decoder = load_crosscoder(weights).decoder(name).double().numpy()
    unit = decoder / np.maximum(np.linalg.norm(decoder, axis=1, keepdims=True), 1e-9)
    cosine = directions()[list(concepts)] @ unit.T
    strong = np.linalg.norm(decoder, axis=1) > 0.1 * np.linalg.norm(decoder, axis=1).max()
    cosine[:, ~strong] = -1
    assert (cosine.max(axis=1) > 0.9).all(), cosine.max(axis=1)
    return cosine.argmax(axis=1).tolist()


def test_batchtopk_tells_shared_from_exclusive(trained: Callable[[str], Any]) -> None:
    _, weights, table, summary = trained("batchtopk")
    shared = feature_of(weights, SHARED, NAMES[0])
    assert shared == feature_of(weights, SHARED, NAMES[1])
    assert table["class"][shared].tolist() == ["shared"] * 5
    assert table["cosine"][shared].min() > 0.95
    for name, concepts in (("base", BASE), ("tuned", TUNED)):
        found = feature_of(weights, concepts, NAMES[name == "tuned"])
        assert table["class"][found].tolist() == [name] * 2
        assert table["verdict"][found].tolist() == ["exclusive"] * 2
        assert np.abs(table["nu_error"][found]).max() < 0.05
    faint = feature_of(weights, FAINT, NAMES[1])
    first, second = STRENGTH / (7 + 3 * STRENGTH**2) ** 0.5, 1 / 10**0.5  # in units of each model's spread
    assert table["rho"][faint] == pytest.approx([second / (first + second)] * 3, abs=0.02)
    assert table["class"][faint].tolist() == ["shared"] * 3
    assert summary["classes"] == {"base": 2, "shared": 8, "tuned": 2}
    assert summary["verdicts"]["base"] == {"exclusive": 2, "shrunk": 0, "decoupled": 0, "unknown": 0}
    assert max(summary["fvu"].values()) < 0.15
    assert summary["tokens"] == 4000


def test_l1_makes_faint_features_exclusive_and_the_check_finds_them(trained: Callable[[str], Any]) -> None:
    _, weights, table, summary = trained("relu")
    faint = feature_of(weights, FAINT, NAMES[1])
    assert table["class"][faint].tolist() == ["tuned"] * 3
    assert table["rho"][faint].min() > 0.95  # the first model's row has been shrunk away
    assert table["verdict"][faint].tolist() == ["shrunk"] * 3
    assert table["nu_error"][faint].min() > 0.6 * STRENGTH
    assert (table["nu_error_low"][faint] <= table["nu_error"][faint]).all()
    assert table["verdict"][feature_of(weights, TUNED, NAMES[1])].tolist() == ["exclusive"] * 2
    assert summary["verdicts"]["tuned"]["shrunk"] == 3


def test_the_table_is_the_same_again(trained: Callable[[str], Any], tmp_path: Path) -> None:
    store, weights, table, _ = trained("batchtopk")
    files = {"features": tmp_path / "features.parquet", "summary": tmp_path / "summary.json"}
    compare_models({"crosscoder": weights, "activations": store}, PARAMS, Output(tmp_path, files, {}))
    assert files["features"].read_bytes() == (weights.parent / "features.parquet").read_bytes()
    assert set(read_table(files["features"])) == set(table)


def test_a_crosscoder_of_other_sites_is_refused(trained: Callable[[str], Any], tmp_path: Path) -> None:
    store, weights, _, _ = trained("batchtopk")
    files = {"features": tmp_path / "features.parquet", "summary": tmp_path / "summary.json"}
    with pytest.raises(UserError, match=r"reads base:resid\.1, tuned:resid\.1, but base:resid\.2"):
        compare_models(
            {"crosscoder": weights, "activations": store},
            {**PARAMS, "site": "resid.2"},
            Output(tmp_path, files, {}),
        )


@pytest.mark.parametrize(
    ("error", "reconstruction", "reach", "said"),
    [
        (0.0, 0.1, 0.05, "exclusive"),
        (0.5, 0.9, 0.05, "shrunk"),
        (0.1, 0.6, 0.05, "decoupled"),
        (0.6, np.nan, 0.05, "shrunk"),  # one ratio is enough
        (np.nan, 0.6, 0.05, "decoupled"),
        (np.nan, 0.0, 0.05, "unknown"),
        (0.0, np.nan, 0.05, "unknown"),
        (0.05, 0.1, 0.9, "unknown"),  # small by chance, perhaps: the intervals reach beyond the bounds
    ],
)
def test_verdicts_by_hand(error: float, reconstruction: float, reach: float, said: str) -> None:
    ratios = {"error": np.full(4, error), "reconstruction": np.full(4, reconstruction)}
    bounds = {name: np.stack([values - reach, values + reach]) for name, values in ratios.items()}
    classes = np.array(["base", "tuned", "shared", ""], object)
    found = verdicts(classes, Ratios(**ratios, strength=np.ones(4)), bounds, error=0.2, reconstruction=0.5)
    assert found.tolist() == [said, said, "", ""]


def test_held_out_fvu_by_hand(tmp_path: Path) -> None:
    """One feature a + b, written to the first model alone, with an outlier rule."""
    rng = np.random.default_rng(0)
    a, b = 2 * rng.standard_normal((2, 4 * BLOCK, 1)).astype(np.float32)
    store = write_store(tmp_path, "joint", {NAMES[0]: a, NAMES[1]: b}, [1, 3], 16, BLOCK)
    rows, zeros = torch.tensor([[1.0, 1.0]]), torch.zeros(1)
    dictionary = Dictionary(
        "relu", NAMES, NAMES, "threshold", rows, zeros, torch.tensor([[1.0, 0.0]]), torch.zeros(2),
        Skip((0,), max_norms=(3.0, 2.0)), extra={"threshold": zeros},
    )  # fmt: skip
    found = held_out_fvu(Crosscoder(dictionary, NAMES), open_sites(store, NAMES), "cpu")
    place = np.arange(4 * BLOCK)
    kept = (place // BLOCK % 2 == 1) & (place % BLOCK > 0) & (abs(a[:, 0]) <= 3) & (abs(b[:, 0]) <= 2)
    assert 10 < kept.sum() < 26
    a, b = a[kept], b[kept]
    missed = np.square(a - np.maximum(a + b, 0)).sum() / np.square(a - a.mean()).sum()
    assert found == pytest.approx([missed, np.square(b).sum() / np.square(b - b.mean()).sum()], rel=1e-5)


def test_features_to_describe_come_by_class_and_what_they_carry() -> None:
    table = {
        "feature": np.arange(6),
        "class": np.array(["tuned", "tuned", "base", "shared", "tuned", "tuned"], object),
        "density": np.array([0.1, 0.1, 0.1, 0.1, 0.0, 0.1]),
        "verdict": np.array(["exclusive", "shrunk", "exclusive", "", "exclusive", "exclusive"], object),
        "carried": np.array([0.1, 0.9, 0.2, 0.3, 0.8, 0.4]),
    }
    assert chosen_features(table, 2) == [2, 3, 5, 0]  # 1 is doubtful, 4 never fires
    assert chosen_features(table, 9) == [2, 3, 5, 0, 1]


def words_and_vectors(folder: Path, model: Path, site: str = SITE) -> dict[str, Path]:
    """Planted vectors of the toy's width beside its words: feature i fires on word i. Compared already."""
    blocks, width, names = 8, 32, (f"base:{site}", f"tuned:{site}")
    words = np.random.default_rng(0).integers(3, 9, (blocks, BLOCK)).astype(np.int32)
    documents = np.repeat(np.arange(blocks, dtype=np.int32)[:, None], BLOCK, axis=1)
    x = (words.ravel()[:, None] == np.arange(width)).astype(np.float32)
    vectors = {names[0]: x, names[1]: x * (np.arange(width) != 4)}
    inputs = {
        "model_base": model,
        "model_tuned": model,
        "crosscoder": _coordinates(folder, width, names),
        "activations": write_store(folder, "joint", vectors, [7], 64, BLOCK),
        "corpus": write_store(folder, "corpus", {"tokens": words, "documents": documents}, [7], 4),
        "features": folder / "features.parquet",
    }
    files = {"features": inputs["features"], "summary": folder / "summary.json"}
    compare_models(inputs, {**PARAMS, "site": site, "rows": 1000}, Output(folder, files, {}))
    return inputs


def described_of(folder: Path, inputs: dict[str, Path]) -> Any:
    """The stage's JSON, and its entries by feature."""
    params = {"top": 3, "contexts": 2, "window": 3, "logits": 4, "compute": COMPUTE}
    out = Output(folder, {"descriptions": folder / "descriptions.json"}, {"stage": "test"})
    describe_differences(inputs, params, out)
    value = json.loads(out.files["descriptions"].read_text())
    return value, {entry["feature"]: entry for entry in value["features"]}


def test_descriptions_have_contexts_and_the_tokens_of_the_right_model(
    tmp_path: Path, toy_manifest: Callable[..., Path]
) -> None:
    inputs = words_and_vectors(tmp_path, toy_manifest())
    assert read_table(inputs["features"])["class"][[3, 4]].tolist() == ["shared", "base"]
    value, described = described_of(tmp_path, inputs)
    assert described[4]["class"] == "base"
    assert described[4]["logits_of"] == "base"
    assert all(entry["logits_of"] == "tuned" for entry in described.values() if entry["class"] == "shared")
    for feature, entry in described.items():
        assert [token["id"] for token in entry["fires_on"]] == [feature]
        for context in entry["contexts"]:
            assert context["tokens"][context["peak"]] == entry["fires_on"][0]["token"]
        assert len(entry["logits"]["top"]) == 4
    assert value["tokens"] == 8 * BLOCK


def test_directions_are_read_where_they_reach_the_stream(
    tmp_path: Path, toy_manifest: Callable[..., Path], toy_lm: Callable[..., Any]
) -> None:
    lm = toy_lm()
    at_z = words_and_vectors(tmp_path / "z", toy_manifest(), "z.2")
    top = described_of(tmp_path / "z", at_z)[1][4]["logits"]["top"]
    column = lm.blocks[2].self_attn.o_proj.weight[:, 4]
    weights = logit_weights(lm, column[None])[0]
    assert [token["id"] for token in top] == torch.argsort(weights, descending=True)[:4].tolist()
    at_mlp_in = words_and_vectors(tmp_path / "mlp_in", toy_manifest(), "mlp_in.2")
    _, entries = described_of(tmp_path / "mlp_in", at_mlp_in)
    assert all(entry["contexts"] for entry in entries.values())
    assert not any({"logits", "logits_of"} & set(entry) for entry in entries.values())


def test_one_model_at_a_time_is_in_memory_and_none_without_features_of_its_own(
    tmp_path: Path, toy_manifest: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = words_and_vectors(tmp_path, toy_manifest())
    loaded: list[weakref.ref[Any]] = []

    def load(path: Path, **how: Any) -> Any:
        assert all(model() is None for model in loaded)
        lm = load_model(path, **how)
        loaded.append(weakref.ref(lm.hf))
        return lm

    monkeypatch.setattr(describing, "load_model", load)
    described_of(tmp_path, inputs)
    assert len(loaded) == 2
    table = read_table(inputs["features"])
    write_table(
        inputs["features"], {**table, "class": np.where(table["class"] == "base", "", table["class"])}
    )
    described_of(tmp_path, inputs)
    assert len(loaded) == 3


def _coordinates(folder: Path, width: int, names: tuple[str, str]) -> Path:
    """Feature i is coordinate i of the first model, written to both; 4 is the first's alone."""
    eye, zeros = torch.eye(width), torch.zeros(width)
    second = eye.clone()
    second[4] = 0
    dictionary = Dictionary(
        "relu", names, names, "threshold", torch.cat([eye, torch.zeros(width, width)], dim=1), zeros,
        torch.cat([eye, second], dim=1), torch.zeros(2 * width), extra={"threshold": zeros},
    )  # fmt: skip
    save_dictionary(folder / "weights.safetensors", dictionary)
    return folder / "weights.safetensors"
