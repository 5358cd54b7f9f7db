"""Crosscoders of two models: planted shared and exclusive features, L1's false ones found, tables and descriptions."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from circuitflow.dictionaries.crosscoding import load_crosscoder
from circuitflow.dictionaries.dictionary import Dictionary, save_dictionary
from circuitflow.dictionaries.settings import used_family_settings
from circuitflow.dictionaries.spanning import train_family
from circuitflow.dictionaries.wiring import crosscoder
from circuitflow.diffing.comparison import compare_models, verdicts
from circuitflow.diffing.describing import chosen_features, describe_differences
from circuitflow.diffing.scaling import Ratios
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.store.tables import read_table
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


def test_verdicts_by_hand() -> None:
    classes = np.array(["base", "tuned", "tuned", "shared", "base", ""], object)
    found = Ratios(
        error=np.array([0.0, 0.5, 0.1, 0.9, np.nan, 0.0]),
        reconstruction=np.array([0.1, 0.9, 0.6, 0.9, 0.0, 0.0]),
        strength=np.ones(6),
    )
    said = verdicts(classes, found, error=0.2, reconstruction=0.5)
    assert said.tolist() == ["exclusive", "shrunk", "decoupled", "", "unknown", ""]


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


def test_descriptions_have_contexts_and_the_tokens_of_the_right_model(
    trained: Callable[[str], Any], tmp_path: Path, toy_manifest: Callable[..., Path]
) -> None:
    """Planted vectors of the toy's width beside its words: feature i fires on word i."""
    blocks, width = 8, 32
    words = np.random.default_rng(0).integers(3, 9, (blocks, BLOCK)).astype(np.int32)
    documents = np.repeat(np.arange(blocks, dtype=np.int32)[:, None], BLOCK, axis=1)
    x = (words.ravel()[:, None] == np.arange(width)).astype(np.float32)
    activations = write_store(
        tmp_path, "joint", {NAMES[0]: x, NAMES[1]: x * (np.arange(width) != 4)}, [7], 64, BLOCK
    )
    corpus = write_store(tmp_path, "corpus", {"tokens": words, "documents": documents}, [7], 4)
    inputs = {
        "model_base": toy_manifest(),
        "model_tuned": toy_manifest(),
        "crosscoder": _coordinates(tmp_path, width),
        "activations": activations,
        "corpus": corpus,
        "features": tmp_path / "features.parquet",
    }
    files = {"features": inputs["features"], "summary": tmp_path / "summary.json"}
    compare_models(inputs, {**PARAMS, "rows": 1000}, Output(tmp_path, files, {}))
    assert read_table(inputs["features"])["class"][[3, 4]].tolist() == ["shared", "base"]
    params = {"top": 3, "contexts": 2, "window": 3, "logits": 4, "compute": COMPUTE}
    out = Output(tmp_path, {"descriptions": tmp_path / "descriptions.json"}, {"stage": "test"})
    describe_differences(inputs, params, out)
    value = json.loads(out.files["descriptions"].read_text())
    described = {entry["feature"]: entry for entry in value["features"]}
    assert described[4]["class"] == "base"
    assert described[4]["logits_of"] == "base"
    assert all(entry["logits_of"] == "tuned" for entry in described.values() if entry["class"] == "shared")
    for feature, entry in described.items():
        assert [token["id"] for token in entry["fires_on"]] == [feature]
        for context in entry["contexts"]:
            assert context["tokens"][context["peak"]] == entry["fires_on"][0]["token"]
        assert len(entry["logits"]["top"]) == 4
    assert value["tokens"] == blocks * BLOCK


def _coordinates(folder: Path, width: int) -> Path:
    """Feature i is coordinate i of the first model, written to both; 4 is the first's alone."""
    eye, zeros = torch.eye(width), torch.zeros(width)
    second = eye.clone()
    second[4] = 0
    dictionary = Dictionary(
        "relu", NAMES, NAMES, "threshold", torch.cat([eye, torch.zeros(width, width)], dim=1), zeros,
        torch.cat([eye, second], dim=1), torch.zeros(2 * width), extra={"threshold": zeros},
    )  # fmt: skip
    save_dictionary(folder / "weights.safetensors", dictionary)
    return folder / "weights.safetensors"
