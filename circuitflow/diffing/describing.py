"""The stage ``describe_differences``: what the features that tell two models apart fire on, and promote."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from circuitflow.dictionaries.crosscoding import CLASSES, Crosscoder, load_crosscoder
from circuitflow.diffing.joining import BASE, TUNED
from circuitflow.features.contexts import CONVENTIONS, Reader, add_text, name_logits, open_text
from circuitflow.features.firing import rounded
from circuitflow.features.logit_weights import listed_logits
from circuitflow.jobs import Output
from circuitflow.models.loading import load_model
from circuitflow.models.prepared import load_tokenizer
from circuitflow.models.sites import bare
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

    Each model is in memory only while its features' logits are listed, and not at all if none is its own.
    """
    device = params["compute"]["device"]
    crosscoder = load_crosscoder(inputs["crosscoder"])
    table = read_table(inputs["features"])
    chosen = chosen_features(table, params["top"])
    described = [_entry(table, feature) for feature in chosen]
    for name, manifest in ((BASE, "model_base"), (TUNED, "model_tuned")):
        own = [entry for entry in described if OWNERS[entry["class"]] == name]
        if own:
            _add_logits(own, name, crosscoder, inputs[manifest], params)
    text = open_text(crosscoder.sites, inputs["activations"], inputs["corpus"])
    reader = Reader(
        ", ".join(crosscoder.sites),
        crosscoder.dictionary.to(device),
        torch.tensor(chosen, dtype=torch.int64, device=device),
        load_tokenizer(inputs["model_tuned"]),
        int(text.tokens.max()) + 1,
    )
    name_logits(described, reader)
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


def _add_logits(
    described: list[dict[str, Any]],
    name: str,
    crosscoder: Crosscoder,
    manifest: Path,
    params: Mapping[str, Any],
) -> None:
    """The tokens that features promote by one model's unembedding; the model is gone afterwards."""
    site = next(site for site in crosscoder.sites if site.startswith(f"{name}:"))
    rows = crosscoder.decoder(site)[torch.tensor([entry["feature"] for entry in described])]
    lm = load_model(manifest, device=params["compute"]["device"])
    logits = listed_logits(lm, bare(site), rows.to(lm.device), params["logits"])
    for entry, found in zip(described, logits, strict=True):
        if found:
            entry.update(found, logits_of=name)


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
