"""Numbers on the command line, as ``type=`` of an argument; a bad number or one out of range gives one line."""

import math
import re
from argparse import ArgumentTypeError
from collections.abc import Callable

_LONGEST_S = 10**8
"""About three years, which sleeps and sockets still accept."""


def whole(low: int, high: int = 10**12) -> Callable[[str], int]:
    """Reads a whole number from ``low`` to ``high``, in decimal digits."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[-+]?[0-9]{1,18}", text, flags=re.ASCII):
            raise ArgumentTypeError(f"{_brief(text)}: must be a whole number")
        if int(text) < low:
            raise ArgumentTypeError(f"{text}: must be at least {low}")
        if int(text) > high:
            raise ArgumentTypeError(f"{text}: must be at most {high:,}")
        return int(text)

    return read


def seconds(text: str) -> float:
    """Reads a number of seconds above 0."""
    try:
        found = float(text)
    except ValueError:
        raise ArgumentTypeError(f"{_brief(text)}: must be a number of seconds") from None
    if not (math.isfinite(found) and 0 < found <= _LONGEST_S):
        raise ArgumentTypeError(f"{_brief(text)}: must be a number of seconds above 0 and at most {_LONGEST_S:,}")
    return found


def amount(text: str) -> float:
    """Reads a number above 0."""
    try:
        found = float(text)
    except ValueError:
        raise ArgumentTypeError(f"{_brief(text)}: must be a number") from None
    if not (math.isfinite(found) and found > 0):
        raise ArgumentTypeError(f"{_brief(text)}: must be a number above 0")
    return found


def port(text: str) -> int:
    """Reads a TCP port number; 0 means any free port."""
    return whole(0, 65_535)(text)


def _brief(text: str) -> str:
    return repr(text[:40])[1:-1]
