"""Widths within a budget: greedily, or exactly where a wider site may use no more of a limit."""

from __future__ import annotations

from collections.abc import Mapping

from mixbits.core.budget import Budget
from mixbits.core.profile import Profile
from mixbits.search import greedy
from mixbits.search.greedy import Choices, Damage, noise_power
from mixbits.search.ilp import least_harm


def fit(
    profile: Profile,
    bits: Mapping[str, int],
    budget: Budget,
    allowed: Choices,
    damage: Damage = noise_power,
    *,
    fill: bool = True,
) -> dict[str, int]:
    """``bits`` rounded to allowed widths that fit; with ``fill``, what is left of the budget widens sites.

    Without limits on latency or on hardware that rounds widths up it is :func:`mixbits.search.greedy.fit`.
    With them, narrowing one site need not help, and the widths are those of least damage; without ``fill``,
    widths beyond ``bits`` do no less damage, and ``bits`` stay as they are if they fit. Raises
    ``InfeasibleError`` if no choice fits.
    """
    if not budget.in_steps:
        return greedy.fit(profile, bits, budget, allowed, damage, fill=fill)
    wish = {
        site: min((w for w in widths if w >= bits[site]), default=widths[-1])
        for site, widths in allowed.widths.items()
    }
    for group in allowed.groups:  # tied sites take the widest wish among them
        wish.update(dict.fromkeys(group, max(wish[site] for site in group)))
    if not fill and budget.fits(profile, wish):
        return wish
    harm = {
        site: {width: damage(site, width if fill else min(width, wish[site])) for width in widths}
        for site, widths in allowed.widths.items()
    }
    return least_harm(profile, budget, allowed, harm)
