"""Files of features as circuit-tracer's viewer and Neuronpedia show them: one JSON a feature, named by its number."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from circuitflow.features.descriptions import Description
from circuitflow.graphs.formats.viewer import pair
from circuitflow.store.files import write_json

BINS = 50
"""Of histograms: equal steps from 0 to the largest activation."""
QUANTILES = 100
"""Percentiles 1 to 100 of activations where the feature is active."""


def feature_value(layer: int, feature: int, description: Description, scan: str) -> dict[str, Any]:
    """The plain value of one feature's file (circuit_tracer 0.5, frontend/feature_models.py).

    Histogram and quantiles are taken from bins of half octaves, as if activations were spread evenly within each.
    """
    largest = float(description.get("max", 0.0))
    edges, counts = _histogram(description)
    return {
        "transcoder_id": scan,
        "index": pair(layer, feature),
        "examples_quantiles": [
            {
                "quantile_name": "Top activations",
                "examples": list(map(_example, description.get("contexts", []))),
            }
        ],
        "top_logits": [str(entry["token"]) for entry in description["logits"]["top"]],
        "bottom_logits": [str(entry["token"]) for entry in description["logits"]["bottom"]],
        "act_min": 0.0,
        "act_max": largest,
        "quantile_values": _quantiles(edges, counts).tolist(),
        "histogram": _in_equal_steps(edges, counts, largest).tolist(),
        "activation_frequency": float(description.get("density", 0.0)),
    }


def write_features(
    folder: Path, descriptions: Mapping[tuple[int, int], Description], scan: str
) -> list[Path]:
    """Write a file for each feature; gives the files."""
    written = []
    for (layer, feature), description in descriptions.items():
        path = folder / f"{pair(layer, feature)}.json"
        write_json(path, feature_value(layer, feature, description, scan))
        written.append(path)
    return written


def _example(context: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "tokens": list(context["tokens"]),
        "tokens_acts_list": [float(value) for value in context["activations"]],
        "train_token_ind": int(context["peak"]),
        "is_repeated_datapoint": False,
    }


def _histogram(description: Description) -> tuple[np.ndarray, np.ndarray]:
    """Edges and counts of the bins; nothing for a feature that never fired."""
    found = description.get("histogram") or {}
    edges = np.array(found.get("edges", []), dtype=np.float64)
    return edges, np.array(found.get("counts", []), dtype=np.float64)


def _quantiles(edges: np.ndarray, counts: np.ndarray) -> np.ndarray:
    if not counts.sum():
        return np.zeros(QUANTILES)
    reached = np.concatenate([[0.0], np.cumsum(counts) / counts.sum()])
    return np.interp(np.arange(1, QUANTILES + 1) / QUANTILES, reached, edges)


def _in_equal_steps(edges: np.ndarray, counts: np.ndarray, largest: float) -> np.ndarray:
    if not counts.sum() or largest <= 0:
        return np.zeros(BINS)
    below = np.concatenate([[0.0], np.cumsum(counts)])
    steps = np.interp(np.linspace(0, largest, BINS + 1), edges, below, left=0.0, right=below[-1])
    steps[-1] = below[-1]
    return np.diff(steps)
