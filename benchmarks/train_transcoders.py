"""Training of a transcoder and of a cross-layer transcoder beside the encoder's product alone, taking turns.

    python benchmarks/train_transcoders.py

A step of TopK training reads its batch once through the encoder, a dense product that nothing can avoid; the rest is
sparse. Times are CPU seconds (of all threads) and wall seconds for each batch; compare times of one run alone. Data
are random: nothing in a step depends on their structure but which features are on.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuitflow.dictionaries.dictionary import linear
from circuitflow.dictionaries.joint import Joint
from circuitflow.dictionaries.kinds import Request, objective_of
from circuitflow.dictionaries.memory import estimate
from circuitflow.dictionaries.settings import Settings, used_family_settings
from circuitflow.dictionaries.trainer import Schedule, Trainer, first_joint_weights, first_weights
from circuitflow.dictionaries.wiring import Wiring, cross_layer, transcoder

RESULTS = Path(__file__).parents[1] / "results" / "benchmarks" / "train_transcoders.json"


def request_of(sizes: argparse.Namespace, layers: int) -> Request:
    """A transcoder, or a cross-layer transcoder of several layers."""
    wiring = Wiring.of(transcoder(0) if layers == 1 else cross_layer(range(layers)))
    values = {
        "kind": "topk",
        "d_dict": sizes.d_dict,
        "k": sizes.k,
        "training": {"batch": sizes.batch, "clip_norm": 0.01},
    }
    used = used_family_settings(values, "single" if layers == 1 else "cross_layer")
    return Request(wiring.name, sizes.d_model, Settings.of(used), wiring)


def step_of(sizes: argparse.Namespace, layers: int) -> Callable[[], Any]:
    """A step of its training on a batch."""
    request = request_of(sizes, layers)
    objective = objective_of(request)
    if isinstance(objective, Joint):
        weights = first_joint_weights(objective, 0)
    else:
        weights = first_weights(objective, sizes.d_model, sizes.d_dict, 0, d_out=sizes.d_model)
    trainer = Trainer(objective, weights, Schedule(1e-4, 1000, 0.0, 0.0), 1 << 60, clip_norm=0.01)
    x, y = batch(sizes, layers, 1), batch(sizes, layers, 2)
    return lambda: trainer.step(x, y)


def product_of(sizes: argparse.Namespace, layers: int) -> Callable[[], Any]:
    """The encoders' products of one batch, a block of rows at a time, as a step takes them."""
    encoder = torch.randn(sizes.d_dict, sizes.d_model)
    parts = batch(sizes, layers, 1).split(sizes.d_model, dim=1)
    blocks = [block.contiguous() for part in parts for block in part.split(512)]

    def product() -> None:
        for block in blocks:
            linear(block, encoder)

    return product


def batch(sizes: argparse.Namespace, layers: int, seed: int) -> Tensor:
    """Random vectors with mean ‖x‖² = 1 at every layer."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sizes.batch, layers * sizes.d_model, generator=generator) / sizes.d_model**0.5


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """CPU and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    """Take turns and write medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("layers", 6), ("d_model", 576), ("d_dict", 1152), ("k", 16), ("batch", 4096)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    sizes = parser.parse_args()
    torch.set_num_threads(sizes.threads)
    contestants = {
        "encoder product of one layer": product_of(sizes, 1),
        "transcoder": step_of(sizes, 1),
        f"encoder products of {sizes.layers} layers": product_of(sizes, sizes.layers),
        f"cross-layer transcoder of {sizes.layers} layers": step_of(sizes, sizes.layers),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for number in range(sizes.rounds + 1):
        for name, work in contestants.items():
            times = timed(work)
            if number:  # the first compiles
                found[name].append(times)
    rows = {}
    for name, times in found.items():
        cpu, wall = (statistics.median(column) for column in zip(*times, strict=True))
        rows[name] = {"cpu_seconds": cpu, "wall_seconds": wall}
        print(f"{name:<42} {cpu:8.3f} CPU s {wall:8.3f} s for {sizes.batch} tokens")
    names = list(rows)
    for floor, name in ((names[0], names[1]), (names[2], names[3])):
        print(
            f"{name}: {rows[name]['cpu_seconds'] / rows[floor]['cpu_seconds']:.2f} times its encoders' products"
        )
    needed = estimate(request_of(sizes, sizes.layers), 65_536, 4 * sizes.d_model * sizes.layers, 4096)
    print(f"{names[3]}: {needed}")
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"sizes": vars(sizes), "found": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
