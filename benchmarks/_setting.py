"""What the benchmarks of attribution share: the model, pairs and dictionaries, timing in turns, memory and plots."""

import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuitflow.attribution.cached import PARTS, Cached
from circuitflow.attribution.gradients import gradients_of
from circuitflow.data.metrics import Metric
from circuitflow.data.token_pairs import TokenPairs
from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.models.running import LanguageModel
from circuitflow.models.toy import random_model, toy_config

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "benchmarks"
METRIC = Metric("logit_difference", "max")
VOCABULARY = 50304
PRODUCT = 768
"""The product that is timed beside each round is PRODUCT³."""


@dataclass(frozen=True)
class Sizes:
    """A model of Pythia-70m's shape, prompts, and a dictionary at every site."""

    layers: int = 6
    d_model: int = 512
    heads: int = 8
    d_dict: int = 8192
    k: int = 64
    prompts: int = 16
    length: int = 12
    first_change: int = 2
    threads: int = 2

    @property
    def sites(self) -> list[str]:
        """Embeddings, and of every layer attention, MLP and residual stream."""
        return [
            "embed",
            *(f"{kind}.{layer}" for layer in range(self.layers) for kind in ("attn", "mlp", "resid")),
        ]


@dataclass
class Setting:
    """Everything that the contestants are given."""

    sizes: Sizes
    lm: LanguageModel
    pairs: TokenPairs
    dictionaries: dict[str, Dictionary]

    def arrays(self) -> dict[str, Tensor]:
        """Two forward passes and a backward pass."""
        return gradients_of(self.lm, self.pairs, self.sizes.sites, METRIC)

    def cached(self, arrays: Mapping[str, Tensor]) -> dict[str, Cached]:
        """The same by site."""
        return {site: Cached(*(arrays[f"{site}/{part}"] for part in PARTS)) for site in self.sizes.sites}


def make(sizes: Sizes) -> Setting:
    """Random weights in float32, all drawn by seed."""
    torch.set_num_threads(sizes.threads)
    config = toy_config(
        "gpt_neox", layers=sizes.layers, d_model=sizes.d_model, heads=sizes.heads, vocab=VOCABULARY
    )
    lm = LanguageModel(random_model(config, 0), None)
    dictionaries = {site: dictionary(site, sizes, seed) for seed, site in enumerate(sizes.sites)}
    return Setting(sizes, lm, pairs(sizes), dictionaries)


def pairs(sizes: Sizes) -> TokenPairs:
    """Pairs of random prompts that differ from position ``first_change`` on, read at their last position."""
    generator = torch.Generator().manual_seed(0)
    n, last = sizes.prompts, sizes.length - 1
    clean = torch.randint(3, VOCABULARY, (n, sizes.length), generator=generator)
    patch = clean.clone()
    patch[:, sizes.first_change] = (clean[:, sizes.first_change] + 1) % VOCABULARY
    answers = torch.randint(3, VOCABULARY, (n, 2), generator=generator)
    return TokenPairs(
        clean=clean,
        patch=patch,
        has_patch=torch.ones(n, dtype=torch.bool),
        mask=torch.ones(n, sizes.length, dtype=torch.bool),
        position=torch.full((n,), last),
        first_change=torch.full((n,), sizes.first_change),
        right=answers[:, :1],
        wrong=answers[:, 1:],
        pair=torch.arange(n),
        case=["all"] * n,
    )


def dictionary(site: str, sizes: Sizes, seed: int) -> Dictionary:
    """TopK over random directions."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sizes.d_dict, sizes.d_model, generator=generator) / sizes.d_model**0.5
    zeros, at = torch.zeros(sizes.d_dict), (site,)
    return Dictionary(
        "topk", at, at, "topk", rows, zeros, rows.clone(), torch.zeros(sizes.d_model), settings={"k": sizes.k}
    )


@dataclass
class Timed:
    """Seconds of each round, by the clock and of processor time, and the speed of a plain product just before."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    gflops: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        """The quickest round: other processes can only slow a round down."""
        return min(self.seconds)


def in_turns(contestants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Timed]:
    """Time all of them, in turns and in another order each round, after one call that is not counted."""
    for contestant in contestants.values():
        contestant()
    found = {name: Timed() for name in contestants}
    names = list(contestants)
    for number in range(rounds):
        shift = number % len(names)
        for name in [*names[shift:], *names[:shift]]:
            found[name].gflops.append(product_speed())
            used, started = time.process_time(), time.perf_counter()
            contestants[name]()
            found[name].seconds.append(time.perf_counter() - started)
            found[name].cpu.append(time.process_time() - used)
    return found


def product_speed() -> float:
    """GFLOP/s of a square product."""
    a = torch.ones(PRODUCT, PRODUCT)
    started = time.perf_counter()
    a @ a
    return float(2 * PRODUCT**3 / (time.perf_counter() - started) / 1e9)


def ratio(slow: Timed, quick: Timed) -> float:
    """How many times quicker the second is: the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(slow.seconds, quick.seconds, strict=True))


def extra_memory(work: Callable[[], Any]) -> float:
    """MB by which resident memory rises at most while ``work`` runs (Linux)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    kept = work()
    peak = resident("VmHWM")
    del kept
    return peak - before


def resident(name: str) -> float:
    """A figure of /proc/self/status in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def in_process(script: str, *arguments: str) -> Any:
    """Run a benchmark's script with these arguments and read the JSON of its last line."""
    done = subprocess.run([sys.executable, script, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def verdict(found: str, wanted: str, met: bool) -> str:
    return f"{'met   ' if met else 'MISSED'} {found} (wanted: {wanted})"


def draw_growth(
    path: Path, found: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]], title: str
) -> None:
    """Time and memory against one size at a time: a column a size, a line a contestant.

    :param found: by size and contestant, points with ``value``, ``seconds`` and ``megabytes``.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    from circuitflow.plots.style import Palette

    palette = Palette()
    colours = [palette.feature, palette.error, palette.negative, palette.random]
    figure, grid = plt.subplots(
        2, len(found), figsize=(2.9 * len(found), 5), sharex="col", sharey="row", squeeze=False
    )
    for column, (size, lines) in enumerate(found.items()):
        for row, (what, label) in enumerate((("seconds", "seconds"), ("megabytes", "extra memory, MB"))):
            axes = grid[row][column]
            for colour, (name, points) in zip(colours, lines.items(), strict=False):
                values = [point["value"] for point in points]
                axes.plot(
                    values, [point[what] for point in points], "o-", color=colour, label=name, markersize=4
                )
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(values, [f"{value:g}" for value in values])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            if row == 1:
                axes.set_xlabel(size)
            if column == 0:
                axes.set_ylabel(label)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.95), ncols=len(labels), frameon=False
    )
    figure.suptitle(title, y=0.99, fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
