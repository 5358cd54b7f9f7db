"""Figures of transcoders and crosscoders, from tables made by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from circuitflow.jobs import Output
from circuitflow.models.sites import in_depth_order
from circuitflow.plots import spanning_training
from circuitflow.plots.spanning_quality import draw, plot_spanning_quality
from circuitflow.plots.spanning_training import has_layers, plot_spanning_training, read_curves
from circuitflow.plots.style import Style, drawing
from circuitflow.store.objects import Manifest
from circuitflow.store.tables import write_table

LAYERS = 6


def quality(together: bool = True) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    lines = []

    def line(quantity: str, site: str, tokens: str, value: float, n: int = 4000, half: float = 0.02) -> None:
        lines.append((quantity, site, tokens, value, n, value - half, value + half))

    for i in reversed(range(LAYERS)):
        for tokens in ("kept", "all"):
            line("fvu", f"mlp.{i}", tokens, 0.2 + 0.05 * i + rng.uniform(0, 0.02))
        line("l0", f"mlp_in.{i}", "kept", 16 + i)
        line("dead_share", f"mlp_in.{i}", "weights", 0.01 * i, 4608, np.nan)
        line("silent_share", f"mlp_in.{i}", "kept", 0.02 * i, 4000, np.nan)
        line("ce_recovered", f"mlp.{i}", "all", 0.97 - 0.01 * i, 2032)
    if together:
        line("ce_recovered", "all", "all", 0.71, 2032, 0.05)
    names = ("quantity", "site", "tokens", "value", "n", "ci_low", "ci_high")
    return {name: np.array(column) for name, column in zip(names, zip(*lines, strict=True), strict=True)}


def write_log(root: Path, name: str, writes: list[list[str]], several: bool) -> Path:
    sites = list(dict.fromkeys(site for member in writes for site in member))
    lines = []
    for step in range(1, 41):
        held = {"fvu": 0.2 + 1 / step, "l0": 16.0, "silent": 0.1}
        if several:
            held["fvu_of"] = {site: 0.2 + i / 10 + 1 / step for i, site in enumerate(sites)}
        lines.append({"tokens": 1000 * step, "dead": 0.1, "held_out": held if step % 4 == 0 else None})
    folder = root / "objects" / name
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = root / f"{name}.json"
    Manifest("dictionary", name, "c", {}, {"writes": writes}).write(path)
    return path


def test_sites_are_ordered_by_depth_prefixes_and_sets_too():
    assert in_depth_order(["mlp.10", "mlp.2", "mlp.2"]) == ["mlp.2", "mlp.10"]
    assert in_depth_order(["resid.3+resid.4", "base:resid.1"]) == ["base:resid.1", "resid.3+resid.4"]


@pytest.mark.parametrize("together", [True, False])
def test_quality_shows_every_value_in_order_of_layers(together: bool):
    table = quality(together)
    with drawing(Style()):
        figure = draw(table, Style())
    fvu, recovered, l0, dead = figure.axes
    drawn = next(line for line in fvu.lines if line.get_marker() == "o").get_ydata()
    kept = (table["quantity"] == "fvu") & (table["tokens"] == "kept")
    assert list(drawn) == pytest.approx(list(table["value"][kept][::-1]))
    assert next(line for line in l0.lines if line.get_marker() == "o").get_ydata()[-1] == 16 + LAYERS - 1
    texts = [text.get_text() for text in recovered.get_legend().get_texts()] if together else []
    assert ("all at once: 0.710" in texts) is together
    assert len(dead.lines) == 2
    note = figure.get_supxlabel()
    assert "n = 4\N{NARROW NO-BREAK SPACE}000 tokens" in note
    assert "95 %" in note


def test_figures_are_written_and_equal_work_gives_equal_bytes(tmp_path: Path):
    table = tmp_path / "quality.parquet"
    write_table(table, quality(), {})
    logs = [write_log(tmp_path, f"mlp_in.{i}", [[f"mlp.{i}"]], False) for i in range(3)]
    for stage, inputs in (
        (plot_spanning_quality, {"quality": table}),
        (plot_spanning_training, {"dictionaries": logs}),
    ):
        found = []
        for turn in "ab":
            folder = tmp_path / stage.__name__ / turn
            folder.mkdir(parents=True)
            files = {kind: folder / f"figure.{kind}" for kind in ("png", "svg")}
            stage(inputs, {"style": {"dpi": 100, "subject": "toy"}}, Output(folder, files, {"a": 1}))
            found.append([file.read_bytes() for file in files.values()])
        assert found[0] == found[1]


def test_curves_of_a_cross_layer_transcoder_are_of_every_site(tmp_path: Path):
    path = write_log(tmp_path, "cross", [["mlp.0", "mlp.1"], ["mlp.1"]], True)
    curves = read_curves([path])
    assert set(curves) == {"fvu mlp.0", "fvu mlp.1", "l0 mlp.0+mlp.1", "dead mlp.0+mlp.1"}
    assert curves["fvu mlp.1"]["value"][0] == pytest.approx(0.2 + 0.1 + 0.25)
    assert list(curves["fvu mlp.0"]["tokens"]) == [4000.0 * i for i in range(1, 11)]


@pytest.mark.parametrize(
    ("writes", "layers"), [([["mlp.0", "mlp.1"], ["mlp.1"]], True), ([["resid.0", "resid.1"]], False)]
)
def test_only_cross_layer_transcoders_have_features_of_layers(tmp_path: Path, writes, layers: bool):
    path = write_log(tmp_path, "one", writes, True)
    assert has_layers([path]) is layers
    with drawing(Style()):
        figure = spanning_training.draw(read_curves([path]), Style(), layers)
    assert ("of all layers together" in figure.get_supxlabel().replace("\n", " ")) is layers


def test_the_largest_share_of_silent_features_stands_below_the_top():
    table = quality()
    one = np.isin(table["quantity"], ("dead_share", "silent_share")) & (table["site"] == "mlp_in.5")
    kept = one | (table["site"] == "mlp.5") | ((table["quantity"] == "l0") & (table["site"] == "mlp_in.5"))
    with drawing(Style()):
        figure = draw({name: column[kept] for name, column in table.items()}, Style())
    dead = figure.axes[3]
    highest = max(float(line.get_ydata()[0]) for line in dead.lines)
    assert highest == pytest.approx(0.1)
    assert dead.get_ylim()[1] > 1.1 * highest
