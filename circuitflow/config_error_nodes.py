"""The configuration's section on error nodes."""

from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from circuitflow.config_base import Positive, Section, Share
from circuitflow.errors import nearest
from circuitflow.models.sites import KINDS

KIND_PATTERN = f"^({'|'.join(KINDS)})$"
BASELINE_PATTERN = r"^(top-[1-9][0-9]*|nearest|committee)$"
WANTED: dict[str, Callable[[object], str]] = {
    KIND_PATTERN: lambda value: nearest(value, KINDS),
    BASELINE_PATTERN: lambda value: nearest(value, ("nearest", "committee", "top-1", "top-5")),
}
"""What a value that does not match a pattern should be, in words."""

Kind = Annotated[str, Field(pattern=KIND_PATTERN)]
Baseline = Annotated[str, Field(pattern=BASELINE_PATTERN)]
Range = Annotated[list[str], Field(min_length=2, max_length=2)]


class ErrorNodesSection(Section):
    """Experiments on error nodes (target `error_nodes`). Pairs, ablation, aggregate and intervals are evaluation's."""

    kinds: list[Kind] | None = Field(default=None, min_length=1)
    """Kinds of site whose error nodes are studied, layer by layer; null: resid, or all kinds where there is none."""
    start: str | None = None
    """Site from which on nodes are ablated in the empty circuit, and errors anywhere; null: the run's first."""
    widths: list[Positive] = [1, 2, 4]
    """Layers (of those with a site) of the sliding windows; windows wider than the run are left out."""
    ranges: list[Range] = []
    """Further windows, each by its first and last site."""
    step: Positive = 1
    """Windows and bounds are placed at every step-th layer."""
    thresholds: list[Share] = [0.003, 0.01, 0.03, 0.1, 0.3]
    """Ablate the errors with |score| of at least these shares of the largest |score| of any node."""
    positions: bool = True
    """Ablate errors at single positions too, counted from the answer's token, layer by layer."""
    baselines: list[Baseline] = ["top-1", "top-5", "top-10", "nearest", "committee"]
    """Features ablated in place of the errors of every window, per site: the k strongest (top-k), the nearest to the
    error in |score|, the fewest of falling |score| that add up to the error's."""
    restore_top: list[Positive] = [1, 3, 5, 10, 25, 50, 100]
    """Features per site that are restored to their clean values while errors are ablated."""
    restore_width: Positive = 2
    """Layers of the ranges in which features are restored; the range of all layers is always added."""
    restore_ranges: list[Range] = []
    """Further ranges, each by its first and last site."""
    bound: str | None = None
    """Site up to which errors are ablated while the number of restored features changes; null: the last."""
    heatmap_top: Positive = 25
    """Restored features per site in the heat map of bounds and ranges."""
    ridge: float = Field(default=1.0e-3, gt=0)
    """Penalty of the linear prediction of errors, in units of the mean variance of a coordinate."""
    rows: Positive = 100_000
    """Training tokens of the corpus that it is fitted on, spread evenly."""
