"""The section on model diffing: one second model, bounds that ascend, and what shapes the crosscoder."""

from typing import Any

import pytest
from pydantic import ValidationError

from circuitflow.config_diffing import DiffingSection

TUNED: dict[str, Any] = {"site": "resid.2", "tuning": {"text": {"kind": "task"}}}


def test_defaults_follow_what_is_known_of_crosscoders() -> None:
    section = DiffingSection.model_validate(TUNED)
    assert section.kind == "batchtopk"  # L1 makes features look exclusive that are not
    assert section.shared == [0.3, 0.7]
    assert section.tuning is not None
    assert section.tuning.text.model_dump() == {"kind": "task", "answers": "swapped"}


def test_only_what_shapes_the_crosscoder_is_its_setting() -> None:
    section = DiffingSection.model_validate({**TUNED, "k": 8, "top": 3})
    other = DiffingSection.model_validate({**TUNED, "k": 8, "top": 4, "shared": [0.2, 0.8], "penalty": 0.1})
    assert section.settings() == other.settings()
    assert section.settings()["k"] == 8
    assert section.settings() != DiffingSection.model_validate({**TUNED, "k": 9}).settings()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tuning": None}, "name a second model"),
        ({"model": {"kind": "path", "path": "x"}}, "and not both"),
        ({"shared": [0.7, 0.3]}, "should ascend"),
        ({"tuning": {"text": {"kind": "task"}, "block": 1}}, "greater than or equal to 2"),
        ({"kind": "gated"}, "Input should be 'batchtopk'"),
        ({"tuning": {"text": {"kind": "task"}, "layers": []}}, "at least 1 item"),
    ],
)
def test_mistakes_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        DiffingSection.model_validate({**TUNED, **changes})
