"""Gradients that replace the plain one in node scores: means along a path (integrated gradients), or RelP's.

Both live in the space of the site, so dictionaries share them: with f_α = (1−α)·f_c + α·f_p and ε_α alike,
dec(f_α) + ε_α = x_α, whatever the dictionary (Marks et al. 2024 take the mean for each dictionary by itself).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.attribution.cached import trimmed
from circuitflow.attribution.changes import differing
from circuitflow.attribution.gradients import gradient_run
from circuitflow.attribution.readout import answer_logits, metric_of_run
from circuitflow.attribution.rerun import BaseRun, base_run, starts_of
from circuitflow.data.metrics import Metric, metric_of
from circuitflow.data.token_pairs import TokenPairs, load_token_pairs
from circuitflow.dictionaries.dictionary import load_dictionary
from circuitflow.errors import UserError, nearest
from circuitflow.jobs import Output, progress
from circuitflow.models.linear import RELP, Rules, linearised
from circuitflow.models.loading import load_model
from circuitflow.models.running import LanguageModel, run
from circuitflow.store.arrays import ArraySpec, Store, StoreWriter, open_store

METHODS = ("ig", "relp")
PATHS = ("midpoint", "left")

PASS_TOKENS = 4096
"""Tokens (pairs × steps × positions) of one pass, unless one pair alone has more; bounds memory."""


def cache_method_gradients(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE (store). Keep the gradients of a node method other than AtP: ``{site}/gradient`` (pairs, pos, width).

    Inputs ``model``, ``tokens``, ``gradients`` (store of cache_gradients), and ``dictionaries`` (in the order of
    ``sites``), which integrated gradients of unpaired prompts alone read: their path ends at b_dec. Params ``method``
    ("ig" or "relp"), ``sites``, ``metric``, ``batch_pairs`` (pairs per shard), ``dtype``, ``compute``; for ig also
    ``steps`` and ``path`` ("midpoint" or "left"); for relp optionally ``rules`` (fields of
    :class:`~circuitflow.models.linear.Rules` other than RelP's). The attributes name the method and its settings, and
    ``gradient_run``, the run from which the path starts: α = 0 there, all sites but one stay there.

    :raises UserError: the method is unknown, the store has other pairs or sites, or unpaired prompts have no
        dictionary.
    """
    lm = load_model(inputs["model"], dtype=params["dtype"], device=params["compute"]["device"])
    pairs, metric, sites = (
        load_token_pairs(inputs["tokens"]),
        metric_of(params["metric"]),
        list(params["sites"]),
    )
    if params["method"] not in METHODS:
        raise UserError(
            f"Key scores.method is {params['method']}, which has no gradients of its own; "
            f"{nearest(params['method'], METHODS)}."
        )
    _check_metric(metric, pairs)
    source = _Source(open_store(inputs["gradients"]), pairs, _ends(inputs, sites, pairs, params, lm))
    writer = StoreWriter(
        out.folder,
        {f"{site}/gradient": ArraySpec((*pairs.mask.shape, lm.width(site)), "float32") for site in sites},
        shard_rows=params["batch_pairs"],
        attributes={"gradient_run": gradient_run(metric), **_described(params)},
    )
    for index in writer.missing():
        start, stop = writer.bounds(index)
        found = _gradients(lm, metric, source, start, stop, sites, params)
        writer.write_shard(
            index, {f"{site}/gradient": _padded(value, pairs.mask.shape[1]) for site, value in found.items()}
        )
        progress("pairs", stop, len(pairs))
    out.content, out.details = writer.finish()


def path_fractions(steps: int, path: str) -> Float[Tensor, " steps"]:
    """Where along the path gradients are taken: middles of equal parts, or their left ends."""
    if path not in PATHS or steps < 1:
        raise UserError(
            f"Integrated gradients of {steps} steps along path '{path}' are asked for; scores.steps is at least 1 and "
            f"scores.path one of {', '.join(PATHS)}."
        )
    return (torch.arange(steps, dtype=torch.float64) + (0.5 if path == "midpoint" else 0.0)) / steps


def path_gradient(
    base: BaseRun,
    site: str,
    change: Float[Tensor, "batch pos width"],
    fractions: Float[Tensor, " steps"],
) -> Float[Tensor, "batch pos width"]:
    """Mean of ∂m/∂x at x + α·change over the fractions α, with everything but this site as on the base run.

    All steps of as many pairs as fit into a pass run as one batch.
    """
    steps, (batch, pos) = len(fractions), change.shape[:2]
    scale = fractions.to(change.device, change.dtype)[:, None, None]
    means = []
    for part in torch.arange(batch).split(max(1, PASS_TOKENS // (steps * pos))):
        rows = part.repeat_interleave(steps)
        along = (change[part.to(change.device), None] * scale).flatten(0, 1)
        value, point = base.values(site, rows, along, grad=True)
        (gradient,) = torch.autograd.grad(value.sum(), point)
        wide = gradient if gradient.dtype == torch.float64 else gradient.float()
        means.append(wide.view(len(part), steps, *gradient.shape[1:]).mean(1))
    return torch.cat(means) * base.pairs.mask[..., None]


def relp_gradients(
    lm: LanguageModel, pairs: TokenPairs, sites: Sequence[str], metric: Metric, rules: Rules = RELP
) -> dict[str, Float[Tensor, "batch pos width"]]:
    """∂m/∂x at every site under changed backward rules, from one forward and one backward pass of the base run."""
    final = f"resid.{lm.n_layers - 1}"
    reference = None
    if metric.kind == "kl":
        clean = run(lm, pairs.clean, pairs.mask, stop_at=final)
        reference = answer_logits(lm, clean, pairs.position)
    tokens = pairs.clean if gradient_run(metric) == "clean" else pairs.patch
    with linearised(lm, rules), torch.enable_grad():
        this = run(lm, tokens, pairs.mask, capture=sites, stop_at=final, grad=True)
        value = metric_of_run(lm, metric, this, pairs, reference)
    gradients = torch.autograd.grad(value.sum(), [this.sites[site] for site in sites])
    return {site: g * pairs.mask[..., None] for site, g in zip(sites, gradients, strict=True)}


@dataclass(frozen=True)
class _Source:
    """Activations of both runs in the store of cache_gradients."""

    store: Store
    pairs: TokenPairs
    ends: Mapping[str, Tensor]
    """By site, where the path of prompts without a patched one ends: b_dec."""

    def __post_init__(self) -> None:
        if self.store.rows != len(self.pairs):
            raise UserError(
                f"Store {self.store.manifest} holds {self.store.rows} pairs but the table of pairs has "
                f"{len(self.pairs)}; run the stage cache_gradients again."
            )

    def read(self, site: str, which: str, start: int, pairs: TokenPairs) -> Float[Tensor, "batch pos width"]:
        """One run's values at a site, for the pairs from ``start`` on."""
        values = self.store.read(f"{site}/{which}", start, start + len(pairs))[:, : pairs.mask.shape[1]]
        x = torch.from_numpy(values.copy()).to(pairs.mask.device)
        if which == "patched" and not bool(pairs.has_patch.all()):
            x = torch.where(pairs.has_patch[:, None, None], x, self.ends[site].to(x.device, x.dtype))
        return x


def _gradients(
    lm: LanguageModel,
    metric: Metric,
    source: _Source,
    start: int,
    stop: int,
    sites: Sequence[str],
    params: Mapping[str, Any],
) -> dict[str, Tensor]:
    pairs = trimmed(source.pairs[start:stop]).to(lm.device)
    if params["method"] == "relp":
        return relp_gradients(lm, pairs, sites, metric, rules_of(params))
    fractions, base = path_fractions(params["steps"], params["path"]), gradient_run(metric)
    other = "patched" if base == "clean" else "clean"
    starts = starts_of(sites, lm.arch)
    known = {
        site: source.read(site, base, start, pairs)
        for site in starts
        if f"{site}/{base}" in source.store.arrays
    }
    this = base_run(lm, metric, pairs, base, starts, known)
    found = {}
    for site in sites:
        change = source.read(site, other, start, pairs) - source.read(site, base, start, pairs)
        change = change * differing(pairs)[..., None]
        found[site] = path_gradient(this, site, change.to(lm.dtype), fractions)
    return found


def rules_of(params: Mapping[str, Any]) -> Rules:
    """RelP's rules with the changes that ``params`` ask for."""
    chosen: dict[str, Any] = dict(params.get("rules") or {})
    return Rules(**{**RELP.__dict__, **chosen})


def _check_metric(metric: Metric, pairs: TokenPairs) -> None:
    if gradient_run(metric) != "clean" and not bool(pairs.has_patch.all()):
        raise UserError(
            f"Key task.metric.kind is {metric.kind}, but some pairs have no patched prompt; use logit_difference or "
            "log_probability."
        )


def _described(params: Mapping[str, Any]) -> dict[str, Any]:
    if params["method"] == "ig":
        return {"method": "ig", "steps": params["steps"], "path": params["path"]}
    return {"method": "relp", "rules": dict(rules_of(params).__dict__)}


def _ends(
    inputs: Mapping[str, Any],
    sites: Sequence[str],
    pairs: TokenPairs,
    params: Mapping[str, Any],
    lm: LanguageModel,
) -> dict[str, Tensor]:
    if params["method"] != "ig" or bool(pairs.has_patch.all()):
        return {}
    if "dictionaries" not in inputs:
        raise UserError(
            "Integrated gradients of prompts without a patched one run to each dictionary's b_dec, but the stage was "
            "given no dictionaries; add the input dictionaries, or set scores.method to atp."
        )
    paths = zip(sites, inputs["dictionaries"], strict=True)
    return {site: load_dictionary(Path(path), lm.width(site)).b_dec for site, path in paths}


def _padded(value: Tensor, pos: int) -> np.ndarray:
    return torch.nn.functional.pad(value.float().cpu(), (0, 0, 0, pos - value.shape[1])).numpy()
