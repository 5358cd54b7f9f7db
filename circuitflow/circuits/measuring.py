"""Measuring interventions that an earlier run may have measured: what a ledger knows is not run again."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from circuitflow.circuits.interventions import Intervention, key
from circuitflow.code_digests import CodeReader
from circuitflow.jobs import Output
from circuitflow.progress import logger
from circuitflow.provenance import canonical_json, digest
from circuitflow.store.journal import Journal
from circuitflow.store.ledger import STAGE, Ledger, open_ledger, recomputed
from circuitflow.store.objects import Recipe

ENGINE = Path(__file__).with_name("evaluation.py")
SHARED = ("sites", "metric", "ablation", "pairs", "seed", "dtype", "compute")
"""Parameters of :func:`circuitflow.circuits.evaluation.prepared`: with its inputs they decide what m is."""
READ = ("model", "tokens_train", "gradients_train", "dictionaries", "means")
"""Inputs that it reads, beside those of the split."""
JOURNALS = "measured.{}.jsonl"


class Measured(Protocol):
    """What gives m of interventions: an :class:`circuitflow.circuits.evaluation.Evaluation`."""

    def values(
        self, interventions: Sequence[Intervention], batch_rows: int, journal: Journal | None = None
    ) -> Float[np.ndarray, "interventions n"]:
        """m of every intervention on every prompt."""


def ledger_for(
    out: Output, params: Mapping[str, Any], split: str, code: Path = ENGINE, **more: object
) -> Ledger:
    """The ledger of everything that decides what an intervention gives, in a stage's job.

    It is the same for all stages that evaluate on the same prompts in the same way.

    :param params: those that the evaluation was prepared with; ``more``: what else it depends on.
    :param code: the module whose code, with all that it imports, gives the numbers.
    """
    contents = dict(out.provenance.get("inputs", {}))
    read = (*READ, f"tokens_{split}", f"gradients_{split}")
    shared = {name: params[name] for name in SHARED if name in params}
    recipe = Recipe(
        STAGE,
        {**shared, "split": split, **more},
        {name: contents[name] for name in read if name in contents},
        CodeReader().digest(code),
    )
    return open_ledger(out.folder.parent, recipe, recomputed(str(out.provenance.get("stage"))))


def measured(
    here: Measured, interventions: Sequence[Intervention], batch_rows: int, ledger: Ledger, folder: Path
) -> Float[np.ndarray, "interventions n"]:
    """m of every intervention on every prompt; equal ones are run once, those in the ledger not at all.

    The ledger takes the new results in, but the caller saves it, at the end of the job.

    :param folder: the job's; a journal there lets a killed job go on, as long as it has the same things to do.
    """
    keys = [key(one) for one in interventions]
    by_key = dict(zip(keys, interventions, strict=True))

    def run(missing: Sequence[str], journal: Journal) -> np.ndarray:
        return here.values([by_key[name] for name in missing], batch_rows, journal)

    return looked_up(keys, run, ledger, folder)


def looked_up(
    keys: Sequence[str], run: Callable[[Sequence[str], Journal], np.ndarray], ledger: Ledger, folder: Path
) -> Float[np.ndarray, "keys n"]:
    """Results of experiments by their keys; those that the ledger lacks are ``run`` together, with a journal.

    A journal holds the results of passes in order, so it belongs to one list of experiments and is named by it.
    """
    missing, distinct = ledger.missing(keys), len(set(keys))
    if len(missing) < distinct:
        logger.info("%d of %d results are known from before", distinct - len(missing), distinct)
    if missing:
        plan = digest(canonical_json([ledger.name, missing]))[:16]
        ledger.add(missing, run(missing, Journal(folder / JOURNALS.format(plan))))
    return ledger.values(keys)


def forget_journals(folder: Path) -> None:
    """Remove the journals of a job that has ended."""
    for path in folder.glob(JOURNALS.format("*")):
        path.unlink()
