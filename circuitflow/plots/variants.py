"""What the figures of a study share: which tables belong to which variant, and how variants are told apart.

A variant's label, "topk-k32-d4096-seed0", is the folder of its tables: kind, settings, seed. Kinds have
colours; the settings of one kind have line styles and marks; seeds after the first are thin.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from circuitflow.plots.style import Style, site_shades
from circuitflow.plots.tables import Table
from circuitflow.store.tables import read_table

COLOURS = {
    "topk": "#0072b2",
    "batchtopk": "#56b4e9",
    "matryoshka": "#009e73",
    "relu": "#c1521f",
    "jumprelu": "#e69f00",
    "gated": "#b0569b",
    "pretrained": "#1c2024",
    "random": "#7a7f87",
    "identity": "#b3a58a",
}
"""By kind (Okabe and Ito 2008, two of them darker): told apart by readers with any colour vision."""

OTHERS = ("#5d4a9c", "#8c6d1f", "#2f8f8f", "#a03a5a")  # for kinds without a colour of their own
LINES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (7, 2)))
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
SPARSITY = re.compile(r"-(?:k|p|l0_)\d[\d.]*(?:e[-+]?\d+)?(?=-|$)")  # k32, p0.001, l0_32
LONG_LABEL = 28  # characters
ROW_INCHES = (0.34, 0.19)  # height of a row: with few variants, and at least


@dataclass(frozen=True)
class Variant:
    """What a label says."""

    label: str
    group: str
    """The label without its seed: variants of one group differ in nothing else."""
    kind: str
    seed: str

    @classmethod
    def of(cls, label: str) -> "Variant":
        """From the label; one that names no seed is a group of its own."""
        group, separator, seed = label.rpartition("-seed")
        if not separator:
            group, seed = label, ""
        return cls(label, group, group.split("-")[0], seed)

    @property
    def family(self) -> str:
        """The group without its sparsity: the variants that one line of a frontier joins."""
        return SPARSITY.sub("", self.group)


@dataclass(frozen=True)
class Look:
    """How one variant is drawn."""

    colour: str
    line: Any
    mark: str
    first: bool
    """Whether it is the first seed of its group: thick, and in the legend."""

    @property
    def width(self) -> float:
        """Of its line, in points."""
        return 1.5 if self.first else 0.6


def looks(labels: Iterable[str], key: Callable[[Variant], str] | None = None) -> dict[str, Look]:
    """Looks by label, in the given order; ``key`` says what has a line style of its own (by default the group).

    Variants that are all of one kind have colours by that instead.
    """
    variants = [Variant.of(label) for label in labels]
    kinds = list(dict.fromkeys(variant.kind for variant in variants if variant.kind not in COLOURS))
    known = COLOURS | {kind: OTHERS[place % len(OTHERS)] for place, kind in enumerate(kinds)}
    of_kind: dict[str, list[str]] = {}
    seen: set[str] = set()
    found = {}
    for variant in variants:
        settings = of_kind.setdefault(variant.kind, [])
        name = key(variant) if key else variant.group
        if name not in settings:
            settings.append(name)
        place = settings.index(name)
        found[variant.label] = Look(
            colour=known[variant.kind],
            line=LINES[place % len(LINES)],
            mark=MARKS[place % len(MARKS)],
            first=variant.group not in seen,
        )
        seen.add(variant.group)
    if len(of_kind) == 1:
        (settings,) = of_kind.values()
        colours = [to_hex(shade) for shade in site_shades(len(settings))]  # type: ignore[arg-type]
        shades = dict(zip(settings, colours, strict=True))
        return {v.label: replace(found[v.label], colour=shades[key(v) if key else v.group]) for v in variants}
    return found


def by_variant(paths: Sequence[Path]) -> dict[str, Path]:
    """Files by label, each in a folder named after its variant: in the given order, but seeds of one group together."""
    found = {path.parent.name: path for path in paths}
    groups = list(dict.fromkeys(Variant.of(label).group for label in found))
    return {label: found[label] for label in sorted(found, key=lambda x: groups.index(Variant.of(x).group))}


def read_variants(paths: Sequence[Path]) -> dict[str, dict[str, np.ndarray]]:
    """Tables by label, in the order of :func:`by_variant`."""
    return {label: read_table(path) for label, path in by_variant(paths).items()}


def legend(owner: Figure | Axes, labels: Sequence[str]) -> None:
    """A column to the right of a figure, or in an empty panel: one entry per group, with the number of its seeds."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(Variant.of(label).group, []).append(label)
    called = names(groups)
    handles = [
        Line2D([], [], label=_entry(called[group], members), **_line(looks(labels)[members[0]]))
        for group, members in groups.items()
    ]
    if handles:
        place: dict[str, Any] = {"loc": "outside right upper"}
        if isinstance(owner, Axes):
            place = {"loc": "upper left", "bbox_to_anchor": (0, 1), "borderaxespad": 0}
        owner.legend(handles=handles, handlelength=2.6, labelspacing=0.35, **place)


def _entry(group: str, members: Sequence[str]) -> str:
    return group + (f" ({len(members)} seeds)" if len(members) > 1 else "")


def _line(look: Look) -> dict[str, Any]:
    line = {"color": look.colour, "linestyle": look.line, "linewidth": look.width}
    return line | {"marker": look.mark, "markersize": 3.8}


def names(labels: Iterable[str]) -> dict[str, str]:
    """How variants are called where room is short: without the settings that all variants of their kind share.

    Labels of at most :data:`LONG_LABEL` characters stay as they are.
    """
    found = {label: label for label in labels}
    by_kind: dict[str, list[set[str]]] = {}
    for label in found:
        by_kind.setdefault(Variant.of(label).kind, []).append(set(_parts(label)))
    shared = {kind: set.intersection(*parts) if len(parts) > 1 else set() for kind, parts in by_kind.items()}
    for label in found:
        kind, *settings = _parts(label)
        if len(label) > LONG_LABEL:
            kept = [part for part in settings if part not in shared[kind] or part.startswith("seed")]
            found[label] = "-".join([kind, *kept])
    return found


def _parts(label: str) -> list[str]:
    """A label at its hyphens, except that of an exponent ("p1e-05")."""
    return re.split(r"(?<!\de)-", label)


def curve(axes: Axes, x: np.ndarray, y: np.ndarray, look: Look, marks: bool = False) -> None:
    """One variant's line; its last point carries its mark, or every point does."""
    every: Any = None if marks else [len(x) - 1] if len(x) else None
    axes.plot(
        x,
        y,
        color=look.colour,
        linestyle=look.line,
        linewidth=look.width,
        alpha=1.0 if look.first else 0.75,
        marker=look.mark,
        markevery=every,
        markersize=3.8 if look.first else 2.4,
    )


def rows_height(count: int) -> float:
    """Inches for so many rows of a figure with one row per variant."""
    return count * max(ROW_INCHES[1], ROW_INCHES[0] - 0.012 * count)


def name_rows(panels: Iterable[Axes], labels: Sequence[str], notes: Mapping[str, str]) -> None:
    """One row per variant from top to bottom of panels that share it, names and notes on the left, no ticks."""
    first, *others = panels
    first.set_yticks(range(len(labels)), [f"{name}  {notes[label]}" for label, name in names(labels).items()])
    first.set_ylim(len(labels) - 0.5, -0.5)
    for axes in (first, *others):
        axes.tick_params(axis="y", length=0)


def shade_groups(axes: Axes, labels: Sequence[str], style: Style) -> None:
    """A light ground behind every other group of seeds, so that what belongs together is seen together."""
    groups = [Variant.of(label).group for label in labels]
    order = list(dict.fromkeys(groups))
    for place, group in enumerate(groups):
        if order.index(group) % 2:
            axes.axhspan(
                place - 0.5, place + 0.5, color=style.palette.grid, alpha=0.35, linewidth=0, zorder=0
            )


def spread(axes: Axes, row: float, values: np.ndarray, colour: str) -> list[float]:
    """A row's distribution: thin line 5–95 % (its ends are returned), thick line the middle half, dot the median."""
    values = values[np.isfinite(values)]
    if not len(values):
        return []
    p5, p25, p50, p75, p95 = np.percentile(values, (5, 25, 50, 75, 95))
    axes.plot([p5, p95], [row, row], color=colour, linewidth=1.1, solid_capstyle="butt")
    axes.plot([p25, p75], [row, row], color=colour, linewidth=4.2, solid_capstyle="butt", alpha=0.55)
    axes.plot([p50], [row], "o", color=colour, markersize=4, markeredgecolor="white", markeredgewidth=0.6)
    return [float(p5), float(p95)]


def say(axes: Axes, text: str, style: Style) -> None:
    """In place of data: why there are none."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=style.palette.muted)
    axes.set(xticks=[], yticks=[])


def followed(checkpoints: Mapping[str, Table]) -> dict[str, Table]:
    """Tables of checkpoints by variant, without those of one step: they have nothing to follow."""
    return {label: table for label, table in checkpoints.items() if len(table["step"]) > 1}


def alive(features: Table) -> np.ndarray:
    """(features,) bool: those active on held-out tokens."""
    return np.asarray(features["density"]) > 0
