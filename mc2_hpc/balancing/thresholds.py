"""Thresholds and keep probabilities of head/tail balancing (Meta CLIP 2, algorithm 1). Arrays only.

An entry counted ``c`` times is kept with probability ``t / max(c, t)``: entries below the threshold ``t`` are the tail
and always kept; those above are the head and are reduced to about ``t`` texts. English's threshold ``t_en`` is set
manually. Every other language gets the threshold that leaves the same share ``p`` of its match mass in the tail.
"""

import numpy as np
import numpy.typing as npt

from mc2_hpc.errors import UserError

Counts = npt.NDArray[np.uint64]

RECIPE_TAIL_MASS = 0.06
"""The share of English matches in the tail of the recipe's pools, where t_en is 20,000 or 170,000 (section 3.3)."""


def threshold_to_mass(counts: Counts, t: int) -> float:
    """Share of all matches that belong to entries counted fewer than ``t`` times: ``sum(c[c < t]) / sum(c)``.

    Args:
        counts: matches of each entry, unsigned integers.

    Raises:
        UserError: ``t`` is below 1, or nothing was matched.
    """
    check_threshold(t)
    total = _total(counts)
    return int(counts[counts < t].sum(dtype=np.uint64)) / total


def mass_to_threshold(counts: Counts, p: float) -> int:
    """The count at which the cumulative share of matches, entries sorted by count, comes closest to ``p``.

    This is the recipe's rule, over entries with at least one match, so the result is at least 1. It is inclusive
    whereas :func:`threshold_to_mass` is strict, so the two are not exact inverses: counts [1, 2, 7, 10] and t = 5 give
    p = 0.15, and p = 0.15 gives t = 2. If two positions are equally close, the lower wins.

    Raises:
        UserError: ``p`` is outside [0, 1], or nothing was matched.
    """
    if not 0 <= p <= 1:
        raise UserError(f"tail mass p={p}: must be in [0, 1]")
    total = _total(counts)
    ascending = np.sort(counts[counts > 0])
    share = np.cumsum(ascending, dtype=np.uint64) / total
    return int(ascending[np.argmin(np.abs(share - p))])


def proposed_threshold(counts: Counts, p: float = RECIPE_TAIL_MASS) -> int:
    """The English threshold that leaves about the share ``p`` of the matches in the tail, whatever the pool's size.

    In a pool where most entries matched once, no threshold leaves so little, and the result is 1.

    Raises:
        UserError: ``p`` is outside [0, 1], or nothing was matched.
    """
    if not 0 <= p <= 1:
        raise UserError(f"tail mass p={p}: must be in [0, 1]")
    total = _total(counts)
    values, numbers = np.unique(counts[counts > 0], return_counts=True)
    mass = values * numbers.astype(np.uint64)
    below = (np.cumsum(mass, dtype=np.uint64) - mass) / total  # of entries counted fewer times than each value
    return int(values[np.argmin(np.abs(below - p))])


def entry_probabilities(counts: Counts, t: int) -> npt.NDArray[np.float32]:
    """``t / max(count, t)`` of each entry, float32 in (0, 1]; entries never matched have 1.

    Raises:
        UserError: ``t`` is below 1.
    """
    check_threshold(t)
    return (float(t) / np.maximum(counts.astype(np.float64), float(t))).astype(np.float32)


def check_threshold(t: int) -> None:
    if t < 1:
        raise UserError(f"threshold t={t}: must be at least 1, otherwise every matched entry would have probability 0")


def _total(counts: Counts) -> int:
    total = int(counts.sum(dtype=np.uint64))
    if total == 0:
        raise UserError("no entry of this language was matched, so it has no threshold; leave the language out")
    return total
