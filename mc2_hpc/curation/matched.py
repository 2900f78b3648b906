"""The matched pool on disk (stage 1): caption rows with their language and entries, one Parquet a shard."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mc2_hpc.errors import UserError
from mc2_hpc.storage import atomic_path

_ENTRIES = pa.list_(pa.uint32())
_REQUIRED = {"key": pa.string(), "text": pa.string(), "lang": pa.string(), "entries": _ENTRIES}


def matched_table(rows: pa.Table, offsets: npt.NDArray[np.int64], ids: npt.NDArray[np.uint32]) -> pa.Table:
    """``rows`` (``key``, ``text``, ``lang``, optional ``source``) with the entries of each as ``list<uint32>``."""
    entries = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(ids))
    names = [name for name in ("key", "text", "lang", "source") if name in rows.column_names]
    columns = {name: rows[name].cast(pa.string()) for name in names}
    return pa.table({**columns, "entries": entries})


def write_matched(path: Path, table: pa.Table) -> None:
    """Write a shard's rows atomically; the same rows give the same bytes."""
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_matched(path: str | Path, columns: list[str] | None = None) -> pa.Table:
    """Rows of a matched pool's or a training shard's Parquet file, one chunk a column.

    Args:
        columns: those to read; None reads all.

    Raises:
        UserError: cannot be read, or a column is missing or of another type.
    """
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            for name, kind in _REQUIRED.items():
                if name not in schema.names:
                    raise UserError(f"{path}: no column {name!r}; not a matched pool (see `mc2 curate match`)")
                if not schema.field(name).type.equals(kind):
                    raise UserError(f"{path}: column {name!r} is {schema.field(name).type}, must be {kind}")
            return file.read(columns).combine_chunks()
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
