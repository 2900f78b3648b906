"""The matched pool on disk (stage 1): caption rows with their language and entries, one Parquet file per shard.

The folder also has each shard's counts, each language's matcher tables, and ``match.json``, which says how it was made.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mc2_hpc.curation.filtering.record import RecordedFilter
from mc2_hpc.errors import UserError
from mc2_hpc.jobs import STATS, has_outputs
from mc2_hpc.reading.files import shown
from mc2_hpc.reading.json_file import Count, File, Sha256, read_fields
from mc2_hpc.reading.parquet_file import ColumnType, open_parquet
from mc2_hpc.storage import atomic_path

SETTINGS = "match.json"
MERGED = "merged"
"""Folder of counts summed over shards, written by balancing."""
OUTPUTS = ("{shard}.parquet", "counts/{shard}.npz", STATS)
"""Files of a matched shard."""


class _Sampled(File):
    """What a sample of a matched pool was drawn with."""

    seed: Count
    epoch: Count
    balance: Sha256


class _Filter(File):
    name: str
    arguments: dict[str, Any] | None = None


class MatchSettings(File, omit_defaults=True):
    """``match.json``."""

    mode: Literal["fixed", "compat"]
    metadata: dict[str, Sha256]
    language_id: str
    shards: list[str]
    matching_rules: Count | None = None
    filters: list[_Filter] | None = None
    filter_sources: list[dict[str, str]] | None = None
    """Digests of the files that each filter reads."""
    pool_filters: list[RecordedFilter] | None = None
    """Of the pool, if ``mc2 curate filter`` wrote it."""
    sample: _Sampled | None = None


class _LanguageStats(File):
    texts: Count
    images: Count
    matches: Count


class MatchStats(File):
    """``stats/<shard>.json`` of a matched pool."""

    rows: Count
    matched: Count
    images: Count
    drops: dict[str, Count]
    captions: dict[str, Count]
    languages: dict[str, _LanguageStats]
    unknown_languages: dict[str, Count] = {}


_ENTRIES = pa.list_(pa.uint32())
_REPEATING = ["lang", "source"]
_STRING = ColumnType.exactly(pa.string())
_REQUIRED = {"key": _STRING, "text": _STRING, "lang": _STRING, "entries": ColumnType.exactly(_ENTRIES)}


def tables_folder(out: Path, lang: str) -> Path:
    """Where a matched pool keeps the matcher tables of a language."""
    return out / "matchers" / lang


def counts_path(out: Path, shard: str) -> Path:
    """The counts of one shard."""
    return out / "counts" / f"{shard}.npz"


def is_matched(out: Path, shard: str) -> bool:
    """Whether all outputs of the shard exist."""
    return has_outputs(out, OUTPUTS, shard)


def read_settings(matched: Path) -> dict[str, Any]:
    """Settings and shards of a matched pool with every shard finished.

    Raises:
        UserError: not a matched pool, or matching is not finished.
    """
    settings = planned_settings(matched)
    missing = [name for name in settings["shards"] if not is_matched(matched, name)]
    if missing:
        raise UserError(
            f"{matched}: {len(missing)} of {len(settings['shards'])} shards are not matched yet (the first is "
            f"{missing[0]!r}); run the same `mc2 curate match` again"
        )
    return settings


def planned_settings(matched: Path) -> dict[str, Any]:
    """Like :func:`read_settings`, but some shards may not be matched yet."""
    if not (matched / SETTINGS).is_file():
        raise UserError(f"{matched}: not a matched pool (no {SETTINGS}); run `mc2 curate match` first")
    return read_fields(matched / SETTINGS, MatchSettings, cure="run `mc2 curate match` into another folder")


def matched_table(rows: pa.Table, offsets: npt.NDArray[np.int64], ids: npt.NDArray[np.uint32]) -> pa.Table:
    """``rows`` (``key``, ``text``, ``lang``, optional ``source``) with each row's entries as ``list<uint32>``."""
    entries = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(ids))
    names = [name for name in ("key", "text", "lang", "source") if name in rows.column_names]
    columns = {name: rows[name].cast(pa.string()) for name in names}
    return pa.table({**columns, "entries": entries})


def write_matched(path: Path, table: pa.Table) -> None:
    """Write a shard's rows atomically; the same rows give the same bytes."""
    write_matched_batches(path, [table])


def write_matched_batches(path: Path, tables: Iterable[pa.Table]) -> None:
    """Like :func:`write_matched`, for rows given piece by piece, with one piece in memory at a time.

    Args:
        tables: at least one, all with one schema; each becomes a row group, so the bytes depend on the pieces.
    """
    tables = iter(tables)
    with atomic_path(path) as temporary:
        first = next(tables)
        # Other columns hardly repeat, so their dictionaries would be built only to be abandoned.
        with pq.ParquetWriter(temporary, first.schema, compression="zstd", use_dictionary=_REPEATING) as writer:
            writer.write_table(first)
            for table in tables:
                writer.write_table(table)


def read_matched(path: str | Path, columns: list[str] | None = None) -> pa.Table:
    """Rows of a matched pool's or a training shard's Parquet file, one chunk per column.

    Args:
        columns: to read; None reads all.

    Raises:
        UserError: the file cannot be read, a column is missing or has another type, or a value is missing.
    """
    with _open_matched(path) as file:
        return _without_nulls(path, file.read(columns).combine_chunks())


def matched_batches(path: str | Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Like :func:`read_matched`, one row group at a time."""
    with _open_matched(path) as file:
        for group in range(file.num_row_groups):
            yield _without_nulls(path, file.read_row_group(group, columns).combine_chunks())


def _open_matched(path: str | Path) -> AbstractContextManager[pq.ParquetFile]:
    return open_parquet(path, _REQUIRED, what="a part of a matched pool (see `mc2 curate match`)")


def _without_nulls(path: str | Path, table: pa.Table) -> pa.Table:
    for name in set(table.column_names) & _REQUIRED.keys():
        column = table[name]
        missing = column.null_count
        if name == "entries":
            missing += sum(chunk.flatten().null_count for chunk in column.chunks)
        if missing:
            raise UserError(
                f"{shown(path)}: nulls in column {name!r}: {missing}, but matching writes none; delete it and run "
                "`mc2 curate match` again"
            )
    return table


def entries_of(table: pa.Table) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
    """The ``entries`` column as CSR: offsets int64 ``(rows + 1,)`` from 0, and ids uint32."""
    column = table["entries"].combine_chunks()
    if isinstance(column, pa.ChunkedArray) or len(column) == 0:  # a table without rows may have no chunk
        return np.zeros(1, np.int64), np.zeros(0, np.uint32)
    offsets = np.asarray(column.offsets).astype(np.int64)
    ids = np.asarray(column.values)[offsets[0] : offsets[-1]].astype(np.uint32, copy=False)
    return offsets - offsets[0], ids


def rows_by_language(rows: pa.Table) -> list[tuple[str, npt.NDArray[np.int64]]]:
    """Row numbers of each language in ``rows["lang"]`` (no nulls), languages and rows ascending."""
    encoded = rows["lang"].combine_chunks().dictionary_encode()
    codes = np.asarray(encoded.indices, np.int64)
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(len(encoded.dictionary) + 1))
    names = encoded.dictionary.to_pylist()
    return sorted((name, order[bounds[code] : bounds[code + 1]]) for code, name in enumerate(names))
