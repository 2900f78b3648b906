"""When a run saves, waits for its files and stops: pure decisions, equal on all ranks because their inputs are."""

from dataclasses import dataclass

from mc2_hpc.training.votes import VoteCounts


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """The outcome of a step's votes."""

    stop: bool
    """Some rank was asked to stop, so all do."""
    written: bool
    """All ranks have written their parts of the save in progress."""
    listed: bool = False
    """There are new lines in the takedown list."""


def agreed(counts: VoteCounts, *, world_size: int, voted_in: int, saved_after: int) -> Agreed:
    """
    Args:
        voted_in: the step that these votes are from.
        saved_after: step of the newest save; votes up to that step are about the save before it.
    """
    return Agreed(
        stop=counts.stop > 0,
        written=counts.written == world_size and voted_in > saved_after,
        listed=counts.listed > 0,
    )


@dataclass(frozen=True, kw_only=True)
class SaveActions:
    """What to do after a step, in this order."""

    advance: bool = False
    """Advance the save in progress to its next part."""
    begin: bool = False
    """Save the state after this step."""
    finish: bool = False
    """Wait until it is on disk."""
    must_succeed: bool = False
    """A failed save ends the run: there is no later one to try."""
    leave: bool = False
    """The run stops before its last step."""


@dataclass(frozen=True, kw_only=True)
class SavePolicy:
    """When to save, from the run's settings."""

    every: int
    """Steps between saves."""
    last_step: int
    """Of the run."""
    background: bool
    """Whether training continues while files are written."""
    save_last: bool = True
    """Whether the last step is saved whatever ``every`` is; a run that is asked to stop always saves."""

    def after(self, step: int, votes: Agreed, *, busy: bool) -> SaveActions:
        """What to do after ``step``; ``busy``: a save is in progress."""
        last = step == self.last_step
        ends = votes.stop or last
        return SaveActions(
            advance=busy and votes.written,
            begin=votes.stop or (last and self.save_last) or step % self.every == 0,
            finish=ends or not self.background,
            must_succeed=ends,
            leave=votes.stop and not last,
        )
