"""Node scores of one site: gradient × decoder × change, from cached tensors alone. No model runs here."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from circuitflow.attribution.cached import Batch, batches
from circuitflow.attribution.changes import Effects, changes_of, effects_of
from circuitflow.attribution.nodes import ERROR, SUMMED, kinds
from circuitflow.attribution.sparse import sum_by
from circuitflow.data.token_pairs import SPLITS, TokenPairs, load_token_pairs
from circuitflow.dictionaries.dictionary import ENCODE_ENTRIES, Dictionary, linear, load_dictionary
from circuitflow.errors import UserError, nearest
from circuitflow.jobs import Output, progress
from circuitflow.store.arrays import Store, open_store
from circuitflow.store.tables import read_provenance, read_table, write_table

CHUNK_PAIRS = 64
"""Pairs encoded at once; bounds memory, changes no score."""

POSITIONS = {
    "sum": "summed over positions, then averaged over pairs",
    "last": "at the token where the answer is read alone, averaged over pairs",
    "none": "each position by itself, averaged over pairs",
}
METHODS = {
    "atp": "attribution patching: gradient of the clean run x (patched - clean)",
    "ig": "integrated gradients: mean gradient between clean and patched, one site at a time, x (patched - clean)",
    "relp": "relevance patching: gradient with norms and activations as fixed scalings x (patched - clean)",
    "decoder_only": "mean |gradient . decoder row| over pairs and positions; unsigned, not an effect",
    "exact": "each node alone patched and the model run again: difference of the metric",
    "sae_in_loop": "dictionaries spliced into the model's forward and backward pass",
}

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class SplitScores:
    """Scores of one split as columns; nodes that change in no pair score 0 and have no row."""

    nodes: Columns
    """kind, feature, position, score, se, absolute, activity, n: one row per node; error nodes come last."""
    positions: Columns
    """case, position, kind, feature, score, n: mean over the pairs of a case at one position."""
    pairs: Columns
    """pair, kind, feature, position, score: the effect in each pair in which the node changes."""
    unaligned: list[str]
    """Cases whose prompts differ in length: the same position means different things, so they have no ``positions``."""


def score_nodes(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Score the features and the error of one site on both splits.

    Inputs ``dictionary``, ``gradients_{split}``, ``tokens_{split}``, and for the methods ig and relp
    ``method_gradients_{split}`` (store of cache_method_gradients), whose gradient takes the place of the plain one;
    params ``site``, optionally ``method`` (atp | ig | relp | decoder_only; atp by default, and decoder_only for a
    dictionary without an encoder), ``positions`` (sum | last | none), ``compute``; outputs ``scores``, ``positions``,
    ``pairs``: the columns of :class:`SplitScores`, preceded by ``split``.

    :raises UserError: an unknown choice, gradients of another method, or per-position nodes of prompts that differ in
        length.
    """
    site, device = params["site"], params.get("compute", {}).get("device", "cpu")
    positions = params.get("positions", "sum")
    stores = {split: open_store(inputs[f"gradients_{split}"]) for split in SPLITS}
    width = stores["train"].shape(f"{site}/clean")[2]
    dictionary = load_dictionary(inputs["dictionary"], width).to(device)
    method = _method(params, dictionary)
    score = score_decoder if method == "decoder_only" else score_pairs
    found: dict[str, SplitScores] = {}
    for split, store in stores.items():
        pairs = load_token_pairs(inputs[f"tokens_{split}"])
        check_positions(positions, pairs, split)
        cached = batches(store, [site], pairs, CHUNK_PAIRS, device)
        if method in ("ig", "relp"):
            cached = _with_gradients(cached, _method_store(inputs, split, method, pairs), site)
        watched = _watched(cached, f"{split} pairs", len(pairs))
        found[split] = score(dictionary, site, watched, pairs, positions)
    write_scores(found, site, method, positions, out, {name: out.files[name] for name in TABLES})


TABLES = {"scores": "nodes", "positions": "positions", "pairs": "pairs"}
"""Outputs of a scoring stage and what of :class:`SplitScores` each holds."""


def write_scores(
    found: Mapping[str, SplitScores],
    site: str,
    method: str,
    positions: str,
    out: Output,
    files: Mapping[str, Path],
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write the three tables of one site, splits one after the other."""
    facts = {
        "site": site,
        "method": METHODS[method],
        "unaligned_cases": {split: scores.unaligned for split, scores in found.items()},
        "conventions": {
            "sign": "score > 0: the clean value supports the clean answer",
            "positions": POSITIONS[positions],
            "unpaired": "patch state 0",
        },
        **(notes or {}),
    }
    for name, table in TABLES.items():
        columns = _stacked({split: getattr(scores, table) for split, scores in found.items()})
        write_table(files[name], columns, {**out.provenance, **facts})


def check_positions(positions: str, pairs: TokenPairs, split: str = "train") -> None:
    """Check that nodes can be per position: all pairs have one length and one answer position.

    :raises UserError: they have not, or ``positions`` is none of the choices.
    """
    if positions not in POSITIONS:
        raise UserError(f"Key scores.positions is {positions}; {nearest(positions, POSITIONS)}.")
    lengths = pairs.mask.sum(1)
    if positions == "none" and bool(
        (lengths != lengths[0]).any() | (pairs.position != pairs.position[0]).any()
    ):
        raise UserError(
            f"Key scores.positions is none, but the {split} prompts are {int(lengths.min())} to {int(lengths.max())} "
            f"tokens long with the answer read at positions {int(pairs.position.min())} to "
            f"{int(pairs.position.max())}, so the same position means different things; take one structure of the "
            "task and set task.length.mode to modal, or set scores.positions to sum or last."
        )


def score_pairs(
    dictionary: Dictionary,
    site: str,
    batches: Iterable[Batch],
    pairs: TokenPairs,
    positions: str = "sum",
) -> SplitScores:
    """Gradient × change of a split (AtP; IG if the batches carry mean gradients); the batches may be cut anywhere."""
    tally = Tally(pairs, dictionary.d_dict, positions)
    for batch in batches:
        changes = changes_of(dictionary, batch.sites[site], batch.pairs, positions)
        tally.add(effects_of(changes, dictionary.W_dec), batch.start)
    return tally.result()


class Tally:
    """Adds up the effects of batches of pairs and makes the tables of a split; batches may be cut anywhere."""

    def __init__(self, pairs: TokenPairs, d_dict: int, positions: str = "sum") -> None:
        self.pairs, self.d_dict, self.per_position = pairs, d_dict, positions == "none"
        self.cases = sorted(set(pairs.case))
        self.case = torch.tensor([self.cases.index(name) for name in pairs.case])
        self.nodes, self.pos = d_dict + 1, pairs.mask.shape[1]
        self._by_pair: list[tuple[Tensor, Tensor]] = []
        self._by_position: list[tuple[Tensor, Tensor]] = []

    def add(self, effects: Effects, first: int = 0) -> None:
        """Take in the effects of a batch whose pair 0 is pair ``first`` of the split.

        An entry at position SUMMED is an effect of a node at all positions at once, and is in no table per position.
        """
        pair, at = effects.pair + first, effects.position
        node = at * self.nodes + effects.node if self.per_position else effects.node
        self._by_pair.append(sum_by(pair * self._width + node, effects.effect))
        known = at != SUMMED
        slot = self.case.to(pair.device)[pair[known]] * self.pos + at[known]
        self._by_position.append(sum_by(slot * self.nodes + effects.node[known], effects.effect[known]))

    def result(self) -> SplitScores:
        """The tables of all pairs."""
        pair_keys, pair_sums = _joined(self._by_pair)
        slot_keys, slot_sums = _joined(self._by_position)
        aligned = np.array([_is_aligned(self.pairs, name) for name in self.cases])
        size = np.bincount(self.case.numpy(), minlength=len(self.cases))
        pair, node = pair_keys // self._width, pair_keys % self._width
        return SplitScores(
            nodes=self._statistics(node, pair_sums),
            positions=_position_columns(
                slot_keys, slot_sums, self.cases, size, aligned, self.nodes, self.pos
            ),
            pairs={"pair": np.asarray(self.pairs.pair)[pair], **self._named(node), "score": pair_sums},
            unaligned=[name for name, lined_up in zip(self.cases, aligned, strict=True) if not lined_up],
        )

    @property
    def _width(self) -> int:
        """Different nodes: features and error, at each position if nodes have one."""
        return self.nodes * (self.pos if self.per_position else 1)

    def _named(self, node: np.ndarray) -> Columns:
        position = node // self.nodes if self.per_position else np.full_like(node, SUMMED)
        return {**_named(node % self.nodes, self.d_dict), "position": position}

    def _statistics(self, node: np.ndarray, effect: np.ndarray) -> Columns:
        """Statistics over all pairs from one entry per pair and node; pairs without an entry count as 0."""

        def total(values: np.ndarray) -> np.ndarray:
            return np.bincount(node, values, minlength=self._width)

        n, active = len(self.pairs), np.bincount(node, minlength=self._width)
        mean, se = _mean_and_error(total(effect), total(effect**2), n)
        touched = np.flatnonzero(active)
        touched = touched[
            np.lexsort((touched // self.nodes, touched % self.nodes))
        ]  # by feature, then position
        return {
            **self._named(touched),
            "score": mean[touched],
            "se": se[touched],
            "absolute": total(np.abs(effect))[touched] / n,
            "activity": active[touched] / n,
            "n": np.full(len(touched), n, np.int64),
        }


def score_decoder(
    dictionary: Dictionary,
    site: str,
    batches: Iterable[Batch],
    pairs: TokenPairs,
    positions: str = "sum",
) -> SplitScores:
    """Mean |g·W_dec| over the tokens of each pair, then over pairs: all that a bare decoder allows.

    With positions "last" or "none" it is |g·W_dec| at the answer's token, or at each. There is no error node, and no
    row per pair (each would hold every feature).
    """
    pos = pairs.mask.shape[1] if positions == "none" else 1
    total = torch.zeros(pos, dictionary.d_dict, dtype=torch.float64)
    squares = torch.zeros_like(total)
    for batch in batches:
        for size, at in _sizes(dictionary, batch.sites[site].gradient, batch.pairs, positions):
            total.index_add_(0, at, size)
            squares.index_add_(0, at, size.square_())
    n = len(pairs)
    position, feature = (index.reshape(-1) for index in np.indices(total.shape))
    mean, se = _mean_and_error(total.numpy().reshape(-1), squares.numpy().reshape(-1), n)
    nodes = {
        **_named(feature, dictionary.d_dict),
        "position": position if positions == "none" else np.full_like(position, SUMMED),
        "score": mean,
        "se": se,
        "absolute": mean,
        "activity": np.ones_like(mean),
        "n": np.full_like(feature, n),
    }
    return SplitScores(nodes, _no_rows(POSITION_COLUMNS), _no_rows(PAIR_COLUMNS), [])


def _sizes(
    dictionary: Dictionary, gradient: Float[Tensor, "batch pos d_model"], pairs: TokenPairs, positions: str
) -> Iterator[tuple[Float[Tensor, "rows d_dict"], Int64[Tensor, " rows"]]]:
    """|g·W_dec| of a few pairs at a time, float64, and the row of the totals that each belongs to.

    One row a pair, the mean over its tokens; with positions "none" one row a token.
    """
    place = torch.arange(pairs.mask.shape[1], device=gradient.device)
    counted = place == pairs.position[:, None] if positions == "last" else pairs.mask.bool()
    step = max(1, ENCODE_ENTRIES // max(1, dictionary.d_dict * len(place)))
    for rows in torch.arange(len(gradient), device=gradient.device).split(step):
        pair, at = counted[rows].nonzero(as_tuple=True)
        size = linear(gradient[rows][pair, at], dictionary.W_dec).abs_()
        if positions == "none":
            yield size.double().cpu(), at.cpu()
            continue
        share = size.new_zeros(len(rows), len(pair))
        share[pair, torch.arange(len(pair), device=pair.device)] = 1 / counted[rows].sum(1)[pair].to(
            size.dtype
        )
        yield (share @ size).double().cpu(), torch.zeros(len(rows), dtype=torch.int64)


PAIR_COLUMNS = {"pair": "i8", "kind": "U1", "feature": "i8", "position": "i8", "score": "f8"}
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


def _method(params: Mapping[str, Any], dictionary: Dictionary) -> str:
    method = str(params.get("method") or "atp")
    own = ("atp", "ig", "relp", "decoder_only")
    if method not in own:
        raise UserError(
            f"Key scores.method is {method}, which score_nodes does not do; {nearest(method, own)}."
        )
    return "decoder_only" if dictionary.W_enc is None else method


def _method_store(inputs: Mapping[str, Path], split: str, method: str, pairs: TokenPairs) -> Store:
    store = open_store(inputs[f"method_gradients_{split}"])
    if store.attrs["method"] != method or store.rows != len(pairs):
        raise UserError(
            f"Store {store.manifest} holds gradients of method {store.attrs['method']} for {store.rows} pairs, but "
            f"{method} of {len(pairs)} pairs is asked for; run the stage cache_method_gradients again."
        )
    return store


def _with_gradients(cached: Iterable[Batch], store: Store, site: str) -> Iterator[Batch]:
    """The same batches with the gradient of another store."""
    for batch in cached:
        here = batch.sites[site]
        values = store.read(f"{site}/gradient", batch.start, batch.stop)[:, : batch.pairs.mask.shape[1]]
        gradient = torch.from_numpy(values.copy()).to(here.gradient.device)
        yield replace(batch, sites={**batch.sites, site: replace(here, gradient=gradient)})


def _watched(cached: Iterable[Batch], what: str, total: int) -> Iterator[Batch]:
    for batch in cached:
        yield batch
        progress(what, batch.stop, total)


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    """Keys and sums of all batches, keys in more than one batch added up."""
    if not parts:
        return np.zeros(0, np.int64), np.zeros(0)
    keys, sums = sum_by(torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]))
    return keys.cpu().numpy(), sums.cpu().numpy()


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
