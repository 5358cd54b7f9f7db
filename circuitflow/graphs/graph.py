"""The attribution graph of one prompt: its nodes, the direct effects between them, and the file that holds both.

Plain NumPy, so that figures and exchange formats need no torch. Nodes are numbered in one order everywhere:
features, errors, tokens, logits.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from circuitflow.errors import UserError
from circuitflow.provenance import canonical_json
from circuitflow.store.files import atomic_path

FORMAT = "circuitflow.graph.1"
ARRAYS = (
    "token_ids", "features", "activations", "errors", "logits", "probabilities", "targets", "weights", "bias",
)  # fmt: skip
KINDS = ("feature", "error", "token", "logit")
NO_TOKEN = -1
"""Token id of a logit node that is no token but a direction."""


@dataclass(frozen=True)
class Graph:
    """Direct effects between the features, errors, tokens and logits of one prompt, attention and norms held fixed.

    ``weights[t, s]`` is what source s adds to the pre-activation (or logit) of target ``targets[t]``, so that
    weights.sum(1) + bias (+ rest) is the value of each target: a feature's pre-activation, which is its activation
    where it is active, or the logit minus the vocabulary's mean logit (before any soft-cap).
    """

    prompt: str
    tokens: tuple[str, ...]
    """Text of each token."""
    token_ids: np.ndarray
    """(n_pos,) int64."""
    features: np.ndarray
    """(n_f, 3) int64: layer, position, feature; the layer is the one that the dictionary reads."""
    activations: np.ndarray
    """(n_f,)."""
    errors: np.ndarray
    """(n_e, 2) int64: layer, position, layer-major."""
    logits: np.ndarray
    """(n_l,) int64 token ids, the most probable first; :data:`NO_TOKEN` for a direction."""
    logit_tokens: tuple[str, ...]
    """Text of each logit's token, or the name of a direction."""
    probabilities: np.ndarray
    """(n_l,) weight of each logit node where influence begins: the model's probability, or what the user gave."""
    targets: np.ndarray
    """(n_t,) int64: numbers of the nodes whose incoming effects were computed, ascending."""
    weights: np.ndarray
    """(n_t, n_nodes) direct effect of every node on each target; 0 where there is none."""
    bias: np.ndarray
    """(n_t,) what reaches each target by bias paths, its own bias included."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Model, dictionaries, settings, conventions: what the numbers need to be understood."""
    rest: np.ndarray | None = None
    """(n_t,) what came from active features that are no nodes here (beyond the cap); None: nothing."""

    def __post_init__(self) -> None:
        shapes = {
            "tokens": (len(self.tokens), self.n_pos),
            "activations": (self.activations.shape, (len(self.features),)),
            "logit_tokens": (len(self.logit_tokens), len(self.logits)),
            "probabilities": (self.probabilities.shape, (len(self.logits),)),
            "weights": (self.weights.shape, (len(self.targets), self.n_nodes)),
            "bias": (self.bias.shape, (len(self.targets),)),
        }
        for name, (found, expected) in shapes.items():
            if found != expected:
                raise ValueError(f"graph: {name} is {found}, expected {expected}")

    @property
    def n_pos(self) -> int:
        """Tokens of the prompt."""
        return len(self.token_ids)

    @property
    def n_nodes(self) -> int:
        """Nodes of every kind."""
        return len(self.features) + len(self.errors) + self.n_pos + len(self.logits)

    @property
    def first_error(self) -> int:
        """Number of the first error node; features are the nodes before it."""
        return len(self.features)

    @property
    def first_token(self) -> int:
        """Number of the first token node."""
        return len(self.features) + len(self.errors)

    @property
    def first_logit(self) -> int:
        """Number of the first logit node."""
        return self.first_token + self.n_pos

    def kinds(self) -> np.ndarray:
        """(n_nodes,) index into :data:`KINDS`."""
        sizes = (len(self.features), len(self.errors), self.n_pos, len(self.logits))
        return np.repeat(np.arange(len(KINDS), dtype=np.int64), sizes)

    def kind(self, node: int) -> str:
        """One of :data:`KINDS`."""
        starts = (self.first_error, self.first_token, self.first_logit)
        return KINDS[int(np.searchsorted(starts, node, side="right"))]

    def layers(self) -> np.ndarray:
        """(n_nodes,) layer of each node; −1 for tokens, the number of layers for logits."""
        last = int(self.facts.get("n_layers", self._deepest() + 1))
        ends = np.full(self.n_pos, -1), np.full(len(self.logits), last)
        return np.concatenate([self.features[:, 0], self.errors[:, 0], *ends]).astype(np.int64)

    def positions(self) -> np.ndarray:
        """(n_nodes,) position of each node; logits stand at the last."""
        ends = np.arange(self.n_pos), np.full(len(self.logits), self.n_pos - 1)
        return np.concatenate([self.features[:, 1], self.errors[:, 1], *ends]).astype(np.int64)

    def node_id(self, node: int) -> str:
        """Name of a node that no other has: ``3_1021_5`` (layer, feature, position), ``E_3_5``, ``T_5``, ``L_0``."""
        kind = self.kind(node)
        if kind == "feature":
            layer, position, feature = self.features[node]
            return f"{layer}_{feature}_{position}"
        if kind == "error":
            layer, position = self.errors[node - self.first_error]
            return f"E_{layer}_{position}"
        return f"T_{node - self.first_token}" if kind == "token" else f"L_{node - self.first_logit}"

    def node_ids(self) -> list[str]:
        """Names of all nodes, in their order."""
        return [self.node_id(node) for node in range(self.n_nodes)]

    def dense(self) -> np.ndarray:
        """(n_nodes, n_nodes) effects, target by source; rows of nodes that are no targets are 0."""
        out = np.zeros((self.n_nodes, self.n_nodes), dtype=self.weights.dtype)
        out[self.targets] = self.weights
        return out

    def values(self) -> np.ndarray:
        """(n_t,) value of every target as the sum of all that reaches it."""
        total = self.weights.astype(np.float64).sum(1) + self.bias
        return total if self.rest is None else total + self.rest

    def restricted(self, kept: np.ndarray) -> "Graph":
        """The graph with only some of its features: what the others did goes to ``rest``.

        :param kept: (n_f,) bool.
        """
        nodes = np.concatenate([kept, np.ones(self.n_nodes - len(self.features), dtype=bool)])
        rows = nodes[self.targets]
        number = np.cumsum(nodes) - 1
        dropped = self.weights[np.ix_(rows, ~nodes)].astype(np.float64).sum(1)
        rest = dropped if self.rest is None else dropped + self.rest[rows]
        return replace(
            self,
            features=self.features[kept],
            activations=self.activations[kept],
            targets=number[self.targets[rows]],
            weights=self.weights[np.ix_(rows, nodes)],
            bias=self.bias[rows],
            rest=rest,
        )

    def save(self, path: Path) -> None:
        """Write everything to one safetensors file; equal graphs give equal bytes."""
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in ARRAYS}
        if self.rest is not None:
            arrays["rest"] = np.ascontiguousarray(self.rest)
        said = {
            "format": FORMAT,
            "prompt": self.prompt,
            "tokens": list(self.tokens),
            "logit_tokens": list(self.logit_tokens),
            "facts": dict(self.facts),
        }
        with atomic_path(Path(path)) as temporary:
            save_file(arrays, temporary, metadata={"circuitflow": canonical_json(said)})

    @classmethod
    def load(cls, path: Path) -> "Graph":
        """Read what :meth:`save` wrote.

        :raises UserError: the file is missing, damaged, or not a graph of this format.
        """
        said, arrays = _read(Path(path))
        if said.get("format") != FORMAT or not set(ARRAYS) <= set(arrays):
            raise UserError(
                f"File {path} is not a graph of the format {FORMAT}; name one made by build_attribution_graph."
            )
        fields: dict[str, Any] = {
            **arrays,
            "prompt": said["prompt"],
            "facts": said["facts"],
            "tokens": tuple(said["tokens"]),
            "logit_tokens": tuple(said["logit_tokens"]),
        }
        try:
            return cls(**fields)
        except ValueError as error:
            raise UserError(
                f"Graph {path} is damaged or was edited ({error}); run build_attribution_graph again."
            ) from None

    def _deepest(self) -> int:
        found = [int(part[:, 0].max()) for part in (self.features, self.errors) if len(part)]
        return max(found, default=-1)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if not path.is_file():
        raise UserError(f"Graph {path} does not exist; run the stage build_attribution_graph.")
    try:
        with safe_open(path, framework="np") as opened:
            said = json.loads((opened.metadata() or {}).get("circuitflow", "{}"))
            return said, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"Graph {path} cannot be read ({error}); delete it and run again.") from None
