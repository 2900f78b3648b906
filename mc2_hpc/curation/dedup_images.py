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

from mc2_hpc.curation.copies.features import encoder_settings
from mc2_hpc.curation.copies.hashes import (
    CODES,
    FEATURE_CHECK,
    FEATURE_DISTANCE,
    FEATURES,
    IMAGES,
    MAX_CHECK,
    MAX_DISTANCE,
    PHASH,
    PROJECTIONS,
    Hash,
    HashStats,
    checked_hash,
    read_images,
)
from mc2_hpc.curation.copies.hashing import HashShard, samples_with_images, text_of
from mc2_hpc.curation.copies.search import (
    CODES_PER_GB,
    FeatureCodes,
    GroupCopies,
    SearchPart,
    WriteCentre,
    rows_to_remove,
)
from mc2_hpc.curation.filtering.record import pool_filters
from mc2_hpc.curation.pool.captions import DEDUP_SETTINGS, PoolShard, list_pool
from mc2_hpc.curation.pool.copying import check_elsewhere, copy_without, key_of, require_images
from mc2_hpc.curation.pool.image_tars import TarIndex
from mc2_hpc.drops import Drop
from mc2_hpc.errors import UserError
from mc2_hpc.jobs import REDO, STATS, Plan, Stage, open_folder, stats_path, sum_kept
from mc2_hpc.jobs.named import Named
from mc2_hpc.reading.json_file import Count, File, Foreign, read_json
from mc2_hpc.samples import Sample
from mc2_hpc.shard_paths import Names
from mc2_hpc.storage import fingerprint, write_json

HASHED, REMOVED = "hashes", "removed"
_GROUPING = "group"
_FEWEST_PARTS, _MOST_PARTS = 16, 1000


class DedupStats(File):
    """``stats/<shard>.json`` of a folder of de-duplicated shards."""

    images_read: Count
    images: Count
    texts: Count
    """Rows of the Parquet file; 0 for a plain tar."""
    drops: dict[str, Count]


class _Groups(Foreign):
    """Counters of grouping."""

    groups: Count
    largest_group: Count


def plan_dedup_images(
    pool: Names,
    out: str | Path,
    *,
    max_distance: int = MAX_DISTANCE,
    max_check: int = MAX_CHECK,
    features: Named | None = None,
    feature_distance: int = FEATURE_DISTANCE,
    feature_check: int = FEATURE_CHECK,
    memory_gb: int = 2,
) -> Plan:
    """Copy a pool's shards without images that are copies of others.

    Writes ``<shard>.tar`` and, if the shard has one, ``<shard>.parquet``; kept files keep their bytes. Of each group of
    copies, the one with the most pixels stays, then the largest file, then the first key: see
    ``removed/<shard>.csv``. A shard without any image left gets no files. Finished shards are skipped.

    Args:
        pool: shards with images: tars beside Parquet files of captions, or plain WebDataset tars.
        max_distance: bits in which the pHashes of some views of two copies may differ.
        max_check: bits in which the 192 bits that confirm them may differ.
        features: an encoder (:func:`~mc2_hpc.curation.copies.features.parse_encoder`), to compare images by the hashes
            of its features too; ``feature_distance`` and ``feature_check`` are the same for these.
        memory_gb: that the codes take in each worker of the search; the more, the fewer times they are read.

    Returns:
        stages, whose result is counters: ``images_read``; ``images`` and ``texts`` kept; ``groups`` of two or more
        copies and the size of the ``largest_group``; and ``drops`` by reason: ``duplicate_image``, those of images that
        cannot be decoded, ``name_too_long`` (does not fit a ustar header), ``name_repeated`` (a second file of the same
        name)

    Raises:
        UserError: no pool, a shard without images, or a folder made with other settings; when the result is computed,
            if nothing was kept.
    """
    out = Path(out).absolute()
    hashes = [checked_hash(Hash(PHASH, max_distance, max_check))]
    if features is not None:
        hashes.append(checked_hash(Hash(FEATURES, feature_distance, feature_check)))
    shards = {shard.name: shard for shard in list_pool(pool)}
    require_images(shards.values())
    check_elsewhere(shards.values(), out)
    settings: dict[str, Any] = {"hashes": {kind.name: asdict(kind) for kind in hashes}, **encoder_settings(features)}
    if earlier := pool_filters(list(shards.values())):
        settings["pool_filters"] = earlier
    for folder in (out, out / HASHED):
        open_folder(folder, DEDUP_SETTINGS, settings, list(shards))
    stages = _stages(out, shards, hashes, features, memory_gb * CODES_PER_GB)
    grouping = next(stage for stage in stages if stage.name == _GROUPING)
    return Plan(tuple(stages), result=lambda: _result(out, list(shards), grouping))


def _stages(
    out: Path, shards: Mapping[str, PoolShard], hashes: list[Hash], features: Named | None, codes_at_once: int
) -> list[Stage]:
    names = list(shards)
    hashed, removed = out / HASHED, out / REMOVED
    # Links number the images of all shards, so another set of shards has other links, in another folder.
    digest = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    links = out / "search" / digest
    others = tuple(path for path in links.parent.glob("[0-9a-f]" * len(digest)) if path != links)
    parts = {f"{part:03d}": part for part in range(min(max(_FEWEST_PARTS, len(names)), _MOST_PARTS))}
    folders = {PHASH: hashed, FEATURES: links}
    kinds = [(folders[kind.name], kind) for kind in hashes]
    search = SearchPart(hashed, links, names, kinds, len(parts), codes_at_once)
    group = GroupCopies(hashed, links, removed, names, list(parts))
    stats = out / "stats"
    found = (*others, links / "groups.json", stats)
    written = [IMAGES, CODES.replace("{hash}", PHASH), *([PROJECTIONS] if features is not None else []), STATS]
    stages = [Stage("hash", hashed, shards, HashShard(hashed, features), tuple(written), invalidates=(links, *found))]
    if features is not None:
        centre, codes = WriteCentre(hashed, links, names), FeatureCodes(hashed, links)
        files = (f"{digest}/{{shard}}.npy", f"{digest}/{CODES.replace('{hash}', FEATURES)}")
        stages += [
            Stage("centre", links.parent, {"centre": None}, centre, files[:1], invalidates=found),
            Stage("feature codes", links.parent, dict.fromkeys(names), codes, files[1:], invalidates=found),
        ]
    return [
        *stages,
        Stage("search", links.parent, parts, search, (f"{digest}/{{shard}}.npy",), "parts", invalidates=found),
        Stage(_GROUPING, links.parent, {"groups": None}, group, (f"{digest}/{{shard}}.json",), invalidates=(stats,)),
        Stage("write", out, shards, WriteShard(out), (STATS,)),
    ]


def _result(out: Path, shards: list[str], grouping: Stage) -> dict[str, Any]:
    path = grouping.folder / grouping.outputs[0].replace("{shard}", "groups")
    groups = read_json(path, _Groups, cure=REDO)
    counters = sum_kept(out, shards, "images", DedupStats)
    return {**counters, "groups": groups.groups, "largest_group": groups.largest_group}


@dataclass(frozen=True)
class WriteShard:
    """Copies one shard without the images to remove."""

    out: Path

    def is_current(self, shard: str, value: object) -> bool:
        """Whether the shard's files exist, or no images are left in it."""
        stats = read_json(stats_path(self.out, shard), DedupStats, cure=REDO)
        wanted = {"tar": stats.images, "parquet": stats.texts}
        return all((self.out / f"{shard}.{kind}").is_file() for kind, count in wanted.items() if count)

    def __call__(self, name: str, shard: PoolShard) -> None:
        assert shard.images is not None
        hashed = read_images(self.out / HASHED, name)
        reasons = hashed["reason"].to_pylist()
        for row in rows_to_remove(self.out / REMOVED, name).tolist():
            reasons[row] = Drop.DUPLICATE_IMAGE
        with TarIndex(shard.images) as index:
            samples = samples_with_images(index)
            if not self._is_as_hashed(name, shard, samples, hashed):
                raise UserError(f"{shard.images}: has changed since it was hashed; run the same command again")
            unwanted = [sample for sample, reason in zip(samples, reasons, strict=True) if reason is not None]
            drops = Counter(reason for reason in reasons if reason is not None)
            images, texts = copy_without(shard, index, self.out, _names(unwanted), drops)
        counters = {"images_read": len(samples), "images": images, "texts": texts, "drops": dict(+drops)}
        write_json(stats_path(self.out, name), counters)

    def _is_as_hashed(self, name: str, shard: PoolShard, samples: list[Sample], hashed: pa.Table) -> bool:
        """Whether the shard's images are those that were hashed, by the tar as a whole and by the key and size of
        each."""
        stats = read_json(stats_path(self.out / HASHED, name), HashStats, cure=REDO)
        if stats.made_of != fingerprint((shard.images,)):
            return False
        images = [(text_of(one.key), one.image.size) for one in samples if one.image is not None]
        facts = zip(hashed["key"].to_pylist(), hashed["bytes"].to_pylist(), hashed["reason"].to_pylist(), strict=True)
        return len(images) == len(hashed) and all(
            key == known and (reason is not None or size == known_size)
            for (key, size), (known, known_size, reason) in zip(images, facts, strict=True)
        )


def _names(samples: list[Sample]) -> set[str]:
    """The keys of samples, and the names of their files up to the last dot, which may be longer."""
    members = [member for sample in samples for member in (sample.image, sample.caption, sample.record)]
    return {sample.key for sample in samples} | {key_of(member) for member in members if member is not None}
