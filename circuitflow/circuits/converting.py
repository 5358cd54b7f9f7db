"""``circuitflow convert-circuit``: circuits from one tool's format to another's."""

import math
from collections.abc import Mapping
from pathlib import Path

from circuitflow.circuits.circuit import Circuit, read_circuit, write_circuit
from circuitflow.circuits.formats.feature_circuits import read_feature_circuits, write_feature_circuits
from circuitflow.circuits.formats.mib import Shape, read_mib, write_mib
from circuitflow.errors import UserError, nearest
from circuitflow.store.files import read_json
from circuitflow.store.objects import content_of, read_manifest

FORMATS = ("circuitflow", "mib", "feature-circuits")
MANIFEST = "manifest.json"
ENDINGS = {".pt": "feature-circuits"}


def convert_circuit(
    source: Path,
    target: Path,
    to_format: str,
    from_format: str | None = None,
    model: Path | None = None,
    dictionaries: Path | None = None,
    thresholds: tuple[float, float] = (0.0, 0.0),
) -> str:
    """Convert one circuit and tell what was done, in a sentence.

    :param from_format: None: as the file tells.
    :param model: folder with the model's config.json, or a run's results/MODEL/model; a MIB circuit takes its shape.
    :param dictionaries: folder of dictionaries, {site}.json, whose widths a feature-circuits file takes.
    :param thresholds: least |effect| of nodes and edges that are read from feature-circuits.
    :raises UserError: it is not there, or one of the formats cannot hold it exactly.
    """
    for name in (to_format, from_format):
        if name is not None and name not in FORMATS:
            raise UserError(f"Format '{name}' of circuits is unknown; {nearest(name, FORMATS)}.")
    if target.exists():
        raise UserError(f"{target} exists; name a file that does not.")
    _check_request(source, thresholds)
    given = from_format or detected(source)
    shape = None if model is None else shape_of(model)
    if given == "mib":
        circuit = read_mib(source, None if shape is None else shape.d_head)
    elif given == "feature-circuits":
        circuit = read_feature_circuits(source, *thresholds)
    else:
        circuit = _checked(read_circuit(source), source)
    if to_format == "mib":
        write_mib(target, circuit, shape)
    elif to_format == "feature-circuits":
        write_feature_circuits(target, circuit, _widths(circuit, dictionaries))
    else:
        write_circuit(target, circuit)
    said = f"{len(circuit.nodes)} nodes and {len(circuit.edges)} edges at {len(circuit.sites)} sites"
    return f"{target}: {said}, from {source} ({given}) to {to_format}"


def _check_request(source: Path, thresholds: tuple[float, float]) -> None:
    if source.is_dir():
        raise UserError(
            f"{source} is a folder; name the circuit's file, for example {source / 'circuit.json'}."
        )
    for name, least in zip(("--nodes", "--edges"), thresholds, strict=True):
        if not (math.isfinite(least) and least >= 0):
            raise UserError(f"Option {name} is {least:g}; it takes the least |effect| to read, 0 or more.")


def detected(path: Path) -> str:
    """The format of a circuit's file.

    :raises UserError: it is missing, or none of the known ones.
    """
    if path.suffix in ENDINGS:
        return ENDINGS[path.suffix]
    value = read_json(path)
    if isinstance(value, dict) and "cfg" in value and "nodes" in value:
        return "mib"
    return "circuitflow"


def shape_of(folder: Path) -> Shape:
    """A model's shape from its config.json.

    :raises UserError: it is missing or says too little.
    """
    path = _config_of(folder)
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"File {path} is no config.json of a model; name the model's folder.")
    names = ("num_hidden_layers", "n_layer"), ("num_attention_heads", "n_head"), ("hidden_size", "n_embd")
    found = [next((int(value[key]) for key in keys if key in value), 0) for keys in names]
    if 0 in found:
        raise UserError(
            f"File {path} does not say how many layers and heads the model has, and how wide it is."
        )
    layers, heads, width = found
    parallel = bool(value.get("use_parallel_residual", value.get("model_type") == "gpt_neox"))
    return Shape(layers, heads, width, int(value.get("head_dim") or width // heads), parallel)


def _config_of(folder: Path) -> Path:
    """The model's config.json, in the folder or in the object that the folder's manifest names."""
    if folder.is_file() and folder.name != MANIFEST:
        return folder
    manifest = folder if folder.is_file() else folder / MANIFEST
    if manifest.is_file() and not (folder / "config.json").is_file():
        return read_manifest(manifest, "model").folder(manifest) / "hf" / "config.json"
    return folder / "config.json"


def _checked(circuit: Circuit, source: Path) -> Circuit:
    """A circuit of ours whose parts are of the right kind.

    :raises UserError: it was edited so that they are not.
    """
    lost = [node.id for node in circuit.nodes if node.site not in circuit.sites]
    if lost or not all(isinstance(part, Mapping) for part in (circuit.selection, circuit.provenance)):
        what = (
            f"node {lost[0]} lies at none of its sites"
            if lost
            else "its selection or provenance is no object"
        )
        raise UserError(
            f"Circuit {source} is damaged or was edited ({what}); run the stage assemble_circuit again."
        )
    return circuit


def _widths(circuit: Circuit, folder: Path | None) -> Mapping[str, int] | None:
    """Features of every site's dictionary.

    :raises UserError: the circuit was made with other dictionaries.
    """
    if folder is None:
        return None
    from circuitflow.dictionaries.dictionary import load_dictionary

    made, found = circuit.provenance.get("dictionaries"), {}
    for site in circuit.sites:
        path = folder / f"{site}.json"
        of_circuit = made.get(site) if isinstance(made, Mapping) else None
        if of_circuit is not None and content_of(path) != of_circuit:
            raise UserError(
                f"Dictionary {path} is not the one that the circuit was made with, so that its feature numbers mean "
                "others; name the folder of those dictionaries."
            )
        found[site] = load_dictionary(path).d_dict
    return found
