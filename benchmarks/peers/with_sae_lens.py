"""SAELens: its ``SAETrainer.fit`` on a ``TopKTrainingSAE``; its sparse activations fail on a CPU in this version."""

from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from worker import Pace, run


def train(pace: Pace, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Batches have mean ‖x‖² = d_model, as its ``expected_average_only_in`` makes them."""
    config = TopKTrainingSAEConfig(d_in=settings["d_model"], d_sae=settings["d_dict"], k=settings["k"])
    sae = TopKTrainingSAE(config)
    training = SAETrainerConfig(
        total_training_samples=pace.steps * settings["batch"], train_batch_size_samples=settings["batch"],
        lr=settings["rate"], lr_end=settings["rate"] / 100,
        lr_warm_up_steps=round(settings["warmup"] * pace.steps),
        lr_decay_steps=round(settings["decay"] * pace.steps),
    )  # fmt: skip
    SAETrainer(training, sae, pace.batches()).fit()
    state = {name: tensor.detach().clone() for name, tensor in sae.state_dict().items()}
    sae.process_state_dict_for_saving_inference(state)
    W_enc, b_dec = state["W_enc"].T.contiguous(), state["b_dec"]
    return {"W_enc": W_enc, "b_enc": state["b_enc"] - W_enc @ b_dec, "W_dec": state["W_dec"], "b_dec": b_dec}


if __name__ == "__main__":
    run(train)
