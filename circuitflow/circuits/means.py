"""Mean activations of a site over the patched inputs of a split, by case and position: what ablated nodes become."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.circuits.replacement import Cells, CellValues
from circuitflow.data.token_pairs import TokenPairs, load_token_pairs
from circuitflow.dictionaries.codes import Codes, codes_from_dense
from circuitflow.dictionaries.dictionary import Dictionary, load_dictionary
from circuitflow.dictionaries.tensors import read_tensors, write_tensors
from circuitflow.errors import UserError
from circuitflow.jobs import Output, progress
from circuitflow.provenance import file_digest
from circuitflow.store.arrays import Store, open_store
from circuitflow.store.objects import read_manifest

KIND = "means"
FILE = "means.safetensors"
CHUNK = 64
"""Prompts read at once."""


def cache_means(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE (means). Means of a site's features, and of its whole vector, over the patched inputs.

    Inputs ``dictionary``, and of one split ``tokens``, ``gradients`` (arrays ``{site}/clean``,
    ``{site}/patched``); params ``site``, ``compute``. A pair without a patched input gives its clean one.
    Tensors, by cell (case and position): ``whole`` (cells, d_model), ``count`` (prompts), and the means of features
    that are active in any prompt, as sparse rows ``offsets``, ``features``, ``values``. Raw activation units.

    :raises UserError: the dictionary has no encoder, or is of another width.
    """
    store, pairs = open_store(inputs["gradients"]), load_token_pairs(inputs["tokens"])
    width = store.shape(f"{params['site']}/clean")[-1]
    dictionary = load_dictionary(inputs["dictionary"], width).to(params["compute"]["device"])
    means = means_of_store(store, params["site"], pairs, dictionary)
    values = means.values()
    tensors = {
        "whole": values.whole,
        "count": means.count,
        "offsets": values.features.offsets,
        "features": values.features.features,
        "values": values.features.values,
    }
    described = {
        "site": params["site"],
        "cases": list(values.cells.cases),
        "pos": values.cells.pos,
        "d_dict": dictionary.d_dict,
    }
    write_tensors(out.folder / FILE, tensors, described)
    out.content = file_digest(out.folder / FILE)
    out.details = {
        **described,
        "prompts": len(pairs),
        "features": int(values.features.features.unique().numel()),
    }


def load_means(path: Path, dictionary: Dictionary) -> CellValues:
    """Means from the manifest of cache_means.

    :raises UserError: missing, damaged, or made with another dictionary.
    """
    file = read_manifest(path, kind=KIND).folder(path) / FILE
    tensors, described = read_tensors(file)
    if described is None or not {"whole", "offsets", "features", "values"} <= set(tensors):
        raise UserError(f"File {file} holds no means; delete it and run the stage cache_means again.")
    if described["d_dict"] != dictionary.d_dict or tensors["whole"].shape[1] != dictionary.d_model:
        raise UserError(f"Means {path} are of another dictionary; run the stage cache_means again.")
    features = Codes(tensors["offsets"], tensors["features"], tensors["values"], described["d_dict"])
    return CellValues(Cells(tuple(described["cases"]), described["pos"]), tensors["whole"], features)


class Means:
    """Means of a site by cell; prompts may come in any batches."""

    def __init__(self, dictionary: Dictionary, cells: Cells) -> None:
        self.dictionary, self.cells = dictionary, cells
        device = dictionary.W_dec.device
        self._whole = torch.zeros(cells.n, dictionary.d_model, dtype=torch.float64, device=device)
        self._features = torch.zeros(cells.n * dictionary.d_dict, dtype=torch.float64, device=device)
        self.count = torch.zeros(cells.n, dtype=torch.float64, device=device)

    def add(self, x: Float[Tensor, "batch pos d_model"], pairs: TokenPairs) -> None:
        """Take in the activations of some prompts."""
        row, position = pairs.mask.bool().nonzero(as_tuple=True)
        cell = self.cells.of(pairs)[row, position]
        codes = self.dictionary.encode(x[row, position], position)
        self._whole.index_add_(0, cell, x[row, position].double())
        entry = cell[codes.rows()] * self.dictionary.d_dict + codes.features
        self._features.index_add_(0, entry, codes.values.double())
        self.count.index_add_(0, cell, torch.ones_like(cell, dtype=torch.float64))

    def values(self) -> CellValues:
        """The means; cells without a token are NaN, so that using one cannot pass unnoticed."""
        count, dtype = self.count[:, None], self.dictionary.W_dec.dtype
        features = self._features.view(self.cells.n, -1) / count.clamp(min=1)
        return CellValues(self.cells, (self._whole / count).to(dtype), codes_from_dense(features.to(dtype)))


def means_of_store(store: Store, site: str, pairs: TokenPairs, dictionary: Dictionary) -> Means:
    """Means of a site over cached patched inputs; over the clean input of a pair that has no patched one."""
    means, device = Means(dictionary, Cells.over(pairs)), dictionary.W_dec.device
    for start in range(0, len(pairs), CHUNK):
        stop = min(start + CHUNK, len(pairs))
        here = pairs[start:stop]
        means.add(patched_or_clean(store, site, here, slice(start, stop)).to(device), here.to(device))
        progress("prompts", stop, len(pairs))
    return means


def patched_or_clean(
    store: Store, site: str, pairs: TokenPairs, rows: slice
) -> Float[Tensor, "n pos d_model"]:
    """Cached activations of the patched inputs, of clean ones where there is none."""
    clean, patched = (
        torch.from_numpy(store.read(f"{site}/{run}", rows.start, rows.stop)) for run in ("clean", "patched")
    )
    return torch.where(pairs.has_patch[:, None, None], patched, clean)
