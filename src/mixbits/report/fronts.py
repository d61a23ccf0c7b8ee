"""Accuracy against cost, a point a method and budget: plain data in, an SVG element out. All sizes are px."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from mixbits.report.charts import PANEL, ROUND_STEPS, legend
from mixbits.report.matrix import front
from mixbits.report.svg import axes, canvas, colour, drawing, inline_svg, pixels, write

LOG_FROM = 6.0  # largest over smallest cost from which the axis is logarithmic
ROUND = (1.0, 2.0, 5.0)  # times a power of ten: ticks of a logarithmic axis


@dataclass(frozen=True)
class Point:
    """A method at a budget."""

    cost: float
    score: float  # mean over the seeds, percent
    low: float  # lowest seed
    high: float  # highest seed
    tip: str


@dataclass(frozen=True)
class Series:
    """The points of one method."""

    name: str
    points: Sequence[Point]
    tint: str
    marker: str  # matplotlib's name of its shape


def fronts(series: Sequence[Series], *, name: str, title: str, axis: str, level: float | None) -> str:
    """Points with bars from the lowest to the highest seed; filled ones are on the front, which is drawn."""
    left, right, foot, tall, row = 54, 14, 42, 260, 18
    every = [(entry, point) for entry in series for point in entry.points]
    best = front([(point.cost, point.score) for _, point in every])
    places, rows = legend([entry.name for entry in series], PANEL - left)
    head = row * rows + 26
    tips = {}
    with drawing():
        figure = canvas(PANEL, head + tall + foot)
        page = pixels(figure)
        plot = axes(figure, left, head, PANEL - left - right, tall)
        plot.grid(axis="both", color=colour("rule"), linewidth=1)
        plot.set_axisbelow(True)
        _cost_axis(plot, [point.cost for _, point in every])
        plot.yaxis.set_major_locator(MaxNLocator(7, steps=ROUND_STEPS))
        plot.yaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))
        corners = [(every[index][1].cost, every[index][1].score) for index in best]
        plot.plot(
            [x for x, _ in corners], [y for _, y in corners], color=colour("muted"), linewidth=5, alpha=0.25
        )
        if level is not None:
            plot.axhline(level, color=colour("float"), linewidth=1.4, dashes=(4, 3))
        for place, entry in enumerate(series):
            ordered = sorted(entry.points, key=lambda point: point.cost)
            plot.plot(
                [point.cost for point in ordered],
                [point.score for point in ordered],
                color=colour(entry.tint),
                linewidth=1,
                alpha=0.6,
            )
            for number, point in enumerate(entry.points):
                gid = f"point-{place}-{number}"
                tips[gid] = point.tip
                _point(plot, entry, point, filled=every.index((entry, point)) in best, gid=gid)
        for entry, (x, place) in zip(series, places, strict=True):
            y = row * (place + 0.5)
            page.plot([left + x + 8], [y], **_mark(entry, filled=True))
            write(page, left + x + 20, y, entry.name)
        low, high = plot.get_ylim()
        if level is not None:
            where = head + tall * (high - level) / (high - low)
            write(page, PANEL - right - 2, where - 9, "float", tint="muted", align="right")
        write(page, 0, head - 12, "top-1, %", tint="muted")
        middle = left + (PANEL - left - right) / 2
        write(page, middle, head + tall + foot - 8, axis, tint="muted", align="center")
        on_front = "; ".join(every[index][1].tip for index in best)
        return inline_svg(figure, name=name, label=f"{title}. On the front: {on_front}", tips=tips)


def _point(plot: Any, entry: Series, point: Point, *, filled: bool, gid: str) -> None:
    if point.high > point.low:
        tint = colour(entry.tint)
        plot.plot([point.cost, point.cost], [point.low, point.high], color=tint, linewidth=1.4, zorder=3)
    plot.plot([point.cost], [point.score], **_mark(entry, filled=filled), gid=gid, zorder=4)


def _mark(entry: Series, *, filled: bool) -> dict[str, Any]:
    return {
        "marker": entry.marker,
        "markersize": 8,
        "linestyle": "none",
        "markerfacecolor": colour(entry.tint if filled else "paper"),
        "markeredgecolor": colour(entry.tint),
        "markeredgewidth": 1.6,
    }


def _cost_axis(plot: Any, costs: Sequence[float]) -> None:
    low, high = min(costs), max(costs)
    if low > 0 and high / low >= LOG_FROM:
        plot.set_xscale("log")
        ticks = [digit * 10.0**power for power in range(-12, 13) for digit in ROUND]
        plot.xaxis.set_major_locator(
            FixedLocator([tick for tick in ticks if low / 1.3 <= tick <= high * 1.3])
        )
        plot.xaxis.set_minor_locator(NullLocator())
        plot.set_xlim(low / 1.15, high * 1.15)
    else:
        margin = 0.08 * (high - low) or 0.1 * high or 1.0
        plot.xaxis.set_major_locator(MaxNLocator(6, steps=ROUND_STEPS))
        plot.set_xlim(low - margin, high + margin)
    plot.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
