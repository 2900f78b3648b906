"""``report/filters.html`` of a filtered pool: its counters, and a contact sheet per filter: what was kept just inside a
limit, and what was dropped just outside."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mc2_hpc.curation.filtering.record import FilterSettings, FilterStats
from mc2_hpc.curation.filtering.verdicts import read_verdicts
from mc2_hpc.curation.pool.captions import FILTER_SETTINGS, VERDICTS, PoolShard
from mc2_hpc.curation.pool.image_tars import TarIndex, writable_images
from mc2_hpc.curation.report.page import filter_text
from mc2_hpc.drops import Dropped
from mc2_hpc.images import thumbnail
from mc2_hpc.jobs import sum_stats
from mc2_hpc.pages import data_uri, write_page
from mc2_hpc.pages.reasons import reason_rows
from mc2_hpc.reading.json_file import read_fields

SHEETS = "report/filters.html"
_EXAMPLES = 12
"""On each side of a limit."""
_THUMBNAIL = 160
_LONGEST_CAPTION = 120
_CURE = "filter the pool into another folder"


class Example(NamedTuple):
    """A caption and its image; the first ones in ascending order are shown."""

    rank: float
    """The distance from the limit; for a filter without one, a hash of the key."""
    key: str
    text: str
    shard: str
    score: float | None


@dataclass
class Sheet:
    """The examples of one limit of a filter, or of a filter without limits."""

    number: int
    """Of the filter, from 1."""
    title: str
    score: str | None = None
    limit: float = 0.0
    reason: str | None = None
    """Of what the limit drops; None: whatever the filter drops."""
    kept: list[Example] = field(default_factory=list)
    dropped: list[Example] = field(default_factory=list)

    def add(self, shard: str, table: pa.Table, hashes: npt.NDArray[np.uint64]) -> None:
        """Take the shard's examples into account.

        Args:
            table: of verdicts.
            hashes: of its keys.
        """
        is_kept = np.asarray(table["reason"].is_null())
        is_dropped = np.asarray(table["filter"].fill_null(0)) == self.number
        scores = None
        rank = hashes / 2.0**64
        if self.score is not None:
            scores = np.asarray(table[f"score_{self.score}"].to_numpy(), np.float64)
            rank = np.abs(scores - self.limit)
            is_kept &= ~np.isnan(scores)
            is_dropped &= np.asarray(table["reason"].fill_null("")) == self.reason
        for mask, found in ((is_kept, self.kept), (is_dropped, self.dropped)):
            found[:] = _first([*found, *_examples(shard, table, np.flatnonzero(mask), rank, scores)])


def _examples(
    shard: str,
    table: pa.Table,
    rows: npt.NDArray[np.int64],
    rank: npt.NDArray[np.float64],
    scores: npt.NDArray[np.float64] | None,
) -> list[Example]:
    """A few times as many of the first rows as are shown, because some have the same image."""
    rows = rows[np.argsort(rank[rows], kind="stable")][: 4 * _EXAMPLES]
    texts = table.select(["key", "text"]).take(pa.array(rows)).to_pylist()
    return [
        Example(float(rank[row]), text["key"], text["text"], shard, None if scores is None else float(scores[row]))
        for row, text in zip(rows.tolist(), texts, strict=True)
    ]


def _first(examples: Iterable[Example]) -> list[Example]:
    """The first example of each of the first images."""
    of_image: dict[str, Example] = {}
    for example in sorted(examples):
        of_image.setdefault(example.key, example)
    return list(of_image.values())[:_EXAMPLES]


@dataclass(frozen=True)
class WriteSheets:
    """Writes the page."""

    out: Path
    scores: list[str | None]
    """The name of each filter's score."""

    def __call__(self, name: str, shards: list[PoolShard]) -> None:
        settings = read_fields(self.out / FILTER_SETTINGS, FilterSettings, cure=_CURE)
        sheets = _sheets(settings["filters"], self.scores)
        changed: list[Example] = []
        for shard in shards:
            _read(self.out, shard.name, sheets, changed)
        before, after = _Pictures(), _Pictures()
        before.wanted(example for sheet in sheets for example in sheet.dropped)
        after.wanted([*changed, *(example for sheet in sheets for example in sheet.kept)])
        for shard in shards:
            assert shard.images is not None
            before.read(shard.name, shard.images)
            after.read(shard.name, self.out / f"{shard.name}.tar")
        stats = sum_stats(self.out, [shard.name for shard in shards], FilterStats)
        values = {
            "stats": stats,
            "filters": [
                {**one, "text": filter_text(one["name"], one["arguments"])}
                for one in [*(settings.get("pool_filters") or []), *settings["filters"]]
            ],
            "sheets": [sheet for sheet in sheets if sheet.dropped or sheet.score is not None],
            "changed": changed,
            "before": before.found,
            "after": after.found,
            "drops": reason_rows(stats["drops"], stats["rows"]),
            "image_drops": reason_rows(stats["image_drops"], stats["images_read"]),
            "short": _shortened,
        }
        write_page(self.out / SHEETS, "mc2_hpc.curation.report", "filters.html", values)


def _sheets(filters: Sequence[Mapping[str, Any]], scores: Sequence[str | None]) -> list[Sheet]:
    sheets = []
    for number, (one, score) in enumerate(zip(filters, scores, strict=True), 1):
        if score is None:
            sheets.append(Sheet(number, one["name"].rpartition(".")[2]))
        for option, side in (("least", "low"), ("most", "high")):
            limit = one["arguments"].get(option)
            if score is not None and limit is not None:
                sheets.append(Sheet(number, f"{score} at {option} {limit:g}", score, limit, f"{score}_{side}"))
    return sheets


def _read(out: Path, shard: str, sheets: Sequence[Sheet], changed: list[Example]) -> None:
    """Take the examples of a shard into account."""
    from mc2_hpc.draw_kernels import hash_column  # loads numba

    table = read_verdicts(out / VERDICTS / f"{shard}.parquet", [sheet.score for sheet in sheets if sheet.score])
    hashes = hash_column(table["key"].combine_chunks()) if len(table) else np.zeros(0, np.uint64)
    for sheet in sheets:
        sheet.add(shard, table, hashes)
    is_changed = np.asarray(table["change"].is_valid()) & np.asarray(table["reason"].is_null())
    changed[:] = _first([*changed, *_examples(shard, table, np.flatnonzero(is_changed), hashes / 2.0**64, None)])


class _Pictures:
    """Thumbnails of images, read one shard at a time."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], str] = {}
        """As data URIs, by shard and key; those that cannot be decoded are missing."""
        self._keys: dict[str, set[str]] = defaultdict(set)

    def wanted(self, examples: Iterable[Example]) -> None:
        """Ask for the images of these examples."""
        for example in examples:
            self._keys[example.shard].add(example.key)

    def read(self, shard: str, tar: Path) -> None:
        """Read those of a shard that are wanted."""
        if shard not in self._keys:
            return
        with TarIndex(tar) as index:
            images, _, _ = writable_images(index.listing, sorted(self._keys[shard]))
            for key, member in images.items():
                try:
                    picture = thumbnail(index.read(member), _THUMBNAIL)
                except Dropped:
                    continue
                self.found[shard, key] = data_uri(picture, "image/jpeg")


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_CAPTION else f"{text[:_LONGEST_CAPTION].rstrip()}…"
