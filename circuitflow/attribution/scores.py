"""Node scores of one site: gradient × decoder × change, from cached tensors alone. No model runs here."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuitflow.attribution.cached import Batch, batches
from circuitflow.attribution.changes import changes_of, effects_of
from circuitflow.attribution.nodes import ERROR, kinds
from circuitflow.attribution.sparse import sum_by
from circuitflow.data.token_pairs import SPLITS, TokenPairs, load_token_pairs
from circuitflow.dictionaries.dictionary import Dictionary, load_dictionary
from circuitflow.errors import UserError, nearest
from circuitflow.jobs import Output, progress
from circuitflow.store.arrays import open_store
from circuitflow.store.tables import read_provenance, read_table, write_table

CHUNK_PAIRS = 64
"""Pairs encoded at once; bounds memory, changes no score."""

CONVENTIONS = {
    "sign": "score > 0: the clean value supports the clean answer",
    "positions": "summed over positions, then averaged over pairs",
    "unpaired": "patch state 0",
}
METHODS = {
    "atp": "attribution patching: gradient of the clean run x (patched - clean)",
    "decoder_only": "mean |gradient . decoder row| over pairs and positions; unsigned, not an effect",
}

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class SplitScores:
    """Scores of one split as columns; nodes that change in no pair score 0 and have no row."""

    nodes: Columns
    """kind, feature, score, se, absolute, activity, n: one row per node; the error comes last."""
    positions: Columns
    """case, position, kind, feature, score, n: mean over the pairs of a case at one position."""
    pairs: Columns
    """pair, kind, feature, score: the effect in each pair in which the node changes."""
    unaligned: list[str]
    """Cases whose prompts differ in length: the same position means different things, so they have no ``positions``."""


def score_nodes(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Score the features and the error of one site on both splits.

    Inputs ``dictionary``, ``gradients_{split}``, ``tokens_{split}``; params ``site``, optionally ``compute``;
    outputs ``scores``, ``positions``, ``pairs``: the columns of :class:`SplitScores`, preceded by ``split``.
    """
    site, device = params["site"], params.get("compute", {}).get("device", "cpu")
    stores = {split: open_store(inputs[f"gradients_{split}"]) for split in SPLITS}
    width = stores["train"].shape(f"{site}/clean")[2]
    dictionary = load_dictionary(inputs["dictionary"], width).to(device)
    method = "decoder_only" if dictionary.W_enc is None else "atp"
    found: dict[str, SplitScores] = {}
    for split, store in stores.items():
        pairs = load_token_pairs(inputs[f"tokens_{split}"])
        cached = _watched(batches(store, [site], pairs, CHUNK_PAIRS, device), f"{split} pairs", len(pairs))
        found[split] = METHOD_FUNCTIONS[method](dictionary, site, cached, pairs)
    facts = {
        "site": site,
        "method": METHODS[method],
        "unaligned_cases": {split: scores.unaligned for split, scores in found.items()},
        "conventions": CONVENTIONS,
    }
    for name, table in (("scores", "nodes"), ("positions", "positions"), ("pairs", "pairs")):
        columns = _stacked({split: getattr(scores, table) for split, scores in found.items()})
        write_table(out.files[name], columns, {**out.provenance, **facts})


def score_pairs(
    dictionary: Dictionary, site: str, batches: Iterable[Batch], pairs: TokenPairs
) -> SplitScores:
    """AtP scores of a split (IG, if the batches carry mean gradients); the batches may be cut anywhere."""
    cases = sorted(set(pairs.case))
    case = torch.tensor([cases.index(name) for name in pairs.case])
    nodes, pos = dictionary.d_dict + 1, pairs.mask.shape[1]
    by_pair, by_position = [], []
    for batch in batches:
        changes = changes_of(dictionary, batch.sites[site], batch.pairs)
        effects = effects_of(changes, dictionary.W_dec)
        pair = effects.pair + batch.start
        slot = case.to(pair.device)[pair] * pos + effects.position
        by_pair.append(sum_by(pair * nodes + effects.node, effects.effect))
        by_position.append(sum_by(slot * nodes + effects.node, effects.effect))
    pair_keys, pair_sums = _joined(by_pair)
    slot_keys, slot_sums = _joined(by_position)
    aligned = np.array([_is_aligned(pairs, name) for name in cases])
    size = np.bincount(case.numpy(), minlength=len(cases))
    return SplitScores(
        nodes=_node_columns(pair_keys % nodes, pair_sums, len(pairs), dictionary.d_dict),
        positions=_position_columns(slot_keys, slot_sums, cases, size, aligned, nodes, pos),
        pairs={
            "pair": np.asarray(pairs.pair)[pair_keys // nodes],
            **_named(pair_keys % nodes, dictionary.d_dict),
            "score": pair_sums,
        },
        unaligned=[name for name, lined_up in zip(cases, aligned, strict=True) if not lined_up],
    )


def score_decoder(
    dictionary: Dictionary, site: str, batches: Iterable[Batch], pairs: TokenPairs
) -> SplitScores:
    """Mean |g·W_dec| over the tokens of each pair, then over pairs: all that a bare decoder allows.

    There is no error node, and no row per pair or position (each would hold every feature).
    """
    total = torch.zeros(dictionary.d_dict, dtype=torch.float64)
    squares = torch.zeros_like(total)
    for batch in batches:
        for row, gradient in enumerate(batch.sites[site].gradient):
            tokens = gradient[batch.pairs.mask[row].bool()]
            size = (tokens @ dictionary.W_dec.T).abs().mean(0).double().cpu()
            total += size
            squares += size**2
    n = len(pairs)
    features = np.arange(dictionary.d_dict)
    mean, se = _mean_and_error(total.numpy(), squares.numpy(), n)
    nodes = {
        **_named(features, dictionary.d_dict),
        "score": mean,
        "se": se,
        "absolute": mean,
        "activity": np.ones_like(mean),
        "n": np.full_like(features, n),
    }
    return SplitScores(nodes, _no_rows(POSITION_COLUMNS), _no_rows(PAIR_COLUMNS), [])


METHOD_FUNCTIONS = {"atp": score_pairs, "decoder_only": score_decoder}

PAIR_COLUMNS = {"pair": "i8", "kind": "U1", "feature": "i8", "score": "f8"}
POSITION_COLUMNS = {"case": "U1", "position": "i8", "kind": "U1", "feature": "i8", "score": "f8", "n": "i8"}


def read_positions(path: Path, split: str, case: str) -> Columns:
    """Scores of one case at each position.

    :raises UserError: the case's prompts differ in length, or there is no such case.
    """
    if case in read_provenance(path).get("unaligned_cases", {}).get(split, []):
        raise UserError(
            f"Case '{case}' has {split} prompts of different lengths, so positions do not line up and scores per "
            "position mean nothing; set task.length.mode to modal, or use scores summed over positions."
        )
    table = read_table(path)
    keep = (table["split"] == split) & (table["case"] == case)
    if not keep.any():
        raise UserError(f"Table {path} has no case '{case}'; {nearest(case, sorted(set(table['case'])))}.")
    return {name: column[keep] for name, column in table.items()}


def _watched(cached: Iterable[Batch], what: str, total: int) -> Iterator[Batch]:
    for batch in cached:
        yield batch
        progress(what, batch.stop, total)


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    """Keys and sums of all batches, keys in more than one batch added up."""
    keys, sums = sum_by(torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]))
    return keys.cpu().numpy(), sums.cpu().numpy()


def _node_columns(node: np.ndarray, effect: np.ndarray, n: int, d_dict: int) -> Columns:
    """Statistics over the ``n`` pairs from one entry per pair and node; pairs without an entry count as 0."""

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(node, values, minlength=d_dict + 1)

    active = np.bincount(node, minlength=d_dict + 1)
    mean, se = _mean_and_error(total(effect), total(effect**2), n)
    touched = np.flatnonzero(active)
    return {
        **_named(touched, d_dict),
        "score": mean[touched],
        "se": se[touched],
        "absolute": total(np.abs(effect))[touched] / n,
        "activity": active[touched] / n,
        "n": np.full(len(touched), n, np.int64),
    }


def _mean_and_error(total: np.ndarray, squares: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and its standard error (NaN for a single pair)."""
    mean = total / n
    if n < 2:
        return mean, np.full_like(mean, np.nan)
    return mean, np.sqrt(np.maximum(squares - n * mean**2, 0) / (n - 1) / n)


def _position_columns(
    keys: np.ndarray,
    sums: np.ndarray,
    cases: list[str],
    size: np.ndarray,
    aligned: np.ndarray,
    nodes: int,
    pos: int,
) -> Columns:
    case = keys // nodes // pos
    kept = aligned[case] if len(case) else np.zeros(0, bool)
    keys, case, sums = keys[kept], case[kept], sums[kept]
    return {
        "case": np.array(cases, object)[case],
        "position": keys // nodes % pos,
        **_named(keys % nodes, nodes - 1),
        "score": sums / size[case],
        "n": size[case],
    }


def _is_aligned(pairs: TokenPairs, case: str) -> bool:
    """Whether the prompts of a case have one length and one answer position."""
    here = torch.tensor([name == case for name in pairs.case])
    lengths = pairs.mask[here].sum(1)
    positions = pairs.position[here]
    return bool((lengths == lengths[0]).all() and (positions == positions[0]).all())


def _named(node: np.ndarray, d_dict: int) -> Columns:
    feature = np.where(node == d_dict, ERROR, node)
    return {"kind": kinds(feature), "feature": feature}


def _no_rows(columns: Mapping[str, str]) -> Columns:
    return {name: np.zeros(0, kind) for name, kind in columns.items()}


def _stacked(parts: Mapping[str, Columns]) -> Columns:
    """Tables of several splits one after the other, with the split as first column."""
    split = np.repeat(np.array(list(parts), object), [len(columns["feature"]) for columns in parts.values()])
    names = next(iter(parts.values()))
    return {
        "split": split,
        **{name: np.concatenate([part[name] for part in parts.values()]) for name in names},
    }
