"""Who reads which lanes: ranks own lanes, and the workers of a rank divide its lanes in the same way."""

from collections.abc import Sequence

from mc2_hpc.errors import UserError


def deal(lanes: Sequence[int], index: int, count: int) -> Sequence[int]:
    """The consecutive part of ``lanes`` that reader ``index`` of ``count`` owns; sizes differ by at most one."""
    return lanes[index * len(lanes) // count : (index + 1) * len(lanes) // count]


def check_ranks(num_ranks: int, lanes: int, *, where: str = "") -> None:
    """
    Raises:
        UserError: more ranks than lanes, so some rank would have nothing to read; the line starts with ``where``.
    """
    if num_ranks > lanes:
        raise UserError(
            f"{where}{num_ranks} ranks but data.lanes={lanes}: every rank needs at least one lane, so raise data.lanes"
        )


def rank_batches(global_batch: int, *, lanes: int, num_ranks: int) -> tuple[int, ...]:
    """Pairs that each rank contributes to a step: the same number from every lane that it owns.

    Raises:
        UserError: as :func:`check_ranks`.
    """
    check_ranks(num_ranks, lanes)
    return tuple(len(deal(range(lanes), rank, num_ranks)) * (global_batch // lanes) for rank in range(num_ranks))
