"""Node scores at all sites of a model of Pythia-70m's shape, beside the traditional computation, and how they grow.

Contestants take turns in one process, in another order each round, so that a ratio compares one moment with itself:

    python benchmarks/score_nodes.py
    python benchmarks/score_nodes.py --plots docs/images

The traditional computation is the product's own method ``sae_in_loop``: every dictionary in the forward and backward
pass, plain hooks, frozen weights. The floor is what no exact method can do without: the model's passes and, of both
runs, the encoders' dense products. Memory is measured in processes of their own.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from _setting import (
    METRIC,
    RESULTS,
    Setting,
    Sizes,
    Timed,
    draw_growth,
    extra_memory,
    in_process,
    in_turns,
    make,
    ratio,
    verdict,
)

from circuitflow.attribution.cached import Batch, Cached
from circuitflow.attribution.changes import Effects, changes_of, differing, effects_of
from circuitflow.attribution.in_loop import spliced_gradients, spliced_path_gradients
from circuitflow.attribution.path_gradients import path_fractions, path_gradient
from circuitflow.attribution.rerun import BaseRun, base_run, starts_of
from circuitflow.attribution.scores import score_decoder
from circuitflow.attribution.sparse import sum_by

OURS, LOOP, BARE, FLOOR = "circuitflow", "sae_in_loop", "bare passes", "passes + encodes"
ENCODES, AGAIN, DECODER = "encodes alone", "another dictionary, cached", "decoder only, cached"
IG, IG_LOOP = "circuitflow IG", "re-runs with dictionaries, 1 step"
STEPS = 10
GROWN = (OURS, LOOP, BARE)
AXES: dict[str, Sequence[int]] = {
    "d_dict": (2048, 4096, 8192, 16384, 32768),
    "layers": (2, 4, 6, 12),
    "prompts": (4, 8, 16, 32),
    "length": (6, 12, 24, 48),
}


def by_pair(effects: Effects) -> tuple[torch.Tensor, torch.Tensor]:
    """Effects summed over positions: what is kept of a batch."""
    return sum_by(effects.pair * (effects.d_dict + 1) + effects.node, effects.effect)


def score(setting: Setting, cached: dict[str, Cached]) -> list[Any]:
    """Scores of every site from cached tensors."""
    found = []
    for site, dictionary in setting.dictionaries.items():
        found.append(
            by_pair(effects_of(changes_of(dictionary, cached[site], setting.pairs), dictionary.W_dec))
        )
    return found


def ours(setting: Setting) -> list[Any]:
    """The model's passes, then scores."""
    return score(setting, setting.cached(setting.arrays()))


def in_loop(setting: Setting) -> list[Any]:
    """Dictionaries in the loop; gradient × change summed over positions, dense, in place."""
    found = []
    for one in spliced_gradients(setting.lm, METRIC, setting.pairs, setting.dictionaries).values():
        change = one.patched.features.sub_(one.clean.features).mul_(one.gradient.features)
        error = (one.patched.error.sub_(one.clean.error) * one.gradient.error).sum((1, 2))
        found.append((change.sum(1), error))
    return found


def encodes(setting: Setting, cached: dict[str, Cached]) -> None:
    """Pre-activations of both runs at every token, nothing selected."""
    for site, dictionary in setting.dictionaries.items():
        for x in (cached[site].clean, cached[site].patched):
            torch.addmm(dictionary.b_enc, x.flatten(0, 1), dictionary.W_enc.T)


def floor(setting: Setting) -> None:
    """The model's passes and the encodes."""
    encodes(setting, setting.cached(setting.arrays()))


def decoder_only(setting: Setting, cached: dict[str, Cached]) -> list[Any]:
    """Mean |g·W_dec| of every site."""
    batch = Batch(0, len(setting.pairs), setting.pairs, cached)
    return [
        score_decoder(dictionary, site, [batch], setting.pairs)
        for site, dictionary in setting.dictionaries.items()
    ]


def integrated(setting: Setting, steps: int) -> list[Any]:
    """The model's passes, the mean gradient of all steps at every site, and scores."""
    cached = setting.cached(setting.arrays())
    gradients = mean_gradients(setting, cached, steps, "midpoint")
    return score(setting, {site: replace(one, gradient=gradients[site]) for site, one in cached.items()})


def mean_gradients(
    setting: Setting, cached: dict[str, Cached], steps: int, path: str
) -> dict[str, torch.Tensor]:
    """Integrated gradients' mean gradient at every site."""
    base, fractions = base_of(setting, cached), path_fractions(steps, path)
    return {
        site: path_gradient(base, site, change_of(setting, one), fractions) for site, one in cached.items()
    }


def base_of(setting: Setting, cached: dict[str, Cached]) -> BaseRun:
    """The clean run, from cached values."""
    starts = starts_of(setting.sizes.sites, setting.lm.arch)
    known = {site: cached[site].clean for site in starts}
    return base_run(setting.lm, METRIC, setting.pairs, "clean", starts, known)


def change_of(setting: Setting, one: Cached) -> torch.Tensor:
    """Patched − clean at tokens that can differ."""
    return (one.patched - one.clean) * differing(setting.pairs)[..., None]


def equal_steps(setting: Setting) -> tuple[int, dict[str, float]]:
    """Fewest midpoint steps as accurate as ten left ones, and the errors of both.

    The error of a site's total effect: Σ |Σ ḡ·change − (m with the site patched − m)| over all pairs and sites,
    relative to Σ |m with the site patched − m|.
    """
    cached = setting.cached(setting.arrays())
    base, rows = base_of(setting, cached), torch.arange(len(setting.pairs))
    changes = {site: change_of(setting, one) for site, one in cached.items()}
    clean = base.values("embed", rows, torch.zeros_like(changes["embed"]))[0]
    true = {site: base.values(site, rows, change)[0] - clean for site, change in changes.items()}

    def error(steps: int, path: str) -> float:
        gradients = mean_gradients(setting, cached, steps, path)
        far = sum(
            float(((gradients[site] * change).sum((1, 2)) - true[site]).abs().sum())
            for site, change in changes.items()
        )
        return far / sum(float(effect.abs().sum()) for effect in true.values())

    usual = error(STEPS, "left")
    for steps in range(1, STEPS + 1):
        own = error(steps, "midpoint")
        if own <= usual:
            break
    return steps, {f"{STEPS} left": usual, f"{steps} midpoint": own}


def integrated_in_loop(setting: Setting) -> None:
    """One of the steps, at every site; and the passes that give both ends."""
    fractions = path_fractions(1, "left")
    spliced_path_gradients(setting.lm, METRIC, setting.pairs, setting.dictionaries, fractions)


def contestants(setting: Setting, steps: int) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    cached = setting.cached(setting.arrays())
    found: dict[str, Callable[[], Any]] = {
        BARE: setting.arrays,
        ENCODES: lambda: encodes(setting, cached),
        FLOOR: lambda: floor(setting),
        OURS: lambda: ours(setting),
        AGAIN: lambda: score(setting, cached),
        DECODER: lambda: decoder_only(setting, cached),
        LOOP: lambda: in_loop(setting),
    }
    if steps:
        found |= {IG: lambda: integrated(setting, steps), IG_LOOP: lambda: integrated_in_loop(setting)}
    return found


def measure(sizes: Sizes, rounds: int, integrate: bool) -> dict[str, Any]:
    """Times and memory of one setting, and how far the two computations differ."""
    setting = make(sizes)
    steps, errors = equal_steps(setting) if integrate else (0, {})
    timed = in_turns(contestants(setting, steps), rounds)
    memory = {name: memory_of(name, sizes) for name in GROWN}
    return {
        "sizes": asdict(sizes),
        "timed": timed,
        "memory": memory,
        "differ": difference(setting),
        "errors": errors,
    }


def difference(setting: Setting) -> float:
    """Σ|difference from the traditional scores| / Σ|traditional scores|, the largest of all sites.

    In float32 a few tokens have a near tie at their k-th feature, which rounding decides.
    """
    far = 0.0
    for (keys, sums), (features, error) in zip(ours(setting), in_loop(setting), strict=True):
        dense = features.sum(0).double()
        mine = torch.zeros(len(dense) + 1, dtype=torch.float64).index_add_(0, keys % (len(dense) + 1), sums)
        apart = (mine[:-1] - dense).abs().sum() + (mine[-1] - error.sum()).abs()
        far = max(far, float(apart / (dense.abs().sum() + error.sum().abs())))
    return far


def memory_of(name: str, sizes: Sizes) -> float:
    """Extra memory of a contestant, in a process of its own."""
    return float(in_process(__file__, "--memory", name, "--sizes", json.dumps(asdict(sizes)))["megabytes"])


def remembered(name: str, sizes: Sizes) -> dict[str, float]:
    """The same in this process, after a run that loads what is loaded once."""
    setting = make(sizes)
    work = {OURS: ours, LOOP: in_loop, BARE: Setting.arrays}[name]
    work(setting)
    return {"megabytes": extra_memory(lambda: work(setting))}


def table(found: dict[str, Any]) -> str:
    """One line a contestant: its quickest round, and how many times quicker than the loop it is, median over rounds.

    On a busy machine processor time tells more, best with one thread: threads that wait for each other spend it too.
    """
    timed, sizes = found["timed"], found["sizes"]
    head = (
        f"d_dict {sizes['d_dict']}, k {sizes['k']}: {len(Sizes(**sizes).sites)} sites, {sizes['prompts']} prompts of "
        f"{sizes['length']} tokens that differ from position {sizes['first_change']} on, {sizes['threads']} threads"
    )
    lines = [
        head,
        f"{'':34}{'seconds':>9}{'loop ÷':>8}{'CPU s':>9}{'loop ÷':>8}{'GFLOP/s':>9}{'extra MB':>10}",
    ]
    for name, one in timed.items():
        memory = found["memory"].get(name)
        lines.append(
            f"{name:34}{one.best:9.3f}{ratio(timed[LOOP], one):8.2f}{min(one.cpu):9.3f}"
            f"{min(timed[LOOP].cpu) / min(one.cpu):8.2f}{max(one.gflops):9.0f}"
            + ("" if memory is None else f"{memory:10.0f}")
        )
    return "\n".join(lines)


def verdicts(found: dict[str, Any]) -> list[str]:
    """The targets of this size and whether they were met."""
    timed: dict[str, Timed] = found["timed"]
    wanted = 2.3 if found["sizes"]["d_dict"] >= 32768 else 1.7
    quicker, over = ratio(timed[LOOP], timed[OURS]), ratio(timed[OURS], timed[FLOOR])
    share = found["memory"][OURS] / found["memory"][LOOP]
    lines = [
        verdict(f"{quicker:.2f} × the speed of {LOOP}", f"at least {wanted}", quicker >= wanted),
        verdict(f"{over:.2f} × the time of {FLOOR}", "at most 1.6", over <= 1.6),
        verdict(f"{share:.3f} of the extra memory of {LOOP}", "at most a third", share <= 1 / 3),
        verdict(
            f"scores within {found['differ']:.1e} of the traditional ones",
            "at most 1e-3, near ties included",
            found["differ"] <= 1e-3,
        ),
    ]
    for name in (AGAIN, DECODER):
        times = ratio(timed[LOOP], timed[name])
        lines.append(verdict(f"{name}: {times:.1f} × the speed of {LOOP}", "at least 5", times >= 5))
    if IG in timed:
        # A loop of ten steps: its ends once, and each step as often as there are sites.
        ten = [
            first + STEPS * (one - first)
            for one, first in zip(timed[IG_LOOP].seconds, timed[LOOP].seconds, strict=True)
        ]
        times = ratio(Timed(ten), timed[IG])
        kinds = ", ".join(f"{name} steps {error:.2e}" for name, error in found["errors"].items())
        lines.append(verdict(f"{IG}: {times:.1f} × the speed of ten re-runs", "at least 10", times >= 10))
        lines.append(f"       relative errors of the sites' totals: {kinds}")
    return lines


def growth(sizes: Sizes, rounds: int) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Times and memory with one size changed at a time."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for axis, values in AXES.items():
        lines: dict[str, list[dict[str, float]]] = {name: [] for name in GROWN}
        for value in values:
            here = replace(sizes, **{axis: value})
            setting = make(here)
            chosen = {name: work for name, work in contestants(setting, 0).items() if name in GROWN}
            timed = in_turns(chosen, rounds)
            del setting, chosen
            for name in GROWN:
                lines[name].append(
                    {
                        "value": value,
                        "seconds": timed[name].best,
                        "megabytes": max(0.1, memory_of(name, here)),
                    }
                )
            print(f"  {axis} {value}", file=sys.stderr)
        found[axis] = lines
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--d-dict", type=int, nargs="+", default=[8192, 32768])
    add(
        "--first-change",
        type=int,
        default=2,
        help="position from which prompts of a pair differ: BOS The NOUN …",
    )
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=7)
    add("--ig", action=argparse.BooleanOptionalAction, default=True, help="integrated gradients too")
    add("--plots", type=Path, help="folder for the figure of growth; without it growth is not measured")
    add("--out", type=Path, default=RESULTS / "score_nodes.json")
    add("--memory", choices=GROWN, help="measure this one's memory in this process and print JSON")
    add("--sizes", type=json.loads, help="JSON of what --memory measures")
    return parser.parse_args()


def main() -> None:
    """Print tables and what they say of the targets, write JSON, draw growth if asked for."""
    asked = arguments()
    if asked.memory:
        print(json.dumps(remembered(asked.memory, Sizes(**asked.sizes))))
        return
    sizes = Sizes(first_change=asked.first_change, threads=asked.threads)
    results = []
    for d_dict in asked.d_dict:
        found = measure(replace(sizes, d_dict=d_dict), asked.rounds, asked.ig)
        print(table(found), *verdicts(found), "", sep="\n", flush=True)
        results.append(found | {"timed": {name: vars(one) for name, one in found["timed"].items()}})
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(results, indent=1) + "\n")
    if asked.plots:
        grown = growth(sizes, 3)
        asked.out.with_suffix(".growth.json").write_text(json.dumps(grown, indent=1) + "\n")
        draw_growth(asked.plots / "score_nodes.png", grown, "Node scores of all sites: model passes included")


if __name__ == "__main__":
    main()
