"""Tables that name image files beside their captions: CSV, TSV, JSON lines, Parquet."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, AnyStr

import pyarrow as pa
import pyarrow.compute as pc

from mc2_hpc.drops import Drop, Dropped
from mc2_hpc.errors import UserError
from mc2_hpc.ingestion.columns import Columns
from mc2_hpc.ingestion.image_files import keys_of, place_in
from mc2_hpc.ingestion.listing import SCHEMA
from mc2_hpc.ingestion.texts import raw_captions
from mc2_hpc.reading.files import open_regular, shown
from mc2_hpc.reading.parquet_file import open_parquet
from mc2_hpc.samples import LARGEST_RECORD, is_unicode, parse_record

SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".parquet")
_ROWS = 1 << 16
_DELIMITERS = "\t,;|"
_SCHEMES = ("http://", "https://", "s3://")
_LONGEST_LINE = 4 * LARGEST_RECORD

Fields = dict[str, Any]


def list_tables(paths: Iterable[Path], images: Path, columns: Columns) -> tuple[pa.Table, Counter[str]]:
    """The listing of the images that the tables name, and what was left out by reason.

    Several rows with the same image are several captions of it. A cell may also hold a list of captions.

    Args:
        images: folder that the names are relative to.

    Raises:
        UserError: a table cannot be read, lacks a column, or has addresses in place of file names.
    """
    drops: Counter[str] = Counter()
    pieces = [SCHEMA.empty_table()]
    for path in paths:
        rows: list[tuple[Any, ...]] = []
        for row in _rows(path, columns, images, drops):
            rows.append(row)
            if len(rows) == _ROWS:
                pieces.append(_piece(rows))
                rows = []
        if rows:
            pieces.append(_piece(rows))
    listing = pa.concat_tables(pieces).combine_chunks()
    keys = pc.coalesce(listing["key"], keys_of(listing["image"].combine_chunks()))
    return listing.set_column(0, SCHEMA.field("key"), keys), drops


def _piece(rows: list[tuple[Any, ...]]) -> pa.Table:
    columns = zip(SCHEMA, zip(*rows, strict=True), strict=False)
    table = pa.table({field.name: pa.array(values, field.type) for field, values in columns})
    for name in SCHEMA.names[len(table.column_names) :]:
        table = table.append_column(name, pa.nulls(len(table), SCHEMA.field(name).type))
    return table


def _rows(path: Path, columns: Columns, images: Path, drops: Counter[str]) -> Iterator[tuple[Any, ...]]:
    """``(key, image, text, lang)`` of every caption of a table."""
    read = _READERS.get(path.suffix.lower(), _csv)
    for fields, used in read(path, columns, drops):
        name = fields.get(used.image)
        if not isinstance(name, str) or not name.strip() or not is_unicode(name):
            drops[Drop.IMAGE_MISSING] += 1
            continue
        if name.lstrip().lower().startswith(_SCHEMES):
            raise UserError(
                f"{shown(path)}: column {used.image!r} has addresses, such as {shown(name[:80])}; write them as "
                "`source` of a pool and fetch the images with `mc2 curate fetch` (docs/images.md)"
            )
        key = fields.get(used.key) if used.key else None
        if used.key and (key is None or not is_unicode(str(key)) or not str(key)):
            drops[Drop.KEY_MISSING] += 1
            continue
        key = None if key is None else str(key)
        place = place_in(images, name.strip())
        captions: Sequence[tuple[bytes | None, str | None]] = raw_captions(fields, used)
        for raw, lang in captions or [(None, None)]:
            yield (key, place, raw, lang)


_Read = Callable[[Path, Columns, "Counter[str]"], Iterator[tuple[Fields, Columns]]]


def _csv(path: Path, columns: Columns, drops: Counter[str]) -> Iterator[tuple[Fields, Columns]]:
    """A delimiter-separated file with a header; a row with another number of fields is dropped."""
    with open_regular(path) as stream:
        if stream.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"{shown(path)}: is UTF-16; save it as UTF-8")
    csv.field_size_limit(LARGEST_RECORD)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        header = next(_lines(text, path), "")
        delimiter = "\t" if path.suffix.lower() == ".tsv" else max(_DELIMITERS, key=header.count)
        text.seek(0)
        reader = csv.reader(_lines(text, path), delimiter=delimiter)
        try:
            names = [name.strip() for name in next(reader, [])]
            used = columns.found_in(names, path)
            for row in reader:
                if len(row) == len(names):
                    yield dict(zip(names, row, strict=True)), used
                elif row:
                    drops[Drop.ROW_MALFORMED] += 1
        except csv.Error as error:
            raise UserError(f"{shown(path)}, line {reader.line_num}: {error}; check the quotes before it") from None


def _json_lines(path: Path, columns: Columns, drops: Counter[str]) -> Iterator[tuple[Fields, Columns]]:
    """One JSON object per line; a line that is not one is dropped."""
    used: Columns | None = None
    with open_regular(path) as stream:
        for line in _lines(stream, path):
            if not line.strip():
                continue
            try:
                fields = parse_record(line)
            except Dropped as dropped:
                drops[dropped.reason] += 1
                continue
            used = used or columns.found_in(list(fields), path)  # later lines may lack fields
            yield fields, used


def _lines(stream: IO[AnyStr], path: Path) -> Iterator[AnyStr]:
    """The lines of a table, none of which is held in memory if it is too long to be one."""
    number = 0
    while line := stream.readline(_LONGEST_LINE):
        number += 1
        if len(line) == _LONGEST_LINE:
            raise UserError(f"{shown(path)}, line {number}: longer than {_LONGEST_LINE:,} characters; not a table")
        yield line


def _parquet(path: Path, columns: Columns, drops: Counter[str]) -> Iterator[tuple[Fields, Columns]]:
    with open_parquet(path) as file:
        used = columns.found_in(file.schema_arrow.names, path)
        for batch in file.iter_batches(_ROWS, columns=used.all()):
            try:
                rows = batch.to_pylist()
            except UnicodeDecodeError as error:
                raise UserError(f"{shown(path)}: a text is not UTF-8 ({error})") from None
            for row in rows:
                yield row, used


_READERS: dict[str, _Read] = {".jsonl": _json_lines, ".ndjson": _json_lines, ".parquet": _parquet}
