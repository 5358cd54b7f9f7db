"""Activations and gradients of every pair at every site: two forward passes and one backward pass per batch, for good.

Every score of every dictionary follows from what is kept here, so no later scoring stage runs the model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuitflow.attribution.cached import PARTS, trimmed
from circuitflow.attribution.readout import answer_logits, metric_of_run
from circuitflow.data.metrics import Metric, metric_of
from circuitflow.data.token_pairs import TokenPairs, load_token_pairs
from circuitflow.errors import UserError
from circuitflow.jobs import Output, progress
from circuitflow.models.loading import load_model
from circuitflow.models.running import LanguageModel, Run, run
from circuitflow.store.arrays import ArraySpec, StoreWriter

RUNS = ("clean", "patched")


def cache_gradients(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE (store). Keep clean and patched activations and the metric's gradient at every site.

    Inputs ``model`` (manifest), ``tokens`` (table of pairs); params ``sites``, ``metric``, ``batch_pairs`` (pairs per
    pass, and per shard: what an interrupted run loses at most), ``dtype``, ``compute``. Arrays, float32:
    ``{site}/clean``, ``{site}/patched``, ``{site}/gradient`` (pairs, pos, width), zero at padding and where there
    is no patched prompt; ``metric/clean``, ``metric/patched`` (pairs,). The attribute ``gradient_run`` says on which
    run gradients were taken: the clean one, but the patched one for the metric kl, which is flat on the clean run.

    :raises UserError: the model has no such site, or kl is asked of pairs without a patched prompt.
    """
    lm = load_model(inputs["model"], dtype=params["dtype"], device=params["compute"]["device"])
    pairs, metric = load_token_pairs(inputs["tokens"]), metric_of(params["metric"])
    sites = list(params["sites"])
    writer = StoreWriter(
        out.folder,
        _layout(lm, sites, pairs.mask.shape),
        shard_rows=params["batch_pairs"],
        attributes={"gradient_run": gradient_run(metric)},
    )
    for index in writer.missing():
        start, stop = writer.bounds(index)
        batch = trimmed(pairs[start:stop]).to(lm.device)
        values = gradients_of(lm, batch, sites, metric)
        writer.write_shard(
            index, {name: _widened(value, pairs.mask.shape[1]) for name, value in values.items()}
        )
        progress("pairs", stop, len(pairs))
    out.content, out.details = writer.finish()


def gradient_run(metric: Metric) -> str:
    """The run on which a metric's gradients are taken."""
    return "patched" if metric.kind == "kl" else "clean"


def gradients_of(
    lm: LanguageModel, pairs: TokenPairs, sites: Sequence[str], metric: Metric
) -> dict[str, Tensor]:
    """The arrays of :func:`cache_gradients` for one batch, in the model's precision.

    :raises UserError: the model has no such site, or kl is asked of pairs without a patched prompt.
    """
    base = gradient_run(metric)
    if base == "patched" and not bool(pairs.has_patch.all()):
        raise UserError(
            "Key task.metric.kind is kl, but some pairs have no patched prompt and kl is flat on the clean run; "
            "use logit_difference or log_probability."
        )
    tokens = {"clean": pairs.clean, "patched": pairs.patch}
    wanted = (base,) if not bool(pairs.has_patch.any()) else RUNS
    final = f"resid.{lm.n_layers - 1}"
    runs = {
        name: run(lm, tokens[name], pairs.mask, capture=sites, stop_at=final, grad=name == base)
        for name in wanted
    }
    reference = answer_logits(lm, runs["clean"], pairs.position).detach() if metric.kind == "kl" else None
    values = {name: metric_of_run(lm, metric, this, pairs, reference) for name, this in runs.items()}
    points = [runs[base].sites[site] for site in sites]
    gradients = torch.autograd.grad(values[base].sum(), points)
    return _arrays(pairs, sites, runs, values, gradients)


def _arrays(
    pairs: TokenPairs,
    sites: Sequence[str],
    runs: Mapping[str, Run],
    values: Mapping[str, Tensor],
    gradients: Sequence[Tensor],
) -> dict[str, Tensor]:
    real, paired = pairs.mask[..., None], pairs.has_patch
    arrays: dict[str, Tensor] = {}
    for site, gradient in zip(sites, gradients, strict=True):
        for name in RUNS:
            there = real if name == "clean" else real & paired[:, None, None]
            value = runs[name].sites[site].detach() if name in runs else torch.zeros_like(gradient)
            arrays[f"{site}/{name}"] = value * there
        arrays[f"{site}/gradient"] = gradient * real
    arrays["metric/clean"] = values["clean"].detach()
    arrays["metric/patched"] = values.get("patched", 0 * values["clean"]).detach() * paired
    return arrays


def _layout(lm: LanguageModel, sites: Sequence[str], shape: tuple[int, ...]) -> dict[str, ArraySpec]:
    arrays = {
        f"{site}/{part}": ArraySpec((*shape, lm.width(site)), "float32") for site in sites for part in PARTS
    }
    return {**arrays, **{f"metric/{name}": ArraySpec(shape[:1], "float32") for name in RUNS}}


def _widened(value: Tensor, pos: int) -> np.ndarray:
    """float32 on the CPU, padded with zeros to ``pos`` positions if it has positions."""
    value = value.float().cpu()
    if value.ndim == 3:
        value = torch.nn.functional.pad(value, (0, 0, 0, pos - value.shape[1]))
    return value.numpy()
