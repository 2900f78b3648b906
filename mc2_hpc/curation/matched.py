"""The matched pool on disk (stage 1): caption rows with their language and entries, one Parquet a shard."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mc2_hpc.errors import UserError
from mc2_hpc.storage import atomic_path

_ENTRIES = pa.list_(pa.uint32())
_REPEATING = ["lang", "source"]
_REQUIRED = {"key": pa.string(), "text": pa.string(), "lang": pa.string(), "entries": _ENTRIES}


def matched_table(rows: pa.Table, offsets: npt.NDArray[np.int64], ids: npt.NDArray[np.uint32]) -> pa.Table:
    """``rows`` (``key``, ``text``, ``lang``, optional ``source``) with the entries of each as ``list<uint32>``."""
    entries = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(ids))
    names = [name for name in ("key", "text", "lang", "source") if name in rows.column_names]
    columns = {name: rows[name].cast(pa.string()) for name in names}
    return pa.table({**columns, "entries": entries})


def write_matched(path: Path, table: pa.Table) -> None:
    """Write a shard's rows atomically; the same rows give the same bytes."""
    write_matched_batches(path, [table])


def write_matched_batches(path: Path, tables: Iterable[pa.Table]) -> None:
    """As :func:`write_matched`, the rows given piece by piece, of which one at a time is in memory.

    Args:
        tables: one at least, all of one schema; each becomes a row group, so other pieces give other bytes.
    """
    tables = iter(tables)
    with atomic_path(path) as temporary:
        first = next(tables)
        # Other columns hardly repeat: their dictionaries would only be built to be given up.
        with pq.ParquetWriter(temporary, first.schema, compression="zstd", use_dictionary=_REPEATING) as writer:
            writer.write_table(first)
            for table in tables:
                writer.write_table(table)


def read_matched(path: str | Path, columns: list[str] | None = None) -> pa.Table:
    """Rows of a matched pool's or a training shard's Parquet file, one chunk a column.

    Args:
        columns: those to read; None reads all.

    Raises:
        UserError: cannot be read, or a column is missing or of another type.
    """
    with _open_matched(path) as file:
        return file.read(columns).combine_chunks()


def matched_batches(path: str | Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """As :func:`read_matched`, a row group at a time."""
    with _open_matched(path) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns).combine_chunks()


@contextmanager
def _open_matched(path: str | Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            for name, kind in _REQUIRED.items():
                if name not in schema.names:
                    raise UserError(f"{path}: no column {name!r}; not a matched pool (see `mc2 curate match`)")
                if schema.names.count(name) > 1:
                    raise UserError(f"{path}: {schema.names.count(name)} columns {name!r}; keep one")
                if not schema.field(name).type.equals(kind):
                    raise UserError(f"{path}: column {name!r} is {schema.field(name).type}, must be {kind}")
            yield file
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({str(error).strip().splitlines()[0]})") from None


def entries_of(table: pa.Table) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
    """The ``entries`` column as CSR: offsets int64 ``(rows + 1,)`` from 0, and ids uint32."""
    column = table["entries"].combine_chunks()
    if isinstance(column, pa.ChunkedArray) or len(column) == 0:  # a table without rows may have no chunk
        return np.zeros(1, np.int64), np.zeros(0, np.uint32)
    offsets = np.asarray(column.offsets).astype(np.int64)
    ids = np.asarray(column.values)[offsets[0] : offsets[-1]].astype(np.uint32, copy=False)
    return offsets - offsets[0], ids
