"""The stage ``train_dictionary``: one dictionary from cached activations, resumed exactly where it was killed."""

import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.dictionaries.describing import CHECKPOINTS, LOG_FILE, describe, read_log
from circuitflow.dictionaries.dictionary import WEIGHTS_FILE, Dictionary, save_dictionary
from circuitflow.dictionaries.feeding import Feed
from circuitflow.dictionaries.kinds import MADE, TRAINED, Data, Request, check_request
from circuitflow.dictionaries.normalisation import Normalisation
from circuitflow.dictionaries.objective import Step
from circuitflow.dictionaries.preparing import PREPARED_FILE, Prepared, prepare
from circuitflow.dictionaries.reconstruction import quality
from circuitflow.dictionaries.resampling import Resampling
from circuitflow.dictionaries.rows import SiteRows, open_rows
from circuitflow.dictionaries.settings import Settings
from circuitflow.dictionaries.state import (
    STATE_FILE,
    Interval,
    Termination,
    TrainingLog,
    load_state,
    save_state,
)
from circuitflow.dictionaries.trainer import NonFiniteError, Schedule, Trainer, first_weights
from circuitflow.errors import UserError
from circuitflow.jobs import Output, progress
from circuitflow.progress import logger, show_curves
from circuitflow.provenance import canonical_json, digest
from circuitflow.store.files import write_text
from circuitflow.store.shuffle import ShuffledRows
from circuitflow.tracking import Line, Run, follow

HELD_OUT_ROWS = 4096  # rows of the quick held-out measurement that the log follows
LOG_LINES = 1000  # at most about this many steps of a long training are logged


def train_dictionary(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Train, or make, the dictionary of one site.

    Input ``activations`` (store manifest). Params ``site``, ``settings``
    (:func:`~circuitflow.dictionaries.settings.used_settings`), ``compute``, and ``tracking``
    (:func:`~circuitflow.tracking.follow`), which shapes no result. Writes ``weights.safetensors`` (its presence says
    that the work is done), ``log.jsonl`` and ``checkpoints/step_N.safetensors``.

    :raises UserError: settings that cannot be, no usable rows, or a loss that stops being finite.
    """
    rows = open_rows(inputs["activations"], params["site"])
    request = Request(params["site"], rows.width, Settings.of(params["settings"]))
    check_request(request)
    if not (out.folder / WEIGHTS_FILE).is_file():
        shaping = {name: value for name, value in params.items() if name != "tracking"}
        recipe = digest(canonical_json([shaping, out.provenance]))
        prepared = prepare(rows, request.settings.training, out.folder, recipe)
        if request.settings.kind in MADE:
            _make(request, prepared, out.folder)
        else:
            training = _Training(rows, request, prepared, out.folder, params["compute"]["device"], recipe)
            training.run(params.get("tracking"), params["settings"])
    for name in (STATE_FILE, PREPARED_FILE):
        (out.folder / name).unlink(missing_ok=True)
    describe(out)


class _Training:
    """One training run: data, trainer, log and state under one folder."""

    def __init__(
        self, rows: SiteRows, request: Request, prepared: Prepared, folder: Path, device: str, recipe: str
    ) -> None:
        settings, training = request.settings, request.settings.training
        self._request, self._prepared, self._folder = request, prepared, folder
        self._device, self._recipe, self._tokens = torch.device(device), recipe, 0
        normalisation = prepared.normalisation
        self._normalise = Normalisation(normalisation.mean.to(device), normalisation.scale)
        batches = ShuffledRows(
            rows.store,
            [rows.site],
            batch=training.batch,
            buffer_rows=max(training.buffer_rows, training.batch),
            seed=settings.seed,
            keep=prepared.keep,
        )
        self._steps = max(1, round(training.epochs * batches.batches_per_epoch))
        self._log_every = max(1, self._steps // LOG_LINES)
        self._feed = Feed(batches, rows.site, self._device, self._steps)
        self._held_out = self._read_held_out(rows)
        self._trainer = _trainer(request, self._steps, self._device)
        self._facts: dict[str, float] = {}

    def run(self, tracking: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> None:
        """Take the steps that are left, then write the finished weights.

        :param settings: as the configuration has them, for those who track the run.
        """
        path = self._folder / LOG_FILE
        show_curves(path)
        told = Run(self._recipe[:16], self._request.site, settings)
        with (
            self._resume() as log,
            follow(tracking, told, read_log(path)) as track,
            Termination() as termination,
        ):
            try:
                self._take_steps(log, track, termination)
            finally:
                self._feed.close()
        self._save(self._folder / WEIGHTS_FILE)

    def _take_steps(self, log: TrainingLog, track: Callable[[Line], None], termination: Termination) -> None:
        chosen = self._request.settings.training.checkpoint_steps(self._steps)
        interval = Interval()
        while self._trainer.done < self._steps:
            line = self._step(log)
            if line is not None:
                log.write(line)
                track(line)
            if self._trainer.done in chosen:
                self._save(self._folder / CHECKPOINTS / f"step_{self._trainer.done}.safetensors")
            if termination.asked or interval.due():
                self._save_state(log)
            if termination.asked:
                self._end()

    def _end(self) -> None:
        done = self._trainer.done
        logger.error(
            "terminated after step %d of %d; the state is saved: run again to go on", done, self._steps
        )
        raise SystemExit(128 + signal.SIGTERM)

    def _step(self, log: TrainingLog) -> dict[str, Any] | None:
        """Take one step; its line for the log, if it is one of those that are logged."""
        trainer, training = self._trainer, self._request.settings.training
        x = self._normalise.apply(self._feed.at(trainer.done))
        try:
            step = trainer.step(x)
        except NonFiniteError as error:
            if trainer.finite:  # else the state of before stays
                self._save_state(log)
            raise self._diverged(str(error), trainer.done + 1) from None
        self._tokens += x.shape[0]
        evaluated = trainer.done % training.evaluate_every == 0 or trainer.done == self._steps
        line = None
        if evaluated or trainer.done % self._log_every == 0:
            line = self._line(step, x.shape[0], evaluated)
            self._facts = {name: line[name] for name in ("fvu", "l0", "dead")}
        progress("steps", trainer.done, self._steps, **self._facts)
        return line

    def _diverged(self, what: str, step: int) -> UserError:
        path = self._folder / STATE_FILE
        kept = f" (the last good state is kept in {path})" if path.is_file() else ""
        return UserError(
            f"The {what} at {self._request.site} stopped being finite at step {step} of {self._steps}; lower "
            f"dictionaries.training.learning_rate, or set clip_norm{kept}."
        )

    def _line(self, step: Step, batch: int, evaluated: bool) -> dict[str, Any]:
        """One line of the log: of this batch, except ``held_out``, null between measurements, and counts so far."""
        trainer, taken = self._trainer, self._trainer.done - 1
        reconstruction, auxiliary = float(step.reconstruction), float(step.auxiliary)
        return {
            "step": trainer.done,
            "tokens": self._tokens,
            "loss": reconstruction + auxiliary,
            "fvu": reconstruction,  # inputs have mean 0 and mean ‖x‖² = 1 over all training rows
            "l0": step.active / batch,
            "dead": trainer.dead_share,
            "resampled": trainer.resampled,
            "auxiliary": auxiliary,
            "grad_norm": trainer.gradient_norm,
            "lr": trainer.schedule.at(taken),
            "sparsity": trainer.schedule.sparsity(taken),
            "held_out": quality(trainer.objective, trainer.weights, self._held_out) if evaluated else None,
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
        if not self._trainer.finite:
            raise self._diverged("weights", self._trainer.done)
        tensors = {**self._trainer.state(), "tokens": torch.tensor(self._tokens)}
        save_state(self._folder, tensors, self._trainer.done, log, self._recipe)

    def _save(self, path: Path) -> None:
        """The dictionary as it stands, in raw units."""
        if not self._trainer.finite:
            raise self._diverged("weights", self._trainer.done)
        request, objective = self._request, self._trainer.objective
        done = objective.finish(self._trainer.weights)
        normalisation = self._prepared.normalisation
        dictionary = Dictionary(
            kind=request.settings.kind,
            reads=(request.site,),
            writes=(request.site,),
            select=objective.select,
            skip=self._prepared.skip,
            settings=done.settings,
            extra={name: tensor.cpu() * normalisation.scale for name, tensor in done.extra.items()},
            notes={**self._prepared.facts, "step": self._trainer.done, "tokens": self._tokens},
            **normalisation.fold(done.weights),
        )
        save_dictionary(path, dictionary)


def _trainer(request: Request, steps: int, device: torch.device) -> Trainer:
    settings, training = request.settings, request.settings.training
    objective = TRAINED[settings.kind](request)
    schedule = Schedule(
        training.learning_rate, steps, training.warmup, training.decay, training.sparsity_warmup
    )
    resampling = None
    if training.resample_every is not None:
        resampling = Resampling(training.resample_every, training.resample_until, settings.seed)
    return Trainer(
        objective,
        first_weights(objective, request.d_model, settings.d_dict, settings.seed, device),
        schedule,
        training.dead_after,
        clip_norm=training.clip_norm,
        precision=training.precision,
        resampling=resampling,
    )


def _make(request: Request, prepared: Prepared, folder: Path) -> None:
    """A dictionary that needs no training; its log is empty."""
    write_text(folder / LOG_FILE, "")
    data = Data(prepared.normalisation.mean, prepared.skip)
    save_dictionary(folder / WEIGHTS_FILE, MADE[request.settings.kind](request, data))
