"""From the JSON files of a run to one HTML file that opens without a network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

from mixbits.core.cost import FLOAT_BITS, packed_bytes
from mixbits.report import charts, words
from mixbits.report.charts import Part, Strip
from mixbits.report.page import fill, write_page
from mixbits.report.read import Metric, Site, Summary, read_metrics, read_summary
from mixbits.report.training import training_charts
from mixbits.report.verdict import integer_share, verdict

FILE_NAME = "report.html"
PANEL_ROWS = 40  # sites in one panel of the chart of widths; more are split evenly
OPEN_ROWS = 60  # a longer table starts folded


def build_report(run_dir: Path) -> Path:
    """Write ``report.html`` into the folder of a run, from its ``summary.json`` and ``metrics.jsonl`` alone.

    The same two files give the same bytes. An older report is replaced in one step: no reader sees half.
    """
    run_dir = Path(run_dir)
    page = render(read_summary(run_dir / "summary.json"), read_metrics(run_dir / "metrics.jsonl"))
    return write_page(run_dir / FILE_NAME, page)


def render(summary: Summary, metrics: tuple[Metric, ...]) -> str:
    """The page."""
    networks = (("float", summary.float_), ("uniform", summary.uniform), ("mixed", summary.mixed))
    return fill(
        "template.html",
        run=summary,
        uniform_widths=uniform_widths(summary),
        networks=[(name, network) for name, network in networks if network],
        verdict=verdict(summary),
        budget_chart=Markup(charts.budget(summary.limits)) if summary.limits else None,
        width_charts=width_charts(summary.sites),
        strips_chart=strips_chart(summary),
        steps_us=sum(step.us or 0.0 for step in summary.steps),
        training_charts=[(title, Markup(chart)) for title, chart in training_charts(summary, metrics)],
        differing=[site for site in summary.sites if site.differs],
        integer_share=integer_share(summary.instructions),
        float_steps=[step for step in summary.instructions if step.arithmetic == "float"],
        open_rows=OPEN_ROWS,
    )


def uniform_widths(summary: Summary) -> str | None:
    """The widths of the uniform network in words; None if it was not run."""
    if summary.uniform is None:
        return None
    kinds = []
    for kind, plural in (("weight", "weights"), ("activation", "activations")):
        names = {site.site for site in summary.sites if site.kind == kind}
        used = sorted({width for name, width in summary.uniform.widths.items() if name in names})
        if used:
            kinds.append(f"{plural} {' or '.join(map(words.bits, used))} bit")
    return ", ".join(kinds) or "widths not known"


def width_charts(sites: tuple[Site, ...]) -> list[tuple[str, Markup]]:
    """(title, chart) of every panel: weights first, then activations."""
    panels = []
    for kind, plural in (("weight", "Weights"), ("activation", "Activations")):
        chosen = [site for site in sites if site.kind == kind]
        panel_count = -(-len(chosen) // PANEL_ROWS)
        for index in range(panel_count):
            first, last = (len(chosen) * place // panel_count for place in (index, index + 1))
            title = plural if panel_count == 1 else f"{plural} {first + 1} to {last} of {len(chosen)}"
            chart = charts.widths(chosen[first:last], name=f"widths-{kind}-{index}", title=title)
            panels.append((title, Markup(chart)))
    return panels


def strips_chart(summary: Summary) -> Markup | None:
    """Where the bytes and the bit operations go, mixed against uniform."""
    rows = []
    for kind, title in (("weight", "Weights"), ("activation", "Activations")):
        sites = [site for site in summary.sites if site.kind == kind and site.elements]
        sites = [site for site in sites if site.site != "input"] or sites  # as in core.cost
        mixed = {s.site: s.assigned_bits if s.stored_bits is None else s.stored_bits for s in sites}
        rows.append(Strip(f"{title}, mixed", _packed(sites, mixed), "bytes", kind))
        if summary.uniform:
            rows.append(Strip(f"{title}, uniform", _packed(sites, summary.uniform.widths), "bytes", kind))
    rows.append(Strip("Bit operations, mixed", _bit_operations(summary), "bop", "bop"))
    rows = [row for row in rows if row.total]
    return Markup(charts.strips(rows, title="Where the bits go")) if rows else None


def _packed(sites: list[Site], widths: Mapping[str, float] | Mapping[str, float | None]) -> list[Part]:
    parts = []
    for site in sites:
        width = widths.get(site.site)
        if width is not None:
            size = packed_bytes(round(site.elements or 0), round(width))
            tip = f"{site.site}: {words.count(site.elements)} values, {words.bits(width)} bit"
            name = site.site.removesuffix(".weight") if site.kind == "weight" else site.site
            parts.append(Part(name, width, size, f"{tip}, {words.amount(size, 'bytes')}"))
    return parts


def _bit_operations(summary: Summary) -> list[Part]:
    parts = []
    for step in summary.instructions:
        if step.macs:
            weight_bits, activation_bits = step.weight_bits or FLOAT_BITS, step.activation_bits or FLOAT_BITS
            size = step.macs * weight_bits * activation_bits
            tip = f"{step.name}: {words.count(step.macs)} MACs, {weight_bits:g} x {activation_bits:g} bit"
            parts.append(Part(step.name, weight_bits, size, f"{tip}, {words.amount(size, 'bop')}"))
    return parts
