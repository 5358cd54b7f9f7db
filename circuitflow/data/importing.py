"""Stage ``import_pairs``: the user's own pairs or prompts, checked and written in one form."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from circuitflow.data.pairs import Pair, read_pairs, write_pairs
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.progress import logger
from circuitflow.store.files import write_json

SPLITS = ("train", "test")


def import_pairs(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """Stage: write ``train`` and ``test`` pairs and ``provenance`` from JSONL files of the same names.

    Lines follow feature-circuits (clean_prefix, patch_prefix, clean_answer, patch_answer, case) or are unpaired prompts
    (prompt, true_answer, false_answer, case). Test pairs that share a prompt with train are left out and counted: a
    circuit must be judged on prompts that did not shape it.

    :raises UserError: a file is missing, a line is broken, or no test pair remains.
    """
    pairs = {split: read_pairs(inputs[split]) for split in SPLITS}
    unseen = without_prompts_of(pairs["train"], pairs["test"])
    shared = len(pairs["test"]) - len(unseen)
    if not unseen:
        raise UserError(
            f"All {shared} pairs of {inputs['test']} (task.pairs.test) share a prompt with {inputs['train']} "
            "(task.pairs.train); take test pairs with other prompts."
        )
    if shared:
        logger.warning(
            "%d test pairs share a prompt with train and are left out, %d remain", shared, len(unseen)
        )
    write_pairs(out.files["train"], pairs["train"])
    write_pairs(out.files["test"], unseen)
    write_json(out.files["provenance"], {**out.provenance, "shared_prompts_left_out": shared})


def without_prompts_of(known: list[Pair], pairs: list[Pair]) -> list[Pair]:
    """The pairs none of whose prompts occurs in ``known``."""
    seen = {prompt for pair in known for prompt in pair.prompts}
    return [pair for pair in pairs if seen.isdisjoint(pair.prompts)]
