"""What rules declare against what their stages do."""

import ast
import re

import pytest

from tests.fixtures.rule_files import reached, rules, stage_of

COMPUTING = sorted(
    name
    for name, rule in rules().items()
    if re.search("COMPUTE|HARVEST_OF_SITE|harvest_of", rule.sections.get("params", "")) and rule.script
)


def uses_the_device(name: str) -> bool:
    """Whether the stage of a rule, or what it calls, looks at ``compute["device"]``."""
    script = rules()[name].script
    assert script is not None
    found = (node for part in reached(*stage_of(script)) for node in ast.walk(part))
    return any(
        (isinstance(node, ast.Subscript) and _is_device(node.slice))
        or (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", "") == "get"
            and _is_device(node.args[0])
        )
        for node in found
        if not isinstance(node, ast.Call) or node.args
    )


def _is_device(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value == "device"


def test_rules_are_found_and_told_apart() -> None:
    assert len(COMPUTING) > 35
    assert uses_the_device("cache_activations")
    assert uses_the_device("search_circuit")  # by a function of another module
    assert not uses_the_device("import_dictionary")
    assert not uses_the_device("import_transcoder")


@pytest.mark.parametrize("name", COMPUTING)
def test_a_rule_asks_for_what_its_stage_takes(name: str) -> None:
    """A job without ``gpu`` lands on a node without one; torch's threads need as many cores."""
    sections = rules()[name].sections
    if uses_the_device(name):
        assert "gpu=GPU" in sections["resources"]
        assert "CFG.compute.threads" in sections["threads"]
