"""Which strings occur for the first time, for more strings than fit in memory."""

import hashlib

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

_DIGEST = 16
_MAX_RUN = 1 << 22
"""Digests in the longest run, 64 MB, so that merging two runs needs little extra memory."""


class Distinct:
    """Strings seen so far, given piece by piece.

    The first piece is kept as it is: most shards have only one, and Arrow compares strings faster than they can be
    hashed. From the second on, 16 bytes per distinct string are kept: 128-bit BLAKE2b digests in sorted runs. While
    runs are short, each is at most half as long as the previous one.
    """

    def __init__(self) -> None:
        self._first: pa.Array | None = None
        self._runs: list[npt.NDArray[np.bytes_]] = []

    def add(self, strings: pa.Array) -> None:
        """Mark ``strings`` (no nulls) as seen."""
        if self._first is None and not self._runs:
            self._first = strings
        else:
            self.is_new(strings)

    def is_new(self, strings: pa.Array) -> npt.NDArray[np.bool_]:
        """Mark ``strings`` (no nulls) as seen; returns which were not seen before, earlier ones included (bool)."""
        if self._first is None and not self._runs:
            self._first = strings
            return _first_occurrences(strings)
        if self._first is not None:
            self._insert(np.unique(_digests(self._first)))
            self._first = None
        digests, first = np.unique(_digests(strings), return_index=True)
        for run in self._runs:
            at = np.minimum(np.searchsorted(run, digests), len(run) - 1)
            unseen = run[at] != digests
            digests, first = digests[unseen], first[unseen]
        self._insert(digests)
        mask = np.zeros(len(strings), bool)
        mask[first] = True
        return mask

    def __len__(self) -> int:
        """The number of distinct strings seen."""
        if self._first is not None:
            return pc.count_distinct(self._first).as_py()
        return sum(len(run) for run in self._runs)

    def _insert(self, run: npt.NDArray[np.bytes_]) -> None:
        """Add a sorted run of digests, none of which is in another run."""
        while self._runs and 2 * len(run) > len(self._runs[-1]) and len(run) + len(self._runs[-1]) <= _MAX_RUN:
            run = np.sort(np.concatenate([self._runs.pop(), run]), kind="stable")
        if len(run):
            self._runs.append(run)


def _first_occurrences(strings: pa.Array) -> npt.NDArray[np.bool_]:
    codes = np.asarray(strings.dictionary_encode().indices, np.int64)
    # Codes are assigned in order of appearance, so a string is new if its code is above all earlier ones.
    return np.diff(np.maximum.accumulate(codes), prepend=-1) > 0


def _digests(strings: pa.Array) -> npt.NDArray[np.bytes_]:
    """128-bit BLAKE2b digests, as fixed-width byte strings."""
    raw = strings.cast(pa.large_binary()).to_pylist()
    return np.frombuffer(b"".join(hashlib.blake2b(value, digest_size=_DIGEST).digest() for value in raw), f"S{_DIGEST}")
