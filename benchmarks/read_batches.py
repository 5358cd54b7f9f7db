"""Share of a dictionary training that is spent on reading its batches: what several trainings in one pass could save.

    python benchmarks/read_batches.py

An epoch is read once with all rows in memory, as by default, and once in windows of a quarter of the rows.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from circuitflow.dictionaries.normalisation import Normalisation
from circuitflow.dictionaries.topk import AuxK, TopK
from circuitflow.dictionaries.trainer import Schedule, Trainer, first_weights
from circuitflow.store.arrays import ArraySpec, StoreWriter, open_store
from circuitflow.store.objects import Manifest
from circuitflow.store.shuffle import ShuffledRows

SITE, D_MODEL, D_DICT, K, SHARD_ROWS = "resid.0", 576, 4608, 32, 8192


def write(root: Path, rows: int, dtype: str) -> Path:
    """A store of random rows."""
    rng = np.random.default_rng(0)
    writer = StoreWriter(root / "objects" / "s", {SITE: ArraySpec((rows, D_MODEL), dtype)}, SHARD_ROWS)
    for index in writer.missing():
        start, stop = writer.bounds(index)
        writer.write_shard(index, {SITE: rng.standard_normal((stop - start, D_MODEL), dtype=np.float32)})
    content, details = writer.finish()
    Manifest("store", "s", content, {}, details).write(root / "s.json")
    return root / "s.json"


def epoch(batches: ShuffledRows, trainer: Trainer) -> tuple[float, float]:
    """Seconds of an epoch spent on reading, and on everything else."""
    normalisation = Normalisation(torch.zeros(D_MODEL), D_MODEL**0.5)
    reading = training = 0.0
    for index in range(batches.batches_per_epoch):
        started = time.perf_counter()
        x = torch.from_numpy(batches.batch_at(index)[SITE])
        read = time.perf_counter()
        trainer.step(normalisation.apply(x))
        reading += read - started
        training += time.perf_counter() - read
    return reading, training


def main() -> None:
    """Print one line for each batch size and buffer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=65_536)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32", help="of the store: float32, float16 or bfloat16")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(write(Path(folder), asked.rows, asked.dtype))
        for batch in (1024, 4096):
            for buffer in (asked.rows, asked.rows // 4):
                objective = TopK(K, AuxK(D_MODEL // 2, 0.0))
                weights = first_weights(objective, D_MODEL, D_DICT, 0)
                trainer = Trainer(objective, weights, Schedule(1e-4, 1000, 0.0, 0.0), 1 << 60)
                trainer.step(torch.zeros(batch, D_MODEL))  # loads the kernels
                reading, training = epoch(ShuffledRows(store, [SITE], batch, buffer, 0), trainer)
                print(
                    f"batch {batch:5d}, {buffer:7d} of {asked.rows} rows in memory: {reading:5.2f} s reading, "
                    f"{training:6.2f} s training, {reading / (reading + training):.1%} reading"
                )


if __name__ == "__main__":
    main()
