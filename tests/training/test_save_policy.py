"""When a run saves, waits and stops: only the decisions, without a trainer."""

import pytest

from mc2_hpc.training.save_policy import Agreed, SaveActions, SavePolicy, agreed
from mc2_hpc.training.votes import VoteCounts, Votes

STOP, WRITTEN, NOTHING = (
    Agreed(stop=True, written=False),
    Agreed(stop=False, written=True),
    Agreed(stop=False, written=False),
)
LAST = SaveActions(begin=True, finish=True, must_succeed=True)
CASES = {
    "an ordinary step": (7, NOTHING, False, SaveActions()),
    "a save is due": (10, NOTHING, False, SaveActions(begin=True)),
    "a save is due while one is in progress": (10, NOTHING, True, SaveActions(begin=True)),
    "all have written": (7, WRITTEN, True, SaveActions(advance=True)),
    "all have written, and the next is due": (10, WRITTEN, True, SaveActions(advance=True, begin=True)),
    "all have written, but no save is in progress": (7, WRITTEN, False, SaveActions()),
    "asked to stop": (7, STOP, False, SaveActions(begin=True, finish=True, must_succeed=True, leave=True)),
    "the last step": (25, NOTHING, False, LAST),
    "asked to stop in the last step": (25, STOP, False, LAST),
}


@pytest.mark.parametrize("step, votes, busy, expected", CASES.values(), ids=CASES)
def test_actions_after_a_step(step, votes, busy, expected):
    policy = SavePolicy(every=10, last_step=25, background=True)
    assert policy.after(step, votes, busy=busy) == expected


def test_in_the_foreground_every_save_is_waited_for():
    policy = SavePolicy(every=10, last_step=25, background=False)
    assert policy.after(10, NOTHING, busy=False) == SaveActions(begin=True, finish=True)


@pytest.mark.parametrize("votes, begins", [(NOTHING, False), (STOP, True)])
def test_the_last_step_may_be_left_unsaved_unless_asked_to_stop(votes, begins):
    policy = SavePolicy(every=10, last_step=25, background=True, save_last=False)
    assert policy.after(25, votes, busy=False) == SaveActions(begin=begins, finish=True, must_succeed=True)
    assert policy.after(10, NOTHING, busy=False) == SaveActions(begin=True)


@pytest.mark.parametrize(
    "counts, voted_in, expected",
    [
        (VoteCounts(stop=0, written=3), 11, WRITTEN),
        (VoteCounts(stop=0, written=3), 10, NOTHING),  # about the save before that of step 10
        (VoteCounts(stop=0, written=2), 11, NOTHING),
        (VoteCounts(stop=1, written=0), 11, STOP),
        (VoteCounts(listed=1), 11, Agreed(stop=False, written=False, listed=True)),
    ],
)
def test_votes_of_three_ranks(counts, voted_in, expected):
    assert agreed(counts, world_size=3, voted_in=voted_in, saved_after=10) == expected


def test_counts_are_read_by_name():
    assert Votes._fields == VoteCounts._fields
    assert VoteCounts.of([1.0, 2.0, 3.0]) == VoteCounts(stop=1, written=2, listed=3)
    for counts in ([1.0, 2.0], [0.5, 1.0, 2.0, 3.0]):  # of a step that also has, or lacks, a divergence
        with pytest.raises(ValueError, match="values to unpack"):
            VoteCounts.of(counts)
