"""Where dictionaries of each format lie: which files make one, and finding it on disk or in a list of names.

Nothing here imports torch: ``circuitflow fetch`` and the reading of a configuration use it.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError, safe_open

from circuitflow.dictionaries.formats.naming import hint_of_path
from circuitflow.errors import UserError, nearest
from circuitflow.models.sites import WITHIN_BLOCK, parse_site

Found = dict[str, tuple[str, ...]]
"""Dictionaries below a place: name → their files, the one with the weights first; "." is the place itself."""

DEPTH = 6  # folders below a place that are looked through
MOST_FILES = 100_000
OWN_NAMES = rf"embed|(?:{'|'.join(WITHIN_BLOCK)})\.\d+|cross_layer|crosscoder"
DESCRIPTION = "circuitflow"  # the metadata key by which our own files are known


@dataclass(frozen=True)
class Place:
    """One dictionary's files on this machine."""

    root: Path
    id: str
    """Its name below the root."""
    files: tuple[str, ...]
    """Below the root, the one with the weights first."""
    repository: str | None = None
    """The hub repository that the root is a snapshot of."""

    @property
    def weights(self) -> Path:
        """The file with the weights."""
        return self.root / self.files[0]

    def beside(self, name: str) -> Path | None:
        """The file of that name among the dictionary's own, if there is one."""
        return next((self.root / file for file in self.files if PurePosixPath(file).name == name), None)

    @property
    def told(self) -> str:
        """The end of its path, where some formats tell the site: folder names count, files do not."""
        whole = PurePosixPath(self.repository or self.root.resolve().as_posix(), self.id)
        return "/".join(whole.parts[-4:])

    def __str__(self) -> str:
        if self.repository is not None:
            return self.repository if self.id == "." else f"{self.repository} {self.id}"
        return str(self.root / self.id)


def folders_with(weights: str, needed: Sequence[str], also: Sequence[str], names: Sequence[str]) -> Found:
    """Folders that hold a file of weights and the files needed with it, with others that may lie beside them."""
    known, found = set(names), {}
    for name in names:
        path = PurePosixPath(name)
        others = [str(path.with_name(other)) for other in (*needed, *also)]
        if path.name == weights and known.issuperset(others[: len(needed)]):
            found[str(path.parent)] = (name, *(other for other in others if other in known))
    return found


def files_like(pattern: str, beside: Sequence[str], names: Sequence[str]) -> Found:
    """Files whose name matches a pattern, with others that may lie beside them."""
    known, found = set(names), {}
    for name in names:
        path = PurePosixPath(name)
        if re.fullmatch(pattern, path.name):
            others = (str(path.with_name(other)) for other in beside)
            found[name] = (name, *(other for other in others if other in known))
    return found


def _gemma_scope(names: Sequence[str]) -> Found:
    return folders_with("params.npz", (), (), names) | folders_with(
        "params.safetensors", (), ("config.json",), names
    )


def _circuit_tracer(names: Sequence[str]) -> Found:
    """Single layers, and folders of cross-layer transcoders: encoders first, then decoders."""
    found = files_like(r"layer_\d+\.safetensors", ("config.yaml",), names)
    for folder in sorted({PurePosixPath(name).parent for name in names}):
        own = [name for name in names if PurePosixPath(name).parent == folder]
        parts = [_layers_of(own, side) for side in ("W_enc", "W_dec")]
        if parts[0] and parts[1]:
            config = [name for name in own if PurePosixPath(name).name == "config.yaml"]
            found[str(folder)] = (*parts[0], *parts[1], *config)
    return found


def _layers_of(names: Sequence[str], side: str) -> list[str]:
    """Files of one side of a cross-layer transcoder, by layer."""
    found = {}
    for name in names:
        layer = re.fullmatch(rf"{side}_(\d+)\.safetensors", PurePosixPath(name).name)
        if layer:
            found[int(layer[1])] = name
    return [found[layer] for layer in sorted(found)]


@dataclass(frozen=True)
class Layout:
    """How a format lays out its files."""

    holds: str
    """What it can hold, for people."""
    looks: str
    """What its files are called, for people."""
    find: Callable[[Sequence[str]], Found]
    """The dictionaries among the names of files below a place."""


LAYOUTS: dict[str, Layout] = {
    "circuitflow": Layout(
        "every kind",
        "NAME.safetensors, or the manifest {site}.json, cross_layer.json or crosscoder.json of a run",
        partial(files_like, rf".+\.safetensors|(?:{OWN_NAMES})\.json", ()),
    ),
    "sae_lens": Layout(
        "ReLU, JumpReLU, TopK, Gated; transcoders, with skip connection (TopK ones cannot be written)",
        "cfg.json, sae_weights.safetensors",
        partial(folders_with, "sae_weights.safetensors", ("cfg.json",), ()),
    ),
    "gemma_scope": Layout(
        "JumpReLU; Gemma Scope 2 also transcoders, with skip connection",
        "params.npz, or params.safetensors (Gemma Scope 2)",
        _gemma_scope,
    ),
    "dictionary_learning": Layout(
        "ReLU, JumpReLU, TopK, BatchTopK, Matryoshka, Gated",
        "ae.pt, config.json",
        partial(folders_with, "ae.pt", (), ("config.json",)),
    ),
    "sparsify": Layout(
        "TopK, of SAEs and transcoders, with skip connection",
        "cfg.json, sae.safetensors",
        partial(folders_with, "sae.safetensors", ("cfg.json",), ()),
    ),
    "circuit_tracer": Layout(
        "transcoders of single layers (ReLU, JumpReLU, TopK; skip connection) and cross-layer ones (ReLU, JumpReLU)",
        "layer_N.safetensors, or W_enc_N.safetensors and W_dec_N.safetensors; config.yaml",
        _circuit_tracer,
    ),
    "decoder": Layout(
        "a decoder alone: a tensor (d_dict, d_model), or W_dec (and b_dec)",
        "layer_N.pt, .safetensors or .npy",
        partial(files_like, r".+\.(?:pt|npy|safetensors)", ()),
    ),
}  # fmt: skip
"""Formats by name."""

WRITTEN = ("circuitflow", "sae_lens", "sparsify", "circuit_tracer")
"""Formats that can be written."""


def formats_help() -> str:
    """What each format holds and what its files are called, a line each."""
    lines = []
    for name, layout in LAYOUTS.items():
        way = "read, written" if name in WRITTEN else "read"
        lines.append(f"{name} ({way}): {layout.holds}. Files: {layout.looks}.")
    return "\n\n".join(lines)


def layout_of(format_name: str) -> Layout:
    """The layout of a format.

    :raises UserError: the format is unknown.
    """
    if format_name not in LAYOUTS:
        raise UserError(
            f"Format '{format_name}' is unknown; {nearest(format_name, LAYOUTS, limit=len(LAYOUTS))}."
        )
    return LAYOUTS[format_name]


def choose(format_name: str, names: Sequence[str], wanted: str | None, site: str | None, where: str) -> str:
    """The name of the one dictionary that is meant, among the names of the files of a place.

    ``wanted`` names a dictionary, one of its files, or a folder that holds just one, or just one of the site's layer.

    :param where: the place, for messages.
    :raises UserError: there is none or more than one; the sentence lists the nearest.
    """
    found = layout_of(format_name).find(names)
    asked = str(PurePosixPath(wanted or "."))
    if asked in found:
        return asked
    below = [name for name in found if asked == "." or PurePosixPath(name).is_relative_to(asked)]
    holding = [name for name, files in found.items() if asked in files[:1]]
    for candidates in (holding, below, _of_site(below, site)):
        if len(candidates) == 1:
            return candidates[0]
    at = f"in {where}" if asked == "." else f"at '{asked}' in {where}"
    if below:
        raise UserError(
            f"{len(below)} dictionaries of format {format_name} are {at}; name one; {_nearest(asked, below)}."
        )
    listing = f"; {_nearest(asked, found)}" if found else f" ({layout_of(format_name).looks})"
    raise UserError(f"No dictionary of format {format_name} is {at}{listing}.")


def locate(format_name: str, path: Path, site: str | None = None) -> Place:
    """The dictionary at a path on disk: a folder or a file.

    :raises UserError: the path does not exist, or does not lead to one dictionary; the sentence lists the nearest.
    """
    layout_of(format_name)
    if path.is_file():
        root, names, asked = path.parent, _own_names(path), path.name
    elif path.is_dir():
        root, names, asked = path, names_below(path), "."
    else:
        above = next(parent for parent in path.absolute().parents if parent.is_dir())
        listing = _nearest(path.name, layout_of(format_name).find(names_below(above)))
        raise UserError(
            f"Path {path} does not exist; dictionaries of format {format_name} in {above}: {listing}."
        )
    chosen = choose(format_name, names, asked, site, str(root))
    return Place(root, chosen, layout_of(format_name).find(names)[chosen])


def local_files(source: Mapping[str, str | None], site: str | None = None) -> list[Path]:
    """The files of a source on disk, for a workflow to track; none of one on the hub.

    :raises UserError: they are not there.
    """
    if source.get("id") is not None:
        return []
    place = locate(str(source["format"]), Path(str(source["path"])), site)
    return [place.root / name for name in place.files]


def detect(path: Path) -> str:
    """The format of the dictionary at a path.

    :raises UserError: there is nothing, none fits, or more than one.
    """
    if not path.exists():
        raise UserError(f"Path {path} does not exist; check it (relative paths start at {Path.cwd()}).")
    names = _own_names(path)
    fitting = [name for name, layout in LAYOUTS.items() if "." in layout.find(names)]
    if path.is_file():
        made_of_it = [name for name in fitting if path.name in LAYOUTS[name].find(names)["."]]
        fitting = made_of_it or _by_header(path)
    if len(fitting) != 1:
        which = (
            f"may be of formats {', '.join(fitting)}" if fitting else "is of no format that its files tell"
        )
        several = (
            "if it holds dictionaries, take all with --all, or name one; else "
            if path.is_dir() and not fitting
            else ""
        )
        raise UserError(
            f"{path} {which}; {several}name it (--from): {nearest('', LAYOUTS, limit=len(LAYOUTS))}."
        )
    return fitting[0]


def names_below(folder: Path) -> list[str]:
    """Files below a folder as paths relative to it, sorted; hidden folders and what lies very deep are left out."""
    found: list[str] = []
    for parent, folders, files in os.walk(folder):
        place = Path(parent).relative_to(folder)
        folders[:] = [name for name in folders if not name.startswith(".") and len(place.parts) < DEPTH]
        found += [(place / name).as_posix() for name in files]
        if len(found) > MOST_FILES:
            break
    return sorted(found)


def _own_names(path: Path) -> list[str]:
    """Files of a folder, or beside a file."""
    folder = path if path.is_dir() else path.parent
    return sorted(entry.name for entry in folder.iterdir() if entry.is_file())


def _by_header(path: Path) -> list[str]:
    """Formats of a single file, by what it holds."""
    if path.suffix != ".safetensors":
        return [name for name in ("circuitflow", "decoder") if path.name in LAYOUTS[name].find([path.name])]
    try:
        with safe_open(path, framework="numpy") as opened:
            keys, metadata = set(opened.keys()), opened.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"File {path} cannot be read as safetensors ({error}); fetch it again.") from None
    if DESCRIPTION in metadata:
        return ["circuitflow"]
    if {"W_enc", "b_enc", "W_dec"} <= keys:
        return ["circuit_tracer"]
    return ["decoder"] if "W_dec" in keys else []


def _of_site(names: Iterable[str], site: str | None) -> list[str]:
    """The names that can be of a site's block."""
    if site is None:
        return []
    wanted, chosen = parse_site(site), []
    for name in names:
        hint = hint_of_path(name)
        transcoder = hint.kind == "mlp" and wanted.kind == "mlp_in"
        same_kind = transcoder or hint.kind in (None, wanted.kind)
        if hint.layer == wanted.layer and same_kind and (hint.layer is not None or hint.kind is not None):
            chosen.append(name)
    return chosen


def _nearest(wanted: str, names: Iterable[str]) -> str:
    """:func:`~circuitflow.errors.nearest` with the most alike names first, as there may be thousands."""
    by_number = sorted(names, key=lambda name: ([int(part) for part in re.findall(r"\d+", name)], name))
    if wanted != ".":
        by_number.sort(key=lambda name: -difflib.SequenceMatcher(None, wanted, name).ratio())
    return nearest(wanted, by_number)
