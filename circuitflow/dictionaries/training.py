"""The stage ``train_dictionary``: one dictionary from cached activations, resumed exactly where it was killed."""

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.dictionaries.codes import decode_codes
from circuitflow.dictionaries.dictionary import (
    WEIGHTS_FILE,
    Dictionary,
    Skip,
    load_dictionary,
    save_dictionary,
)
from circuitflow.dictionaries.gradients import pre_activations
from circuitflow.dictionaries.kinds import MADE, TRAINED, Data, Request, check_request
from circuitflow.dictionaries.normalisation import Normalisation, measure_normalisation
from circuitflow.dictionaries.objective import Step
from circuitflow.dictionaries.outliers import find_outliers
from circuitflow.dictionaries.rows import SiteRows, open_rows
from circuitflow.dictionaries.selection import selection
from circuitflow.dictionaries.settings import Training
from circuitflow.dictionaries.state import (
    LOG_FILE,
    STATE_FILE,
    Interval,
    Termination,
    TrainingLog,
    load_state,
    read_log,
    save_state,
)
from circuitflow.dictionaries.tensors import read_tensors, write_tensors
from circuitflow.dictionaries.trainer import NonFiniteLossError, Schedule, Trainer, first_weights
from circuitflow.errors import UserError
from circuitflow.jobs import Output, progress
from circuitflow.progress import logger
from circuitflow.provenance import canonical_json, digest, file_digest
from circuitflow.store.files import write_text
from circuitflow.store.shuffle import ShuffledRows

PREPARED_FILE = "prepared.safetensors"
CHECKPOINTS = "checkpoints"
HELD_OUT_ROWS = 4096  # rows of the quick held-out measurement that the log follows
LOG_LINES = 1000  # at most about this many steps of a long training are logged


@dataclass(frozen=True)
class Prepared:
    """What is known of the rows before training starts."""

    keep: np.ndarray
    """(rows,) bool: training rows that are not outliers."""
    skip: Skip
    normalisation: Normalisation
    facts: dict[str, float]
    """Median norm and shares left out, for the manifest."""


def train_dictionary(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Train, or make, the dictionary of one site.

    Inputs ``activations`` (store manifest) and, for kind decoder_only, ``weights``. Params ``site``,
    ``settings`` (kind, d_dict, k, seed, training) and ``compute``. Writes ``weights.safetensors`` (its
    presence says that the work is done), ``log.jsonl`` and ``checkpoints/step_N.safetensors``.

    :raises UserError: settings that cannot be, no usable rows, or a loss that stops being finite.
    """
    rows = open_rows(inputs["activations"], params["site"])
    request = _request(params, inputs.get("weights") or None, rows.width)
    check_request(request)
    if not (out.folder / WEIGHTS_FILE).is_file():
        recipe = digest(canonical_json([params, out.provenance]))
        prepared = prepare(rows, request.training, out.folder, recipe)
        device = torch.device(params["compute"]["device"])
        if request.kind in MADE:
            _make(request, prepared, out.folder)
        else:
            _Run(rows, request, prepared, out.folder, device, recipe).train()
    for name in (STATE_FILE, PREPARED_FILE):
        (out.folder / name).unlink(missing_ok=True)
    _describe(out)


def prepare(rows: SiteRows, training: Training, folder: Path, recipe: str) -> Prepared:
    """Outlier rule and normalisation of the training rows, kept in the folder for a resumed run of this recipe."""
    path = folder / PREPARED_FILE
    if not path.is_file() or (read_tensors(path)[1] or {}).get("recipe") != recipe:
        found = find_outliers(rows, training.skip_positions, training.outlier_ratio)
        normalisation = measure_normalisation(rows, found.keep)
        tensors = {"keep": torch.from_numpy(found.keep), "mean": normalisation.mean}
        facts = {
            "max_norm": found.skip.max_norm,
            "scale": normalisation.scale,
            "median_norm": found.median_norm,
            "share_left_out": found.share,
            "share_left_out_by_norm": found.share_by_norm,
            "recipe": recipe,
        }
        write_tensors(path, tensors, facts)
    tensors, described = read_tensors(path)
    assert described is not None
    max_norm, scale, _ = (described.pop(key) for key in ("max_norm", "scale", "recipe"))
    normalisation = Normalisation(torch.empty_like(tensors["mean"]).copy_(tensors["mean"]), scale)
    return Prepared(
        tensors["keep"].numpy(), Skip(training.skip_positions, max_norm), normalisation, described
    )


class _Run:
    """One training run: data, trainer, log and state under one folder."""

    def __init__(
        self,
        rows: SiteRows,
        request: Request,
        prepared: Prepared,
        folder: Path,
        device: torch.device,
        recipe: str,
    ) -> None:
        training = request.training
        self._request, self._prepared, self._folder, self._device = request, prepared, folder, device
        self._recipe = recipe
        self._normalise = Normalisation(prepared.normalisation.mean.to(device), prepared.normalisation.scale)
        self._batches = ShuffledRows(
            rows.store,
            [rows.site],
            batch=training.batch,
            buffer_rows=max(training.buffer_rows, training.batch),
            seed=request.seed,
            keep=prepared.keep,
        )
        self._steps = max(1, round(training.epochs * self._batches.batches_per_epoch))
        self._log_every = max(1, self._steps // LOG_LINES)
        self._held_out = self._read_held_out(rows)
        objective = TRAINED[request.kind](request)
        weights = first_weights(objective, request.d_model, request.d_dict, request.seed, device)
        schedule = Schedule(training.learning_rate, self._steps, training.warmup, training.decay)
        self._trainer = Trainer(objective, weights, schedule, training.dead_after)
        self._tokens = 0

    def train(self) -> None:
        """Take the steps that are left, then write the finished weights."""
        chosen = self._request.training.checkpoint_steps(self._steps)
        interval = Interval()
        with self._resume() as log, Termination() as termination:
            while self._trainer.done < self._steps:
                self._step(log)
                if self._trainer.done in chosen:
                    self._save(self._folder / CHECKPOINTS / f"step_{self._trainer.done}.safetensors")
                if termination.asked or interval.due():
                    self._save_state(log)
                if termination.asked:
                    self._end()
        self._save(self._folder / WEIGHTS_FILE)

    def _end(self) -> None:
        done = self._trainer.done
        logger.error(
            "terminated after step %d of %d; the state is saved: run again to go on", done, self._steps
        )
        raise SystemExit(128 + signal.SIGTERM)

    def _step(self, log: TrainingLog) -> None:
        trainer, site = self._trainer, self._request.site
        x = torch.from_numpy(self._batches.batch_at(trainer.done)[site]).to(self._device)
        rate = trainer.schedule.at(trainer.done)
        try:
            step = trainer.step(self._normalise.apply(x))
        except NonFiniteLossError:
            self._save_state(log)
            raise UserError(
                f"The loss at {site} stopped being finite at step {trainer.done + 1} of {self._steps}; lower "
                f"dictionaries.training.learning_rate (the last good state is kept in {self._folder / STATE_FILE})."
            ) from None
        self._tokens += x.shape[0]
        evaluated = trainer.done % self._request.training.evaluate_every == 0 or trainer.done == self._steps
        if evaluated or trainer.done % self._log_every == 0:
            log.write(self._line(step, x.shape[0], rate, evaluated))
        fvu = float(step.reconstruction)
        progress(
            "steps", trainer.done, self._steps, fvu=fvu, l0=step.active / x.shape[0], dead=trainer.dead_share
        )

    def _line(self, step: Step, batch: int, rate: float, evaluated: bool) -> dict[str, Any]:
        """One line of the log: of this batch, except ``held_out`` (null between measurements) and ``dead``."""
        reconstruction, auxiliary = float(step.reconstruction), float(step.auxiliary)
        return {
            "step": self._trainer.done,
            "tokens": self._tokens,
            "loss": reconstruction + auxiliary,
            "fvu": reconstruction,  # inputs have mean 0 and mean ‖x‖² = 1 over all training rows
            "l0": step.active / batch,
            "dead": self._trainer.dead_share,
            "auxk": auxiliary,
            "lr": rate,
            "held_out": self._measure() if evaluated else None,
        }

    def _measure(self) -> dict[str, float]:
        """FVU, L0 and share of silent features on the held-out rows that the log follows."""
        x, weights, objective = self._held_out, self._trainer.weights, self._trainer.objective
        rule = objective.inference(weights, scale=1.0)
        codes = selection(objective.select)(pre_activations(weights, x), rule.settings, rule.extra)
        error = x - decode_codes(codes, weights["W_dec"]) - weights["b_dec"]
        silent = torch.bincount(codes.features, minlength=codes.d_dict) == 0
        variance = (x - x.mean(dim=0)).square().sum()
        return {
            "fvu": float(error.square().sum() / variance),
            "l0": codes.nnz / codes.n,
            "silent": float(silent.float().mean()),
        }

    def _read_held_out(self, rows: SiteRows) -> Float[Tensor, "n d_model"]:
        """Normalised held-out vectors without outliers, spread over the held-out blocks."""
        wanted = rows.held_out & ~np.isin(rows.positions, self._prepared.skip.positions)
        parts = []
        for index, x in rows.read(rows.spread(wanted, HELD_OUT_ROWS)):
            parts.append(x[~self._prepared.skip.mask(x, index % rows.block)])
        if not parts or not len(x := torch.cat(parts)):
            raise UserError(
                f"Every held-out token at {rows.site} is an outlier; raise outlier_ratio or corpus.held_out."
            )
        return self._normalise.apply(x.to(self._device))

    def _resume(self) -> TrainingLog:
        found = load_state(self._folder, self._recipe)
        if found is None:
            return TrainingLog(self._folder / LOG_FILE)
        tensors, done, log_bytes = found
        self._tokens = int(tensors.pop("tokens"))
        self._trainer.restore(tensors, done)
        logger.info("resumed after step %d of %d", done, self._steps)
        return TrainingLog(self._folder / LOG_FILE, log_bytes)

    def _save_state(self, log: TrainingLog) -> None:
        tensors = {**self._trainer.state(), "tokens": torch.tensor(self._tokens)}
        save_state(self._folder, tensors, self._trainer.done, log, self._recipe)

    def _save(self, path: Path) -> None:
        """The dictionary as it stands, in raw units."""
        request, objective, weights = self._request, self._trainer.objective, self._trainer.weights
        folded = self._prepared.normalisation.fold(weights)
        rule = objective.inference(weights, self._prepared.normalisation.scale)
        dictionary = Dictionary(
            kind=request.kind,
            reads=(request.site,),
            writes=(request.site,),
            select=objective.select,
            skip=self._prepared.skip,
            settings=rule.settings,
            extra=rule.extra,
            notes={**self._prepared.facts, "step": self._trainer.done, "tokens": self._tokens},
            **folded,
        )
        save_dictionary(path, dictionary)


def _make(request: Request, prepared: Prepared, folder: Path) -> None:
    """A dictionary that needs no training; its log is empty."""
    write_text(folder / LOG_FILE, "")
    data = Data(prepared.normalisation.mean, prepared.skip)
    save_dictionary(folder / WEIGHTS_FILE, MADE[request.kind](request, data))


def _request(params: Mapping[str, Any], weights: Path | None, d_model: int) -> Request:
    settings = params["settings"]
    return Request(
        kind=settings["kind"],
        site=params["site"],
        d_model=d_model,
        d_dict=settings["d_dict"],
        k=settings["k"],
        seed=settings["seed"],
        training=Training.of(settings["training"]),
        weights=weights,
    )


def _describe(out: Output) -> None:
    """Content and details of the manifest."""
    dictionary = load_dictionary(out.folder / WEIGHTS_FILE)
    lines = read_log(out.folder / LOG_FILE)
    out.content = digest(
        canonical_json([file_digest(out.folder / name) for name in (WEIGHTS_FILE, LOG_FILE)])
    )
    out.details.update(
        kind=dictionary.kind,
        site=dictionary.reads[0],
        d_model=dictionary.d_model,
        d_dict=dictionary.d_dict,
        settings=dict(dictionary.settings),
        skip={"positions": list(dictionary.skip.positions), "max_norm": dictionary.skip.max_norm},
        notes=dict(dictionary.notes),
        last=lines[-1] if lines else None,
        checkpoints=sorted(file.name for file in (out.folder / CHECKPOINTS).glob("step_*.safetensors")),
    )
