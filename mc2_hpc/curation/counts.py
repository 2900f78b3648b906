"""Exact entry counts: one vote of an entry a text, uint64, added up over shards in any order."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mc2_hpc.errors import UserError
from mc2_hpc.storage import atomic_path

Sparse = tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint64]]
"""Ids of the entries that were matched, ascending, and their counts."""


def count_votes(ids: npt.NDArray[np.uint32]) -> Sparse:
    """Counts of the entries in ``ids``, the concatenated matches of many texts (each unique within its text)."""
    entries, counts = np.unique(ids, return_counts=True)
    return entries.astype(np.uint32), counts.astype(np.uint64)


def add_votes(total: npt.NDArray[np.uint64], votes: Sparse) -> None:
    """Add a shard's counts to ``total``, uint64 ``(entries,)``, in place.

    Raises:
        UserError: an entry id that ``total`` does not have.
    """
    entries, counts = votes
    if len(entries) and int(entries.max()) >= len(total):
        raise UserError(
            f"entry id {int(entries.max())} was matched but the metadata has {len(total)} entries; "
            "match the pool again with this metadata"
        )
    total[entries] += counts


def write_votes(path: Path, votes: Mapping[str, Sparse]) -> None:
    """Write a shard's counts of every language to one ``.npz``, atomically; equal counts give equal bytes."""
    arrays: dict[str, npt.NDArray] = {}
    for lang in sorted(votes):
        arrays[f"{lang}.entries"], arrays[f"{lang}.counts"] = votes[lang]
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]  # mypy takes the arrays for savez's own options


def read_votes(path: Path) -> dict[str, Sparse]:
    """Read what :func:`write_votes` wrote.

    Raises:
        UserError: missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            langs = sorted(name.removesuffix(".entries") for name in archive.files if name.endswith(".entries"))
            return {lang: (archive[f"{lang}.entries"], archive[f"{lang}.counts"]) for lang in langs}
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged counts ({error}); delete the file and match again") from None
