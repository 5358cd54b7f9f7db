"""What a circuit, or a few nodes, do on single prompts: next-token probabilities without them, and response curves."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from circuitflow.attribution.nodes import ERROR, SUMMED
from circuitflow.circuits.ablation import logits_of_interventions
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
    "value": "what the feature is held at, in units of its activation, at the tokens where it fires in the prompt's "
    "clean run (mean over them, for multiples); elsewhere, and in prompts where it does not fire, it stays as it is",
    "multiple": "of the feature's own clean value at each of these tokens, so that 1 is the clean run; of plain "
    "values: value / usual, its mean where it fires in the clean prompts of the case",
    "n": "prompts of the case in which the feature fires, and that are held; prompts: all of the case",
}
RESPONSE = (
    *("node", "pair", "case", "value", "multiple", "relative", "reference", "usual", "tokens"),
    *("m", "right", "wrong", "clean", "n", "prompts"),
)
"""Columns of the response curves."""

Rows = dict[str, list[Any]]


def measure_effects(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Next-token probabilities of a few test prompts under ablations, and how the answers respond to features.

    Inputs ``model``, ``circuit``, ``tokens_{split}``, ``gradients_{split}``, ``dictionaries`` and for the ablation by
    means ``means`` (lists, in the order of ``sites``); params ``sites``, ``metric``, ``pairs`` (prompts, spread over
    the cases), ``nodes`` (ids of nodes that are ablated together, as "resid.12/431", "resid.12/error"; may be empty),
    ``curves`` (ids of features to scale; empty: the circuit's ``top`` strongest), ``top``, ``multiples`` and ``values``
    (of the features: multiples of their own clean values, and plain activations), ``tokens`` (likeliest tokens listed),
    ``ablation``, ``seed``, ``batch_rows``, ``dtype``, ``compute``.

    Outputs:

    - ``effects``: pair, case, prompt, intervention, token, text, role (right | wrong | other), probability, logit, rank
      (from 1), m, kl: one row per prompt, intervention and listed token;
    - ``response``, of prompts in which the feature fires: node, pair, case, value, multiple, relative (a multiple was
      asked for, not a plain value), reference (its mean clean value in the prompt), usual (that of the case's prompts),
      tokens (where it is held), m, right, wrong (probability of the answers), clean (m of the clean run), n (such
      prompts of the case), prompts (all of the case); ``silent`` of its provenance: cases in which it never fires.

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
    write_table(out.files["response"], response, {**facts, "silent": silent(curves, here)})


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
    """m and the answers' probabilities with a feature held, prompt by prompt, at values around its own.

    In a prompt it is held where it fires there, at ``multiple`` times its own clean value at each of these tokens, so
    that multiple 1 is the clean run; plain ``values`` are the same at all of them. Prompts without a firing token have
    no rows.
    """
    pairs = here.prompts.pairs.to("cpu")
    scales = [(True, share) for share in params["multiples"]] + [(False, value) for value in params["values"]]
    rows: Rows = {name: [] for name in RESPONSE}
    for done, node in enumerate(curves):
        active = firing(here, node)
        fires = [int(prompt) for prompt in np.flatnonzero((active != 0).any(1))]
        usual = _usual(active, pairs.case)
        wanted = [
            (held_at(node, active[prompt], scale, relative, params["sites"]), prompt)
            for prompt in fires
            for relative, scale in scales
        ]
        for place, found in _answered(here, wanted, params["batch_rows"]):
            prompt, (relative, scale) = wanted[place][1], scales[place % len(scales)]
            own, case = active[prompt][active[prompt] != 0], pairs.case[prompt]
            row = {
                **found,
                "node": node_id(node),
                "pair": int(pairs.pair[prompt]),
                "case": case,
                "value": scale * float(own.mean()) if relative else scale,
                "multiple": scale if relative else scale / usual[case],
                "relative": relative,
                "reference": float(own.mean()),
                "usual": usual[case],
                "tokens": len(own),
                "clean": float(here.full[prompt]),
                "n": sum(pairs.case[one] == case for one in fires),
                "prompts": pairs.case.count(case),
            }
            for name in RESPONSE:
                rows[name].append(row[name])
        progress("response curves", done + 1, len(curves))
    return rows


def held_at(
    node: Triple, active: np.ndarray, scale: float, relative: bool, sites: Sequence[str]
) -> Intervention:
    """A prompt with a feature held where it fires: at ``scale`` times its value of each token, or at ``scale``.

    :param active: its values in the prompt's clean run, (pos,); 0 where it does not fire.
    """
    wanted: Intervention = everything(sites)
    for position in np.flatnonzero(active):
        value = scale * float(active[position]) if relative else scale
        wanted = hold(wanted, [(node[0], node[1], int(position))], value)
    return wanted


def firing(here: Evaluation, node: Triple) -> np.ndarray:
    """A feature's values in the clean runs, (n, pos); 0 at padding, and elsewhere than at the node's own position."""
    active = activations(here, node)
    if node[2] == SUMMED:
        return active
    return np.where(np.arange(active.shape[1]) == node[2], active, 0)


def silent(curves: Sequence[Triple], here: Evaluation) -> dict[str, list[str]]:
    """Cases in which a feature fires in none of the prompts, by its id; features that fire in all are left out."""
    cases = list(dict.fromkeys(here.prompts.pairs.case))
    found = {node_id(node): _usual(firing(here, node), here.prompts.pairs.case) for node in curves}
    missing = {name: [case for case in cases if case not in usual] for name, usual in found.items()}
    return {name: none for name, none in missing.items() if none}


def _usual(active: np.ndarray, cases: Sequence[str]) -> dict[str, float]:
    """Mean value where a feature fires, by case; cases in which it never does are left out."""
    found = {}
    for case in dict.fromkeys(cases):
        here = active[[name == case for name in cases]]
        if (here != 0).any():
            found[case] = float(here[here != 0].mean())
    return found


def _answered(
    here: Evaluation, wanted: Sequence[tuple[Intervention, int]], batch_rows: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """m and the answers' probabilities of prompts, each under an intervention of its own, in the order given."""
    for first in range(0, len(wanted), batch_rows):
        some = wanted[first : first + batch_rows]
        rows = [(number, prompt) for number, (_, prompt) in enumerate(some)]
        logits = logits_of_interventions(here.lm, here.sites, [one for one, _ in some], here.prompts, rows)
        for number, found in enumerate(logits.cpu().double()):
            yield first + number, _answers(here, found, some[number][1])


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
