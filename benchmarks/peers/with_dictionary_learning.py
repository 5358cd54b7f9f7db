"""dictionary_learning: its ``trainSAE`` with a ``TopKTrainer``."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.training import trainSAE
from worker import Pace, run


def train(pace: Pace, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Batches have mean ‖x‖² = 1, as its ``normalize_activations`` makes them."""
    config = {
        "trainer": TopKTrainer, "steps": pace.steps, "activation_dim": settings["d_model"],
        "dict_size": settings["d_dict"], "k": settings["k"], "layer": 0, "lm_name": "none", "lr": settings["rate"],
        "warmup_steps": round(settings["warmup"] * pace.steps),
        "decay_start": round((1 - settings["decay"]) * pace.steps), "seed": settings["seed"], "device": "cpu",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainSAE(pace.batches(), [config], steps=pace.steps, save_dir=folder, device="cpu")
        state = torch.load(Path(folder) / "trainer_0" / "ae.pt", weights_only=True)
    W_enc, b_dec = state["encoder.weight"], state["b_dec"]
    b_enc = state["encoder.bias"] - W_enc @ b_dec
    return {"W_enc": W_enc, "b_enc": b_enc, "W_dec": state["decoder.weight"].T.contiguous(), "b_dec": b_dec}


if __name__ == "__main__":
    run(train)
