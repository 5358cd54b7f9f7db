"""Several dictionaries that belong together, in files of any format: one a layer, or one that writes many layers."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from circuitflow.dictionaries.describing import CHECKPOINTS
from circuitflow.dictionaries.dictionary import Dictionary, save_dictionary
from circuitflow.dictionaries.family import Family, family_of, load_family
from circuitflow.dictionaries.formats import circuit_tracer_sets
from circuitflow.dictionaries.formats.hub import Source, fetch_dictionary
from circuitflow.dictionaries.formats.places import LAYOUTS, WRITTEN, Place, layout_of, names_below
from circuitflow.dictionaries.formats.registry import read_dictionary, write_dictionary
from circuitflow.errors import UserError, nearest

ANY_NAME = ("circuitflow", "decoder")
"""Formats whose files may bear any name."""


def fetch_family(source: Source, sites: Sequence[str]) -> Family:
    """The dictionaries of a source, on disk or on the hub, that read these sites; a cross-layer one comes whole.

    :param sites: what is read, as in ``mlp_in.12``.
    :raises UserError: one is not there or cannot be imported exactly, or a cross-layer one does not read them all.
    """
    members = []
    for site in sites:
        place = fetch_dictionary(source, site)
        if circuit_tracer_sets.is_cross_layer(place):
            return _whole(place, sites)
        members.append(read_dictionary(source["format"], place, site))
    return Family(tuple(members))


def read_family(format_name: str, path: Path) -> Family:
    """Every dictionary of a format below a folder, or the members behind one manifest of ours.

    Checkpoints of our own trainings are left out.

    :raises UserError: there is none, one cannot be imported exactly, or two read the same site.
    """
    if format_name == "circuitflow" and path.is_file():
        return load_family([path])
    if not path.is_dir():
        raise UserError(f"{path} is no folder; name the folder that holds the dictionaries.")
    found = layout_of(format_name).find(names_below(path))
    if format_name == "circuitflow":
        found = {name: files for name, files in found.items() if not _is_checkpoint(name)}
    places = [Place(path, name, files) for name, files in sorted(found.items())]
    if not places:
        raise UserError(
            f"No dictionary of format {format_name} is in {path}; {layout_of(format_name).looks}."
        )
    if format_name == "circuitflow":
        return load_family([place.weights for place in places])
    whole = [place for place in places if circuit_tracer_sets.is_cross_layer(place)]
    if len(whole) == len(places) == 1:
        return circuit_tracer_sets.read_cross_layer(whole[0])
    if whole:
        raise UserError(
            f"{path} holds {len(places)} dictionaries, {len(whole)} of them cross-layer transcoders; name the folder "
            "of one."
        )
    return family_of([(str(place), read_dictionary(format_name, place)) for place in places])


def write_family(format_name: str, folder: Path, family: Family) -> None:
    """Write every member into a folder: a file, or a folder, a site that is read.

    :raises UserError: the format is unknown or only read, or cannot hold a member exactly; the folder is in use; or two
        members read the same sites.
    """
    layout_of(format_name)
    if format_name not in WRITTEN:
        raise UserError(f"Format {format_name} can be read but not written; {nearest(format_name, WRITTEN)}.")
    if format_name == "circuit_tracer":
        circuit_tracer_sets.write_set(folder, family)
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is in use; name a folder that does not exist yet, or is empty.")
    for member in family.members:
        name = "+".join(member.reads).replace(":", "_")
        if format_name == "circuitflow":
            _save_new(folder / f"{name}.safetensors", member)
        else:
            write_dictionary(format_name, folder / name, member)


def detect_family(path: Path) -> str:
    """The format of the dictionaries in a folder, as the names of their files tell.

    :raises UserError: none does, or more than one.
    """
    if path.is_file():
        return "circuitflow"
    names = names_below(path) if path.is_dir() else []
    # Any .safetensors could be ours or a bare decoder; names that only one library gives come first.
    fitting = [name for name, layout in LAYOUTS.items() if name not in ANY_NAME and layout.find(names)]
    fitting = fitting or [name for name in ("circuitflow",) if LAYOUTS[name].find(names)]
    if len(fitting) != 1:
        raise UserError(
            f"{path} holds dictionaries of {' and '.join(fitting) or 'no format that is known'}; name the format "
            f"(--from): {nearest('', LAYOUTS, limit=len(LAYOUTS))}."
        )
    return fitting[0]


def _is_checkpoint(name: str) -> bool:
    """Whether a dictionary lies in the folder of checkpoints of a training."""
    return CHECKPOINTS in PurePosixPath(name).parts[:-1]


def _save_new(path: Path, member: Dictionary) -> None:
    if path.exists():
        raise UserError(
            f"{path} has been written already: two dictionaries read {', '.join(member.reads)}; give one for each site."
        )
    save_dictionary(path, member)


def _whole(place: Place, sites: Sequence[str]) -> Family:
    family = circuit_tracer_sets.read_cross_layer(place)
    other = [site for site in sites if site not in family.reads]
    if other:
        raise UserError(
            f"Cross-layer transcoder {place} reads {family.reads[0]} to {family.reads[-1]}, not {other[0]}; ask for "
            "layers that it has, or name another."
        )
    return family
