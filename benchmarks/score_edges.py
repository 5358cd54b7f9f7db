"""Edges between all neighbouring sites of a model of Pythia-70m's shape, beside one backward pass per feature.

    python benchmarks/score_edges.py
    python benchmarks/score_edges.py --plots docs/images

The usual way (sparse feature circuits, Marks et al. 2024) takes one backward pass for each prompt, position and
downstream feature, through the model with dictionaries at both ends, and gets a dense row of the upstream dictionary.
It is done here with frozen weights, one forward pass for all backward passes, and dictionaries at those sites alone
that the edge joins; its forward pass is not counted. Once the gradient goes on to the embeddings, as a plain
``backward()`` does, and once it stops at the upstream sites. Ours gives the edges into a feature of all prompts and
positions at once, encoding included.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
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
    verdict,
)
from torch import Tensor

from circuitflow.attribution.cached import Cached
from circuitflow.attribution.changes import changes_of, effects_of
from circuitflow.attribution.ends import End, targets_of
from circuitflow.attribution.in_loop import Splice, encoded
from circuitflow.attribution.nodes import ERROR, SUMMED
from circuitflow.attribution.paths import METRIC_SITE, Blocks, Way, begin, neighbours, way_into
from circuitflow.attribution.pullback import Into, edge_effects
from circuitflow.models.running import run

OURS, TO_EMBEDDINGS, TO_UPSTREAM, BARE = (
    "circuitflow",
    "backward to embeddings",
    "backward to upstream",
    "bare passes",
)
SAMPLED = 8  # backward passes of a round
AXES = {
    "d_dict": (2048, 4096, 8192, 16384, 32768),
    "layers": (2, 4, 6, 12),
    "prompts": (4, 8, 16, 32),
    "length": (6, 12, 24, 48),
}
DOWNS = ("attn.3", "mlp.3", "resid.3")


def ends(setting: Setting, cached: Mapping[str, Cached], pool: int) -> dict[str, End]:
    """The strongest features of every site, and its error."""
    found = {}
    for site, dictionary in setting.dictionaries.items():
        effects = effects_of(changes_of(dictionary, cached[site], setting.pairs), dictionary.W_dec)
        score = torch.zeros(effects.d_dict + 1, dtype=torch.float64).index_add_(
            0, effects.node, effects.effect
        )
        feature = torch.cat([score[:-1].abs().topk(pool).indices, torch.tensor([ERROR])])
        found[site] = End(site, dictionary, feature, torch.full_like(feature, SUMMED))
    return found


def into(setting: Setting, at: Mapping[str, End], down: str) -> Into:
    """What edges into one site are computed from."""
    sites, blocks = tuple(setting.sizes.sites), Blocks(setting.lm.n_layers, setting.lm.arch.parallel)
    ups = tuple(at[site] for site in neighbours(sites, blocks)[down])
    if down == METRIC_SITE:
        return Into(down, ups, None, sites, Way.MIXING, METRIC)
    return Into(down, ups, at[down], sites, way_into(down, sites, blocks))


def edges(
    setting: Setting, cached: Mapping[str, Cached], at: Mapping[str, End], downs: list[str]
) -> list[Tensor]:
    """Edge weights of all pairs, added up, into every node of these sites."""
    found = []
    for down in downs:
        this = into(setting, at, down)
        used = {up.site for up in this.ups} | {down} - {METRIC_SITE} | {s for s in cached if s == "embed"}
        used |= {site for site in cached if site.startswith("resid")}
        effects = edge_effects(setting.lm, setting.pairs, this, {site: cached[site] for site in used}, 64)
        found += [effect.sum(0) for effect in effects.values()]
    return found


class PerFeature:
    """One backward pass per prompt, position and feature: the graph is made once and kept."""

    def __init__(self, setting: Setting, cached: Mapping[str, Cached], this: Into) -> None:
        self.setting, self.this = setting, this
        ups = [up.site for up in this.ups]
        # Gradients go on past the deepest cut alone: they stop at the sites between the two ends.
        cut = begin(this.down, this.sites)
        splices = {
            site: Splice(dictionary, True, None if site == cut else encoded(dictionary, cached[site].clean))
            for site, dictionary in setting.dictionaries.items()
            if site in ups
        }
        capture = ["embed", this.down] if "embed" not in ups else [this.down]
        ran = run(
            setting.lm,
            setting.pairs.clean,
            setting.pairs.mask,
            replace=dict(splices),
            capture=capture,
            stop_at=this.down,
            grad=True,
        )
        self.leaves = [leaf for site in ups for leaf in splices[site].leaves()]
        self.embed = [ran.sites["embed"]] if "embed" in ran.sites else []
        dictionary, y = setting.dictionaries[this.down], ran.sites[this.down]
        with torch.enable_grad():
            pre = torch.addmm(dictionary.b_enc, y.flatten(0, 1), dictionary.W_enc.T)
            self.features = pre.relu().view(*y.shape[:2], -1)  # of active features it is all that counts
        self.change = []
        for up in this.ups:
            both = [self._state(cached, up.site, run_name) for run_name in ("clean", "patched")]
            self.change += [b - a for a, b in zip(*both, strict=True)]
        targets = targets_of(this.end, cached[this.down], setting.pairs)
        token, column = targets.values.nonzero(as_tuple=True)
        self.active, self.nodes = len(token), len(column.unique())
        some = torch.randperm(len(token), generator=torch.Generator().manual_seed(0))[:SAMPLED]
        self.nonzero = [
            (
                int(targets.pair[token[i]]),
                int(targets.position[token[i]]),
                int(this.end.features[column[i]]),
                float(targets.values[token[i], column[i]]),
            )
            for i in some
        ]

    def _state(self, cached: Mapping[str, Cached], site: str, name: str) -> tuple[Tensor, Tensor]:
        splice = Splice(self.setting.dictionaries[site], False)
        splice(getattr(cached[site], name))
        return splice.leaves()

    def __call__(self, further: bool) -> list[tuple[tuple[Tensor, Tensor], ...]]:
        """A few features, drawn by seed."""
        return self.passes(self.nonzero, further)

    def passes(
        self, features: Sequence[tuple[int, int, int, float]], further: bool
    ) -> list[tuple[tuple[Tensor, Tensor], ...]]:
        """Edges into features (pair, position, feature, ∂m/∂f) from every upstream node, those that are not 0."""
        rows = []
        for pair, position, feature, weight in features:
            wanted = [*self.leaves, *self.embed] if further else self.leaves
            gradients = torch.autograd.grad(
                self.features[pair, position, feature] * weight, wanted, retain_graph=True
            )
            row = []
            for gradient, change in zip(gradients[: len(self.change)], self.change, strict=True):
                effect = (gradient * change).sum((0, 1))
                index = effect.nonzero()[:, 0]
                row.append((index, effect[index]))
            rows.append(tuple(row))
        return rows


def measure(sizes: Sizes, rounds: int, pool: int) -> dict[str, Any]:
    """Time per downstream feature, by downstream site."""
    setting = make(sizes)
    cached = setting.cached(setting.arrays())
    at, found = ends(setting, cached, pool), {}
    for down in DOWNS:
        others = PerFeature(setting, cached, into(setting, at, down))
        timed = in_turns(
            {
                OURS: lambda down=down: edges(setting, cached, at, [down]),
                TO_EMBEDDINGS: lambda others=others: others(True),
                TO_UPSTREAM: lambda others=others: others(False),
                BARE: setting.arrays,
            },
            rounds,
        )
        passes = others.active / others.nodes
        found[down] = {
            "timed": timed,
            "passes": passes,
            "nodes": len(at[down]),
            "apart": apart(setting, cached, at, others),
        }
    memory = {name: memory_of(name, sizes, pool) for name in (OURS, TO_EMBEDDINGS)}
    return {"sizes": asdict(sizes), "pool": pool, "downs": found, "memory": memory}


def apart(setting: Setting, cached: Mapping[str, Cached], at: Mapping[str, End], others: PerFeature) -> float:
    """How far the edges into one feature are from the sum of the usual passes over all tokens where it is active.

    Σ|difference| / Σ|edges|, over the features of the upstream pools.
    """
    this, feature = others.this, others.nonzero[0][2]
    targets = targets_of(this.end, cached[this.down], setting.pairs)
    column = int((this.end.features == feature).nonzero()[0, 0])
    weights = targets.values[:, column]
    tokens = weights.nonzero()[:, 0].tolist()
    some = [(int(targets.pair[i]), int(targets.position[i]), feature, float(weights[i])) for i in tokens]
    ours = edge_effects(setting.lm, setting.pairs, this, cached, 64)
    node = int((this.end.feature == feature).nonzero()[0, 0])
    mine = torch.cat([ours[up.site].sum(0)[:-1, node] for up in this.ups])
    usual = torch.zeros_like(mine)
    for row in others.passes(some, False):
        dense = [
            torch.zeros(up.dictionary.d_dict).index_add_(0, *row[2 * number])
            for number, up in enumerate(this.ups)
        ]
        usual += torch.cat([one[up.feature[:-1]] for one, up in zip(dense, this.ups, strict=True)]).double()
    return float((mine - usual).abs().sum() / usual.abs().sum())


def memory_of(name: str, sizes: Sizes, pool: int) -> float:
    """Extra memory of a contestant for ``DOWNS``' MLP, in a process of its own."""
    given = json.dumps(asdict(sizes))
    return float(in_process(__file__, "--memory", name, "--sizes", given, "--pool", str(pool))["megabytes"])


def remembered(name: str, sizes: Sizes, pool: int) -> dict[str, float]:
    """The same in this process, after a run that loads what is loaded once."""
    setting = make(sizes)
    cached = setting.cached(setting.arrays())
    at, down = ends(setting, cached, pool), setting.sizes.sites[-2]

    def work() -> Any:
        if name == OURS:
            return edges(setting, cached, at, [down])
        return PerFeature(setting, cached, into(setting, at, down))(True)

    work()
    return {"megabytes": extra_memory(work)}


def each(timed: Mapping[str, Timed], nodes: int, name: str) -> list[float]:
    """Seconds per downstream feature of ours, per backward pass of the others, by round."""
    return [seconds / (nodes if name == OURS else SAMPLED) for seconds in timed[name].seconds]


def times(one: Mapping[str, Any], name: str) -> float:
    """How many times quicker ours is per downstream feature than one pass: the median of the rounds' ratios."""
    pairs = zip(each(one["timed"], one["nodes"], name), each(one["timed"], one["nodes"], OURS), strict=True)
    return statistics.median(other / ours for other, ours in pairs)


def table(found: dict[str, Any]) -> str:
    """A line for each downstream site."""
    sizes = found["sizes"]
    head = (
        f"d_dict {sizes['d_dict']}, {found['pool']} features and the error of each site, {sizes['prompts']} prompts of "
        f"{sizes['length']} tokens, {sizes['threads']} threads; milliseconds per downstream feature"
    )
    titles = ("into", "ours", "to embeddings", "×", "to upstream", "×", "tokens", "bare", "apart")
    widths = (10, 9, 15, 7, 13, 7, 8, 8, 10)
    lines = [head, "".join(f"{title:>{width}}" for title, width in zip(titles, widths, strict=True))]
    for down, one in found["downs"].items():
        ms = {name: 1000 * min(each(one["timed"], one["nodes"], name)) for name in one["timed"]}
        bare = 1000 * one["timed"][BARE].best
        lines.append(
            f"{down:>10}{ms[OURS]:9.2f}{ms[TO_EMBEDDINGS]:15.1f}{times(one, TO_EMBEDDINGS):7.0f}"
            f"{ms[TO_UPSTREAM]:13.1f}{times(one, TO_UPSTREAM):7.0f}{one['passes']:8.1f}{bare:8.0f}{one['apart']:10.1e}"
        )
    memory = found["memory"]
    lines.append(
        f"extra memory: ours {memory[OURS]:.0f} MB, a pass per feature {memory[TO_EMBEDDINGS]:.0f} MB"
    )
    return "\n".join(lines)


def verdicts(found: dict[str, Any]) -> list[str]:
    """The target and whether it was met."""
    return [
        verdict(
            f"into {down}: {times(one, name):.0f} × as quick per feature as a {name}",
            "at least 30",
            times(one, name) >= 30,
        )
        for down, one in found["downs"].items()
        for name in (TO_EMBEDDINGS, TO_UPSTREAM)
    ]


def growth(sizes: Sizes, rounds: int, pool: int) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Time of all edges of the model, and memory, with one size changed at a time."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for axis, values in AXES.items():
        lines: dict[str, list[dict[str, float]]] = {"all edges": [], BARE: []}
        for value in values:
            here = replace(sizes, **{axis: value})
            setting = make(here)
            cached = setting.cached(setting.arrays())
            at, downs = ends(setting, cached, pool), [*here.sites[1:], METRIC_SITE]
            work: dict[str, Callable[[], Any]] = {
                "all edges": lambda s=setting, c=cached, a=at, d=downs: edges(s, c, a, d),
                BARE: setting.arrays,
            }
            timed = in_turns(work, rounds)
            for name, one in timed.items():
                memory = max(0.1, extra_memory(work[name]))
                lines[name].append({"value": value, "seconds": one.best, "megabytes": memory})
            print(f"  {axis} {value}", file=sys.stderr)
        found[axis] = lines
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--d-dict", type=int, nargs="+", default=[8192, 32768])
    add("--pool", type=int, default=100, help="features of each site, the strongest")
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=5)
    add("--plots", type=Path, help="folder for the figure of growth; without it growth is not measured")
    add("--out", type=Path, default=RESULTS / "score_edges.json")
    add("--memory", choices=(OURS, TO_EMBEDDINGS), help="measure this one's memory here and print JSON")
    add("--sizes", type=json.loads, help="JSON of what --memory measures")
    return parser.parse_args()


def main() -> None:
    """Print tables and what they say of the targets, write JSON, draw growth if asked for."""
    asked = arguments()
    if asked.memory:
        print(json.dumps(remembered(asked.memory, Sizes(**asked.sizes), asked.pool)))
        return
    sizes, results = Sizes(threads=asked.threads), []
    for d_dict in asked.d_dict:
        found = measure(replace(sizes, d_dict=d_dict), asked.rounds, asked.pool)
        print(table(found), *verdicts(found), "", sep="\n", flush=True)
        for one in found["downs"].values():
            one["timed"] = {name: vars(timed) for name, timed in one["timed"].items()}
        results.append(found)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(results, indent=1) + "\n")
    if asked.plots:
        grown = growth(sizes, 2, asked.pool)
        asked.out.with_suffix(".growth.json").write_text(json.dumps(grown, indent=1) + "\n")
        draw_growth(asked.plots / "score_edges.png", grown, "All edges of the model, from cached activations")


if __name__ == "__main__":
    main()
