"""What became of each row of a shard: in memory while it is judged, and as the table ``judged/<shard>.parquet``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mc2_hpc.errors import UserError
from mc2_hpc.reading.files import shown
from mc2_hpc.reading.parquet_file import ColumnType, open_parquet

KEPT = ""
"""The reason of a row that is kept."""
NO_FILTER = -1
"""In place of a filter's number, for rows that were dropped before any filter saw them."""


class Verdicts:
    """Of ``num_rows`` rows, which are kept until they are dropped.

    Args:
        scores: names of the scores that filters give.
    """

    def __init__(self, num_rows: int, scores: Sequence[str]) -> None:
        self.reasons: npt.NDArray[np.object_] = np.full(num_rows, KEPT, object)
        self.filters = np.full(num_rows, NO_FILTER, np.int32)
        """The number of the filter that dropped a row."""
        self.changes: npt.NDArray[np.object_] = np.full(num_rows, None, object)
        """How the row's image was changed."""
        self.scores = {name: np.full(num_rows, np.nan) for name in scores}
        """By name; NaN for rows that were dropped before."""

    def drop(self, rows: npt.NDArray[np.int64], number: int, reason: str) -> None:
        """Record that filter ``number`` drops these rows."""
        self.reasons[rows] = str(reason)
        self.filters[rows] = number

    def last_reason(self, rows: npt.NDArray[np.int64]) -> str:
        """The reason for which the last of these rows was dropped; of several at once, the first row's."""
        filters = self.filters[rows]
        # What no filter drops is everything that filters had left.
        order = np.where(filters == NO_FILTER, np.iinfo(np.int32).max, filters)
        return self.reasons[rows[np.argmax(order)]]

    @property
    def kept(self) -> npt.NDArray[np.bool_]:
        """Which rows are kept."""
        return self.reasons == KEPT

    def table(self, rows: pa.Table) -> pa.Table:
        """One row per row of ``rows``: ``key``, ``text``, ``reason`` (null if kept), ``filter`` (the number of the
        filter that dropped it, from 1, in the order given; null if none did), ``change``, and the scores (null if the
        row was dropped before)."""
        kept, by_none = self.kept, self.filters == NO_FILTER
        return pa.table(
            {
                "key": rows["key"].cast(pa.string()),
                "text": rows["text"].cast(pa.string()),
                "reason": pa.array(self.reasons, pa.string(), mask=kept),
                "filter": pa.array(self.filters + 1, pa.int32(), mask=by_none),
                "change": pa.array(self.changes, pa.string()),
                **{f"score_{name}": pa.array(s, pa.float64(), mask=np.isnan(s)) for name, s in self.scores.items()},
            }
        )


def read_verdicts(path: Path, scores: Sequence[str]) -> pa.Table:
    """The table of a shard, as :meth:`Verdicts.table` makes it.

    Args:
        scores: names of those that it must have.

    Raises:
        UserError: it cannot be read, or is another table.
    """
    strings = dict.fromkeys(("key", "text", "reason", "change"), ColumnType.exactly(pa.string()))
    numbers = {f"score_{name}": ColumnType.exactly(pa.float64()) for name in scores}
    columns = {**strings, "filter": ColumnType.exactly(pa.int32()), **numbers}
    with open_parquet(path, columns, what="a table of verdicts") as file:
        table = file.read(list(columns))
    if table["key"].null_count or table["text"].null_count:
        raise UserError(f"{shown(path)}: has captions without a key or text; delete it to filter its shard again")
    return table
