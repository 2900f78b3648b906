"""Rows of the table of what was left out and why: the macro ``reasons`` in ``pages/macros.html``."""

from collections.abc import Mapping
from dataclasses import dataclass

from mc2_hpc.drops import MEANINGS

_MEANINGS: Mapping[str, str] = {str(reason): meaning for reason, meaning in MEANINGS.items()}


@dataclass(frozen=True)
class ReasonRow:
    """A reason for leaving out captions or images."""

    reason: str
    meaning: str
    """Empty for the reasons of a user's own filters."""
    count: int
    share: float
    """Of everything that was read."""
    of_most: float
    """Of the most frequent reason's count."""


def reason_rows(counts: Mapping[str, int], total: int) -> list[ReasonRow]:
    """The reasons that occurred, most frequent first; shares are of ``total``."""
    most = max(counts.values(), default=1)
    return [
        ReasonRow(reason, _MEANINGS.get(reason, ""), count, share=count / max(1, total), of_most=count / most)
        for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if count
    ]
