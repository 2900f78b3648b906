"""Bad samples and shards are skipped and counted by reason, and the first few are logged.

The reasons are those of :class:`mc2_hpc.drops.Drop`.
"""

import logging
from collections import Counter

from mc2_hpc.drops import Drop

_LOGGED_PER_REASON = 3
logger = logging.getLogger(__name__)
_logged: Counter[str] = Counter()


class ShardError(Exception):
    """A shard cannot be used; the message says why."""


def log_skip(reason: Drop, where: str, detail: str = "") -> None:
    """Log the first skips of each reason in this process; only count the rest, so bad data cannot flood the log."""
    _logged[reason] += 1
    if _logged[reason] <= _LOGGED_PER_REASON:
        last = " (further ones are counted but not shown)" if _logged[reason] == _LOGGED_PER_REASON else ""
        logger.warning("skipped, %s: %s%s%s", reason, where, f": {detail}" if detail else "", last)
