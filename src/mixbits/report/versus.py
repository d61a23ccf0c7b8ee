"""The verdict of a comparison: what is established at each budget and what is not, in computed sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mixbits.report.matrix import CONFIDENCE, LEAST_SEEDS, Comparison, Group, Paired, front, paired
from mixbits.report.verdict import Sentence, met, some
from mixbits.report.words import bits, fixed, limit_name, percent, points

UNIFORM = "uniform"
UNEQUAL = 0.005  # fraction of a limit; packed bytes round up by less, so a larger difference is a choice


@dataclass(frozen=True)
class Heading:
    """The sentences about one budget."""

    budget: str
    sentences: Sequence[Sentence]


def comparison_verdict(comparison: Comparison) -> tuple[list[Heading], list[Sentence]]:
    """What is to be said of each budget, and of the whole."""
    say = _front if comparison.command == "sweep" else _budget
    headings = [Heading(budget, say(comparison, budget)) for budget in comparison.budgets]
    return headings, [*_missing(comparison), *_epochs(comparison), _caution(comparison)]


def signed(value: float) -> str:
    """A difference with its sign.

    >>> signed(0.5), signed(-0.004), signed(0.0)
    ('+0.50', '−0.004', '+0.00')
    """
    size = points(value).removesuffix(" points") if value else "0.00"
    return f"{'−' if value < 0 else '+'}{size}"


def interval(pair: Paired) -> str:
    """The confidence interval in words, or why there is none."""
    if pair.half is None:
        return "one seed, no interval"
    return f"{pair.n} seeds paired, {CONFIDENCE:.0%} interval {bounds(pair)}".replace("%", " %")


def bounds(pair: Paired) -> str:
    """The ends of the confidence interval, from two seeds on.

    >>> bounds(Paired(3, 0.5, 0.75))
    '−0.25 to +1.25'
    """
    half = pair.half or 0.0
    return f"{signed(pair.mean - half)} to {signed(pair.mean + half)}"


def _budget(comparison: Comparison, budget: str) -> list[Sentence]:
    groups = {entry.method: comparison.group(entry.method, budget) for entry in comparison.methods}
    learned = [groups[entry.method] for entry in comparison.learned if groups[entry.method].cells]
    others = [groups[entry.method] for entry in comparison.baselines if entry.method != UNIFORM]
    uniform = groups.get(UNIFORM)
    if uniform is None or not uniform.cells:
        return [
            Sentence("Uniform widths have no result here: nothing to compare with.", "bad"),
            *_over(groups),
        ]
    sentences = [_headline(learned, uniform, others), *_over(groups), *_spent(groups, uniform)]
    for group in learned:
        pair = paired(group, uniform)
        if pair is not None:
            sentences.append(_differences(group, pair, others))
    return sentences


def _headline(learned: Sequence[Group], uniform: Group, others: Sequence[Group]) -> Sentence:
    pairs = {group.method: pair for group in learned if (pair := paired(group, uniform)) is not None}
    if not pairs:
        return Sentence("No method that learns widths has a result here.", "bad")
    inside = {group.method for group in learned if not _exceeded(group)}
    gains = [name for name, pair in pairs.items() if pair.established and pair.mean > 0 and name in inside]
    if gains:
        verb = "is" if len(gains) == 1 else "are"
        beaten = {group.method for group in learned for other in others if _below(group, other)}
        if beaten.issuperset(gains):
            text = (
                f"{some(gains)} {verb} established above uniform widths, but below widths not learned at all"
            )
            return Sentence(f"{text}: learning did not pay here.", "bad")
        return Sentence(
            f"Mixed precision paid here: {some(gains)} {verb} established above uniform widths.", "good"
        )
    if all(pair.mean <= 0 for pair in pairs.values()):
        return Sentence("Mixed precision did not pay here: no method is above uniform widths.", "bad")
    seeds = _seeds(max(pair.n for pair in pairs.values()))
    return Sentence(f"Whether mixed precision pays here is not established with {seeds}.", "plain")


def _differences(group: Group, pair: Paired, others: Sequence[Group]) -> Sentence:
    """A method in one line: its differences to uniform widths, with the interval, and to the rest."""
    pairs = {other.method: against for other in others if (against := paired(group, other)) is not None}
    if pair.mean <= 0:
        verdict = "did not pay"
    else:
        verdict = "paid" if pair.established else "is above uniform, which is not established"
    told = [f"uniform {_mark(pair)} ({interval(pair)})"]
    told += [f"{name} {_mark(against)}" for name, against in pairs.items()]
    least = min([pair.mean, *(against.mean for against in pairs.values())])
    sure = all(against.established for against in [pair, *pairs.values()])
    tone = "bad" if least <= 0 else "good" if sure else "plain"
    return Sentence(f"{group.method} {verdict}. Against {', '.join(told)}.", tone)


def _mark(pair: Paired) -> str:
    return f"{signed(pair.mean)}{'*' if pair.established else ''}"


def _spent(groups: dict[str, Group], uniform: Group) -> list[Sentence]:
    """Where a method uses more or less of a limit than uniform widths do."""
    sentences = []
    for name, share in uniform.shares().items():
        others = {method: group.shares().get(name) for method, group in groups.items() if method != UNIFORM}
        parts = [
            f"{method} {'more' if other > share else 'less'} ({_percent(other)})"
            for method, other in others.items()
            if other is not None and abs(other - share) > UNEQUAL
        ]
        if parts:
            spent = f"uniform uses {_percent(share)} of the limit, {', '.join(parts)}"
            text = f"Not an equal spend of {limit_name(name).lower()}: {spent}."
            sentences.append(Sentence(text, "plain"))
    return sentences


def _over(groups: dict[str, Group]) -> list[Sentence]:
    broken = [text for group in groups.values() for text in _exceeded(group)]
    return [Sentence(f"Limits are exceeded: {some(broken)}.", "bad")] if broken else []


def _exceeded(group: Group) -> list[str]:
    return [
        f"{group.method} on {limit_name(limit.limit).lower()} (seed {cell.seed:g})"
        for cell in group.cells
        for limit in cell.limits
        if met(limit.used, limit.asked) is False
    ]


def _below(group: Group, other: Group) -> bool:
    pair = paired(group, other)
    return pair is not None and pair.mean < 0


def _front(comparison: Comparison, budget: str) -> list[Sentence]:
    """A point of a sweep: what it reaches, and whether another is cheaper and no worse."""
    method = comparison.methods[0].method
    group = comparison.group(method, budget)
    if group.top1 is None:
        return [Sentence("There is no result here.", "bad")]
    spread = "" if group.spread is None else f" ± {fixed(group.spread)}"
    text = f"{method} reaches {percent(group.top1)}{spread} with {_seeds(len(group.cells))}"
    if comparison.float_top1 is not None:
        text += f", {signed(group.top1 - comparison.float_top1)} points against float"
    beaten = [
        name
        for name, cost in (("weights", "weight_bytes"), ("bit operations", "bops"))
        if _beaten(comparison, budget, cost)
    ]
    sentences = [Sentence(f"{text}.", "plain"), *_over({method: group})]
    if beaten:
        text = (
            f"By {' and by '.join(beaten)} this point is not on the front: another is as cheap and no worse."
        )
        sentences.append(Sentence(text, "bad"))
    return sentences


def _beaten(comparison: Comparison, budget: str, cost: str) -> bool:
    method = comparison.methods[0].method
    groups = [comparison.group(method, other) for other in comparison.budgets]
    known = [
        (group.budget, (use, group.top1))
        for group in groups
        if (use := group.mean(lambda cell: getattr(cell.network, cost))) is not None
        and group.top1 is not None
    ]
    on_front = {known[index][0] for index in front([point for _, point in known])}
    return budget in dict(known) and budget not in on_front


def _missing(comparison: Comparison) -> list[Sentence]:
    sentences = []
    failed = [cell for cell in comparison.cells if cell.status == "failed"]
    unfinished = sum(cell.status == "unfinished" for cell in comparison.cells)
    total = len(comparison.cells)
    if failed:
        named = some([cell.folder or cell.method for cell in failed])
        sentences.append(Sentence(f"{len(failed)} of {total} runs failed: {named}.", "bad"))
    if unfinished:
        sentences.append(
            Sentence(f"{unfinished} of {total} runs are not finished; go on with --resume.", "bad")
        )
    return sentences


def _epochs(comparison: Comparison) -> list[Sentence]:
    other = [
        f"{entry.method} ({bits(entry.epochs)})"
        for entry in comparison.methods
        if entry.epochs is not None and entry.epochs != comparison.epochs
    ]
    if not other or comparison.epochs is None:
        return []
    return [
        Sentence(f"Not trained for {bits(comparison.epochs)} epochs like the others: {some(other)}.", "bad")
    ]


def _caution(comparison: Comparison) -> Sentence:
    if comparison.command == "sweep":
        return Sentence("No baseline ran: `mixbits compare` says whether mixed precision pays.", "plain")
    tests = len(comparison.budgets) * len(comparison.learned) * len(comparison.baselines)
    return Sentence(
        "Differences are points of top-1. Established (*) means: "
        f"the {CONFIDENCE:.0%} interval of the mean difference over {LEAST_SEEDS} seeds "
        "or more leaves out zero; it covers the seeds, not the choice of test images. "
        f"Of {tests} such comparisons one in twenty would leave out zero by chance.".replace("%", " %"),
        "plain",
    )


def _seeds(n: int) -> str:
    return "one seed" if n == 1 else f"{n} seeds"


def _percent(share: float) -> str:
    return f"{fixed(100 * share, 1)} %"
