"""What a model loses when a site's vectors are replaced by their reconstructions."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.models.running import LanguageModel, run
from circuitflow.models.sites import parse_site

CONVENTIONS = {
    "ce": "mean −log p(next token) in nats over all positions of a block but its last",
    "ce_recovered": "(ce_reconstructed − ce_zero) / (ce_original − ce_zero); 1 is the model itself",
    "spliced": "tokens that the dictionary's outlier rule skips (sinks) keep their own vector, as error nodes, "
    "both when the others are replaced by reconstructions and when they are replaced by zeros",
    "kl": "mean KL(original ‖ reconstructed) in nats",
}


@dataclass
class Splice:
    """Sums over predicted tokens, in float64, from which the model's losses follow."""

    tokens: int = 0
    skipped: int = 0
    positions: int = 0
    original: float = 0.0
    reconstructed: float = 0.0
    zero: float = 0.0
    kl: float = 0.0

    def add(self, lm: LanguageModel, dictionary: Dictionary, tokens: Int64[Tensor, "batch pos"]) -> None:
        """Run the model as it is, with reconstructions, and with zeros at the dictionary's site."""
        (site,) = dictionary.reads
        mask = torch.ones_like(tokens, dtype=torch.bool)
        plain = run(lm, tokens, mask, capture=[site], stop_at=f"resid.{lm.n_layers - 1}")
        x = plain.sites[site]
        reconstruction, kept = self._replacements(dictionary, x)
        zero = torch.where(kept, torch.zeros_like(x), x)
        ends = (_run_with(lm, tokens, mask, site, value) for value in (reconstruction, zero))
        for block, *last in zip(tokens, _wanted(plain.last), *ends, strict=True):
            self._compare(lm, block, *last)  # one block at a time: logits are vocabulary-wide

    def values(self) -> dict[str, float]:
        """Cross-entropies in nats, their differences, KL, and the share of tokens whose own vector was kept."""
        original, reconstructed, zero = (
            total / self.tokens for total in (self.original, self.reconstructed, self.zero)
        )
        gap = original - zero
        return {
            "ce_original": original,
            "ce_reconstructed": reconstructed,
            "ce_zero": zero,
            "ce_recovered": (reconstructed - zero) / gap if gap else float("nan"),
            "delta_ce": reconstructed - original,
            "kl": self.kl / self.tokens,
            "kept_as_error_share": self.skipped / self.positions,
        }

    def _replacements(
        self, dictionary: Dictionary, x: Float[Tensor, "batch pos d_model"]
    ) -> tuple[Tensor, Tensor]:
        """Reconstructions with skipped tokens as they are, and which tokens were replaced (batch, pos, 1)."""
        batch, pos, _ = x.shape
        flat = x.flatten(0, 1).to(dictionary.W_dec.dtype)
        positions = torch.arange(pos, device=x.device).repeat(batch)
        skipped = dictionary.skip.mask(flat, positions)
        decoded = dictionary.decode(dictionary.encode(flat, positions))
        self.skipped += int(skipped.sum())
        self.positions += skipped.numel()
        value = torch.where(skipped[:, None], flat, decoded)
        return value.view_as(x).to(x.dtype), ~skipped.view(batch, pos, 1)

    def _compare(
        self,
        lm: LanguageModel,
        tokens: Int64[Tensor, " pos"],
        plain: Float[Tensor, "pos d_model"],
        reconstructed: Float[Tensor, "pos d_model"],
        zero: Float[Tensor, "pos d_model"],
    ) -> None:
        target = tokens[1:, None]
        p, q, z = (lm.unembed(end[:-1]).float().log_softmax(-1) for end in (plain, reconstructed, zero))
        self.tokens += target.shape[0]
        self.original -= float(p.gather(1, target).double().sum())
        self.reconstructed -= float(q.gather(1, target).double().sum())
        self.zero -= float(z.gather(1, target).double().sum())
        self.kl += float((p.exp() * (p - q)).sum(dim=-1).double().sum())


def _run_with(lm: LanguageModel, tokens: Tensor, mask: Tensor, site: str, value: Tensor) -> Tensor:
    """The last block's output with a value at a site; a pass that can start there skips the blocks below."""
    if parse_site(site).kind in ("embed", "resid"):
        return _wanted(run(lm, tokens, mask, start=(site, value)).last)
    return _wanted(run(lm, tokens, mask, replace={site: lambda _: value}).last)


def _wanted(end: Tensor | None) -> Tensor:
    assert end is not None, "a pass to the last block returns its output"
    return end
