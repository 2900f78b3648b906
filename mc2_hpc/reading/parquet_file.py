"""Parquet files: regular, with each expected column exactly once and of the expected type."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mc2_hpc.errors import UserError, first_line
from mc2_hpc.reading.files import check_regular, shown


@dataclass(frozen=True)
class ColumnType:
    """The types that a column may have."""

    name: str
    """As error messages write it."""
    accepts: Callable[[pa.DataType], bool]

    @classmethod
    def exactly(cls, kind: pa.DataType) -> "ColumnType":
        return cls(str(kind), kind.equals)


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type of the values of a dictionary-encoded column."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    kind, types = _plain(kind), pa.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)


def _is_integer(kind: pa.DataType) -> bool:
    return pa.types.is_integer(_plain(kind))


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


ANY = ColumnType("anything", lambda kind: True)
TEXT = ColumnType("string", _is_text)
TEXT_OR_INTEGER = ColumnType("string or a whole number", lambda kind: _is_text(kind) or _is_integer(kind))
INTEGER = ColumnType("a whole number", _is_integer)
TEXTS = ColumnType("a list of strings", lambda kind: _is_list(kind) and _is_text(kind.value_type))
IDS = ColumnType("list<uint32>", lambda kind: _is_list(kind) and pa.types.is_unsigned_integer(kind.value_type))


@contextmanager
def open_parquet(
    path: str | Path,
    required: Mapping[str, ColumnType] | None = None,
    *,
    optional: Mapping[str, ColumnType] | None = None,
    what: str = "",
    **options: Any,
) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file; errors of reading it, inside the ``with`` block too, become UserErrors.

    Args:
        required: columns that must be there; other columns may be anything.
        optional: columns whose types are checked if they are there.
        what: the file should be, for the message about a missing column.
        options: of :class:`pyarrow.parquet.ParquetFile`.

    Raises:
        UserError: not a regular file, not Parquet, or damaged; a column is missing, occurs twice or has another type.
    """
    required, optional = required or {}, optional or {}
    check_regular(path)
    try:
        with pq.ParquetFile(path, **options) as file:
            schema = file.schema_arrow
            missing = [name for name in required if name not in schema.names]
            if missing:
                there = ", ".join(map(shown, schema.names[:20])) or "none"
                said = f"not {what}: " if what else ""
                raise UserError(f"{shown(path)}: {said}no column {missing[0]!r}; its columns are {there}")
            for name, kind in {**required, **optional}.items():
                count = schema.names.count(name)
                if count > 1:
                    raise UserError(f"{shown(path)}: has {count} columns {name!r}; rewrite it with one")
                if count and not kind.accepts(schema.field(name).type):
                    raise UserError(f"{shown(path)}: column {name!r} is {schema.field(name).type}, must be {kind.name}")
            yield file
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{shown(path)}: cannot be read as Parquet ({shown(first_line(error))})") from None
