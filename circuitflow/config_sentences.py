"""What pydantic found wrong in a configuration, as one sentence in the terms of the file."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from circuitflow.config import Config
from circuitflow.config_base import Section
from circuitflow.config_dictionaries import DictionarySettings
from circuitflow.config_error_nodes import WANTED
from circuitflow.config_transcoders import TranscoderSettings
from circuitflow.errors import nearest

NUMBER = re.compile(r"[+-]?[\d.]+[eE][+-]?\d+")
"""Numbers that YAML reads as text."""


def sentence_of(error: ValidationError, where: list[str], values: Mapping[str, Any]) -> str:
    """The most telling of the mistakes: an unknown key explains a missing one, so it comes first.

    :param where: the key of the values, if they are a part of the configuration.
    """
    problem = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    path = [str(part) for part in problem["loc"]]
    shown = ".".join([*where, *_as_written(problem, values)])
    kind, context, value = problem["type"], problem.get("ctx", {}), problem["input"]
    if kind == "extra_forbidden":
        return f"Unknown key {shown}; {nearest(path[-1], _keys_of(where, path))}."
    if kind == "missing":
        return f"Key {shown} is missing; add it (config.schema.json lists every key)."
    if kind == "union_tag_invalid":
        return f"Key {shown}.kind is {context['tag']}; {nearest(context['tag'], _choices(context['expected_tags']))}."
    if kind == "literal_error":
        return f"Key {shown} is {value}; {nearest(value, _choices(context['expected']))}."
    if kind == "string_pattern_mismatch":
        return f"Key {shown} is {value!r}{_pattern(context['pattern'], value)}."
    if kind == "too_short" and not context["actual_length"]:
        return f"Key {shown} is empty; name at least one."
    return _of_value(shown, problem)


def _of_value(shown: str, problem: Mapping[str, Any]) -> str:
    """The sentence on a value that cannot be, or on a section whose keys do not go together."""
    kind, context, value = problem["type"], problem.get("ctx", {}), problem["input"]
    if kind == "too_short":
        ends = ", a range its first and last site" if "ranges." in shown else ""
        return f"Key {shown} is {_short(value)}; it takes at least {context['min_length']} entries{ends}."
    if kind == "too_long":
        return f"Key {shown} is {_short(value)}; it takes at most {context['max_length']} entries."
    message = problem["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    if kind == "value_error" and isinstance(value, Mapping):
        return f"Key {shown}: {message}."
    number_as_text = kind == "float_type" and isinstance(value, str) and NUMBER.fullmatch(value)
    hint = " (YAML reads 3e-4 as text: write 3.0e-4)" if number_as_text else ""
    return f"Key {shown} is {_short(value)}, but {message[0].lower()}{message[1:]}{hint}."


def _pattern(pattern: str, value: object) -> str:
    if pattern in WANTED:
        return f"; {WANTED[pattern](value)}"
    return ", but only letters, digits, '_', '.' and '-' are allowed, as in a file name"


def _short(value: object, longest: int = 100) -> str:
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]}…"


def _choices(expected: object) -> list[str]:
    """pydantic lists choices as "'a', 'b' or 'c'"."""
    return str(expected).replace("'", "").replace(" or ", ", ").split(", ")


def _as_written(problem: Mapping[str, Any], values: Any) -> list[str]:
    """The path as the user wrote it: pydantic adds which member of a union was chosen."""
    *parents, last = problem["loc"]
    kept = []
    for part in parents:
        chosen = isinstance(values, Mapping) and part == values.get("kind")
        if not chosen and _has(values, part):
            kept.append(str(part))
            values = values[part]
    return [*kept, str(last)] if problem["type"] == "missing" or _has(values, last) else kept


def _has(values: Any, part: str | int) -> bool:
    return (
        part in values if isinstance(values, Mapping) else isinstance(values, list) and isinstance(part, int)
    )


def _keys_of(where: list[str], path: list[str]) -> list[str]:
    """Keys that are valid beside an unknown one; values that are a part of the configuration are of dictionaries."""
    if where:
        return _keys_beside(DictionarySettings, path)
    if path[:2] == ["transcoders", "overrides"]:
        return _keys_beside(TranscoderSettings, path[3:])
    return _keys_beside(Config, path)


def _keys_beside(section: type[Section], path: list[str]) -> list[str]:
    """Keys that are valid where an unknown one was found, by walking a section's schema along the path."""
    schema = section.model_json_schema()
    definitions = schema.get("$defs", {})

    def options(node: dict[str, Any]) -> list[dict[str, Any]]:
        if "$ref" in node:
            return options(definitions[node["$ref"].rsplit("/", 1)[-1]])
        for key in ("oneOf", "anyOf", "allOf"):
            if key in node:
                return [found for part in node[key] for found in options(part)]
        return [node]

    nodes = options(schema)
    for part in path[:-1]:
        following: list[dict[str, Any]] = []
        for node in nodes:
            if part in node.get("properties", {}):
                following += options(node["properties"][part])
            elif part.isdigit() and "items" in node:
                following += options(node["items"])
            elif node.get("properties", {}).get("kind", {}).get("const") == part:
                following.append(node)  # pydantic names the chosen member of a union in the path
        nodes = following or nodes
    return sorted({key for node in nodes for key in node.get("properties", {})})
