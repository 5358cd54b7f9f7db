"""Several dictionaries that belong together, in files of any format: one a layer, or one that writes many layers."""

from collections.abc import Sequence
from pathlib import Path

from circuitflow.dictionaries.dictionary import save_dictionary
from circuitflow.dictionaries.family import Family, load_family
from circuitflow.dictionaries.formats import circuit_tracer_sets
from circuitflow.dictionaries.formats.hub import Source, fetch_dictionary
from circuitflow.dictionaries.formats.places import LAYOUTS, WRITTEN, Place, layout_of, names_below
from circuitflow.dictionaries.formats.registry import read_dictionary, write_dictionary
from circuitflow.errors import UserError, nearest
from circuitflow.models.sites import depth

ANY_NAME = ("circuitflow", "decoder")
"""Formats whose files may bear any name."""


def fetch_family(source: Source, sites: Sequence[str]) -> Family:
    """The dictionaries of a source, on disk or on the hub, that read these sites; a cross-layer one comes whole.

    :param sites: what is read, as in ``mlp_in.12``.
    :raises UserError: one is not there or cannot be imported exactly, or a cross-layer one reads other sites.
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

    :raises UserError: there is none, or one cannot be imported exactly.
    """
    if format_name == "circuitflow" and path.is_file():
        return load_family([path])
    if not path.is_dir():
        raise UserError(f"{path} is no folder; name the folder that holds the dictionaries.")
    found = layout_of(format_name).find(names_below(path))
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
    members = [read_dictionary(format_name, place) for place in places]
    members.sort(key=lambda member: depth(member.reads[0]))
    return Family(tuple(members))


def write_family(format_name: str, folder: Path, family: Family) -> None:
    """Write every member into a folder: a file, or a folder, a site that is read.

    :raises UserError: the format is unknown or only read, or cannot hold a member exactly; or the folder is in use.
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
            save_dictionary(folder / f"{name}.safetensors", member)
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


def _whole(place: Place, sites: Sequence[str]) -> Family:
    family = circuit_tracer_sets.read_cross_layer(place)
    other = [site for site in sites if site not in family.reads]
    if other:
        raise UserError(
            f"Cross-layer transcoder {place} reads {family.reads[0]} to {family.reads[-1]}, not {other[0]}; ask for "
            "layers that it has, or name another."
        )
    return family
