"""What all ranks ask one another in every step; the answers ride in an all-reduce that the step does anyway."""

from typing import NamedTuple

from torch import Tensor


class Votes(NamedTuple):
    """One rank's answers."""

    stop: bool = False
    """Whether it was asked to stop."""
    written: bool = False
    """Whether its part of the save under way is on disk."""


class VoteCounts(NamedTuple):
    """How many ranks said yes to each question of :class:`Votes`."""

    stop: int = 0
    written: int = 0

    @classmethod
    def read(cls, counts: Tensor) -> "VoteCounts":
        """From a step's tensor of them, one number per question; waits for the step."""
        stop, written = counts.tolist()
        return cls(int(stop), int(written))
