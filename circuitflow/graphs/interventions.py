"""Stage ``intervene_on_graph``: features and supernodes held at other values, and what the graph says of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from circuitflow.dictionaries.family import load_family
from circuitflow.errors import UserError
from circuitflow.features.tokens import token_text
from circuitflow.graphs.agreement import agreement
from circuitflow.graphs.directions import parts_of
from circuitflow.graphs.graph import Graph
from circuitflow.graphs.influence import whole_influence
from circuitflow.graphs.intervening import OPEN, Held, Mode, Outcome, Prompt
from circuitflow.graphs.naming import Named, expanded, nodes_named
from circuitflow.graphs.prediction import predicted
from circuitflow.jobs import Output, progress
from circuitflow.models.loading import load_model
from circuitflow.store.files import read_json
from circuitflow.store.tables import write_table

CONVENTIONS = {
    "operations": "remove: held at 0; scale: at a multiple of the activation on the untouched prompt; set: at an "
    "absolute activation (steering values of other tools are absolute too)",
    "held": "a held feature adds (value - its activation) x W_dec to the sites it writes, whatever comes in",
    "up_to": "MLPs of the layers 0 ... up_to give what they gave on the untouched prompt; -1: all respond",
    "measured": "change in the real model: of a logit less the mean over the vocabulary, before any soft-cap, or of a "
    "combination of such; of a feature's pre-activation as a share of its activation",
    "predicted": "the same from the graph: along edges, and through features above up_to that respond in proportion; "
    "missing where a changed feature is no node of the graph",
}

Rows = dict[str, list[Any]]


@dataclass(frozen=True)
class Wanted:
    """An intervention on one prompt."""

    name: str
    kind: str
    """by hand | supernode | feature."""
    held: tuple[Held, ...]
    operation: str
    """What is done, in words for tables."""

    @property
    def nodes(self) -> str:
        """Ids of what is held."""
        return " ".join(str(Named(one.layer, one.feature, one.position)) for one in self.held)


def intervene_on_graph(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Hold features of one prompt at other values, and compare the model with what its graph predicts.

    Inputs ``model``, ``graph``, ``dictionaries`` (list) and ``supernodes`` (JSON of group_features); params ``wanted``
    (name, changes: nodes, operation, value), ``each`` (features of most influence, removed one at a time), ``groups``
    (supernodes likewise), ``modes`` (name, attention, norms, up_to), ``targets``, ``tokens``, ``bootstrap``, ``seed``,
    ``dtype``, ``compute``.

    Outputs:

    - ``interventions``: intervention, kind, operation, nodes, held (their number), mode, attention, norms, up_to,
      token, text, logit_before, logit_after, probability_before, probability_after, rank_before, rank_after, kl;
      a row per intervention, mode and listed token;
    - ``effects``: intervention, kind, mode, target (feature | logit), node, layer, position, reference (activation;
      1 for logits), measured, predicted; a row per intervention, mode and target;
    - ``agreement``: mode, target, kind (of intervention; "all": every one), n, interventions, and pearson, slope with
      ``_low`` and ``_high``.

    :raises UserError: a name is neither a supernode nor a feature, or what is named does not exist.
    """
    graph = Graph.load(Path(inputs["graph"]))
    check_modes(params["modes"], int(graph.facts["n_layers"]))
    device = params["compute"]["device"]
    lm = load_model(Path(inputs["model"]), params["dtype"], device)
    wide = torch.promote_types(lm.dtype, torch.float32)
    family = load_family([Path(path) for path in inputs["dictionaries"]]).to(wide).to(device)
    supernodes = read_json(Path(inputs["supernodes"]))["supernodes"]
    prompt = Prompt(lm, family, graph.token_ids.tolist())
    total = whole_influence(graph)
    wanted = interventions(prompt, graph, supernodes, total, params)
    shown, effects = measured(prompt, graph, wanted, total, params)
    facts = {**out.provenance, "conventions": CONVENTIONS, "prompt": graph.prompt}
    write_table(out.files["interventions"], shown, facts)
    write_table(out.files["effects"], effects, facts)
    columns = agreement(effects, params["bootstrap"], params["seed"])
    write_table(out.files["agreement"], columns, facts)


def check_modes(modes: Sequence[Mapping[str, Any]], n_layers: int) -> None:
    """Check that modes name layers of the model.

    :raises UserError: one is beyond it.
    """
    for number, mode in enumerate(modes):
        if isinstance(mode["up_to"], int) and mode["up_to"] >= n_layers:
            raise UserError(
                f"Key graphs.interventions.modes.{number}.up_to is {mode['up_to']}, but the model has {n_layers} "
                f"layers, counted from 0; write {n_layers - 1} or all, so that no MLP responds, or an earlier layer."
            )


def interventions(
    prompt: Prompt,
    graph: Graph,
    supernodes: Mapping[str, Sequence[str]],
    influence: np.ndarray,
    params: Mapping[str, Any],
) -> list[Wanted]:
    """Those by hand, then the supernodes and the single features of most influence, removed."""
    found = [by_hand(prompt, supernodes, one) for one in params["wanted"]]
    total = influence[: graph.first_error]
    strength = {name: float(total[nodes_named(ids, graph)].sum()) for name, ids in supernodes.items()}
    for name in sorted(strength, key=lambda name: -strength[name])[: params["groups"]]:
        held = tuple(h for one in expanded([name], supernodes) for h in _held(prompt, one, "remove", None))
        if held:
            found.append(Wanted(name, "supernode", held, "remove"))
    for node in np.argsort(-total, kind="stable")[: params["each"]]:
        layer, position, feature = map(int, graph.features[node])
        held = (Held(layer, position, feature, 0.0),)
        found.append(Wanted(graph.node_id(int(node)), "feature", held, "remove"))
    return found


def by_hand(prompt: Prompt, supernodes: Mapping[str, Sequence[str]], said: Mapping[str, Any]) -> Wanted:
    """An intervention of the configuration on one prompt.

    :raises UserError: it names what does not exist, or sets a feature that is active nowhere without a position.
    """
    held: dict[tuple[int, int, int], Held] = {}
    for change in said["changes"]:
        for one in expanded(change["nodes"], supernodes):
            here = _held(prompt, one, change["operation"], change.get("value"))
            if not here and change["operation"] == "set":
                raise UserError(
                    f"Intervention '{said['name']}' sets feature {one}, which is active nowhere in this prompt; say at "
                    f'which position, for example "{one}_{len(prompt.positions) - 1}".'
                )
            held |= {(each.layer, each.position, each.feature): each for each in here}
    if not held:
        raise UserError(
            f"Intervention '{said['name']}' changes nothing: no feature that it names is active in this prompt; name "
            "others, or leave this prompt out of its list."
        )
    return Wanted(said["name"], "by hand", tuple(held.values()), _in_words(said["changes"]))


def _held(prompt: Prompt, one: Named, operation: str, value: float | None) -> list[Held]:
    at = prompt.active_at(one.layer, one.feature) if one.position is None else [one.position]
    found = []
    for position in at:
        own = prompt.activation(one.layer, position, one.feature)
        if own == 0 and operation != "set":
            continue
        becomes = 0.0 if operation == "remove" else float(value or 0.0) * (own if operation == "scale" else 1)
        found.append(Held(one.layer, position, one.feature, becomes))
    return found


def _in_words(changes: Sequence[Mapping[str, Any]]) -> str:
    said = []
    for change in changes:
        number = "" if change["operation"] == "remove" else f" {change['value']:g}"
        said.append(f"{change['operation']}{number}: {' '.join(change['nodes'])}")
    return "; ".join(said)


def mode_of(said: Mapping[str, Any], held: Sequence[Held], n_layers: int) -> Mode:
    """What responds, with the names of layers in place of "touched" and "all"."""
    last: int
    if said["up_to"] == "all":
        last = n_layers - 1
    elif said["up_to"] == "touched":
        last = max(one.layer for one in held)
    else:
        last = OPEN if said["up_to"] is None else int(said["up_to"])
    return Mode(said["attention"] == "frozen", said["norms"] == "frozen", last)


def measured(
    prompt: Prompt, graph: Graph, wanted: Sequence[Wanted], influence: np.ndarray, params: Mapping[str, Any]
) -> tuple[Rows, Rows]:
    """The tables ``interventions`` and ``effects``."""
    shown: Rows = {name: [] for name in SHOWN}
    effects: Rows = {name: [] for name in EFFECTS}
    targets = _targets(graph, influence, params["targets"])
    steps = [(one, said) for one in wanted for said in params["modes"]]
    for done, (one, said) in enumerate(steps):
        mode = mode_of(said, one.held, prompt.lm.n_layers)
        after = prompt.run(one.held, mode)
        facts = {"intervention": one.name, "kind": one.kind, "mode": said["name"]}
        more = {"operation": one.operation, "nodes": one.nodes, "held": len(one.held)}
        more |= {"attention": said["attention"], "norms": said["norms"], "up_to": mode.up_to}
        for row in _tokens(prompt, graph, after, params["tokens"]):
            _append(shown, facts | more | row)
        for row in _effects(prompt, graph, one, after, mode, targets):
            _append(effects, facts | row)
        progress("interventions", done + 1, len(steps))
    return shown, effects


SHOWN = (
    "intervention", "kind", "mode", "operation", "nodes", "held", "attention", "norms", "up_to", "token", "text",
    "logit_before", "logit_after", "probability_before", "probability_after", "rank_before", "rank_after", "kl",
)  # fmt: skip
EFFECTS = (
    "intervention", "kind", "mode", "target", "node", "layer", "position", "reference", "measured", "predicted",
)  # fmt: skip


def _targets(graph: Graph, total: np.ndarray, most: int) -> np.ndarray:
    """Rows of the graph that are compared: all logits whose tokens are known, and the features of most influence."""
    of_features = np.flatnonzero(graph.targets < graph.first_error)
    order = np.argsort(-total[graph.targets[of_features]], kind="stable")[:most]
    logits = [graph.first_logit + rank for rank, parts in enumerate(parts_of(graph)) if parts]
    return np.concatenate([np.sort(of_features[order]), np.flatnonzero(np.isin(graph.targets, logits))])


def _tokens(prompt: Prompt, graph: Graph, after: Outcome, most: int) -> list[dict[str, Any]]:
    cap = getattr(prompt.lm.hf.config, "final_logit_softcapping", None)
    both = torch.stack([prompt.clean.logits, after.logits]).double()
    logs = (both if cap is None else cap * torch.tanh(both / cap)).log_softmax(-1)
    likely = logs.topk(most, dim=-1).indices.flatten().tolist()
    listed = list(dict.fromkeys([*(token for parts in parts_of(graph) for token in parts), *likely]))
    rank = (logs[:, None] > logs[:, listed, None]).sum(-1) + 1
    kl = float((logs[0].exp() * (logs[0] - logs[1])).sum())
    return [
        {
            "token": token,
            "text": token_text(prompt.lm.tokenizer, token),
            "logit_before": float(both[0, token]),
            "logit_after": float(both[1, token]),
            "probability_before": float(logs[0, token].exp()),
            "probability_after": float(logs[1, token].exp()),
            "rank_before": int(rank[0, place]),
            "rank_after": int(rank[1, place]),
            "kl": kl,
        }
        for place, token in enumerate(listed)
    ]


def _effects(
    prompt: Prompt, graph: Graph, one: Wanted, after: Outcome, mode: Mode, targets: np.ndarray
) -> list[dict[str, Any]]:
    said = expected(prompt, graph, one.held, mode.up_to)
    held = {(each.layer, each.position, each.feature) for each in one.held}
    nodes = graph.targets[targets]
    features = [_triple(graph, node) for node in nodes[nodes < graph.first_error]]
    before, now = (prompt.pre_activations(run, features) for run in (prompt.clean, after))
    moved = (now - before).double().cpu().numpy()
    shift = (after.logits - prompt.clean.logits).double()
    centred = (shift - shift.mean()).tolist()
    outputs = [parts_of(graph)[node - graph.first_logit] for node in nodes[nodes >= graph.first_logit]]
    logits = np.array([sum(value * centred[token] for token, value in parts.items()) for parts in outputs])
    found = []
    layers, positions = graph.layers(), graph.positions()
    for row, node, change in zip(targets, nodes, np.concatenate([moved, logits]), strict=True):
        is_feature = node < graph.first_error
        if is_feature and _triple(graph, node) in held:
            continue
        reference = float(graph.activations[node]) if is_feature else 1.0
        found.append(
            {
                "target": "feature" if is_feature else "logit",
                "node": graph.node_id(int(node)),
                "layer": int(layers[node]),
                "position": int(positions[node]),
                "reference": reference,
                "measured": float(change) / reference,
                "predicted": float(said[row]) / reference,
            }
        )
    return found


def expected(prompt: Prompt, graph: Graph, held: Sequence[Held], up_to: int) -> np.ndarray:
    """The graph's prediction for every target; NaN where something changes that is no node of it."""
    number = {tuple(map(int, row)): node for node, row in enumerate(graph.features)}
    multiples: dict[int, float] = {}
    for one in held:
        node = number.get((one.layer, one.position, one.feature))
        if node is not None:
            multiples[node] = one.value / float(graph.activations[node])
        elif one.value != prompt.activation(one.layer, one.position, one.feature):
            return np.full(len(graph.targets), np.nan)
    return predicted(graph, multiples, up_to)


def _triple(graph: Graph, node: int) -> tuple[int, int, int]:
    """Layer, position and number of a feature."""
    layer, position, feature = graph.features[node].tolist()
    return layer, position, feature


def _append(rows: Rows, row: Mapping[str, Any]) -> None:
    for name, value in row.items():
        rows[name].append(value)
