"""Training from cached activations, resumed exactly where it was killed; the stage ``train_dictionary``, of one site.

Dictionaries that write other sites than they read, or several, come here from
:mod:`~circuitflow.dictionaries.spanning`.
"""

import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.dictionaries.describing import CHECKPOINTS, LOG_FILE, describe, files_of, read_log
from circuitflow.dictionaries.dictionary import WEIGHTS_FILE, Dictionary, save_dictionary
from circuitflow.dictionaries.feeding import Feed
from circuitflow.dictionaries.joint import Joint
from circuitflow.dictionaries.kinds import MADE, Data, Request, check_request, objective_of
from circuitflow.dictionaries.memory import check_memory, estimate
from circuitflow.dictionaries.normalisation import fold, together, unit_of
from circuitflow.dictionaries.objective import Finished, Objective, Step
from circuitflow.dictionaries.preparing import PREPARED_FILE, Prepared, prepare
from circuitflow.dictionaries.reconstruction import finished_members, quality
from circuitflow.dictionaries.resampling import Resampling
from circuitflow.dictionaries.rows import SiteRows, open_rows, read_together
from circuitflow.dictionaries.settings import Settings
from circuitflow.dictionaries.state import (
    STATE_FILE,
    Interval,
    Termination,
    TrainingLog,
    load_state,
    save_state,
)
from circuitflow.dictionaries.trainer import (
    NonFiniteError,
    Schedule,
    Trainer,
    first_joint_weights,
    first_weights,
)
from circuitflow.dictionaries.wiring import one_site
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
            run = TrainingRun([rows], request, prepared, out.folder, params["compute"]["device"], recipe)
            run.run(params.get("tracking"), params["settings"])
    for name in (STATE_FILE, PREPARED_FILE):
        (out.folder / name).unlink(missing_ok=True)
    describe(out)


class TrainingRun:
    """One training run: data, trainer, log and state under one folder.

    Batches hold the vectors of all sites side by side, those read before those written; where the two are the same
    sites, once.
    """

    def __init__(
        self,
        rows: Sequence[SiteRows],
        request: Request,
        prepared: Prepared,
        folder: Path,
        device: str,
        recipe: str,
    ) -> None:
        """Of all sites of the request, in the order of their wiring.

        :raises UserError: there is not enough memory, or every held-out token is an outlier.
        """
        settings, training = request.settings, request.settings.training
        self._request, self._prepared, self._folder = request, prepared, folder
        self._wiring = request.wiring or one_site(request.site)
        self._device, self._recipe, self._tokens = torch.device(device), recipe, 0
        self._normalise = together(prepared.of(self._wiring.sites)).to(device)
        sites, store = [one.site for one in rows], rows[0].store
        row_bytes = sum(store.arrays[site].row_bytes for site in sites)
        held_out = min(HELD_OUT_ROWS, int(rows[0].held_out.sum()))
        check_memory(request, estimate(request, int(prepared.keep.sum()), row_bytes, held_out), self._device)
        batches = ShuffledRows(
            store,
            sites,
            batch=training.batch,
            buffer_rows=max(training.buffer_rows, training.batch),
            seed=settings.seed,
            keep=prepared.keep,
        )
        self._steps = max(1, round(training.epochs * batches.batches_per_epoch))
        self._log_every = max(1, self._steps // LOG_LINES)
        self._feed = Feed(batches, sites, self._device, self._steps)
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
        self._save(self._folder)

    def _take_steps(self, log: TrainingLog, track: Callable[[Line], None], termination: Termination) -> None:
        chosen = self._request.settings.training.checkpoint_steps(self._steps)
        interval = Interval()
        while self._trainer.done < self._steps:
            line = self._step(log)
            if line is not None:
                log.write(line)
                track(line)
            if self._trainer.done in chosen:
                self._save(self._folder / CHECKPOINTS, f"step_{self._trainer.done}")
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
        batch = self._parts(self._normalise.apply(self._feed.at(trainer.done)))
        try:
            step = trainer.step(*batch)
        except NonFiniteError as error:
            if trainer.finite:  # else the state of before stays
                self._save_state(log)
            raise self._diverged(str(error), trainer.done + 1) from None
        self._tokens += batch[0].shape[0]
        evaluated = trainer.done % training.evaluate_every == 0 or trainer.done == self._steps
        line = None
        if evaluated or trainer.done % self._log_every == 0:
            line = self._line(step, batch[0].shape[0], evaluated)
            self._facts = {name: line[name] for name in ("fvu", "l0", "dead")}
        progress("steps", trainer.done, self._steps, **self._facts)
        return line

    def _diverged(self, what: str, step: int) -> UserError:
        path = self._folder / STATE_FILE
        kept = f" (the last good state is kept in {path})" if path.is_file() else ""
        section = "dictionaries." if self._request.wiring is None else ""
        return UserError(
            f"The {what} at {self._request.site} stopped being finite at step {step} of {self._steps}; lower "
            f"{section}training.learning_rate, or set clip_norm{kept}."
        )

    def _parts(self, x: Float[Tensor, "n d_all"]) -> tuple[Tensor, ...]:
        """What is read, and what is written if that is something else."""
        if self._wiring.same:
            return (x,)
        read = len(self._wiring.reads) * self._request.width
        return x[:, :read].contiguous(), x[:, read:].contiguous()

    def _line(self, step: Step, batch: int, evaluated: bool) -> dict[str, Any]:
        """One line of the log: of this batch, except ``held_out``, null between measurements, and counts so far."""
        trainer, taken = self._trainer, self._trainer.done - 1
        reconstruction, auxiliary = float(step.reconstruction), float(step.auxiliary)
        return {
            "step": trainer.done,
            "tokens": self._tokens,
            "loss": reconstruction + auxiliary,
            # Each site has mean 0 and mean ‖x‖² = 1 over all training rows.
            "fvu": reconstruction / len(self._wiring.writes),
            "l0": step.active / batch,
            "dead": trainer.dead_share,
            "resampled": trainer.resampled,
            "auxiliary": auxiliary,
            "grad_norm": trainer.gradient_norm,
            "lr": trainer.schedule.at(taken),
            "sparsity": trainer.schedule.sparsity(taken),
            "held_out": self._quality() if evaluated else None,
        }

    def _quality(self) -> dict[str, Any]:
        trainer, parts = self._trainer, self._parts(self._held_out)
        y = None if self._wiring.same else parts[1]
        return quality(trainer.objective, trainer.weights, parts[0], y, self._wiring.writes)

    def _read_held_out(self, rows: Sequence[SiteRows]) -> Float[Tensor, "n d_all"]:
        """Normalised held-out vectors without outliers, spread over the held-out blocks."""
        first = rows[0]
        wanted = first.spread(
            first.held_out & ~np.isin(first.positions, self._prepared.positions), HELD_OUT_ROWS
        )
        parts = [torch.cat(x, dim=1) for _, x in read_together(rows, wanted, self._prepared.skip)]
        if not parts or not len(x := torch.cat(parts)):
            raise UserError(
                f"Every held-out token at {self._request.site} is an outlier; raise outlier_ratio or corpus.held_out."
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

    def _save(self, folder: Path, name: str | None = None) -> None:
        """The dictionaries as they stand, in raw units: in files of the folder, of the name given for a checkpoint."""
        if not self._trainer.finite:
            raise self._diverged("weights", self._trainer.done)
        files = files_of(len(self._wiring.members), name)
        done = finished_members(self._trainer.objective, self._trainer.weights)
        for member, (file, finished) in enumerate(zip(files, done, strict=True)):
            save_dictionary(folder / file, self._dictionary(member, finished))

    def _dictionary(self, number: int, done: Finished) -> Dictionary:
        settings, member, prepared = self._request.settings, self._wiring.members[number], self._prepared
        read, written = prepared.of(member.reads), prepared.of(member.writes)
        joint = len(self._wiring.members) > 1
        owned = [not joint or site == member.writes[0] for site in member.writes]
        folded = fold(read, written, done.weights, owned)
        notes = {**prepared.facts, "step": self._trainer.done, "tokens": self._tokens}
        if self._request.wiring is not None:
            dead = self._trainer.dead.chunk(len(self._wiring.members))[number]
            notes["dead_share"] = float(dead.float().mean())
        return Dictionary(
            kind=settings.kind,
            reads=member.reads,
            writes=member.writes,
            select=self._trainer.objective.select,
            skip=prepared.skip_of(member.reads),
            settings=done.settings,
            extra={name: tensor.cpu() * unit_of(written) for name, tensor in done.extra.items()},
            notes=notes,
            **folded,
        )


def _trainer(request: Request, steps: int, device: torch.device) -> Trainer:
    settings, training = request.settings, request.settings.training
    objective = objective_of(request)
    schedule = Schedule(
        training.learning_rate, steps, training.warmup, training.decay, training.sparsity_warmup
    )
    resampling = None
    if training.resample_every is not None:
        resampling = Resampling(training.resample_every, training.resample_until, settings.seed)
    return Trainer(
        objective,
        _weights(objective, request, device),
        schedule,
        training.dead_after,
        clip_norm=training.clip_norm,
        precision=training.precision,
        resampling=resampling,
    )


def _weights(objective: Objective, request: Request, device: torch.device) -> dict[str, Tensor]:
    settings, wiring = request.settings, request.wiring
    if isinstance(objective, Joint):
        return first_joint_weights(objective, settings.seed, device)
    d_out = None if wiring is None or wiring.same else request.width * request.sites
    sites = len(wiring.reads) if wiring is not None and wiring.same else 1
    return first_weights(
        objective, request.d_model, settings.d_dict, settings.seed, device, d_out, sites=sites
    )


def _make(request: Request, prepared: Prepared, folder: Path) -> None:
    """A dictionary that needs no training; its log is empty."""
    write_text(folder / LOG_FILE, "")
    data = Data(prepared.normalisation.mean, prepared.skip)
    save_dictionary(folder / WEIGHTS_FILE, MADE[request.settings.kind](request, data))
