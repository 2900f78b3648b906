"""Exact entry counts: one vote per entry and text, uint64, summed over shards as a tree.

A file holds the sparse counts of every language. Files are merged language by language, so that only one language is
in memory, and :data:`FAN_IN` at a time, so that no process opens the files of all shards. Integer addition does not
depend on order, so counts and bytes are the same whatever the tree.
"""

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from mc2_hpc.errors import UserError
from mc2_hpc.reading.arrays import open_npz
from mc2_hpc.storage import atomic_path

FAN_IN = 100
"""Files that are merged into one: three levels for a million shards."""
_CURE = "damaged counts: delete the file and match again"
_DENSE = 8
"""Up to this many entries per match, counting in an array is faster."""

Sparse = tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint64]]
"""Ids of the matched entries, ascending, and their counts."""


def count_votes(ids: npt.NDArray[np.uint32]) -> Sparse:
    """Counts of the entries in ``ids``, the concatenated matches of many texts (unique within each text)."""
    if len(ids) and int(ids.max()) < _DENSE * len(ids):  # an array of all entries beats sorting the matches
        dense_counts = np.bincount(ids)
        entries = np.flatnonzero(dense_counts)
        counts = dense_counts[entries]
    else:
        entries, counts = np.unique(ids, return_counts=True)
    return entries.astype(np.uint32), counts.astype(np.uint64)


def add_sparse(votes: Sequence[Sparse]) -> Sparse:
    """The sum of the counts; at least one is needed."""
    if len(votes) == 1:
        return votes[0]
    entries = np.concatenate([ids for ids, _ in votes])
    counts = np.concatenate([numbers for _, numbers in votes])
    order = np.argsort(entries, kind="stable")
    entries, counts = entries[order], counts[order]
    starts = np.flatnonzero(np.diff(entries, prepend=entries[:1] ^ 1))
    return entries[starts], np.add.reduceat(counts, starts) if len(starts) else counts


def dense(votes: Sparse, num_entries: int) -> npt.NDArray[np.uint64]:
    """The counts of all entries of a language, uint64 ``(num_entries,)``.

    Raises:
        UserError: an entry id is beyond the language's entries.
    """
    entries, counts = votes
    if len(entries) and int(entries[-1]) >= num_entries:
        raise UserError(
            f"entry id {int(entries[-1])} was matched but the metadata has {num_entries} entries; "
            "match the pool again with this metadata"
        )
    total = np.zeros(num_entries, np.uint64)
    total[entries] = counts
    return total


def write_votes(path: Path, votes: Mapping[str, Sparse]) -> None:
    """Write the counts of every language to one ``.npz``, atomically; equal counts give equal bytes."""
    _write(path, ((lang, votes[lang]) for lang in sorted(votes)))


def merge_votes(paths: Sequence[Path], merged: Path) -> None:
    """Write the sum of the counts in ``paths`` to ``merged``, atomically, one language in memory at a time.

    Raises:
        UserError: a file is missing or damaged; the message names it.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(VotesFile(path)) for path in paths]
        langs = sorted({lang for file in files for lang in file.langs})
        _write(merged, ((lang, add_sparse([file[lang] for file in files if lang in file.langs])) for lang in langs))


def _write(path: Path, votes: Iterator[tuple[str, Sparse]]) -> None:
    # Same format as np.savez, which would hold all arrays in memory; members carry no timestamp.
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for lang, (entries, counts) in votes:
            for name, array in ((f"{lang}.entries", entries), (f"{lang}.counts", counts)):
                with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                    np.lib.format.write_array(stream, array, allow_pickle=False)


class VotesFile:
    """A file of counts, read language by language: ``with VotesFile(path) as file: file["en"]``.

    Raises:
        UserError: it is missing or damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self._stack = ExitStack()
        self._arrays = self._stack.enter_context(open_npz(path, cure=_CURE))
        suffix = ".entries"
        self.langs = {name.removesuffix(suffix) for name in self._arrays.names if name.endswith(suffix)}

    def __getitem__(self, lang: str) -> Sparse:
        entries = self._arrays.read(f"{lang}.entries", np.uint32)
        return entries, self._arrays.read(f"{lang}.counts", np.uint64, length=len(entries))

    def __enter__(self) -> "VotesFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


def merge_tree(leaves: Sequence[Path], folder: Path) -> list[dict[str, tuple[Path, ...]]]:
    """The tree that merges ``leaves`` into one file: for each level, the files to write below ``folder``, by name, and
    the files that each one sums. The last level has one file, the root.
    """
    levels: list[dict[str, tuple[Path, ...]]] = []
    files = list(leaves)
    while not levels or len(files) > 1:
        groups = [tuple(files[start : start + FAN_IN]) for start in range(0, len(files), FAN_IN)]
        level = {f"{len(levels) + 1}-{number:05d}": group for number, group in enumerate(groups)}
        levels.append(level)
        files = [merged_path(folder, name) for name in level]
    return levels


def merged_path(folder: Path, name: str) -> Path:
    """The file of a node of :func:`merge_tree`."""
    return folder / f"{name}.npz"
