"""The configuration's section on attribution graphs."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from circuitflow.config_checks import parse_config
from circuitflow.config_checks_graphs import check_graph_layers
from circuitflow.config_graph_experiments import FEATURE
from circuitflow.config_graphs import GraphsSection
from circuitflow.errors import UserError
from circuitflow.graphs.building import Settings
from circuitflow.graphs.naming import PATTERN
from circuitflow.graphs.stage import BUILT

ROOT = Path(__file__).parents[2]
PROMPT = {"name": "one", "text": "The capital of France is"}


def test_targets_are_tokens_ids_and_combinations():
    difference = {"tokens": {" are": 1.0, " is": -1}, "weight": 2}
    section = GraphsSection.model_validate({"prompts": [{**PROMPT, "targets": [" is", 7, difference]}]})
    first, second, third = section.model_dump()["prompts"][0]["targets"]
    assert (first, second) == (" is", 7)
    assert third == {"name": None, "tokens": {" are": 1.0, " is": -1.0}, "weight": 2.0}


def test_defaults_are_those_of_the_library():
    section = GraphsSection.model_validate({"prompts": [PROMPT]}).model_dump(include=set(BUILT))
    assert Settings(**section) == Settings()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"prompts": []}, "at least 1"), ({"prompts": [PROMPT, PROMPT]}, "an earlier one has this"),
     ({"prompts": [{**PROMPT, "targets": []}]}, "at least 1"), ({"prompts": [{**PROMPT, "name": "a/b"}]}, "pattern"),
     ({"prompts": [{**PROMPT, "targets": [-1]}]}, "greater than"), ({"prompts": [PROMPT], "share": 1}, "Extra"),
     ({"prompts": [{**PROMPT, "targets": [{"tokens": {}}]}]}, "at least 1")],
)  # fmt: skip
def test_mistakes_are_refused(wrong, said):
    with pytest.raises(ValidationError, match=said):
        GraphsSection.model_validate(wrong)


def parsed(text: str, transcoders: dict[str, object] | None = None) -> GraphsSection:
    """The tiny configuration, with prompts plural and singular, and further keys of graphs as people write them."""
    values = yaml.safe_load((ROOT / "configs/tiny.yaml").read_text(encoding="utf-8"))
    values["graphs"] |= yaml.safe_load(text)
    values["transcoders"] |= transcoders or {}
    graphs = parse_config(values).graphs
    assert graphs is not None
    return graphs


def test_what_the_documentation_shows_is_valid():
    blocks = re.findall(
        r"```yaml\n(.*?)```", (ROOT / "docs/graphs.md").read_text(encoding="utf-8"), re.DOTALL
    )
    shown = {}
    for block in blocks:
        shown |= yaml.safe_load(block)["graphs"]
    section = GraphsSection.model_validate(shown)
    assert section.supernodes.by_hand["cities"] == ["3_1021", "5_77_3"]
    assert len(section.interventions.wanted) == 3


def naming(node: str, prompts: str = "[]") -> str:
    """An intervention that names a node."""
    return f"interventions: {{wanted: [{{name: a, prompts: {prompts}, changes: [{{nodes: [{node}]}}]}}]}}"


def explaining(targets: str) -> str:
    """A prompt with these targets."""
    return f"prompts: [{{name: plural, text: The doctors, targets: [{targets}]}}]"


ANY_TARGET = (
    r"it should be a token \(its text or its id\) or a combination, as in \{tokens: \{\" is\": 1\.0\}\}\.$"
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            explaining("{tokens: {' is': 1.0}, weight: -1}"),
            r"targets\.0\.weight is -1, but .* greater than 0\.$",
        ),
        (explaining("' is', {tokens: {}}"), r"^Key graphs\.prompts\.0\.targets\.1\.tokens is empty; name at"),
        (
            explaining("{tokens: {' is': '1'}}"),
            r"targets\.0\.tokens\. is is '1', but it should be a valid number\.$",
        ),
        (
            explaining("{tokens: {' is': 1.0}, wieght: 1}"),
            r"^Unknown key .*targets\.0\.wieght; did you mean 'weight'",
        ),
        (
            explaining("{tokens: {' is': 0.0}}"),
            r"targets\.0\.tokens: one coefficient at least should not be 0",
        ),
        (
            explaining("-3"),
            r"^Key graphs\.prompts\.0\.targets\.0 is -3, but it should be greater than or equal to 0\.$",
        ),
        (explaining("1.5"), rf"targets\.0 is 1\.5, but {ANY_TARGET}"),
        (explaining("true"), rf"targets\.0 is True, but {ANY_TARGET}"),
        (
            explaining("' is', ' is'"),
            r"^Key graphs\.prompts\.0\.targets\.1 is ' is', but an earlier target is the same",
        ),
        (
            "prompts: [{name: a, text: b}, {name: a, text: c}]",
            r"^Key graphs\.prompts\.1\.name is 'a', but prompts need",
        ),
        (
            "interventions: {wanted: [{name: a, changes: [{nodes: ['1_2']}]}, {name: a, changes: [{nodes: ['1_3']}]}]}",
            r"^Key graphs\.interventions\.wanted\.1\.name is 'a', but wanted need different names",
        ),
    ],
)
def test_mistakes_in_prompts_are_told_at_their_keys(text, said):
    with pytest.raises(UserError, match=said):
        parsed(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "supernodes: {by_hand: {cap: ['9_10']}}",
            "^Key graphs.supernodes.by_hand.cap names 9_10, but the model has 4 layers; the deepest is 3.$",
        ),
        (
            "supernodes: {by_hand: {cap: ['3_1021']}}",
            "cap names 3_1021, but the transcoder of layer 3 has 64 features, 0 to 63.$",
        ),
        (
            "supernodes: {prompts: {plural: {cap: ['3_64_2']}}}",
            "Key graphs.supernodes.prompts.plural.cap names 3_64_2",
        ),
        (
            "supernodes: {by_hand: {cap: []}}",
            "Key graphs.supernodes.by_hand.cap is empty; name at least one.$",
        ),
        (
            naming("'99_1'"),
            "^Key graphs.interventions.wanted.0.changes names 99_1, but the model has 4 layers",
        ),
        (naming("'3_999'"), "wanted.0.changes names 3_999, but the transcoder of layer 3 has 64 features"),
        ("interventions: {modes: []}", "Key graphs.interventions.modes is empty; name at least one.$"),
        (
            "interventions: {modes: [{name: a}, {name: b, up_to: 4}]}",
            "^Key graphs.interventions.modes.1.up_to is 4, but the model has 4 layers; the deepest is 3.$",
        ),
        ("node_share: 0", "Key graphs.node_share is 0, but it should be greater than 0"),
        ("edge_share: 0.0", "Key graphs.edge_share is 0.0, but it should be greater than 0"),
    ],
)
def test_layers_and_features_that_no_graph_can_have_are_refused(text, said):
    with pytest.raises(UserError, match=said):
        parsed(text)


@pytest.mark.parametrize(
    ("transcoders", "said"),
    [
        ({"overrides": {7: {"k": 2}}}, "transcoders.overrides names layer 7, but the model has 4 layers"),
        ({"overrides": {-1: {"k": 2}}}, "transcoders.overrides names layer -1, but layers count from 0"),
        ({"layers": [1, 2], "overrides": {3: {"k": 2}}}, "names layer 3, but only the layers of .*: 1, 2.$"),
        ({"layers": [1, 2]}, "by_hand.cap names 3_40, but only the layers of transcoders.layers"),
        ({"overrides": {3: {"d_dict": 32}}}, "names 3_40, but the transcoder of layer 3 has 32 features"),
    ],
)
def test_layers_are_those_of_the_transcoders(transcoders, said):
    with pytest.raises(UserError, match=said):
        parsed("supernodes: {by_hand: {cap: ['3_40']}}", transcoders)


def test_layers_are_checked_once_the_depth_is_known():
    values = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    values["transcoders"]["layers"] = None
    values["graphs"]["supernodes"] = {"by_hand": {"cap": ["30_1"]}}
    config = parse_config(values)
    check_graph_layers(config, 31)
    with pytest.raises(UserError, match="names 30_1, but the model has 30 layers"):
        check_graph_layers(config, 30)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "supernodes: {by_hand: {a: [3_1021]}}",
            "Key graphs.supernodes.by_hand.a.0 is 31021, but .* in quotes",
        ),
        ("supernodes: {prompts: {plural: {a: [0_4_1]}}}", "prompts.plural.a.0 is 33, but it should be text"),
        (naming("3_1021_5"), 'is 310215, but it should be text in quotes, such as "3_1021": without'),
        ("supernodes: {by_hand: {a: ['3-1021']}}", "a.0 is '3-1021', but it should be the id of a feature"),
        ("supernodes: {prompts: {plurl: {a: ['3_1']}}}", "names plurl, .*did you mean 'plural'"),
        (naming("'3_1'", "[singulr]"), "wanted.0.prompts names singulr, which is not in .* mean 'singular'"),
        (
            f"{{supernodes: {{by_hand: {{keys: ['3_1']}}}}, {naming('kyes')}}}",
            "wanted.0.changes names 'kyes', .*did you mean 'keys'",
        ),
        (
            f"{{supernodes: {{prompts: {{plural: {{keys: ['3_1']}}}}}}, {naming('keys')}}}",
            "names 'keys', which is neither .* supernode of prompt singular; valid: none",
        ),
        (f"{{supernodes: {{automatic: false}}, {naming('group-1')}}}", "names 'group-1', which is neither"),
        ("interventions: {modes: [{name: a, up_to: -7}]}", "modes.0.up_to is -7, but it should be a layer,"),
        ("interventions: {modes: [{name: a, up_to: touch}]}", "up_to is 'touch', but it should be a layer,"),
    ],
)
def test_mistakes_in_experiments_are_told_in_a_sentence(text, said):
    with pytest.raises(UserError, match=said):
        parsed(text)


def test_experiments_name_ids_supernodes_and_groups():
    graphs = parsed(
        "{supernodes: {by_hand: {keys: ['3_1']}, prompts: {plural: {doctors: ['3_2_4']}}}, interventions: {wanted: ["
        "{name: a, changes: [{nodes: [keys, '1_2', '1_2_3', group-4]}]},"
        "{name: keys, prompts: [plural], changes: [{nodes: [doctors]}]}], modes: [{name: a, up_to: 3}, {name: b}]}}"
    )
    assert [mode.up_to for mode in graphs.interventions.modes] == [3, None]


def test_ids_are_those_of_the_library():
    for text in ("3_1021", "3_1021_5", "3_1021_5_6", "3", "E_1_2", "a_1"):
        assert bool(FEATURE.fullmatch(text)) == bool(PATTERN.fullmatch(text))
