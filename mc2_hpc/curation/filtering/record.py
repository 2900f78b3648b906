"""What a filtered pool says of itself: its filters with their limits in ``filter.json``, and its shards' counters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mc2_hpc.curation.pool.captions import FILTER_SETTINGS, PoolShard
from mc2_hpc.reading.json_file import Count, File, read_fields

_CURE = "filter the pool again into another folder"


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


def pool_filters(shards: Sequence[PoolShard]) -> list[dict[str, Any]]:
    """The filters that a pool went through, in order, as ``filter.json`` has them; none if it was never filtered.

    Args:
        shards: of the pool.

    Raises:
        UserError: its ``filter.json`` is damaged.
    """
    path = shards[0].captions or shards[0].images
    assert path is not None
    root = path.parents[shards[0].name.count("/")]
    if not (root / FILTER_SETTINGS).is_file():
        return []
    settings = read_fields(root / FILTER_SETTINGS, FilterSettings, cure=_CURE)
    return [*(settings.get("pool_filters") or []), *settings["filters"]]
