"""Attribution graphs beside circuit-tracer's: time, memory and equality, in turns on one machine.

A model of SmolLM2's shape (d_model 576, 9 heads, 3 key-value heads; a small vocabulary, the same for both) with random
TopK transcoders (4,608 features, k 32), a prompt of 12 tokens, the 2,048 most influential features. circuit-tracer
runs at its best batch size on this setting (32) and at its default (512). Needs its environment (`make peers`).

    python benchmarks/attribution_graphs.py [--layers 6 30] [--rounds 3] [--threads 2] [--batches 32 512]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _setting import product_speed, verdict
from safetensors.torch import load_file, save_file

from circuitflow.graphs.graph import Graph
from circuitflow.models.toy import random_model, toy_config

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(__file__).with_name("peers")
PEERS = Path(os.environ.get("CIRCUITFLOW_PEERS") or ROOT / ".venv-peers")
D_MODEL, HEADS, KV_HEADS, D_MLP, VOCABULARY = 576, 9, 3, 1536, 1000
D_DICT, K, MAX_NODES = 4608, 32, 2048
TOKENS = list(range(3, 15))
UPDATE = 128
"""Both compute the order of influence again after so many features: 4 batches of 32, circuit-tracer's way."""
OUR_BATCH = 256
TOLERANCE = 1e-4


@dataclass
class Contestant:
    """A process that builds graphs, and what its rounds took."""

    process: subprocess.Popen[str]
    answers: Any
    batch: int
    rounds: list[dict[str, float]] = field(default_factory=list)

    def build(self, keep: Path | None = None) -> dict[str, float]:
        """One graph."""
        assert self.process.stdin is not None
        self.process.stdin.write(
            json.dumps({"batch": self.batch, "keep": str(keep) if keep else None}) + "\n"
        )
        self.process.stdin.flush()
        return self.hear()

    def hear(self) -> dict[str, float]:
        """Its next answer."""
        line = self.answers.readline()
        if not line:
            sys.exit(f"A contestant ended early: {self.process.args}")
        return dict(json.loads(line))

    def median(self, name: str) -> float:
        """Of its rounds."""
        return statistics.median(took[name] for took in self.rounds)


def write_setting(folder: Path, layers: int) -> None:
    """Model, transcoders and what is asked, in files that both read."""
    config = toy_config(
        "llama", layers=layers, d_model=D_MODEL, heads=HEADS, vocab=VOCABULARY, num_key_value_heads=KV_HEADS,
        intermediate_size=D_MLP,
    )  # fmt: skip
    random_model(config, 0).save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    for layer in range(layers):
        rows = torch.randn(2, D_DICT, D_MODEL, generator=generator) / D_MODEL**0.5
        tensors = {"W_enc": rows[0].clone(), "W_dec": 0.05 * rows[1]}
        zeros = {"b_enc": torch.zeros(D_DICT), "b_dec": torch.zeros(D_MODEL)}
        save_file(tensors | zeros, folder / f"member_{layer}.safetensors")
    asked = {
        "tokens": TOKENS, "max_nodes": MAX_NODES, "max_logits": 10, "probability": 0.95, "k": K, "update": UPDATE,
        "rope_theta": 10000, "cross_layer": False,
    }  # fmt: skip
    (folder / "family.json").write_text(json.dumps(asked))


def contestant(python: Path | str, script: str, folder: Path, threads: int, batch: int) -> Contestant:
    """Start one; it has loaded when it has answered."""
    answers, theirs = os.pipe()
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "ANSWERS": str(theirs),
    }
    if python == sys.executable:
        variables["PYTHONPATH"] = str(ROOT)
    else:
        variables.pop("PYTHONPATH", None)
    process = subprocess.Popen(
        [str(python), str(SCRIPTS / script), str(folder), str(threads)], pass_fds=[theirs], env=variables, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(theirs)
    made = Contestant(process, os.fdopen(answers), batch)
    made.hear()
    return made


def floor_seconds(layers: int, threads: int) -> tuple[float, float]:
    """GFLOP of the products that cannot be left out, and their seconds at the speed of a plain product here.

    W_O and W_V of every layer below a target at the positions that it sees, for targets spread evenly over layers and
    positions, and the products with what is written there.
    """
    positions = (len(TOKENS) + 1) / 2
    below = (layers - 1) / 2
    attention = 2 * D_MODEL * D_MODEL + 2 * D_MODEL * D_MODEL * KV_HEADS // HEADS
    written = 2 * (K + 1) * D_MODEL
    total = MAX_NODES * below * positions * (attention + written) / 1e9
    torch.set_num_threads(threads)
    return total, total / max(product_speed() for _ in range(3))


def difference(ours: Path, theirs: Path) -> tuple[int, float]:
    """Features that both graphs have, and the largest difference of all effects among them by the largest effect.

    They agree on every feature that has influence at all; those of the last layer before the last position have none,
    and which of these fill up the number is chance.
    """
    graph, found = Graph.load(ours), load_file(theirs)
    mine = {tuple(feature): node for node, feature in enumerate(graph.features.tolist())}
    other = {tuple(feature): node for node, feature in enumerate(found["features"].tolist())}
    both = sorted(set(mine) & set(other))
    rest = np.arange(graph.n_nodes - len(graph.features))
    a = np.concatenate([[mine[key] for key in both], rest + len(graph.features)]).astype(int)
    b = np.concatenate([[other[key] for key in both], rest + len(other)]).astype(int)
    first, second = graph.dense()[np.ix_(a, a)], found["adjacency"].numpy()[np.ix_(b, b)]
    return len(both), float(np.abs(first - second).max() / np.abs(second).max())


def compare(layers: int, batches: list[int], rounds: int, threads: int) -> None:
    """Measure one depth and say what was found."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_setting(folder, layers)
        found = {"circuitflow": contestant(sys.executable, "graphs_ours.py", folder, threads, OUR_BATCH)}
        peer = PEERS / "circuit-tracer" / "bin" / "python"
        for batch in batches if peer.is_file() else []:
            found[f"circuit-tracer, batch {batch}"] = contestant(
                peer, "graphs_circuit_tracer.py", folder, threads, batch
            )
        if not peer.is_file():
            print(f"Skipped: no environment of circuit-tracer in {PEERS}; run `make peers`.")
        kept = {one: folder / f"graph_{number}.safetensors" for number, one in enumerate(found)}
        for one, entrant in found.items():  # a first call is not counted if there are others
            first = entrant.build(kept[one])
            entrant.rounds += [] if rounds else [first]
        for number in range(rounds):
            order = list(found)
            for one in [*order[number % len(order) :], *order[: number % len(order)]]:
                found[one].rounds.append(found[one].build())
        for entrant in found.values():
            entrant.process.communicate()
        say(layers, found, kept, threads)


def say(layers: int, found: dict[str, Contestant], kept: dict[str, Path], threads: int) -> None:
    """One line a contestant, and the goals."""
    flop, floor = floor_seconds(layers, threads)
    print(f"{layers} layers, {MAX_NODES} features, {len(TOKENS)} tokens, {threads} threads")
    print(f"  floor: {flop:.0f} GFLOP of products, {floor:.2f} s at the speed of a plain product")
    for name, entrant in found.items():
        seconds, cpu, peak = (entrant.median(key) for key in ("seconds", "cpu", "peak"))
        print(f"  {name:26s} {seconds:7.2f} s  {cpu:7.2f} s of processor time  {peak:7.0f} MB above loading")
    ours, *others = found
    for name in others:
        rounds = zip(found[name].rounds, found[ours].rounds, strict=True)
        quicker = statistics.median(b["seconds"] / a["seconds"] for b, a in rounds)
        memory = found[ours].median("peak") / found[name].median("peak")
        common, apart = difference(kept[ours], kept[name])
        print("  " + verdict(f"{quicker:.1f}× the speed of {name}", "≥ 1.5×", quicker >= 1.5))
        print("  " + verdict(f"{memory:.2f}× its memory", "≤ 1×", memory <= 1))
        print(
            "  "
            + verdict(f"adjacency of {common} shared features {apart:.1e} apart", "1e-4", apart < TOLERANCE)
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 30])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 512])
    options = parser.parse_args()
    for depth in options.layers:
        compare(depth, options.batches, options.rounds, options.threads)
