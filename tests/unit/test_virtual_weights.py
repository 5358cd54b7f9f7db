"""Virtual weights: worked by hand, equal to direct effects where there is no attention, and told from interference."""

import numpy as np
import pytest
import torch

from circuitflow.dictionaries.dictionary import Dictionary, save_dictionary
from circuitflow.dictionaries.family import Family
from circuitflow.errors import UserError
from circuitflow.graphs.building import Settings, build_graph
from circuitflow.graphs.virtual import (
    PAIRS,
    Joint,
    Weights,
    distribution,
    joint_activity,
    most_influential,
    pairs,
    virtual_weights,
)
from circuitflow.jobs import Output
from circuitflow.models.attention_weights import norms
from circuitflow.models.frozen import FrozenPrompt
from circuitflow.models.loading import load_model
from circuitflow.models.running import run
from circuitflow.store.tables import read_table
from tests.fixtures.activation_store import BLOCK, write_store
from tests.fixtures.graph_examples import random_family


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("cross", [False, True])
def test_weights_are_direct_effects_without_attention(random_lm, architecture, cross):
    """On a prompt of one token: the edge is activation × norm scale × (virtual weight), less what attention carries."""
    lm = random_lm(architecture)
    family = random_family(lm, cross=cross)
    weights = Weights(lm, family)
    frozen = FrozenPrompt.of(lm, torch.tensor([5]))
    graph = build_graph(lm, family, [5], settings=Settings(max_nodes=None))
    source = int(np.flatnonzero(graph.features[:, 0] == 0)[0])
    target = int(np.flatnonzero(graph.features[:, 0] == 1)[0])
    scale = float(frozen.layers[1].mlp_norm.scale[0])
    encoder = family.members[1].W_enc[graph.features[target, 2]]
    decoder = family.decoder(0, "mlp.0")[graph.features[source, 2]]
    G = frozen.mlp_input(1, 0, encoder[None])[None]
    # what attention of layer 1 adds, where it lies between writing and reading
    through = 0.0 if frozen.parallel else float((frozen.pull_attention(1, G) @ decoder).sum())
    direct = graph.weights[target, source] / graph.activations[source] - through
    found = weights.incoming(1, int(graph.features[target, 2]))[0][graph.features[source, 2]]
    assert np.isclose(float(found) * scale, direct, rtol=1e-4)
    back = weights.outgoing(0, int(graph.features[source, 2]))[1][graph.features[target, 2]]
    assert np.isclose(float(back), float(found), rtol=1e-4)


def test_weights_by_hand(random_lm):
    lm = random_lm("llama", dtype="float32")
    d = lm.d_model
    decoder, encoder = torch.zeros(1, d), torch.zeros(1, d)
    decoder[0, 3], encoder[0, 3], encoder[0, 4] = 2.0, 5.0, 1.0
    members = [
        Dictionary(
            "relu", (f"mlp_in.{i}",), (f"mlp.{i}",), "threshold", encoder, torch.zeros(1), decoder, torch.zeros(d)
        )
        for i in range(2)
    ]  # fmt: skip
    weights = Weights(lm, Family(tuple(members)))
    norm = float(norms(lm, 1).before_mlp.weight[3])
    found = weights.incoming(1, 0)
    assert set(found) == {0}
    assert np.isclose(float(found[0][0]), 10.0 * norm, rtol=1e-5)
    assert weights.incoming(0, 0) == {}
    assert weights.outgoing(1, 0) == {}


def test_joint_activity_and_interference_by_hand():
    """Two features of one layer and one of the next, over three tokens of given activity."""
    eye, none = torch.eye(2), torch.zeros(2)
    members = tuple(
        Dictionary(
            "relu", (f"mlp_in.{i}",), (f"mlp.{i}",), "threshold", eye, none, eye, none, extra={"threshold": none}
        )
        for i in range(2)
    )  # fmt: skip
    x = {
        "mlp_in.0": torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 4.0]]),
        "mlp_in.1": torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 5.0]]),
    }
    joint = joint_activity(Family(members), [(1, 0)], iter([x, {key: value[:1] for key, value in x.items()}]))
    assert joint.tokens == 4
    assert joint.own.tolist() == [6.0]
    assert joint.products[0].tolist() == [[6.0, 0.0]]  # 3·1 twice; never with feature 1
    assert joint.totals[0].tolist() == [4.0, 4.0]

    class Layers:
        layers = (0, 1)

    found = {0: torch.tensor([0.5, -1.5])}
    table = pairs(Layers(), found, joint, 0, "in")
    assert table["expected"].tolist() == [0.5 * 6.0 / 6.0, 0.0]
    assert table["together"].tolist() == [True, False]
    told = distribution(table)
    assert told["together_share"] == pytest.approx(0.25)
    assert told["top_together"] == pytest.approx(0.25)
    assert (told["n"], told["largest"], told["expected"]) == (2, 1.5, 0.5)
    table = pairs(Layers(), found, joint, 0, "out")
    assert table["expected"].tolist() == [0.5 * 6.0 / 4.0, 0.0]
    empty = distribution(pairs(Layers(), {}, joint, 0, "in"))
    assert empty["n"] == 0
    assert np.isnan(empty["together_share"])
    assert isinstance(joint, Joint)


def test_features_are_chosen_by_influence_over_all_positions(random_lm):
    lm = random_lm("llama")
    graph = build_graph(lm, random_family(lm), [3, 17, 9, 40], settings=Settings(max_nodes=None))
    found = most_influential(graph, 5)
    assert len(found) == len(set(found)) == 5
    assert set(found) <= {(layer, feature) for layer, _, feature in graph.features.tolist()}


def test_features_that_are_not_there_are_told(random_lm):
    lm = random_lm("llama")
    weights = Weights(lm, random_family(lm))
    with pytest.raises(UserError, match=r"layer 9; those that there are read \[0, 1\]"):
        weights.incoming(9, 0)
    with pytest.raises(UserError, match="no feature 99; its transcoder has 0 to 23"):
        weights.outgoing(0, 99)


def test_the_stage_lists_the_strongest_weights_of_influential_features(toy_manifest, tmp_path):
    """Joint activity is counted over the stored vectors; listed weights are those of :class:`Weights`."""
    manifest = toy_manifest("llama")
    lm = load_model(manifest)
    family = random_family(lm)
    tokens = torch.randint(3, 60, (4, BLOCK), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sites = run(lm, tokens, torch.ones_like(tokens, dtype=torch.bool), capture=family.reads).sites
    arrays = {site: x.flatten(0, 1).numpy() for site, x in sites.items()}
    inputs = {
        "model": manifest,
        "dictionaries": [tmp_path / f"{number}.safetensors" for number in range(len(family.members))],
        "graph": tmp_path / "graph.safetensors",
        "activations": write_store(tmp_path, "activations", arrays, []),
        "corpus": write_store(tmp_path, "corpus", {"tokens": tokens.int().numpy()}, [], shard_rows=4),
    }
    for path, member in zip(inputs["dictionaries"], family.members, strict=True):
        save_dictionary(path, member)
    graph = build_graph(lm, family, [3, 17, 9, 40], settings=Settings(max_nodes=None))
    graph.save(inputs["graph"])
    params = {"features": 3, "strongest": 4, "blocks": 2, "dtype": "float32", "compute": {"device": "cpu"}}
    files = {name: tmp_path / f"{name}.parquet" for name in ("weights", "features")}
    virtual_weights(inputs, params, Output(tmp_path, files, {}))
    listed, described = (read_table(files[name]) for name in ("weights", "features"))
    assert set(listed) == {"layer", "feature", "side", *PAIRS}
    chosen = most_influential(graph, 3)
    keys = list(zip(described["layer"].tolist(), described["feature"].tolist(), strict=True))
    assert keys == [key for key in chosen for _ in range(2)]
    weights = Weights(lm, family)
    for row in range(len(listed["weight"])):
        layer, feature, other = (int(listed[name][row]) for name in ("layer", "feature", "other_layer"))
        sides = weights.incoming if listed["side"][row] == "in" else weights.outgoing
        assert (other < layer) == (listed["side"][row] == "in")
        expected = sides(layer, feature)[weights.member(other, 0)][int(listed["other_feature"][row])]
        assert listed["weight"][row] == pytest.approx(float(expected), rel=1e-5)
    first = (listed["layer"] == chosen[0][0]) & (listed["feature"] == chosen[0][1])
    for side in ("in", "out"):
        size = np.abs(listed["weight"][first & (listed["side"] == side)])
        assert len(size) in (0, 4)
        assert (np.diff(size) <= 0).all()
    # blocks 0 and 3 of the corpus are read: joint activity worked out densely
    read = {site: torch.from_numpy(np.concatenate([x[:BLOCK], x[-BLOCK:]])) for site, x in arrays.items()}
    codes = family.encode(read, torch.zeros(2 * BLOCK, dtype=torch.int64))
    row = int(np.argmax(np.abs(listed["expected"])))
    layer, feature, other, number = (
        int(listed[name][row]) for name in ("layer", "feature", "other_layer", "other_feature")
    )
    own, met = codes[layer].dense()[:, feature], codes[other].dense()[:, number]
    target = own if listed["side"][row] == "in" else met
    expected = listed["weight"][row] * float((own * met).sum() / target.sum())
    assert listed["expected"][row] == pytest.approx(expected, rel=1e-4)
    assert expected != 0
