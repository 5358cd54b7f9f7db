"""Decoder norms of crosscoders by site: relative norms, classes and places, all by hand."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from circuitflow.dictionaries.crosscoding import (
    Crosscoder,
    classes_of,
    decoder_norms,
    load_crosscoder,
    relative_norm,
    spread_of,
)
from circuitflow.dictionaries.dictionary import Dictionary, save_dictionary
from circuitflow.dictionaries.locating import locate_features, neighbour_cosines
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.store.tables import read_table
from tests.fixtures.activation_store import write_store

SITES = ("resid.0", "resid.1", "resid.2")


def crosscoder(decoders: list[list[list[float]]], sites: tuple[str, ...] = SITES) -> Crosscoder:
    """From decoder rows by site; feature i reads coordinate i of the first site."""
    rows = torch.cat([torch.tensor(rows) for rows in decoders], dim=1)
    d_dict, d_all = rows.shape
    zeros = torch.zeros(d_dict)
    dictionary = Dictionary(
        "relu", sites, sites, "threshold", torch.eye(d_dict, d_all), zeros, rows, torch.zeros(d_all),
        extra={"threshold": zeros},
    )  # fmt: skip
    return Crosscoder(dictionary, sites)


THREE = crosscoder(
    [
        [[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]],
        [[0.0, 0.0], [0.0, 0.0], [0.0, 1.0]],
        [[0.0, 0.0], [0.0, 0.0], [0.0, 1.0]],
    ]
)
"""Feature 0 lives at the first site alone, 1 nowhere, 2 everywhere, and turns by a right angle after the first."""


def test_norms_are_in_units_of_each_sites_spread() -> None:
    norms = decoder_norms(THREE, {"resid.0": 1.0, "resid.1": 2.0, "resid.2": 4.0})
    assert norms.tolist() == [[5, 0, 0], [0, 0, 0], [1, 0.5, 0.25]]


def test_relative_norm_and_classes_by_hand() -> None:
    first, second = np.array([3.0, 1.0, 0.0, 7.0, 0.0]), np.array([1.0, 1.0, 2.0, 3.0, 0.0])
    rho = relative_norm(first, second)
    assert rho[:4].tolist() == [0.25, 0.5, 1.0, 0.3]
    assert math.isnan(rho[4])
    assert classes_of(rho, [0.3, 0.7]).tolist() == ["base", "shared", "tuned", "shared", ""]
    assert classes_of(rho, [0.1, 0.5]).tolist() == ["shared", "shared", "tuned", "shared", ""]


def test_places_of_features_by_hand() -> None:
    spread = spread_of(np.array([[5.0, 0, 0], [0, 0, 0], [1.0, 1.0, 1.0], [0, 1.0, 2.0]]))
    assert spread["peak"].tolist()[:3] == [0, -1, 0]
    assert spread["peak"][3] == 2
    assert spread["centre"][[0, 2]].tolist() == [0, 1]
    assert spread["centre"][3] == (1 * 1 + 4 * 2) / 5
    assert spread["effective"][[0, 2]].tolist() == [1, 3]
    assert spread["effective"][3] == 25 / 17
    assert np.isnan(spread["centre"][1])
    assert np.isnan(spread["effective"][1])


def test_cosines_of_neighbouring_sites_are_weighted_by_norms() -> None:
    found = neighbour_cosines(THREE)
    assert np.isnan(found[:2]).all()
    assert found[2] == 0.5  # a right angle, then none; both pairs weigh the same


def test_what_is_no_crosscoder_is_refused(tmp_path: Path) -> None:
    save_dictionary(tmp_path / "cross.safetensors", THREE.dictionary)
    loaded = load_crosscoder(tmp_path / "cross.safetensors")
    assert loaded.sites == SITES
    assert torch.equal(loaded.decoder("resid.1"), THREE.decoder("resid.1"))
    rows, zeros = torch.eye(2), torch.zeros(2)
    plain = Dictionary(
        "topk", ("resid.0",), ("resid.0",), "topk", rows, zeros, rows, zeros, settings={"k": 1}
    )
    save_dictionary(tmp_path / "plain.safetensors", plain)
    with pytest.raises(UserError, match=r"is no crosscoder: it reads resid\.0 and writes resid\.0"):
        load_crosscoder(tmp_path / "plain.safetensors")


def test_the_stage_writes_where_features_live(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {site: rng.normal(size=(64, 2)).astype(np.float32) for site in SITES}
    arrays["resid.1"] *= 4
    arrays["resid.0"][:, 0] = np.where(np.arange(64) % 4 == 1, 2.0, -1.0)  # feature 0 fires on a quarter
    store = write_store(tmp_path, "activations", arrays, [3], 32)
    save_dictionary(tmp_path / "cross.safetensors", THREE.dictionary)
    params: dict[str, Any] = {"rows": 1000, "compute": {"device": "cpu"}}
    files = {name: tmp_path / f"{name}.parquet" for name in ("features", "norms")}
    inputs = {"crosscoder": tmp_path / "cross.safetensors", "activations": store}
    locate_features(inputs, params, Output(tmp_path, files, {}))
    features, norms = read_table(files["features"]), read_table(files["norms"])
    assert features["density"][0] == 0.25
    assert features["peak"].tolist()[:2] == ["resid.0", ""]
    assert norms["site"].tolist()[:3] == list(SITES)
    training = arrays["resid.0"][:48]
    scale = np.sqrt(((training - training.mean(axis=0)) ** 2).sum(axis=1).mean())
    assert norms["norm"][0] == pytest.approx(5 / scale, rel=1e-6)
    assert norms["norm"][6:9].argmin() == 1  # the site of four times the spread has the least of feature 2
    assert norms["share"].reshape(3, 3).sum(axis=1) == pytest.approx([1, 0, 1])
