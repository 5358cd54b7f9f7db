"""What a model loses when a site's vectors are replaced by their reconstructions."""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.dictionaries.quality import Draws, ratio
from circuitflow.models.running import LanguageModel, run
from circuitflow.models.sites import parse_site

CONVENTIONS = {
    "ce": "mean −log p(next token) in nats over all positions of a block but its last",
    "ce_recovered": "(ce_reconstructed − ce_zero) / (ce_original − ce_zero); 1 is the model itself",
    "spliced": "tokens that the dictionary's outlier rule skips (sinks) keep their own vector, as error nodes, "
    "both when the others are replaced by reconstructions and when they are replaced by zeros",
    "kl": "mean KL(original ‖ reconstructed) in nats",
}


COUNTS = ("tokens", "original", "reconstructed", "zero", "kl", "skipped", "positions")
"""What is summed over each block: predicted tokens, their cross-entropies and KL, positions, those kept as errors."""


@dataclass
class Splice:
    """Sums over the predicted tokens of each block, in float64, from which the model's losses follow."""

    sums: list[dict[str, float]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Predicted tokens."""
        return int(sum(block["tokens"] for block in self.sums))

    def add(self, lm: LanguageModel, dictionary: Dictionary, tokens: Int64[Tensor, "batch pos"]) -> None:
        """Run the model as it is, with reconstructions, and with zeros at the dictionary's site."""
        (site,) = dictionary.reads
        mask = torch.ones_like(tokens, dtype=torch.bool)
        plain = run(lm, tokens, mask, capture=[site], stop_at=f"resid.{lm.n_layers - 1}")
        x = plain.sites[site]
        reconstruction, kept = _replacements(dictionary, x)
        zero = torch.where(kept, torch.zeros_like(x), x)
        ends = (run_with(lm, tokens, mask, site, value) for value in (reconstruction, zero))
        for block, chosen, *last in zip(tokens, kept, wanted(plain.last), *ends, strict=True):
            counts = {"skipped": float((~chosen).sum()), "positions": float(chosen.numel())}
            # one block at a time: logits are vocabulary-wide
            self.sums.append({**counts, **compared(lm, block, *last)})

    def values(self) -> dict[str, float]:
        """Cross-entropies in nats, their differences, KL, and the share of tokens whose own vector was kept."""
        return {name: float(value[0]) for name, value in self.drawn(np.ones((1, len(self.sums)))).items()}

    def drawn(self, draws: Draws) -> dict[str, np.ndarray]:
        """:meth:`values` for each of several draws of blocks."""
        total = {name: draws @ np.array([block[name] for block in self.sums]) for name in COUNTS}
        original, reconstructed, zero, kl = (
            ratio(total[name], total["tokens"]) for name in ("original", "reconstructed", "zero", "kl")
        )
        return {
            "ce_original": original,
            "ce_reconstructed": reconstructed,
            "ce_zero": zero,
            "ce_recovered": ratio(reconstructed - zero, original - zero),
            "delta_ce": reconstructed - original,
            "kl": kl,
            "kept_as_error_share": ratio(total["skipped"], total["positions"]),
        }


def _replacements(dictionary: Dictionary, x: Float[Tensor, "batch pos d_model"]) -> tuple[Tensor, Tensor]:
    """Reconstructions with skipped tokens as they are, and which tokens were replaced (batch, pos, 1)."""
    batch, pos, _ = x.shape
    flat = x.flatten(0, 1).to(dictionary.W_dec.dtype)
    positions = torch.arange(pos, device=x.device).repeat(batch)
    skipped = dictionary.skip.mask(flat, positions)
    decoded = dictionary.decode(dictionary.encode(flat, positions), flat)
    value = torch.where(skipped[:, None], flat, decoded)
    return value.view_as(x).to(x.dtype), ~skipped.view(batch, pos, 1)


def compared(
    lm: LanguageModel,
    tokens: Int64[Tensor, " pos"],
    plain: Float[Tensor, "pos d_model"],
    reconstructed: Float[Tensor, "pos d_model"],
    zero: Float[Tensor, "pos d_model"],
) -> dict[str, float]:
    """Sums over the predicted tokens of one block, from the last block's output of the three passes."""
    target = tokens[1:, None]
    p, q, z = (lm.unembed(end[:-1]).float().log_softmax(-1) for end in (plain, reconstructed, zero))
    ends = {"original": p, "reconstructed": q, "zero": z}
    return {
        "tokens": float(target.shape[0]),
        **{name: -float(log_p.gather(1, target).double().sum()) for name, log_p in ends.items()},
        "kl": float((p.exp() * (p - q)).sum(dim=-1).double().sum()),
    }


def run_with(lm: LanguageModel, tokens: Tensor, mask: Tensor, site: str, value: Tensor) -> Tensor:
    """The last block's output with a value at a site; a pass that can start there skips the blocks below."""
    if parse_site(site).kind in ("embed", "resid"):
        return wanted(run(lm, tokens, mask, start=(site, value)).last)
    return wanted(run(lm, tokens, mask, replace={site: lambda _: value}).last)


def wanted(end: Tensor | None) -> Tensor:
    """The output of the last block, of a pass that went so far."""
    assert end is not None, "a pass to the last block returns its output"
    return end
