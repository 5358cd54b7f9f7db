"""What a circuit, or a few nodes, do on single prompts: next-token probabilities without them, and response curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from circuitflow.attribution.nodes import ERROR, SUMMED
from circuitflow.circuits.circuit import Circuit, read_circuit
from circuitflow.circuits.evaluation import Evaluation, prepared
from circuitflow.circuits.interventions import Intervention, Triple, everything, hold, keep, remove
from circuitflow.errors import UserError, nearest
from circuitflow.features.tokens import token_text
from circuitflow.jobs import Output, progress
from circuitflow.models.sites import parse_site
from circuitflow.store.tables import write_table

CLEAN = "whole model"
CONVENTIONS = {
    "interventions": "'whole model': nothing replaced; 'without X': the nodes X replaced, all others as they arrive; "
    "'circuit alone': every node but the circuit's replaced",
    "tokens": "the right and wrong answers, and the likeliest tokens of any of the prompt's interventions",
    "kl": "KL(whole model || intervention) of the next token, in nats",
    "value": "what the feature is held at, in units of its activation, where it is active in any clean prompt of the "
    "case; elsewhere it stays as it is",
    "multiple": "value / the feature's mean where it is active in the clean prompts of the case",
}

Rows = dict[str, list[Any]]


def measure_effects(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Next-token probabilities of a few test prompts under ablations, and how the answers respond to features.

    Inputs ``model``, ``circuit``, ``tokens_{split}``, ``gradients_{split}``, ``dictionaries`` and for the ablation by
    means ``means`` (lists, in the order of ``sites``); params ``sites``, ``metric``, ``pairs`` (prompts, spread over
    the cases), ``nodes`` (ids of nodes that are ablated together, as "resid.12/431", "resid.12/error"; may be empty),
    ``curves`` (ids of features to scale; empty: the circuit's ``top`` strongest), ``top``, ``multiples`` and ``values``
    (of the features: shares of their usual value, and plain activations), ``tokens`` (likeliest tokens listed),
    ``ablation``, ``seed``, ``batch_rows``, ``dtype``, ``compute``.

    Outputs:

    - ``effects``: pair, case, prompt, intervention, token, text, role (right | wrong | other), probability, logit, rank
      (from 1), m, kl: one row per prompt, intervention and listed token;
    - ``response``: node, pair, case, value, multiple, reference (usual value), tokens (where it is held), m, right,
      wrong (probability of the answers), n (prompts of the case).

    :raises UserError: a node is none of the run's, or a curve is asked of an error.
    """
    circuit = read_circuit(Path(inputs["circuit"]))
    here, sites = prepared(inputs, params, "test"), list(params["sites"])
    named = [parse_node(name, sites) for name in params["nodes"]]
    curves = [parse_node(name, sites) for name in params["curves"]] or strongest(circuit, params["top"])
    if errors := [node for node in curves if node[1] == ERROR]:
        raise UserError(
            f"Key effects.curves names the error of {errors[0][0]}, which is a vector and has no value to scale; "
            f"name features."
        )
    for node in (*named, *curves):
        _check_feature(node, here)
    wanted = interventions(circuit, named, sites)
    effects = shifted(here, wanted, params)
    response = responses(here, curves, params)
    facts = {**out.provenance, "conventions": {**CONVENTIONS, "ablated": params["ablation"]}}
    write_table(out.files["effects"], effects, facts)
    write_table(out.files["response"], response, facts)


def parse_node(name: str, sites: Sequence[str]) -> Triple:
    """A node from its id: "resid.12/431", "resid.12/error", "resid.12/431@5".

    :raises UserError: it is no id, or lies at another site than the run's.
    """
    site, slash, rest = name.partition("/")
    feature, at, position = rest.partition("@")
    known = feature == "error" or feature.isdecimal()
    if not slash or not known or (at and not position.isdecimal()):
        raise UserError(
            f"Node '{name}' is not written as a node; write for example '{sites[0]}/431', '{sites[0]}/error' or "
            f"'{sites[0]}/431@5'."
        )
    parse_site(site)
    if site not in sites:
        raise UserError(
            f"Node '{name}' lies at {site}, which is no site of this run; {nearest(site, sites)}."
        )
    return site, ERROR if feature == "error" else int(feature), int(position) if at else SUMMED


def strongest(circuit: Circuit, n: int) -> list[Triple]:
    """The circuit's ``n`` strongest features, each once, at whatever position."""
    nodes = sorted(circuit.nodes, key=lambda node: -abs(node.score))
    found = [(node.site, node.feature, SUMMED) for node in nodes if node.kind == "feature"]
    return list(dict.fromkeys(found))[:n]


def interventions(circuit: Circuit, named: Sequence[Triple], sites: Sequence[str]) -> dict[str, Intervention]:
    """What is done to the prompts, by name."""
    inside = [
        (node.site, node.feature, SUMMED if node.position is None else node.position)
        for node in circuit.nodes
    ]
    found: dict[str, Intervention] = {
        CLEAN: everything(sites),
        "without circuit": remove(inside, sites),
        "circuit alone": keep(inside, sites),
    }
    if named:
        found["without nodes"] = remove(named, sites)
        if len(named) > 1:
            found |= {f"without {node_id(node)}": remove([node], sites) for node in named}
    return found


def node_id(node: Triple) -> str:
    """The inverse of :func:`parse_node`."""
    site, feature, position = node
    name = f"{site}/{'error' if feature == ERROR else feature}"
    return name if position == SUMMED else f"{name}@{position}"


def shifted(here: Evaluation, wanted: Mapping[str, Intervention], params: Mapping[str, Any]) -> Rows:
    """Probabilities of the answers and of the likeliest tokens under every intervention."""
    logits = torch.from_numpy(here.logits(list(wanted.values()), params["batch_rows"])).double()
    pairs = here.prompts.pairs.to("cpu")
    logs = logits.log_softmax(-1)
    kl = (logs[0].exp() * (logs[0] - logs)).sum(-1)
    rows: Rows = {}
    for prompt in range(len(pairs)):
        right, wrong = (
            [token for token in answers[prompt].tolist() if token >= 0]
            for answers in (pairs.right, pairs.wrong)
        )
        likely = logs[:, prompt].topk(params["tokens"], dim=-1).indices.flatten().tolist()
        tokens = list(dict.fromkeys([*right, *wrong, *likely]))
        text = here.lm.tokenizer.decode(
            pairs.clean[prompt][pairs.mask[prompt].bool()].tolist(), skip_special_tokens=True
        )
        m = _metric(here, logits[:, prompt], prompt)
        for number, name in enumerate(wanted):
            rank = (logs[number, prompt][None] > logs[number, prompt, tokens][:, None]).sum(1) + 1
            for place, token in enumerate(tokens):
                row = {
                    "pair": int(pairs.pair[prompt]),
                    "case": pairs.case[prompt],
                    "prompt": text,
                    "intervention": name,
                    "token": token,
                    "text": token_text(here.lm.tokenizer, token),
                    "role": "right" if token in right else "wrong" if token in wrong else "other",
                    "probability": float(logs[number, prompt, token].exp()),
                    "logit": float(logits[number, prompt, token]),
                    "rank": int(rank[place]),
                    "m": float(m[number]),
                    "kl": float(kl[number, prompt]),
                    "n": len(pairs),
                }
                for key, value in row.items():
                    rows.setdefault(key, []).append(value)
    return rows


def responses(here: Evaluation, curves: Sequence[Triple], params: Mapping[str, Any]) -> Rows:
    """m and the answers' probabilities with a feature held at values around its own."""
    pairs = here.prompts.pairs.to("cpu")
    names = ("node", "pair", "case", "value", "multiple", "reference", "tokens", "m", "right", "wrong", "n")
    rows: Rows = {name: [] for name in names}
    for done, node in enumerate(curves):
        active = activations(here, node)
        for case in dict.fromkeys(pairs.case):
            prompts = [i for i, name in enumerate(pairs.case) if name == case]
            at = np.flatnonzero((active[prompts] != 0).any(0))
            if node[2] != SUMMED:
                at = at[at == node[2]]
            if not len(at):
                continue
            firing = active[prompts][:, at]
            reference = float(firing[firing != 0].mean())
            values = [*(reference * share for share in params["multiples"]), *params["values"]]
            held = [(node[0], node[1], int(position)) for position in at]
            base = everything(params["sites"])
            wanted = [hold(base, held, value) for value in values]
            logits = torch.from_numpy(here.logits(wanted, params["batch_rows"])).double()
            for value, found in zip(values, logits, strict=True):
                for prompt in prompts:
                    row = _answers(here, found[prompt], prompt)
                    row |= {
                        "node": node_id(node),
                        "pair": int(pairs.pair[prompt]),
                        "case": case,
                        "value": value,
                    }
                    row |= {"multiple": value / reference, "reference": reference, "tokens": len(at)}
                    row["n"] = len(prompts)
                    for name in names:
                        rows[name].append(row[name])
        progress("response curves", done + 1, len(curves))
    return rows


def activations(here: Evaluation, node: Triple) -> np.ndarray:
    """A feature's values in the clean runs, (n, pos); 0 at padding."""
    site = next(site for site in here.sites if site.name == node[0])
    clean = site.known("clean")
    values = clean.columns(torch.tensor([node[1]], device=clean.slot.device))[:, 0][clean.slot]
    return np.asarray((values * here.prompts.pairs.mask.to(values.device)).double().cpu().numpy())


def _answers(here: Evaluation, logits: torch.Tensor, prompt: int) -> dict[str, Any]:
    probability, pairs = logits.softmax(-1), here.prompts.pairs
    found: dict[str, Any] = {"m": float(_metric(here, logits[None], prompt)[0])}
    for name, answers in (("right", pairs.right), ("wrong", pairs.wrong)):
        tokens = [token for token in answers[prompt].tolist() if token >= 0]
        found[name] = float(probability[tokens].sum())
    return found


def _metric(here: Evaluation, logits: torch.Tensor, prompt: int) -> torch.Tensor:
    """m of several rows of logits of one prompt."""
    pairs, n = here.prompts.pairs.to("cpu"), len(logits)
    reference = here.prompts.reference
    expected = None if reference is None else reference[prompt].double().cpu().expand(n, -1)
    return here.metric(logits, pairs.right[prompt].expand(n, -1), pairs.wrong[prompt].expand(n, -1), expected)


def _check_feature(node: Triple, here: Evaluation) -> None:
    width = next(site.dictionary.d_dict for site in here.sites if site.name == node[0])
    if node[1] >= width:
        raise UserError(
            f"Node '{node_id(node)}' does not exist: the dictionary of {node[0]} has {width} features, counted from 0."
        )
