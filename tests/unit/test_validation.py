"""Scores against true effects: shares of the whole effect, regressions by site and kind, on hand-made tables."""

import numpy as np
import pytest

from circuitflow.attribution import validation
from circuitflow.attribution.validation import line, shares, validate_scores
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.plots.style import Style, drawing
from circuitflow.plots.validation import draw, spread
from circuitflow.store.tables import read_provenance, read_table, write_table

FEATURES = np.array([0, 2, 5, -1])
EXACT = np.array([4.0, -3.0, 2.0, 1.0])
CLEAN, PATCHED = np.array([-2.0, -1.0, -3.0]), np.array([2.0, 4.0, 3.0])
PER_PAIR = np.array([0.5, 1.0, 1.5])
"""How strong each pair is beside the mean."""


class Store:
    def read(self, name):
        return {"metric/clean": CLEAN, "metric/patched": PATCHED}[name]


@pytest.fixture
def validate(tmp_path, monkeypatch):
    """Two sites with three pairs; AtP is half the truth plus 0.25 of the whole effect (5) at each."""
    monkeypatch.setattr(validation, "open_store", lambda _: Store())
    write_table(tmp_path / "tokens.parquet", {"pair": [3, 5, 8]})

    def write(method, site, scores):
        base = {"feature": FEATURES, "position": np.full(4, -1)}
        write_table(
            tmp_path / f"{method}.{site}.parquet",
            {"split": ["train"] * 4, **base, "score": scores, "n": [3] * 4},
        )
        rows = {
            "split": np.repeat(np.array(["train"], object), 12),
            "pair": np.repeat([3, 5, 8], 4),
            "feature": np.tile(FEATURES, 3),
            "position": np.full(12, -1),
            "score": np.outer(PER_PAIR, scores).ravel(),
        }
        write_table(tmp_path / f"{method}.{site}.pairs.parquet", rows)

    def compute(**params):
        sites = ["resid.0", "resid.1"]
        for place, site in enumerate(sites):
            write("exact", site, EXACT * (1 + place))
            write("atp", site, EXACT * (1 + place) / 2 + 1.25)
        inputs = {
            f"{kind}_{method}": [tmp_path / f"{method}.{site}{end}.parquet" for site in sites]
            for method in ("exact", "atp")
            for kind, end in (("scores", ""), ("pairs", ".pairs"))
        }
        inputs |= {"tokens": tmp_path / "tokens.parquet", "gradients": tmp_path}
        files = {name: tmp_path / f"out.{name}.parquet" for name in ("validation", "nodes")}
        common = {"sites": sites, "methods": ["atp", "decoder_only", "exact"], "seed": 0, "bootstrap": 50}
        common["aggregate"] = "ratio_of_means"
        validate_scores(inputs, {**common, **params}, Output(tmp_path, files, {}))
        return *(read_table(path) for path in files.values()), read_provenance(files["validation"])

    return compute


def test_a_line_by_hand():
    found = line(np.array([0.0, 1.0, 2.0]), np.array([1.0, 3.0, 8.0]))
    assert found["slope"] == pytest.approx(3.5)
    assert found["intercept"] == pytest.approx(0.5)
    assert found["pearson"] == pytest.approx(np.corrcoef([0, 1, 2], [1, 3, 8])[0, 1])
    assert np.isnan(line(np.ones(2), np.ones(2))["slope"])
    assert np.isnan(line(np.ones(4), np.arange(4.0))["slope"])


def test_shares_before_and_after_the_division():
    effects, total = np.array([[2.0], [6.0]]), np.array([4.0, 2.0])
    once = np.ones((1, 2))
    assert shares(effects, total, once, "ratio_of_means")[0, 0] == pytest.approx(8 / 6)
    assert shares(effects, total, once, "mean_of_ratios")[0, 0] == pytest.approx((0.5 + 3) / 2)
    assert shares(effects, total, np.array([[2.0, 0.0]]), "ratio_of_means")[0, 0] == pytest.approx(0.5)
    with pytest.raises(UserError, match="leaves the metric as it is"):
        shares(effects, np.array([1.0, -1.0]), once, "ratio_of_means")
    with pytest.raises(UserError, match="ratio_of_means"):
        shares(effects, np.array([1.0, 0.0]), once, "mean_of_ratios")


def test_known_regressions(validate):
    table, nodes, provenance = validate()
    assert set(table["method"]) == {"atp"}
    both = table["kind"] == "both"
    assert table["slope"][both] == pytest.approx([2, 2, 2])
    assert table["intercept"][both] == pytest.approx([-0.5] * 3)
    assert table["pearson"][both] == pytest.approx([1, 1, 1])
    assert table["n"][both].tolist() == [4, 4, 8]
    assert set(table["pairs"]) == {3}
    assert np.isnan(table["slope"][table["kind"] == "error"]).all()
    first = nodes["site"] == "resid.0"
    assert nodes["feature"][first].tolist() == [-1, 0, 2, 5]
    assert nodes["effect"][first] == pytest.approx(np.array([1, 4, -3, 2]) / 5)
    assert (nodes["low"] <= nodes["effect"] + 1e-12).all()
    assert (nodes["effect"] <= nodes["high"] + 1e-12).all()
    assert provenance["conventions"]["aggregate"] == "ratio_of_means"


def test_a_method_is_needed(validate):
    with pytest.raises(UserError, match="estimates effects"):
        validate(methods=["decoder_only", "exact"])


def test_the_figure_shows_every_site_and_its_slope(validate):
    table, nodes, provenance = validate()
    with drawing(Style(dpi=60)):
        figure = draw(table, nodes, provenance["conventions"], Style(dpi=60))
    titles = [axes.get_title("left") for axes in figure.axes]
    low, high = figure.axes[0].get_ylim()
    assert high < 1 + 0.05 * (1 - low), "r ends at 1"
    assert max(figure.axes[0].get_yticks()) <= 1
    assert [title for title in titles if "slope 2.00" in title] == [
        "resid.0: r = 1.00, slope 2.00",
        "resid.1: r = 1.00, slope 2.00",
    ]
    assert spread([str(i) for i in range(30)], 3) == ["0", "14", "29"]
