"""Training transcoders, cross-layer transcoders and crosscoders: what they write is not the one site they read."""

from collections.abc import Mapping
from typing import Any

from circuitflow.dictionaries.describing import describe_family, files_of
from circuitflow.dictionaries.kinds import Request, check_request
from circuitflow.dictionaries.preparing import PREPARED_FILE, prepare
from circuitflow.dictionaries.rows import open_sites
from circuitflow.dictionaries.settings import Settings
from circuitflow.dictionaries.state import STATE_FILE
from circuitflow.dictionaries.training import TrainingRun
from circuitflow.dictionaries.wiring import Wiring
from circuitflow.jobs import Output
from circuitflow.provenance import canonical_json, digest


def train_family(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Train dictionaries that reconstruct together, or one that spans sites.

    Input ``activations`` (manifest of a store with all sites). Params ``members`` ([[reads, writes], …], see
    :mod:`~circuitflow.dictionaries.wiring`), ``settings``
    (:func:`~circuitflow.dictionaries.settings.used_family_settings`), ``compute``, and ``tracking``, which shapes no
    result. Writes ``weights.safetensors``, or ``member_0.safetensors`` and so on (the last says that the work is done),
    ``log.jsonl``, and checkpoints of the same names under ``checkpoints/``.

    :raises UserError: settings that cannot be, too little memory, no usable rows, or a loss that stops being finite.
    """
    wiring = Wiring.of(params["members"])
    rows = open_sites(inputs["activations"], wiring.sites)
    settings = Settings.of(params["settings"])
    request = Request(wiring.name, rows[0].width * len(wiring.members[0].reads), settings, wiring)
    check_request(request)
    if not (out.folder / files_of(len(wiring.members))[-1]).is_file():
        shaping = {name: value for name, value in params.items() if name != "tracking"}
        recipe = digest(canonical_json([shaping, out.provenance]))
        prepared = prepare(rows, settings.training, out.folder, recipe)
        run = TrainingRun(rows, request, prepared, out.folder, params["compute"]["device"], recipe)
        run.run(params.get("tracking"), params["settings"])
    for name in (STATE_FILE, PREPARED_FILE):
        (out.folder / name).unlink(missing_ok=True)
    describe_family(out, files_of(len(wiring.members)))
