"""Effects on single prompts: probabilities under interventions, response curves, on a random model."""

from itertools import pairwise

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
from circuitflow.plots.layout import settle
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
    monkeypatch.setattr(lm, "tokenizer", Tokenizer())
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

    files = {name: tmp_path / f"{name}.parquet" for name in ("effects", "response")}

    def compute(**params):
        measure_effects(inputs, {**common, **params}, Output(tmp_path, files, {}))
        return *(read_table(path) for path in files.values()), read_provenance(files["effects"])

    compute.lm, compute.pairs, compute.active, compute.clean = lm, pairs, active, clean
    compute.files = files
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


def test_response_curves_hold_the_feature_where_the_prompt_fires(run):
    _, response, _ = run(values=[2.0])
    assert set(response["node"]) == {f"resid.1/{run.active}"}
    values = activations(run.here(), ("resid.1", run.active, -1))
    pairs = run.pairs.pair.tolist()
    assert sorted(set(response["pair"])) == sorted(
        pair for pair, row in zip(pairs, values, strict=True) if row.any()
    )
    for pair in set(response["pair"]):
        here = response["pair"] == pair
        prompt = pairs.index(pair)
        own = values[prompt][values[prompt] != 0]
        assert np.allclose(response["reference"][here], own.mean())
        assert set(response["tokens"][here]) == {len(own)}
        relative = here & response["relative"]
        assert np.allclose(response["value"][relative], response["multiple"][relative] * own.mean())
        assert np.allclose(response["clean"][here], run.clean[prompt])
        of_case = values[[case == run.pairs.case[prompt] for case in run.pairs.case]]
        plain = here & ~response["relative"]
        assert np.allclose(response["multiple"][plain], 2.0 / of_case[of_case != 0].mean())
    held = response["relative"]
    assert set(np.round(response["multiple"][held], 9)) == {0.0, 1.0, 4.0}
    far = held & (response["multiple"] == 4)
    assert np.abs(response["m"][far] - response["clean"][far]).max() > 1e-2


def test_the_multiple_1_is_the_clean_run_of_every_prompt(run):
    """Prompts of a case fire at other tokens and at other values; holding a common value would change them."""
    _, response, _ = run(curves=[f"resid.1/{feature}" for feature in range(24)], multiples=[1.0, 0.0])
    one = response["multiple"] == 1
    assert len(set(response["node"])) > 5
    assert np.allclose(response["m"][one], response["clean"][one], atol=1e-6)
    assert np.abs(response["m"][~one] - response["clean"][~one]).max() > 1e-3
    spread = [np.ptp(response["reference"][response["node"] == node]) for node in set(response["node"])]
    assert max(spread) > 0.01


def test_cases_without_a_firing_token_are_named(run):
    _, response, _ = run(curves=[f"resid.1/{feature}" for feature in range(24)])
    said = read_provenance(run.files["response"])["silent"]
    for feature in range(24):
        name = f"resid.1/{feature}"
        values = activations(run.here(), ("resid.1", feature, -1))
        dead = {
            case
            for case in run.pairs.case
            if not any(row.any() for row, of in zip(values, run.pairs.case, strict=True) if of == case)
        }
        assert set(said.get(name, [])) == dead
        drawn = set(response["case"][response["node"] == name])
        assert drawn == set(run.pairs.case) - dead
    assert said


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


def test_intervals_are_never_cut_without_a_mark(run):
    effects, response, provenance = run(multiples=[0.0, 1.0])
    response["m"] = response["multiple"] + 1e-3 * response["pair"]
    wide = {name: column.copy() for name, column in response.items()}
    wide["case"] = np.full(len(wide["case"]), "long", object)
    turns = {pair: (-1) ** number for number, pair in enumerate(sorted(set(wide["pair"])))}
    wide["m"] = np.array([100.0 * turns[pair] for pair in wide["pair"]]) + wide["multiple"]
    for table, cut in ((response, False), (wide, True)):
        with drawing(Style(dpi=60)):
            figure = draw(effects, table, provenance["conventions"], Style(dpi=60), silent={"a/1": ["odd"]})
        axes = figure.axes[-1]
        assert (
            any(
                line.get_marker() in "^v"
                for line in axes.lines
                if len(line.get_xdata()) and not line.get_clip_on()
            )
            == cut
        )
        assert ("Arrowheads" in figure.get_supxlabel()) == cut
        assert "a/1 fires in no prompt of odd" in figure.get_supxlabel().replace("\n", " ")


def test_every_intervention_has_a_look_of_its_own(run):
    nodes = [f"resid.1/{run.active}", "resid.0/error", "resid.1/error"]
    effects, response, provenance = run(nodes=nodes)
    with drawing(Style(dpi=60)):
        figure = draw(effects, response, provenance["conventions"], Style(dpi=60))
        settle(figure, 60)
        boxes = [axes._left_title.get_window_extent() for axes in figure.axes[:4]]
    assert all(axes.get_position().width > 0.12 for axes in figure.axes), "titles leave the panels their room"
    lines = [line for line in figure.axes[0].lines if line.get_label() in set(effects["intervention"])]
    assert len(lines) == 7
    assert len({(line.get_marker(), line.get_color(), line.get_markerfacecolor()) for line in lines}) == 7
    assert all(left.x1 <= right.x0 for left, right in pairwise(boxes))
