"""Multiple-choice knapsack with several limits: one option a class, least harm, solved exactly.

Lagrangian relaxation (Everett 1963) and a list of near-optimal choices: multipliers of the linear relaxation
price the limits; then every option has an excess over the best priced option of its class, and the harm of
any choice that meets the limits is at least the relaxation's bound plus its excesses plus its priced slack.
So the optimum lies among the choices whose excesses add up to little, and the options whose own excess is
more than that drop out at once. Those choices are listed for two halves of the classes apart, and halves are
joined that together meet the limits without leaving much of them (Horowitz and Sahni 1974 did so for one
limit). The threshold grows until a choice is found, which then is an optimum, and proved to be one: nothing
below the threshold was left out.

Costs and limits are integers, and compared as such.
"""

# pyright: basic
# scipy has no types.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import fsum

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog  # pyright: ignore[reportMissingTypeStubs]
from scipy.sparse import csr_array  # pyright: ignore[reportMissingTypeStubs]

Reals = NDArray[np.float64]
Integers = NDArray[np.int64]

SAME = 1e-12  # relative: sums of harm that differ by less are ties, floating-point sums being what they are
FIRST_OPTIONS = 24  # options beside the best of their class that the first threshold lets in
GROWTH = 1.2  # of the threshold: the list grows about fourfold
LONG = 2_000  # a list of more choices is worth pruning
CHANGES = (0.02, 0.04, 0.1)  # of prices, that prune a list
MOST_LISTED = 16_000_000  # numbers in a list, about 0.3 GB
MOST_PAIRS = 200_000_000  # that are looked at for one threshold
MOST_TIES = 1_000  # optima of the same cost, of which the first options are taken
PAIRS_AT_ONCE = 2_000_000
CELLS = 1 << 14  # of a limit's range, so that a pair of cells and a place in a third range fit into 63 bits
SLICES = 24  # of one list by excess, so that pairs of too much excess are not even formed


class TooManyError(Exception):
    """The list of near-optimal choices is too long to be written down."""


@dataclass(frozen=True)
class Options:
    """What a class offers: the harm of each option (n), and what it uses of each limit (n, limits)."""

    harm: Reals
    cost: Integers

    def at(self, keep: Integers | NDArray[np.bool_]) -> Options:
        """Some of the options."""
        return Options(self.harm[keep], self.cost[keep])


@dataclass(frozen=True)
class _Kind:
    """Classes with the same options, and what each has beyond the one of least priced harm (``best``)."""

    classes: list[int]
    options: Options
    best: int
    excess: Reals  # priced harm (n)
    extra: Integers  # cost (n, limits)


@dataclass(frozen=True)
class _List:
    """Choices for some classes, and how each came about: as an extension of another one by one option."""

    excess: Reals
    extra: Integers  # (n, limits)
    entry: Integers  # of each choice, in the three below
    parent: Integers  # entry that was extended; the first entry is the best of every class
    kind: Integers
    option: Integers

    def moves(self, choice: int) -> list[tuple[int, int]]:
        """Kinds and options by which a choice departs from the best."""
        moves: list[tuple[int, int]] = []
        entry = int(self.entry[choice])
        while entry:
            moves.append((int(self.kind[entry]), int(self.option[entry])))
            entry = int(self.parent[entry])
        return moves


def solve(classes: Sequence[Options], limits: Integers) -> list[int]:
    """The option of every class, of least harm in sum with costs in sum within ``limits``.

    Of several optima the one that uses least (sum of shares) of the limits that can be broken, then the first
    options. The options of least cost must fit together. Raises :class:`TooManyError` where the list gets
    too long.

    >>> classes = [Options(np.array([4.0, 1.0]), np.array([[2], [5]]))] * 2
    >>> solve(classes, np.array([7]))
    [0, 1]
    """
    least = np.sum([options.cost.min(0) for options in classes], 0)
    kept = [np.flatnonzero((o.cost - o.cost.min(0) <= limits - least).all(1)) for o in classes]
    small = [options.at(keep) for options, keep in zip(classes, kept, strict=True)]
    binding = np.sum([options.cost.max(0) for options in small], 0) > limits
    small = [Options(options.harm, options.cost[:, binding]) for options in small]
    best = [_undominated(options) for options in small]
    small = [options.at(keep) for options, keep in zip(small, best, strict=True)]
    chosen = _solve(small, limits[binding])
    return [int(a[b[option]]) for a, b, option in zip(kept, best, chosen, strict=True)]


def _undominated(options: Options) -> Integers:
    """Options that no other equals or beats in harm and every cost; of equals the first."""
    columns = [options.harm, *options.cost.T[np.ptp(options.cost, axis=0) > 0]]
    worse = np.ones((len(options.harm),) * 2, np.bool_)  # [i, j]: i is nowhere better than j
    for values in columns:
        worse &= values[:, None] >= values[None, :]
    beaten = worse & (~worse.T | np.tri(len(worse), k=-1, dtype=np.bool_))
    return np.flatnonzero(~beaten.any(1))


def _solve(classes: list[Options], limits: Integers) -> list[int]:
    alike: dict[bytes, list[int]] = {}
    for number, options in enumerate(classes):
        alike.setdefault(options.harm.tobytes() + options.cost.tobytes(), []).append(number)
    members = list(alike.values())
    prices = _prices(
        [classes[numbers[0]] for numbers in members], [len(numbers) for numbers in members], limits
    )
    kinds = [_kind(numbers, classes[numbers[0]], prices) for numbers in members]
    room = limits - sum(
        (len(kind.classes) * kind.options.cost[kind.best] for kind in kinds), np.zeros_like(limits)
    )
    size = fsum(len(kind.classes) * abs(kind.options.harm[kind.best]) for kind in kinds)
    same = SAME * (size + float(limits @ prices))
    excesses = np.sort(np.concatenate([np.delete(kind.excess, kind.best) for kind in kinds]))
    most = float(sum(len(kind.classes) * kind.excess.max() for kind in kinds)) + float(
        np.abs(room - sum(len(k.classes) * np.minimum(k.extra.min(0), 0) for k in kinds)) @ prices
    )
    threshold = float(excesses[min(FIRST_OPTIONS, len(excesses) - 1)]) if len(excesses) else 0.0
    while True:
        found = _within(kinds, room, prices, limits, threshold=threshold, same=same)
        if found is not None:
            return _assign(kinds, found)
        if threshold > most:
            raise AssertionError("the options of least cost do not fit")
        threshold = max(threshold * GROWTH, same, SAME * most)


def _prices(kinds: list[Options], counts: list[int], limits: Integers) -> Reals:
    """Multipliers of the limits in the linear relaxation. Any that are not negative would give a bound."""
    if not len(limits):
        return np.zeros(0)
    scale = max(float(np.abs(options.harm).max()) for options in kinds) or 1.0
    starts = np.cumsum([0, *(len(options.harm) for options in kinds)])
    units = np.maximum(limits.astype(np.float64), 1.0)
    one_each = csr_array((np.ones(starts[-1]), np.arange(starts[-1]), starts), shape=(len(kinds), starts[-1]))
    relaxed = linprog(
        np.concatenate([options.harm for options in kinds]) / scale,
        A_ub=csr_array(np.concatenate([options.cost for options in kinds]).T / units[:, None]),
        b_ub=limits / units,
        A_eq=one_each,
        b_eq=np.array(counts, np.float64),
        method="highs",
    )
    if relaxed.status != 0:
        raise RuntimeError(f"the linear relaxation was not solved: {relaxed.message}")
    return np.maximum(-relaxed.ineqlin.marginals, 0.0) * scale / units


def _kind(numbers: list[int], options: Options, prices: Reals) -> _Kind:
    priced = options.harm + options.cost @ prices
    best = int(priced.argmin())
    extra = options.cost - options.cost[best]
    excess = np.maximum(options.harm - options.harm[best] + extra @ prices, 0.0)
    return _Kind(numbers, options, best, excess, extra)


def _within(
    kinds: list[_Kind], room: Integers, prices: Reals, limits: Integers, *, threshold: float, same: float
) -> list[tuple[int, int]] | None:
    """The best choice whose excess and priced slack add up to at most ``threshold``, or None."""
    inner = [
        (float(np.delete(kind.excess, kind.best).min(initial=np.inf)), number)
        for number, kind in enumerate(kinds)
    ]
    near = [number for excess, number in sorted(inner) if excess <= threshold + same]
    # Little excess last: the list stays short for long.
    search = _Search(kinds, room, prices, threshold + same)
    one = search.listed(near[0::2][::-1], near[1::2])
    two = search.listed(near[1::2][::-1], near[0::2])
    best, looked = threshold, 0
    ties: list[tuple[float, float, int, int]] = []  # value, share of the limits that is left, entries
    for first, second in _pairs(one, two, room, prices, threshold + same):
        looked += len(first)
        if looked > MOST_PAIRS:
            raise TooManyError
        slack = room - one.extra[first] - two.extra[second]
        value = one.excess[first] + two.excess[second] + np.maximum(slack, 0) @ prices
        good = (slack >= 0).all(1) & (value <= best + same)
        if good.any():
            best = min(best, float(value[good].min()))
            share = (slack[good] / np.maximum(limits, 1)).sum(1)
            found = zip(value[good], share, first[good], second[good], strict=True)
            ties += [(float(v), float(left), int(a), int(b)) for v, left, a, b in found]
            ties = [tie for tie in ties if tie[0] <= best + same]
            most = max(tie[1] for tie in ties)
            ties = [tie for tie in ties if tie[1] >= most - SAME][:MOST_TIES]
    if not ties:
        return None
    ends = [one.moves(tie[2]) + two.moves(tie[3]) for tie in ties]
    return min(ends, key=lambda moves: _assign(kinds, moves))


def _assign(kinds: list[_Kind], moves: list[tuple[int, int]]) -> list[int]:
    """Option of every class, the lowest options of classes of a kind first."""
    chosen: dict[int, int] = {}
    for number, kind in enumerate(kinds):
        options = [option for which, option in moves if which == number]
        options += [kind.best] * (len(kind.classes) - len(options))
        chosen.update(zip(kind.classes, sorted(options), strict=True))
    return [chosen[number] for number in range(len(chosen))]


@dataclass(frozen=True)
class _Search:
    """A relaxed problem and how much priced excess is of interest in it."""

    kinds: list[_Kind]
    room: Integers
    prices: Reals
    threshold: float

    def listed(self, numbers: list[int], others: list[int]) -> _List:
        """Every choice for the kinds ``numbers`` that the other kinds may complete within the threshold."""
        excess, extra = np.zeros(1), np.zeros((1, len(self.room)), np.int64)
        entry = np.zeros(1, np.int64)
        store, stored, pruned = [(np.zeros(1, np.int64), -1, -1)], 1, LONG
        for place, number in enumerate(numbers):
            kind = self.kinds[number]
            left = np.full(1, len(kind.classes)).repeat(len(excess))
            for option in np.argsort(-kind.excess, kind="stable"):
                step = float(kind.excess[option])
                if option == kind.best or step > self.threshold:
                    continue
                parts = [(excess, extra, entry, left)]
                while True:  # once more for each class of the kind
                    last = parts[-1]
                    go = np.flatnonzero((last[3] > 0) & (last[0] + step <= self.threshold))
                    if not len(go):
                        break
                    store.append((last[2][go], number, int(option)))
                    entries = np.arange(stored, stored + len(go))
                    parts.append(
                        (last[0][go] + step, last[1][go] + kind.extra[option], entries, last[3][go] - 1)
                    )
                    stored += len(go)
                    if stored * (1 + len(self.room)) > MOST_LISTED:
                        raise TooManyError
                excess, extra, entry, left = (np.concatenate(part) for part in zip(*parts, strict=True))
            if len(excess) > (LONG if place == len(numbers) - 1 else 2 * pruned):
                keep = _cheapest(excess, extra)
                keep = keep[self.completable(excess[keep], extra[keep], numbers[place + 1 :] + others)]
                excess, extra, entry = excess[keep], extra[keep], entry[keep]
                pruned = max(len(excess), LONG)
        return _List(
            excess,
            extra,
            entry,
            np.concatenate([parent for parent, _, _ in store]),
            np.repeat([number for _, number, _ in store], [len(parent) for parent, _, _ in store]),
            np.repeat([option for _, _, option in store], [len(parent) for parent, _, _ in store]),
        )

    def completable(self, excess: Reals, extra: Integers, others: list[int]) -> Integers:
        """Choices that others may complete within the limits, as far as one limit or other prices tell."""
        near = [(self.kinds[number], self.kinds[number].excess <= self.threshold) for number in others]
        room = self.room.copy()
        for kind, some in near:
            room -= len(kind.classes) * kind.extra[some].min(0)
        keep = np.flatnonzero((extra <= room).all(1))
        rows = _widest(extra * self.prices)
        for change in CHANGES:
            signs = np.array([s for s in product((-1.0, 0.0, 1.0), repeat=len(rows)) if any(s)])
            moved = np.zeros((len(self.room), len(signs)))
            moved[rows] = signs.reshape(len(signs), len(rows)).T * self.prices[rows, None] * change
            most = self.threshold + self.room @ moved
            for kind, some in near:
                value = kind.excess[some, None] + kind.extra[some] @ moved
                most -= len(kind.classes) * np.minimum(value.min(0), 0.0)
            for way, limit in zip(moved.T, most, strict=True):
                keep = keep[excess[keep] + extra[keep] @ way <= limit]
        return keep


def _widest(priced: Reals) -> Integers:
    """The limits, three at most, whose priced costs differ most."""
    spread = np.ptp(priced, axis=0)
    return np.array([row for row in np.argsort(-spread, kind="stable")[:3] if spread[row] > 0], np.int64)


def _cheapest(excess: Reals, extra: Integers) -> Integers:
    """Choices without those that cost the same as another of less excess; ascending."""
    hashes = extra @ np.arange(1, 2 * extra.shape[1], 2) ** 19  # wraps around; equal ones are compared below
    order = np.lexsort((excess, hashes))
    again = (hashes[order[1:]] == hashes[order[:-1]]) & (extra[order[1:]] == extra[order[:-1]]).all(1)
    return np.sort(order[np.concatenate([[True], ~again])])


def _pairs(
    one: _List, two: _List, room: Integers, prices: Reals, threshold: float
) -> Iterator[tuple[Integers, Integers]]:
    """Entries of both lists that together may have excess and priced slack of at most ``threshold``."""
    if not len(one.excess) or not len(two.excess):
        return
    order = np.argsort(two.excess, kind="stable")
    priced_one, priced_two = one.extra * prices, two.extra * prices
    target = room * prices
    rows = _widest(priced_two)
    margin = threshold * 1e-6 + 1e-12 * float(np.abs(target).sum() + np.abs(priced_two).max(0).sum())
    for slice_ in np.array_split(order, max(1, min(SLICES, len(order) // 64))):
        part = slice_
        least = float(two.excess[part[0]])
        lefts = np.flatnonzero(one.excess + least <= threshold)
        if not len(lefts):
            break
        reach = threshold - least - one.excess[lefts]
        if not len(rows):
            low, high = np.zeros(len(lefts), np.int64), np.full(len(lefts), len(part))
            yield from _ranges(lefts, part, low, high)
            continue
        fine, cells = rows[0], rows[1:]
        origin = priced_two[part].min(0)
        # At least as wide as what is looked for, so that it lies in two neighbouring cells.
        wide = np.maximum(threshold - least + margin * 4, np.ptp(priced_two[part], axis=0) / CELLS)
        cell_of = np.floor((priced_two[np.ix_(part, cells)] - origin[cells]) / wide[cells]).astype(np.int64)
        sizes = cell_of.max(0, initial=0) + 1 if len(cells) else np.zeros(0, np.int64)
        unit = (float(priced_two[part, fine].max()) - origin[fine]) / 2**30 or 1.0
        key = np.zeros(len(part), np.int64)
        for place in range(len(cells)):
            key = key * sizes[place] + cell_of[:, place]
        key = key * 2**32 + ((priced_two[part, fine] - origin[fine]) / unit).astype(np.int64)
        sort = np.argsort(key, kind="stable")
        key, part = key[sort], part[sort]
        upper = target - priced_one[lefts] - origin  # what the other may use at most, and `reach` below it
        top = np.floor((upper[:, fine] + margin) / unit).clip(-1, 2**31).astype(np.int64)
        bottom = np.floor((upper[:, fine] - reach - margin) / unit).clip(0, 2**31).astype(np.int64)
        firsts = [np.floor((upper[:, c] - reach - margin) / wide[c]).astype(np.int64) for c in cells]
        lasts = [np.floor((upper[:, c] + margin) / wide[c]).astype(np.int64) for c in cells]
        for steps in product(range(2), repeat=len(cells)):
            valid = top >= bottom
            base = np.zeros(len(lefts), np.int64)
            for place, step in enumerate(steps):
                cell = firsts[place] + step
                valid &= (cell >= 0) & (cell < sizes[place]) & (cell <= lasts[place])
                base = base * sizes[place] + cell.clip(0, sizes[place] - 1)
            go = np.flatnonzero(valid)
            low = np.searchsorted(key, base[go] * 2**32 + bottom[go], "left")
            high = np.searchsorted(key, base[go] * 2**32 + top[go], "right")
            yield from _ranges(lefts[go], part, low, high)


def _ranges(
    lefts: Integers, part: Integers, low: Integers, high: Integers
) -> Iterator[tuple[Integers, Integers]]:
    """Every left entry with the entries ``part[low:high]``, a bounded number at once."""
    counts = high - low
    some = counts > 0
    lefts, low, counts = lefts[some], low[some], counts[some]
    ends = np.cumsum(counts)
    begin = 0
    while begin < len(lefts):
        done = int(ends[begin - 1]) if begin else 0
        end = max(int(np.searchsorted(ends, done + PAIRS_AT_ONCE, "right")), begin + 1)
        here = counts[begin:end]
        first = np.repeat(lefts[begin:end], here)
        within = np.arange(len(first)) - np.repeat(np.cumsum(here) - here, here)
        yield first, part[np.repeat(low[begin:end], here) + within]
        begin = end
