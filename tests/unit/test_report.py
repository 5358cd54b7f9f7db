"""The page: self-contained, what it says follows from the tables, and what it shows is escaped."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.report import tables
from circuitflow.report.cards import SHADES, card, pieces
from circuitflow.report.figures import inline, rendered
from circuitflow.report.findings import findings
from circuitflow.report.overview import overview
from circuitflow.report.page import build_report
from circuitflow.report.result import NODES_LISTED, Result, read_result
from circuitflow.store.files import read_json, write_json
from circuitflow.store.tables import read_provenance, read_table, write_table
from tests.fixtures.synthetic_page import PLOTS, RESOURCES, build_page, page_inputs
from tests.fixtures.synthetic_run import CONFIG, SITES, Run, write_run


class Reader(HTMLParser):
    """Ids, links, sources and text of a page; complains about elements that are closed in the wrong order."""

    VOID = frozenset({"meta", "link", "input", "br", "img", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("href", "xlink:href", "src", "action", "data"):
                self.links.append(str(value))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write_run(tmp_path_factory.mktemp("report") / "results" / "made-up")


@pytest.fixture(scope="module")
def page(run: Run) -> str:
    return build_page(run, run.folder / "page").read_text()


@pytest.fixture(scope="module")
def result(run: Run) -> Result:
    return read_result(page_inputs(run, run.folder / "page" / "figures"), CONFIG)


def rebuilt(run: Run, folder: Path, **inputs: Any) -> str:
    """The page with some inputs exchanged."""
    out = Output(folder, {"page": folder / "other.html"}, {"stage": "build_report"})
    given = {**page_inputs(run, run.folder / "page" / "figures"), **inputs}
    build_report(given, {"plots": list(PLOTS), "config": CONFIG}, out)
    return out.files["page"].read_text()


def test_nothing_is_fetched_from_anywhere(page):
    assert {link[:1] for link in Reader(page).links if not link.startswith("data:")} == {"#"}
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest|<iframe|<base", page)
    assert not re.search(r"<!ENTITY|<!DOCTYPE svg|<\?xml", page)


def test_every_link_leads_somewhere_and_ids_are_unique(page):
    seen = Reader(page)
    assert not seen.open
    assert len(seen.ids) == len(set(seen.ids))
    targets = {link[1:] for link in seen.links if link.startswith("#")}
    assert targets <= set(seen.ids)
    referred = set(re.findall(r"url\(#([^)]+)\)", page)) | set(re.findall(r'aria-labelledby="([^"]+)"', page))
    assert referred <= set(seen.ids)


def test_equal_tables_give_equal_bytes(run, page, tmp_path):
    assert rebuilt(run, tmp_path) == page


def test_no_path_of_the_machine_is_told(run, page):
    assert str(run.folder) not in page


def test_every_figure_and_table_is_there(page):
    seen = Reader(page)
    assert {f"figure-{name}" for name in PLOTS} <= set(seen.ids)
    names = {"task", "dropped", "quality", "layers", "agreement", "nodes", "edges", "faithfulness"}
    assert {f"table-{name}" for name in names} <= set(seen.ids)


def test_figures_are_named_for_readers_who_cannot_see_them(page):
    pictures = re.findall(r"<svg[^>]*>", page)
    assert len(pictures) == len(PLOTS)
    assert all('role="img"' in picture and 'aria-label="' in picture for picture in pictures)


def test_sentences_are_computed_from_the_tables(result):
    said = "\n".join(findings(result))
    right = result.prompts["difference"] > 0
    assert f"on {100 * right.mean():.0f}\u202f% (95 % interval" in said
    assert "480 prompts" in said
    nodes = result.circuit.nodes
    errors = sum(node.kind == "error" for node in nodes)
    assert f"60 nodes ({60 - errors} features, {errors} error nodes) at 4 sites" in said
    assert "F = 0.87 [0.80, 0.93]" in said
    assert "with only its nodes ablated, 0.31 [0.24, 0.37]" in said
    chance = result.curve("random")
    median = np.median(chance["F"][chance["nodes"] == 60])
    assert (
        f"random circuits of 60 nodes with the same error nodes keep {median:.2f} (median of 20 draws)"
        in said
    )
    curve = result.curve("circuit")
    half = curve["nodes"][curve["F"] >= 0.5][0]
    assert f"{half} nodes are the fewest tried with F ≥ 0.5" in said
    assert "10\u202f% to 19\u202f% of the variance" in said


def under_the_circuit(text):
    """The audit's sentences of a page, between the circuit's figure and the next."""
    between = text.split('<figure id="figure-circuit">')[1].split("</figure>", 1)[1].split("<figure")[0]
    return re.findall(r"<li>(.*?)</li>", between)


def test_the_audit_stands_under_the_circuit(run, page, tmp_path):
    said = under_the_circuit(page)
    assert said[0] == (
        "Nodes: 20\u202f% of Σ|effect| lies outside, at most 27\u202f% (95 %, for these pairs); 61 of 2\u202f339 "
        "outside and 54 of 58 in the circuit patched alone, on 16 test pairs."
    )
    assert said[1].startswith(
        "Edges: 20\u202f% of Σ|effect| lies outside, at most 27\u202f% (95 %, for these pairs); 60 of 6\u202f650"
    )
    assert said[2].startswith(
        "Conservation: a node&#39;s edges sum to its score up to 3.0e−08 logits at worst"
    )
    assert len(said) == 3
    table = read_table(run.audit)
    outside = (table["side"] == "outside") & (table["stratum"] == "all")
    table["share"] = np.where(outside & (table["what"] == "nodes"), 0.4, table["share"])
    table["share"] = np.where(outside & (table["what"] == "edges"), np.nan, table["share"])
    write_table(tmp_path / "audit.parquet", table, read_provenance(run.audit))
    changed = under_the_circuit(rebuilt(run, tmp_path, audit=tmp_path / "audit.parquet"))
    assert changed[0].startswith("Nodes: 40\u202f% of")
    assert [one.partition(":")[0] for one in changed] == ["Nodes", "Conservation"]


def test_sentences_follow_a_change_of_the_numbers(run, result, tmp_path):
    table = read_table(run.faithfulness)
    table["F"] = np.where(table["series"] == "circuit", 0.3, table["F"])
    write_table(tmp_path / "faithfulness.parquet", table, read_provenance(run.faithfulness))
    text = rebuilt(run, tmp_path, faithfulness=tmp_path / "faithfulness.parquet")
    assert "none reaches F ≥ 0.5 and none reaches F ≥ 0.8" in text
    assert "F = 0.30 [" in text


def test_overview_counts_the_pairs_that_are_left(result):
    facts = dict(overview(result))
    clean = result.prompts["side"] == "clean"
    train = clean & (result.prompts["split"] == "train")
    kept = int(result.prompts["kept"][train].sum())
    assert facts["pairs that pass the confidence filter"].startswith(f"{kept} of {train.sum()} train, ")
    assert facts["sites"] == ", ".join(SITES)


def test_tables_hold_the_numbers_of_the_run(result):
    curve = tables.faithfulness_table(result)
    swept = [row for row in curve.rows if not row[0].detail]
    assert [row[0].sort for row in swept] == result.curve("circuit")["nodes"].tolist()
    assert [row[1].sort for row in swept] == result.curve("circuit")["F"].tolist()
    (own,) = (row for row in curve.rows if row[0].detail)
    assert [cell.text for cell in own[:3]] == ["60", "0.87", "0.31"]
    chance = result.curve("random")
    assert swept[3][3].sort == np.median(chance["F"][chance["nodes"] == 8])
    assert swept[0][3].text == ""
    quality = tables.quality_table(result)
    assert [row[0].text for row in quality.rows] == list(SITES)
    assert [row[1].text for row in quality.rows] == ["0.100", "0.130", "0.160", "0.190"]
    assert quality.rows[0][-1].sort == 3584
    nodes = tables.nodes_table(result)
    sizes = [abs(row[1].sort) for row in nodes.rows]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(row[4].text == "yes" for row in nodes.rows) == NODES_LISTED
    edges = tables.edges_table(result)
    assert edges.rows[0][2].sort == result.circuit.edges[0].weight
    dropped = tables.dropped_table(result)
    assert [row[-1].sort for row in dropped.rows] == [2, 1]
    task = tables.task_table(result)
    assert sum(int(row[2].sort) for row in task.rows) == 480
    assert all(
        len(row) == len(table.columns)
        for table in (curve, quality, nodes, edges, dropped, task)
        for row in table.rows
    )


def test_units_follow_the_metric(run):
    config = {**CONFIG, "task": {"name": "agreement", "metric": {"kind": "kl"}}}
    result = read_result(page_inputs(run, run.folder / "page" / "figures"), config)
    assert tables.nodes_table(result).columns[1].title == "IE train (nats)"
    assert "KL" in dict(overview(result))["metric"]


def test_tokens_of_any_kind_are_shown_as_text(run, tmp_path):
    hostile = '<script>alert("x")</script>'
    described = read_json(run.features[0])
    strongest = described["features"][0]
    strongest["fires_on"][0]["token"] = hostile
    strongest["contexts"][0]["tokens"][0] = hostile
    strongest["logits"]["top"][0]["token"] = "&amp;<b>"
    write_json(tmp_path / "features.json", described)
    text = rebuilt(run, tmp_path, features=[tmp_path / "features.json", *run.features[1:]])
    assert hostile not in text
    assert "&lt;script&gt;alert" in text
    assert "&amp;amp;&lt;b&gt;" in text
    assert not Reader(text).open


def test_a_dictionary_without_an_encoder_still_has_a_page(run, tmp_path):
    described = read_json(run.features[0])
    described["features"] = [
        {"feature": entry["feature"], "logits": entry["logits"]} for entry in described["features"]
    ]
    write_json(tmp_path / "features.json", described)
    empty = {
        "quantity": np.array([], object),
        "tokens": np.array([], object),
        "value": np.zeros(0),
        "n": np.zeros(0, int),
    }
    write_table(tmp_path / "quality.parquet", empty, read_provenance(run.quality[0]))
    text = rebuilt(
        run,
        tmp_path,
        features=[tmp_path / "features.json", *run.features[1:]],
        quality=[tmp_path / "quality.parquet", *run.quality[1:]],
    )
    assert "13\u202f% to 19\u202f% of the variance" in text


def test_inactive_tokens_are_joined_and_active_ones_shaded():
    passage = {
        "tokens": ["The", " keys", " to", "\n", " are"],
        "activations": [0, 4.0, 0, 0, -1.0],
        "peak": 1,
    }
    found = pieces(passage, 4.0)
    assert [(piece.text, piece.shade, piece.peak) for piece in found] == [
        ("The", 0, False),
        (" keys", SHADES, True),
        (" to↵", 0, False),
        (" are", 2, False),
    ]
    assert found[1].activation == "4.00"


def test_a_card_tells_effects_contexts_and_histogram(run):
    described = read_json(run.features[0])["features"][0]
    shown = card(described, SITES[0], described["feature"], {"train": "+0.5 logits"}, in_circuit=True)
    assert shown.anchor == f"{SITES[0]}-{described['feature']}"
    assert shown.facts[0] == ("IE, train pairs", "+0.5 logits")
    assert len(shown.contexts) == 5
    assert max(bar.height for bar in shown.histogram) == 1
    assert [passage.source for passage in shown.prompts][:2] == ["simple, clean", "prepositional, clean"]


def test_inline_pictures_keep_their_names_apart(tmp_path):
    (tmp_path / "a.svg").write_text(
        '<?xml version="1.0"?><!DOCTYPE svg><svg xmlns="http://www.w3.org/2000/svg"><metadata>\nx</metadata>'
        '<clipPath id="p1"/><g id="figure_1" clip-path="url(#p1)"><use xlink:href="#p1"/></g></svg>'
    )
    text = inline(tmp_path / "a.svg", "one", 'A "title"')
    assert text.startswith('<svg role="img" aria-label="A &quot;title&quot;" class="plot one"')
    assert 'id="one-p1"' in text
    assert 'id="one-figure_1" clip-path="url(#one-p1)"' in text
    assert 'href="#one-p1"' in text
    assert "metadata" not in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"templates": []}, "template page.html.j2 is missing"),
        ({"figures": [Path("nowhere.svg")] * len(PLOTS)}, "nowhere.svg does not exist; run the stage plot_"),
        ({"layers": Path("nowhere.parquet")}, "nowhere.parquet does not exist"),
    ],
)
def test_missing_inputs_are_told_in_one_sentence(run, tmp_path, change, said):
    with pytest.raises(UserError, match=re.escape(said)):
        rebuilt(run, tmp_path, **change)


def test_a_figure_that_is_no_picture_is_told(tmp_path):
    (tmp_path / "a.svg").write_text("nothing")
    with pytest.raises(UserError, match="not an SVG picture"):
        inline(tmp_path / "a.svg", "a", "A")


@pytest.mark.parametrize("name", PLOTS)
def test_captions_are_plain_enough_for_both_reports(name):
    caption = (RESOURCES / "captions" / f"{name}.rst").read_text()
    markup = rendered(caption, name)
    assert "system-message" not in markup
    assert markup.startswith("<p>")
    assert "{{" not in caption
    assert "{%" not in caption


def test_captions_cannot_bring_in_files_or_markup(tmp_path):
    (tmp_path / "secret").write_text("secret words")
    caption = f".. raw:: html\n\n   <script>x</script>\n\n.. include:: {tmp_path / 'secret'}\n"
    markup = rendered(caption, "caption")
    assert "<script>" not in markup
    assert "secret words" not in markup


def test_provenance_names_every_artefact(run, page):
    words = " ".join(Reader(page).words)
    for stage in (
        "filter_pairs",
        "rank_features",
        "assemble_circuit",
        "evaluate_circuit",
        "describe_features",
        "audit_circuit",
    ):
        assert stage in words
    content = json.loads(run.circuit.read_text())["content"]
    assert content[:12] in words
    assert "numpy 2" in words
    assert "ratio_of_means" in words
    assert "d_dict: 4096" in words


def test_contexts_of_text_are_told_without_wrong_answers(result: Result) -> None:
    prompts = {**result.prompts, "wrong_answer": np.full(len(result.prompts["split"]), "", object)}
    unpaired = replace(result, prompts=prompts)
    assert result.opposed
    assert not unpaired.opposed
    assert "the right answer the larger logit" in findings(result)[0]
    assert "the right answer the largest logit" in findings(unpaired)[0]
    helps = [column.help for column in tables.task_table(unpaired).columns]
    assert any("logit(likeliest other token)" in text for text in helps)


def test_the_page_is_named_after_the_circuits_task(result: Result) -> None:
    circuit = replace(result.circuit, provenance={**result.circuit.provenance, "task": "agreement/cluster-2"})
    assert result.task == "agreement"
    assert replace(result, circuit=circuit).task == "agreement/cluster-2"
