"""Shared by the readers: required files, lines, tables, random halves. Each error names the file."""

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mc2_hpc.draws import hash_keys
from mc2_hpc.errors import UserError
from mc2_hpc.reading.files import read_bytes
from mc2_hpc.reading.parquet_file import ColumnType, open_parquet
from mc2_hpc.samples import is_image_name
from mc2_hpc.shard_paths import walk_files

logger = logging.getLogger(__name__)

MOST_BYTES = 2 << 30
"""Of a text file of an evaluation set."""


def required(path: Path, what: str) -> Path:
    """The path, if it exists.

    Raises:
        UserError: it does not exist.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; {what}")
    return path


def subfolders(path: Path, what: str) -> list[str]:
    """Names of the folders in ``path``, sorted.

    Raises:
        UserError: there is no such folder.
    """
    if not required(path, what).is_dir():
        raise UserError(f"{path}: not a folder; {what}")
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir())


def read_text(path: Path, what: str) -> str:
    """A UTF-8 text file.

    Raises:
        UserError: no such file, not readable, or not UTF-8.
    """
    try:
        return read_bytes(required(path, what), most=MOST_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {what}") from None


def read_lines(path: Path, what: str) -> list[str]:
    """Lines of a UTF-8 text file, stripped; an empty last line is ignored. Raises like :func:`read_text`."""
    # Not splitlines(), which would split a caption at U+2028 and the like.
    lines = [line.strip() for line in read_text(path, what).split("\n")]
    return lines[:-1] if lines and not lines[-1] else lines


def read_csv(path: Path, columns: Sequence[str], what: str) -> list[dict[str, str]]:
    """Rows of a CSV file with a header.

    Raises:
        UserError: the file does not exist, lacks a column, has no rows, or has a row with too few cells.
    """
    reader = csv.DictReader(io.StringIO(read_text(path, what)), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num} is not CSV ({error})") from None
    missing = [column for column in columns if column not in (reader.fieldnames or [])]
    if missing:
        raise UserError(f"{path}: no column {missing[0]!r}; there are {', '.join(reader.fieldnames or [])}")
    if not rows:
        raise UserError(f"{path}: no rows; {what}")
    short = next((number for number, row in enumerate(rows, 1) if any(row[column] is None for column in columns)), 0)
    if short:
        raise UserError(f"{path}: row {short} has too few cells")
    return rows


def read_parquet(path: Path, columns: Mapping[str, ColumnType], what: str) -> pa.Table:
    """These columns of a Parquet file.

    Raises:
        UserError: the file does not exist, is not Parquet, or a column is missing or has another type.
    """
    with open_parquet(required(path, what), columns, what=what) as file:
        return file.read(list(columns))


def encoded_images(column: pa.ChunkedArray, path: Path) -> pa.ChunkedArray:
    """A column of encoded images, which may be a struct with a field ``bytes`` (as Hugging Face writes it).

    Raises:
        UserError: the column contains something else.
    """
    if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = pa.chunked_array([chunk.field("bytes") for chunk in column.chunks], column.type.field("bytes").type)
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise UserError(f"{path}: a column of encoded images should be binary, not {column.type}")
    return column


def images_below(folder: Path) -> list[str]:
    """Sorted relative paths of all images in and below a folder, following links; dangling links are logged.

    Raises:
        UserError: no such folder, or a folder below it cannot be read.
    """
    found = [path for path in walk_files(required(folder, "images should be there")) if is_image_name(path.name)]
    readable = [path for path in found if path.is_file()]
    if lost := [path for path in found if not path.is_file()]:
        logger.warning("%s: %d images are dangling links or not files, such as %s", folder, len(lost), lost[0])
    return sorted(str(path.relative_to(folder)) for path in readable)


def shuffled(names: Sequence[str], seed: int = 0) -> npt.NDArray[np.int64]:
    """A permutation that depends only on the names and the seed, not on the names' order."""
    return np.argsort(hash_keys([f"{seed}/{name}" for name in names]), kind="stable")
