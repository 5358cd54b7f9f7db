"""Figures of model diffing and of crosscoders: everything of the tables is there, and empty tables say so."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from circuitflow.jobs import Output
from circuitflow.plots import crosscoder_layers, diffing
from circuitflow.plots.style import Style, drawing
from circuitflow.store.files import write_json
from circuitflow.store.tables import write_table

SITES = ("resid.0", "resid.1", "resid.2")


def features() -> dict[str, np.ndarray]:
    """Twelve shared features, three exclusive ones of each verdict in the second model, two silent ones."""
    rng = np.random.default_rng(0)
    classes = np.array(["shared"] * 12 + ["tuned"] * 3 + ["base"] * 2 + ["shared"] * 2, object)
    rho = np.concatenate([rng.uniform(0.4, 0.6, 12), [0.9, 0.95, 0.8], [0.1, 0.05], [0.5, 0.5]])
    nu = np.full(19, np.nan)
    nu[12:17] = [0.02, 0.6, 3.0, 0.0, np.nan]
    verdict = np.array([""] * 12 + ["exclusive", "shrunk", "shrunk", "exclusive", "unknown", "", ""], object)
    return {
        "density": np.concatenate([rng.uniform(1e-3, 0.1, 17), [0, 0]]),
        "rho": rho,
        "class": classes,
        "cosine": rng.uniform(0.5, 1, 19),
        "nu_error": nu,
        "nu_error_low": nu - 0.1,
        "nu_error_high": nu + 0.1,
        "nu_reconstruction": nu / 2,
        "nu_reconstruction_low": nu / 2 - 0.1,
        "nu_reconstruction_high": nu / 2 + 0.1,
        "verdict": verdict,
    }


SUMMARY: dict[str, Any] = {
    "site": "resid.2",
    "features": 19,
    "alive": 17,
    "tokens": 4000,
    "l0": 5.8,
    "fvu": {"base": 0.0123, "tuned": 0.0456},
    "bounds": {"shared": [0.3, 0.7], "error_ratio": 0.2, "reconstruction_ratio": 0.5},
}


def words(figure: Figure) -> str:
    """All text of a figure."""
    from matplotlib.text import Text

    return "\n".join(str(text.get_text()) for text in figure.findobj(Text))


def drawn(table: dict[str, np.ndarray]) -> Figure:
    with drawing(Style()):
        return diffing.draw(table, SUMMARY, Style(), ("first", "second"))


def test_the_figure_counts_what_is_in_the_table() -> None:
    text = words(drawn(features()))
    assert "Which model has each feature (n = 17)" in text
    assert "shared: 12" in text
    assert "second model alone: 1" in text
    assert "second model alone, not borne out: 2" in text
    assert "first model alone, not borne out: 1" in text
    assert "Shared features' directions (n = 12)" in text
    assert "Are exclusive features missing in the other model? (n = 4)" in text  # one is unknown
    assert "first (held-out FVU 0.012)" in text.replace("\n", " ")
    assert "2 silent features left out" in text.replace("\n", " ")
    unknown = "1 exclusive feature of which a ratio is unknown left out at the lower left"
    assert unknown in text.replace("\n", " ")


def test_ratios_beyond_the_axes_stand_at_their_ends() -> None:
    figure = drawn(features())
    offsets = np.concatenate(
        [dots.get_offsets() for dots in figure.axes[2].collections if len(dots.get_offsets()) > 1]
    )
    assert offsets[:, 0].max() == diffing.NU_RANGE[1]  # 3.0 in the table


def test_features_that_the_check_bears_out_are_filled() -> None:
    axes = drawn(features()).axes[2]
    dots = {str(group.get_label()): group for group in axes.collections if "alone" in str(group.get_label())}
    assert list(dots) == [
        "first model alone: 1", "second model alone: 1", "second model alone, not borne out: 2",
    ]  # fmt: skip
    assert dots["second model alone: 1"].get_offsets()[0, 0] == 0.02
    paper = to_rgb(Style().palette.paper)
    hollow = {name: tuple(group.get_facecolor()[0][:3]) == paper for name, group in dots.items()}
    assert list(hollow.values()) == [False, False, True]


def test_tables_without_exclusive_or_shared_features_say_so() -> None:
    table = features()
    only = {name: column[:12] for name, column in table.items()}
    assert "no exclusive feature whose two ratios are known" in words(drawn(only))
    none = {name: column[12:17] for name, column in table.items()}
    assert "no shared feature" in words(drawn(none))


def test_the_stage_writes_the_same_bytes_twice(tmp_path: Path) -> None:
    write_table(tmp_path / "features.parquet", features())
    write_json(tmp_path / "summary.json", SUMMARY)
    inputs = {"features": tmp_path / "features.parquet", "summary": tmp_path / "summary.json"}
    kept = []
    for name in ("a", "b"):
        files = {kind: tmp_path / f"{name}.{kind}" for kind in ("png", "svg")}
        params = {"style": {}, "models": ["first", "second"]}
        diffing.plot_diffing(inputs, params, Output(tmp_path, files, {"stage": "test"}))
        kept.append({kind: file.read_bytes() for kind, file in files.items()})
    assert kept[0] == kept[1]


def located() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Four features: one of each site, and a silent one."""
    share = np.array([[1.0, 0, 0], [0, 1.0, 0], [0, 0.5, 0.5], [0, 0, 1.0]])
    table = {
        "feature": np.arange(4),
        "density": np.array([0.1, 0.2, 0.1, 0.0]),
        "peak": np.array(["resid.0", "resid.1", "resid.1", "resid.2"], object),
        "effective": np.array([1.0, 1.0, 2.0, 1.0]),
        "neighbour_cosine": np.array([np.nan, np.nan, 0.75, np.nan]),
    }
    norms = {
        "feature": np.repeat(np.arange(4), 3),
        "site": np.tile(np.array(SITES, object), 4),
        "norm": np.sqrt(share).ravel(),
        "share": share.ravel(),
    }
    return table, norms


def test_features_by_site_are_counted_and_sorted_by_depth() -> None:
    with drawing(Style()):
        figure = crosscoder_layers.draw(*located(), Style())
    text = words(figure)
    assert "n = 3 features that fire; 1 silent one left out" in text.replace("\n", " ")
    assert "cosine of neighbours: median 0.75" in text
    image = np.asarray(figure.axes[0].images[0].get_array())
    assert image.argmax(axis=1).tolist() == [0, 1, 1]
    assert image[2, 2] == 0.5
    counts = [note.get_text() for note in figure.axes[1].texts]
    assert counts == ["1", "2", "0"]


def test_a_crosscoder_without_active_features_says_so() -> None:
    table, norms = located()
    with drawing(Style()):
        figure = crosscoder_layers.draw({**table, "density": np.zeros(4)}, norms, Style())
    assert "no active feature" in words(figure)


@pytest.mark.parametrize("name", ["diffing", "crosscoder_layers"])
def test_captions_are_there(name: str) -> None:
    root = Path(__file__).parents[2]
    assert (root / "resources" / "captions" / f"{name}.rst").read_text(encoding="utf-8").strip()
