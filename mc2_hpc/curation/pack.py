"""Stage 3: the images of a matched pool, and its rows, as training shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from mc2_hpc.curation.matched import planned_settings, read_matched, read_settings, write_matched
from mc2_hpc.curation.pool.captions import list_pool
from mc2_hpc.curation.pool.image_tars import TarIndex
from mc2_hpc.errors import UserError
from mc2_hpc.jobs import STATS, Plan, Stage, open_folder, stats_path, sum_stats
from mc2_hpc.storage import atomic_path, read_json, write_json
from mc2_hpc.tar import escapes, fits_tar_name, write_tar

SETTINGS = "pack.json"


def plan_pack(pool: str | Path, matched: str | Path, out: str | Path, *, after_match: bool = False) -> Plan:
    """Write training shards: ``<shard>.tar`` of ``<key>.jpg`` in key order, the matched rows in ``<shard>.parquet``.

    Only images with a matched row are written; a shard without any gets no files. Shards already finished are skipped.
    The rows of a shard and the names in its tar are held in memory, its images one at a time.

    Args:
        pool: the folder that was matched; its ``<shard>.tar`` hold the images.
        matched: folder that :func:`~mc2_hpc.curation.match.plan_match` fills, every shard of it finished.
        after_match: the same plan matches first, so shards may be unfinished now.

    Returns:
        stages, and as their result counters over all shards: ``images``, ``texts`` and ``drops`` by reason:
        ``missing_image`` (matched, not in the tar), ``unmatched_image``, ``unsafe_name`` (would escape its folder),
        ``long_name``, ``duplicate_image``, ``unsupported_image`` (not a JPEG)

    Raises:
        UserError: unfinished input.
    """
    matched, out = Path(matched).absolute(), Path(out).absolute()
    settings = planned_settings(matched) if after_match else read_settings(matched)
    in_pool = {shard.name: shard.images for shard in list_pool(Path(pool).absolute())}
    shards = settings.pop("shards")
    open_folder(out, SETTINGS, {"matched": settings}, shards)
    tars = {name: in_pool.get(name) for name in shards}
    stage = Stage("pack", out, tars, PackShard(matched, out), (STATS,))
    return Plan((stage,), result=lambda: sum_stats(out, shards))


@dataclass(frozen=True)
class PackShard:
    """Packs one shard."""

    matched: Path
    out: Path

    def is_current(self, shard: str) -> bool:
        """Whether the shard's files are there, if it has images."""
        if read_json(stats_path(self.out, shard))["images"] == 0:
            return True
        return all((self.out / f"{shard}.{kind}").is_file() for kind in ("tar", "parquet"))

    def __call__(self, name: str, tar: Path | None) -> None:
        rows = read_matched(self.matched / f"{name}.parquet")
        if tar is None:
            raise UserError(f"the pool has no {name}.tar with the images of {self.matched / name}.parquet")
        with TarIndex(tar) as index:
            images, drops = index.images()
            images = _usable(images, set(rows["key"].to_pylist()), drops)
            rows = rows.filter(pc.is_in(rows["key"], pa.array(list(images), pa.string())))
            rows = rows.sort_by([("key", "ascending"), ("text", "ascending")])
            if images:
                with atomic_path(self.out / f"{name}.tar") as temporary:
                    write_tar(temporary, _files(index, images))
                write_matched(self.out / f"{name}.parquet", rows)
        stats = {"images": len(images), "texts": len(rows), "drops": dict(drops)}
        write_json(stats_path(self.out, name), stats)


def _usable(images: dict[str, str], wanted: set[str], drops: Counter[str]) -> dict[str, str]:
    """Images to write, by key; the others are counted in ``drops``."""
    usable = {}
    for key, member in images.items():
        if escapes(key):
            drops["unsafe_name"] += 1
        elif key not in wanted:
            drops["unmatched_image"] += 1
        elif not fits_tar_name(f"{key}.jpg"):
            drops["long_name"] += 1
            wanted = wanted - {key}
        else:
            usable[key] = member
    missing = len(wanted - usable.keys())
    if missing:
        drops["missing_image"] += missing
    return usable


def _files(index: TarIndex, images: dict[str, str]) -> Iterator[tuple[str, bytes]]:
    for key in sorted(images):
        yield f"{key}.jpg", index.read(images[key])
