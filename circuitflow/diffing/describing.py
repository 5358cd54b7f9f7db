"""The stage ``describe_differences``: what the features that tell two models apart fire on, and promote."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from circuitflow.dictionaries.crosscoding import CLASSES, load_crosscoder
from circuitflow.diffing.joining import BASE, TUNED
from circuitflow.features.contexts import CONVENTIONS, Reader, add_text, open_text
from circuitflow.features.firing import rounded
from circuitflow.features.logit_weights import extremes, logit_weights
from circuitflow.jobs import Output
from circuitflow.models.loading import load_model
from circuitflow.store.files import write_json
from circuitflow.store.tables import read_table

OWNERS = {"base": BASE, "shared": TUNED, "tuned": TUNED}
"""Model through whose unembedding a feature's own decoder row there is read."""

FACTS = ("density", "rho", "cosine", "nu_error", "nu_reconstruction", "carried")


def describe_differences(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Describe the features of each class that carry most, as JSON.

    Inputs ``model_base``, ``model_tuned``, ``crosscoder`` (manifests), ``activations`` (joint store), ``corpus``,
    ``features`` (table of compare_models). Params ``top`` (features of each class), ``contexts`` (per feature),
    ``window``, ``logits`` (tokens listed per side), ``compute``. Output ``descriptions``.
    """
    device = params["compute"]["device"]
    crosscoder = load_crosscoder(inputs["crosscoder"])
    table = read_table(inputs["features"])
    chosen = chosen_features(table, params["top"])
    described = [_entry(table, feature) for feature in chosen]
    lm = None
    for name, manifest in ((BASE, "model_base"), (TUNED, "model_tuned")):
        lm = load_model(inputs[manifest], device=device)
        site = next(site for site in crosscoder.sites if site.startswith(f"{name}:"))
        own = [place for place, entry in enumerate(described) if OWNERS[entry["class"]] == name]
        directions = crosscoder.decoder(site)[
            torch.tensor([chosen[place] for place in own], dtype=torch.int64)
        ]
        for place, weights in zip(own, logit_weights(lm, directions.to(device)), strict=True):
            described[place]["logits"] = extremes(weights, params["logits"])
            described[place]["logits_of"] = name
    assert lm is not None
    reader = Reader(
        ", ".join(crosscoder.sites),
        crosscoder.dictionary.to(device),
        torch.tensor(chosen, dtype=torch.int64, device=device),
        lm.tokenizer,
        int(lm.hf.config.vocab_size),
    )
    for entry in described:
        entry["logits"] = {side: reader.named(tokens) for side, tokens in entry["logits"].items()}
    text = open_text(crosscoder.sites, inputs["activations"], inputs["corpus"])
    tokens = add_text(described, reader, text, params)
    conventions = {name: CONVENTIONS[name] for name in ("fires_on", "contexts", "histogram", "logits")}
    value = {"sites": crosscoder.sites, "tokens": tokens, "conventions": conventions, "features": described}
    write_json(out.files["descriptions"], {**value, "provenance": out.provenance})


def chosen_features(table: Mapping[str, np.ndarray], top: int) -> list[int]:
    """Of each class the ``top`` features that carry most, those that fire alone; exclusive ones with the verdict
    *exclusive* come first.
    """
    chosen: list[int] = []
    for name in CLASSES:
        here = np.flatnonzero((table["class"] == name) & (table["density"] > 0))
        doubtful = ~np.isin(table["verdict"][here], ("exclusive", ""))
        order = np.lexsort((here, -table["carried"][here], doubtful))
        chosen += table["feature"][here[order][:top]].tolist()
    return chosen


def _entry(table: Mapping[str, np.ndarray], feature: int) -> dict[str, Any]:
    row = int(np.flatnonzero(table["feature"] == feature)[0])
    facts = {name: _plain(table[name][row]) for name in FACTS}
    return {
        "feature": feature,
        "class": str(table["class"][row]),
        "verdict": str(table["verdict"][row]),
        **facts,
    }


def _plain(value: float) -> float | None:
    return rounded(float(value)) if np.isfinite(value) else None
