"""``circuitflow convert``: dictionaries from one library's format to another's."""

from pathlib import Path

from circuitflow.dictionaries.formats.families import detect_family, read_family, write_family
from circuitflow.dictionaries.formats.hub import fetch_dictionary
from circuitflow.dictionaries.formats.places import LAYOUTS, WRITTEN, detect
from circuitflow.dictionaries.formats.registry import read_dictionary, write_dictionary
from circuitflow.errors import UserError, nearest
from circuitflow.plots.numbers import counted


def convert(
    source: str,
    target: Path,
    from_format: str | None,
    to_format: str,
    site: str | None = None,
    repository: str | None = None,
    revision: str = "main",
) -> str:
    """Convert one dictionary and tell what was done, in a sentence.

    :param source: file or folder on disk, or with ``repository`` the place inside that repository of the hub.
    :param from_format: None: as the files tell.
    :param site: site that the dictionary reads; None: as the files tell.
    :raises UserError: it is not there, or one of the formats cannot hold it exactly.
    """
    if to_format not in WRITTEN:
        raise UserError(f"Format '{to_format}' cannot be written; {nearest(to_format, WRITTEN)}.")
    if to_format == "circuitflow" and target.suffix != ".safetensors":
        raise UserError(f"{target} is no name for a circuitflow dictionary; end it with .safetensors.")
    if target.exists():
        raise UserError(f"{target} exists; name a file or folder that does not.")
    if from_format is None:
        if repository is not None:
            raise UserError(
                f"The format of a dictionary on the hub is not known before it is here; name it (--from): "
                f"{nearest('', LAYOUTS, limit=len(LAYOUTS))}."
            )
        from_format = detect(Path(source))
    asked = {"format": from_format, "path": source, "id": repository, "revision": revision}
    place = fetch_dictionary(asked, site)
    dictionary = read_dictionary(from_format, place, site)
    write_dictionary(to_format, target, dictionary)
    sites = " → ".join(dict.fromkeys([*dictionary.reads, *dictionary.writes]))
    return (
        f"{target}: {dictionary.d_dict} features at {sites}, {dictionary.d_in} wide, from {place} "
        f"({from_format}) to {to_format}"
    )


def convert_all(source: Path, target: Path, from_format: str | None, to_format: str) -> str:
    """Convert every dictionary of a folder, or those behind one manifest of ours, and tell what was done.

    :raises UserError: there is none, or one of the formats cannot hold them exactly; or the target exists.
    """
    if to_format not in WRITTEN:
        raise UserError(f"Format '{to_format}' cannot be written; {nearest(to_format, WRITTEN)}.")
    if not source.exists():
        raise UserError(f"Path {source} does not exist; check it (relative paths start at {Path.cwd()}).")
    if target.exists():
        raise UserError(f"{target} exists; name a folder that does not.")
    given = from_format or detect_family(source)
    family = read_family(given, source)
    write_family(to_format, target, family)
    members = counted(len(family.members), "dictionary", "dictionaries")
    features = sum(member.d_dict for member in family.members)
    return (
        f"{target}: {members} with {counted(features, 'feature')}, {family.reads[0]} to "
        f"{family.writes[-1]}, from {source} ({given}) to {to_format}"
    )
