"""Files whose rows hold the images themselves: a Hugging Face ``datasets`` folder (Arrow), and Parquet.

An image is a column of bytes, or of ``{bytes, path}`` as ``datasets`` writes its ``Image`` feature. Only Arrow data is
read; nothing of the ``datasets`` package runs, and no file is unpickled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mc2_hpc.drops import Drop, Dropped
from mc2_hpc.errors import UserError
from mc2_hpc.ingestion.columns import Columns
from mc2_hpc.ingestion.image_files import ImageFolder
from mc2_hpc.ingestion.samples import Sample
from mc2_hpc.ingestion.texts import captions_in
from mc2_hpc.reading.files import check_regular, shown
from mc2_hpc.reading.parquet_file import open_parquet
from mc2_hpc.samples import Caption

_ROWS = 64
"""Rows, with their images, that are in memory at a time."""


@dataclass(frozen=True)
class RowsPart:
    """Consecutive record batches (Arrow) or row groups (Parquet) of a file."""

    file: Path
    begin: int
    end: int
    first_row: int
    """The number of the first row in the whole source."""


def is_image_type(kind: pa.DataType) -> bool:
    """Whether a column of this type holds images: bytes, or a struct with ``bytes``."""
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_bytes(field.type) for field in kind)
    return _is_bytes(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def row_columns(schema: pa.Schema, columns: Columns, where: Path) -> Columns:
    """The columns of a file; an image column that is not named is the only one of its type.

    Raises:
        UserError: none, or several, or a column is missing.
    """
    if not columns.image:
        images = [field.name for field in schema if is_image_type(field.type)]
        if len(images) != 1:
            found = f"columns with images: {', '.join(map(shown, images))}" if images else "no column with images"
            raise UserError(f"{shown(where)}: {found}; name one with --image-column")
        columns = Columns(images[0], columns.captions, columns.lang, columns.key)
    return columns.found_in(schema.names, where)


def cut_rows(files: list[Path], columns: Columns, images_per_shard: int) -> Iterator[RowsPart]:
    """Parts with at least ``images_per_shard`` rows, except for the last of each file.

    Raises:
        UserError: a file cannot be read, or lacks a column.
    """
    first_row = 0
    for file in files:
        begin = rows = 0
        sizes = _sizes(file, columns)
        for number, size in enumerate(sizes, start=1):
            rows += size
            if rows >= images_per_shard or (number == len(sizes) and rows):
                yield RowsPart(file, begin, number, first_row)
                begin, first_row, rows = number, first_row + rows, 0


def _sizes(file: Path, columns: Columns) -> list[int]:
    """The number of rows of each record batch or row group."""
    if file.suffix.lower() == ".parquet":
        with open_parquet(file) as parquet:
            row_columns(parquet.schema_arrow, columns, file)
            return [parquet.metadata.row_group(number).num_rows for number in range(parquet.num_row_groups)]
    with _open_stream(file) as stream:
        row_columns(stream.schema, columns, file)
        return [len(batch) for batch in stream]


@contextmanager
def _open_stream(file: Path) -> Iterator[pa.RecordBatchReader]:
    """An Arrow stream or file, memory-mapped; errors of reading it become UserErrors."""
    check_regular(file)
    try:
        with pa.memory_map(str(file)) as source:
            yield pa.ipc.open_stream(source)
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{shown(file)}: cannot be read as an Arrow stream ({shown(reason)})") from None


def part_samples(part: RowsPart, columns: Columns, folder: ImageFolder) -> Iterator[Sample]:
    """The samples of a part, in order. Adjacent rows with the same key and image are one sample.

    Args:
        folder: of the images that rows name by path alone.

    Raises:
        UserError: the file cannot be read.
    """
    numbered = enumerate(_rows(part, columns), start=part.first_row)
    for (key, _, _), group in groupby(numbered, key=lambda row: _identity(row[0], *row[1])):
        yield _sample(key, [(fields, used) for _, (fields, used) in group], folder)


def _identity(number: int, fields: dict[str, Any], used: Columns) -> tuple[str, bytes | None, str | None]:
    key = fields.get(used.key) if used.key else f"{number:09d}"
    return ("" if key is None else str(key), *_image(fields, used))


def _image(fields: dict[str, Any], used: Columns) -> tuple[bytes | None, str | None]:
    """The bytes and the path of an image; either may be absent."""
    value = fields.get(used.image)
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
        return data if isinstance(data, bytes) else None, path if isinstance(path, str) else None
    return (value, None) if isinstance(value, bytes) else (None, None)


def _sample(key: str, rows: list[tuple[dict[str, Any], Columns]], folder: ImageFolder) -> Sample:
    data, path = _image(*rows[0])

    def image() -> bytes:
        if data is not None:
            return data
        if path is None:
            raise Dropped(Drop.IMAGE_MISSING)
        return folder.read(path)

    def captions() -> list[Caption | Dropped]:
        return [caption for fields, used in rows for caption in captions_in(fields, used)]

    return Sample(key, path or "", image, captions)


def _rows(part: RowsPart, columns: Columns) -> Iterator[tuple[dict[str, Any], Columns]]:
    for batch, used in _batches(part, columns):
        try:
            batch.validate(full=True)  # before a value is read: offsets may point anywhere
        except pa.ArrowInvalid as error:
            raise UserError(f"{shown(part.file)}: damaged ({shown(str(error))})") from None
        for begin in range(0, len(batch), _ROWS):
            for fields in batch.slice(begin, _ROWS).to_pylist():
                yield fields, used


def _batches(part: RowsPart, columns: Columns) -> Iterator[tuple[pa.RecordBatch, Columns]]:
    if part.file.suffix.lower() == ".parquet":
        with open_parquet(part.file) as parquet:
            used = row_columns(parquet.schema_arrow, columns, part.file)
            yield from ((batch, used) for batch in _row_groups(parquet, part, used))
    else:
        with _open_stream(part.file) as stream:
            used = row_columns(stream.schema, columns, part.file)
            for number, batch in enumerate(stream):
                if part.begin <= number < part.end:
                    yield batch.select(used.all()), used


def _row_groups(parquet: pq.ParquetFile, part: RowsPart, used: Columns) -> Iterator[pa.RecordBatch]:
    groups = range(part.begin, part.end)
    return parquet.iter_batches(_ROWS, row_groups=list(groups), columns=used.all())
