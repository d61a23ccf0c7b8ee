"""Greedy widths: bring a choice of widths into its budget, then spend what is left of it.

The damage of a width is taken as the power of its rounding noise relative to the signal, ``4**-bits`` for
every site (a step twice as wide has four times the noise power), unless the caller knows better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mixbits.core.budget import Budget, format_amount
from mixbits.core.profile import Profile, unknown_site

Damage = Callable[[str, int], float]
SMALLEST_CHANGE = 1e-30  # of damage: a site whose widths all do the same damage must not divide by zero


class InfeasibleError(ValueError):
    """No choice of candidates meets the budget."""


def noise_power(site: str, bits: float) -> float:
    """``4**-bits``."""
    return 4.0**-bits


@dataclass(frozen=True)
class Choices:
    """What may be chosen: widths of every site in rising order, and groups of sites that share one width."""

    widths: Mapping[str, tuple[int, ...]]
    groups: tuple[tuple[str, ...], ...]

    def at(self, lowest: bool) -> dict[str, int]:
        """Every site at its lowest (or highest) width."""
        return {site: widths[0 if lowest else -1] for site, widths in self.widths.items()}


def choices(
    profile: Profile,
    weights: Sequence[int],
    activations: Sequence[int],
    *,
    ties: Sequence[Sequence[str]] = (),
    pins: Mapping[str, int] | None = None,
) -> Choices:
    """Candidates of every site after pins and ties; raises ``ValueError`` for unknown sites and conflicts."""
    names = [site.name for site in profile.sites]
    for name in [*(pins or {}), *(name for tie in ties for name in tie)]:
        if name not in names:
            raise unknown_site(name, names)
    widths = {
        site.name: tuple(sorted(set(weights if site.kind == "weight" else activations)))
        for site in profile.sites
    }
    widths.update({site: (bits,) for site, bits in (pins or {}).items()})
    tied = {name for tie in ties for name in tie}
    groups = _joined(ties) + [(name,) for name in names if name not in tied]
    for group in groups:
        common = tuple(bits for bits in widths[group[0]] if all(bits in widths[name] for name in group))
        if not common:
            raise ValueError(
                f"the tied sites {', '.join(group)} have no width in common; check pins and candidates"
            )
        widths.update(dict.fromkeys(group, common))
    return Choices(widths, tuple(groups))


def _joined(ties: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """The ties as groups without a common site: ties that share one are one group."""
    groups: list[dict[str, None]] = []
    for tie in ties:
        group = dict.fromkeys(tie)
        for other in [other for other in groups if other.keys() & group.keys()]:
            groups.remove(other)
            group = other | group
        if group:
            groups.append(group)
    return [tuple(group) for group in groups]


def check_feasible(profile: Profile, budget: Budget, allowed: Choices) -> None:
    """Raise ``InfeasibleError`` with the smallest and largest reachable values unless some choice fits."""
    lowest, highest = allowed.at(lowest=True), allowed.at(lowest=False)
    broken = budget.exceeded(profile, lowest)
    if broken:
        lines: list[str] = []
        for limit in broken:
            least, most = limit.used(profile, lowest), limit.used(profile, highest)
            reachable = [format_amount(limit.cost, amount) for amount in (least, most, least - limit.asked)]
            lines.append(
                f"  {limit.text}: reachable are {reachable[0]} to {reachable[1]}; "
                f"at least {reachable[0]}, which is {reachable[2]} above"
            )
        raise InfeasibleError(
            "the budget cannot be met with these candidates and pins:\n" + "\n".join(lines) + "\n"
            "  Ask for more, allow narrower candidates, or drop a pin."
        )


def fit(
    profile: Profile,
    bits: Mapping[str, int],
    budget: Budget,
    allowed: Choices,
    damage: Damage = noise_power,
    *,
    fill: bool = True,
) -> dict[str, int]:
    """``bits`` rounded to allowed widths, narrowed into the budget, then (``fill``) widened while it holds.

    Each step takes the move of least damage for the excess it removes (or of most good for the budget it
    spends).
    """
    check_feasible(profile, budget, allowed)
    capped = _capped(profile, budget, allowed)
    now = {
        site: min((w for w in widths if w >= bits[site]), default=widths[-1])
        for site, widths in capped.widths.items()
    }
    for group in capped.groups:  # tied sites take the widest wish among them
        now.update(dict.fromkeys(group, max(now[site] for site in group)))
    while budget.exceeded(profile, now):
        now = _best_move(profile, now, budget, capped, damage, down=True) or allowed.at(lowest=True)
    while fill:
        wider = _best_move(profile, now, budget, capped, damage, down=False)
        if wider is None:
            break
        now = wider
    return now


def _capped(profile: Profile, budget: Budget, allowed: Choices) -> Choices:
    """Drop widths that break a limit even when every other site is at its narrowest."""
    lowest, widths = allowed.at(lowest=True), dict(allowed.widths)
    for group in allowed.groups:
        fits = tuple(
            w for w in widths[group[0]] if budget.fits(profile, {**lowest, **dict.fromkeys(group, w)})
        )
        widths.update(dict.fromkeys(group, fits))
    return Choices(widths, allowed.groups)


def _best_move(
    profile: Profile, now: dict[str, int], budget: Budget, allowed: Choices, damage: Damage, *, down: bool
) -> dict[str, int] | None:
    """The best narrowing (widening) of one group by one candidate, or None if there is none."""
    used_now = {limit: limit.used(profile, now) / limit.asked for limit in budget.limits}
    best, best_value = None, -1.0
    for group in allowed.groups:
        widths = allowed.widths[group[0]]
        place = widths.index(now[group[0]]) + (-1 if down else 1)
        if not 0 <= place < len(widths):
            continue
        moved = {**now, **dict.fromkeys(group, widths[place])}
        if not down and not budget.fits(profile, moved):
            continue
        change = sum(damage(site, moved[site]) - damage(site, now[site]) for site in group)
        change = max(abs(change), SMALLEST_CHANGE)
        used = {limit: limit.used(profile, moved) / limit.asked for limit in budget.limits}
        if down:
            freed = sum(used_now[limit] - max(used[limit], 1.0) for limit in used if used_now[limit] > 1.0)
            # The small term picks the least damage when no single move frees anything.
            value = (freed + 1e-9) / change
        else:
            value = change / (sum(used[limit] - used_now[limit] for limit in used) + 1e-9)
        if value > best_value:
            best, best_value = moved, value
    return best
