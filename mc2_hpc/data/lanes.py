"""Who reads which lanes: ranks own lanes, and the workers of a rank share its lanes the same way."""

from collections.abc import Sequence
from typing import TypeVar

from mc2_hpc.errors import UserError

_Lanes = TypeVar("_Lanes", bound=Sequence[int])


def deal(lanes: _Lanes, index: int, count: int) -> _Lanes:
    """The consecutive part of ``lanes`` that number ``index`` of ``count`` readers owns; parts differ by one at most."""
    return lanes[index * len(lanes) // count : (index + 1) * len(lanes) // count]  # type: ignore[return-value]


def check_ranks(num_ranks: int, lanes: int) -> None:
    """
    Raises:
        UserError: more ranks than lanes, so some rank would have nothing to read.
    """
    if num_ranks > lanes:
        raise UserError(
            f"{num_ranks} ranks but data.lanes={lanes}: every rank needs at least one lane, so raise data.lanes"
        )
