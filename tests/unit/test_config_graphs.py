"""The configuration's section on attribution graphs."""

import pytest
from pydantic import ValidationError

from circuitflow.config_graphs import GraphsSection
from circuitflow.graphs.building import Settings
from circuitflow.graphs.stage import BUILT

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
