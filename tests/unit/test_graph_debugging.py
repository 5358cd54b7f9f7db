"""One prompt outside a run: bounds on features and time, where the time goes, and a result that can be used."""

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from circuitflow.dictionaries.dictionary import save_dictionary
from circuitflow.errors import UserError
from circuitflow.graphs import debugging
from circuitflow.graphs.building import Clock, Settings
from circuitflow.graphs.debugging import (
    Outcome,
    Wanted,
    few,
    named_settings,
    random_family,
    run,
    sentence,
    slug,
    tables,
    transcoder_files,
    used,
    wanted_family,
    wanted_of,
)
from circuitflow.graphs.formats.viewer_reading import read_viewer
from circuitflow.graphs.graph import Graph
from circuitflow.store.objects import Manifest

PROMPT = "The teacher near the farmers"
CONFIG = {"model": {"name": "toy", "dtype": "float32"}, "compute": {"device": "cpu"}}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def results(toy_manifest: Callable[..., Path]) -> Path:
    return toy_manifest().parents[2]


@pytest.fixture(scope="module")
def wanted(results: Path) -> Wanted:
    return wanted_of(CONFIG, PROMPT, results, features=12, random=48)


@pytest.fixture(scope="module")
def outcome(wanted: Wanted, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run(wanted, tmp_path_factory.mktemp("debug"))


def printed(outcome: Outcome, wanted: Wanted) -> str:
    console = Console(width=110, record=True, file=io.StringIO())
    for table in tables(outcome, wanted):
        console.print(table)
    return console.export_text()


def test_a_bounded_graph_can_be_used(outcome: Outcome) -> None:
    graph = Graph.load(outcome.files["graph.safetensors"])
    assert len(graph.features) == graph.facts["expanded_features"] == 12
    assert graph.facts["active_features"] > 12
    assert graph.facts["vocab_size"] > max(graph.token_ids)
    view = read_viewer(outcome.files["graph.json"])
    assert len(view.kept.edges) == len(outcome.kept.edges)
    assert view.facts["scores"] == outcome.scores._asdict()
    assert outcome.files["graph.png"].stat().st_size > 10_000


def test_it_says_where_the_time_goes(outcome: Outcome, wanted: Wanted) -> None:
    text = printed(outcome, wanted)
    for phase in (
        "load model",
        "load transcoders",
        "forward pass",
        "features",
        "rows",
        "order of influence",
        "files",
    ):
        assert phase in text
    seconds = outcome.clock.phases
    assert f"{sum(seconds.values()):.2f}" in text
    assert all(value >= 0 for value in seconds.values())


def test_it_says_how_far_it_went(outcome: Outcome) -> None:
    active = outcome.graph.facts["active_features"]
    told = sentence(outcome)
    assert told.startswith(f"12 of {active} active features have rows; at this pace all would take about")
    assert "(of the part that has rows)" in told
    assert f"completeness {outcome.scores.completeness:.2f}" in told


def test_the_time_limit_ends_the_search_and_leaves_a_graph(wanted: Wanted) -> None:
    ended = run(replace(wanted, seconds=0.0), None)
    assert ended.graph.facts["stopped_early"]
    assert ended.graph.facts["expanded_features"] == 0
    assert len(ended.graph.targets) == len(ended.graph.logits) > 0
    assert ended.files == {}
    assert "0 of" in sentence(ended)
    assert "(the time was up)" in sentence(ended)


def test_a_set_of_transcoders_is_found_and_listed(
    results: Path, wanted: Wanted, outcome: Outcome, tmp_path: Path
) -> None:
    """Layers that have been trained so far are used; what is said lists features of most influence."""
    from circuitflow.models.loading import load_model

    root = tmp_path / "toy"
    family = random_family(load_model(results / "toy" / "model" / "manifest.json"), 48)
    for name in ("model", "objects"):
        root.mkdir(exist_ok=True)
        (root / name).symlink_to(results / "toy" / name)
    for member in (family.members[2], family.members[0]):
        path = root / "dictionaries" / "mine" / f"{member.reads[0]}.json"
        save_dictionary(tmp_path / "objects" / path.stem / "weights.safetensors", member)
        Manifest("dictionary", path.stem, path.stem, {}, {}).write(path)
    mine = wanted_of({**CONFIG, "transcoders": {"name": "mine"}}, PROMPT, tmp_path, features=12)
    assert [path.stem for path in transcoder_files(mine)] == ["mlp_in.0", "mlp_in.2"]
    found = run(mine, None)
    assert found.graph.facts["layers_with_transcoder"] == [0, 2]
    assert used(found.graph, mine) == "Transcoders 'mine' of layers 0, 2; the MLPs of layers 1, 3 are errors."
    text = printed(found, mine)
    assert "Features of most influence" in text
    best = int((-found.kept.influence[: found.graph.first_error]).argsort()[0])
    assert found.graph.node_id(best) in text
    with pytest.raises(UserError, match=r"holds no transcoders .*did you mean 'mine'.*--random 4608"):
        run(replace(mine, name="mines"), None)


def trained(results: Path, *names: str) -> None:
    """Files where a set of transcoders has its manifests."""
    folder = results / "toy" / "dictionaries" / "mine"
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.json").touch()


def of_set(results: Path, transcoders: str | None = None, **section: Any) -> Wanted:
    config = {**CONFIG, "transcoders": {"name": "mine", "architecture": "single", "layers": None, **section}}
    return wanted_of(config, PROMPT, results, transcoders=transcoders, configfile=Path("my runs/a.yaml"))


def test_the_configuration_says_which_layers_and_architecture(tmp_path: Path) -> None:
    """Not what else lies in the folder; of another set than the configuration's, all that does."""
    trained(tmp_path, "mlp_in.0", "mlp_in.1", "mlp_in.2", "mlp_in.3", "cross_layer")

    def stems(wanted: Wanted) -> list[str]:
        return [path.stem for path in transcoder_files(wanted)]

    assert stems(of_set(tmp_path, layers=[2, 1])) == ["mlp_in.1", "mlp_in.2"]
    assert stems(of_set(tmp_path)) == [f"mlp_in.{layer}" for layer in range(4)]
    assert stems(of_set(tmp_path, architecture="cross_layer")) == ["cross_layer"]
    assert stems(of_set(tmp_path, "mine", name="other", layers=[1])) == ["cross_layer"]


def test_what_is_missing_is_told_with_the_command_that_makes_it(tmp_path: Path) -> None:
    trained(tmp_path, "mlp_in.0")
    train = "train them with `snakemake --cores 2 --configfile 'my runs/a.yaml' -- transcoders`"
    for section, what in (
        ({"layers": [1, 2]}, r"no transcoders of layers 1, 2 \(mlp_in\.L\.json\)"),
        ({"architecture": "cross_layer"}, r"no cross-layer transcoder \(cross_layer\.json\)"),
    ):
        with pytest.raises(UserError, match=f"holds {what}; {train}"):
            transcoder_files(of_set(tmp_path, **section))
    with pytest.raises(UserError) as told:
        transcoder_files(of_set(tmp_path, "mines"))
    assert "snakemake" not in str(told.value)  # it would train the configuration's
    prepare = "run `snakemake --cores 2 --configfile 'my runs/a.yaml' -- results/toy/model/manifest.json`"
    with pytest.raises(UserError, match=rf"is not prepared .*{prepare}, or name the folder .*--results"):
        run(of_set(tmp_path), None)


def test_a_cross_layer_transcoder_of_other_layers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path, "cross_layer")
    family: Any = SimpleNamespace(reads=("mlp_in.0", "mlp_in.1"))
    monkeypatch.setattr(debugging, "load_family", lambda files: family)
    assert wanted_family(of_set(tmp_path, architecture="cross_layer", layers=[1, 0])) is family
    with pytest.raises(UserError, match=r"is of layers 0, 1, but key transcoders\.layers names 1, 2; train"):
        wanted_family(of_set(tmp_path, architecture="cross_layer", layers=[1, 2]))


@pytest.mark.parametrize("bound", [{"random": -5}, {"random": 0}, {"features": 0}, {"seconds": 0.0}])
def test_bounds_are_above_0(bound: dict[str, Any], results: Path) -> None:
    with pytest.raises(UserError, match=r"Option --[a-z-]+ is (-5|0|0\.0), but it should be above 0"):
        wanted_of(CONFIG, PROMPT, results, **({"random": 48} | bound))


def test_the_pace_leaves_out_the_first_batch() -> None:
    """It starts things up: 20 s for its 16 features, and 2 s for each 16 after it."""
    clock = Clock(batches=[(20.0, 16)])
    assert clock.until(160) is None
    clock.batches += [(22.0, 32), (24.0, 48)]
    assert clock.until(160) == pytest.approx(38.0)


def test_mistakes_are_told_in_a_sentence(results: Path, tmp_path: Path, wanted: Wanted) -> None:
    with pytest.raises(UserError, match=r"no section transcoders; .*--random 4608"):
        wanted_of(CONFIG, PROMPT, results)
    with pytest.raises(UserError, match="Model other is not prepared"):
        run(replace(wanted, results=tmp_path / "other"), None)
    (tmp_path / "kept").touch()
    with pytest.raises(UserError, match="is in use; name a folder"):
        run(wanted, tmp_path)


def test_the_configuration_shapes_the_graph_and_the_command_bounds_it(results: Path) -> None:
    graphs = {"max_logits": 3, "max_nodes": 500, "prompts": [], "node_share": 0.7, "edge_share": 0.9}
    config = {**CONFIG, "graphs": graphs, "transcoders": {"name": "set"}}
    wanted = wanted_of(config, PROMPT, results, seconds=5.0)
    assert (wanted.settings.max_logits, wanted.settings.max_nodes) == (3, 500)
    assert (wanted.shares, wanted.seconds, wanted.name) == ((0.7, 0.9), 5.0, "set")
    assert wanted_of(config, PROMPT, results, transcoders="other").name == "other"
    assert few(Settings(), 64) == replace(Settings(), max_nodes=64, reorder_every=16)
    assert few(Settings(), 2).reorder_every == 1
    assert named_settings({"unknown": 1}) == Settings()


def test_names_of_prompts() -> None:
    assert slug("The capital of France is") == "the-capital-of-france-is"
    assert slug("  ?!") == "prompt"


def test_the_command_line(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """`circuitflow graph PROMPT --debug --random 48`, with the configuration's values put in place of a file."""
    from circuitflow import cli

    seen: list[Any] = []
    monkeypatch.setattr(cli, "_config", lambda path: FakeConfig())
    monkeypatch.setattr(debugging, "run", lambda wanted, out: seen.append((wanted, out)))
    monkeypatch.setattr(debugging, "show", lambda outcome, wanted: None)
    cli.graph(PROMPT, Path("x.yaml"), debug=True, random=48, results=results)
    cli.graph(
        PROMPT,
        Path("x.yaml"),
        debug=True,
        max_features=5,
        seconds=2.0,
        random=48,
        out=tmp_path,
        results=results,
    )
    cli.graph(PROMPT, Path("x.yaml"), random=48, results=results)
    bounds = [(wanted.settings.max_nodes, wanted.seconds, out) for wanted, out in seen]
    assert {wanted.configfile for wanted, _ in seen} == {Path("x.yaml")}
    assert bounds == [(64, 60.0, None), (5, 2.0, tmp_path), (Settings().max_nodes, None, None)]


class FakeConfig:
    """What the command takes of a configuration."""

    def model_dump(self) -> dict[str, Any]:
        return {**CONFIG, "compute": {"device": "cpu", "threads": 1, "deterministic": False}}
