"""De-duplication of a pool by the content of its images: of every group of copies, one stays.

Four stages: hash every image (:mod:`mc2_hpc.curation.copies.codes`), search for copies, group them and choose which
stays (:mod:`mc2_hpc.curation.copies.search`), write the shards without the others. The search is divided by bits of the
hash into independent parts, none of which holds more than a fixed number of codes. The result depends only on the set
of images, not on their shards or on the order or number of workers.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from mc2_hpc.curation.copies.codes import view_codes
from mc2_hpc.curation.copies.hashes import CODES, IMAGES, Hash, read_images, write_codes, write_images
from mc2_hpc.curation.copies.linking import CHECK_BITS, Entries
from mc2_hpc.curation.copies.search import GroupCopies, SearchPart, rows_to_remove
from mc2_hpc.curation.pool.captions import PoolShard, list_pool
from mc2_hpc.curation.pool.copying import copy_without, key_of
from mc2_hpc.curation.pool.image_tars import TarIndex
from mc2_hpc.drops import Drop, Dropped
from mc2_hpc.errors import UserError
from mc2_hpc.images import open_image
from mc2_hpc.jobs import REDO, STATS, Plan, Stage, open_folder, stats_path, sum_kept
from mc2_hpc.reading.json_file import Count, File, Foreign, read_json
from mc2_hpc.samples import Sample
from mc2_hpc.shard_paths import Names
from mc2_hpc.storage import write_json

SETTINGS = "dedup_images.json"
HASHED, REMOVED = "hashes", "removed"
PHASH = "phash"
MAX_DISTANCE, MAX_CHECK = 6, 40
"""Defaults: bits of 64 and of 192 in which codes of planted copies hardly ever differ (docs/images.md)."""
_LARGEST_DISTANCE = 16
"""A search beyond it compares almost all pairs."""
_FEWEST_PARTS, _MOST_PARTS = 16, 1000


class DedupStats(File):
    """``stats/<shard>.json`` of a folder of de-duplicated shards."""

    images_read: Count
    images: Count
    drops: dict[str, Count]


class _Groups(Foreign):
    """Counters of grouping."""

    groups: Count
    largest_group: Count


def plan_dedup_images(
    pool: Names, out: str | Path, *, max_distance: int = MAX_DISTANCE, max_check: int = MAX_CHECK
) -> Plan:
    """Copy a pool's shards without images that are copies of others.

    Writes ``<shard>.tar`` and, if the shard has one, ``<shard>.parquet``; kept files keep their bytes. Of each group of
    copies, the one with the most pixels stays, then the largest file, then the first key: see
    ``removed/<shard>.csv``. A shard without any image left gets no files. Finished shards are skipped.

    Args:
        pool: shards with images: tars beside Parquet files of captions, or plain WebDataset tars.
        max_distance: bits in which the 64-bit hashes of two copies may differ.
        max_check: bits in which the 192 bits that confirm them may differ.

    Returns:
        stages, whose result is counters: ``images_read``, ``images`` (kept), ``groups`` (of two or more copies), the
        size of the ``largest_group``, and ``drops`` by reason: ``duplicate_image``, those of images that cannot be
        decoded, ``name_too_long`` (does not fit a ustar header), ``name_repeated`` (a second file of the same name)

    Raises:
        UserError: no pool, a shard without images, or a folder made with other settings; when the result is computed,
            if nothing was kept.
    """
    out = Path(out).absolute()
    hashes = [_checked(Hash(PHASH, max_distance, max_check))]
    shards = {shard.name: _with_images(shard) for shard in list_pool(pool)}
    settings = {"hashes": {kind.name: asdict(kind) for kind in hashes}}
    for folder in (out, out / HASHED):
        open_folder(folder, SETTINGS, settings, list(shards))
    stages = _stages(out, shards, hashes)
    return Plan(tuple(stages), result=lambda: _result(out, list(shards), stages[2]))


def _checked(kind: Hash) -> Hash:
    if not 0 <= kind.max_distance <= _LARGEST_DISTANCE:
        raise UserError(f"max_distance={kind.max_distance}: must be 0 to {_LARGEST_DISTANCE} of 64 bits")
    if not 0 <= kind.max_check <= CHECK_BITS:
        raise UserError(f"max_check={kind.max_check}: must be 0 to {CHECK_BITS} bits")
    return kind


def _with_images(shard: PoolShard) -> PoolShard:
    if shard.images is None:
        raise UserError(f"{shard.captions}: there is no {Path(shard.name).name}.tar with its images beside it")
    return shard


def _stages(out: Path, shards: Mapping[str, PoolShard], hashes: list[Hash]) -> list[Stage]:
    names = list(shards)
    hashed, removed = out / HASHED, out / REMOVED
    # Links number the images of all shards, so another set of shards has other links.
    digest = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    links = out / "search" / digest
    others = tuple(path for path in links.parent.glob("[0-9a-f]" * len(digest)) if path != links)
    parts = {f"{part:03d}": part for part in range(min(max(_FEWEST_PARTS, len(names)), _MOST_PARTS))}
    search = SearchPart(hashed, links, names, hashes, len(parts))
    group = GroupCopies(hashed, links, removed, names, list(parts))
    codes = [CODES.replace("{hash}", kind.name) for kind in hashes]
    stats = out / "stats"
    found = (*others, links / "groups.json", stats)
    return [
        Stage("hash", hashed, shards, HashShard(hashed), (IMAGES, *codes, STATS), invalidates=(links, *found)),
        Stage("search", links.parent, parts, search, (f"{digest}/{{shard}}.npy",), "parts", invalidates=found),
        Stage("group", links.parent, {"groups": None}, group, (f"{digest}/{{shard}}.json",), invalidates=(stats,)),
        Stage("write", out, shards, WriteShard(out), (STATS,)),
    ]


def _result(out: Path, shards: list[str], grouping: Stage) -> dict[str, Any]:
    path = grouping.folder / grouping.outputs[0].replace("{shard}", "groups")
    groups = read_json(path, _Groups, cure=REDO)
    counters = sum_kept(out, shards, "images", DedupStats)
    return {**counters, "groups": groups.groups, "largest_group": groups.largest_group}


def _samples(index: TarIndex) -> list[Sample]:
    """The samples of a tar that have an image, in order."""
    return [sample for sample in index.listing.samples.values() if sample.image is not None]


@dataclass(frozen=True)
class HashShard:
    """Hashes the images of one shard."""

    out: Path

    def __call__(self, name: str, shard: PoolShard) -> None:
        assert shard.images is not None
        rows: list[tuple[str, int, int, str | None]] = []
        codes: list[Entries] = []
        with TarIndex(shard.images) as index:
            for sample in _samples(index):
                assert sample.image is not None
                data = index.read(sample.image)
                key = sample.key.encode("utf-8", "replace").decode()
                try:
                    entries = view_codes(data)
                    width, height = open_image(data).size
                except Dropped as dropped:
                    rows.append((key, 0, 0, str(dropped.reason)))
                    continue
                entries["image"] = len(rows)
                codes.append(entries)
                rows.append((key, width * height, len(data), None))
        columns = zip(*rows, strict=True) if rows else ((), (), (), ())
        table = pa.table(dict(zip(("key", "pixels", "bytes", "reason"), map(list, columns), strict=True)))
        write_codes(self.out, name, PHASH, codes)
        write_images(self.out, name, table)
        write_json(stats_path(self.out, name), {"images_read": len(rows)})


@dataclass(frozen=True)
class WriteShard:
    """Copies one shard without the images to remove."""

    out: Path

    def is_current(self, shard: str) -> bool:
        """Whether the shard's tar exists, or no images are left in it."""
        stats = read_json(stats_path(self.out, shard), DedupStats, cure=REDO)
        return stats.images == 0 or (self.out / f"{shard}.tar").is_file()

    def __call__(self, name: str, shard: PoolShard) -> None:
        assert shard.images is not None
        reasons = read_images(self.out / HASHED, name)["reason"].to_pylist()
        for row in rows_to_remove(self.out / REMOVED, name).tolist():
            reasons[row] = Drop.DUPLICATE_IMAGE
        with TarIndex(shard.images) as index:
            samples = _samples(index)
            if len(samples) != len(reasons):
                stats = stats_path(self.out / HASHED, name)
                raise UserError(f"{shard.images}: has changed since it was hashed; delete {stats} to hash it again")
            unwanted = [sample for sample, reason in zip(samples, reasons, strict=True) if reason is not None]
            drops = Counter(reason for reason in reasons if reason is not None)
            images = copy_without(shard, index, self.out, _names(unwanted), drops)
        counters = {"images_read": len(samples), "images": images, "drops": dict(+drops)}
        write_json(stats_path(self.out, name), counters)


def _names(samples: list[Sample]) -> set[str]:
    """The keys of samples, and the names of their files up to the last dot, which may be longer."""
    members = [member for sample in samples for member in (sample.image, sample.caption, sample.record)]
    return {sample.key for sample in samples} | {key_of(member) for member in members if member is not None}
