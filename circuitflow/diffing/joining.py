"""The stage ``join_activations``: stores of two models as one, so that a crosscoder reads both like any other store.

The shard files are not copied but linked: a shard is the same file whatever its array is called.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.models.prepared import load_tokenizer
from circuitflow.progress import logger
from circuitflow.store.arrays import SHARDS, Store, open_store
from circuitflow.store.files import atomic_path, read_json, write_json
from circuitflow.store.layout import Layout, Shard, array_contents, content_digest, write_metadata

BASE, TUNED = "base", "tuned"
"""What stands before the sites of the run's own model and of the second one: ``base:resid.12``."""

MODELS = (BASE, TUNED)
COPIED = "the file system knows no links: shards are copied, which takes their room once more"


def arrays_read(params: Mapping[str, Any]) -> dict[str, list[str]]:
    """The arrays that :func:`join_activations` reads of each store; the others may change."""
    return {name: [params["site"]] for name in MODELS}


def join_activations(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. One store with the arrays ``base:{site}`` and ``tuned:{site}``, rows of the same tokens side by side.

    Inputs ``base``, ``tuned`` (store manifests of the same corpus), ``model_base``, ``model_tuned`` (manifests). Param
    ``site``.

    :raises UserError: the models have different tokenizers or widths, the stores are of different text, or a shard is
        damaged.
    """
    site = params["site"]
    check_tokenizers(inputs["model_base"], inputs["model_tuned"])
    stores = {name: open_store(inputs[name]) for name in MODELS}
    layout = joint_layout(stores, site)
    write_metadata(out.folder, layout)
    shards: dict[str, list[Shard]] = {}
    copied = False
    for name, store in stores.items():
        recorded = read_json(store.folder / SHARDS)["shards"][site]
        shards[f"{name}:{site}"] = [Shard(*shard) for shard in recorded]
        for index in range(layout.n_shards):
            store.check_shard(site, index)  # a link would spread damage
            copied |= not _link(
                store.layout.file(store.folder, site, index),
                layout.file(out.folder, f"{name}:{site}", index),
            )
    if copied:
        logger.info(COPIED)
    contents = array_contents(layout, shards)
    write_json(out.folder / SHARDS, {**layout.as_dict(), "shards": shards})
    out.content = content_digest(contents)
    out.details.update({**layout.as_dict(), "contents": contents})


def joint_layout(stores: Mapping[str, Store], site: str) -> Layout:
    """Layout of the joint store.

    :raises UserError: the stores differ in anything but their values.
    """
    base, tuned = (stores[name] for name in MODELS)
    check_widths(base.shape(site)[1], tuned.shape(site)[1], site)
    same = (base.rows, base.layout.shard_rows, base.attrs) == (
        tuned.rows,
        tuned.layout.shard_rows,
        tuned.attrs,
    )
    if not same:
        raise UserError(
            f"Stores {base.manifest} and {tuned.manifest} are of different text, or cut differently; delete the second "
            "and run again."
        )
    arrays = {f"{name}:{site}": store.arrays[site] for name, store in stores.items()}
    return Layout(arrays, base.layout.shard_rows, base.attrs)


def check_tokenizers(base: Path, tuned: Path) -> None:
    """The second model must give each of the first's tokens the same number; it may have more.

    :raises UserError: they do not.
    """
    check_vocabularies(*(load_tokenizer(manifest).get_vocab() for manifest in (base, tuned)))


def check_vocabularies(first: Mapping[str, int], second: Mapping[str, int]) -> None:
    """:func:`check_tokenizers` of tokens with their numbers."""
    differing = {word for word, number in first.items() if second.get(word) != number}
    if differing:
        raise UserError(
            f"The second model (diffing.model) has another tokenizer: {len(differing)} of {len(first)} tokens differ, "
            f"for example {min(differing)!r}; compare models that share one."
        )


def check_widths(base: int, tuned: int, site: str) -> None:
    """The second model must be as wide at the site as the first.

    :raises UserError: it is not.
    """
    if base != tuned:
        raise UserError(
            f"The second model (diffing.model) is {tuned} wide at {site}, but the run's is {base}; a crosscoder needs "
            "models of one width."
        )


def _link(source: Path, target: Path) -> bool:
    """A second name of the same file; False and a copy where the file system knows no links."""
    with atomic_path(target) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
            return False
    return True
