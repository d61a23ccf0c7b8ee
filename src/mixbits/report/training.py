"""The curves of a run: loss, accuracy, average widths and use of the limits over the epochs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mixbits.report.charts import Line, Stage, curves
from mixbits.report.read import Metric, Summary
from mixbits.report.words import limit_name

MIXED = ("learn", "finetune")  # the stages of the mixed network
UNIFORM = ("uniform",)
LIMIT_TINTS = 4

Timeline = Sequence[tuple[float, Metric]]  # epochs since the start of the network's training, in order


def training_charts(summary: Summary, metrics: Sequence[Metric]) -> list[tuple[str, str]]:
    """(title, chart) of everything that was recorded; nothing without metrics.

    Fine-tuning starts where learning ended, so mixed and uniform training share an axis.
    """
    learned = _length(summary.epochs.learn, metrics, "learn")
    tuned = learned + _length(summary.epochs.finetune, metrics, "finetune")
    stages = [Stage("learn", 0.0, learned), Stage("finetune", learned, tuned)]
    start = {"finetune": learned}
    timeline = sorted(((start.get(m.stage, 0.0) + m.epoch, m) for m in metrics), key=lambda point: point[0])
    last = max([tuned, *(epoch for epoch, _ in timeline)])
    panels = [
        ("Loss", "loss", "loss", _loss(timeline)),
        ("Accuracy", "accuracy", "%", _accuracy(timeline, summary.float_.held_out_top1, last)),
        ("Average width", "average-bits", "bits", _average_bits(timeline)),
        ("Use of the limits", "used", "%", _used(timeline, tuned)),
    ]
    drawn = []
    for title, name, unit, lines in panels:
        kept = [line for line in lines if line.points]
        if any(line.look != "level" for line in kept):
            spans = [stage for stage in stages if stage.last > stage.first]
            drawn.append((title, curves(kept, name=name, title=title, unit=unit, stages=spans)))
    return drawn


def _loss(timeline: Timeline) -> list[Line]:
    return [
        Line("mixed", _points(timeline, MIXED, "loss"), "mixed"),
        Line("uniform", _points(timeline, UNIFORM, "loss"), "uniform"),
    ]


def _accuracy(timeline: Timeline, float_top1: float | None, last: float) -> list[Line]:
    lines = [
        Line("mixed, held out", _points(timeline, MIXED, "held_out_top1"), "mixed", "marked"),
        Line("mixed, training", _points(timeline, MIXED, "train_top1"), "mixed", "thin"),
        Line("uniform, held out", _points(timeline, UNIFORM, "held_out_top1"), "uniform", "marked"),
        Line("uniform, training", _points(timeline, UNIFORM, "train_top1"), "uniform", "thin"),
    ]
    return lines if float_top1 is None else [*lines, _level("float, held out", float_top1, last)]


def _average_bits(timeline: Timeline) -> list[Line]:
    return [
        Line("weights", _points(timeline, MIXED, "avg_weight_bits"), "line1"),
        Line("activations", _points(timeline, MIXED, "avg_act_bits"), "line2"),
    ]


def _used(timeline: Timeline, last: float) -> list[Line]:
    mixed = [(epoch, metric) for epoch, metric in timeline if metric.stage in MIXED]
    names = list(dict.fromkeys(name for _, metric in mixed for name in metric.used))
    lines = []
    for index, name in enumerate(names):
        points = [(epoch, 100 * metric.used[name]) for epoch, metric in mixed if name in metric.used]
        lines.append(Line(limit_name(name), points, f"line{index % LIMIT_TINTS + 1}"))
    return [*lines, _level("limit", 100.0, last)]


def _points(timeline: Timeline, stages: Iterable[str], quantity: str) -> list[tuple[float, float]]:
    """The quantity over the epochs, where it was measured."""
    chosen = [(epoch, getattr(metric, quantity)) for epoch, metric in timeline if metric.stage in stages]
    return [(epoch, value) for epoch, value in chosen if value is not None]


def _level(name: str, value: float, last: float) -> Line:
    return Line(name, [(0.0, value), (last, value)], "float", "level")


def _length(epochs: float | None, metrics: Iterable[Metric], stage: str) -> float:
    """Epochs of a stage: as planned, or as recorded if that is more."""
    return max([epochs or 0.0, *(metric.epoch for metric in metrics if metric.stage == stage)])
