"""Files whose rows hold the images themselves: a Hugging Face ``datasets`` folder (Arrow), and Parquet.

An image is a column of bytes, or of ``{bytes, path}`` as ``datasets`` writes its ``Image`` feature. Only Arrow data is
read; nothing of the ``datasets`` package runs, and no file is unpickled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mc2_hpc.drops import Drop, Dropped
from mc2_hpc.errors import UserError, first_line
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
    """Consecutive rows of a file: the samples that begin in one of them."""

    file: Path
    begin: int
    end: int
    first_row: int
    """The number of the row ``begin`` in the whole source."""


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
    """Parts of ``images_per_shard`` rows; the last of each file may have fewer.

    Raises:
        UserError: a file cannot be read, or lacks a column.
    """
    first_row = 0
    for file in files:
        num_rows = _num_rows(file, columns)
        for begin in range(0, num_rows, images_per_shard):
            yield RowsPart(file, begin, min(begin + images_per_shard, num_rows), first_row + begin)
        first_row += num_rows


def _num_rows(file: Path, columns: Columns) -> int:
    if file.suffix.lower() == ".parquet":
        with open_parquet(file) as parquet:
            row_columns(parquet.schema_arrow, columns, file)
            return parquet.metadata.num_rows
    with _open_stream(file) as stream:
        row_columns(stream.schema, columns, file)
        return sum(len(batch) for batch in stream)


@contextmanager
def _open_stream(file: Path) -> Iterator[pa.RecordBatchReader]:
    """An Arrow stream or file, memory-mapped; errors of reading it become UserErrors."""
    check_regular(file)
    try:
        with pa.memory_map(str(file)) as source:
            yield pa.ipc.open_stream(source)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{shown(file)}: cannot be read as an Arrow stream ({shown(first_line(error))})") from None


def part_samples(part: RowsPart, columns: Columns, folder: ImageFolder) -> Iterator[Sample]:
    """The samples that begin in a part, in order. Adjacent rows with the same key and image are one sample, also where
    the part ends between them.

    Args:
        folder: of the images that rows name by path alone.

    Raises:
        UserError: the file cannot be read.
    """
    begin = max(0, part.begin - 1)  # the row before tells whether the first sample began there
    numbered = enumerate(_rows(part.file, begin, columns), start=part.first_row - part.begin + begin)
    for (key, _), group in groupby(numbered, key=lambda row: _identity(row[0], *row[1])):
        first, row = next(group)
        if first >= part.first_row + part.end - part.begin:
            return
        if first >= part.first_row:
            # Of the other rows only the captions: each has the image again.
            captions = [*captions_in(*row), *(caption for _, more in group for caption in captions_in(*more))]
            yield _sample(key, _image(*row), captions, folder)


def _identity(number: int, fields: dict[str, Any], used: Columns) -> tuple[str, bytes | str | None]:
    """The key and the image of a row: its bytes or, if it has none, its path. Beside bytes, a path is only a name that
    the image once had."""
    key = fields.get(used.key) if used.key else f"{number:09d}"
    data, path = _image(fields, used)
    return "" if key is None else str(key), path if data is None else data


def _image(fields: dict[str, Any], used: Columns) -> tuple[bytes | None, str | None]:
    """The bytes and the path of an image; either may be absent."""
    value = fields.get(used.image)
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
        return data if isinstance(data, bytes) else None, path if isinstance(path, str) else None
    return (value, None) if isinstance(value, bytes) else (None, None)


def _sample(
    key: str, found: tuple[bytes | None, str | None], captions: list[Caption | Dropped], folder: ImageFolder
) -> Sample:
    data, path = found

    def image() -> bytes:
        if data is not None:
            return data
        if path is None:
            raise Dropped(Drop.IMAGE_MISSING)
        return folder.read(path)

    return Sample(key, path or "", image, lambda: captions)


def _rows(file: Path, begin: int, columns: Columns) -> Iterator[tuple[dict[str, Any], Columns]]:
    """The rows of a file from row ``begin``."""
    for batch, used in _batches(file, begin, columns):
        try:
            batch.validate(full=True)  # before a value is read: offsets may point anywhere
        except pa.ArrowInvalid as error:
            raise UserError(f"{shown(file)}: damaged ({shown(str(error))})") from None
        for begin in range(0, len(batch), _ROWS):
            for fields in batch.slice(begin, _ROWS).to_pylist():
                yield fields, used


def _batches(file: Path, begin: int, columns: Columns) -> Iterator[tuple[pa.RecordBatch, Columns]]:
    if file.suffix.lower() == ".parquet":
        # Buffered and without pre-buffering: otherwise a row group of any size is read whole.
        with open_parquet(file, buffer_size=1 << 20, pre_buffer=False) as parquet:
            used = row_columns(parquet.schema_arrow, columns, file)
            groups, begin = _groups_from(parquet, begin)
            batches = parquet.iter_batches(_ROWS, row_groups=groups, columns=used.all())
            yield from ((batch, used) for batch in _from_row(batches, begin))
    else:
        with _open_stream(file) as stream:
            used = row_columns(stream.schema, columns, file)
            yield from ((batch.select(used.all()), used) for batch in _from_row(stream, begin))


def _groups_from(parquet: pq.ParquetFile, begin: int) -> tuple[list[int], int]:
    """The row groups from the one that holds row ``begin``, and that row's number within the first of them."""
    for number in range(parquet.num_row_groups):
        size = parquet.metadata.row_group(number).num_rows
        if begin < size:
            return list(range(number, parquet.num_row_groups)), begin
        begin -= size
    return [], 0


def _from_row(batches: Iterable[pa.RecordBatch], begin: int) -> Iterator[pa.RecordBatch]:
    """The batches without their first ``begin`` rows."""
    for batch in batches:
        if begin < len(batch):
            yield batch.slice(begin)
        begin = max(0, begin - len(batch))
