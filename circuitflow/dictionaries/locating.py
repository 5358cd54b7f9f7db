"""The stage ``locate_features``: in which of its sites each feature of a crosscoder lives."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from circuitflow.dictionaries.crosscoding import Crosscoder, decoder_norms, load_crosscoder, spread_of
from circuitflow.dictionaries.geometry import paired_cosines
from circuitflow.dictionaries.normalisation import Moments
from circuitflow.dictionaries.rows import open_sites, read_together
from circuitflow.jobs import Output, progress
from circuitflow.store.tables import write_table


def locate_features(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Norms of decoder rows by site, and how features are spread over sites.

    Inputs ``crosscoder`` (manifest), ``activations`` (store with its sites). Params ``rows`` (training tokens, spread
    evenly), ``compute``. Outputs ``features`` (one row a feature: ``density``, ``peak`` site, ``centre`` in numbers of
    the sites, ``effective`` sites, and the cosine of its rows at neighbouring sites) and ``norms`` (one row a feature
    and site: ``norm`` in units of the site's spread, ``share`` of its squared norm).
    """
    crosscoder = load_crosscoder(inputs["crosscoder"])
    density, scales = _measured(
        crosscoder, inputs["activations"], params["rows"], params["compute"]["device"]
    )
    norms = decoder_norms(crosscoder, scales).numpy()
    spread = spread_of(norms)
    sites = np.array([*crosscoder.sites, ""], object)
    features = {
        "feature": np.arange(len(norms)),
        "density": density,
        "peak": sites[spread["peak"]],
        "centre": spread["centre"],
        "effective": spread["effective"],
        "neighbour_cosine": neighbour_cosines(crosscoder),
    }
    write_table(out.files["features"], features, out.provenance)
    squares = norms**2
    share = squares / np.where(squares.sum(axis=1, keepdims=True) > 0, squares.sum(axis=1, keepdims=True), 1)
    long = {
        "feature": np.repeat(np.arange(len(norms)), len(crosscoder.sites)),
        "site": np.tile(np.array(crosscoder.sites, object), len(norms)),
        "norm": norms.ravel(),
        "share": share.ravel(),
    }
    write_table(out.files["norms"], long, out.provenance)


def neighbour_cosines(crosscoder: Crosscoder) -> np.ndarray:
    """Mean over neighbouring sites of the cosine of a feature's decoder rows there, weighted by the product of their
    norms: whether it keeps its direction. NaN for a feature of one site alone.
    """
    rows = [crosscoder.decoder(site).double() for site in crosscoder.sites]
    weights, cosines = [], []
    for here, after in pairwise(rows):
        weights.append(here.norm(dim=1) * after.norm(dim=1))
        cosines.append(paired_cosines(here, after).nan_to_num(0.0))
    weight, cosine = torch.stack(weights), torch.stack(cosines)
    total = weight.sum(dim=0)
    mean = (weight * cosine).sum(dim=0) / torch.where(total > 0, total, 1)
    return torch.where(total > 0, mean, torch.nan).numpy()


def _measured(
    crosscoder: Crosscoder, activations: Path, count: int, device: str
) -> tuple[np.ndarray, dict[str, float]]:
    """Share of tokens on which each feature fires, and each site's spread, over training rows without outliers."""
    rows = open_sites(activations, crosscoder.sites)
    first, dictionary = rows[0], crosscoder.dictionary.to(device)
    wanted = first.spread(~first.held_out & ~np.isin(first.positions, dictionary.skip.positions), count)
    fired, tokens, moments = np.zeros(dictionary.d_dict), 0, [Moments() for _ in rows]
    for index, x in read_together(rows, wanted, dictionary.skip, device):
        codes = dictionary.encode(torch.cat(x, dim=1), index % first.block)
        fired += np.bincount(codes.features.cpu().numpy(), minlength=dictionary.d_dict)
        for of_site, vectors in zip(moments, x, strict=True):
            of_site.add(vectors)
        tokens += len(index)
        progress("tokens encoded", tokens, int(wanted.sum()))
    scales = [of_site.normalisation().scale for of_site in moments]
    return fired / tokens, dict(zip(crosscoder.sites, scales, strict=True))
