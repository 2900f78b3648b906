"""What becomes of one bad sample or shard: it is skipped, counted under a reason, and the first few are logged.

======================  ===========================================================================
reason                  meaning
======================  ===========================================================================
``shard_unreadable``    the tar or its Parquet file is missing, empty, truncated or damaged
``shard_changed``       the tar was rewritten since it was last listed: read, but its order is another one
``unsafe_name``         a member's name is absolute or climbs out of its folder
``read_error``          the payload could not be read from storage any more
``image_missing``       a caption without an image
``caption_missing``     an image without a caption
``caption_not_utf8``    the caption's bytes are not UTF-8
``caption_not_json``    the ``.json`` member is not a JSON object
``caption_empty``       nothing but white space
``truncated_jpeg``      the JPEG ends early
``undecodable_image``   any other damage, or no known image format
``too_many_pixels``     more pixels than a training image can have (decompression bomb)
======================  ===========================================================================
"""

import logging
from collections import Counter

_LOGGED_PER_REASON = 3
logger = logging.getLogger(__name__)
_logged: Counter[str] = Counter()


class ShardError(Exception):
    """A shard cannot be used; the message says why."""


class SkipSample(Exception):
    """One sample cannot be used; ``reason`` is a word of the module's table, ``detail`` says more for the log."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def log_skip(reason: str, where: str, detail: str = "") -> None:
    """Log the first skips of each reason in this process; the rest are only counted, so that bad data cannot flood."""
    _logged[reason] += 1
    if _logged[reason] <= _LOGGED_PER_REASON:
        last = " (more of these are counted, not shown)" if _logged[reason] == _LOGGED_PER_REASON else ""
        logger.warning("skipped, %s: %s%s%s", reason, where, f": {detail}" if detail else "", last)
