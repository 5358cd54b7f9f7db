"""Figures about error nodes, from small tables made by hand."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from circuitflow.config_error_nodes import ErrorNodesSection
from circuitflow.error_nodes.baselines import ScoredNodes
from circuitflow.error_nodes.planning import planned, study_of
from circuitflow.jobs import Output
from circuitflow.plots import (
    error_ablation,
    error_baselines,
    error_components,
    error_decomposition,
    error_heatmap,
    error_restoration,
    error_windows,
)
from circuitflow.plots.error_series import layers
from circuitflow.plots.style import Style, drawing
from circuitflow.store.tables import write_table

STYLE = Style(dpi=50)
SITES = ["resid.6", "resid.12", "resid.18"]
FACTS = {"conventions": {"ablation": "mean; …"}, "kinds": ["resid"]}
EXPERIMENTS = (error_ablation, error_baselines, error_heatmap, error_restoration, error_windows)


def experiments(F: float = 0.8) -> dict[str, np.ndarray]:
    """The columns of a plan over three layers; F falls by 0.1 with every ablated layer."""
    features = {site: [(site, number, -1) for number in range(6)] for site in SITES}
    scores = {node: 0.5 / (1 + node[1]) for here in features.values() for node in here}
    scores |= {(site, -1, -1): 0.2 for site in SITES}
    nodes = ScoredNodes(features, {s: [(s, -1, -1)] for s in SITES}, {"train": scores, "test": scores})
    params = ErrorNodesSection(restore_top=[1, 3], widths=[1, 2]).model_dump()
    found = planned(study_of(nodes, {**params, "sites": SITES}), 3)
    width = np.array([SITES.index(one.sites[1]) - SITES.index(one.sites[0]) + 1 for one in found])
    value = F - 0.1 * (width - 1)
    columns = {
        "experiment": [one.name for one in found],
        "what": [one.what for one in found],
        "first": [one.sites[0] for one in found],
        "last": [one.sites[1] for one in found],
        "restored_first": [one.restored_sites[0] for one in found],
        "restored_last": [one.restored_sites[1] for one in found],
    }
    made = {name: np.array(column, object) for name, column in columns.items()}
    made |= {name: np.array([getattr(one, name) for one in found]) for name in ("k", "threshold", "position")}
    made |= {"nodes": np.array([len(one.removed) for one in found]), "layers": width}
    made |= {"F": value, "low": value - 0.05, "high": value + 0.05, "predicted": value + 0.02}
    return made | {"score_test": 0.2 * width, "n": np.full(len(found), 40)}


def parts() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rows = [
        (site, split, part)
        for site in SITES
        for split in ("train", "test")
        for part in error_components.LOOKS
    ]
    names = ("site", "split", "part")
    summary = dict(zip(names, np.array(rows, object).T, strict=True)) | {"n": np.full(len(rows), 9)}
    for number, name in enumerate(("delta", "gradient", "cosine", "score"), 1):
        summary |= {
            f"{name}{end}": np.full(len(rows), number + by)
            for end, by in (("", 0), ("_low", -0.5), ("_high", 0.5))
        }
    single = {name: summary[name] for name in (*names, "delta", "gradient", "cosine", "score")}
    single["score"] = np.linspace(-1, 1, len(rows))
    return summary, single


def decomposed() -> dict[str, np.ndarray]:
    rows = [(site, "corpus", name) for site in SITES for name in error_decomposition.SHARES]
    rows += [
        (site, data, name)
        for site in SITES
        for data in ("train", "test")
        for name in error_decomposition.PARTS
    ]
    value = np.array([0.0 if name == "effect_skipped" else 0.3 for _, _, name in rows])
    columns = dict(zip(("site", "data", "quantity"), np.array(rows, object).T, strict=True))
    return columns | {"value": value, "low": value - 0.1, "high": value + 0.1, "n": np.full(len(rows), 9)}


def drawn(module, table) -> Figure:
    with drawing(STYLE):
        return module.draw(table, FACTS, STYLE)


def texts(figure: Figure) -> str:
    with drawing(STYLE):
        figure.draw_without_rendering()
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def note(figure: Figure) -> str:
    return figure._supxlabel.get_text().replace("\n", " ")


@pytest.mark.parametrize("module", EXPERIMENTS)
def test_figures_of_experiments_tell_n_and_conventions(module):
    said = note(drawn(module, experiments()))
    assert "n = 40 test prompts" in said
    assert "95 %" in said
    assert "Ablation: mean. Error nodes of resid sites" in said
    assert "beyond" not in said


def test_footnotes_name_the_method_of_the_scores():
    for module in (error_ablation, error_windows):
        with drawing(STYLE):
            told = module.draw(experiments(), {**FACTS, "method": "ig"}, STYLE)
            untold = module.draw(experiments(), FACTS, STYLE)
        assert "integrated gradients scores" in told.get_supxlabel().replace("\n", " ")
        assert "of the run's scores.method" in untold.get_supxlabel().replace("\n", " ")
        assert "AtP" not in untold.get_supxlabel()


def test_points_beyond_the_axis_are_told_and_kept_inside():
    table = experiments()
    table["F"][table["experiment"] == "sliding"] = 7.0
    figure = drawn(error_windows, table)
    assert "5 points beyond the axis" in note(figure)
    tops = [max(line.get_ydata()) for axes in figure.axes for line in axes.lines if len(line.get_ydata())]
    assert max(tops) <= 1.6


def test_layers_are_named_in_short():
    assert layers("resid.6", "resid.6") == "6"
    assert layers("attn.6", "resid.12") == "6–12"
    assert layers("embed", "resid.0") == "embed–0"


def test_the_heat_map_has_a_cell_for_every_bound_and_range():
    figure = drawn(error_heatmap, experiments())
    image = figure.axes[0].images[0].get_array()
    assert image.shape == (3, 4)  # ranges: none, 6–12, 12–18 and all
    np.testing.assert_allclose(image[:, 0], [0.8, 0.7, 0.6])
    assert "[0.55, 0.65]" in texts(figure)


def test_positions_stand_in_the_order_of_the_prompt():
    figure = drawn(error_ablation, experiments())
    axes = next(
        axes for axes in figure.axes if axes.images and axes.get_title(loc="left") == "Errors at one position"
    )
    assert [label.get_text().split("\n")[0] for label in axes.get_xticklabels()] == ["2", "1", "0"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["18", "12", "6", "all"]
    np.testing.assert_allclose(axes.images[0].get_array()[:, 0], [0.8, 0.8, 0.8, 0.6])


def test_every_width_and_direction_has_its_panel():
    titles = [axes.get_title(loc="left") for axes in drawn(error_windows, experiments()).axes]
    assert [title for title in titles if title] == [
        *(
            "Sliding, 1 layer",
            "Sliding, 2 layers",
            "Growing from the first layer",
            "Growing from the last layer",
        ),
    ]


def test_every_baseline_is_drawn_and_named():
    said = texts(drawn(error_baselines, experiments()))
    for name in ("errors", "top-1", "top-5", "top-10", "nearest in |score|", "committee"):
        assert name in said


def test_the_range_of_all_layers_is_not_joined_to_the_others():
    axes = drawn(error_restoration, experiments()).axes[0]
    joined = [line for line in axes.lines if line.get_linestyle() == "-" and len(line.get_xdata()) > 1]
    joined = [line for line in joined if len(set(line.get_xdata())) > 1 and line.get_linewidth() == 0.9]
    lengths = [len(line.get_xdata()) for line in joined if line.get_linestyle() != ":"]
    assert lengths == [2, 2]  # K = 1 and K = 3, over 6–12 and 12–18
    assert "K = 3" in texts(axes.figure)


def test_skipped_tokens_are_drawn_only_where_there_are_any():
    table = decomposed()
    with drawing(STYLE):
        without = texts(error_decomposition.draw(table, STYLE))
        table["value"][table["quantity"] == "effect_skipped"] = 0.1
        with_them = texts(error_decomposition.draw(table, STYLE))
    assert "skipped tokens" in with_them
    assert "\nskipped tokens\n" not in without
    assert "2643" not in without


def test_components_are_of_the_train_pairs():
    summary, single = parts()
    with drawing(STYLE):
        figure = error_components.draw(summary, single, STYLE, "nats")
    assert "n = 9 train pairs" in note(figure)
    assert "IE (nats)" in texts(figure)
    marks = [
        len(found.get_offsets())
        for axes in figure.axes
        for found in axes.collections
        if hasattr(found, "get_sizes")
    ]
    assert sum(marks) >= 2 * len(SITES)


@pytest.mark.parametrize(
    "name",
    [module.__name__.rpartition(".")[2] for module in (*EXPERIMENTS, error_components, error_decomposition)],
)
def test_stages_write_equal_bytes(name, tmp_path):
    module = globals()[name]
    summary, single = parts()
    tables = {
        "experiments": experiments(),
        "components": summary,
        "pairs": single,
        "decomposition": decomposed(),
    }
    inputs = {}
    for table, columns in tables.items():
        inputs[table] = tmp_path / f"{table}.parquet"
        write_table(inputs[table], columns, FACTS)

    def once(folder: Path) -> list[bytes]:
        folder.mkdir()
        files = {kind: folder / f"{name}.{kind}" for kind in ("png", "svg")}
        getattr(module, f"plot_{name}")(
            inputs, {"style": {"dpi": 40}}, Output(folder, files, {"stage": name})
        )
        return [path.read_bytes() for path in files.values()]

    assert once(tmp_path / "first") == once(tmp_path / "second")
