"""The formats' readers and writers."""

from collections.abc import Callable
from pathlib import Path

from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.dictionaries.formats import (
    circuit_tracer,
    decoder,
    dictionary_learning,
    gemma_scope,
    own,
    sae_lens,
    sparsify,
)
from circuitflow.dictionaries.formats.places import LAYOUTS, WRITTEN, Place, layout_of
from circuitflow.errors import UserError, nearest

READERS: dict[str, Callable[[Place, str | None], Dictionary]] = {
    "circuitflow": own.read,
    "sae_lens": sae_lens.read,
    "gemma_scope": gemma_scope.read,
    "dictionary_learning": dictionary_learning.read,
    "sparsify": sparsify.read,
    "circuit_tracer": circuit_tracer.read,
    "decoder": decoder.read,
}
"""From the files of one dictionary, and the site it is wanted for (None: what they tell), to the dictionary."""

WRITERS: dict[str, Callable[[Path, Dictionary], None]] = {
    "circuitflow": own.write,
    "sae_lens": sae_lens.write,
    "sparsify": sparsify.write,
    "circuit_tracer": circuit_tracer.write,
}


def read_dictionary(format_name: str, place: Place, site: str | None = None) -> Dictionary:
    """Read a dictionary of a format.

    :raises UserError: the format is unknown; or its files are damaged, or cannot be imported exactly.
    """
    layout_of(format_name)
    return READERS[format_name](place, site)


def write_dictionary(format_name: str, path: Path, dictionary: Dictionary) -> None:
    """Write a dictionary in a format.

    :raises UserError: the format is unknown or only read, or cannot hold the dictionary exactly.
    """
    layout_of(format_name)
    if format_name not in WRITERS:
        raise UserError(f"Format {format_name} can be read but not written; {nearest(format_name, WRITTEN)}.")
    WRITERS[format_name](path, dictionary)


assert READERS.keys() == LAYOUTS.keys()
assert WRITERS.keys() == set(WRITTEN)
