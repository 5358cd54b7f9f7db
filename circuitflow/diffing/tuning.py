"""The stage ``fine_tune_model``: a second model, made of the run's own by a brief training on other text."""

import math
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from circuitflow.dictionaries.describing import LOG_FILE
from circuitflow.dictionaries.state import (
    STATE_FILE,
    Interval,
    Termination,
    TrainingLog,
    load_state,
    save_state,
)
from circuitflow.diffing.text import Blocks, tuning_blocks
from circuitflow.errors import UserError
from circuitflow.jobs import Output, progress
from circuitflow.models.loading import load_model
from circuitflow.models.prepared import check_length
from circuitflow.models.running import LanguageModel
from circuitflow.models.saving import save_model
from circuitflow.progress import logger, show_curves
from circuitflow.provenance import canonical_json, digest
from circuitflow.store.objects import read_manifest

WARMUP = 0.1
"""Share of the steps over which the learning rate rises."""
CLIP_NORM = 1.0
"""Largest norm of the gradient of all weights together."""
MOMENTS = ("exp_avg", "exp_avg_sq")
HELD_OUT_BLOCKS = 64
"""At most so many blocks are measured before and after."""


def fine_tune_model(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Train the run's model on other text and save it as ``prepare_model`` saves a model.

    Next-token cross-entropy with AdamW without decay, in float32 and in evaluation mode (no dropout). A killed run goes
    on from its last state with the same bytes as one never killed. Writes the folder ``hf`` and ``log.jsonl``; the
    manifest's details tell the held-out loss before and after, in nats a token.

    Inputs ``model`` (manifest), ``pairs`` (JSONL, for text of kind task), ``files``. Params ``text``, ``tokens``,
    ``steps``, ``batch``, ``block``, ``learning_rate``, ``layers`` (null: all weights), ``held_out``, ``seed``,
    ``compute``.

    :raises UserError: too little text, blocks too long for the model, a layer that it lacks, or a loss that stops being
        finite.
    """
    lm = load_model(inputs["model"], "float32", params["compute"]["device"])
    check_length("A block (diffing.tuning.block)", params["block"], lm.hf.config)
    pairs = inputs.get("pairs") or None
    blocks = tuning_blocks(params["text"], inputs.get("files") or [], pairs, lm.tokenizer, params)
    recipe = digest(canonical_json([dict(params), out.provenance]))
    tuning = _Tuning(lm, params, blocks, out.folder, recipe)
    tuning.run()
    save_model(lm.hf, lm.tokenizer, lm.arch, out)
    (out.folder / STATE_FILE).unlink(missing_ok=True)
    out.details["remote_code"] = bool(read_manifest(inputs["model"]).details.get("remote_code", False))
    out.details["tuning"] = tuning.facts


@dataclass(frozen=True)
class Rate:
    """Learning rate: up along a line over :data:`WARMUP` of the steps, then down to zero along a line."""

    peak: float
    steps: int

    def at(self, done: int) -> float:
        """Of the step after ``done`` steps."""
        warmup = max(1, round(WARMUP * self.steps))
        rising = (done + 1) / warmup
        falling = (self.steps - done) / max(1, self.steps - warmup)
        return self.peak * min(1.0, rising, falling)


class _Tuning:
    """Model, optimizer, data and state of one fine-tuning."""

    def __init__(
        self,
        lm: LanguageModel,
        params: Mapping[str, Any],
        blocks: tuple[Blocks, Blocks],
        folder: Path,
        recipe: str,
    ) -> None:
        self._lm, self._params, self._folder, self._recipe = lm, params, folder, recipe
        self._training, self._held_out = blocks
        self._learned = learned_weights(lm, params["layers"])
        self._rate = Rate(params["learning_rate"], params["steps"])
        self._optimizer = torch.optim.AdamW(self._learned.values(), lr=0.0, weight_decay=0.0, foreach=False)
        self._done = 0
        self._before, self._after = math.nan, math.nan

    def run(self) -> None:
        """Take the steps that are left."""
        show_curves(self._folder / LOG_FILE)
        with self._resume() as log, Termination() as termination:
            interval = Interval()
            if self._done == 0:
                self._before = self._measure()
            while self._done < self._params["steps"]:
                log.write(self._step())
                if termination.asked or interval.due():
                    self._save(log)
                if termination.asked:
                    logger.error(
                        "terminated after step %d; the state is saved: run again to go on", self._done
                    )
                    raise SystemExit(128 + signal.SIGTERM)
            self._after = self._measure()

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest tells of a finished run."""
        return {
            "steps": self._params["steps"],
            "tokens": self._params["steps"] * self._params["batch"] * self._params["block"],
            "text_tokens": int(self._training.size),
            "weights": sum(weight.numel() for weight in self._learned.values()),
            "held_out_loss_before": self._before,
            "held_out_loss_after": self._after,
        }

    def _step(self) -> dict[str, Any]:
        tokens = batch_of(self._training, self._done, self._params["batch"], self._params["seed"])
        with torch.enable_grad():
            loss = _loss(self._lm, tokens)
            loss.backward()
        norm = nn.utils.clip_grad_norm_(self._learned.values(), CLIP_NORM, foreach=False)
        values = {"loss": loss.item(), "grad_norm": float(norm)}
        if not all(map(math.isfinite, values.values())):
            raise UserError(
                f"The loss of the fine-tuning stopped being finite at step {self._done + 1} of "
                f"{self._params['steps']}; lower diffing.tuning.learning_rate."
            )
        rate = self._rate.at(self._done)
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._done += 1
        progress("tuning steps", self._done, self._params["steps"], loss=values["loss"])
        return {"step": self._done, "tokens": self._done * tokens.size, "lr": rate, **values}

    def _measure(self) -> float:
        """Mean loss over held-out blocks spread evenly, nats a token."""
        count = min(HELD_OUT_BLOCKS, len(self._held_out))
        chosen = np.linspace(0, len(self._held_out) - 1, count, dtype=np.int64)
        with torch.no_grad():
            losses = [float(_loss(self._lm, self._held_out[index : index + 1])) for index in chosen]
        return math.fsum(losses) / len(losses)

    def _resume(self) -> TrainingLog:
        found = load_state(self._folder, self._recipe)
        if found is None:
            return TrainingLog(self._folder / LOG_FILE)
        tensors, self._done, log_bytes = found
        self._before = float(tensors["before"])
        for name, weight in self._learned.items():
            weight.data.copy_(tensors[f"weights.{name}"])
            moments: dict[str, Any] = {
                key: torch.empty_like(weight).copy_(tensors[f"{key}.{name}"]) for key in MOMENTS
            }
            self._optimizer.state[weight] = {"step": torch.tensor(float(self._done)), **moments}
        logger.info("resumed after step %d of %d", self._done, self._params["steps"])
        return TrainingLog(self._folder / LOG_FILE, log_bytes)

    def _save(self, log: TrainingLog) -> None:
        tensors = {"before": torch.tensor(self._before, dtype=torch.float64)}
        for name, weight in self._learned.items():
            tensors[f"weights.{name}"] = weight
            state = self._optimizer.state[weight]
            tensors |= {f"{key}.{name}": state[key] for key in MOMENTS}
        save_state(self._folder, tensors, self._done, log, self._recipe)


def learned_weights(lm: LanguageModel, layers: list[int] | None) -> dict[str, nn.Parameter]:
    """The weights that change, by name; the others stay frozen. A tied weight comes once.

    :raises UserError: the model has no such layer.
    """
    for layer in layers or ():
        if layer >= lm.n_layers:
            raise UserError(
                f"Key diffing.tuning.layers names layer {layer}, but the model has layers 0 to {lm.n_layers - 1}."
            )
    modules = [lm.hf] if layers is None else [lm.blocks[layer] for layer in layers]
    wanted = {id(weight) for module in modules for weight in module.parameters()}
    chosen = {name: weight for name, weight in lm.hf.named_parameters() if id(weight) in wanted}
    for weight in chosen.values():
        weight.requires_grad_()
    return chosen


def batch_of(blocks: Blocks, number: int, batch: int, seed: int) -> Blocks:
    """Batch by number: every block comes once an epoch, in an order drawn anew from seed and epoch."""
    return blocks[[*_places(len(blocks), number * batch, batch, seed)]]


def _places(count: int, start: int, batch: int, seed: int) -> Iterator[int]:
    order, drawn = np.empty(0, np.int64), -1
    for place in range(start, start + batch):
        epoch, within = divmod(place, count)
        if epoch != drawn:
            order, drawn = np.random.default_rng([seed, epoch]).permutation(count), epoch
        yield int(order[within])


def _loss(lm: LanguageModel, blocks: Int64[np.ndarray, "batch block"]) -> Tensor:
    """Mean cross-entropy of each next token, nats."""
    tokens = torch.from_numpy(np.ascontiguousarray(blocks)).to(lm.device)
    logits = lm.hf(input_ids=tokens, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
