"""Whether there is enough data for a run's batch and lanes, found out before it starts."""

import logging
import time

from mc2_hpc.data.locations import LocalShards, ShardSet
from mc2_hpc.data.skips import ShardError
from mc2_hpc.errors import UserError

logger = logging.getLogger(__name__)

_LOOK_S = 20.0
"""Longest look at shards that have no index yet; many shards are many samples, so little data shows sooner."""


def check_enough(shards: ShardSet, *, name: str, global_batch: int, lanes: int, num_readers: int) -> None:
    """Say in a line each what a run on little data should know.

    Counts samples, good or bad and before balancing, only until there are enough of them. Remote shards are not looked
    into: that would copy them.

    Args:
        name: of the data, for messages.
        num_readers: processes that read, over all ranks.

    Raises:
        UserError: fewer samples than lanes, so that some lane would never give one.
    """
    num_shards = len(shards.names)
    if num_shards < num_readers:
        logger.warning(
            "%s: fewer shards (%d) than reading processes (%d), so several read the same one; more, smaller shards are "
            "faster, or set data.workers lower",
            name,
            num_shards,
            num_readers,
        )
    elif num_shards < lanes:
        logger.info("%s: fewer shards (%d) than data.lanes=%d: lanes share them", name, num_shards, lanes)
    found = _count(shards, max(global_batch, lanes))
    if found is None or found == 0:  # nothing usable: told by the loader, with the reasons
        return
    if found < lanes:
        raise UserError(f"{name}: {found} samples are too few for data.lanes={lanes}: set fewer lanes")
    if found < global_batch:
        logger.warning(
            "%s: global_batch=%d is larger than the data, %d samples: each comes more than once in a batch, and is "
            "then a wrong negative of itself; set global_batch to %d or less",
            name,
            global_batch,
            found,
            found // lanes * lanes,
        )


def _count(shards: ShardSet, enough: int) -> int | None:
    """How many samples there are if fewer than ``enough``; ``None``: at least that many, or it cannot be told soon."""
    if not isinstance(shards, LocalShards):
        return None
    begin, total = time.monotonic(), 0
    for number in range(len(shards.names)):
        if time.monotonic() - begin > _LOOK_S:
            return None
        try:
            total += shards.open(number).num_keys
        except ShardError:
            continue  # counted where it is read
        if total >= enough:
            return None
    return total
