"""Questions that all ranks ask in every step; the answers share an all-reduce that the step needs anyway."""

from collections.abc import Sequence
from typing import NamedTuple


class Votes(NamedTuple):
    """One rank's answers."""

    stop: bool = False
    """Whether it was asked to stop."""
    written: bool = False
    """Whether its part of the save in progress is on disk."""
    listed: bool = False
    """Whether it has seen new lines in the takedown list."""


class VoteCounts(NamedTuple):
    """The number of ranks that said yes to each question of :class:`Votes`."""

    stop: int = 0
    written: int = 0
    listed: int = 0

    @classmethod
    def of(cls, counts: Sequence[float]) -> "VoteCounts":
        """From the counts of a step, one per question."""
        stop, written, listed = map(int, counts)
        return cls(stop, written, listed)
