"""Thresholds and probabilities: the recipe's worked example, edge cases, and the tail mass they promise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mc2_hpc.balancing.thresholds import entry_probabilities, mass_to_threshold, threshold_to_mass
from mc2_hpc.errors import UserError

some_counts = st.lists(st.integers(0, 10**6), min_size=1, max_size=50).filter(any)


def counts_of(values: list[int]) -> np.ndarray:
    return np.array(values, np.uint64)


def test_worked_example():
    counts = counts_of([1, 2, 7, 10])
    assert threshold_to_mass(counts, 5) == pytest.approx(0.15)
    assert mass_to_threshold(counts, 0.15) == 2


def test_order_of_entries_does_not_matter():
    assert mass_to_threshold(counts_of([10, 1, 7, 2]), 0.15) == 2


def test_threshold_is_strict_and_mass_inclusive():
    counts = counts_of([5, 5, 10])
    assert threshold_to_mass(counts, 5) == 0 and threshold_to_mass(counts, 6) == 0.5
    assert mass_to_threshold(counts, 0.25) == 5 and mass_to_threshold(counts, 1.0) == 10


def test_entries_never_matched_do_not_pull_the_threshold_to_zero():
    counts = counts_of([0, 0, 0, 3, 4])
    assert mass_to_threshold(counts, 0.0) == 3
    assert entry_probabilities(counts, 3).tolist() == pytest.approx([1, 1, 1, 1, 0.75])


def test_lower_of_two_equally_close_positions():
    assert mass_to_threshold(counts_of([1, 3]), 0.625) == 1


def test_probabilities_are_float32_and_in_range():
    probs = entry_probabilities(counts_of([0, 1, 20_000, 20_001, 2**63]), 20_000)
    assert probs.dtype == np.float32
    assert probs[:3].tolist() == [1, 1, 1] and 0 < probs[4] < probs[3] < 1


def test_counts_beyond_double_precision_are_summed_exactly():
    counts = counts_of([2**53, 1, 1])
    assert threshold_to_mass(counts, 2**53) == 2 / (2**53 + 2)


@pytest.mark.parametrize("counts", [[], [0, 0]])
def test_nothing_matched_is_an_error(counts):
    for call in (lambda: threshold_to_mass(counts_of(counts), 5), lambda: mass_to_threshold(counts_of(counts), 0.1)):
        with pytest.raises(UserError, match="no entry of this language was matched"):
            call()


def test_bad_threshold_and_mass():
    for call in (lambda: threshold_to_mass(counts_of([1]), 0), lambda: entry_probabilities(counts_of([1]), 0)):
        with pytest.raises(UserError, match="t=0: must be at least 1"):
            call()
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="must be in"):
            mass_to_threshold(counts_of([1]), p)


@given(some_counts, st.floats(0, 1))
def test_no_other_position_comes_closer(values, p):
    counts = counts_of(values)
    ascending = sorted(value for value in values if value)
    shares = np.cumsum(ascending) / sum(ascending)
    t = mass_to_threshold(counts, p)
    best = min(abs(share - p) for share in shares)
    at_t = [abs(share - p) for share, value in zip(shares, ascending, strict=True) if value == t]
    assert t >= 1 and min(at_t) == pytest.approx(best, abs=1e-12)


@given(some_counts, st.integers(1, 10**6))
def test_expected_matches_of_an_entry_never_exceed_the_threshold(values, t):
    counts = counts_of(values)
    expected = counts * entry_probabilities(counts, t).astype(np.float64)
    assert (expected <= t * (1 + 1e-6)).all()
    assert (expected[counts <= t] == counts[counts <= t]).all()
