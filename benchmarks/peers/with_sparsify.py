"""EleutherAI's sparsify: its ``Trainer.fit`` on a model whose one module puts out the batches."""

import os
import tempfile
from pathlib import Path
from typing import Any

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its Triton decoder needs a GPU

import torch
from safetensors.torch import load_file
from sparsify import SaeConfig, TrainConfig, Trainer
from torch import Tensor, nn
from worker import Pace, run


class Replay(nn.Module):
    """Stands in for the language model: ``site`` puts out the next batch as one sequence."""

    def __init__(self, pace: Pace, d_model: int) -> None:
        super().__init__()
        self.site = nn.Identity()
        self.device = torch.device("cpu")
        self.dummy_inputs = {"x": torch.zeros(1, 0, dtype=torch.long)}
        self._batches, self._width = pace.batches(), d_model

    @property
    def base_model(self) -> nn.Module:
        """Where the trainer looks for its hookpoints."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        """The next batch; for the dummy input, which only asks for the width, a zero."""
        return self.site(next(self._batches)[None] if x.numel() else torch.zeros(1, 1, self._width))


class Steps(torch.utils.data.Dataset):
    """As many sequences of token ids as there are steps; no token is looked at."""

    def __init__(self, steps: int, batch: int) -> None:
        self._steps, self._ids = steps, torch.zeros(batch, dtype=torch.long)

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index >= self._steps:
            raise IndexError(index)
        return {"input_ids": self._ids}


def train(pace: Pace, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """``option`` names its optimizer: signum (its default), adam or muon."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            SaeConfig(num_latents=settings["d_dict"], k=settings["k"]), batch_size=1, hookpoints=["site"],
            optimizer=settings["option"], lr=settings["rate"], log_to_wandb=False, save_every=1 << 60,
            lr_warmup_steps=round(settings["warmup"] * pace.steps), init_seeds=[settings["seed"]], save_dir=folder,
        )  # fmt: skip
        Trainer(config, Steps(pace.steps, settings["batch"]), Replay(pace, settings["d_model"])).fit()
        state = load_file(next(Path(folder).rglob("sae.safetensors")))
    W_enc, b_dec = state["encoder.weight"], state["b_dec"]
    b_enc = state["encoder.bias"] - W_enc @ b_dec
    return {"W_enc": W_enc, "b_enc": b_enc, "W_dec": state["W_dec"], "b_dec": b_dec}


if __name__ == "__main__":
    run(train)
