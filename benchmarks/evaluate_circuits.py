"""A sweep of 15 circuits, beside the model's bare passes and the straightforward evaluation.

Contestants take turns in one process, in another order each round, so that a ratio compares one moment with itself:

    python benchmarks/evaluate_circuits.py
    python benchmarks/evaluate_circuits.py --shapes default --kinds topk --errors kept

Circuits are nested, of up to 500 nodes spread over the sites, and each keeps a feature of every residual site: none can
be run from a late one. The straightforward evaluation encodes and decodes every
token densely at all sites, circuit by circuit. The bare passes run the same rows with nothing replaced; the floor of
what needs every pre-activation is those and the encoders' dense products.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _setting import (
    METRIC,
    RESULTS,
    VOCABULARY,
    Setting,
    Sizes,
    Timed,
    dictionary,
    in_turns,
    make,
    pairs,
    verdict,
)
from torch import Tensor

from circuitflow.attribution.nodes import ERROR, SUMMED
from circuitflow.attribution.readout import metric_of_run
from circuitflow.circuits.ablation import AblationSite, Prompts
from circuitflow.circuits.evaluation import Evaluation
from circuitflow.circuits.interventions import Intervention, Triple, keep
from circuitflow.circuits.means import Means
from circuitflow.circuits.replacement import Cells, run_values
from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.models.running import LanguageModel, run
from circuitflow.models.toy import random_model, toy_config

OURS, BARE, FLOOR, DENSE = "circuitflow", "bare passes", "passes + encodes", "dense, one by one"
CIRCUITS, LARGEST = 15, 500
BATCH_ROWS = 512
EQUAL = 1e-4
"""Difference of m, as a share of the largest |m|, that counts as none. With random weights there are near ties, which
two ways of summing can decide differently; one such choice moves a prompt's m by far more."""
SHRUNK = 0.5
"""Length of decoder rows with which random dictionaries explain the most: longer ones would blow up the stream, and so
the number of features above their threshold."""
SHAPES = ("pythia", "default")
KINDS = ("jumprelu", "topk")


@dataclass(frozen=True)
class DefaultRun(Sizes):
    """SmolLM2-135M's shape with dictionaries at the four sites of config.yaml."""

    layers: int = 30
    d_model: int = 576
    heads: int = 9
    d_dict: int = 4608
    k: int = 32
    prompts: int = 8

    @property
    def sites(self) -> list[str]:
        return ["resid.6", "resid.12", "resid.18", "resid.24"]


def setting_of(shape: str, threads: int) -> Setting:
    """A random model of that shape, pairs, and TopK dictionaries."""
    if shape == "pythia":
        return make(Sizes(threads=threads))
    sizes = DefaultRun(threads=threads)
    torch.set_num_threads(threads)
    config = toy_config(
        "llama",
        layers=sizes.layers,
        d_model=sizes.d_model,
        heads=sizes.heads,
        vocab=VOCABULARY,
        intermediate_size=1536,
        num_key_value_heads=3,
    )
    lm = LanguageModel(random_model(config, 0), None)
    return Setting(
        sizes, lm, pairs(sizes), {site: dictionary(site, sizes, n) for n, site in enumerate(sizes.sites)}
    )


def with_threshold(plain: Dictionary, x: Tensor, k: int) -> Dictionary:
    """JumpReLU of the same directions whose one threshold leaves ``k`` features active on average."""
    pre = x.flatten(0, 1) @ plain.W_enc.T  # type: ignore[union-attr]
    least = pre.flatten().topk(k * len(pre)).values[-1].clamp(min=0)
    threshold = least.expand(plain.d_dict).clone()
    return replace(plain, kind="jumprelu", select="threshold", settings={}, extra={"threshold": threshold})


@dataclass(frozen=True)
class Sweep:
    """What is evaluated."""

    setting: Setting
    here: Evaluation
    circuits: list[Intervention]
    nodes: list[list[Triple]]


def sweep_of(setting: Setting, kind: str, errors: str) -> Sweep:
    """Sites with means over the patched prompts, and nested circuits of features that are active."""
    given, sites, active = setting.pairs, [], []
    cached = setting.cached(setting.arrays())
    for site, plain in setting.dictionaries.items():
        clean = cached[site].clean
        used = with_threshold(plain, clean, setting.sizes.k) if kind == "jumprelu" else plain
        used = replace(used, W_dec=SHRUNK * used.W_dec)
        means = Means(used, Cells.over(given))
        means.add(cached[site].patched, given)
        replaced = means.values().at(given, used)
        own = run_values(clean, given.mask, used)
        load = {"replacement": lambda it=replaced: it, "clean": lambda it=own: it}
        sites.append(AblationSite(site, used, load))
        active += [(site, feature, SUMMED) for feature in own.features.features.unique().tolist()]
    order = [active[number] for number in np.random.default_rng(0).permutation(len(active))]
    cuts = [site.name for site in sites if site.cut]
    first = [next(node for node in order if node[0] == site) for site in cuts]
    order = [*first, *(node for node in order if node not in first)]
    counts = np.geomspace(len(first), LARGEST, CIRCUITS).round().astype(int)
    always = [(site, ERROR, SUMMED) for site in setting.dictionaries] if errors == "kept" else []
    nodes = [[*always, *order[:count]] for count in counts]
    full = metric_of_run(setting.lm, METRIC, run(setting.lm, given.clean, given.mask), given).double().numpy()
    names = list(setting.dictionaries)
    here = Evaluation(setting.lm, METRIC, sites, Prompts(given), full)
    return Sweep(setting, here, [keep(one, names) for one in nodes], nodes)


def ours(sweep: Sweep) -> np.ndarray:
    """m of every circuit on every prompt."""
    return sweep.here.values(sweep.circuits, BATCH_ROWS)


def bare(sweep: Sweep) -> Tensor:
    """The same rows with nothing replaced, all in one pass."""
    rows = sweep.setting.pairs[list(range(len(sweep.setting.pairs))) * CIRCUITS]
    return metric_of_run(sweep.setting.lm, METRIC, run(sweep.setting.lm, rows.clean, rows.mask), rows)


def floor(sweep: Sweep) -> None:
    """The bare passes, and the product of every token with every encoder."""
    bare(sweep)
    tokens = CIRCUITS * sweep.setting.pairs.mask.numel()
    for site in sweep.here.sites:
        x = torch.ones(tokens, site.dictionary.d_in)
        torch.addmm(site.dictionary.b_enc, x, site.dictionary.W_enc.T)  # type: ignore[union-attr]


def dense(sweep: Sweep) -> np.ndarray:
    """Circuit by circuit: at every site all features and the error, masks over them, and the dense decode."""
    given, lm = sweep.setting.pairs, sweep.setting.lm
    means = {site.name: _dense_means(site) for site in sweep.here.sites}
    found = []
    for nodes in sweep.nodes:
        changes = {}
        for site in sweep.here.sites:
            inside = torch.zeros(site.dictionary.d_dict + 1, dtype=torch.bool)
            inside[[feature for where, feature, _ in nodes if where == site.name]] = True
            changes[site.name] = _dense_change(site.dictionary, inside, *means[site.name])
        this = run(lm, given.clean, given.mask, replace=changes)
        found.append(metric_of_run(lm, METRIC, this, given).double().numpy())
    return np.stack(found)


def _dense_means(site: AblationSite) -> tuple[Tensor, Tensor]:
    """Mean features and mean error, by position."""
    known = site.known("replacement")
    features = known.features.dense()
    return features, known.whole - features @ site.dictionary.W_dec - site.dictionary.b_dec


def _dense_change(coder: Dictionary, inside: Tensor, mean: Tensor, mean_error: Tensor) -> Any:
    def change(x: Tensor) -> Tensor:
        pre = torch.addmm(coder.b_enc, x.flatten(0, 1), coder.W_enc.T).relu()  # type: ignore[union-attr]
        if coder.select == "topk":
            top = pre.topk(int(coder.settings["k"]), dim=1)
            features = torch.zeros_like(pre).scatter_(1, top.indices, top.values)
        else:
            features = pre * (pre > coder.extra["threshold"])
        features = features.view(*x.shape[:2], -1)
        error = x - (features @ coder.W_dec + coder.b_dec)
        kept = torch.where(inside[:-1], features, mean)
        return kept @ coder.W_dec + coder.b_dec + torch.where(inside[-1], error, mean_error)

    return change


def measure(shape: str, kind: str, errors: str, threads: int, rounds: int) -> dict[str, Any]:
    """Times of one setting, after a check that both evaluations agree."""
    sweep = sweep_of(setting_of(shape, threads), kind, errors)
    scale = np.abs(sweep.here.full).max()
    apart = np.abs(ours(sweep) - dense(sweep)) / scale
    contestants: dict[str, Callable[[Sweep], Any]] = {OURS: ours, BARE: bare, DENSE: dense}
    if not is_listed(kind, errors):
        contestants[FLOOR] = floor
    timed = in_turns({name: partial(work, sweep) for name, work in contestants.items()}, rounds)
    return {
        "shape": shape,
        "kind": kind,
        "errors": errors,
        "sizes": asdict(sweep.setting.sizes),
        "sites": len(sweep.here.sites),
        "apart": float(np.median(apart)),
        "equal": float((apart < EQUAL).mean()),
        "timed": timed,
    }


def is_listed(kind: str, errors: str) -> bool:
    """Whether the circuit's features alone need encoding."""
    return kind == "jumprelu" and errors == "removed"


def told(found: dict[str, Any]) -> str:
    """One setting in a few lines."""
    timed: dict[str, Timed] = found["timed"]
    sizes = found["sizes"]
    what = f"{found['kind']} d_dict {sizes['d_dict']}, errors {found['errors']}"
    apart = f"{found['apart']:.0e} of max |m| (median), {found['equal']:.0%} of rows by less than {EQUAL:.0e}"
    lines = [
        f"{found['shape']} shape, {found['sites']} sites, {what}; {CIRCUITS} circuits x {sizes['prompts']} prompts",
        f"  threads {sizes['threads']}; apart from the dense evaluation by {apart}",
    ]
    lines += [
        f"  {name:20} {one.best:7.2f} s {min(one.cpu):7.2f} CPU s  {times(one, timed[OURS]):5.2f} x ours in CPU s"
        for name, one in timed.items()
    ]
    against, most = (BARE, 3.0) if is_listed(found["kind"], found["errors"]) else (FLOOR, 1.3)
    found_times = times(timed[OURS], timed[against])
    said = verdict(f"{found_times:.2f} x {against}", f"at most {most}", found_times <= most)
    return "\n".join([*lines, f"  {said}"])


def times(slow: Timed, quick: Timed) -> float:
    """How many times the processor time: unlike time by the clock it hardly depends on what else runs."""
    return statistics.median(a / b for a, b in zip(slow.cpu, quick.cpu, strict=True))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="*", default=SHAPES, choices=SHAPES)
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("--errors", nargs="*", default=("removed", "kept"), choices=("removed", "kept"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "evaluate_circuits.json")
    return parser.parse_args()


def main() -> None:
    """Print times and whether they meet the targets; write JSON."""
    asked, results = arguments(), []
    for shape in asked.shapes:
        for kind in asked.kinds:
            for errors in asked.errors:
                found = measure(shape, kind, errors, asked.threads, asked.rounds)
                print(told(found), "", sep="\n", flush=True)
                results.append(found | {"timed": {name: vars(one) for name, one in found["timed"].items()}})
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
