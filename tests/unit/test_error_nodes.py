"""Windows, baselines and the list of experiments by hand, and the stage that ablates errors, on random toy models."""

import numpy as np
import pytest
import torch

from circuitflow.attribution.nodes import ERROR, SUMMED
from circuitflow.circuits import evaluation as engine
from circuitflow.circuits.interventions import everything, hold, key, nothing, remove
from circuitflow.circuits.statistics import faithfulness
from circuitflow.config_error_nodes import ErrorNodesSection
from circuitflow.dictionaries.dictionary import save_dictionary
from circuitflow.error_nodes.baselines import ScoredNodes, rules, scored_nodes
from circuitflow.error_nodes.experiments import ablate_error_nodes, measured_values
from circuitflow.error_nodes.planning import ERRORS, Experiment, planned, ranges, study_of
from circuitflow.error_nodes.windows import (
    Level,
    Window,
    expanding_left,
    expanding_right,
    levels_of,
    named,
    sliding,
)
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.store.tables import read_provenance, read_table, write_table
from tests.fixtures.attribution_toy import (
    cached_sites,
    identity_dictionary,
    metric_with,
    toy_dictionary,
    toy_pairs,
    write_gradients,
)

WIDTH, D_DICT = 16, 24
SITES = ("embed", "mlp.0", "resid.0", "resid.1")
DEFAULTS = ErrorNodesSection().model_dump(exclude={"ridge", "rows"})


def test_windows_slide_and_grow():
    assert sliding(4, 2) == [Window(0, 1), Window(1, 2), Window(2, 3)]
    assert sliding(5, 2, step=2) == [Window(0, 1), Window(2, 3)]
    assert sliding(3, 4) == []
    assert expanding_right(3) == [Window(0, 0), Window(0, 1), Window(0, 2)]
    assert expanding_left(3) == [Window(2, 2), Window(1, 2), Window(0, 2)]
    assert expanding_right(4, step=2) == [
        Window(0, 0),
        Window(0, 2),
        Window(0, 3),
    ]  # the whole is always there
    assert Window(1, 3).width == 3


def test_levels_are_the_layers_of_the_kinds():
    sites = ["embed", "mlp.0", "resid.0", "mlp.1", "resid.1"]
    assert levels_of(sites, None) == [Level(("resid.0",)), Level(("resid.1",))]
    assert levels_of(sites, ["mlp", "resid"]) == [Level(("mlp.0", "resid.0")), Level(("mlp.1", "resid.1"))]
    assert levels_of(sites, None, start="mlp.1") == [Level(("resid.1",))]
    assert levels_of(["mlp.0", "z.0"], None) == [Level(("z.0", "mlp.0"))]  # no residual site: all kinds
    with pytest.raises(UserError, match="'attn'"):
        levels_of(sites, ["attn"])
    with pytest.raises(UserError, match=r"error_nodes\.start"):
        levels_of([*sites, "mlp.2"], None, start="mlp.2")


def test_windows_can_be_named():
    levels = levels_of(SITES, ["mlp", "resid"])
    assert named([["mlp.0", "resid.1"]], levels, "k") == [Window(0, 1)]
    assert Window(0, 1).sites(levels) == ["mlp.0", "resid.0", "resid.1"]
    with pytest.raises(UserError, match=r"'resid\.7'"):
        named([["resid.7", "resid.1"]], levels, "k")
    with pytest.raises(UserError, match="backwards"):
        named([["resid.1", "resid.0"]], levels, "k")


def nodes_of(features: dict[str, dict[int, float]], errors: dict[str, float]) -> ScoredNodes:
    """Nodes with the same score in both splits."""
    scores = {(site, number, SUMMED): s for site, here in features.items() for number, s in here.items()}
    scores |= {(site, ERROR, SUMMED): s for site, s in errors.items()}
    ordered = {
        site: sorted(((site, number, SUMMED) for number in here), key=lambda node: -abs(scores[node]))
        for site, here in features.items()
    }
    errors_of = {site: [(site, ERROR, SUMMED)] for site in features}
    return ScoredNodes(ordered, errors_of, {"train": scores, "test": scores})


def test_baselines_pick_features_by_their_scores():
    nodes = nodes_of({"resid.0": {3: 0.5, 7: -0.4, 2: 0.3, 9: 0.05}}, {"resid.0": -0.8})
    numbers = lambda rule: [feature for _, feature, _ in nodes.chosen(rule, "resid.0")]  # noqa: E731
    assert numbers("top-1") == [3]
    assert numbers("top-3") == [3, 7, 2]
    assert numbers("top-99") == [3, 7, 2, 9]
    assert numbers("nearest") == [3]  # |0.5| is the nearest to |−0.8|
    assert numbers("committee") == [3, 7]  # 0.5 < 0.8 ≤ 0.5 + 0.4
    small = nodes_of({"resid.0": {3: 0.5, 7: -0.06}}, {"resid.0": 0.05})
    assert [node[1] for node in small.nearest("resid.0")] == [7]
    assert [node[1] for node in small.committee("resid.0")] == [3]
    none_reaches = nodes_of({"resid.0": {3: 0.5, 7: -0.06}}, {"resid.0": 5.0})
    assert len(none_reaches.committee("resid.0")) == 2


def test_a_baseline_of_another_name_is_refused():
    assert rules(["top-12", "nearest"]) == ["top-12", "nearest"]
    for wrong in ("top-0", "best", "top-"):
        with pytest.raises(UserError, match=wrong):
            rules([wrong])


def test_scores_come_from_the_ranking_table():
    table = {
        "site": np.array(["resid.0"] * 4, object),
        "feature": np.array([5, 6, ERROR, ERROR]),
        "position": np.array([1, 2, 1, 2]),
        "score_train": np.array([0.1, -0.3, 0.2, -0.5]),
        "score_test": np.array([0.1, -0.2, 0.4, -0.5]),
    }
    nodes = scored_nodes(table, ["resid.0", "resid.1"], "absolute")
    assert nodes.features == {"resid.0": [("resid.0", 6, 2), ("resid.0", 5, 1)], "resid.1": []}
    assert nodes.error_size("resid.0") == pytest.approx(0.3)  # |0.2 − 0.5|: over its positions
    assert nodes.score(nodes.errors["resid.0"], "test") == pytest.approx(-0.1)
    assert nodes.errors["resid.1"] == [("resid.1", ERROR, SUMMED)]
    signed = scored_nodes(table, ["resid.0"], "signed")
    assert signed.top("resid.0", 1) == [("resid.0", 5, 1)]


def some_study(**changed):
    sites = ["resid.0", "resid.1", "resid.2"]
    features = {site: {number: 1.0 / (number + 1) for number in range(8)} for site in sites}
    nodes = nodes_of(features, {"resid.0": 0.005, "resid.1": -0.2, "resid.2": 0.4})
    return study_of(nodes, {**DEFAULTS, "sites": sites, **changed})


def test_the_list_holds_every_experiment():
    found = planned(some_study(widths=[1, 2, 4], baselines=["top-1"], restore_top=[1, 3], heatmap_top=5), 4)
    count = lambda name, what=ERRORS: sum(one.name == name and one.what == what for one in found)  # noqa: E731
    assert count("all") == 1
    assert count("layer") == 3
    assert count("every_site") == 0
    assert count("sliding") == 3 + 2  # the width of 4 does not fit
    assert count("sliding", "top-1") == 5
    assert count("expanding_left") == count("expanding_right") == 3
    assert count("position") == 4 * (3 + 1)
    assert count("restore") == 3 * 3  # ranges 0–1, 1–2 and all; K 0, 1 and 3
    assert count("heatmap") == 3 * (3 + 1)


def test_thresholds_are_shares_of_the_strongest_node():
    found = [one for one in planned(some_study(thresholds=[0.01, 0.3, 0.9]), 1) if one.name == "threshold"]
    assert [(one.threshold, [site for site, _, _ in one.removed]) for one in found] == [
        (0.01, ["resid.1", "resid.2"]),
        (0.3, ["resid.2"]),
    ]


def test_a_restoration_ablates_up_to_the_bound_and_holds_the_top_features():
    study = some_study(
        bound="resid.1", restore_top=[2], restore_width=1, restore_ranges=[["resid.1", "resid.2"]]
    )
    assert ranges(study) == [Window(0, 0), Window(1, 1), Window(2, 2), Window(0, 2), Window(1, 2)]
    one = next(
        one
        for one in planned(study, 1)
        if one.name == "restore" and one.restored_sites == ("resid.2", "resid.2") and one.k
    )
    sites = study.params["sites"]
    errors = [("resid.0", ERROR, SUMMED), ("resid.1", ERROR, SUMMED)]
    wanted = hold(remove(errors, sites), [("resid.2", 0, SUMMED), ("resid.2", 1, SUMMED)], "clean")
    assert key(one.intervention(sites)) == key(wanted)
    assert key(one.intervention(sites, 3)) != key(wanted)


def test_one_more_width_adds_its_own_windows_alone():
    """Of four layers, windows of two at either end are growing windows too; the one in the middle is new."""
    sites = [f"resid.{layer}" for layer in range(4)]
    nodes = nodes_of({site: {1: 0.5} for site in sites}, dict.fromkeys(sites, 0.1))

    def keys(widths):
        study = study_of(nodes, {**DEFAULTS, "sites": sites, "widths": widths, "baselines": []})
        return {key(one.intervention(sites)) for one in planned(study, 3)}

    middle = remove([("resid.1", ERROR, SUMMED), ("resid.2", ERROR, SUMMED)], sites)
    assert keys([1, 2]) - keys([1]) == {key(middle)}
    assert keys([1]) < keys([1, 2])


def test_a_position_counts_from_the_answer_of_each_prompt():
    """Prompts whose answers stand at 3 and 5: one token before is 2 in one, 4 in the other."""
    asked = []

    def run(wanted):
        asked.extend(wanted)
        return np.arange(len(wanted))[:, None] * 10.0 + np.arange(3)

    answer = np.array([3, 5, 3])
    removed = (("resid.0", ERROR, SUMMED),)
    experiments = [
        Experiment("position", ERRORS, ("resid.0", "resid.0"), removed, position=position)
        for position in (1, 4)
    ]
    empty, values = measured_values(experiments, answer, {"sites": ["resid.0"], "start": None}, run)
    assert [key(one) for one in asked] == [
        key(nothing(["resid.0"])),
        *(key(remove([("resid.0", ERROR, at)], ["resid.0"])) for at in (2, 4, 1)),
    ]
    assert empty.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(values, [[10, 21, 12], [np.nan, 31, np.nan]])


def write_nodes(path, d_dict):
    """Random scores of all nodes; those of the test split are half those of the train split."""
    size = (d_dict + 1) * len(SITES)
    scores = np.random.default_rng(0).normal(size=size)
    columns = {
        "site": np.repeat(np.array(SITES, object), d_dict + 1),
        "feature": np.tile([*range(d_dict), ERROR], len(SITES)),
        "position": np.full(size, SUMMED),
        "score_train": scores,
        "score_test": scores / 2,
    }
    write_table(path, columns)


@pytest.fixture
def stage(random_lm, tmp_path, monkeypatch):
    """Runs ablate_error_nodes on files, with a model that is already loaded."""
    exact, lm = random_lm("llama"), random_lm("llama", "float32")
    splits = {"train": toy_pairs(12, seed=1), "test": toy_pairs(6, seed=2)}
    monkeypatch.setattr(engine, "load_model", lambda *_, **__: lm)
    monkeypatch.setattr(engine, "load_token_pairs", splits.__getitem__)
    inputs = {"model": tmp_path, "tokens_train": "train", "tokens_test": "test", "dictionaries": []}
    for split, pairs in splits.items():
        metric = {"clean": metric_with(exact, pairs).numpy()}
        inputs[f"gradients_{split}"] = write_gradients(
            tmp_path, split, cached_sites(exact, pairs, SITES), metric
        )
    inputs["nodes"] = tmp_path / "nodes.parquet"
    params = {
        **DEFAULTS,
        "sites": list(SITES),
        "restore_top": [1, 3],
        "ranking": "absolute",
        "metric": {"kind": "logit_difference", "wrong_answers": "logsumexp"},
        "pairs": 4,
        "ablation": "mean",
        "aggregate": "ratio_of_means",
        "bootstrap": 50,
        "seed": 0,
        "batch_rows": 50,
        "dtype": "float32",
        "compute": {"device": "cpu"},
    }

    def compute(folder="results/m/objects/first", make=toy_dictionary, **changed):
        inputs["dictionaries"] = []
        write_nodes(inputs["nodes"], WIDTH if make is identity_dictionary else D_DICT)
        for seed, site in enumerate(SITES):
            inputs["dictionaries"].append(tmp_path / f"{site}.safetensors")
            made = (
                identity_dictionary(site, WIDTH)
                if make is identity_dictionary
                else make(site, WIDTH, D_DICT, seed=seed)
            )
            save_dictionary(inputs["dictionaries"][-1], made.to(torch.float32))
        place = tmp_path / folder
        place.mkdir(exist_ok=True, parents=True)
        said = {"stage": "ablate_error_nodes", "inputs": {"model": "m", "dictionaries": make.__name__}}
        files = {"experiments": place / "experiments.parquet"}
        ablate_error_nodes(inputs, {**params, **changed}, Output(place, files, said))
        return files["experiments"]

    return compute


def picked(table, **conditions):
    keep = np.ones(len(table["F"]), bool)
    for name, value in conditions.items():
        keep &= table[name] == value
    return {name: column[keep] for name, column in table.items()}


def test_the_stage_writes_every_experiment_with_intervals(stage):
    path = stage()
    table, facts = read_table(path), read_provenance(path)
    assert set(table["experiment"]) == {
        *(
            "all",
            "every_site",
            "layer",
            "threshold",
            "position",
            "sliding",
            "expanding_right",
            "expanding_left",
        ),
        *("restore", "heatmap"),
    }
    assert (table["low"] <= table["F"] + 1e-9).all()
    assert (table["F"] <= table["high"] + 1e-9).all()
    assert (table["n"] == 4).sum() > 10
    assert facts["kinds"] == ["resid"]
    assert "nearest" in facts["conventions"]
    # a window of both layers is the same whichever way it came about
    both = picked(table, what=ERRORS, first="resid.0", last="resid.1", position=-1, k=0)
    whole = [F for name, F in zip(both["experiment"], both["F"], strict=True) if name != "threshold"]
    assert len(whole) >= 5
    assert len(set(whole)) == 1
    np.testing.assert_allclose(
        table["F"][:1],
        faithfulness(
            table["m"][:1, None], table["m_empty"][:1, None], table["m_full"][:1, None], "ratio_of_means"
        ),
    )
    layer = picked(table, experiment="layer", first="resid.1")
    np.testing.assert_allclose(layer["score_test"], layer["score"] / 2)
    np.testing.assert_allclose(
        layer["predicted"], 1 + layer["score_test"] / (layer["m_full"] - layer["m_empty"])
    )


def test_errors_that_are_zero_change_nothing_when_ablated(stage):
    table = read_table(stage(make=identity_dictionary, baselines=["top-1"], heatmap_top=16))
    errors = picked(table, what=ERRORS)
    np.testing.assert_allclose(errors["F"], 1, atol=2e-4)
    np.testing.assert_allclose(errors["m"], errors["m_full"], atol=2e-4)
    features = picked(table, what="top-1")
    assert (np.abs(features["F"] - 1) > 1e-2).any()


def test_ablating_errors_everywhere_is_not_what_ablating_them_at_one_position_is(stage):
    table = read_table(stage())
    single = picked(table, experiment="position", first="resid.0", last="resid.0")
    assert len(set(np.round(single["F"], 6))) > 1
    assert sorted(set(single["n"].tolist())) == [2, 4]  # two cases, 4 and 6 tokens long


def test_one_more_window_measures_that_alone(stage, monkeypatch):
    stage(ranges=[], widths=[1], baselines=["top-1"])
    measured = []
    values = engine.Evaluation.values

    def counting(self, interventions, *rest):
        measured.append(len(interventions))
        return values(self, interventions, *rest)

    monkeypatch.setattr(engine.Evaluation, "values", counting)
    path = stage("results/m/objects/second", widths=[1], baselines=["top-1", "top-2"])
    # top-2 of resid.0, of resid.1 and of both, and nothing else
    assert measured == [3]
    monkeypatch.setattr(engine.Evaluation, "values", values)
    anew = read_table(stage("elsewhere", widths=[1], baselines=["top-1", "top-2"]))
    for name, column in read_table(path).items():
        if column.dtype.kind == "f":
            np.testing.assert_allclose(column, anew[name], atol=1e-4, equal_nan=True)


def test_the_result_does_not_depend_on_the_batch_size(stage):
    one, other = (read_table(stage(f"by{size}", batch_rows=size, positions=False)) for size in (7, 500))
    np.testing.assert_allclose(one["m"], other["m"], atol=1e-5)


def test_a_start_leaves_what_lies_before_it(stage):
    late, whole = read_table(stage(start="resid.1")), read_table(stage("results/m/objects/other"))
    assert set(late["first"]) == set(late["last"]) == {"resid.1"}
    # replacing all of a residual site cuts off what lies before it: the empty circuit is the same
    np.testing.assert_allclose(late["m_empty"][0], whole["m_empty"][0], atol=1e-5)
    one = picked(whole, experiment="layer", first="resid.1")
    np.testing.assert_allclose(picked(late, experiment="all")["m"], one["m"], atol=1e-5)
    with pytest.raises(UserError, match=r"resid\.5"):
        stage(start="resid.5")


def test_everything_restored_and_nothing_ablated_is_the_model():
    one = Experiment("heatmap", ERRORS, ("resid.0", "resid.0"), ())
    assert key(one.intervention(["resid.0"])) == key(everything(["resid.0"]))
