"""What a filtered pool says of itself: its filters with their limits in ``filter.json``, and its shards' counters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mc2_hpc.curation.pool.captions import FILTER_SETTINGS, PoolShard
from mc2_hpc.reading.json_file import Count, File, Foreign, read_fields

DEDUP_SETTINGS = "dedup_images.json"
"""How a pool was de-duplicated; it has the filters of the pool before."""
_CURE = "make the pool again, in another folder"


class RecordedFilter(File):
    """A filter as it is recorded."""

    name: str
    arguments: dict[str, Any]
    sources: dict[str, str]


class FilterSettings(File, omit_defaults=True):
    """``filter.json``."""

    filters: list[RecordedFilter]
    language_id: str
    shards: list[str]
    pool_filters: list[RecordedFilter] | None = None
    """Of the pool that was filtered, if it had been filtered before."""


class FilterStats(File):
    """``stats/<shard>.json`` of a filtered pool."""

    rows: Count
    texts: Count
    drops: dict[str, Count]
    images_read: Count
    images: Count
    image_drops: dict[str, Count]
    changes: dict[str, Count]


class _Recorded(Foreign):
    """The filters in either file."""

    filters: list[RecordedFilter] = []
    pool_filters: list[RecordedFilter] = []


def pool_filters(shards: Sequence[PoolShard]) -> list[dict[str, Any]]:
    """The filters that a pool went through, in order, as it records them, also after de-duplication.

    Args:
        shards: of the pool.

    Raises:
        UserError: its record is damaged.
    """
    path = shards[0].captions or shards[0].images
    assert path is not None
    root = path.parents[shards[0].name.count("/")]
    files = [root / file for file in (FILTER_SETTINGS, DEDUP_SETTINGS) if (root / file).is_file()]
    found: list[dict[str, Any]] = []
    for file in files:
        recorded = read_fields(file, _Recorded, cure=_CURE)
        found += [*recorded["pool_filters"], *recorded["filters"]]
    return found
