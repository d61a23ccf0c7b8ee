"""The verdict: what came of a run, in sentences computed from its numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from mixbits.report.read import Instruction, Limit, Network, Site, Summary
from mixbits.report.words import amount, count, large, limit_name, percent, points, share, times

NAMED = 3  # sites and limits that a sentence names before it says "and n more"
ROUNDING = 1e-9  # relative; a limit is met up to the last bits of a float64


@dataclass(frozen=True)
class Sentence:
    """One sentence and whether it is good news."""

    text: str
    tone: Literal["good", "bad", "plain"]


def verdict(summary: Summary) -> list[Sentence]:
    """The sentences of the verdict, the most important first."""
    return [
        *_limits(summary.limits),
        _against_uniform(summary),
        *_stored(summary.sites),
        *_against_float(summary),
        *_packed_file(summary),
        *_arithmetic(summary.instructions),
        _caution(summary),
    ]


def met(used: float | None, asked: float | None) -> bool | None:
    """Whether a limit holds; None if that is not known.

    >>> met(70.0, 70.0), met(70.1, 70.0), met(None, 70.0)
    (True, False, None)
    """
    return None if used is None or asked is None else used <= asked * (1 + ROUNDING)


def integer_share(instructions: Iterable[Instruction]) -> str | None:
    """How much of the work runs as integer arithmetic; None if no MACs are recorded."""
    work = [(step.macs or 0, step.arithmetic) for step in instructions]
    total = sum(macs for macs, _ in work)
    integer = sum(macs for macs, arithmetic in work if arithmetic == "integer")
    return f"Of {large(total)} MACs, {share(integer, total)} run as integer arithmetic." if total else None


def _limits(limits: Sequence[Limit]) -> list[Sentence]:
    if not limits:
        return [Sentence("No limit was set.", "plain")]
    sentences = [Sentence(_broken(x), "bad") for x in limits if met(x.used, x.asked) is False]
    unknown = [limit_name(x.limit).lower() for x in limits if met(x.used, x.asked) is None]
    if unknown:
        sentences.append(Sentence(f"Whether the limit on {some(unknown)} is met is not known.", "bad"))
    if sentences:
        return sentences
    uses = [f"{limit_name(x.limit).lower()} {_amounts(x)}" for x in limits]
    return [Sentence(f"Every limit is met: {', '.join(uses)}.", "good")]


def _amounts(limit: Limit) -> str:
    return f"{amount(limit.used, limit.unit)} of {amount(limit.asked, limit.unit)}"


def _broken(limit: Limit) -> str:
    assert limit.used is not None
    assert limit.asked is not None
    return (
        f"The limit on {limit_name(limit.limit).lower()} is not met: {_amounts(limit)} used "
        f"({share(limit.used, limit.asked)}), {amount(limit.used - limit.asked, limit.unit)} too much."
    )


def _against_uniform(summary: Summary) -> Sentence:
    if summary.uniform is None:
        return Sentence("Uniform widths were not run: nothing to compare mixed precision with.", "plain")
    mixed, uniform = summary.mixed.top1, summary.uniform.top1
    if mixed is None or uniform is None:
        return Sentence("Mixed precision and uniform widths cannot be compared: a top-1 is not known.", "bad")
    over = [limit_name(x.limit).lower() for x in summary.limits if met(x.uniform_used, x.asked) is False]
    uniform_over = f"the uniform network exceeds the limit on {some(over)}" if over else ""
    against = f"{percent(mixed)} top-1 against {percent(uniform)}"
    change = points(mixed - uniform)
    if mixed <= uniform:
        size = "no difference" if mixed == uniform else f"{change} less"
        lead = f"Mixed precision did not pay here: {against} for uniform widths, {size}"
        return Sentence(f"{lead}; but {uniform_over}.", "plain") if over else Sentence(f"{lead}.", "bad")
    if any(met(x.used, x.asked) is False for x in summary.limits):
        lead = f"Mixed precision scores {change} more than uniform widths ({against}), but outside the budget"
        return Sentence(f"{lead}: this is not a comparison at the same budget.", "bad")
    lead = f"Mixed precision gains {change} over uniform widths"
    end = f": {against}, although {uniform_over}" if over else f" at the same budget: {against}"
    return Sentence(f"{lead}{end}.", "good")


def _stored(sites: Sequence[Site]) -> list[Sentence]:
    if not sites:
        return []
    sentences = []
    differ = [site for site in sites if site.differs]
    unknown = sum(None in (site.assigned_bits, site.stored_bits) for site in sites)
    if differ:
        verb = "is" if len(differ) == 1 else "are"
        named = some([f"{s.site} (assigned {s.assigned_bits:g}, stored {s.stored_bits:g})" for s in differ])
        fact = f"{len(differ)} of {len(sites)} sites {verb} stored at another width than assigned"
        sentences.append(Sentence(f"{fact}: {named}.", "bad"))
    elif not unknown:
        sentences.append(Sentence(f"All {len(sites)} sites are stored at the assigned width.", "good"))
    if unknown:
        which = f"{unknown} of {len(sites)} sites"
        sentences.append(Sentence(f"For {which} the assigned or the stored width is not known.", "bad"))
    return sentences


def _against_float(summary: Summary) -> list[Sentence]:
    mixed, reference = summary.mixed, summary.float_
    if mixed.top1 is None or reference.top1 is None:
        return []
    drop = reference.top1 - mixed.top1
    change = "equals the top-1 of"
    if drop:
        change = f"loses {points(drop)} against" if drop > 0 else f"gains {points(drop)} over"
    against = f"{percent(mixed.top1)} against {percent(reference.top1)}"
    return [
        Sentence(
            f"The mixed network {change} the float network ({against}){_smaller(mixed, reference)}.", "plain"
        )
    ]


def _smaller(mixed: Network, reference: Network) -> str:
    pairs = (
        ("weights", "smaller", reference.weight_bytes, mixed.weight_bytes),
        ("bit operations", "fewer", reference.bops, mixed.bops),
    )
    parts = [
        f"{name} {times(before / after)} {less}" for name, less, before, after in pairs if before and after
    ]
    return f", with {' and '.join(parts)}" if parts else ""


def _packed_file(summary: Summary) -> list[Sentence]:
    runtime = summary.runtime
    if runtime is None:
        return [Sentence("The packed file was not run.", "plain")]
    parts = []
    same, images = runtime.same_prediction_as_training_graph, runtime.images
    if runtime.top1 is not None:
        on = f" on {count(images)} test images" if images else ""
        beside = runtime.training_graph_top1
        trained = "" if beside is None else f", where the training graph has {percent(beside)},"
        parts.append(f"scores {percent(runtime.top1)} top-1{on}{trained}")
    if same is not None and images:
        parts.append(f"predicts the same class as the training graph for {count(same)} of {count(images)}")
    size = "" if summary.artifact_bytes is None else f" ({amount(summary.artifact_bytes, 'bytes')})"
    return (
        [Sentence(f"The packed file{size}, run on its own, {' and '.join(parts)}.", "plain")] if parts else []
    )


def _arithmetic(instructions: Sequence[Instruction]) -> list[Sentence]:
    text = integer_share(instructions)
    return [Sentence(text, "plain")] if text else []


def _caution(summary: Summary) -> Sentence:
    seed = "" if summary.seed is None else f" ({summary.seed:g})"
    return Sentence(
        f"This is one run with one seed{seed}. Top-1 moves from seed to seed: repeat the run with other "
        "seeds before trusting a small difference.",
        "plain",
    )


def some(names: Sequence[str]) -> str:
    """The names, or the first few and how many more.

    >>> some(["a", "b"]), some(["a", "b", "c", "d"])
    ('a, b', 'a, b, c and 1 more')
    """
    named = ", ".join(names[:NAMED])
    return named if len(names) <= NAMED else f"{named} and {len(names) - NAMED} more"
