"""Ragged rows as two arrays: row ``i`` has ``values[offsets[i]:offsets[i + 1]]``.

Offsets may start above 0, as in a slice.
"""

import numpy as np
import numpy.typing as npt


def take(
    offsets: npt.NDArray[np.integer], values: npt.NDArray, rows: npt.NDArray[np.integer]
) -> tuple[npt.NDArray[np.int64], npt.NDArray]:
    """The given rows, in the given order, as new offsets (int64, from 0) and values."""
    starts = np.asarray(offsets[:-1], np.int64)[rows]
    lengths = np.asarray(offsets[1:], np.int64)[rows] - starts
    taken = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(lengths, out=taken[1:])
    positions = np.arange(taken[-1]) + np.repeat(starts - taken[:-1], lengths)
    return taken, values[positions]
