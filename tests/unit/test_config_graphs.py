"""The configuration's section on attribution graphs."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from circuitflow.config_checks import parse_config
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
    [({"prompts": []}, "at least 1"), ({"prompts": [PROMPT, PROMPT]}, "given to two prompts"),
     ({"prompts": [{**PROMPT, "targets": []}]}, "at least 1"), ({"prompts": [{**PROMPT, "name": "a/b"}]}, "pattern"),
     ({"prompts": [{**PROMPT, "targets": [-1]}]}, "greater than"), ({"prompts": [PROMPT], "share": 1}, "Extra"),
     ({"prompts": [{**PROMPT, "targets": [{"tokens": {}}]}]}, "at least 1")],
)  # fmt: skip
def test_mistakes_are_refused(wrong, said):
    with pytest.raises(ValidationError, match=said):
        GraphsSection.model_validate(wrong)


def parsed(text: str) -> GraphsSection:
    """The tiny configuration, with prompts plural and singular, and further keys of graphs as people write them."""
    values = yaml.safe_load((ROOT / "configs/tiny.yaml").read_text(encoding="utf-8"))
    values["graphs"] |= yaml.safe_load(text)
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
    assert section.supernodes.by_hand["capital"] == ["3_1021", "5_77_3"]
    assert len(section.interventions.wanted) == 2


def naming(node: str, prompts: str = "[]") -> str:
    """An intervention that names a node."""
    return f"interventions: {{wanted: [{{name: a, prompts: {prompts}, changes: [{{nodes: [{node}]}}]}}]}}"


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
