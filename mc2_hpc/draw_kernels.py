"""The compiled form of :func:`mc2_hpc.draws.hash_keys`, for Arrow columns.

It is a separate module because importing numba would cost every loader worker time and memory.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mc2_hpc import draws
from mc2_hpc.compiling import compiled

_WORD_STEP, _LENGTH_STEP, _MIX_1, _MIX_2 = (
    np.uint64(value) for value in (draws.WORD_STEP, draws.LENGTH_STEP, draws.MIX_1, draws.MIX_2)
)


def hash_column(column: pa.Array) -> npt.NDArray[np.uint64]:
    """:func:`~mc2_hpc.draws.hash_keys` of a column of strings without nulls, ``(len(column),)``."""
    assert column.null_count == 0
    column = column.cast(pa.large_string())
    if len(column) == 0:
        return np.zeros(0, np.uint64)
    _, offset_buffer, data_buffer = column.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)[column.offset : column.offset + len(column) + 1]
    text = np.frombuffer(data_buffer, np.uint8)[offsets[0] : offsets[-1]] if data_buffer else np.zeros(0, np.uint8)
    data = np.concatenate((text, np.zeros(8, np.uint8)))
    words = np.ndarray(len(data) - 7, "<u8", data, strides=(1,))  # one word starts at every byte
    return _hash_words(words, offsets - offsets[0])


@compiled
def _hash_words(words, offsets):
    hashes = np.empty(len(offsets) - 1, np.uint64)
    for row in range(len(hashes)):
        begin, end = offsets[row], offsets[row + 1]
        total = np.uint64(end - begin) * _LENGTH_STEP
        step = np.uint64(0)
        at = begin
        while True:
            word = words[at]
            padding = 8 - (end - at)
            if padding > 0:
                half = np.uint64(4 * padding)  # a shift by 64 bits is undefined
                word &= (np.uint64(0xFFFFFFFFFFFFFFFF) >> half) >> half
            step += _WORD_STEP
            total += _mix(word + step)
            at += 8
            if at >= end:
                break
        hashes[row] = _mix(total)
    return hashes


@compiled
def _mix(z):
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))
