"""Jobs: kept work, manifests, logs, one-sentence errors."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from circuitflow.errors import UserError
from circuitflow.jobs import Output, run_light, run_stage
from circuitflow.store.files import read_json, write_json
from circuitflow.store.objects import ObjectFolder, Recipe, content_of, is_busy, read_manifest
from circuitflow.store.tables import read_provenance, read_table, write_table


class Items(dict):
    """What Snakemake hands to scripts: named values that iterate over the values."""

    def __iter__(self) -> Any:
        return iter(self.values())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input.txt").write_text("some input")
    return tmp_path


def job(rule: str = "some_stage", **changes: Any) -> SimpleNamespace:
    values = {
        "rule": rule,
        "input": Items(text="input.txt"),
        "output": Items(table="results/m/table.parquet"),
        "params": Items(k=3, code="c0de", named="of the others"),
        "wildcards": Items(),
        "log": [f"logs/{rule}.log"],
    }
    return SimpleNamespace(**{**values, **changes})


def stage_counting(calls: list[dict[str, Any]]) -> Any:
    def compute(inputs: Any, params: Any, out: Output) -> None:
        calls.append(dict(params))
        write_table(out.files["table"], {"k": [params["k"]]}, out.provenance)
        out.details["note"] = "done"

    return compute


def test_work_is_done_once_and_kept_when_settings_go_back(here: Path) -> None:
    calls: list[dict[str, Any]] = []
    for k in (3, 4, 3):
        run_stage(job(params=Items(k=k, code="c0de")), stage_counting(calls))
        assert read_table(here / "results/m/table.parquet")["k"].tolist() == [k]
    assert calls == [{"k": 3}, {"k": 4}]
    assert len(list((here / "results/m/objects").iterdir())) == 2


@pytest.mark.parametrize("change", ["param", "input", "code"])
def test_what_shapes_an_object_makes_another(here: Path, change: str) -> None:
    calls: list[dict[str, Any]] = []
    run_stage(job(), stage_counting(calls))
    if change == "input":
        (here / "input.txt").write_text("other input")
    params = Items(k=5 if change == "param" else 3, code="other" if change == "code" else "c0de")
    run_stage(job(params=params), stage_counting(calls))
    assert len(calls) == 2


def test_recompute_bypasses_what_is_kept(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    run_stage(job(), stage_counting(calls))
    monkeypatch.setenv("CIRCUITFLOW_RECOMPUTE", "another,some_stage")
    run_stage(job(), stage_counting(calls))
    assert len(calls) == 2


def test_a_manifest_points_to_its_object_and_carries_provenance(here: Path) -> None:
    def compute(inputs: Any, params: Any, out: Output) -> None:
        (out.folder / "weights").write_text("w")
        out.content = "abc"

    run_stage(job(output=Items(manifest="results/m/dictionaries/d.json")), compute, kind="dictionary")
    path = here / "results/m/dictionaries/d.json"
    manifest = read_manifest(path, "dictionary")
    assert manifest.content == content_of(path) == "abc"
    assert (manifest.folder(path) / "weights").read_text() == "w"
    assert manifest.provenance["params"] == {"k": 3}
    assert manifest.sources == {"text": "../../input.txt"}
    with pytest.raises(UserError, match="describes a dictionary, but a store is needed"):
        read_manifest(path, "store")


def test_a_stage_finds_what_an_interrupted_one_left(here: Path) -> None:
    def killed(inputs: Any, params: Any, out: Output) -> None:
        (out.folder / "state").write_text("half")
        raise KeyboardInterrupt

    def resumed(inputs: Any, params: Any, out: Output) -> None:
        assert (out.folder / "state").read_text() == "half"
        write_table(out.files["table"], {"k": [1]})

    with pytest.raises(KeyboardInterrupt):
        run_stage(job(), killed)
    run_stage(job(), resumed)
    assert (here / "results/m/table.parquet").exists()


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (UserError("Key k is 9, expected 3."), "some_stage: error: Key k is 9, expected 3."),
        (OSError(errno.ENOSPC, "No space left", "/x"), "no space is left on the disk"),
        (ValueError("odd"), "unexpected ValueError: odd (full trace in logs/some_stage.log)"),
    ],
)
def test_an_error_ends_with_one_sentence(
    here: Path, capsys: pytest.CaptureFixture[str], error: Exception, sentence: str
) -> None:
    def compute(inputs: Any, params: Any, out: Output) -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_stage(job(), compute)
    assert ended.value.code == 1
    screen = capsys.readouterr().err
    assert sentence in screen
    assert "Traceback" not in screen
    assert sentence in (here / "logs/some_stage.log").read_text()


def test_light_stages_write_provenance_beside_formats_that_cannot_carry_it(here: Path) -> None:
    def compute(inputs: Any, params: Any, out: Output) -> None:
        out.files["lines"].write_text("{}\n")
        out.details["n"] = 1

    outputs = Items(lines="results/m/t/train.jsonl", provenance="results/m/t/provenance.json")
    run_light(job(output=outputs), compute)
    record = read_json(here / "results/m/t/provenance.json")
    assert record["details"] == {"n": 1}
    assert record["provenance"]["params"] == {"k": 3}


def test_two_processes_never_write_one_object(here: Path) -> None:
    recipe = Recipe("s", {}, {}, "c")
    with ObjectFolder(here, recipe) as first:
        assert is_busy(first.path)
        with pytest.raises(UserError, match="Another process is already working"), ObjectFolder(here, recipe):
            pass
    assert not is_busy(first.path)


def test_a_store_narrowed_to_its_arrays_ignores_the_others(here: Path) -> None:
    def manifest(contents: dict[str, str]) -> Path:
        path = here / "m.json"
        write_json(path, {"content": "all" + "".join(contents.values()), "details": {"contents": contents}})
        return path

    before = content_of(manifest({"a": "1", "b": "2"}), ["a"])
    assert content_of(manifest({"a": "1", "b": "3"}), ["a"]) == before
    assert content_of(manifest({"a": "9", "b": "2"}), ["a"]) != before
    assert content_of(manifest({"a": "1", "b": "3"})) == "all13"


def test_tables_are_equal_bytes_for_equal_work_and_keep_provenance(here: Path) -> None:
    for name in ("a", "b"):
        write_table(here / f"{name}.parquet", {"x": [1.5, 2.5], "s": ["p", "q"]}, {"k": 1})
    assert (here / "a.parquet").read_bytes() == (here / "b.parquet").read_bytes()
    write_table(here / "b.parquet", {"x": [1.5, 2.5], "s": ["p", "q"]}, {"k": 2})
    assert content_of(here / "a.parquet") == content_of(here / "b.parquet")
    assert read_provenance(here / "b.parquet") == {"k": 2}
    (here / "b.parquet").write_text("not parquet")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        read_table(here / "b.parquet")


def test_the_log_of_a_job_says_how_far_it_is(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from circuitflow.progress import progress

    def compute(inputs: Any, params: Any, out: Output) -> None:
        progress("steps", 0, 4)
        progress("steps", 4, 4, fvu=0.125)
        state = read_json(Path("logs/some_stage.progress.json"))
        assert (state["done"], state["total"], state["pid"]) == (4, 4, os.getpid())
        write_table(out.files["table"], {"k": [1]})

    run_stage(job(), compute)
    assert "some_stage: steps 4/4 (100 %), fvu 0.125" in capsys.readouterr().err
    assert not (here / "logs/some_stage.progress.json").exists()
