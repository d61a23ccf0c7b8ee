"""From the JSON file of a comparison or a sweep to one HTML file that opens without a network."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from mixbits.report.fronts import Point, Series, fronts
from mixbits.report.matrix import Compared, Comparison, Group, Paired, paired, read_comparison, top1
from mixbits.report.page import fill, write_page
from mixbits.report.read import Site
from mixbits.report.svg import width_colour
from mixbits.report.versus import UNIFORM, bounds, comparison_verdict, signed
from mixbits.report.words import (
    KIB,
    UNKNOWN,
    amount,
    bits,
    duration,
    fixed,
    giga,
    kib,
    percent,
    share,
)

COSTS = (  # the field of a network, and how its chart is called
    ("weight_bytes", "bytes", "Accuracy against bytes of weights", "weights, KiB", KIB),
    ("bops", "bop", "Accuracy against bit operations", "bit operations, GBOP", 1e9),
)
# Shapes tell methods apart where colours do not. Uniform is a square in its own colour.
BASELINE_MARKERS = ("v", "^", "<", ">")
LEARNED_MARKERS = ("o", "D", "p", "P", "h", "X", "*", "8")
LEARNED_TINTS = ("line1", "line2", "line3", "line4", "line5", "line6", "line7", "line8")
NUMBERED = 60  # sites in a strip that shows widths as numbers; more are colours only


@dataclass(frozen=True)
class Row:
    """A method at a budget, in the words of the table."""

    name: str
    baseline: bool
    top1: str
    runs: str
    against: str  # uniform, in points
    interval: str
    figures: tuple[str, ...]  # costs: KiB, bits, GBOP, KiB, KiB
    shares: tuple[str, ...]  # of each limit of the budget, in its order
    seconds: str
    policies: tuple[str, ...]  # paths


@dataclass(frozen=True)
class StripRow:
    """Widths of all sites in one run."""

    method: str | None  # None: the run is of the method above
    runs: int  # rows of this method
    cells: tuple[
        tuple[str, str, str], ...
    ]  # colour class, text, tip; all empty between weights and activations


def build_comparison(path: Path) -> Path:
    """Write the page of ``comparison.json`` or ``sweep.json`` beside it, from that file alone."""
    page = render(read_comparison(path))
    return write_page(path.with_suffix(".html"), page)


def render(comparison: Comparison) -> str:
    """The page."""
    headings, general = comparison_verdict(comparison)
    seeds = comparison.seeds
    return fill(
        "comparison.html",
        run=comparison,
        headings=headings,
        general=general,
        charts=charts(comparison),
        float_row=float_row(comparison),
        tables=[(budget, rows(comparison, budget)) for budget in comparison.budgets],
        against_uniform=any(method.method == UNIFORM for method in comparison.baselines),
        strips=[(budget, strip(comparison, budget)) for budget in comparison.budgets],
        weights=sum(site.kind == "weight" for site in comparison.sites),
        failed=[cell for cell in comparison.cells if cell.status == "failed"],
        seeds=f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else ", ".join(map(str, seeds)),
    )


def rows(comparison: Comparison, budget: str) -> list[Row]:
    """The table's rows of one budget, in the order of the methods."""
    uniform = comparison.group(UNIFORM, budget)
    made = []
    for method in comparison.methods:
        group = comparison.group(method.method, budget)
        pair = None if method.method == UNIFORM else paired(group, uniform)
        made.append(_row(method, group, pair))
    return made


def float_row(comparison: Comparison) -> Row:
    """The row of the float networks."""
    runs = [entry.network for entry in comparison.floats]
    cells = [run.top1 for run in runs if run.top1 is not None]
    network = runs[0] if runs else None
    seconds = [run.seconds for run in runs if run.seconds is not None]
    figures = (
        (
            kib(network.weight_bytes),
            "32",
            "32",
            giga(network.bops),
            kib(network.act_max_bytes),
            kib(network.act_sum_bytes),
        )
        if network
        else (UNKNOWN,) * 6
    )
    mean = None if comparison.float_top1 is None else fixed(comparison.float_top1)
    spread = f" ± {fixed(_deviation(cells))}" if len(cells) > 1 else ""
    taken = duration(sum(seconds) / len(seconds)) if seconds else UNKNOWN
    return Row("float", True, f"{mean or UNKNOWN}{spread}", str(len(cells)), "", "", figures, (), taken, ())


def _deviation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5


def _row(method: Compared, group: Group, pair: Paired | None) -> Row:
    def mean(name: str) -> float | None:
        return group.mean(lambda cell: getattr(cell.network, name))

    figures = (
        kib(mean("weight_bytes")),
        fixed(mean("avg_weight_bits")),
        fixed(mean("avg_act_bits")),
        giga(mean("bops")),
        kib(mean("act_max_bytes")),
        kib(mean("act_sum_bytes")),
    )
    learning, tuning = (
        group.mean(lambda cell: cell.seconds_learn),
        group.mean(lambda cell: cell.seconds_finetune),
    )
    count = len(group.cells)
    return Row(
        method.method,
        method.baseline,
        fixed(group.top1) + ("" if group.spread is None else f" ± {fixed(group.spread)}"),
        str(count) if count == group.asked else f"{count} of {group.asked}",
        "" if pair is None else signed(pair.mean),
        "" if pair is None or pair.half is None else bounds(pair),
        figures,
        tuple(share(used, 1.0) for used in group.shares().values()),
        f"{duration(learning)} + {duration(tuning)}",
        tuple(cell.policy for cell in group.cells if cell.policy),
    )


def charts(comparison: Comparison) -> list[tuple[str, Markup]]:
    """(title, chart) for every cost that is known."""
    drawn = []
    for name, unit, title, axis, size in COSTS:
        series = [entry for entry in _series(comparison, name, unit, size) if entry.points]
        if series:
            chart = fronts(series, name=name, title=title, axis=axis, level=comparison.float_top1)
            drawn.append((title, Markup(chart)))
    return drawn


def _series(comparison: Comparison, cost: str, unit: str, size: float) -> Iterable[Series]:
    baselines, learned = 0, 0
    for method in comparison.methods:
        points = [
            point
            for budget in comparison.budgets
            if (point := _point(comparison.group(method.method, budget), cost, unit, size)) is not None
        ]
        if method.method == UNIFORM:
            yield Series(method.method, points, "uniform", "s")
        elif method.baseline:
            yield Series(method.method, points, "float", BASELINE_MARKERS[baselines % len(BASELINE_MARKERS)])
            baselines += 1
        else:
            tint, marker = (
                LEARNED_TINTS[learned % len(LEARNED_TINTS)],
                LEARNED_MARKERS[learned % len(LEARNED_MARKERS)],
            )
            yield Series(method.method, points, tint, marker)
            learned += 1


def _point(group: Group, cost: str, unit: str, size: float) -> Point | None:
    used, score = group.mean(lambda cell: getattr(cell.network, cost)), group.top1
    if used is None or score is None:
        return None
    scores = group.values(top1)
    tip = f"{group.method} at {group.budget}: {percent(score)}, {amount(used, unit)}"
    return Point(used / size, score, min(scores), max(scores), tip)


def strip(comparison: Comparison, budget: str) -> list[StripRow]:
    """The widths of every run at a budget: a row a run, a column a site, weights before activations."""
    ordered = sorted(comparison.sites, key=lambda site: site.kind != "weight")
    made = []
    for method in comparison.methods:
        group = comparison.group(method.method, budget)
        for index, cell in enumerate(group.cells):
            cells = [
                _width(site, cell.network.widths.get(site.site), cell.seed, len(ordered)) for site in ordered
            ]
            weights = sum(site.kind == "weight" for site in ordered)
            made.append(
                StripRow(
                    method.method if index == 0 else None,
                    len(group.cells),
                    (*cells[:weights], ("gap", "", ""), *cells[weights:]),
                )
            )
    return made


def _width(site: Site, width: float | None, seed: float, sites: int) -> tuple[str, str, str]:
    shown = bits(width) if sites <= NUMBERED else ""
    return width_colour(width).replace("bits", "b"), shown, f"{site.site}: {bits(width)} bit, seed {seed:g}"
