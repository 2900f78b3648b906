"""Number formats for pages and plot axes."""

import math

from markupsafe import Markup


def grouped(value: float) -> str:
    """``1,234,567``; fractions are rounded."""
    return f"{value:,.0f}"


def percent(share: float, digits: int = 1) -> str:
    """``0.4567`` as ``45.7%``."""
    return f"{share:.{digits}%}"


def short_share(share: float) -> str:
    """A percentage with only as many digits as needed: ``100%``, ``45.7%``, ``0.12%``, ``0.0034%``, ``<0.0001%``."""
    if 0 < share < 5e-7:
        return "<0.0001%"
    digits = 0 if share >= 0.9995 or share == 0 else 1 if share >= 0.01 else 2 if share >= 0.001 else 4
    return f"{share:.{digits}%}"


def short_number(value: float) -> str:
    """``0.25``, ``320``, ``12k``, ``3.4M``, ``10.7B``."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def scientific(value: float) -> Markup:
    """``2.4 x 10^-6`` as HTML; 0 stays ``0``."""
    if value == 0:
        return Markup("0")
    exponent = math.floor(math.log10(abs(value)))
    mantissa = f"{value / 10.0**exponent:.1f}".replace("-", "\N{MINUS SIGN}")
    return Markup("{}·10<sup>{}</sup>").format(mantissa, str(exponent).replace("-", "\N{MINUS SIGN}"))


def duration(seconds: float) -> str:
    """``41 s`` or ``3 min 42 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
