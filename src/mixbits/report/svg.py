"""From a matplotlib figure to an SVG element for an HTML page: themed, labelled, reproducible."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# CSS variable: (colour on light paper, colour on dark paper). The light colours are all different: they are
# how a matplotlib colour finds its variable again.
THEME: dict[str, tuple[str, str]] = {
    "paper": ("#ffffff", "#15181d"),
    "panel": ("#f6f7f9", "#1c2027"),
    "stripe": ("#f1f3f6", "#20252d"),
    "rule": ("#d8dde4", "#363d48"),
    "ink": ("#1b2027", "#e7eaee"),
    "muted": ("#596372", "#9da7b5"),
    "mixed": ("#2764c4", "#6ea3f7"),
    "uniform": ("#c2670f", "#eda24c"),
    "float": ("#6f7885", "#98a2b0"),
    "good": ("#1a7a4c", "#5ccf98"),
    "bad": ("#b8281f", "#ff8b80"),
    "bad-panel": ("#fdecea", "#3b1f1e"),
    "line1": ("#2763c3", "#6fa3f7"),
    "line2": ("#1a8a82", "#4fc9bf"),
    "line3": ("#8a4bb5", "#c493ea"),
    "line4": ("#a8862a", "#dcbb5e"),
    "line5": ("#b8367c", "#f08abb"),
    "line6": ("#4d7d1f", "#a5d46a"),
    "line7": ("#7a4a2b", "#cfa07d"),
    "line8": ("#33507a", "#a9bbe0"),
    # Widths, one colour a bit: more ink is more bits, on both papers.
    "bits1": ("#f3f6c9", "#2a2f4f"),
    "bits2": ("#d5edb8", "#2b3f74"),
    "bits3": ("#9fd8ba", "#265a94"),
    "bits4": ("#62c2c2", "#1f7aa9"),
    "bits5": ("#319dc1", "#2f9bb3"),
    "bits6": ("#2672b2", "#5cbcae"),
    "bits7": ("#2a4b9b", "#9fd8a8"),
    "bits8": ("#1c2a6b", "#e6f2b0"),
    "bits9": ("#8d949e", "#7d8590"),
    # Text on them.
    "on-bits1": ("#20252c", "#e8ebef"),
    "on-bits2": ("#20252d", "#e8ebee"),
    "on-bits3": ("#20252e", "#f5f7fa"),
    "on-bits4": ("#10151c", "#ffffff"),
    "on-bits5": ("#0b0f14", "#0a0e13"),
    "on-bits6": ("#fffffe", "#0b0f14"),
    "on-bits7": ("#fffffd", "#10151c"),
    "on-bits8": ("#fffffc", "#10151d"),
    "on-bits9": ("#0c1015", "#0c1016"),
}
WIDTH_COLOURS = 8  # bits9 stands for every greater width
LARGEST = 1.25  # a chart grows with the window up to this many times its size
TEXT_PX = 12
SMALL_PX = 11
MONO = 0.602 * SMALL_PX  # advance of a small character in the monospace font, in px
SANS = 0.60 * SMALL_PX  # the same in a wide sans-serif font: an upper estimate

_STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and is set in the reader's own font
    "svg.hashsalt": "mixbits",
    "font.size": TEXT_PX,
    "axes.unicode_minus": True,
    "text.parse_math": False,  # a site may be called $x$
    "path.simplify": True,
}


def colour(name: str) -> str:
    """The matplotlib colour that becomes the CSS variable ``name``."""
    return THEME[name][0]


def width_colour(bits: float | None) -> str:
    """The name of the colour of a width.

    >>> width_colour(4), width_colour(32), width_colour(None)
    ('bits4', 'bits9', 'bits9')
    """
    return f"bits{WIDTH_COLOURS + 1 if bits is None or bits > WIDTH_COLOURS else max(1, round(bits))}"


@contextmanager
def drawing() -> Iterator[None]:
    """Matplotlib as it is installed, whatever the user's matplotlibrc says; restored afterwards."""
    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        # Only matplotlib's own measure of such a character is missing; the browser has the glyph.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        yield


def canvas(width: float, height: float) -> Figure:
    """An empty figure measured in px."""
    return Figure(figsize=(width / 72, height / 72), dpi=72)  # SVG has 72 units an inch: one unit is one px


def axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place in px from the top left corner, without a frame."""
    total_width, total_height = (float(side) * 72 for side in figure.get_size_inches())
    added = figure.add_axes(
        (left / total_width, 1 - (top + height) / total_height, width / total_width, height / total_height)
    )
    for spine in added.spines.values():
        spine.set_visible(False)
    added.set_facecolor("none")
    added.tick_params(colors=colour("muted"), labelsize=SMALL_PX, length=0, pad=6)
    return added


def pixels(figure: Figure) -> Axes:
    """Axes over the whole figure whose coordinates are px from the top left corner."""
    width, height = (float(side) * 72 for side in figure.get_size_inches())
    added = axes(figure, 0, 0, width, height)
    added.set_xlim(0, width)
    added.set_ylim(height, 0)
    added.set_axis_off()
    return added


def write(
    page: Axes,
    x: float,
    y: float,
    text: str,
    *,
    tint: str = "ink",
    align: Literal["left", "center", "right"] = "left",
    size: float = SMALL_PX,
    bold: bool = False,
    mono: bool = False,
    gid: str | None = None,
) -> None:
    """Text at a place of ``page``, vertically centred on it."""
    page.text(
        x,
        y,
        text,
        color=colour(tint),
        ha=align,
        va="center",
        size=size,
        weight="bold" if bold else "normal",
        family="monospace" if mono else "sans-serif",
        gid=gid,
    )


def inline_svg(figure: Figure, *, name: str, label: str, tips: Mapping[str, str] | None = None) -> str:
    """The figure as one ``<svg role="img">``.

    ``name`` keeps the ids of several charts on a page apart, ``label`` is read out instead of the picture,
    and ``tips`` gives artists (by their gid) a text that shows under the mouse.
    """
    written = io.BytesIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    text = written.getvalue().decode("utf-8")
    text = text[text.index("<svg") :]
    width, height = (float(side) * 72 for side in figure.get_size_inches())
    # matplotlib's own style sheet would be that of the whole page.
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    opening = (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(label)}" '
        f'style="max-width: {width * LARGEST:.0f}px">'
    )
    text = re.sub(r"^<svg[^>]*>", lambda _: opening, text, count=1)
    # Only inside tags: what the user named may contain anything but < and >, which matplotlib escapes.
    return re.sub(r"<[^<>]+>", lambda tag: _tag(tag[0], name, tips or {}), text).strip()


_VARIABLES = {light: f"var(--{name}, {light})" for name, (light, _) in THEME.items()}


def _tag(tag: str, name: str, tips: Mapping[str, str]) -> str:
    group = re.match(r'<g id="([^"]*)"', tag)
    if group:
        tip = tips.get(group[1])
        return f"<g><title>{html.escape(tip)}</title>" if tip else "<g>"
    tag = tag.replace(' id="', f' id="{name}-')
    tag = tag.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    tag = re.sub(r"font-family: '?DejaVu Sans Mono'?[^;\"]*", "font-family: var(--mono, monospace)", tag)
    tag = re.sub(r"font-family: (?!var)[^;\"]*;? ?", "", tag)
    return re.sub(r"#[0-9a-f]{6}\b", lambda found: _VARIABLES.get(found[0], found[0]), tag)
