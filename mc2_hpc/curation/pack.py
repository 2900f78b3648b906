"""Stage 3: the images and rows of a matched pool as training shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from mc2_hpc.curation.matched import planned_settings, read_matched, read_settings, write_matched
from mc2_hpc.curation.pool.captions import PoolShard, list_pool
from mc2_hpc.curation.pool.copying import check_elsewhere, remove_shard
from mc2_hpc.curation.pool.image_tars import TarIndex, packed_name, writable_images
from mc2_hpc.drops import Drop
from mc2_hpc.errors import UserError
from mc2_hpc.jobs import REDO, STATS, Plan, Stage, open_folder, stats_path, sum_kept
from mc2_hpc.reading.json_file import Count, File, Foreign, read_json
from mc2_hpc.shard_paths import Names
from mc2_hpc.storage import atomic_path, write_json
from mc2_hpc.tar import Member, write_tar

SETTINGS = "pack.json"


class PackSettings(Foreign):
    """``pack.json``, as far as reports need it."""

    shards: list[str]


class PackStats(File):
    """``stats/<shard>.json`` of a folder of training shards."""

    images: Count
    texts: Count
    drops: dict[str, Count]


def plan_pack(pool: Names, matched: str | Path, out: str | Path, *, after_match: bool = False) -> Plan:
    """Write training shards: images in key order in ``<shard>.tar``, the matched rows in ``<shard>.parquet``.

    Images keep their bytes and format: ``<key>.jpg``, ``<key>.png``, ... Only images with a matched row are written; a
    shard without any gets no files. Finished shards are skipped.
    A shard's rows and the names in its tar are held in memory; its images are read one at a time.

    Args:
        pool: the folder that was matched; its ``<shard>.tar`` files hold the images.
        matched: folder that :func:`~mc2_hpc.curation.match.plan_match` fills, with every shard finished.
        after_match: the same plan matches first, so shards may be unfinished now.

    Returns:
        stages, whose result is counters over all shards: ``images``, ``texts`` and ``drops`` by reason
        (:data:`mc2_hpc.drops.MEANINGS`): ``image_missing``, ``image_unmatched``, ``image_repeated``,
        ``image_unsupported``, ``name_unsafe``, ``name_too_long``

    Raises:
        UserError: unfinished input, or input in ``out``; when the result is computed, if no image was written.
    """
    matched, out = Path(matched).absolute(), Path(out).absolute()
    settings = planned_settings(matched) if after_match else read_settings(matched)
    found = list_pool(pool)
    in_pool = {shard.name: shard.images for shard in found}
    shards = settings.pop("shards")
    check_elsewhere([*found, *(PoolShard(name, matched / f"{name}.parquet", None) for name in shards)], out)
    open_folder(out, SETTINGS, {"matched": settings}, shards)
    tars = {name: in_pool.get(name) for name in shards}
    stage = Stage("pack", out, tars, PackShard(matched, out), (STATS,))
    return Plan((stage,), result=lambda: sum_kept(out, shards, "images", PackStats))


@dataclass(frozen=True)
class PackShard:
    """Packs one shard."""

    matched: Path
    out: Path

    def is_current(self, shard: str, value: object) -> bool:
        """Whether the shard's files exist, or it has no images."""
        if read_json(stats_path(self.out, shard), PackStats, cure=REDO).images == 0:
            return True
        return all((self.out / f"{shard}.{kind}").is_file() for kind in ("tar", "parquet"))

    def __call__(self, name: str, tar: Path | None) -> None:
        rows = read_matched(self.matched / f"{name}.parquet")
        if tar is None:
            raise UserError(f"the pool has no {name}.tar with the images of {self.matched / name}.parquet")
        with TarIndex(tar) as index:
            drops = Counter(index.listing.drops)
            images, missing, unused = writable_images(index.listing, rows["key"].unique().to_pylist())
            drops.update(missing.values())
            drops.update({Drop.IMAGE_UNMATCHED: unused} if unused else {})
            rows = rows.filter(pc.is_in(rows["key"], pa.array(list(images), pa.string())))
            rows = rows.sort_by([("key", "ascending"), ("text", "ascending")])
            if images:
                with atomic_path(self.out / f"{name}.tar") as temporary:
                    write_tar(temporary, _files(index, images))
                write_matched(self.out / f"{name}.parquet", rows)
            else:
                remove_shard(self.out, name)
        stats = {"images": len(images), "texts": len(rows), "drops": dict(drops)}
        write_json(stats_path(self.out, name), stats)


def _files(index: TarIndex, images: dict[str, Member]) -> Iterator[tuple[str, bytes]]:
    for key in sorted(images):
        yield packed_name(key, images[key]), index.read(images[key])
