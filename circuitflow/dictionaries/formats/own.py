"""Our own dictionaries: a safetensors file, or the manifest of a run."""

from pathlib import Path

from circuitflow.dictionaries.dictionary import Dictionary, load_dictionary, save_dictionary
from circuitflow.dictionaries.family import member_files
from circuitflow.dictionaries.formats.naming import Hint, choose_site
from circuitflow.dictionaries.formats.places import Place
from circuitflow.errors import UserError
from circuitflow.models.sites import bare, parse_site


def read(place: Place, site: str | None) -> Dictionary:
    """The dictionary as it was saved, with its own outlier rule.

    :raises UserError: the file is damaged, holds several dictionaries, or its dictionary reads another site.
    """
    files = member_files(place.weights)
    if len(files) > 1:
        raise UserError(
            f"{place} holds {len(files)} dictionaries that reconstruct together; here one is wanted: convert them with "
            "--all."
        )
    dictionary = load_dictionary(files[0])
    saved = parse_site(bare(dictionary.reads[0]))
    choose_site(str(place), Hint(saved.kind, saved.layer), site)
    return dictionary


def write(path: Path, dictionary: Dictionary) -> None:
    """Write a safetensors file."""
    save_dictionary(path, dictionary)
