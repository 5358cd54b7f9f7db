"""Running the model on from one site, all else as on the base run: the latest possible start, for many rows at once.

Integrated gradients and exact patching both ask what the metric is when one site holds other values. The block outputs
below the site are known from the base run, so the blocks below it are skipped. What a site at the end of its block
adds to the stream (``mlp.L``; ``attn.L`` too in parallel blocks) needs not even its own block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int64
from torch import Tensor

from circuitflow.attribution.readout import answer_logits, metric_of_run
from circuitflow.data.metrics import Metric
from circuitflow.data.token_pairs import TokenPairs
from circuitflow.models.architectures import Architecture
from circuitflow.models.running import LanguageModel, run
from circuitflow.models.sites import Site, parse_site


@dataclass(frozen=True)
class Start:
    """Where a pass that changes one site begins."""

    stream: str
    """The residual site (``embed`` or ``resid.L``) whose base value the pass goes on from."""
    added: bool
    """Whether the site's change is just added to that value; otherwise the site is replaced on the way."""


def start_of(site: str, arch: Architecture) -> Start:
    """The latest start for a site: its own value, the end of its block, or the input of its block."""
    parsed = parse_site(site)
    if parsed.kind in ("embed", "resid"):
        return Start(site, True)
    assert parsed.layer is not None
    if parsed.kind == "mlp" or (parsed.kind == "attn" and arch.parallel):
        return Start(f"resid.{parsed.layer}", True)
    return Start("embed" if parsed.layer == 0 else f"resid.{parsed.layer - 1}", False)


def starts_of(sites: Sequence[str], arch: Architecture) -> list[str]:
    """All residual sites from which passes that change these sites begin, in order of depth."""
    return [str(site) for site in sorted({parse_site(start_of(site, arch).stream) for site in sites})]


@dataclass(frozen=True)
class BaseRun:
    """The run that everything but the changed site is taken from, for a batch of pairs."""

    lm: LanguageModel
    metric: Metric
    pairs: TokenPairs
    """On the model's device."""
    stream: Mapping[str, Float[Tensor, "batch pos d_model"]]
    """The base run's values at the residual sites of :func:`starts_of`."""
    reference: Float[Tensor, "batch vocab"] | None = None
    """Logits of the clean run, for the metric kl."""

    def values(
        self,
        site: str,
        rows: Int64[Tensor, " rows"],
        change: Float[Tensor, "rows pos width"],
        grad: bool = False,
    ) -> tuple[Float[Tensor, " rows"], Tensor]:
        """m of pair ``rows[i]`` with ``change[i]`` added to the base run's value at one site.

        :param grad: differentiate; ∂m/∂x at the site is ∂m/∂(the second result).
        """
        pairs, start = self.pairs[rows], start_of(site, self.lm.arch)
        at, change = self.stream[start.stream][rows], change.to(self.lm.dtype)
        if start.added:
            this = run(
                self.lm,
                pairs.clean,
                pairs.mask,
                start=(start.stream, at + change),
                capture=[start.stream],
                stop_at=self._end(),
                grad=grad,
            )
            point = this.sites[start.stream]
        else:
            this = run(
                self.lm,
                pairs.clean,
                pairs.mask,
                start=(start.stream, at),
                replace={site: lambda value: (value + change).detach()},
                capture=[site],
                stop_at=self._end(),
                grad=grad,
            )
            point = this.sites[site]
        reference = None if self.reference is None else self.reference[rows]
        return metric_of_run(self.lm, self.metric, this, pairs, reference), point

    def _end(self) -> str:
        return str(Site("resid", self.lm.n_layers - 1))


def base_run(
    lm: LanguageModel,
    metric: Metric,
    pairs: TokenPairs,
    base: str,
    starts: Sequence[str],
    known: Mapping[str, Float[Tensor, "batch pos d_model"]],
) -> BaseRun:
    """The base run's residual stream at ``starts``: from ``known`` values, else from one forward pass.

    :param base: "clean" or "patched".
    """
    tokens = pairs.clean if base == "clean" else pairs.patch
    missing = [site for site in starts if site not in known]
    stream = {site: known[site].to(lm.device, lm.dtype) for site in starts if site in known}
    if missing:
        stream |= run(lm, tokens, pairs.mask, capture=missing).sites
    reference = None
    if metric.kind == "kl":
        clean = run(lm, pairs.clean, pairs.mask, stop_at=f"resid.{lm.n_layers - 1}")
        reference = answer_logits(lm, clean, pairs.position)
    return BaseRun(lm, metric, pairs, stream, reference)
