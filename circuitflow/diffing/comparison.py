"""The stage ``compare_models``: which features two models share, which one has alone, and whether that is so."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from circuitflow.dictionaries.crosscoding import (
    CLASSES,
    Crosscoder,
    classes_of,
    decoder_norms,
    load_crosscoder,
    relative_norm,
)
from circuitflow.dictionaries.geometry import paired_cosines
from circuitflow.dictionaries.normalisation import Moments
from circuitflow.dictionaries.quality import Sums as Reconstructions
from circuitflow.dictionaries.rows import SiteRows, open_sites, read_together
from circuitflow.diffing.joining import MODELS
from circuitflow.diffing.scaling import Ratios, Sums, gather, intervals, ratios
from circuitflow.errors import UserError
from circuitflow.features.firing import rounded
from circuitflow.jobs import Output, progress
from circuitflow.store.files import write_json
from circuitflow.store.tables import write_table

GROUPS = 50
"""Groups of neighbouring blocks that are resampled together, at most."""

VERDICTS = ("exclusive", "shrunk", "decoupled", "unknown")
CONVENTIONS = {
    "rho": "relative decoder norm, second model / both, each in units of its own spread: 0 the run's model "
    "alone, 1 the second's",
    "cosine": "between the decoder rows of both models",
    "nu_error": "latent scaling: share of the feature's own part that the other model's error holds along its "
    "direction",
    "nu_reconstruction": "the same for what other features reconstruct in the other model, relative to the whole "
    "reconstruction, the feature's own part included, in the model that has the feature",
    "verdict": "of exclusive features: shrunk if nu_error reaches its bound, decoupled if nu_reconstruction does, "
    "exclusive if both intervals end below the bounds, unknown otherwise (what is measured does not tell)",
    "carried": "mean of f²·(‖d_base‖² + ‖d_tuned‖²), in units of the vectors' mean squares",
    "fvu": "of each model, on held-out tokens without outliers",
    "intervals": "95 %, bootstrap over groups of blocks",
}


def compare_models(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. One row a feature of the crosscoder of two models, and counts of classes and verdicts.

    Inputs ``crosscoder`` (manifest), ``activations`` (joint store). Params ``site``, ``shared`` (bounds of ρ),
    ``error_ratio``, ``reconstruction_ratio``, ``rows`` (training tokens, spread evenly), ``bootstrap``,
    ``bootstrap_seed``, ``compute``. Outputs ``features`` (Parquet), ``summary`` (JSON).

    :raises UserError: the dictionary is no crosscoder of these two sites.
    """
    crosscoder = load_crosscoder(inputs["crosscoder"])
    rows = _rows_of(crosscoder, inputs["activations"], params["site"])
    device = params["compute"]["device"]
    crosscoder = Crosscoder(crosscoder.dictionary.to(device), crosscoder.sites)
    measured = measure(crosscoder, rows, params["rows"], device)
    found = ratios(measured.sums, measured.owner)
    bounds = intervals(measured.sums, measured.owner, params["bootstrap"], params["bootstrap_seed"])
    columns = feature_columns(crosscoder, measured, found, bounds, params)
    write_table(out.files["features"], columns, out.provenance)
    summary = summary_of(columns, measured, held_out_fvu(crosscoder, rows, device), params)
    write_json(out.files["summary"], {**summary, "conventions": CONVENTIONS, "provenance": out.provenance})


@dataclass(frozen=True)
class Measured:
    """Both models on the same rows."""

    sums: Sums
    norms: Float[np.ndarray, "d_dict 2"]
    owner: Int64[np.ndarray, " d_dict"]
    """By feature the model (0, 1) in which its decoder row is longer."""
    scales: Mapping[str, float]


def measure(crosscoder: Crosscoder, rows: Sequence[SiteRows], count: int, device: str) -> Measured:
    """Read ``count`` training rows without outliers twice: for means and scales, and for what the ratios need."""
    first, sites, skip = rows[0], crosscoder.sites, crosscoder.dictionary.skip
    wanted = first.spread(~first.held_out & ~np.isin(first.positions, skip.positions), count)
    moments = {site: Moments() for site in sites}
    for _, x in read_together(rows, wanted, skip, device):
        for of_site, part in zip(moments.values(), x, strict=True):
            of_site.add(part)
    each = {site: of_site.normalisation() for site, of_site in moments.items()}
    scales = {site: one.scale for site, one in each.items()}
    norms = decoder_norms(crosscoder, scales).cpu().numpy()
    owner = (norms[:, 1] > norms[:, 0]).astype(np.int64)
    blocks = len(first.positions) // first.block
    groups = min(GROUPS, len(np.unique(np.flatnonzero(wanted) // first.block)))

    def batches() -> Iterator[tuple[int, Tensor, dict[str, Tensor]]]:
        done = 0
        for index, x in read_together(rows, wanted, skip, device):
            of = index // first.block * groups // blocks
            for group in of.unique():
                here = of == group
                part = {site: vectors[here] for site, vectors in zip(sites, x, strict=True)}
                yield int(group), (index % first.block)[here], part
            done += len(index)
            progress("tokens compared", done, int(wanted.sum()))

    means = {site: one.mean for site, one in each.items()}
    sums = gather(crosscoder, batches(), means, scales, owner, groups)
    return Measured(sums, norms, owner, scales)


def feature_columns(
    crosscoder: Crosscoder,
    measured: Measured,
    found: Ratios,
    bounds: Mapping[str, np.ndarray],
    params: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """The table, one row a feature."""
    sums, norms = measured.sums, measured.norms
    tokens, fired = sums.tokens.sum(), sums.fired.sum(axis=0)
    rho = relative_norm(norms[:, 0], norms[:, 1])
    classes = classes_of(rho, params["shared"])
    cosine = paired_cosines(*(crosscoder.decoder(site) for site in crosscoder.sites)).cpu().numpy()
    return {
        "feature": np.arange(len(rho)),
        "density": fired / tokens,
        "mean_active": np.divide(sums.first.sum(axis=0), fired, out=np.zeros_like(fired), where=fired > 0),
        "carried": sums.second.sum(axis=0) / tokens * (norms**2).sum(axis=1),
        "norm_base": norms[:, 0],
        "norm_tuned": norms[:, 1],
        "rho": rho,
        "class": classes,
        "cosine": cosine.astype(np.float64),
        "nu_error": found.error,
        "nu_error_low": bounds["error"][0],
        "nu_error_high": bounds["error"][1],
        "nu_reconstruction": found.reconstruction,
        "nu_reconstruction_low": bounds["reconstruction"][0],
        "nu_reconstruction_high": bounds["reconstruction"][1],
        "strength": found.strength,
        "verdict": verdicts(classes, found, bounds, params["error_ratio"], params["reconstruction_ratio"]),
    }


def verdicts(
    classes: np.ndarray, found: Ratios, bounds: Mapping[str, np.ndarray], error: float, reconstruction: float
) -> np.ndarray:
    """What the check says of each exclusive feature, one of :data:`VERDICTS`; empty for the others.

    One ratio is enough to refute it. To bear it out the upper ends of both intervals have to lie below the bounds.
    """
    below = (bounds["error"][1] < error) & (bounds["reconstruction"][1] < reconstruction)
    cases = [found.error >= error, found.reconstruction >= reconstruction, below]
    said = np.select(cases, ["shrunk", "decoupled", "exclusive"], "unknown")
    return np.where(np.isin(classes, ("base", "tuned")), said, "").astype(object)


def held_out_fvu(crosscoder: Crosscoder, rows: Sequence[SiteRows], device: str) -> list[float]:
    """FVU = Σ‖x − x̂‖² / Σ‖x − x̄‖² of each model on held-out tokens without outliers, with one global mean."""
    first, dictionary = rows[0], crosscoder.dictionary
    wanted = first.held_out & ~np.isin(first.positions, dictionary.skip.positions)
    sums = [Reconstructions(1) for _ in rows]
    for index, x in read_together(rows, wanted, dictionary.skip, device):
        codes = dictionary.encode(torch.cat(x, dim=1), index % first.block)
        decoded, one = dictionary.decode(codes), torch.zeros(len(index), dtype=torch.int64, device=device)
        for site, part, of_site in zip(crosscoder.sites, x, sums, strict=True):
            center = crosscoder.part(dictionary.b_dec[None], site)[0]
            of_site.add(part, crosscoder.part(decoded, site), codes.counts(), center, one)
    return [of_site.values()["fvu"] for of_site in sums]


def summary_of(
    columns: Mapping[str, np.ndarray], measured: Measured, fvu: Sequence[float], params: Mapping[str, Any]
) -> dict[str, Any]:
    """Counts over features that fire, and what both models have in common."""
    alive = columns["density"] > 0
    classes, cosine = columns["class"][alive], columns["cosine"][alive]
    shared = np.sort(cosine[(classes == "shared") & np.isfinite(cosine)])
    said = {
        name: dict(Counter(columns["verdict"][alive][classes == name].tolist())) for name in ("base", "tuned")
    }
    quantiles = (5, 25, 50, 75, 95)
    return {
        "site": params["site"],
        "features": len(alive),
        "alive": int(alive.sum()),
        "tokens": int(measured.sums.tokens.sum()),
        "classes": {name: int((classes == name).sum()) for name in CLASSES},
        "verdicts": {name: {verdict: said[name].get(verdict, 0) for verdict in VERDICTS} for name in said},
        "shared_cosine": {
            f"p{q:02d}": rounded(float(np.percentile(shared, q))) if len(shared) else None for q in quantiles
        },
        "fvu": {name: rounded(value) for name, value in zip(MODELS, fvu, strict=True)},
        "l0": rounded(float(measured.sums.fired.sum() / measured.sums.tokens.sum())),
        "scales": {site: rounded(scale) for site, scale in measured.scales.items()},
        "bounds": {name: params[name] for name in ("shared", "error_ratio", "reconstruction_ratio")},
    }


def _rows_of(crosscoder: Crosscoder, activations: Path, site: str) -> tuple[SiteRows, ...]:
    wanted = tuple(f"{name}:{site}" for name in MODELS)
    if crosscoder.sites != wanted:
        raise UserError(
            f"The crosscoder reads {', '.join(crosscoder.sites)}, but {', '.join(wanted)} are to be compared; train it "
            "on the joint store of both models."
        )
    return open_sites(activations, wanted)
