"""The page in a real Chromium: silent, self-contained, readable and usable with mouse, keyboard and printer."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from circuitflow.circuits.circuit import METRIC, read_circuit
from circuitflow.plots.tables import top_nodes
from circuitflow.store.tables import read_table
from tests.fixtures.synthetic_page import PLOTS, build_page
from tests.fixtures.synthetic_run import Run, write_run

playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)"
    ),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write_run(tmp_path_factory.mktemp("browser") / "results" / "made-up")


@pytest.fixture(scope="module")
def file(run: Run) -> Path:
    return build_page(run, run.folder / "page")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, file: Path) -> Iterator[Any]:
    """The page, opened; anything said on the console, thrown, or asked of a network fails the test."""
    trouble: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    opened.on("console", lambda message: trouble.append(f"console: {message.text}"))
    opened.on("pageerror", lambda error: trouble.append(f"error: {error}"))
    opened.on(
        "request", lambda request: trouble.append(request.url) if request.url != file.as_uri() else None
    )
    opened.goto(file.as_uri())
    yield opened
    context.close()
    assert trouble == []


def test_every_figure_is_drawn(page):
    for name in PLOTS:
        box = page.locator(f"#figure-{name} svg").bounding_box()
        assert box["width"] > 500, name
        assert box["height"] > 150, name
    count = "svg => svg.getElementsByTagName('path').length"
    shapes = page.evaluate(f"[...document.querySelectorAll('svg.plot')].map({count})")
    assert min(shapes) > 20


def test_glyphs_of_the_figures_are_found(page):
    """A reference that lost its target would leave a figure without letters, silently."""
    lost = page.evaluate(
        """[...document.querySelectorAll('svg.plot use')]
           .map(use => use.getAttribute('xlink:href') ?? use.getAttribute('href'))
           .filter(target => !document.getElementById(target.slice(1)))
           .length"""
    )
    assert lost == 0
    assert page.locator("svg.plot use").count() > 100


def test_nothing_sticks_out_of_the_page(page):
    for width in (1280, 700, 390):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def column(page: Any, table: str, number: int) -> list[str]:
    cells = f"document.getElementById('table-{table}').closest('table').tBodies[0].rows"
    return page.evaluate(f"[...{cells}].map(row => row.cells[{number}].dataset.sort)")


def test_tables_sort_by_number_and_by_text(page, run):
    head = page.locator("table:has(#table-nodes) thead th")
    shown = [float(value) for value in column(page, "nodes", 1)]
    assert [abs(value) for value in shown] == sorted((abs(value) for value in shown), reverse=True)
    head.nth(1).get_by_role("button").click()
    assert [float(value) for value in column(page, "nodes", 1)] == sorted(shown, reverse=True)
    assert head.nth(1).get_attribute("aria-sort") == "descending"
    head.nth(1).get_by_role("button").click()
    assert [float(value) for value in column(page, "nodes", 1)] == sorted(shown)
    words = head.nth(5).get_by_role("button")
    words.focus()
    page.keyboard.press("Enter")
    texts = column(page, "nodes", 5)
    assert texts == page.evaluate("texts => [...texts].sort((a, b) => a.localeCompare(b))", texts)
    assert head.nth(1).get_attribute("aria-sort") is None


def test_unknown_values_stay_at_the_end(page):
    heads = page.locator("table:has(#table-faithfulness) thead th")
    count = len(column(page, "faithfulness", 3))
    page.evaluate(
        "document.querySelector('table:has(#table-faithfulness) tbody td:nth-child(4)').dataset.sort = '-inf'"
    )
    for _ in range(2):
        heads.nth(3).get_by_role("button").click()
        assert column(page, "faithfulness", 3)[-1] == "-inf"
    assert len(column(page, "faithfulness", 3)) == count


def wait_until_open(page, name):
    """The browser tells the page of a followed link a moment after the click; a card that stays shut fails."""
    page.wait_for_selector(f"[id='{name}'][open]", timeout=10_000)


def test_a_node_in_the_table_leads_to_its_description(page, run):
    nodes = top_nodes(read_table(run.nodes), 8, kind="feature")
    name = f"{nodes['site'][3]}-{nodes['feature'][3]}"
    card = page.locator(f"[id='{name}']")
    assert card.get_attribute("open") is None
    page.locator(f"table:has(#table-nodes) a[href='#{name}']").click()
    wait_until_open(page, name)
    page.wait_for_function(f"document.getElementById('{name}').getBoundingClientRect().top < 900")
    assert card.locator("mark.peak").count() > 0


def test_a_node_in_the_figure_leads_to_its_description_and_shows_its_edges(page, run):
    circuit = read_circuit(run.circuit)
    number = next(i for i, node in enumerate(circuit.nodes) if node.kind == "feature")
    node = page.locator(f"#circuit-node-{number}")
    node.hover()
    places = {node.id: str(i) for i, node in enumerate(circuit.nodes)} | {METRIC: "m"}
    drawn = set(page.evaluate("[...document.querySelectorAll('g[id^=circuit-edge-]')].map(edge => edge.id)"))
    own = {
        f"circuit-edge-{places[edge.up]}-{places[edge.down]}"
        for edge in circuit.edges
        if circuit.nodes[number].id in (edge.up, edge.down)
    }
    lit = page.evaluate("[...document.querySelectorAll('g.lit')].map(edge => edge.id)")
    assert set(lit) == own & drawn
    assert lit
    node.click()
    described = f"{circuit.nodes[number].site}-{circuit.nodes[number].feature}"
    wait_until_open(page, described)


def test_features_can_be_searched_and_unfolded(page):
    cards = page.locator(".card")
    every = cards.count()
    page.get_by_role("searchbox").fill("resid.18 #")
    visible = page.locator(".card:visible").count()
    assert 0 < visible < every
    assert page.locator("#shown").text_content() == f"{visible} of {every}"
    page.get_by_role("searchbox").fill("")
    assert page.locator(".card:visible").count() == every
    page.get_by_role("button", name="Unfold all").click()
    assert page.locator(".card[open]").count() == every
    page.get_by_role("button", name="Fold all", exact=True).click()
    assert page.locator(".card[open]").count() == 0


def test_sections_are_reached_by_keyboard_and_links(page):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    for link in page.locator("nav a").all():
        link.click()
        target = link.get_attribute("href")[1:]
        assert abs(page.evaluate(f"document.getElementById('{target}').getBoundingClientRect().top")) < 900


CONTRAST = """() => {
  const luminance = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map(Number)
    .map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (part) => {
    for (; part; part = part.parentElement) {
      const colour = getComputedStyle(part).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const worst = [21, ""];
  for (const part of document.querySelectorAll("h1, h2, li, p, dt, dd, td, th, a, small, caption, button")) {
    const [a, b] = [luminance(getComputedStyle(part).color), luminance(behind(part))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) [worst[0], worst[1]] = [ratio, part.outerHTML.slice(0, 80)];
  }
  return worst;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(page, scheme):
    page.emulate_media(color_scheme=scheme)
    ratio, part = page.evaluate(CONTRAST)
    assert ratio >= 4.5, part  # WCAG 2 AA
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(246, 247, 249)", "dark": "rgb(14, 16, 19)"}[scheme]


def test_everything_is_printed(page):
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() > 10


def test_the_page_reads_without_scripts(browser, file):
    context = browser.new_context(java_script_enabled=False)
    opened = context.new_page()
    opened.goto(file.as_uri())
    assert opened.locator("table:has(#table-nodes) tbody tr").count() > 10
    assert opened.locator(".card").first.locator("mark").first.is_visible()
    context.close()
