"""The floor: one x·W_encᵀ + b_enc of the whole batch a step, and nothing else."""

from typing import Any

import torch
from worker import Pace, run


def train(pace: Pace, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Take the product of every batch."""
    W_enc = torch.randn(settings["d_dict"], settings["d_model"]) / settings["d_model"] ** 0.5
    b_enc = torch.zeros(settings["d_dict"])
    pre = torch.empty(settings["batch"], settings["d_dict"])
    for x in pace.batches():
        torch.addmm(b_enc, x, W_enc.T, out=pre)
    return {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_enc, "b_dec": torch.zeros(settings["d_model"])}


if __name__ == "__main__":
    run(train)
