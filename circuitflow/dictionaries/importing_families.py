"""The stage ``import_family``: transcoders made elsewhere take the place of training."""

from collections.abc import Mapping
from typing import Any

from circuitflow.dictionaries.describing import LOG_FILE, describe_family, files_of
from circuitflow.dictionaries.family import Family, save_family
from circuitflow.dictionaries.formats.families import fetch_family
from circuitflow.dictionaries.importing import with_rule
from circuitflow.dictionaries.rows import open_sites
from circuitflow.errors import UserError
from circuitflow.jobs import Output
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
    members = []
    for member in family.members:
        (site,) = member.reads
        if site not in rows or member.d_in != rows[site].width:
            raise UserError(
                f"Transcoders of {settings['source']['format']} read {site}, {member.d_in} wide, which this model has "
                "not in that width; use transcoders made for it."
            )
        own = settings["source"]["format"] == "circuitflow" or member.W_enc is None
        members.append(member if own else with_rule(member, rows[site], settings["training"]))
    save_family(out.folder, Family(tuple(members)))
    write_text(out.folder / LOG_FILE, "")
    describe_family(out, files_of(len(members)))
