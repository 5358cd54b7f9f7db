"""Peak memory of the activation harvest against the length of the corpus: it should stay flat.

Each measurement is a process of its own, so that one peak cannot hide another:

    python benchmarks/harvest_memory.py
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

BLOCK, WIDTH, VOCABULARY = 128, 256, 1000
SITES = ["resid.0", "resid.1"]

ROW_BYTES = WIDTH * 4 * len(SITES)
"""Bytes that a token takes in the store."""


@dataclass(frozen=True)
class Peak:
    """Highest resident memory of a harvest."""

    rows: int
    megabytes: float


def peak(blocks: int) -> Peak:
    """Harvest ``blocks`` blocks in a fresh process and return its peak."""
    command = [sys.executable, __file__, "--blocks", str(blocks)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def measure(blocks: int) -> Peak:
    """Harvest in this process."""
    import numpy as np
    import torch

    from circuitflow.data import activations
    from circuitflow.jobs import Output
    from circuitflow.models.running import LanguageModel
    from circuitflow.models.toy import random_model, toy_config
    from circuitflow.store.arrays import ArraySpec, StoreWriter
    from circuitflow.store.objects import Manifest

    torch.set_num_threads(1)
    config = toy_config("llama", layers=2, d_model=WIDTH, heads=4, vocab=VOCABULARY)
    model = LanguageModel(random_model(config, seed=0), tokenizer=None)
    activations.load_model = lambda manifest, dtype, device: model
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        tokens = np.random.default_rng(0).integers(0, VOCABULARY, (blocks, BLOCK))
        writer = StoreWriter(root / "objects" / "c", {"tokens": ArraySpec(tokens.shape, "int32")}, blocks)
        writer.write_shard(0, {"tokens": tokens})
        content, details = writer.finish()
        corpus = root / "corpus.json"
        Manifest("store", "c", content, {}, details).write(corpus)
        params = {"sites": SITES, "dtype": "float32", "shard_rows": 16 * BLOCK, "batch_blocks": 8}
        params |= {"model_dtype": "float32", "compute": {"threads": 1, "device": "cpu"}}
        activations.cache_activations({"model": root, "corpus": corpus}, params, Output(root / "out", {}, {}))
    return Peak(blocks * BLOCK, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    """Print one line per corpus length, or the measurement asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, help="measure this one in this process and print JSON")
    wanted = parser.parse_args().blocks
    if wanted is not None:
        print(json.dumps(vars(measure(wanted))))
        return
    for blocks in (64, 128, 256, 512):
        found = peak(blocks)
        stored = found.rows * ROW_BYTES / 2**20
        print(f"{found.rows:7d} tokens ({stored:5.0f} MB stored): peak {found.megabytes:6.1f} MB")


if __name__ == "__main__":
    main()
