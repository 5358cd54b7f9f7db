"""The stage ``import_dictionary``: a dictionary made elsewhere takes the place of training."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from circuitflow.dictionaries.describing import LOG_FILE, describe
from circuitflow.dictionaries.dictionary import NO_SKIP, WEIGHTS_FILE, Dictionary, save_dictionary
from circuitflow.dictionaries.formats.hub import Source, fetch_dictionary
from circuitflow.dictionaries.formats.registry import read_dictionary
from circuitflow.dictionaries.outliers import find_outliers
from circuitflow.dictionaries.rows import SiteRows, open_rows
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.store.files import write_text


def import_dictionary(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Read the dictionary of one site from files of another library, or from the hub.

    Input ``activations`` (store manifest; ``source``, the files on disk, is declared so that the workflow notices
    when they change). Params ``site``, ``settings`` (``source`` and ``training``, of which only the outlier rule is
    used) and ``compute``. Writes ``weights.safetensors`` and an empty ``log.jsonl``.

    Outliers of the run are left out as in training. A decoder alone encodes nothing to leave out, and our own
    dictionaries bring the rule they were made with.

    :raises UserError: the dictionary is not there, cannot be imported exactly, or is for another site or model.
    """
    site, settings = params["site"], params["settings"]
    rows = open_rows(inputs["activations"], site)
    dictionary = read_source(settings["source"], site, rows.width)
    if dictionary.W_enc is not None and settings["source"]["format"] != "circuitflow":
        dictionary = with_rule(dictionary, rows, settings["training"])
    save_dictionary(out.folder / WEIGHTS_FILE, dictionary)
    write_text(out.folder / LOG_FILE, "")
    describe(out)


def read_source(source: Source, site: str, width: int) -> Dictionary:
    """The dictionary of a source, checked to read a site of this width.

    :raises UserError: it is not there, cannot be imported exactly, or is for another site or model.
    """
    place = fetch_dictionary(source, site)
    dictionary = read_dictionary(source["format"], place, site)
    if dictionary.d_in != width:
        raise UserError(
            f"Dictionary {place} is {dictionary.d_in} wide, but {site} is {width} wide in this model; use a dictionary "
            "made for this model and site."
        )
    return dictionary


def with_rule(dictionary: Dictionary, rows: SiteRows, training: Mapping[str, Any]) -> Dictionary:
    """The dictionary with the run's outlier rule, made definite on the activations."""
    found = find_outliers(rows, tuple(training.get("skip_positions", ())), training.get("outlier_ratio"))
    assert dictionary.skip == NO_SKIP
    facts = {
        "median_norm": found.median_norm,
        "share_left_out": found.share,
        "share_left_out_by_norm": found.share_by_norm,
    }
    return replace(dictionary, skip=found.skip, notes={**dictionary.notes, **facts})
