"""Parquet files of captions: how to recognise them, and how curation and training read their columns.

A caption table has the columns ``key`` and ``text``, and optionally ``lang``, ``source`` and ``entries``. Shards often
have other Parquet files beside them: img2dataset's have no ``text``, DataComp's no ``key``. They are not caption
tables, and code that lists shards ignores them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # plain shards must not pay for this import in every worker
    import pyarrow

    from mc2_hpc.reading.parquet_file import ColumnType

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
    from mc2_hpc.reading.parquet_file import ANY, open_parquet

    with open_parquet(path, optional=dict.fromkeys((KEY, TEXT, LANG, SOURCE, ENTRIES), ANY)) as file:
        names = file.schema_arrow.names
    found = [name for name in (KEY, TEXT, LANG, SOURCE, ENTRIES) if name in names]
    return found if {KEY, TEXT} <= set(found) else []


def caption_table(path: Path, *, texts: Sequence[str] = (), addresses: bool = False) -> "pyarrow.Table | None":
    """Columns ``key``, ``text`` (as bytes), ``lang`` and, if present, ``entries``; None if not a caption table.

    Integer keys become their decimal digits.

    Args:
        texts: other columns of text to read (as bytes) where the table has them.
        addresses: also read the column ``source`` (as bytes) if it is text.

    Raises:
        UserError: cannot be read, or a column has the wrong type.
    """
    names = caption_columns(path)
    if not names:
        return None
    import pyarrow

    from mc2_hpc.reading.parquet_file import TEXT as STRINGS
    from mc2_hpc.reading.parquet_file import open_parquet

    types = {KEY: pyarrow.string(), TEXT: pyarrow.large_binary(), LANG: pyarrow.string()}
    types[ENTRIES] = pyarrow.list_(pyarrow.uint32())
    types = dict.fromkeys((*texts, SOURCE), pyarrow.large_binary()) | types
    ours = {KEY, TEXT, LANG, ENTRIES}
    columns = {name: kind for name, kind in column_types().items() if name in names and name in ours}
    others = {name: STRINGS for name in texts if name not in columns}
    with open_parquet(path, columns, optional=others) as file:
        schema = file.schema_arrow
        more = {name for name in others if name in schema.names}
        if addresses and schema.names.count(SOURCE) == 1 and STRINGS.accepts(schema.field(SOURCE).type):
            more.add(SOURCE)
        table = file.read([*columns, *sorted(more)], use_threads=False)
        if LANG not in names:
            table = table.append_column(LANG, pyarrow.nulls(len(table), pyarrow.string()))
        return pyarrow.table({name: table[name].cast(types[name]) for name in table.column_names})


def column_types() -> "dict[str, ColumnType]":
    """The types that columns of a caption table may have: strings; for keys, integers too."""
    from mc2_hpc.reading.parquet_file import IDS, TEXT_OR_INTEGER
    from mc2_hpc.reading.parquet_file import TEXT as STRINGS

    return {KEY: TEXT_OR_INTEGER, TEXT: STRINGS, LANG: STRINGS, SOURCE: STRINGS, ENTRIES: IDS}
