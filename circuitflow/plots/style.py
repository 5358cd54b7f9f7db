"""One look for all figures, and saving them so that equal work gives equal bytes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from circuitflow.errors import UserError, nearest
from circuitflow.features.tokens import visible
from circuitflow.jobs import Output
from circuitflow.plots.layout import settle
from circuitflow.provenance import canonical_json
from circuitflow.store.files import atomic_path

FAMILY = "DejaVu Sans"  # shipped with matplotlib, so that every machine draws the same glyphs
SMALL, TINY = 0.85, 0.72  # of the font size


@dataclass(frozen=True)
class Palette:
    """Colours by meaning; the pairs that meet in one figure are told apart by readers with any colour vision."""

    positive: str = "#2166ac"
    negative: str = "#b2182b"
    feature: str = "#0f6e84"
    error: str = "#d98200"
    train: str = "#6c4fa3"
    test: str = "#0f6e84"
    circuit: str = "#0f6e84"
    complement: str = "#c1521f"
    random: str = "#7a7f87"
    text: str = "#1c2024"
    muted: str = "#5b636c"
    grid: str = "#d9dde2"
    paper: str = "#ffffff"


@dataclass(frozen=True)
class Style:
    """What the configuration may change about figures."""

    dpi: int = 200
    font_size: float = 9.0
    palette: Palette = field(default_factory=Palette)
    subject: str = ""
    """What the figure is of, where several tasks have figures of one kind; stands before the footnote."""


def style_of(params: Mapping[str, Any]) -> Style:
    """The style in a stage's ``params["style"]``; what it leaves out keeps its default.

    :raises UserError: a key or a colour that does not exist.
    """
    given = dict(params.get("style") or {})
    palette = dict(given.pop("palette", None) or {})
    _check_names("plots", given, Style)
    _check_names("plots.palette", palette, Palette)
    for name, colour in palette.items():
        if not matplotlib.colors.is_color_like(colour):
            raise UserError(
                f"plots.palette.{name}: {colour!r} is not a colour; write it like '#2166ac' or 'steelblue'."
            )
    return Style(**given, palette=Palette(**palette))


def _check_names(key: str, given: Mapping[str, Any], shape: type) -> None:
    known = [item.name for item in fields(shape)]
    for name in given:
        if name not in known:
            raise UserError(f"{key}.{name} is not a setting of the figures; {nearest(name, known)}.")


@contextmanager
def drawing(style: Style) -> Iterator[None]:
    """Matplotlib settings for one figure; the reader's own matplotlibrc has no say."""
    palette = style.palette
    settings: dict[Any, Any] = {
        "font.family": FAMILY,
        "font.size": style.font_size,
        "axes.titlesize": style.font_size,
        "axes.labelsize": style.font_size,
        "legend.fontsize": style.font_size * SMALL,
        "xtick.labelsize": style.font_size * SMALL,
        "ytick.labelsize": style.font_size * SMALL,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": palette.muted,
        "axes.labelcolor": palette.text,
        "axes.axisbelow": True,
        "xtick.color": palette.muted,
        "ytick.color": palette.muted,
        "xtick.labelcolor": palette.text,
        "ytick.labelcolor": palette.text,
        "text.color": palette.text,
        "text.parse_math": False,  # a "$" in a token is a dollar sign
        "grid.color": palette.grid,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "figure.facecolor": palette.paper,
        "savefig.facecolor": palette.paper,
        "svg.fonttype": "path",
        "svg.hashsalt": "circuitflow",
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        yield


def new_figure(width: float, height: float) -> Figure:
    """A figure in inches, outside pyplot: nothing global, and always drawn by Agg."""
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, out: Output, style: Style) -> None:
    """Write the outputs ``png`` and ``svg`` with the provenance inside and no trace of when or where."""
    settle(figure, style.dpi)
    provenance = canonical_json(out.provenance)
    metadata = {
        "png": {"Software": None, "circuitflow": provenance},
        "svg": {"Date": None, "Creator": None, "Description": provenance},
    }
    for kind, facts in metadata.items():
        with atomic_path(out.files[kind]) as temporary:
            figure.savefig(temporary, format=kind, dpi=style.dpi, metadata=facts)


def grid(axes: Axes, axis: str = "y") -> None:
    """Light lines behind the data along one axis ("x", "y" or "both")."""
    axes.grid(visible=True, axis=axis)  # type: ignore[arg-type]
    axes.tick_params(length=0 if axis == "both" else 3)


def footnote(figure: Figure, text: str, style: Style) -> None:
    """Small lines below everything, as wide as the figure: n, intervals, conventions."""
    size = style.font_size * TINY * 1.06
    width = figure.get_size_inches()[0] * 0.97
    text = f"{style.subject}. {text}" if style.subject else text
    lines = [line for paragraph in text.split("\n") for line in wrapped(paragraph, width, size)]
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=size, color=style.palette.muted)


def site_shades(count: int) -> list[tuple[float, ...]]:
    """Colours for sites in the order of depth, the deepest the darkest."""
    places = np.linspace(0.28, 1, count) if count > 1 else np.full(count, 0.75)
    return [tuple(map(float, colour)) for colour in matplotlib.colormaps["viridis_r"](places)]


def drawable(text: str) -> str:
    """Text in characters that the font has; others as their code points, so that no empty boxes appear."""
    known = _known_characters()
    return "".join(c if c == "\n" or ord(c) in known else f"\\u{ord(c):04x}" for c in text)


def shown(tokens: Iterable[str]) -> list[str]:
    """Tokens as figures write them: white space visible, characters without a glyph as code points."""
    return [drawable(visible(token)) for token in tokens]


def fitting(text: str, inches: float, size: float) -> str:
    """``text``, cut with "…" where it is wider than ``inches`` at ``size`` points."""
    if text_width(text, size) <= inches:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text_width(text[:middle] + "…", size) <= inches else (low, middle - 1)
    return text[:low].rstrip() + "…"


def as_many_as_fit(words: Sequence[str], inches: float, size: float) -> str:
    """As many whole words as one line holds, two spaces between; the first is cut if it alone is too wide."""
    line = ""
    for word in words:
        longer = f"{line}  {word}" if line else word
        if line and text_width(longer, size) > inches:
            break
        line = longer
    return fitting(line, inches, size)


def wrapped(text: str, inches: float, size: float) -> list[str]:
    """Text broken at its spaces into lines of at most ``inches`` at ``size`` points; "%" stays with its number."""
    lines = [""]
    for word in text.replace(" %", "\u00a0%").split(" "):
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and text_width(longer, size) > inches:
            lines.append(word)
        else:
            lines[-1] = longer
    return [line.replace("\u00a0%", " %") for line in lines]


def text_width(text: str, size: float) -> float:
    """Width of a line of text in inches, at ``size`` points."""
    return sum(_advance(character) for character in text) * size / 72


@cache
def _advance(character: str) -> float:
    """Width of a character in units of the font size; kerning, which would only narrow a line, is left out."""
    font = get_font(findfont(_font()))
    font.set_size(100, 72)
    return float(font.load_char(ord(character)).linearHoriAdvance) / 65536 / 100


@cache
def _font() -> FontProperties:
    return FontProperties(family=FAMILY)


@cache
def _known_characters() -> frozenset[int]:
    return frozenset(get_font(findfont(_font())).get_charmap())
