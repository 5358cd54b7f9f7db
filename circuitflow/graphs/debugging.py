"""``circuitflow graph``: one prompt's graph outside a run, bounded in features and time, with where the time goes."""

import re
import resource
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.dictionaries.family import Family, load_family
from circuitflow.errors import UserError, nearest
from circuitflow.graphs.building import Clock, Settings, build_graph
from circuitflow.graphs.exporting import local_scan, sizes
from circuitflow.graphs.formats.viewer import Told, write_viewer
from circuitflow.graphs.graph import Graph
from circuitflow.graphs.influence import Kept, Scores, prune, scores
from circuitflow.graphs.labels import labels, read_descriptions
from circuitflow.jobs import Output
from circuitflow.models.loading import load_model
from circuitflow.models.running import LanguageModel
from circuitflow.models.sites import depth_order, parse_site
from circuitflow.plots.attribution_graph import plot_attribution_graph

LOADING = ("model", "transcoders")
DEBUG_FEATURES, DEBUG_SECONDS = 64, 60.0
"""Bounds of a debug run that names none."""
CROSS_LAYER = "cross_layer.json"
SHOWN = 8
"""Features listed, those of most influence."""


@dataclass(frozen=True)
class Wanted:
    """What to run on, and how far to go."""

    prompt: str
    results: Path
    """``results/{model}``."""
    name: str
    """Set of transcoders below ``dictionaries``."""
    architecture: str | None = None
    """Of the set, ``single`` or ``cross_layer``; None: as the files tell."""
    layers: tuple[int, ...] | None = None
    """Layers of the set that are used; None: all that there are."""
    configfile: Path | None = None
    """For the commands that messages name; None: Snakemake's own default."""
    settings: Settings = field(default_factory=Settings)
    seconds: float | None = None
    """After which no further rows are begun."""
    random: int | None = None
    """In place of a set: random transcoders of so many features, which show times and nothing else."""
    shares: tuple[float, float] = (0.8, 0.98)
    dtype: str = "float32"
    device: str = "cpu"


@dataclass(frozen=True)
class Outcome:
    """A graph with what it took."""

    graph: Graph
    kept: Kept
    scores: Scores
    clock: Clock
    files: dict[str, Path]
    memory: float
    """Largest memory of this process so far, MB."""


def run(wanted: Wanted, folder: Path | None) -> Outcome:
    """Load, build, prune, and write ``graph.safetensors``, ``graph.json`` and a figure into a folder, if one is named.

    The time limit counts from the moment that everything is loaded.

    :raises UserError: model or transcoders are not there, or the folder is in use.
    """
    if folder is not None and folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is in use; name a folder (--out) that does not exist yet, or is empty.")
    loading = Clock()
    with loading.phase(LOADING[0]):
        lm = load_model(_manifest(wanted), wanted.dtype, wanted.device)
    with loading.phase(LOADING[1]):
        family = random_family(lm, wanted.random) if wanted.random else wanted_family(wanted)
    clock = Clock(wanted.seconds, dict(loading.phases))
    name = "random" if wanted.random else wanted.name
    facts = {"model": wanted.results.name, "dictionaries": name}
    graph = build_graph(lm, family, wanted.prompt, settings=wanted.settings, facts=facts, clock=clock)
    with clock.phase("pruning and scores"):
        kept, found = prune(graph, *wanted.shares), scores(graph)
    files: dict[str, Path] = {}
    if folder is not None:
        with clock.phase("files and figure"):
            files = _write(folder, wanted, graph, kept, found)
    return Outcome(graph, kept, found, clock, files, _memory())


def wanted_family(wanted: Wanted) -> Family:
    """The set of transcoders, of the layers that are wanted.

    :raises UserError: there is none, or a cross-layer one was trained with other layers.
    """
    family = load_family(transcoder_files(wanted))
    found = tuple(_layer(site) for site in family.reads)
    if wanted.architecture == "cross_layer" and wanted.layers is not None and found != wanted.layers:
        raise UserError(
            f"Cross-layer transcoder {_set(wanted) / CROSS_LAYER} is of layers {_listed(found)}, but key "
            f"transcoders.layers names {_listed(wanted.layers)}; train it again with "
            f"`{_command(wanted, 'transcoders')}`, or change the key."
        )
    return family


def transcoder_files(wanted: Wanted) -> list[Path]:
    """Manifests of the set: of a cross-layer transcoder, or of every wanted layer that has been trained so far.

    :raises UserError: there are none.
    """
    root = _set(wanted)
    if wanted.architecture != "single" and (root / CROSS_LAYER).exists():
        return [root / CROSS_LAYER]
    found = sorted(root.glob("mlp_in.*.json"), key=lambda path: depth_order(parse_site(path.stem)))
    if wanted.layers is not None:
        found = [path for path in found if _layer(path.stem) in wanted.layers]
    if wanted.architecture == "cross_layer" or not found:
        train = f"train them with `{_command(wanted, 'transcoders')}`, " if wanted.architecture else ""
        raise UserError(
            f"{root} holds no {_missing(wanted)}; {train}name another set (--transcoders; "
            f"{nearest(wanted.name, sets(wanted.results))}), or see where time goes with --random 4608."
        )
    return found


def random_family(lm: LanguageModel, d_dict: int, k: int = 32) -> Family:
    """Random TopK transcoders of every layer, for measuring times."""
    draw = torch.Generator().manual_seed(0)
    members = []
    for layer in range(lm.n_layers):
        rows = torch.randn(d_dict, lm.d_model, generator=draw) / lm.d_model**0.5
        members.append(
            Dictionary(
                kind="random",
                reads=(f"mlp_in.{layer}",),
                writes=(f"mlp.{layer}",),
                select="topk",
                W_enc=rows,
                b_enc=torch.zeros(d_dict),
                W_dec=rows / rows.norm(dim=1, keepdim=True),
                b_dec=torch.zeros(lm.d_model),
                settings={"k": min(k, d_dict)},
            )
        )
    return Family(tuple(members))


def show(outcome: Outcome, wanted: Wanted) -> None:
    """Print where the time went, what the graph holds and what it says."""
    from rich.console import Console

    # At least as wide as the tables need, in a pipe too.
    console = Console(width=None if sys.stdout.isatty() else 110)
    for table in tables(outcome, wanted):
        console.print(table)
    if not wanted.random:
        console.print(used(outcome.graph, wanted))
    console.print(sentence(outcome))
    for file in outcome.files.values():
        console.print(f"  {file}", highlight=False)


def tables(outcome: Outcome, wanted: Wanted) -> list[Any]:
    """Phases with their seconds, and the outputs and features of most influence."""
    from rich.table import Table

    phases = Table("phase", title="Where the time goes")
    for name in ("seconds", "share"):
        phases.add_column(name, justify="right")
    total = sum(outcome.clock.phases.values())
    for name, seconds in outcome.clock.phases.items():
        phases.add_row(
            f"load {name}" if name in LOADING else name, f"{seconds:.2f}", f"{seconds / total:.0%}"
        )
    phases.add_row("all", f"{total:.2f}", "", style="bold")
    graph = outcome.graph
    said = Table("output", "probability", title=f"The model goes on: {graph.prompt!r}")
    for token, probability in zip(graph.logit_tokens, graph.probabilities.tolist(), strict=True):
        said.add_row(repr(token), f"{probability:.3f}")
    strongest = Table("feature", "token", "activation", "influence", title="Features of most influence")
    influence = outcome.kept.influence[: graph.first_error]
    for node in (-influence).argsort(kind="stable")[:SHOWN].tolist():
        token = graph.tokens[int(graph.features[node, 1])]
        values = f"{float(graph.activations[node]):.3g}", f"{float(influence[node]):.4f}"
        strongest.add_row(graph.node_id(node), repr(token), *values)
    return [phases, said, strongest] if not wanted.random else [phases]


def used(graph: Graph, wanted: Wanted) -> str:
    """The layers whose transcoders the graph has; the MLPs of the others are errors."""
    there = graph.facts["layers_with_transcoder"]
    missing = [layer for layer in range(int(graph.facts["n_layers"])) if layer not in there]
    rest = f"; the MLPs of layers {_listed(missing)} are errors" if missing else ""
    return f"Transcoders '{wanted.name}' of layers {_listed(there)}{rest}."


def sentence(outcome: Outcome) -> str:
    """How far the graph went, how long all of it would take, its scores and the memory it took."""
    graph, facts = outcome.graph, outcome.graph.facts
    done, active = int(facts["expanded_features"]), int(facts["active_features"])
    whole = outcome.clock.until(active) if done < active else None
    text = f"{done} of {active} active features have rows"
    if facts.get("stopped_early"):
        text += " (the time was up)"
    if whole is not None:
        text += f"; at this pace all would take about {whole:.1f} s"
    inner = int(outcome.kept.nodes[: graph.first_token].sum())
    found = outcome.scores
    return (
        f"{text}. Pruned: {inner} features and errors, {len(outcome.kept.edges)} edges. Replacement "
        f"{found.replacement:.2f}, completeness {found.completeness:.2f}"
        f"{' (of the part that has rows)' if done < active else ''}. Memory at most {outcome.memory:.0f} MB."
    )


def wanted_of(
    config: Mapping[str, Any],
    prompt: str,
    results: Path,
    *,
    transcoders: str | None = None,
    features: int | None = None,
    seconds: float | None = None,
    random: int | None = None,
    configfile: Path | None = None,
) -> Wanted:
    """What a configuration says about graphs, bounded by what the command says.

    Of another set of transcoders than the configuration's all that lies in its folder is used.

    :param config: all sections, as plain values.
    :param results: folder of results of every model.
    :param configfile: where the configuration is, for messages.
    :raises UserError: no set of transcoders is named anywhere, or a bound is not above 0.
    """
    _check_bounds({"--random": random, "--max-features": features, "--seconds": seconds})
    model, graphs = config["model"], config.get("graphs") or {}
    folder, section = results / model["name"], config.get("transcoders") or {}
    name = transcoders or section.get("name")
    said = section if name == section.get("name") else {}
    layers = said.get("layers")
    if name is None and random is None:
        known = ", ".join(sets(folder)) or "none yet"
        raise UserError(
            f"The configuration has no section transcoders; name a set (--transcoders; there are: {known}), or see "
            "where time goes with --random 4608."
        )
    settings = named_settings(graphs)
    return Wanted(
        prompt=prompt,
        results=folder,
        name=name or "random",
        architecture=said.get("architecture"),
        layers=None if layers is None else tuple(sorted(layers)),
        configfile=configfile,
        settings=settings if features is None else few(settings, features),
        seconds=seconds,
        random=random,
        shares=(graphs.get("node_share", 0.8), graphs.get("edge_share", 0.98)),
        dtype=model.get("dtype", "float32"),
        device=config["compute"]["device"],
    )


def few(settings: Settings, features: int) -> Settings:
    """Settings of a bounded run: so many features, ordered anew after every quarter of them."""
    return replace(
        settings, max_nodes=features, reorder_every=max(1, min(settings.reorder_every, features // 4))
    )


def slug(prompt: str) -> str:
    """A name for files, made of a prompt's words."""
    return "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))[:40].strip("-") or "prompt"


def named_settings(values: Mapping[str, Any]) -> Settings:
    """Those of the configuration's section ``graphs`` that shape a graph; others keep their defaults."""
    known = {name: values[name] for name in vars(Settings()) if name in values}
    return Settings(**known)


def _check_bounds(bounds: Mapping[str, float | None]) -> None:
    for option, value in bounds.items():
        if value is not None and not value > 0:
            raise UserError(f"Option {option} is {value}, but it should be above 0.")


def _manifest(wanted: Wanted) -> Path:
    path = wanted.results / "model" / "manifest.json"
    if not path.exists():
        target = f"results/{wanted.results.name}/model/manifest.json"
        raise UserError(
            f"Model {wanted.results.name} is not prepared ({path} does not exist); run `{_command(wanted, target)}`, "
            "or name the folder that has its results (--results)."
        )
    return path


def _command(wanted: Wanted, target: str) -> str:
    """The call that makes a target of this configuration."""
    chosen = f" --configfile {shlex.quote(str(wanted.configfile))}" if wanted.configfile else ""
    return f"snakemake --cores 2{chosen} -- {target}"


def _missing(wanted: Wanted) -> str:
    """What a folder should hold and does not."""
    if wanted.architecture == "cross_layer":
        return f"cross-layer transcoder ({CROSS_LAYER})"
    layers = "" if wanted.layers is None else f" of layers {_listed(wanted.layers)}"
    either = "" if wanted.architecture == "single" else f" or {CROSS_LAYER}"
    return f"transcoders{layers} (mlp_in.L.json{either})"


def _set(wanted: Wanted) -> Path:
    return wanted.results / "dictionaries" / wanted.name


def _layer(site: str) -> int:
    layer = parse_site(site).layer
    assert layer is not None
    return layer


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def _write(folder: Path, wanted: Wanted, graph: Graph, kept: Kept, found: Scores) -> dict[str, Path]:
    names = ("graph.safetensors", "graph.json", "graph.png", "graph.svg")
    files = {name: folder / name for name in names}
    graph.save(files["graph.safetensors"])
    described = wanted.results / "graphs" / wanted.name / "features.json"
    said = labels(read_descriptions(described)) if described.exists() and not wanted.random else {}
    told = Told(
        slug(wanted.prompt),
        local_scan(graph),
        said,
        pruning=dict(zip(("node_threshold", "edge_threshold"), wanted.shares, strict=True)),
        facts={"scores": found._asdict(), "sizes": sizes(graph)},
    )
    write_viewer(files["graph.json"], graph, kept, told)
    out = Output(folder, {"png": files["graph.png"], "svg": files["graph.svg"]}, {"prompt": wanted.prompt})
    plot_attribution_graph({"graph": files["graph.json"]}, {"max_nodes": 80, "max_edges": 150}, out)
    return files


def _memory() -> float:
    """Largest resident memory so far in MB; kilobytes on Linux, bytes on macOS."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / (1e6 if sys.platform == "darwin" else 1e3)


def sets(results: Path) -> Sequence[str]:
    """Names of the sets of transcoders that a model has."""
    root = results / "dictionaries"
    files = [*root.glob("*/mlp_in.*.json"), *root.glob("*/cross_layer.json")]
    return sorted({file.parent.name for file in files})
