"""The charts of the report. One function a chart: plain data in, an SVG element out. All sizes are px."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from mixbits.report.read import Limit, Site
from mixbits.report.svg import (
    MONO,
    SANS,
    TEXT_PX,
    axes,
    canvas,
    colour,
    drawing,
    inline_svg,
    pixels,
    width_colour,
    write,
)
from mixbits.report.verdict import met
from mixbits.report.words import amount, bits, limit_name, share, shorten

WIDE = 920  # a chart across the page
PANEL = 560  # a chart that shares the page's width with another
ROUND_STEPS = [1, 2, 2.5, 5, 10]  # an axis is divided by these


def budget(limits: Sequence[Limit]) -> str:
    """What the mixed and the uniform network use of each limit, in percent of it."""
    bar, row, gap, head, foot, left = 15, 22, 20, 4, 28, 240
    bold = 0.64 * TEXT_PX  # advance of a bold character, an upper estimate
    texts = [_use(used, limit) for limit in limits for used in (limit.used, limit.uniform_used)]
    right = min(340, 20 + bold * max(map(len, texts)))
    networks = ("mixed", "uniform") if any(x.uniform_used is not None for x in limits) else ("mixed",)
    block = 2 * row + gap
    height = head + foot + block * len(limits)
    ratios = [_ratio(used, limit) for limit in limits for used in (limit.used, limit.uniform_used)]
    most = max(1.15, 1.05 * max(ratios))
    with drawing():
        figure = canvas(WIDE, height)
        page = pixels(figure)
        plot = axes(figure, left, head, WIDE - left - right, height - head - foot)
        plot.set_xlim(0, 100 * most)
        plot.set_ylim(height - head - foot, 0)
        plot.set_yticks([])
        plot.xaxis.set_major_locator(MaxNLocator(6, steps=ROUND_STEPS))
        plot.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        plot.grid(axis="x", color=colour("rule"), linewidth=1)
        plot.set_axisbelow(True)
        for index, limit in enumerate(limits):
            top = gap / 2 + block * index
            write(
                page, 0, head + top + row / 2, shorten(limit_name(limit.limit), 25), size=TEXT_PX, bold=True
            )
            write(page, 0, head + top + 1.5 * row, shorten(limit.limit, 25), tint="muted", mono=True)
            for line, (who, used) in enumerate(zip(networks, (limit.used, limit.uniform_used), strict=False)):
                middle = top + (line + 1 - len(networks) / 2 + 0.5) * row
                ratio, over = _ratio(used, limit), met(used, limit.asked) is False
                plot.barh(middle, 100 * min(ratio, 1), height=bar, color=colour(who))
                plot.barh(middle, 100 * max(ratio - 1, 0), left=100, height=bar, color=colour("bad"))
                write(page, left - 10, head + middle, who, tint="muted", align="right")
                text, tint = _use(used, limit), "bad" if over else "ink"
                write(page, WIDE - right + 14, head + middle, text, size=TEXT_PX, tint=tint, bold=over)
        plot.axvline(100, color=colour("ink"), linewidth=1.6)
        label = "Cost against budget. " + "; ".join(
            f"{limit_name(x.limit)}: mixed {share(x.used, x.asked)}, uniform {share(x.uniform_used, x.asked)}"
            for x in limits
        )
        return inline_svg(figure, name="budget", label=label)


def _ratio(used: float | None, limit: Limit) -> float:
    return used / limit.asked if used is not None and limit.asked else 0.0


def _use(used: float | None, limit: Limit) -> str:
    if used is None:
        return "not known"
    if limit.asked is None:
        return f"{amount(used, limit.unit)}, limit not known"
    return f"{amount(used, limit.unit)} of {amount(limit.asked, limit.unit)} ({share(used, limit.asked)})"


def widths(sites: Sequence[Site], *, name: str, title: str) -> str:
    """Asked (ring), assigned (bar) and stored (tick) width of each site, a row a site."""
    row, head, foot, column = 18, 24, 24, 54
    names = [shorten(site.site, 36) for site in sites]
    left = 14 + MONO * max(map(len, names))
    right = 3 * column + 6
    height = head + foot + row * len(sites)
    with drawing():
        figure = canvas(PANEL, height)
        page = pixels(figure)
        plot = axes(figure, left, head, PANEL - left - right, row * len(sites))
        plot.set_xlim(0, _top_bits(sites))
        plot.set_ylim(row * len(sites), 0)
        plot.set_yticks([])
        plot.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 4, 5, 10]))
        plot.grid(axis="x", color=colour("rule"), linewidth=1)
        plot.set_axisbelow(True)
        write(page, left, head / 2, "bits", tint="muted")
        columns = [PANEL - 8 - column * place for place in (2, 1, 0)]
        for x, text in zip(columns, ("asked", "assigned", "stored"), strict=True):
            write(page, x, head / 2, text, tint="muted", align="right")
        for index, (site, short) in enumerate(zip(sites, names, strict=True)):
            middle = (index + 0.5) * row
            if site.differs or index % 2 == 0:
                tint = "bad-panel" if site.differs else "stripe"
                page.barh(head + middle, PANEL, height=row, color=colour(tint))
            write(page, left - 10, head + middle, short, align="right", mono=True, gid=f"site-{index}")
            _three_widths(plot, site, middle)
            stored_tint = "bad" if site.differs else "ink"
            numbers = (site.asked_bits, site.assigned_bits, site.stored_bits)
            for x, width, tint in zip(columns, numbers, ("muted", "ink", stored_tint), strict=True):
                bold = tint == "bad"
                write(page, x, head + middle, bits(width), tint=tint, bold=bold, align="right")
        tips = {f"site-{index}": site.site for index, site in enumerate(sites)}
        return inline_svg(figure, name=name, label=_widths_label(sites, title), tips=tips)


def _three_widths(plot: Axes, site: Site, middle: float) -> None:
    bar, tick, ring = 9, 13, 7  # different sizes and shapes: all three show even where they coincide
    top = plot.get_xlim()[1]
    if site.assigned_bits is not None:
        plot.barh(middle, site.assigned_bits, height=bar, color=colour("bad" if site.differs else "mixed"))
    if site.stored_bits is not None:
        x, ends = min(site.stored_bits, top), [middle - tick / 2, middle + tick / 2]
        plot.plot([x, x], ends, color=colour("ink"), linewidth=2.6, clip_on=False)
    if site.asked_bits is not None:
        plot.plot(
            [min(site.asked_bits, top)],
            [middle],
            "o",
            markersize=ring,
            markerfacecolor=colour("paper"),
            markeredgecolor=colour("ink"),
            markeredgewidth=1.3,
            clip_on=False,
            zorder=4,
        )


def _top_bits(sites: Sequence[Site]) -> float:
    least, most = 8, 16  # a few float32 sites must not flatten all others; their numbers stand beside
    every = [width for site in sites for width in (site.asked_bits, site.assigned_bits, site.stored_bits)]
    return max([least, *(math.ceil(width) for width in every if width is not None and width <= most)])


def _widths_label(sites: Sequence[Site], title: str) -> str:
    tally = Counter(site.assigned_bits for site in sites if site.assigned_bits is not None)
    text = ", ".join(f"{tally[width]} at {bits(width)} bit" for width in sorted(tally))
    differ = sum(site.differs for site in sites)
    return f"{title}. Assigned: {text or 'not known'}. {differ} stored at another width than assigned."


@dataclass(frozen=True)
class Part:
    """A piece of a strip: its width in bits gives the colour, its size the length."""

    name: str
    bits: float | None
    size: float
    tip: str


@dataclass(frozen=True)
class Strip:
    """A total and its parts, in the order of the network."""

    title: str
    parts: Sequence[Part]
    unit: str
    group: str  # strips of one group share a scale

    @property
    def total(self) -> float:
        """The sum of the parts."""
        return sum(part.size for part in self.parts)


def strips(rows: Sequence[Strip], *, title: str) -> str:
    """Totals as strips cut into their parts; the colour of a part is its width in bits."""
    head, thick, gap = 22, 38, 18
    block = head + thick + gap
    longest = {row.group: max(other.total for other in rows if other.group == row.group) for row in rows}
    tips = {}
    with drawing():
        figure = canvas(WIDE, block * len(rows) - gap + 2)
        page = pixels(figure)
        for index, row in enumerate(rows):
            top = index * block
            write(page, 0, top + head / 2 - 2, row.title, size=TEXT_PX, bold=True)
            write(page, WIDE, top + head / 2 - 2, amount(row.total, row.unit), size=TEXT_PX, align="right")
            left = 0.0
            for number, part in enumerate(row.parts):
                gid = f"part-{index}-{number}"
                tips[gid] = tips[f"{gid}-label"] = part.tip
                length = WIDE * part.size / (longest[row.group] or 1)
                middle = top + head + thick / 2
                _part(page, part, left=left, length=length, middle=middle, thick=thick, gid=gid)
                left += length
        totals = [f"{row.title}: {amount(row.total, row.unit)} in {len(row.parts)} parts" for row in rows]
        return inline_svg(figure, name="strips", label=f"{title}. {'; '.join(totals)}", tips=tips)


def _part(
    page: Axes, part: Part, *, left: float, length: float, middle: float, thick: float, gid: str
) -> None:
    tint = width_colour(part.bits)
    bar = page.barh(middle, length, left=left, height=thick, color=colour(tint), gid=gid)
    bar[0].set(edgecolor=colour("paper"), linewidth=0.8)
    room, narrowest = length - 8, 9  # a name cut to fewer characters says nothing
    x, tint, line = left + length / 2, f"on-{tint}", 7
    if part.bits is None or room < 1.5 * SANS:
        return
    if room < narrowest * MONO:
        write(page, x, middle, bits(part.bits), tint=tint, align="center", gid=f"{gid}-label")
        return
    name = shorten(part.name, int(room / MONO))
    write(page, x, middle - line, name, tint=tint, align="center", mono=True, gid=f"{gid}-label")
    write(page, x, middle + line, f"{bits(part.bits)} bit", tint=tint, align="center", gid=f"{gid}-label")


@dataclass(frozen=True)
class Line:
    """A curve over epochs."""

    name: str
    points: Sequence[tuple[float, float]]  # (epochs, value)
    tint: str
    look: Literal["plain", "thin", "marked", "level"] = "plain"  # level: dashed, to compare with


@dataclass(frozen=True)
class Stage:
    """A named span of epochs."""

    name: str
    first: float
    last: float


def curves(lines: Sequence[Line], *, name: str, title: str, unit: str, stages: Sequence[Stage] = ()) -> str:
    """Curves of one point or more over epochs, with a legend and the names of the stages above them."""
    left, right, foot, tall, row = 54, 12, 42, 190, 18
    places, rows = legend([line.name for line in lines], PANEL - left)
    head = row * rows + 30
    with drawing():
        figure = canvas(PANEL, head + tall + foot)
        page = pixels(figure)
        plot = axes(figure, left, head, PANEL - left - right, tall)
        plot.grid(axis="y", color=colour("rule"), linewidth=1)
        plot.set_axisbelow(True)
        plot.xaxis.set_major_locator(MaxNLocator(8, steps=ROUND_STEPS))
        plot.yaxis.set_major_locator(MaxNLocator(6, steps=ROUND_STEPS))
        plot.yaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))
        for line in lines:
            _curve(plot, line.points, line)
        ends = [x for line in lines for x, _ in line.points] + [stage.last for stage in stages]
        plot.set_xlim(0, max([0.1, *ends]))
        bottom = plot.get_ylim()[0]
        plot.axhline(bottom, color=colour("muted"), linewidth=1.4)
        for stage in stages:
            if stage.first > 0:
                plot.axvline(stage.first, color=colour("muted"), linewidth=1, dashes=(2, 2))
            middle = left + (PANEL - left - right) * (stage.first + stage.last) / 2 / plot.get_xlim()[1]
            middle = min(middle, PANEL - SANS * len(stage.name) / 2)  # a short last stage keeps its name
            write(page, middle, head - 10, stage.name, tint="muted", align="center")
        plot.set_ylim(bottom, None)
        for line, (x, place) in zip(lines, places, strict=True):
            y = row * (place + 0.5)
            _curve(page, [(left + x, y), (left + x + 10, y), (left + x + 20, y)], line)
            write(page, left + x + 27, y, line.name)
        write(page, 0, head - 10, unit, tint="muted")
        middle = left + (PANEL - left - right) / 2
        write(page, middle, head + tall + foot - 8, "epochs", tint="muted", align="center")
        return inline_svg(figure, name=name, label=f"{title}. {_last_values(lines, unit)}")


def _curve(plot: Axes, points: Sequence[tuple[float, float]], line: Line) -> None:
    few = 60  # markers of more points would touch
    plot.plot(
        [x for x, _ in points],
        [y for _, y in points],
        color=colour(line.tint),
        linewidth={"thin": 1.0, "level": 1.4}.get(line.look, 1.9),
        alpha=0.7 if line.look == "thin" else 1,
        marker="o" if len(points) == 1 or (line.look == "marked" and len(points) <= few) else None,
        markersize=4,
        dashes=(4, 3) if line.look == "level" else (None, None),
    )


def legend(names: Sequence[str], room: float) -> tuple[list[tuple[float, int]], int]:
    """Place of each entry, as (px from the left, row), and the count of rows."""
    swatch, gap = 27, 18
    places, x, row = [], 0.0, 0
    for name in names:
        size = swatch + SANS * len(name) + gap
        if x > 0 and x + size - gap > room:
            x, row = 0.0, row + 1
        places.append((x, row))
        x += size
    return places, row + 1


def _last_values(lines: Sequence[Line], unit: str) -> str:
    measured = [line for line in lines if line.look != "level"]
    return "; ".join(f"{line.name}: last {line.points[-1][1]:.4g} {unit}" for line in measured)
