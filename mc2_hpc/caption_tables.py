"""Parquet files of captions: how to recognise them, and how curation and training read their columns.

A caption table has the columns ``key`` and ``text``, and optionally ``lang``, ``source`` and ``entries``. Shards often
have other Parquet files beside them: img2dataset's have no ``text``, DataComp's no ``key``. They are not caption
tables, and code that lists shards ignores them.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from mc2_hpc.errors import UserError

if TYPE_CHECKING:  # plain shards must not pay for this import in every worker
    import pyarrow

KEY, TEXT, LANG, SOURCE, ENTRIES = "key", "text", "lang", "source", "entries"


def is_caption_table(path: Path) -> bool:
    """Whether the Parquet file at ``path`` has a key and a text per row; False if the file does not exist.

    Raises:
        UserError: cannot be read, or a column occurs twice.
    """
    return bool(caption_columns(path))


def caption_columns(path: Path) -> list[str]:
    """The columns of a caption table that ``path`` has; none if it is absent or another kind of file.

    Raises:
        UserError: see :func:`is_caption_table`.
    """
    if not path.exists():
        return []
    if not path.is_file():
        raise UserError(f"{path}: not a regular file")
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({_first_line(error)})") from None
    found = [name for name in (KEY, TEXT, LANG, SOURCE, ENTRIES) if name in names]
    for name in found:
        if names.count(name) > 1:
            raise UserError(f"{path}: has {names.count(name)} columns {name!r}; rewrite it with one")
    return found if {KEY, TEXT} <= set(found) else []


def caption_table(path: Path) -> "pyarrow.Table | None":
    """Columns ``key``, ``text`` (as bytes), ``lang`` and, if present, ``entries``; None if not a caption table.

    Integer keys become their decimal digits.

    Raises:
        UserError: cannot be read, or a column has the wrong type.
    """
    names = caption_columns(path)
    if not names:
        return None
    import pyarrow
    import pyarrow.parquet

    types = {KEY: pyarrow.string(), TEXT: pyarrow.large_binary(), LANG: pyarrow.string()}
    types[ENTRIES] = pyarrow.list_(pyarrow.uint32())
    try:
        table = pyarrow.parquet.ParquetFile(path).read([name for name in names if name in types], use_threads=False)
        for field in table.schema:
            check_column(path, field)
        if LANG not in names:
            table = table.append_column(LANG, pyarrow.nulls(len(table), pyarrow.string()))
        return pyarrow.table({name: table[name].cast(types[name]) for name in table.column_names})
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({_first_line(error)})") from None


def check_column(path: Path, field: "pyarrow.Field") -> None:
    """Raise UserError unless a column of a caption table has the right type: strings; for keys, integers too."""
    import pyarrow.types as kinds

    kind = field.type.value_type if kinds.is_dictionary(field.type) else field.type
    if field.name == ENTRIES:
        if not (kinds.is_list(kind) and kinds.is_unsigned_integer(kind.value_type)):
            raise UserError(f"{path}: column {field.name!r} is {field.type}, must be list<uint32>")
    elif field.name == KEY and kinds.is_integer(kind):
        return
    elif not (
        kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind) or kinds.is_null(kind)
    ):
        raise UserError(f"{path}: column {field.name!r} is {field.type}, must be string")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
