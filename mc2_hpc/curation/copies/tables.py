"""A search within a Hamming radius as a number of exact look-ups.

Cut a 64-bit hash into ``radius + chosen`` blocks. Two hashes that differ in at most ``radius`` bits differ in at most
``radius`` blocks, so they agree in some ``chosen`` of them. Look-ups of every choice of blocks therefore find every
pair within the radius, and comparing whole hashes removes the others (Manku, Jain, Das Sarma: Detecting near-duplicates
for web crawling, WWW 2007).
"""

from itertools import combinations
from math import comb

import numpy as np
import numpy.typing as npt

BITS = 64
_MOST_TABLES = 2000
_LOOK_UP, _COMPARISON = 100.0, 0.25
"""Nanoseconds to sort a hash into a table, and to compare two hashes of one bucket: only their ratio matters."""


def table_masks(radius: int, num_hashes: int) -> npt.NDArray[np.uint64]:
    """The bits by which each table looks hashes up, ``(tables,)``: the cheapest exact choice for so many hashes.

    Args:
        radius: 0 to 63 bits.
    """
    assert 0 <= radius < BITS
    choices = [chosen for chosen in range(1, BITS - radius + 1) if comb(radius + chosen, chosen) <= _MOST_TABLES]
    best = min(choices, key=lambda chosen: _cost(radius, chosen, num_hashes))
    bounds = [block * BITS // (radius + best) for block in range(radius + best + 1)]
    blocks = [(1 << end) - (1 << begin) for begin, end in zip(bounds[:-1], bounds[1:], strict=True)]
    return np.array([sum(choice) for choice in combinations(blocks, best)], np.uint64)


def _cost(radius: int, chosen: int, num_hashes: int) -> float:
    """Nanoseconds, for evenly distributed hashes."""
    key_bits = chosen * BITS // (radius + chosen)
    bucket = num_hashes / 2.0**key_bits
    return comb(radius + chosen, chosen) * num_hashes * (_LOOK_UP + _COMPARISON * bucket / 2)
