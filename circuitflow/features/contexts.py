"""Stage ``describe_features``: what the top features of a site fire on, in text and in the task, and promote."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from circuitflow.data.token_pairs import TokenPairs, load_token_pairs
from circuitflow.dictionaries.dictionary import Dictionary, load_dictionary
from circuitflow.features.firing import BestPlaces, Firing, Strengths, TokenTally, firing, rounded
from circuitflow.features.logit_weights import CONVENTION, listed_logits
from circuitflow.features.tokens import token_text
from circuitflow.jobs import Output, progress
from circuitflow.models.loading import load_model
from circuitflow.store.arrays import Store, open_store
from circuitflow.store.files import write_json
from circuitflow.store.tables import read_table

ROWS_AT_ONCE = 8192  # about; bounds memory, changes no number
PAIRS_AT_ONCE = 64
TOKENS_LISTED = 12
SPARE = 3
"""Times as many places are kept as contexts are wanted: sentences that say the same are then left out."""

CONVENTIONS = {
    "fires_on": "tokens by Σ activation² over the corpus; mean: activation where active; share: of the token's "
    "occurrences at which the feature is active; n: such occurrences",
    "contexts": "windows around the largest activations, one per document and block, none twice",
    "histogram": "activations where active, in half octaves",
    "task": "clean and patched training prompts; prompts: the one with the largest activation of each case",
    "logits": CONVENTION,
}


@dataclass(frozen=True)
class Reader:
    """The chosen features of one dictionary, and the tokenizer that turns ids into text."""

    site: str
    dictionary: Dictionary
    chosen: Int64[Tensor, " m"]
    tokenizer: Any
    vocabulary: int

    def fired(self, x: Float[np.ndarray, "n d_model"], positions: Int64[np.ndarray, " n"]) -> Firing:
        """Activations of the chosen features."""
        device = self.chosen.device
        return firing(
            self.dictionary,
            torch.from_numpy(x).to(device),
            torch.from_numpy(positions).to(device),
            self.chosen,
        )

    def texts(self, tokens: np.ndarray) -> list[str]:
        """Text of each token."""
        return [token_text(self.tokenizer, int(token)) for token in tokens]

    def named(self, entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Entries with an ``id``, and the token's text beside it."""
        return [{"token": token_text(self.tokenizer, entry["id"]), **entry} for entry in entries]


def describe_features(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Describe the features of one site with the largest |score| on train, as JSON.

    Inputs ``model``, ``dictionary``, ``activations``, ``corpus``, ``nodes`` (table of rank_features), ``tokens`` and
    ``gradients`` (training pairs); params ``site``, ``top`` (features), ``contexts`` (per feature), ``window``
    (tokens on each side of the peak), ``logits`` (tokens listed per side), ``compute``; output ``features``.

    A dictionary without an encoder has logit weights only: no activations, no task.
    """
    site, device = params["site"], params["compute"]["device"]
    lm = load_model(inputs["model"], device=device)
    dictionary = load_dictionary(inputs["dictionary"], lm.width(site)).to(device)
    features = _chosen(read_table(inputs["nodes"]), site, params["top"])
    chosen = torch.from_numpy(features).to(device)
    reader = Reader(site, dictionary, chosen, lm.tokenizer, int(lm.hf.config.vocab_size))
    logits = listed_logits(lm, dictionary.writes[0], dictionary.W_dec[chosen], params["logits"])
    described: list[dict[str, Any]] = [
        {"feature": int(feature), **entry} for feature, entry in zip(features, logits, strict=True)
    ]
    name_logits(described, reader)
    tokens = 0
    if dictionary.W_enc is not None:
        text = open_text([site], inputs["activations"], inputs["corpus"])
        tokens = add_text(described, reader, text, params)
        _add_task(described, reader, inputs)
    facts = {"kind": dictionary.kind, "d_dict": dictionary.d_dict, "settings": dict(dictionary.settings)}
    value = {
        "site": site,
        "tokens": tokens,
        "dictionary": facts,
        "conventions": CONVENTIONS,
        "features": described,
    }
    write_json(out.files["features"], {**value, "provenance": out.provenance})


def name_logits(described: Sequence[dict[str, Any]], reader: Reader) -> None:
    """Put the text of each token beside its id where logits are listed."""
    for entry in described:
        if "logits" in entry:
            entry["logits"] = {side: reader.named(tokens) for side, tokens in entry["logits"].items()}


def _chosen(nodes: Mapping[str, np.ndarray], site: str, top: int) -> Int64[np.ndarray, " m"]:
    here = (nodes["site"] == site) & (nodes["kind"] == "feature")
    order = np.argsort(nodes["rank"][here], kind="stable")[:top]
    return nodes["feature"][here][order].astype(np.int64)


@dataclass(frozen=True)
class Text:
    """The corpus with the activations that a dictionary reads, in batches of whole blocks."""

    store: Store
    sites: tuple[str, ...]
    """Of several, vectors lie side by side."""
    block: int
    tokens: Int64[np.ndarray, " rows"]
    passage: Int64[np.ndarray, " rows"]
    """Number of the passage (a document's part within one block) that each token belongs to, rising."""

    def batches(
        self, wanted: np.ndarray | None = None
    ) -> Iterator[tuple[int, Float[np.ndarray, "n d_model"]]]:
        """First row and activations of each batch; only those with a row of ``wanted``, if given."""
        step = max(1, ROWS_AT_ONCE // self.block) * self.block
        for start in range(0, len(self.tokens), step):
            stop = min(start + step, len(self.tokens))
            if wanted is None or np.any((wanted >= start) & (wanted < stop)):
                parts = [self.store.read(site, start, stop) for site in self.sites]
                yield start, parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def window(self, row: int, reach: int) -> np.ndarray:
        """Rows at most ``reach`` away in the same passage: all that attention saw of the same text."""
        near = np.arange(max(row - reach, 0), min(row + reach + 1, len(self.tokens)))
        return near[self.passage[near] == self.passage[row]]


def open_text(sites: Sequence[str], activations: Path, corpus: Path) -> Text:
    """The corpus beside its activations at one site, or at several of one store."""
    words, store = open_store(corpus), open_store(activations)
    tokens, documents = (words.read(name).astype(np.int64) for name in ("tokens", "documents"))
    block = tokens.shape[1]
    row = np.arange(tokens.size)
    starts = (row % block == 0) | (np.diff(documents.ravel(), prepend=-1) != 0)
    return Text(store, tuple(sites), block, tokens.ravel(), starts.cumsum() - 1)


def add_text(described: list[dict[str, Any]], reader: Reader, text: Text, params: Mapping[str, Any]) -> int:
    """Densities, histograms, tokens and contexts from the corpus; gives the number of its tokens.

    :param described: an entry for each of the reader's features, to be added to.
    :param params: ``contexts`` (per feature) and ``window`` (tokens on each side of the peak).
    """
    strengths, tally = Strengths(len(described)), TokenTally(reader.vocabulary)
    best = BestPlaces(params["contexts"] * SPARE)
    for start, x in text.batches():
        rows = slice(start, start + len(x))
        fired = reader.fired(x, np.arange(rows.start, rows.stop) % text.block)
        strengths.add(fired, len(x))
        tally.add(fired, text.tokens[rows])
        best.add(fired, text.passage[rows], start)
        progress("rows of text", rows.stop, len(text.tokens))
    windows = _windows(text, best, len(described), params["contexts"], params["window"])
    wanted = {int(row) for place in windows for rows in place for row in rows}
    values = _values(text, reader, np.array(sorted(wanted), np.int64))
    for place, entry in enumerate(described):
        entry.update(strengths.of(place))
        entry["fires_on"] = reader.named(tally.top(place, TOKENS_LISTED))
        entry["contexts"] = [_context(text, reader, rows, values, place) for rows in windows[place]]
    return len(text.tokens)


def _windows(text: Text, best: BestPlaces, features: int, limit: int, reach: int) -> list[list[np.ndarray]]:
    """Per feature the rows of its contexts; a peak whose four tokens so far are those of a stronger one is left out."""
    found: list[list[np.ndarray]] = []
    for place in range(features):
        kept: dict[tuple[int, ...], np.ndarray] = {}
        for row in best.of(place):
            rows = text.window(row, reach)
            so_far = rows[rows <= row][-4:]
            kept.setdefault(tuple(text.tokens[so_far].tolist()), rows)
        found.append(list(kept.values())[:limit])
    return found


def _values(text: Text, reader: Reader, rows: np.ndarray) -> dict[tuple[int, int], float]:
    """Activations by (feature's place, row) at the wanted rows; inactive ones are absent."""
    values: dict[tuple[int, int], float] = {}
    for start, x in text.batches(wanted=rows):
        here = rows[(rows >= start) & (rows < start + len(x))]
        fired = reader.fired(x[here - start], here % text.block)
        keys = zip(fired.place.tolist(), here[fired.row].tolist(), strict=True)
        values.update(zip(keys, fired.value.tolist(), strict=True))
    return values


def _context(
    text: Text, reader: Reader, rows: np.ndarray, values: Mapping[tuple[int, int], float], place: int
) -> dict[str, Any]:
    activations = [rounded(values.get((place, int(row)), 0.0)) for row in rows]
    return {
        "block": int(rows[0]) // text.block,
        "start": int(rows[0]) % text.block,
        "peak": int(np.argmax(np.abs(activations))),
        "tokens": reader.texts(text.tokens[rows]),
        "activations": activations,
    }


def _add_task(described: list[dict[str, Any]], reader: Reader, inputs: Mapping[str, Path]) -> None:
    """The tokens of the task's prompts on which features fire, and the prompt of each case on which most."""
    pairs, store = load_token_pairs(inputs["tokens"]), open_store(inputs["gradients"])
    tally = TokenTally(reader.vocabulary)
    best = BestPlaces(len(set(pairs.case)))
    prompts = _Prompts(pairs, store, reader)
    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        stop = min(start + PAIRS_AT_ONCE, len(pairs))
        for side in ("clean", "patched"):
            fired, number = prompts.fired(side, start, stop)
            tally.add(fired, prompts.tokens[number])
            best.add(Firing(number[fired.row], fired.place, fired.value), prompts.cases, 0)
        progress("pairs of the task", stop, len(pairs))
    for place, entry in enumerate(described):
        shown = [prompts.of_token(number) for number in best.of(place)]
        entry["task"] = {
            "tokens": reader.named(tally.top(place, TOKENS_LISTED)),
            "prompts": [_prompt(prompts, reader, side, pair, place) for side, pair in shown],
        }


class _Prompts:
    """Clean and patched prompts as one list of token places: number = (side, pair, position) in row-major order."""

    def __init__(self, pairs: TokenPairs, store: Store, reader: Reader) -> None:
        self.pairs, self._store, self._reader = pairs, store, reader
        self._shape = (2, *pairs.mask.shape)
        self.tokens = torch.stack([pairs.clean, pairs.patch]).numpy().ravel()
        cases = {case: number for number, case in enumerate(dict.fromkeys(pairs.case))}
        of_pair = np.array([cases[case] for case in pairs.case])
        self.cases = np.broadcast_to(of_pair[None, :, None], self._shape).ravel()

    def fired(self, side: str, start: int, stop: int) -> tuple[Firing, np.ndarray]:
        """Activations at the real tokens of some pairs, and the number of each token encoded."""
        real = self.pairs.mask[start:stop].numpy().astype(bool)
        if side == "patched":
            real = real & self.pairs.has_patch[start:stop].numpy().astype(bool)[:, None]
        pair, position = np.nonzero(real)
        x = self._store.read(f"{self._reader.site}/{side}", start, stop)[pair, position]
        fired = self._reader.fired(np.ascontiguousarray(x), position)
        number = np.ravel_multi_index(
            (int(side == "patched") + 0 * pair, pair + start, position), self._shape
        )
        return fired, number

    def of_token(self, number: int) -> tuple[str, int]:
        """Side and pair of a token."""
        side, pair, _ = np.unravel_index(number, self._shape)
        return ("clean", "patched")[int(side)], int(pair)


def _prompt(prompts: _Prompts, reader: Reader, side: str, pair: int, place: int) -> dict[str, Any]:
    fired, number = prompts.fired(side, pair, pair + 1)
    activations = np.zeros(len(number))
    here = fired.place == place
    activations[fired.row[here]] = fired.value[here]
    return {
        "case": prompts.pairs.case[pair],
        "side": side,
        "peak": int(np.argmax(np.abs(activations))),
        "tokens": reader.texts(prompts.tokens[number]),
        "activations": [rounded(value) for value in activations],
    }
