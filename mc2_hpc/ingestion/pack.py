"""``mc2 data pack``: images and captions of any kind of source as training shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from mc2_hpc.curation.pool.captions import PoolShard, list_pool
from mc2_hpc.curation.pool.copying import check_elsewhere
from mc2_hpc.curation.pool.image_tars import TarIndex
from mc2_hpc.errors import UserError
from mc2_hpc.ingestion.columns import Columns
from mc2_hpc.ingestion.folder import list_folder
from mc2_hpc.ingestion.image_files import ImageFolder, split_by_image
from mc2_hpc.ingestion.listing import deal, read_listing, write_listing
from mc2_hpc.ingestion.rows import RowsPart, cut_rows, part_samples
from mc2_hpc.ingestion.samples import PackOptions, PackStats, write_samples
from mc2_hpc.ingestion.source import Kind, Source, recognise
from mc2_hpc.ingestion.table import list_tables
from mc2_hpc.ingestion.webdataset import tar_samples
from mc2_hpc.jobs import REDO, STATS, Plan, Stage, open_folder, stats_path, sum_kept
from mc2_hpc.jobs.named import to_plain
from mc2_hpc.reading.json_file import Foreign, read_json
from mc2_hpc.shard_paths import Names
from mc2_hpc.storage import file_sha256, fingerprint

SETTINGS = "data_pack.json"
IMAGES_PER_SHARD = 1000


class _MadeOf(Foreign):
    made_of: str


def plan_pack(
    source: Names,
    out: str | Path,
    *,
    images: str | Path | None = None,
    columns: Columns | None = None,
    options: PackOptions | None = None,
    images_per_shard: int = IMAGES_PER_SHARD,
    allow_outside: bool = False,
) -> Plan:
    """Write ``<shard>.tar`` with the images and ``<shard>.parquet`` with their captions (``key``, ``text``, ``lang``).

    Images keep their bytes, unless ``options.resize`` is set, and are decoded once, so that none is stored that
    training would skip. Files and tables are listed here. Shards that are already packed are skipped, unless a file
    that they are made of was written again since; images that rows name by path are not looked at for that.

    Args:
        source: see :mod:`mc2_hpc.ingestion.source`.
        images: folder that names of images are relative to; None is the folder of the table.
        columns: of the table; None recognises them by name.
        images_per_shard: of files and rows; tars are packed one by one.
        allow_outside: names in tables, and links that they name, may lead out of ``images``.

    Returns:
        a stage, whose result is counters over all shards: ``images``, ``texts``, ``formats``, ``languages`` and
        ``drops`` by reason (:data:`mc2_hpc.drops.MEANINGS`). Each image of the source is kept or one drop; each
        caption of a kept image is kept or one drop.

    Raises:
        UserError: not a known source, one in ``out`` that would be written over, or a folder made with other settings;
            when the result is computed, if nothing was kept.
    """
    out, columns, options = Path(out).absolute(), columns or Columns(), options or PackOptions()
    found = recognise(source)
    folder = _image_folder(found, images, allow_outside)
    settings: dict[str, Any] = {
        "source": str(source),
        "kind": found.kind.name.lower(),
        "images": None if images is None else str(images),
        "columns": {**to_plain(columns), "captions": list(columns.captions)},
        "options": to_plain(options),
        "images_per_shard": images_per_shard,
        "allow_outside": allow_outside,
    }
    drops: Counter[str] = Counter()
    listings: dict[str, pa.Table] = {}
    inputs: Mapping[str, Any]
    work: PackFiles | PackTar | PackRows
    pool: list[PoolShard] = []
    if found.kind is Kind.TARS:
        pool = list_pool(source)
        inputs = {shard.name: shard.images for shard in pool if shard.images is not None}
        work = PackTar(out, options)
    elif found.kind is Kind.ROWS:
        parts = cut_rows(list(found.files), columns, images_per_shard)
        inputs = {f"{number:05d}": part for number, part in enumerate(parts)}
        settings["files"] = {file.name: file.stat().st_size for file in found.files}
        work = PackRows(out, folder, columns, options)
    else:
        is_folder = found.kind is Kind.FOLDER
        rows, drops = list_folder(folder.path) if is_folder else list_tables(found.files, folder.path, columns)
        listings = dict(deal(rows, images_per_shard))
        inputs = {shard: _listing(out, shard) for shard in listings}
        work = PackFiles(out, folder, options)
    # A table or a file of rows may be named like one of the shards.
    check_elsewhere([*pool, *(PoolShard(file.stem, file, None) for file in found.files if file.stem in inputs)], out)
    open_folder(out, SETTINGS, settings, list(inputs))
    for shard, rows in listings.items():
        write_listing(_listing(out, shard), rows)
    stage = Stage("pack", out, inputs, work, (STATS,))
    return Plan((stage,), result=lambda: _result(out, list(inputs), drops))


def _image_folder(found: Source, images: str | Path | None, allow_outside: bool) -> ImageFolder:
    if images is None:
        # The links in a folder are its owner's; the names in a table may be anybody's.
        return ImageFolder(found.folder, allow_outside or found.kind is Kind.FOLDER)
    if found.kind in (Kind.FOLDER, Kind.TARS):
        raise UserError("--images is for tables; this source has its images itself")
    if not Path(images).is_dir():
        raise UserError(f"--images {images}: no such folder")
    return ImageFolder(Path(images).absolute(), allow_outside)


def _listing(out: Path, shard: str) -> Path:
    return out / "listing" / f"{shard}.parquet"


def _result(out: Path, shards: list[str], drops: Counter[str]) -> dict[str, Any]:
    try:
        total = sum_kept(out, shards, "images", PackStats)
    except UserError as error:
        listed = ", ".join(f"{reason} {count:,}" for reason, count in drops.most_common())
        raise UserError(f"{error}{f'; while listing: {listed}' if listed else ''}") from None
    total["drops"] = dict(sorted((Counter(total["drops"]) + drops).items()))
    return total


def _is_packed(out: Path, shard: str, made_of: str) -> bool:
    """Whether the shard's files exist, made of the same content, or it has no images."""
    path = stats_path(out, shard)
    if read_json(path, _MadeOf, cure=REDO).made_of != made_of:
        return False
    if read_json(path, PackStats, cure=REDO).images == 0:
        return True
    return all((out / f"{shard}.{kind}").is_file() for kind in ("tar", "parquet"))


@dataclass(frozen=True)
class PackFiles:
    """Packs image files that a listing names."""

    out: Path
    folder: ImageFolder
    options: PackOptions

    def is_current(self, shard: str, listing: Path) -> bool:
        """Whether the shard was packed by the listing, of the files as they are now."""
        return _is_packed(self.out, shard, self._made_of(listing))

    def __call__(self, name: str, listing: Path) -> None:
        samples = (
            self.folder.sample(key, rows)
            for key, rows_of_key in read_listing(listing)
            for rows in split_by_image(rows_of_key)
        )
        made_of = self._made_of(listing)
        write_samples(self.out, name, samples, self.options, drops=Counter(), made_of=made_of)

    def _made_of(self, listing: Path) -> str:
        named = (
            row[file]
            for _, rows in read_listing(listing)
            for row in rows
            for file in ("image", "caption_file", "record_file")
        )
        files = (None if name is None else self.folder.path / name for name in dict.fromkeys(named))
        return f"{file_sha256(listing)} {fingerprint(files)}"


@dataclass(frozen=True)
class PackTar:
    """Packs a WebDataset shard."""

    out: Path
    options: PackOptions

    def is_current(self, shard: str, tar: Path) -> bool:
        """Whether the shard was packed of the tar, and the table beside it, as they are now."""
        return _is_packed(self.out, shard, self._made_of(tar))

    def __call__(self, name: str, tar: Path) -> None:
        drops: Counter[str] = Counter()
        made_of = self._made_of(tar)
        with TarIndex(tar) as index:
            samples = tar_samples(name, tar, index, drops)
            write_samples(self.out, name, samples, self.options, drops=drops, made_of=made_of)

    @staticmethod
    def _made_of(tar: Path) -> str:
        return fingerprint((tar, tar.with_suffix(".parquet")))


@dataclass(frozen=True)
class PackRows:
    """Packs a part of a file whose rows hold images."""

    out: Path
    folder: ImageFolder
    columns: Columns
    options: PackOptions

    def is_current(self, shard: str, part: RowsPart) -> bool:
        """Whether the shard was packed of the same part of the file as it is now."""
        return _is_packed(self.out, shard, self._made_of(part))

    def __call__(self, name: str, part: RowsPart) -> None:
        made_of = self._made_of(part)
        samples = part_samples(part, self.columns, self.folder)
        write_samples(self.out, name, samples, self.options, drops=Counter(), made_of=made_of)

    @staticmethod
    def _made_of(part: RowsPart) -> str:
        return f"{fingerprint((part.file,))} {part.begin} {part.end}"
