"""BatchTopK training (Bussmann et al. 2024), alone or with nested prefixes (Matryoshka, Bussmann et al. 2025).

The k·batch largest pre-activations of a whole batch are active, so that a token may use more features than
another. At inference nothing may depend on the rest of the batch: a threshold takes its place.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.dictionaries.codes import Codes
from circuitflow.dictionaries.gradients import Weights, batch_top_codes
from circuitflow.dictionaries.matryoshka import nested_reconstruction
from circuitflow.dictionaries.objective import COMMON, Context, Finished, Opened, Step
from circuitflow.dictionaries.topk import AuxK, annealed, opened

RATE = 0.05  # of the running threshold: it remembers about 20 steps, short against the decay of the learning rate
UNSEEN = -1.0
GUESS = 0.9  # the smallest selected value of a batch is rarely less than this share of the running threshold


@dataclass(frozen=True)
class BatchTopK:
    """Objective of kinds ``batchtopk`` and ``matryoshka``: Σ_p mean ‖x − x̂_p‖² over nested prefixes, plus AuxK.

    ``Step.reconstruction`` is that of the whole dictionary, the last prefix; the others count as auxiliary.
    """

    k: int
    aux: AuxK
    shares: tuple[float, ...] = (1.0,)
    """Ends of the nested prefixes, as shares of the features, ascending to 1."""
    k_start: int | None = None
    k_anneal: float = 0.0
    select: str = "threshold"
    unit_decoder: bool = True

    def extra_weights(self, d_dict: int) -> dict[str, Tensor]:
        """None."""
        return {}

    def tracked(self, d_dict: int) -> dict[str, Tensor]:
        """The threshold of inference: running mean of the smallest value that is selected in a batch."""
        return {"threshold": torch.tensor(UNSEEN)}

    def finish(self, weights: Weights) -> Finished:
        """The weights as they are, and the running threshold for every feature."""
        threshold = weights["threshold"].clamp_min(0).expand_as(weights["b_enc"]).clone()
        return Finished({name: weights[name] for name in COMMON}, {"k": self.k}, {"threshold": threshold})

    def step(
        self, weights: Weights, x: Float[Tensor, "batch d_in"], context: Context, y: Tensor | None = None
    ) -> Step:
        """Loss and gradients of one batch."""
        codes, tracked = self._select(weights, x, context)
        ends = prefix_ends(self.shares, codes.d_dict)
        nested = nested_reconstruction(codes, weights, x, ends, x if y is None else y)
        *partial, reconstruction = nested.losses
        auxiliary = self.aux.add_to(nested.gradients, -nested.residual, weights, x, context)
        loss = sum(partial, auxiliary)
        return Step(
            nested.gradients, codes.fired(), reconstruction, loss, codes.nnz, tracked, nested.cotangent
        )

    def open(self, weights: Weights, x: Float[Tensor, "batch d_in"], context: Context) -> Opened:
        """Encode and decode one batch, without nested prefixes."""
        codes, tracked = self._select(weights, x, context)
        return opened(codes, weights, x, context, self.aux, tracked)

    def _select(
        self, weights: Weights, x: Float[Tensor, "batch d_in"], context: Context
    ) -> tuple[Codes, dict[str, Tensor]]:
        wanted = annealed(self.k, self.k_start, self.k_anneal, context.done) * x.shape[0]
        before = weights["threshold"]
        codes = batch_top_codes(weights, x, wanted, GUESS * float(before))
        return codes, {"threshold": _running(before, codes)}


def prefix_ends(shares: tuple[float, ...], d_dict: int) -> tuple[int, ...]:
    """Numbers of features of the prefixes."""
    return tuple(round(share * d_dict) for share in shares)


def _running(before: Float[Tensor, ""], codes: Codes) -> Float[Tensor, ""]:
    if codes.nnz == 0:
        return before
    smallest = codes.values.min()
    return torch.where(before < 0, smallest, before + RATE * (smallest - before))
