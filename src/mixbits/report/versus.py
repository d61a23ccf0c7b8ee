"""The verdict of a comparison: what is established at each budget and what is not, in computed sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mixbits.report.matrix import (
    CONFIDENCE,
    LEAST_SEEDS,
    Comparison,
    Group,
    Paired,
    front,
    paired,
    same_widths,
)
from mixbits.report.verdict import Sentence, met, some
from mixbits.report.words import bits, fixed, limit_name, percent, points

UNIFORM = "uniform"
APART = 0.05  # fraction by which a cost without a limit may differ before it is said
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
    sentences += _unlimited(learned, uniform)
    for group in learned:
        pair = paired(group, uniform)
        if pair is not None:
            sentences.append(_differences(group, uniform, pair, others))
    for group in others:
        pair = paired(group, uniform)
        if pair is not None and pair.established and pair.mean > 0:
            text = f"{group.method} is established above uniform widths, without learning any"
            sentences.append(Sentence(f"{text}: {_mark(pair)} ({interval(pair)}).", "plain"))
    return sentences


def _headline(learned: Sequence[Group], uniform: Group, others: Sequence[Group]) -> Sentence:
    """What the budget says of mixed precision: runs that have uniform's widths throughout say nothing."""
    pairs = {group.method: pair for group in learned if (pair := paired(group, uniform)) is not None}
    if not pairs:
        return Sentence("No method that learns widths has a result here.", "bad")
    mixed = [group for group in learned if same_widths(group, uniform) < len(group.cells)]
    pairs = {group.method: pairs[group.method] for group in mixed if group.method in pairs}
    if not pairs:
        return Sentence("Every run has uniform's widths here: this says nothing of mixed precision.", "plain")
    inside = {group.method for group in mixed if not _exceeded(group)}
    alone = [name for name, pair in pairs.items() if pair.established and pair.mean > 0 and name in inside]
    gains = [name for name in alone if name in _beyond_chance(pairs)]
    if gains:
        return _against_others(gains, mixed, others)
    if alone:
        return Sentence(
            f"Whether mixed precision pays here is not established: {some(alone)} would be above uniform "
            f"widths if nothing else had been tried, but {len(pairs)} methods were.",
            "plain",
        )
    seeds = _seeds(max(pair.n for pair in pairs.values()))
    if any(pair.mean > 0 for pair in pairs.values()):
        return Sentence(f"Whether mixed precision pays here is not established with {seeds}.", "plain")
    below = [name for name, pair in pairs.items() if pair.established]
    sure = f"established below for {some(below)}" if below else f"established below for none with {seeds}"
    return Sentence(
        f"Mixed precision did not pay here: no learned widths are above uniform ones ({sure}).", "bad"
    )


def _against_others(gains: Sequence[str], learned: Sequence[Group], others: Sequence[Group]) -> Sentence:
    """What a gain over uniform widths is worth beside widths that nothing was learned for."""
    text = f"{some(gains)} {_is(gains)} established above uniform widths"
    against = {
        group.method: [pair for other in others if (pair := paired(group, other)) is not None]
        for group in learned
        if group.method in gains
    }
    if all(any(pair.mean < 0 for pair in against[name]) for name in gains):
        return Sentence(f"{text}, but below widths not learned at all: learning did not pay here.", "bad")
    paid = [name for name in gains if all(pair.mean > 0 and pair.established for pair in against[name])]
    names = [other.method for other in others if other.cells]
    if not paid:
        return Sentence(f"{text}, but not above {' and '.join(names)} ones.", "plain")
    text = f"{some(paid)} {_is(paid)} established above {' and '.join([UNIFORM, *names])} widths"
    return Sentence(f"Mixed precision paid here: {text}.", "good")


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _beyond_chance(pairs: dict[str, Paired]) -> set[str]:
    """The differences that are established among all of them (Holm 1979): most certain first.

    >>> one, two = Paired(3, 1.0, 0.8, 0.03), Paired(3, 1.0, 0.9, 0.04)
    >>> _beyond_chance({"a": one}), _beyond_chance({"a": one, "b": two})
    ({'a'}, set())
    """
    found = set[str]()
    ranked = sorted(pairs, key=lambda name: pairs[name].chance)
    for left, name in zip(range(len(ranked), 0, -1), ranked, strict=True):
        if not pairs[name].established or pairs[name].chance > (1 - CONFIDENCE) / left:
            break
        found.add(name)
    return found


def _differences(group: Group, uniform: Group, pair: Paired, others: Sequence[Group]) -> Sentence:
    """A method in one line: its differences to uniform widths, with the interval, and to the rest."""
    pairs = {other.method: against for other in others if (against := paired(group, other)) is not None}
    if pair.established:
        verdict = "paid" if pair.mean > 0 else "did not pay"
    else:
        side = "above" if pair.mean > 0 else "below" if pair.mean < 0 else "level with"
        verdict = f"is {side} uniform, which is not established"
    told = [f"uniform {_mark(pair)} ({interval(pair)})"]
    told += [f"{name} {_mark(against)}" for name, against in pairs.items()]
    least = min([pair.mean, *(against.mean for against in pairs.values())])
    sure = all(against.established for against in [pair, *pairs.values()])
    tone = "bad" if least <= 0 else "good" if sure else "plain"
    text = f"{group.method} {verdict}. Against {', '.join(told)}."
    same = same_widths(group, uniform)
    if same:
        text += f" In {same} of {len(group.cells)} runs its widths are uniform's: no difference of widths."
    return Sentence(text, tone)


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


def _unlimited(learned: Sequence[Group], uniform: Group) -> list[Sentence]:
    """Where methods differ from uniform widths in a cost that the budget does not limit."""
    limited = set(uniform.shares())
    sentences = []
    for what, covered, read in (
        ("bit operations", {"bops"}, lambda cell: cell.network.bops),
        ("weights", {"weights", "weight_bits", "size"}, lambda cell: cell.network.weight_bytes),
    ):
        base = uniform.mean(read)
        if not base or covered & limited:
            continue
        used = {group.method: use / base - 1 for group in learned if (use := group.mean(read)) is not None}
        parts = [
            f"{method} {_percent(abs(more))} {'more' if more > 0 else 'less'}"
            for method, more in used.items()
            if abs(more) > APART
        ]
        if parts:
            text = f"Not limited and not equal, {what}: {', '.join(parts)} than uniform."
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
    sentences = []
    if other and comparison.epochs is not None:
        text = f"Not trained for {bits(comparison.epochs)} epochs like the others: {some(other)}."
        sentences.append(Sentence(text, "bad"))
    own = [f"{entry.method} ({entry.finetuning})" for entry in comparison.methods if entry.finetuning]
    if own:
        text = f"Finetuned otherwise than the recipe says: {some(own)}. A difference may come of that."
        sentences.append(Sentence(text, "plain"))
    return sentences


def _caution(comparison: Comparison) -> Sentence:
    if comparison.command == "sweep":
        return Sentence("No baseline ran: `mixbits compare` says whether mixed precision pays.", "plain")
    tests = len(comparison.budgets) * len(comparison.learned) * len(comparison.baselines)
    return Sentence(
        "Differences are points of top-1. Established (*) means: "
        f"the {CONFIDENCE:.0%} interval of the mean difference over {LEAST_SEEDS} seeds "
        "or more leaves out zero; it covers the seeds, not the choice of test images. "
        f"Of {tests} such comparisons one in twenty would leave out zero by chance; that mixed precision "
        "paid is said only of gains over uniform that also stand among all methods of the budget "
        "(Holm's correction).".replace("%", " %"),
        "plain",
    )


def _seeds(n: int) -> str:
    return "one seed" if n == 1 else f"{n} seeds"


def _percent(share: float) -> str:
    return f"{fixed(100 * share, 1)} %"
