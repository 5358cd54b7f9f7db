"""Building the attribution graph of one prompt: rows of targets in order of influence, as many as the cap allows.

Definitions of Ameisen et al. 2025 (Circuit Tracing): the forward pass is the true model's, and direct effects are
those of the model with attention patterns and norm scales held and MLP outputs taken for sources of their own.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from circuitflow.data.prompts import PromptReader, start_token
from circuitflow.dictionaries.family import Family
from circuitflow.errors import UserError
from circuitflow.features.tokens import token_text
from circuitflow.graphs.directions import facts_of
from circuitflow.graphs.graph import Graph
from circuitflow.graphs.order import BLOCK, Known
from circuitflow.graphs.rows import Buffers, Rows, compute_rows, feature_targets
from circuitflow.graphs.sources import Sources
from circuitflow.graphs.targets import Logits, Target, chosen, most_probable
from circuitflow.models.frozen import FrozenPrompt
from circuitflow.models.prepared import check_length
from circuitflow.models.running import LanguageModel
from circuitflow.progress import progress

CONVENTIONS = {
    "weight": "direct effect of a source (row of an active feature: activation × decoder; error, token) on a target",
    "held": "attention patterns and norm scales; MLP outputs are sources",
    "feature": "value of a target: pre-activation, = activation where active",
    "error": "MLP output − reconstruction (b_dec and skip connection included)",
    "token": "input of the first block: position embeddings included",
    "logit": "logit − mean logit of the vocabulary, before any soft-cap; weighted by probability",
    "directions": "combinations of such logits, by the logit's place: coefficient of each token; weighted as asked",
}
PLAIN = {"chat_template": False, "generation_prefix": "", "prepend_bos": False, "position": "last"}
"""How prompts of graphs are read: as they stand."""
LONGEST = 80
"""Characters of a prompt in a message."""


@dataclass(frozen=True)
class Settings:
    """How far a graph goes."""

    max_logits: int = 10
    """At most this many next tokens."""
    probability: float = 0.95
    """The fewest tokens that have this probability together."""
    max_nodes: int | None = 2048
    """Features whose incoming effects are computed, the most influential first; None: all."""
    reorder_every: int = 512
    """Features after which the order of influence is computed again."""
    batch: int = 256
    """Features computed at once: bounds the memory and changes nothing else."""
    keep_all: bool = False
    """Whether features beyond the cap stay in the graph, as sources alone."""
    prepend_bos: bool = False
    """Whether a text begins with the tokenizer's start token."""


@dataclass
class Clock:
    """Where the time goes, and when to stop."""

    limit: float | None = None
    """Seconds after which no further rows are begun; None: no limit."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds by phase."""
    begun: float = field(default_factory=time.monotonic)
    batches: list[tuple[float, int]] = field(default_factory=list)
    """When a batch of features was done, in seconds from the beginning, and how many features then had rows."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside to a phase."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.monotonic() - start

    def reached(self, features: int) -> None:
        """Note that so many features have rows."""
        self.batches.append((time.monotonic() - self.begun, features))

    def until(self, features: int) -> float | None:
        """Seconds until so many features have rows, at the pace of the batches after the first, which starts things up.

        None where there was one batch at most.
        """
        if len(self.batches) < 2:
            return None
        (first, some), (last, more) = self.batches[0], self.batches[-1]
        return last + (last - first) / (more - some) * (features - more)

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return self.limit is not None and time.monotonic() - self.begun > self.limit


def build_graph(
    lm: LanguageModel,
    family: Family,
    prompt: str | Sequence[int],
    *,
    targets: Sequence[Target] | None = None,
    settings: Settings = Settings(),
    facts: Mapping[str, Any] | None = None,
    clock: Clock | None = None,
) -> Graph:
    """The attribution graph of a prompt.

    :param prompt: text, tokenized as the model's tokenizer does by itself, or token ids.
    :param targets: what to explain; by default the most probable next tokens.
    :param facts: said in the graph besides what is known here (model, dictionaries, scan …).
    :param clock: keeps time by phase; its limit ends the search for further rows early, which the facts then say.
    :raises UserError: the prompt has no token or words that the model does not know, it is longer than the model
        takes, a target is no token, or a dictionary is no transcoder of this model.
    """
    clock = clock or Clock()
    text, ids = tokenized(lm.tokenizer, prompt, settings.prepend_bos)
    check_length(f"Prompt {_told(text)}", len(ids), lm.hf.config)
    with clock.phase("forward pass"), torch.no_grad():
        frozen = FrozenPrompt.of(lm, ids)
    with clock.phase("features"), torch.no_grad():
        sources = Sources.of(frozen, family.to(frozen.dtype).to(frozen.embed.device))
    with clock.phase("targets"), torch.no_grad():
        if targets is None:
            goal = most_probable(frozen, lm.tokenizer, settings.max_logits, settings.probability)
        else:
            goal = chosen(frozen, lm.tokenizer, targets)
    with torch.no_grad():
        table = _Table(sources, goal, settings, clock)
        table.fill()
    with clock.phase("assembly"):
        tokens = tuple(token_text(lm.tokenizer, token) for token in ids.tolist())
        return table.graph(text, tokens, facts or {})


def tokenized(
    tokenizer: Any, prompt: str | Sequence[int], prepend_bos: bool = False
) -> tuple[str, Int64[Tensor, " pos"]]:
    """Text and token ids of a prompt; a start token that the tokenizer adds by itself is not added again.

    :raises UserError: a start token is wanted, and the tokenizer has none; or it does not know a word.
    """
    if not isinstance(prompt, str):
        ids = torch.as_tensor(prompt, dtype=torch.int64)
        return tokenizer.decode(ids.tolist()), ids
    found = list(tokenizer(prompt)["input_ids"])
    unknown = PromptReader(tokenizer, PLAIN).unknown
    if unknown is not None and unknown in found:
        raise UserError(_not_known(tokenizer, prompt, unknown))
    if prepend_bos:
        start = start_token(tokenizer)
        if start is None:
            raise UserError(
                "Key prepend_bos is true, but the model's tokenizer has no token for it; set it to false."
            )
        found = found if found[:1] == [start] else [start, *found]
    return prompt, torch.tensor(found, dtype=torch.int64)


def _told(prompt: str) -> str:
    """A prompt in a sentence, without its middle if it is long."""
    return repr(prompt if len(prompt) <= LONGEST else f"{prompt[: LONGEST // 2]}…{prompt[-LONGEST // 2 :]}")


def _not_known(tokenizer: Any, prompt: str, unknown: int) -> str:
    """Why a prompt cannot be read, with the words behind unknown tokens where the tokenizer tells where tokens lie."""
    told = _told(prompt)
    words: list[str] = []
    if tokenizer.is_fast:
        read = tokenizer(prompt, return_offsets_mapping=True)
        places = zip(read["input_ids"], read["offset_mapping"], strict=True)
        words = list(
            dict.fromkeys(prompt[start:end].strip() for token, (start, end) in places if token == unknown)
        )
    if words == [""]:
        where = "at its end" if prompt[-1:].isspace() else "between words"
        return (
            f"Prompt {told} has white space {where} that the model's vocabulary does not have; take it out."
        )
    named = f" ({', '.join(word for word in words if word)})" if words else ""
    return f"Prompt {told} has words outside the model's vocabulary{named}; write it with others."


class _Table:
    """Rows found so far: logits first, then features in the order in which they were chosen."""

    def __init__(self, sources: Sources, goal: Logits, settings: Settings, clock: Clock) -> None:
        self.sources, self.goal, self.settings, self.clock = sources, goal, settings, clock
        n, frozen = sources.n_features, sources.frozen
        self.cap = n if settings.max_nodes is None else min(n, settings.max_nodes)
        rest = (frozen.n_layers + 1) * frozen.n_pos
        kind = np.float64 if frozen.dtype == torch.float64 else np.float32
        # Not touched before it is filled: the system gives memory for rows that are there.
        self.weights = np.zeros((len(goal.tokens) + self.cap, n + rest), dtype=kind)
        self.bias = np.zeros(len(self.weights))
        layers = sources.features[sources.order, 0].cpu().numpy()
        self.known = Known(self.weights, layers, goal.weights.double().cpu().numpy())
        self.order = sources.order.cpu().numpy()  # feature of each column
        self.chosen = np.empty(0, dtype=np.int64)  # columns of features, in the order of their rows
        self.filled = 0  # rows
        self.buffers = Buffers()

    def fill(self) -> None:
        """Compute rows until the cap, or the clock's limit, is reached."""
        with self.clock.phase("rows"):
            self._put(compute_rows(self.sources, self.goal.targets(self.sources.frozen), self.buffers))
        while len(self.chosen) < self.cap and not self.clock.over:
            with self.clock.phase("order of influence"):
                count = min(self.settings.reorder_every, self.cap - len(self.chosen))
                columns = self.known.most_influential(self.chosen, count)
            with self.clock.phase("rows"):
                self._compute(columns)

    def graph(self, text: str, tokens: tuple[str, ...], facts: Mapping[str, Any]) -> Graph:
        """The graph of the rows that there are."""
        sources, goal, n_logits = self.sources, self.goal, len(self.goal.tokens)
        found = self.order[self.chosen]
        kept = np.arange(len(self.order)) if self.settings.keep_all else np.sort(found)
        rows = np.concatenate([np.argsort(found) + n_logits, np.arange(n_logits)])
        weights, rest = self._arranged(rows, kept)
        n_other = weights.shape[1] - len(kept)
        features = sources.features[torch.from_numpy(kept).to(sources.features.device)]
        places = np.indices((sources.frozen.n_layers, sources.frozen.n_pos)).reshape(2, -1).T
        return Graph(
            prompt=text,
            tokens=tokens,
            token_ids=sources.frozen.tokens.cpu().numpy(),
            features=features.cpu().numpy(),
            activations=sources.activations.cpu().numpy()[kept],
            errors=np.ascontiguousarray(places, dtype=np.int64),
            logits=goal.tokens.cpu().numpy(),
            logit_tokens=goal.names,
            probabilities=goal.weights.cpu().numpy(),
            targets=np.concatenate(
                [np.searchsorted(kept, np.sort(found)), len(kept) + n_other - n_logits + np.arange(n_logits)]
            ),
            weights=weights,
            bias=self.bias[rows],
            facts=self._facts() | dict(facts),
            rest=rest,
        )

    def _facts(self) -> dict[str, Any]:
        return {
            "n_layers": self.sources.frozen.n_layers,
            "vocab_size": len(self.sources.frozen.logits),
            "directions": facts_of(self.goal.combinations),
            "active_features": len(self.order),
            "expanded_features": len(self.chosen),
            "stopped_early": len(self.chosen) < self.cap,
            "influence_left_out": self._left_out(),
            "skipped": self.sources.skipped(),
            "layers_with_transcoder": sorted(self.sources.layers),
            "settings": {name: value for name, value in vars(self.settings).items() if name != "batch"},
            "conventions": CONVENTIONS,
        }

    def _left_out(self) -> float:
        """Share of all influence that ends at features beyond the cap; the rest ends at errors and tokens."""
        found = self.known.influence(self.chosen)
        found[self.chosen] = 0
        total = float(self.known.p.sum())
        return float(found.sum()) / total if total else 0.0

    def _arranged(self, rows: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows and columns in the order of the graph's nodes, and the sums of what features left out add."""
        n, n_logits = len(self.order), len(self.goal.tokens)
        columns = np.concatenate([np.argsort(self.order)[kept], np.arange(n, self.weights.shape[1])])
        weights = np.zeros((len(rows), len(columns) + n_logits), dtype=self.weights.dtype)
        dropped = np.setdiff1d(np.arange(n), columns)
        rest = np.zeros(len(rows))
        for at in range(0, len(rows), BLOCK):
            block = self.weights[rows[at : at + BLOCK]]
            weights[at : at + BLOCK, : len(columns)] = block[:, columns]
            rest[at : at + BLOCK] = block[:, dropped].sum(axis=1, dtype=np.float64)
        return weights, rest if len(dropped) else None

    def _compute(self, columns: np.ndarray) -> None:
        # Targets of one depth go together: they pass the same layers.
        columns = columns[np.argsort(-self.order[columns], kind="stable")]
        size = self.settings.batch
        for batch in (columns[at : at + size] for at in range(0, len(columns), size)):
            if self.clock.over:
                return
            which = torch.from_numpy(self.order[batch]).to(self.sources.order.device)
            self._put(compute_rows(self.sources, feature_targets(self.sources, which), self.buffers))
            self.chosen = np.concatenate([self.chosen, batch])
            self.clock.reached(len(self.chosen))
            progress("graph rows", len(self.chosen), self.cap)

    def _put(self, rows: Rows) -> None:
        """Take over the next rows."""
        at, end = self.filled, self.filled + len(rows.bias)
        place = torch.from_numpy(self.weights[at:end])
        n, tokens = self.sources.n_features, self.weights.shape[1] - rows.tokens.shape[1]
        place[:, :n] = rows.features
        place[:, n:tokens] = rows.errors.flatten(1)
        place[:, tokens:] = rows.tokens
        self.bias[at:end] = rows.bias.double().cpu().numpy()
        self.known.add(at, end)
        self.filled = end
