"""Effects on single prompts: probabilities under interventions, response curves, on a random model."""

import numpy as np
import pytest
import torch

from circuitflow.attribution.nodes import ERROR
from circuitflow.circuits import evaluation
from circuitflow.circuits.circuit import Circuit, Node, write_circuit
from circuitflow.circuits.effects import activations, measure_effects, node_id, parse_node, strongest
from circuitflow.circuits.evaluation import prepared
from circuitflow.dictionaries.dictionary import save_dictionary
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.models.running import run as run_model
from circuitflow.plots.effects import draw, spread_over_cases
from circuitflow.plots.style import Style, drawing
from circuitflow.store.tables import read_provenance, read_table
from tests.fixtures.attribution_toy import metric_with, toy_dictionary, toy_pairs, write_gradients
from tests.fixtures.every_site import cached_of

SITES = ["resid.0", "resid.1"]


class Tokenizer:
    def decode(self, tokens, **_):
        return " ".join(f"t{token}" for token in tokens)

    def convert_ids_to_tokens(self, token):
        return f"t{token}"


@pytest.fixture
def run(random_lm, monkeypatch, tmp_path):
    lm, pairs = random_lm("llama"), toy_pairs(4)
    lm.tokenizer = Tokenizer()
    monkeypatch.setattr(evaluation, "load_model", lambda *_, **__: lm)
    monkeypatch.setattr(evaluation, "load_token_pairs", lambda _: pairs)
    cached = cached_of(lm, pairs, SITES)
    clean = metric_with(lm, pairs).detach().numpy()
    gradients = write_gradients(tmp_path, "base", cached, {"clean": clean, "patched": clean})
    for site in SITES:
        save_dictionary(tmp_path / f"{site}.safetensors", toy_dictionary(site, 16))
    row, position = pairs.mask.nonzero(as_tuple=True)
    codes = toy_dictionary("resid.1", 16).encode(cached["resid.1"].clean[row, position], position)
    active = int(torch.mode(codes.features).values)
    nodes = (Node("resid.0", "error", ERROR, -2.0), Node("resid.1", "feature", active, 1.0))
    write_circuit(tmp_path / "circuit.json", Circuit(tuple(SITES), nodes, ()))
    inputs = {
        "model": tmp_path,
        "circuit": tmp_path / "circuit.json",
        "dictionaries": [tmp_path / f"{site}.safetensors" for site in SITES],
        **{f"{name}_{split}": gradients for name in ("gradients", "tokens") for split in ("train", "test")},
    }
    common = {
        "sites": SITES,
        "metric": {"kind": "logit_difference", "wrong_answers": "logsumexp"},
        "pairs": 4,
        "nodes": [],
        "curves": [],
        "top": 2,
        "multiples": [0.0, 1.0, 4.0],
        "values": [],
        "tokens": 3,
        "ablation": "zero",
        "seed": 0,
        "batch_rows": 64,
        "dtype": "float64",
        "compute": {"device": "cpu"},
    }

    def compute(**params):
        files = {name: tmp_path / f"{name}.parquet" for name in ("effects", "response")}
        measure_effects(inputs, {**common, **params}, Output(tmp_path, files, {}))
        return *(read_table(path) for path in files.values()), read_provenance(files["effects"])

    compute.lm, compute.pairs, compute.active, compute.clean = lm, pairs, active, clean
    compute.here = lambda: prepared(inputs, common, "test")
    return compute


def test_the_whole_model_is_that_of_a_plain_pass(run):
    effects, _, _ = run()
    last = run_model(run.lm, run.pairs.clean, run.pairs.mask).last
    logits = run.lm.unembed(last[torch.arange(4), run.pairs.position]).double()
    whole = effects["intervention"] == "whole model"
    for row in np.flatnonzero(whole):
        prompt = run.pairs.pair.tolist().index(effects["pair"][row])
        token = effects["token"][row]
        wanted = logits[prompt].softmax(-1)[token]
        assert effects["probability"][row] == pytest.approx(float(wanted), rel=1e-4)
        assert effects["rank"][row] == int((logits[prompt] > logits[prompt, token] + 1e-6).sum()) + 1
        assert effects["m"][row] == pytest.approx(run.clean[prompt], abs=1e-4)
    assert np.abs(effects["kl"][whole]).max() < 1e-9
    assert effects["kl"][~whole].min() > 1e-6
    assert set(effects["intervention"]) == {"whole model", "without circuit", "circuit alone"}
    assert set(effects["role"]) == {"right", "wrong", "other"}


def test_named_nodes_are_ablated_together_and_one_by_one(run):
    name = f"resid.1/{run.active}"
    effects, _, _ = run(nodes=[name, "resid.0/error"])
    assert {"without nodes", f"without {name}", "without resid.0/error"} <= set(effects["intervention"])
    # the circuit holds the same two nodes
    m = {one: effects["m"][effects["intervention"] == one] for one in ("without nodes", "without circuit")}
    assert np.allclose(m["without nodes"], m["without circuit"])


def test_response_curves_hold_the_feature_where_it_is_active(run):
    _, response, _ = run()
    assert set(response["node"]) == {f"resid.1/{run.active}"}
    values = activations(run.here(), ("resid.1", run.active, -1))
    for case in ("short", "long"):
        rows = [i for i, name in enumerate(run.pairs.case) if name == case]
        here = response["case"] == case
        if not here.any():
            continue
        firing = values[rows]
        assert response["reference"][here][0] == pytest.approx(firing[firing != 0].mean())
        assert response["tokens"][here][0] == (firing != 0).any(0).sum()
        assert np.allclose(response["value"][here], response["multiple"][here] * response["reference"][here])
        assert np.ptp(response["m"][here]) > 1e-4
    assert set(np.round(response["multiple"], 9)) == {0.0, 1.0, 4.0}


def test_nodes_by_name():
    for name, node in (
        ("resid.0/7", ("resid.0", 7, -1)),
        ("resid.1/error", ("resid.1", -1, -1)),
        ("resid.1/4@2", ("resid.1", 4, 2)),
    ):
        assert parse_node(name, SITES) == node
        assert node_id(node) == name
    with pytest.raises(UserError, match="not written as a node"):
        parse_node("resid.0", SITES)
    with pytest.raises(UserError, match=r"did you mean 'resid\.1'"):
        parse_node("resid.12/3", SITES)
    nodes = [Node("a", "feature", 1, -3.0), Node("a", "error", -1, 9.0), Node("b", "feature", 2, 4.0)]
    assert strongest(Circuit(("a", "b"), tuple(nodes), ()), 5) == [("b", 2, -1), ("a", 1, -1)]


def test_what_has_no_value_is_refused(run):
    with pytest.raises(UserError, match="has no value to scale"):
        run(curves=["resid.0/error"])
    with pytest.raises(UserError, match="has 24 features"):
        run(nodes=["resid.0/24"])


def test_the_figure_has_a_panel_per_prompt_and_curve(run):
    effects, response, provenance = run()
    assert spread_over_cases(effects, 2) == [10, 11]
    with drawing(Style(dpi=60)):
        figure = draw(effects, response, provenance["conventions"], Style(dpi=60))
    assert len(figure.axes) == 5
    assert figure.axes[-1].get_title("left").startswith(f"resid.1/{run.active}")
