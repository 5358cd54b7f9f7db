"""The traditional computation, as oracle and baseline: dictionaries spliced into the model's forward and backward pass.

At every site x is replaced by x̂ + ε with features f and error ε as leaves, and the gradient passes through to x as if
nothing had been there (Marks et al. 2024). Their gradients are read off autograd: dense (batch, pos, d_dict) tensors,
an encode of both runs, and for integrated gradients one pass per site and step. Everything here has a quicker twin in
:mod:`~circuitflow.attribution.scores` and :mod:`~circuitflow.attribution.path_gradients` that gives the same numbers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from circuitflow.attribution.cached import trimmed
from circuitflow.attribution.changes import Effects, differing
from circuitflow.attribution.gradients import gradient_run
from circuitflow.attribution.path_gradients import path_fractions
from circuitflow.attribution.readout import answer_logits
from circuitflow.attribution.scores import TABLES, Tally, check_positions, write_scores
from circuitflow.data.metrics import Metric, metric_of
from circuitflow.data.token_pairs import SPLITS, TokenPairs, load_token_pairs
from circuitflow.dictionaries.dictionary import Dictionary, load_dictionary
from circuitflow.errors import UserError, nearest
from circuitflow.jobs import Output, progress
from circuitflow.models.loading import load_model
from circuitflow.models.running import LanguageModel, Run, run

ESTIMATES = ("atp", "ig")


@dataclass(frozen=True)
class State:
    """Features and error of a site on one run, dense."""

    features: Float[Tensor, "batch pos d_dict"]
    error: Float[Tensor, "batch pos d_model"]

    def detach(self) -> "State":
        """The same values, without a gradient."""
        return State(self.features.detach(), self.error.detach())


@dataclass(frozen=True)
class InLoop:
    """What the spliced passes give of one site."""

    clean: State
    patched: State
    gradient: State
    """∂m/∂(features) and ∂m/∂(error), or their means along the path."""

    def effects(self, pairs: TokenPairs, positions: str = "sum") -> Effects:
        """gradient × (patched − clean) of features active in either run, and of errors, at tokens that can differ."""
        counted = differing(pairs, positions)
        d_dict = self.clean.features.shape[2]
        active = ((self.clean.features != 0) | (self.patched.features != 0)) & counted[..., None]
        feature = self.gradient.features * (self.patched.features - self.clean.features)
        error = (self.gradient.error * (self.patched.error - self.clean.error)).sum(-1)
        pair, position, node = active.nonzero(as_tuple=True)
        pair_e, position_e = counted.nonzero(as_tuple=True)
        return Effects(
            pair=torch.cat([pair, pair_e]),
            position=torch.cat([position, position_e]),
            node=torch.cat([node, torch.full_like(pair_e, d_dict)]),
            effect=torch.cat([feature[active], error[counted]]).double(),
            d_dict=d_dict,
        )


def score_in_loop(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Node scores of all sites by the traditional computation; for each site the tables of score_nodes.

    Inputs ``model``, ``dictionaries`` (in the order of ``sites``), ``tokens_{split}``; params ``sites``, ``metric``,
    ``estimate`` ("atp" by default, or "ig" with ``steps`` and ``path``), ``positions``, ``batch_pairs``, ``dtype``,
    ``compute``; outputs ``scores_{site}``, ``positions_{site}``, ``pairs_{site}``, with "_" for the "." of a site.

    :raises UserError: an unknown estimate, or a dictionary without an encoder.
    """
    lm = load_model(inputs["model"], dtype=params["dtype"], device=params["compute"]["device"])
    metric, positions = metric_of(params["metric"]), params.get("positions", "sum")
    dictionaries = {
        site: load_dictionary(Path(path), lm.width(site)).to(lm.device)
        for site, path in zip(params["sites"], inputs["dictionaries"], strict=True)
    }
    found: dict[str, dict[str, Any]] = {site: {} for site in dictionaries}
    for split in SPLITS:
        pairs = load_token_pairs(inputs[f"tokens_{split}"])
        check_positions(positions, pairs, split)
        tallies = {site: Tally(pairs, one.d_dict, positions) for site, one in dictionaries.items()}
        for start in range(0, len(pairs), params["batch_pairs"]):
            batch = trimmed(pairs[start : start + params["batch_pairs"]]).to(lm.device)
            for site, result in _estimated(lm, metric, batch, dictionaries, params).items():
                tallies[site].add(result.effects(batch, positions), start)
            progress(f"{split} pairs", start + len(batch), len(pairs))
        for site, tally in tallies.items():
            found[site][split] = tally.result()
    for site, splits in found.items():
        files = {name: out.files[f"{name}_{site.replace('.', '_')}"] for name in TABLES}
        write_scores(splits, site, "sae_in_loop", positions, out, files, {"estimate": _estimate(params)})


def spliced_gradients(
    lm: LanguageModel, metric: Metric, pairs: TokenPairs, dictionaries: Mapping[str, Dictionary]
) -> dict[str, InLoop]:
    """AtP: both runs with every dictionary in the loop, and one backward pass through the base run."""
    base = gradient_run(metric)
    states: dict[str, dict[str, State]] = {}
    values: dict[str, Tensor] = {}
    leaves: dict[str, tuple[Tensor, Tensor]] = {}
    reference = None
    for name in ("clean", "patched") if bool(pairs.has_patch.any()) else ("clean",):
        splices = {site: Splice(one, name == base) for site, one in dictionaries.items()}
        tokens = pairs.clean if name == "clean" else pairs.patch
        logits = _spliced(lm, tokens, pairs, splices, name == base)
        reference = logits.detach() if name == "clean" else reference
        states[name] = {site: splice.state().detach() for site, splice in splices.items()}
        if name == base:
            values[name], leaves = logits, {site: splice.leaves() for site, splice in splices.items()}
    with torch.enable_grad():
        value = metric(values[base], pairs.right, pairs.wrong, reference).sum()
    flat = torch.autograd.grad(value, [leaf for both in leaves.values() for leaf in both])
    return {
        site: InLoop(
            states["clean"][site],
            _patch_state(states.get("patched", {}).get(site), states["clean"][site], pairs),
            State(flat[2 * number], flat[2 * number + 1]),
        )
        for number, site in enumerate(dictionaries)
    }


def spliced_path_gradients(
    lm: LanguageModel,
    metric: Metric,
    pairs: TokenPairs,
    dictionaries: Mapping[str, Dictionary],
    fractions: Float[Tensor, " steps"],
) -> dict[str, InLoop]:
    """Integrated gradients: for every site and step one pass of the base run with that site's state on the path."""
    ends = spliced_gradients(lm, metric, pairs, dictionaries)
    base = gradient_run(metric)
    tokens = pairs.clean if base == "clean" else pairs.patch
    reference = None
    if metric.kind == "kl":
        reference = _spliced(lm, pairs.clean, pairs, {}, False)
    found = {}
    for site, both in ends.items():
        first, last = (both.clean, both.patched) if base == "clean" else (both.patched, both.clean)
        total = [torch.zeros_like(first.features), torch.zeros_like(first.error)]
        for fraction in fractions.tolist():
            state = State(
                torch.lerp(first.features, last.features, fraction),
                torch.lerp(first.error, last.error, fraction),
            )
            splice = Splice(dictionaries[site], True, state)
            logits = _spliced(lm, tokens, pairs, {site: splice}, True)
            with torch.enable_grad():
                value = metric(logits, pairs.right, pairs.wrong, reference).sum()
            for mean, gradient in zip(total, torch.autograd.grad(value, splice.leaves()), strict=True):
                mean.add_(gradient, alpha=1 / len(fractions))
        found[site] = InLoop(both.clean, both.patched, State(*total))
    return found


class Splice:
    """A dictionary in the loop at one site: x → x̂ + ε, with the gradient passed through to x.

    :param grad: make features and error leaves.
    :param state: features and error to put there in place of the encoded ones.
    """

    def __init__(self, dictionary: Dictionary, grad: bool, state: State | None = None) -> None:
        self.dictionary, self.grad, self._state = dictionary, grad, state

    def __call__(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """The site's new value, equal to x unless another state is put there."""
        put = self._state
        with torch.no_grad():
            if self._state is None:
                self._state = encoded(self.dictionary, x)
        if not self.grad:
            return x
        for leaf in self.leaves():
            leaf.requires_grad_(True)
        state, W_dec, b_dec = self.state(), self.dictionary.W_dec, self.dictionary.b_dec
        value = (torch.matmul(state.features, W_dec) + b_dec + state.error).to(x.dtype)
        return value if put is not None else value + (x - x.detach())

    def state(self) -> State:
        """What was encoded, or put there."""
        assert self._state is not None, "the pass has not reached the site"
        return self._state

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Features and error, by which the metric is differentiated."""
        return self.state().features, self.state().error


def encoded(dictionary: Dictionary, x: Float[Tensor, "batch pos d_model"]) -> State:
    """Features and error, dense, in the dictionary's precision."""
    flat = x.detach().flatten(0, 1).to(dictionary.W_dec.dtype)
    positions = torch.arange(x.shape[1], device=x.device).repeat(len(x))
    features = _dense(dictionary, flat, positions)
    error = flat - torch.addmm(dictionary.b_dec, features, dictionary.W_dec)
    return State(features.view(*x.shape[:2], -1), error.view_as(x))


def _dense(
    dictionary: Dictionary, x: Float[Tensor, "n d_model"], positions: Int64[Tensor, " n"]
) -> Float[Tensor, "n d_dict"]:
    """Features as one dense matrix, without the detour over sparse codes where the rule allows."""
    if dictionary.select not in DENSE or dictionary.W_enc is None or not dictionary.d_dict:
        return dictionary.encode(x, positions).dense()
    pre = torch.addmm(dictionary.b_enc, x, dictionary.W_enc.T)
    skipped = dictionary.skip.mask(x, positions)
    features = DENSE[dictionary.select](pre, dictionary)
    return features.masked_fill_(skipped[:, None], 0) if bool(skipped.any()) else features


def _above(pre: Tensor, dictionary: Dictionary) -> Tensor:
    return pre * (pre > dictionary.extra["threshold"])


def _largest(pre: Tensor, dictionary: Dictionary) -> Tensor:
    values, index = pre.topk(min(int(dictionary.settings["k"]), pre.shape[1]), dim=1, sorted=False)
    return torch.zeros_like(pre).scatter_(1, index, values.relu_())


DENSE: dict[str, Callable[[Tensor, Dictionary], Tensor]] = {"threshold": _above, "topk": _largest}


def _spliced(
    lm: LanguageModel,
    tokens: Int64[Tensor, "batch pos"],
    pairs: TokenPairs,
    splices: Mapping[str, Splice],
    grad: bool,
) -> Float[Tensor, "batch vocab"]:
    this: Run = run(
        lm, tokens, pairs.mask, replace=dict(splices), stop_at=f"resid.{lm.n_layers - 1}", grad=grad
    )
    return answer_logits(lm, this, pairs.position)


def _patch_state(patched: State | None, clean: State, pairs: TokenPairs) -> State:
    """The patched run's state; zeros for pairs that have none."""
    if patched is None:
        return State(torch.zeros_like(clean.features), torch.zeros_like(clean.error))
    if bool(pairs.has_patch.all()):
        return patched
    there = pairs.has_patch[:, None, None]
    return State(patched.features * there, patched.error * there)


def _estimate(params: Mapping[str, Any]) -> str:
    estimate = str(params.get("estimate", "atp"))
    if estimate not in ESTIMATES:
        raise UserError(f"sae_in_loop has no estimate '{estimate}': {nearest(estimate, ESTIMATES)}.")
    return estimate


def _estimated(
    lm: LanguageModel,
    metric: Metric,
    pairs: TokenPairs,
    dictionaries: Mapping[str, Dictionary],
    params: Mapping[str, Any],
) -> dict[str, InLoop]:
    if _estimate(params) == "atp":
        return spliced_gradients(lm, metric, pairs, dictionaries)
    fractions = path_fractions(params["steps"], params["path"])
    return spliced_path_gradients(lm, metric, pairs, dictionaries, fractions)
