"""Numbers as people read them: with a unit, a true minus sign, and no rounding that hides a broken limit."""

from __future__ import annotations

import math
import re

UNKNOWN = "–"
KIB = 1024
LARGER = {"cycle": (1e6, "million cycles"), "fJ": (1e9, "µJ")}  # units that a person reads
LIMITS = {
    "weights": "Weights",
    "weight_bits": "Average weight width",
    "act_bits": "Average activation width",
    "act_max": "Largest activation",
    "act_sum": "Sum of activations",
    "act_peak": "Activation peak",
    "bops": "Bit operations",
    "ms": "Latency",
    "bitfusion_cycles": "Bit Fusion cycles",
    "bitfusion_energy": "Bit Fusion energy",
    "size": "File size",
}


def fixed(value: float | None, digits: int = 2) -> str:
    """A number with a set count of decimals.

    >>> fixed(1234.5, 1), fixed(None)
    ('1,234.5', '–')
    """
    return UNKNOWN if value is None else f"{value:,.{digits}f}".replace("-", "−")


def count(value: float | None) -> str:
    """A whole number.

    >>> count(10000.0)
    '10,000'
    """
    return fixed(value, 0)


def percent(value: float | None) -> str:
    """An accuracy, given in percent.

    >>> percent(91.7)
    '91.70 %'
    """
    return UNKNOWN if value is None else f"{fixed(value)} %"


def points(value: float) -> str:
    """The size of a difference between two accuracies, with more decimals where two would show none.

    >>> points(1.234), points(-1), points(0.004)
    ('1.23 points', '1.00 points', '0.004 points')
    """
    size = abs(value)
    return f"{size:.2f} points" if size >= 0.005 else f"{size:.1g} points"


def share(part: float | None, whole: float | None) -> str:
    """``part`` of ``whole`` in percent; only equal numbers read as 100.0 %.

    >>> share(98.9, 100), share(1, 1), share(100.03, 100), share(999999, 1000000)
    ('98.9 %', '100.0 %', '100.03 %', '99.9999 %')
    """
    if part is None or not whole:
        return UNKNOWN
    value = 100 * part / whole
    digits = 1
    while value != 100 and float(f"{value:.{digits}f}") == 100 and digits < 6:
        digits += 1
    return f"{fixed(value, digits)} %"


def times(value: float) -> str:
    """A ratio.

    >>> times(15.31)
    '15.3 times'
    """
    return f"{value:.1f} times"


def amount(value: float | None, unit: str | None) -> str:
    """A cost in a readable unit.

    >>> amount(900, "bytes"), amount(71782.4, "bytes"), amount(5e8, "bop"), amount(3.25, "bit")
    ('900 bytes', '70.1 KiB', '0.500 GBOP', '3.25 bit')
    >>> amount(0.25591, "ms"), amount(5120, "cycle"), amount(2.5e9, "fJ")
    ('0.2559 ms', '0.00512 million cycles', '2.5 µJ')
    """
    if value is None:
        return UNKNOWN
    if unit in ("byte", "bytes"):
        if value < KIB:
            return "1 byte" if value == 1 else f"{fixed(value, 0 if value == int(value) else 1)} bytes"
        return f"{fixed(value / KIB, 1)} KiB" if value < 10 * KIB**2 else f"{fixed(value / KIB**2, 1)} MiB"
    if unit in ("bop", "bops"):
        return f"{giga(value)} GBOP" if value < 1e10 else f"{fixed(value / 1e9, 1)} GBOP"
    if unit in ("bit", "bits"):
        return f"{value:.2f} bit"
    size, unit = LARGER.get(unit or "", (1, unit))
    return f"{value / size:.4g} {unit or ''}".strip()


def kib(value: float | None) -> str:
    """Bytes as a bare number of KiB.

    >>> kib(1536)
    '1.5'
    """
    return UNKNOWN if value is None else fixed(value / KIB, 1)


def giga(value: float | None) -> str:
    """A bare number of 10^9, with three significant digits or more.

    >>> giga(4.15e10), giga(6.2e8), giga(3.1e5)
    ('41.50', '0.620', '0.000310')
    """
    if value is None:
        return UNKNOWN
    if value >= 1e10:
        return fixed(value / 1e9)
    return fixed(value / 1e9, 3 if value >= 1e8 or not value else 11 - math.floor(math.log10(value)))


def large(value: float) -> str:
    """A big count in words.

    >>> large(40813184), large(2.5e9), large(512)
    ('40.8 million', '2.5 billion', '512')
    """
    if value >= 1e9:
        return f"{value / 1e9:.1f} billion"
    return f"{value / 1e6:.1f} million" if value >= 1e6 else count(value)


def bits(value: float | None) -> str:
    """A width: whole ones bare, learned ones with two decimals.

    >>> bits(4), bits(4.3), bits(None)
    ('4', '4.30', '–')
    """
    if value is None:
        return UNKNOWN
    return f"{value:.0f}" if value == int(value) else f"{value:.2f}"


def duration(value: float | None) -> str:
    """Seconds as a bare number, one decimal below a hundred.

    >>> duration(1234.4), duration(7.25)
    ('1,234', '7.2')
    """
    return UNKNOWN if value is None else fixed(value, 1 if value < 100 else 0)


def limit_name(limit: str) -> str:
    """A limit in plain words, or its own name if it is a new one.

    >>> limit_name("act_max"), limit_name("latency")
    ('Largest activation', 'latency')
    """
    return LIMITS.get(limit, limit)


def unbroken(text: str) -> str:
    r"""``text`` with no line break between a number and its unit.

    >>> unbroken("0.5 KiB of 9 sites, 3 %").split(" ")
    ['0.5\xa0KiB', 'of', '9', 'sites,', '3\xa0%']
    """
    return re.sub(
        r"(?<=\d) (?=%|[KM]iB|GBOP|bytes?|bit|ms|µJ|cycles|points|times|[mb]illion)",
        "\N{NO-BREAK SPACE}",
        text,
    )


def shorten(text: str, most: int) -> str:
    """The last ``most`` characters of a name: its end tells layers apart.

    >>> shorten("features.denseblock4.denselayer32.conv2.weight", 25)
    '…enselayer32.conv2.weight'
    >>> shorten("conv1.weight", 25)
    'conv1.weight'
    """
    return text if len(text) <= most else f"…{text[len(text) - most + 1 :]}"


# How the table of networks prints a quantity.
MEASURES = {"percent": percent, "kib": kib, "decimal": fixed, "giga": giga, "duration": duration}
