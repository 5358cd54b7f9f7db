"""Our own dictionaries: a safetensors file, or the manifest of a run."""

from pathlib import Path

from circuitflow.dictionaries.dictionary import Dictionary, load_dictionary, save_dictionary
from circuitflow.dictionaries.formats.naming import Hint, choose_site
from circuitflow.dictionaries.formats.places import Place
from circuitflow.models.sites import parse_site


def read(place: Place, site: str | None) -> Dictionary:
    """The dictionary as it was saved, with its own outlier rule.

    :raises UserError: the file is damaged, or its dictionary reads another site.
    """
    dictionary = load_dictionary(place.weights)
    saved = parse_site(dictionary.reads[0])
    choose_site(str(place), Hint(saved.kind, saved.layer), site)
    return dictionary


def write(path: Path, dictionary: Dictionary) -> None:
    """Write a safetensors file."""
    save_dictionary(path, dictionary)
