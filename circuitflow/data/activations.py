"""Stage ``cache_activations``: the values at every requested site for every token of the corpus, in one store."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from circuitflow.errors import UserError
from circuitflow.jobs import Output, progress
from circuitflow.models.loading import load_model
from circuitflow.models.running import LanguageModel, run
from circuitflow.progress import logger
from circuitflow.store.arrays import ArraySpec, StoreWriter, open_store


def cache_activations(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """Run the model over the corpus, once per batch for all sites, no deeper than the deepest of them.

    The store has one array per site, (blocks · block, width), its rows in the order of the corpus: row r is position
    r mod block of block r div block. Its attributes are those of the corpus and ``block``. A shard is finished before
    the next begins, and batches are cut within a shard, so that no value depends on where a killed run went on.

    :param inputs: manifests ``model`` and ``corpus``.
    :param params: ``sites``, ``dtype`` (on disk), ``shard_rows`` (a multiple of the corpus's block), ``batch_blocks``,
        ``model_dtype`` and ``compute``.
    :raises UserError: a site that the model lacks, a shard size that cuts blocks, values too large for ``dtype``, or
        a full disk.
    """
    corpus = open_store(inputs["corpus"])
    blocks, block = corpus.shape("tokens")
    if params["shard_rows"] % block:
        raise UserError(
            f"Key activations.shard_rows is {params['shard_rows']}, but shards hold whole blocks of {block} tokens; "
            f"set it to {max(1, params['shard_rows'] // block) * block}."
        )
    lm = load_model(inputs["model"], dtype=params["model_dtype"], device=params["compute"]["device"])
    specs = {site: ArraySpec((blocks * block, lm.width(site)), params["dtype"]) for site in params["sites"]}
    writer = StoreWriter(out.folder, specs, params["shard_rows"], {**corpus.attrs, "block": block})
    shards = {index: _blocks_of(writer, index, block) for index in writer.missing()}
    done = blocks - sum(stop - start for start, stop in shards.values())
    if done:
        logger.info("going on after an interruption: %d of %d blocks are kept", done, blocks)

    def advance(batch: int) -> None:
        nonlocal done
        done += batch
        progress("blocks", done, blocks)

    advance(0)
    for index, (start, stop) in shards.items():
        tokens = corpus.read("tokens", start, stop)
        writer.write_shard(index, harvest(lm, tokens, params["sites"], params["batch_blocks"], advance))
    out.content, details = writer.finish()
    out.details.update(details)


def harvest(
    lm: LanguageModel,
    tokens: Int[np.ndarray, "blocks block"],
    sites: Sequence[str],
    batch_blocks: int,
    advance: Callable[[int], None],
) -> dict[str, Float[np.ndarray, "tokens width"]]:
    """Values at the sites for each token, float32: one pass per batch of blocks, and ``advance`` hears of each."""
    values = {site: np.empty((tokens.size, lm.width(site)), np.float32) for site in sites}
    block = tokens.shape[1]
    for start in range(0, len(tokens), batch_blocks):
        batch = torch.from_numpy(tokens[start : start + batch_blocks]).to(lm.device, torch.int64)
        captured = run(lm, batch, torch.ones_like(batch, dtype=torch.bool), capture=sites).sites
        rows = slice(start * block, (start + len(batch)) * block)
        for site in sites:
            values[site][rows] = captured[site].flatten(0, 1).float().cpu().numpy()
        advance(len(batch))
    return values


def _blocks_of(writer: StoreWriter, shard: int, block: int) -> tuple[int, int]:
    start, stop = writer.bounds(shard)
    return start // block, stop // block
