"""Stage ``filter_pairs``: how well the model does on every prompt, and the pairs it does with confidence."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from circuitflow.data.metrics import Metric, metric_of
from circuitflow.data.token_pairs import SPLITS, TokenPairs, load_token_pairs
from circuitflow.errors import UserError
from circuitflow.jobs import Output, progress
from circuitflow.models.loading import load_model
from circuitflow.models.running import LanguageModel, run
from circuitflow.progress import logger
from circuitflow.store.tables import read_table, write_table

BATCH_PROMPTS = 32
SIDES = ("clean", "patched")


@dataclass(frozen=True)
class Confidence:
    """What the model thinks of a prompt's answers, one entry per prompt."""

    right_logit: Float[np.ndarray, " n"]
    wrong_logit: Float[np.ndarray, " n"]
    """Several answers joined as the metric joins them; without any, of the likeliest token that is not right."""
    probability: Float[np.ndarray, " n"]
    """Of all right answers together."""
    rank: Int64[np.ndarray, " n"]
    """Of the best right answer among all tokens; 1 is the model's first choice."""

    @property
    def difference(self) -> Float[np.ndarray, " n"]:
        """logit(right) − logit(wrong): positive where the model is right."""
        return self.right_logit - self.wrong_logit


def filter_pairs(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """Stage: write the confident pairs of both splits and ``prompts``, a table with one row per prompt.

    A pair is kept if its clean prompt passes every threshold; ``prompts`` tells of all prompts, kept or not.

    Inputs: ``model`` (manifest), ``train``, ``test`` (token tables). Params: ``min_difference`` (least logit(right) −
    logit(wrong)), ``min_probability``, ``max_rank`` (None: no threshold), ``metric`` (how several answers are joined),
    ``dtype``, ``compute``. A prompt without wrong answers is held against the likeliest token that is not right:
    its difference is positive where the right answer is the model's first choice.

    :raises UserError: no pair of a split passes.
    """
    lm = load_model(inputs["model"], dtype=params["dtype"], device=params["compute"]["device"])
    metric = metric_of(params["metric"])
    tables = []
    for split in SPLITS:
        pairs, table = load_token_pairs(inputs[split]), read_table(inputs[split])
        found = {"clean": measure(lm, pairs, metric, "clean", split)}
        if bool(pairs.has_patch.any()):
            found["patched"] = measure(lm, pairs, metric, "patched", split)
        kept = passes(found["clean"], params)
        _check_some(split, kept, found["clean"], params)
        write_table(out.files[split], {name: column[kept] for name, column in table.items()}, out.provenance)
        tables += [_rows(split, side, pairs, table, values, kept) for side, values in found.items()]
        logger.info("%s: %d of %d pairs are confident", split, kept.sum(), len(kept))
    columns = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    write_table(out.files["prompts"], columns, out.provenance)


def measure(lm: LanguageModel, pairs: TokenPairs, metric: Metric, side: str, what: str = "") -> Confidence:
    """Run the model on the clean or the patched prompts; each side has its own right answers.

    Entries of pairs without a patched prompt mean nothing on the patched side.
    """
    if side == "patched":
        tokens, right, wrong = pairs.patch, pairs.wrong, pairs.right
    else:
        tokens, right, wrong = pairs.clean, pairs.right, pairs.wrong
    columns: list[list[Tensor]] = [[], [], [], []]
    for rows, logits in _answer_logits(lm, tokens, pairs, f"{what} {side} prompts"):
        good, bad = right[rows].to(logits.device), wrong[rows].to(logits.device)
        log_probability = logits.log_softmax(-1)
        best = logits.gather(-1, good.clamp(min=0)).masked_fill(good < 0, -torch.inf).amax(-1)
        probability = log_probability.gather(-1, good.clamp(min=0)).exp().masked_fill(good < 0, 0).sum(-1)
        rank = 1 + (logits > best[:, None]).sum(-1)
        for column, values in zip(
            columns,
            (metric.joined(logits, good), _wrong_logit(metric, logits, good, bad), probability, rank),
            strict=True,
        ):
            column.append(values.cpu())
    return Confidence(*(torch.cat(column).numpy() for column in columns))


def _wrong_logit(
    metric: Metric, logits: Float[Tensor, "batch vocab"], good: Tensor, bad: Tensor
) -> Float[Tensor, " batch"]:
    """Wrong answers joined; where there are none, the largest logit of a token that is not right."""
    row, place = (good >= 0).nonzero(as_tuple=True)
    right = torch.zeros_like(logits, dtype=torch.bool)
    right[row, good[row, place]] = True
    best_other = logits.masked_fill(right, -torch.inf).amax(-1)
    given = (bad >= 0).any(-1)
    return torch.where(given, metric.joined(logits, bad), best_other) if bool(given.any()) else best_other


def passes(found: Confidence, thresholds: Mapping[str, Any]) -> np.ndarray:
    """Which prompts pass every threshold, (n,) bool."""
    kept = found.probability >= thresholds["min_probability"]
    if thresholds["min_difference"] is not None:
        kept &= found.difference >= thresholds["min_difference"]
    if thresholds["max_rank"] is not None:
        kept &= found.rank <= thresholds["max_rank"]
    return kept


def _answer_logits(
    lm: LanguageModel, tokens: Tensor, pairs: TokenPairs, what: str
) -> Iterator[tuple[slice, Float[Tensor, "batch vocab"]]]:
    """Logits at the position of the answer, float32, a batch of prompts at a time."""
    for start in range(0, len(pairs), BATCH_PROMPTS):
        rows = slice(start, start + BATCH_PROMPTS)
        mask, position = pairs.mask[rows].to(lm.device), pairs.position[rows].to(lm.device)
        last = run(lm, tokens[rows].to(lm.device), mask).last
        assert last is not None
        yield rows, lm.unembed(last[torch.arange(len(last), device=lm.device), position]).detach().float()
        progress(what, min(start + BATCH_PROMPTS, len(pairs)), len(pairs))


def _rows(
    split: str,
    side: str,
    pairs: TokenPairs,
    table: Mapping[str, np.ndarray],
    found: Confidence,
    kept: np.ndarray,
) -> dict[str, np.ndarray]:
    """Columns of ``prompts`` for one split and side."""
    there = np.ones(len(pairs), bool) if side == "clean" else pairs.has_patch.numpy()
    n = int(there.sum())
    text = table["clean_text"] if side == "clean" else table["patch_text"]
    right, wrong = ("right_tokens", "wrong_tokens") if side == "clean" else ("wrong_tokens", "right_tokens")
    return {
        "split": np.array([split] * n, object),
        "case": table["case"][there],
        "variant": table["variant"][there],
        "pair": table["pair"][there],
        "side": np.array([side] * n, object),
        "prompt": text[there],
        "right_answer": np.array([_listed(tokens) for tokens in table[right][there]], object),
        "wrong_answer": np.array([_listed(tokens) for tokens in table[wrong][there]], object),
        "right_logit": found.right_logit[there],
        "wrong_logit": found.wrong_logit[there],
        "difference": found.difference[there],
        "probability": found.probability[there],
        "rank": found.rank[there],
        "kept": kept[there],
    }


def _listed(tokens: np.ndarray) -> str:
    return " | ".join(tokens)


def _check_some(split: str, kept: np.ndarray, found: Confidence, thresholds: Mapping[str, Any]) -> None:
    if kept.any():
        return
    names = ("min_difference", "min_probability", "max_rank")
    shown = ", ".join(f"{name} {thresholds[name]}" for name in names if thresholds[name] is not None)
    best = f"difference {found.difference.max():.2f}, probability {found.probability.max():.3f} and "
    best += f"rank {found.rank.min()}"
    raise UserError(
        f"No {split} pair passes task.confidence ({shown}); the best values of any clean prompt are {best}: loosen the "
        "thresholds or try another model."
    )
