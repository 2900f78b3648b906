"""Stage 3: the images of a matched pool, and its rows, as training shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mc2_hpc.curation.match import planned_settings, read_settings
from mc2_hpc.curation.matched import read_matched, write_matched
from mc2_hpc.curation.pool.captions import list_pool
from mc2_hpc.curation.pool.image_tars import TarIndex
from mc2_hpc.errors import UserError
from mc2_hpc.jobs.engines import Engine
from mc2_hpc.jobs.stages import REDO, Progress, Stage, open_stage, run_stages, stats_path, sum_stats
from mc2_hpc.reading.json_file import Count, File, Foreign, read_json
from mc2_hpc.storage import atomic_path, write_json
from mc2_hpc.tar import escapes, fits_tar_name, write_tar

SETTINGS = "pack.json"


class PackSettings(Foreign):
    """``pack.json``, as far as reports ask for it."""

    shards: list[str]


class PackStats(File):
    """``stats/<shard>.json`` of a folder of training shards."""

    images: Count
    texts: Count
    drops: dict[str, Count]


def pack(
    pool: str | Path,
    matched: str | Path,
    out: str | Path,
    *,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> dict[str, Any] | None:
    """Write training shards: ``<shard>.tar`` of ``<key>.jpg`` in key order, the matched rows in ``<shard>.parquet``.

    Only images with a matched row are written; a shard without any gets no files. Shards already finished are skipped.
    The rows of a shard and the names in its tar are held in memory, its images one at a time.

    Args:
        pool: the folder that was matched; its ``<shard>.tar`` hold the images.
        matched: folder that :func:`~mc2_hpc.curation.match.match` filled, every shard of it finished.
        engine: where the work is done; one worker of this machine by default.

    Returns:
        counters over all shards: ``images``, ``texts`` and ``drops`` by reason: ``missing_image`` (matched, not in the
        tar), ``unmatched_image``, ``unsafe_name`` (would escape its folder), ``long_name``, ``duplicate_image``,
        ``unsupported_image`` (no JPEG); None where the work was only submitted to Slurm

    Raises:
        UserError: unfinished input, or shards that could not be read (every other one is done).
    """
    read_settings(Path(matched))
    stages = plan_pack(pool, matched, out)
    if not run_stages(stages, engine, progress):
        return None
    return sum_stats(Path(out), list(stages[-1].shards), PackStats)


def plan_pack(pool: str | Path, matched: str | Path, out: str | Path) -> list[Stage]:
    """The stages of :func:`pack` for a pool whose shards may still have to be matched."""
    matched, out = Path(matched).absolute(), Path(out).absolute()
    settings = planned_settings(matched)
    in_pool = {shard.name: shard.images for shard in list_pool(Path(pool).absolute())}
    shards = settings.pop("shards")
    open_stage(out, SETTINGS, {"matched": settings}, shards)
    tars = {name: in_pool.get(name) for name in shards}
    return [Stage("pack", out, tars, _PackShard(matched, out), partial(_is_packed, out))]


def _is_packed(out: Path, shard: str) -> bool:
    path = stats_path(out, shard)
    if not path.is_file():
        return False
    return read_json(path, PackStats, cure=REDO).images == 0 or all(
        (out / f"{shard}.{kind}").is_file() for kind in ("tar", "parquet")
    )


@dataclass(frozen=True)
class _PackShard:
    """Packs one shard; picklable."""

    matched: Path
    out: Path

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
