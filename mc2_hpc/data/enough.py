"""Check before a run starts that there is enough data for its batch size and lanes."""

import logging
from collections.abc import Iterator
from contextlib import suppress

from mc2_hpc.data.locations import LocalShards, ShardSet
from mc2_hpc.data.skips import ShardError
from mc2_hpc.data.watch import Patient
from mc2_hpc.errors import UserError

logger = logging.getLogger(__name__)

_LOOK_S = 20.0
"""Longest time to look at shards. The loader reports slow or hanging storage, and little data is quick to count."""


def check_enough(
    shards: ShardSet, *, name: str, global_batch: int, lanes: int, num_readers: int, share: float = 1.0
) -> None:
    """Log one line for each problem that little data causes a run.

    Counts samples, good or bad and before balancing, only until there are enough. Remote shards are not opened, because
    that would copy them.

    Args:
        name: of the data, for messages.
        num_readers: processes that read, over all ranks.
        share: of each batch that comes from these shards, if they are one of several sources.

    Raises:
        UserError: fewer samples than lanes, so that some lane would never yield one.
    """
    num_shards = len(shards.names)
    if num_shards < num_readers:
        logger.warning(
            "%s: fewer shards (%d) than reading processes (%d), so several read the same shard; use more, smaller "
            "shards, or set data.workers lower",
            name,
            num_shards,
            num_readers,
        )
    elif num_shards < lanes:
        logger.info("%s: fewer shards (%d) than data.lanes=%d: lanes share them", name, num_shards, lanes)
    try:
        taken = round(share * global_batch)
        found = Patient(_count(shards, max(taken, lanes))).next(_LOOK_S)
    except TimeoutError:
        return
    if found is None or found == 0:  # nothing usable: the loader reports it with the reasons
        return
    if found < lanes:
        raise UserError(f"{name}: {found} samples are too few for data.lanes={lanes}: set fewer lanes")
    if found < taken and share < 1:
        logger.warning(
            "%s: a batch takes about %d samples of this source, but it has only %d: each occurs more than once in a "
            "batch and is then its own false negative; lower its weight or global_batch",
            name,
            taken,
            found,
        )
    elif found < global_batch and share == 1:
        logger.warning(
            "%s: global_batch=%d is larger than the data (%d samples): each sample occurs more than once in a batch "
            "and is then its own false negative; set global_batch to %d or less",
            name,
            global_batch,
            found,
            found // lanes * lanes,
        )


def _count(shards: ShardSet, enough: int) -> Iterator[int | None]:
    """Yields the number of samples if it is below ``enough``; otherwise, or if it is unknown, ``None``."""
    total = 0 if isinstance(shards, LocalShards) else enough
    for number in range(len(shards.names)):
        if total >= enough:
            break
        with suppress(ShardError):  # counted where it is read
            total += shards.open(number).num_keys
    yield total if total < enough else None
