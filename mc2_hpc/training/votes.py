"""Questions that all ranks ask in every step; the answers share an all-reduce that the step needs anyway."""

from typing import NamedTuple

from torch import Tensor


class Votes(NamedTuple):
    """One rank's answers."""

    stop: bool = False
    """Whether it was asked to stop."""
    written: bool = False
    """Whether its part of the save in progress is on disk."""


class VoteCounts(NamedTuple):
    """The number of ranks that said yes to each question of :class:`Votes`."""

    stop: int = 0
    written: int = 0

    @classmethod
    def read(cls, counts: Tensor) -> "VoteCounts":
        """From a step's tensor of counts, one per question; waits for the step."""
        stop, written = counts.tolist()
        return cls(int(stop), int(written))
