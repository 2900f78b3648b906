"""Images from the addresses in a pool: one tar per shard beside its captions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mc2_hpc.caption_tables import KEY, SOURCE, column_types
from mc2_hpc.curation.fetching.options import FetchOptions
from mc2_hpc.curation.filters import counted
from mc2_hpc.curation.pool.captions import FETCH_SETTINGS, OUTCOMES, PoolShard, iter_captions, list_pool
from mc2_hpc.curation.pool.copying import check_elsewhere, remove_shard
from mc2_hpc.errors import UserError
from mc2_hpc.jobs import REDO, STATS, Plan, Stage, open_folder, stats_path, sum_kept
from mc2_hpc.reading.json_file import Count, File, read_json
from mc2_hpc.reading.parquet_file import open_parquet
from mc2_hpc.shard_paths import Names
from mc2_hpc.storage import atomic_path, remove_folder, write_json, write_table
from mc2_hpc.tar import write_tar

_OUTCOMES = f"{OUTCOMES}/{{shard}}.parquet"


class FetchStats(File):
    """``stats/<shard>.json`` of a folder of fetched images."""

    rows: Count
    keys: Count
    images: Count
    texts: Count
    bytes: Count
    formats: dict[str, Count]
    drops: dict[str, Count]


def plan_fetch(pool: Names, out: str | Path, options: FetchOptions | None = None) -> Plan:
    """Fetch the image of every key to ``<shard>.tar``, in key order, with the captions of the fetched images in
    ``<shard>.parquet`` beside it: a pool for matching and packing.

    ``fetched/<shard>.parquet`` has one row per key: ``key``, ``status``, ``reason``, ``format``, ``width``, ``height``,
    ``size``, ``sha256``. A shard without any image gets no other files. Finished shards are skipped, and a shard that
    was interrupted is continued. Memory: one shard's keys and addresses, and the images that are on their way, at most
    ``options.connections`` times ``options.max_bytes`` per worker.

    Args:
        pool: ``<shard>.parquet`` files with ``key``, ``text`` and ``source`` (the image's address) and without images.

    Returns:
        a stage, whose result is counters over all shards: ``rows`` and ``keys`` of the pool, ``images`` and ``texts``
        kept, ``bytes``, ``formats``, and ``drops`` by reason (:data:`mc2_hpc.drops.MEANINGS`). Every key is an image or
        one drop. Captions that cannot be used are dropped as in :func:`~mc2_hpc.curation.pool.captions.iter_captions`.

    Raises:
        UserError: no pool, one that already has images, a shard without ``source``, or a folder made with other
            settings; when the result is computed, if no image was fetched.
    """
    out = Path(out).absolute()
    if find_spec("aiohttp") is None:
        raise UserError("fetching images needs aiohttp: pip install 'mc2_hpc[fetch]'")
    options = options or FetchOptions()
    found = list_pool(pool)
    shards = {shard.name: _addresses_only(shard) for shard in found}
    check_elsewhere(found, out)
    open_folder(out, FETCH_SETTINGS, options.settings(), list(shards))
    stage = Stage("fetch", out, shards, FetchShard(out, options), (_OUTCOMES, STATS))
    return Plan((stage,), result=lambda: _finish(out, list(shards)))


def _addresses_only(shard: PoolShard) -> Path:
    if shard.captions is None or shard.images is not None:
        raise UserError(f"{shard.images}: this pool already has images; give a folder of <shard>.parquet alone")
    return shard.captions


def _finish(out: Path, shards: list[str]) -> dict[str, Any]:
    """Delete what kills between a shard's last file and its cleaning left; returns the counters."""
    remove_folder(out / "partial")
    return sum_kept(out, shards, "images", FetchStats)


@dataclass(frozen=True)
class FetchShard:
    """Fetches one shard."""

    out: Path
    options: FetchOptions

    def is_current(self, shard: str, value: object) -> bool:
        """Whether the shard's files exist, or it has no images."""
        if read_json(stats_path(self.out, shard), FetchStats, cure=REDO).images == 0:
            return True
        return all((self.out / f"{shard}.{kind}").is_file() for kind in ("tar", "parquet"))

    def __call__(self, name: str, captions: Path) -> None:
        from mc2_hpc.curation.fetching.fetcher import Fetcher  # loads aiohttp
        from mc2_hpc.curation.fetching.ledger import Ledger

        types = column_types()
        with open_parquet(captions, {SOURCE: types[SOURCE]}, what="a pool with the images' addresses"):
            pass
        drops: Counter[str] = Counter()
        rows, keys, sources = _keys(captions, drops)
        with Ledger(self.out / "partial", name, keys, sources) as ledger:
            try:
                Fetcher(self.options, ledger).run(keys, sources)
            except UserError as error:
                raise UserError(f"{captions}: {error}") from None
            outcomes = ledger.table()
            kept = outcomes.filter(pc.equal(outcomes["status"], "image"))
            texts = 0
            if len(kept):
                with atomic_path(self.out / f"{name}.tar") as temporary:
                    write_tar(temporary, ledger.images())
                texts = _write_captions(self.out / f"{name}.parquet", captions, kept["key"])
            else:
                remove_shard(self.out, name)
            write_table(self.out / OUTCOMES / f"{name}.parquet", outcomes)
            drops.update(counted(outcomes["reason"]))
            stats = {
                "rows": rows,
                "keys": len(keys),
                "images": len(kept),
                "texts": texts,
                "bytes": pc.sum(kept["size"]).as_py() or 0,
                "formats": counted(kept["format"]),
                "drops": dict(drops),
            }
            write_json(stats_path(self.out, name), stats)
            ledger.remove()


def _shard(captions: Path) -> PoolShard:
    return PoolShard(captions.stem, captions, None)


def _keys(captions: Path, drops: Counter[str]) -> tuple[int, pa.Array, pa.Array]:
    """The number of rows, and the distinct keys, sorted, each with the alphabetically first of its addresses; unusable
    rows are counted in ``drops``."""
    num_rows, pieces = 0, []
    for table, dropped in iter_captions(_shard(captions), keep_repeated=True):
        drops.update(dropped)
        num_rows += len(table) + dropped.total()
        pieces.append(table.select([KEY, SOURCE]))
    rows = pa.concat_tables(pieces).group_by(KEY).aggregate([(SOURCE, "min")]).sort_by(KEY)
    return num_rows, rows[KEY].combine_chunks(), rows[f"{SOURCE}_min"].combine_chunks()


def _write_captions(path: Path, captions: Path, keys: pa.ChunkedArray) -> int:
    """Write the usable rows of ``keys`` in their order; returns their number."""
    num_texts = 0
    wanted = pc.SetLookupOptions(keys.cast(pa.large_string()))
    with atomic_path(path) as temporary:
        writer = None
        for table, _ in iter_captions(_shard(captions)):
            table = table.filter(pc.is_in(table[KEY], options=wanted))
            table = pa.table({name: table[name].cast(pa.string()) for name in table.column_names})
            writer = writer or pq.ParquetWriter(temporary, table.schema, compression="zstd")
            writer.write_table(table)
            num_texts += len(table)
        assert writer is not None  # there is at least one table
        writer.close()
    return num_texts
