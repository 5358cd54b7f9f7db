"""The stage ``import_family``: transcoders made elsewhere take the place of training."""

from collections.abc import Mapping, Sequence
from typing import Any

from circuitflow.dictionaries.describing import LOG_FILE, describe_family, files_of
from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.dictionaries.family import Family, save_family, site_width
from circuitflow.dictionaries.formats.families import fetch_family
from circuitflow.dictionaries.importing import with_rule
from circuitflow.dictionaries.rows import open_sites
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.store.arrays import Store
from circuitflow.store.files import write_text


def import_family(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Read the transcoders of some layers, or a cross-layer one, from files of another library or from the hub.

    Input ``activations`` (store manifest; ``source``, the files on disk, is declared so that the workflow notices when
    they change). Params ``layers``, ``settings`` (``source`` and ``training``, of which only the outlier rule is used)
    and ``compute``. Writes ``weights.safetensors``, or ``member_0.safetensors`` and so on, and an empty ``log.jsonl``.

    :raises UserError: a dictionary is not there, cannot be imported exactly, or is for another model.
    """
    settings, sites = params["settings"], [f"mlp_in.{layer}" for layer in params["layers"]]
    family = fetch_family(settings["source"], sites)
    rows = {one.site: one for one in open_sites(inputs["activations"], sites)}
    _check_reads(family, sites)
    members = []
    for member in family.members:
        of = rows[member.reads[0]]
        _check_member(member, of.width, of.store)
        own = settings["source"]["format"] == "circuitflow" or member.W_enc is None
        members.append(member if own else with_rule(member, of, settings["training"]))
    save_family(out.folder, Family(tuple(members)))
    write_text(out.folder / LOG_FILE, "")
    describe_family(out, files_of(len(members)))


def _check_reads(family: Family, sites: Sequence[str]) -> None:
    """Check that nothing is read but what was asked for, as a cross-layer transcoder comes whole."""
    if set(family.reads) - set(sites):
        raise UserError(
            f"The cross-layer transcoder of transcoders.source reads {family.reads[0]} to {family.reads[-1]}, and what "
            f"was asked for is {', '.join(sites)}; it is imported whole: set transcoders.architecture to cross_layer "
            "and transcoders.layers to null, in a model of as many layers."
        )


def _check_member(member: Dictionary, width: int, store: Store) -> None:
    """Check that a transcoder reads and writes vectors that this model has, of this width."""
    for site in member.writes:
        if site not in store.arrays:
            raise UserError(
                f"The transcoder at {member.reads[0]} writes {site}, which is not among the layers asked for; set "
                "transcoders.layers to all that it writes, or use transcoders made for this model."
            )
    for sites, own in ((member.reads, member.d_in), (member.writes, site_width(member))):
        if own != width:
            raise UserError(
                f"The transcoder at {member.reads[0]} is made for vectors at {', '.join(sites)} that are {own} wide, "
                f"and in this model they are {width} wide; use transcoders made for it."
            )
