"""Copying a shard without some of its images, and what all stages that write shards heed."""

from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from mc2_hpc.caption_tables import KEY, column_types, is_caption_table
from mc2_hpc.curation.matched import write_matched
from mc2_hpc.curation.pool.captions import PoolShard
from mc2_hpc.curation.pool.image_tars import TarIndex
from mc2_hpc.drops import Drop
from mc2_hpc.errors import UserError
from mc2_hpc.reading.parquet_file import open_parquet
from mc2_hpc.samples import ByKey, is_image_name
from mc2_hpc.storage import atomic_path
from mc2_hpc.tar import Member, fits_tar_name, write_tar


def require_images(shards: Iterable[PoolShard]) -> None:
    """Raises UserError if a shard has no images."""
    for shard in shards:
        if shard.images is None:
            raise UserError(f"{shard.captions}: there is no {Path(shard.name).name}.tar with its images beside it")


def check_elsewhere(shards: Iterable[PoolShard], out: Path) -> None:
    """Check that shards written to ``out`` under the same names would not replace those that are read.

    Raises:
        UserError: they would.
    """
    for shard in shards:
        for file in (shard.captions, shard.images):
            if file is not None and file.resolve() == (out / f"{shard.name}{file.suffix}").resolve():
                raise UserError(f"--out {out}: holds the shards that are read; name another folder")


def remove_shard(out: Path, shard: str) -> None:
    """Remove the files that an earlier run wrote of a shard of which nothing is kept now."""
    for kind in ("tar", "parquet"):
        (out / f"{shard}.{kind}").unlink(missing_ok=True)


def copy_without(
    shard: PoolShard, index: TarIndex, out: Path, keys: Collection[str], drops: Counter[str]
) -> tuple[int, int]:
    """Write ``<shard>.tar`` and, if the shard has one, ``<shard>.parquet`` below ``out``, without the files and rows of
    ``keys`` (file names up to the last dot); returns the numbers of images and rows written.

    Files keep their bytes and order. A shard without images gets no files, and loses those of an earlier run.
    ``drops`` counts ``name_repeated`` and ``name_too_long``; the rows and other files of an image whose name is too
    long go with it.
    """
    unwanted = set(keys)
    files = first_of_name(index)
    drops[Drop.NAME_REPEATED] += len(index.members) - len(files)
    kept = [member for member in files if key_of(member) not in unwanted]
    too_long = [member for member in kept if not fits_tar_name(member.name)]
    drops[Drop.NAME_TOO_LONG] += len(too_long)
    unwanted |= {key_of(member) for member in too_long if is_image_name(member.name)}
    fitting = [member for member in kept if fits_tar_name(member.name) and key_of(member) not in unwanted]
    num_images = sum(is_image_name(member.name) for member in fitting)
    if not num_images:
        remove_shard(out, shard.name)
        return 0, 0
    num_rows = 0
    if shard.captions is not None and is_caption_table(shard.captions):
        rows = _rows_without(shard.captions, unwanted)
        num_rows = len(rows)
        write_matched(out / f"{shard.name}.parquet", rows)
    with atomic_path(out / f"{shard.name}.tar") as temporary:
        write_tar(temporary, ((member.name, index.read(member)) for member in fitting))
    return num_images, num_rows


def first_of_name(index: TarIndex) -> list[Member]:
    """The members in order, without those that repeat a name."""
    members = {member.name: member for member in reversed(index.members)}
    return [member for member in index.members if members[member.name] is member]


def key_of(member: Member) -> str:
    """A file's name up to its last dot, without a leading ``./``."""
    return member.name.removeprefix("./").rpartition(".")[0]


def _rows_without(path: Path, keys: set[str]) -> pa.Table:
    with open_parquet(path, {KEY: column_types()[KEY]}, what="the rows of a shard") as file:
        table = file.read()
    unwanted = ByKey((key, True) for key in keys)
    column = table[KEY].cast(pa.string()).to_pylist()
    return table.filter(pa.array(np.fromiter((unwanted.get(key or "") is None for key in column), bool, len(column))))
