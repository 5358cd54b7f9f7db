"""Features by the names that people write: ``3_1021_5`` (layer, feature, position) or ``3_1021`` (any position)."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from circuitflow.errors import UserError
from circuitflow.graphs.graph import Graph

PATTERN = re.compile(r"(\d+)_(\d+)(?:_(\d+))?")


@dataclass(frozen=True)
class Named:
    """A feature, at one position or wherever it is active."""

    layer: int
    feature: int
    position: int | None = None

    def __str__(self) -> str:
        short = f"{self.layer}_{self.feature}"
        return short if self.position is None else f"{short}_{self.position}"


def parse_feature(name: str) -> Named:
    """A feature from its id.

    :raises UserError: it is no id of a feature.
    """
    match = PATTERN.fullmatch(name)
    if match is None:
        raise UserError(
            f"'{name}' is no id of a feature; write layer_feature_position, for example "
            '"3_1021_5", or "3_1021" for every position at which it is active.'
        )
    layer, feature, position = match.groups()
    return Named(int(layer), int(feature), None if position is None else int(position))


def nodes_named(names: Iterable[str], graph: Graph) -> list[int]:
    """Numbers of a graph's features with these ids, each once; ids of features that are no nodes are passed over.

    :raises UserError: a name is no id.
    """
    found: list[int] = []
    for name in names:
        wanted = parse_feature(name)
        here = (graph.features[:, 0] == wanted.layer) & (graph.features[:, 2] == wanted.feature)
        if wanted.position is not None:
            here &= graph.features[:, 1] == wanted.position
        found += np.flatnonzero(here).tolist()
    return list(dict.fromkeys(found))


def expanded(names: Iterable[str], supernodes: Mapping[str, Iterable[str]]) -> list[Named]:
    """Features behind names of supernodes and ids, each once.

    :raises UserError: a name is neither.
    """
    found: list[Named] = []
    for name in names:
        if name in supernodes:
            found += [parse_feature(member) for member in supernodes[name]]
        elif PATTERN.fullmatch(name):
            found.append(parse_feature(name))
        else:
            known = ", ".join(supernodes) or "none"
            raise UserError(
                f"'{name}' is neither an id of a feature (write for example "
                f'"3_1021_5") nor a supernode of this graph (there are: {known}).'
            )
    return list(dict.fromkeys(found))
