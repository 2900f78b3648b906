"""Keep or drop the samples of a pool with images, by filters of captions and of images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from mc2_hpc.caption_tables import KEY, LANG, SOURCE, TEXT
from mc2_hpc.curation.deduplicate import distinct
from mc2_hpc.curation.filtering.images import PoolImage
from mc2_hpc.curation.filtering.judge import Judge, OpenFilter, open_filters
from mc2_hpc.curation.filtering.record import FilterStats, pool_filters
from mc2_hpc.curation.pool.captions import FILTER_SETTINGS, VERDICTS, PoolShard, iter_captions, list_pool
from mc2_hpc.curation.pool.copying import check_elsewhere, remove_shard
from mc2_hpc.curation.pool.image_tars import TarIndex, packed_name, writable_images
from mc2_hpc.curation.pool.language_id import (
    DEFAULT_IDENTIFIER,
    LanguageIdentifier,
    make_identifier,
    with_language,
)
from mc2_hpc.curation.report.sheets import SHEETS, WriteSheets
from mc2_hpc.drops import Drop, Dropped
from mc2_hpc.errors import UserError
from mc2_hpc.images import MAX_PIXELS
from mc2_hpc.jobs import REDO, STATS, Plan, Stage, open_folder, stats_path, sum_kept
from mc2_hpc.jobs.named import Named
from mc2_hpc.reading.json_file import read_json
from mc2_hpc.shard_paths import Names
from mc2_hpc.storage import atomic_path, write_json, write_table
from mc2_hpc.tar import Member, write_tar

_VERDICTS = f"{VERDICTS}/{{shard}}.parquet"
_BATCH = 64
"""Most images that filters see at a time; fewer if they have :data:`MAX_PIXELS` together."""


def plan_filter(
    pool: Names, out: str | Path, filters: Sequence[Named], *, language_id: str | Path = DEFAULT_IDENTIFIER
) -> Plan:
    """Write the samples that all filters keep: images in key order in ``<shard>.tar``, captions in ``<shard>.parquet``.

    The output is a pool. Images keep their bytes unless a filter changes them. An image is dropped with its last
    caption. ``judged/<shard>.parquet`` has a row per usable caption (:meth:`Verdicts.table`). Shards without kept
    images get no tar. ``report/filters.html`` shows what each filter kept and dropped. Finished shards are skipped. The
    result depends on the set of samples in a shard, not on their order. In memory: a shard's captions, and the images
    that filters see at a time.

    Args:
        pool: shards with images, such as those that ``mc2 curate fetch`` or img2dataset writes.
        filters: in the order in which they are applied; see :mod:`mc2_hpc.curation.filtering`.
        language_id: identifies the language of captions without one, as in matching.

    Returns:
        stages, whose result is counters over all shards: ``rows`` (captions read), ``texts`` (kept) and ``drops`` by
        reason, which add up to ``rows``; ``images_read``, ``images`` and ``image_drops`` likewise; and ``changes`` of
        kept images

    Raises:
        UserError: no filters, invalid ones, a pool without images, or a folder made with other settings; when the
            result is computed, if no image was kept.
    """
    out = Path(out).absolute()
    if not filters:
        raise UserError("no filters; give at least one --filter package.module.Class (docs/images.md)")
    opened = open_filters(filters)
    if Path(language_id).is_file():
        language_id = Path(language_id).absolute()
    shards = {shard.name: _with_images(shard) for shard in list_pool(pool)}
    check_elsewhere(shards.values(), out)
    recorded = [one.settings() for one in opened]
    settings: dict[str, Any] = {"filters": recorded, "language_id": make_identifier(language_id).name}
    if earlier := pool_filters(list(shards.values())):
        settings["pool_filters"] = earlier
    open_folder(out, FILTER_SETTINGS, settings, list(shards))
    complete = tuple(Named(one["name"], one["arguments"]) for one in recorded)  # with absolute paths
    work = FilterShard(out, complete, str(language_id))
    sheets = WriteSheets(out, [one.score for one in opened])
    stages = (
        Stage("filter", out, shards, work, (_VERDICTS, STATS), invalidates=(out / SHEETS,)),
        Stage("contact sheets", out, {SHEETS: list(shards.values())}, sheets, (SHEETS,), unit="pages"),
    )
    return Plan(stages, result=lambda: sum_kept(out, list(shards), "images", FilterStats))


def _with_images(shard: PoolShard) -> PoolShard:
    if shard.images is None:
        raise UserError(f"{shard.captions}: there is no {shard.name}.tar with its images; run `mc2 curate fetch` first")
    return shard


@dataclass(frozen=True)
class FilterShard:
    """Filters one shard."""

    out: Path
    filters: tuple[Named, ...]
    language_id: str

    @cached_property
    def _filters(self) -> list[OpenFilter]:
        return open_filters(self.filters)

    @cached_property
    def _identifier(self) -> LanguageIdentifier:
        return make_identifier(self.language_id)

    def is_current(self, shard: str, value: object) -> bool:
        """Whether the shard's files exist, or it has no images."""
        if read_json(stats_path(self.out, shard), FilterStats, cure=REDO).images == 0:
            return True
        return all((self.out / f"{shard}.{kind}").is_file() for kind in ("tar", "parquet"))

    def __call__(self, name: str, shard: PoolShard) -> None:
        assert shard.images is not None
        remove_shard(self.out, name)  # of an earlier run, which this one may replace by nothing
        num_rows, rows, drops = self._rows(shard)
        judge = Judge(self._filters, rows)
        with TarIndex(shard.images) as index:
            images, missing, unused = writable_images(index.listing, judge.keys)
            for key, reason in missing.items():
                judge.drop(key, reason)
            judge.judge_captions()
            self._write_images(self.out / f"{name}.tar", _kept(judge, index, images))
            image_drops = Counter(index.listing.drops)
            in_tar = sum(sample.image is not None for sample in index.listing.samples.values())
        verdicts = judge.verdicts
        kept = rows.filter(pa.array(verdicts.kept))
        if len(kept):
            strings = pa.table({column: kept[column].cast(pa.string()) for column in kept.column_names})
            write_table(self.out / f"{name}.parquet", strings)
        write_table(self.out / VERDICTS / f"{name}.parquet", verdicts.table(rows))
        drops.update(reason for reason in verdicts.reasons[~verdicts.kept].tolist())
        kept_keys = [key for key in images if judge.keeps(key)]
        image_drops.update(judge.last_reason(key) for key in images if not judge.keeps(key))
        image_drops.update(reason for reason in missing.values() if reason != Drop.IMAGE_MISSING)
        image_drops.update({Drop.CAPTION_MISSING: unused} if unused else {})
        stats = {
            "rows": num_rows,
            "texts": len(kept),
            "drops": dict(drops),
            "images_read": in_tar + index.listing.drops.total(),
            "images": len(kept_keys),
            "image_drops": dict(image_drops),
            "changes": dict(Counter(filter(None, map(judge.change, kept_keys)))),
        }
        write_json(stats_path(self.out, name), stats)

    def _rows(self, shard: PoolShard) -> tuple[int, pa.Table, Counter[str]]:
        """The number of a shard's caption rows; those that are usable, distinct and sorted; and the others' reasons."""
        drops: Counter[str] = Counter()
        pieces = []
        for rows, dropped in iter_captions(shard, keep_repeated=True):
            drops.update(dropped)
            pieces.append(with_language(rows, self._identifier))
        columns = [name for name in (KEY, TEXT, LANG, SOURCE) if name in pieces[0].column_names]
        usable = pa.concat_tables(piece.select(columns) for piece in pieces)
        rows = distinct(usable)
        num_rows = len(usable) + drops.total()
        drops.update({Drop.CAPTION_REPEATED: len(usable) - len(rows)} if len(rows) < len(usable) else {})
        return num_rows, rows, drops

    @staticmethod
    def _write_images(path: Path, files: Iterator[tuple[str, bytes]]) -> None:
        """Write a tar, unless there is nothing to write."""
        first = next(files, None)
        if first is not None:
            with atomic_path(path) as temporary:
                write_tar(temporary, chain([first], files))


def _kept(judge: Judge, index: TarIndex, images: dict[str, Member]) -> Iterator[tuple[str, bytes]]:
    """Judge the images in the order of their keys; the names and contents of those that are kept."""
    for batch in _batches(judge, index, images):
        judge.judge_images(batch)
        for image in batch:
            if judge.keeps(image.key):
                yield image.name, image.data


def _batches(judge: Judge, index: TarIndex, images: dict[str, Member]) -> Iterator[list[PoolImage]]:
    """The images of captions that are still kept, a bounded number of pixels at a time."""
    batch: list[PoolImage] = []
    for key, member in images.items():
        if not judge.keeps(key):
            continue
        try:
            batch.append(PoolImage(key, packed_name(key, member), index.read(member)))
        except Dropped as dropped:
            judge.drop(key, dropped.reason)
        if len(batch) == _BATCH or sum(image.width * image.height for image in batch) >= MAX_PIXELS:
            yield batch
            batch = []
    if batch:
        yield batch
