"""What a pool says of itself: its filters with their limits in ``filter.json``, and its shards' counters; likewise how
copies of images were removed, in ``dedup_images.json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mc2_hpc.curation.pool.captions import DEDUP_SETTINGS, FILTER_SETTINGS, PoolShard
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


class DedupSettings(File, omit_defaults=True):
    """``dedup_images.json``."""

    hashes: dict[str, dict[str, Count | str]]
    encoder: dict[str, Any] | None
    shards: list[str]
    encoder_sources: dict[str, str] | None = None
    """Digests of the files that the encoder read."""
    pool_filters: list[RecordedFilter] | None = None
    """Of the pool whose copies were removed."""


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
    """What a pool went through, in order: filters, as ``filter.json`` has them, and ``dedup-images`` with its limits as
    one of them; nothing if neither was done.

    Args:
        shards: of the pool.

    Raises:
        UserError: its ``filter.json`` or ``dedup_images.json`` is damaged.
    """
    path = shards[0].captions or shards[0].images
    assert path is not None
    root = path.parents[shards[0].name.count("/")]
    if (root / FILTER_SETTINGS).is_file():
        settings = read_fields(root / FILTER_SETTINGS, FilterSettings, cure=_CURE)
        return [*(settings.get("pool_filters") or []), *settings["filters"]]
    if (root / DEDUP_SETTINGS).is_file():
        settings = read_fields(root / DEDUP_SETTINGS, DedupSettings, cure="remove the copies again into another folder")
        return [*(settings.get("pool_filters") or []), _as_filter(settings)]
    return []


def _as_filter(settings: dict[str, Any]) -> dict[str, Any]:
    """The removal of copies in the form of a filter."""
    limits = {
        f"{kind}_{limit}": limits[limit]
        for kind, limits in sorted(settings["hashes"].items())
        for limit in ("max_distance", "max_check")
    }
    encoder = settings["encoder"]
    return {
        "name": "dedup-images",
        "arguments": limits | ({"encoder": encoder} if encoder else {}),
        "sources": settings.get("encoder_sources") or {},
    }
