"""Exact de-duplication of a caption pool by image: every key in one shard, every text of a key once.

There are two passes, so that no process ever holds more than one shard. The *scatter* pass assigns each shard's rows to
partitions by a hash of their key. The *gather* pass collects a partition from all scattered shards, sorts it and drops
duplicates. The result depends only on the set of rows, not on their shards or on the order or number of workers. So a
pool too large for one run can be de-duplicated in parts, and then the parts together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mc2_hpc.curation.pool.captions import PoolShard, iter_captions, list_pool
from mc2_hpc.curation.pool.copying import check_elsewhere
from mc2_hpc.draw_kernels import hash_column
from mc2_hpc.drops import Drop
from mc2_hpc.errors import UserError
from mc2_hpc.jobs import STATS, Plan, Stage, open_folder, stats_path, sum_kept, sum_stats
from mc2_hpc.reading.json_file import Foreign, Size, read_json
from mc2_hpc.reading.parquet_file import open_parquet
from mc2_hpc.storage import atomic_path, write_json, write_table

SETTINGS = "deduplicate.json"


class _Settings(Foreign):
    """``deduplicate.json``, as far as it is needed before the settings are compared."""

    num_shards: Size


_ROWS_A_SHARD = 1_000_000
_ROWS_A_RUN = 1 << 20
_COMPRESSED = pa.ipc.IpcWriteOptions(compression="zstd")


def plan_deduplicate(pool: str | Path, out: str | Path, *, shards: int | None = None) -> Plan:
    """Write ``00000.parquet`` ... of distinct (key, text), sorted, each key in the shard given by its hash.

    All rows of a key get the alphabetically first ``source`` among them. Finished shards are skipped, and the scattered
    rows (about the size of the pool) are deleted at the end. A partition's rows are held in memory, at about three
    times their size.

    Args:
        pool: folder of ``<shard>.parquet`` files without images; images are fetched later, one per key.
        shards: to write; by default one per million rows of the pool.

    Returns:
        the unfinished stages, whose result is counters: ``rows`` (read), ``kept``, ``images`` (distinct keys), and
        ``drops`` by reason: ``caption_repeated`` and those of
        :func:`~mc2_hpc.curation.pool.captions.iter_captions`

    Raises:
        UserError: the pool does not exist, has images or is in ``out``, or that folder was made from another pool.
    """
    out = Path(out).absolute()
    inputs = _inputs(Path(pool).absolute())
    check_elsewhere(inputs.values(), out)
    columns = _columns(next(iter(inputs.values())))
    partitions = _number_of_shards(out, inputs, shards)
    names = {f"{number:05d}": number for number in range(partitions)}
    settings = {"columns": columns, "num_shards": partitions}
    open_folder(out, SETTINGS, settings, list(names))
    scattered = scattered_folder(out)
    open_folder(scattered, "scatter.json", settings, list(inputs))
    scatter = Stage(
        "scatter",
        scattered,
        inputs,
        ScatterShard(scattered, partitions, columns),
        ("{shard}.arrow", STATS),
        invalidates=(out / "stats",),
    )
    gather = Stage("gather", out, names, GatherShard(out, list(inputs), partitions), ("{shard}.parquet", STATS))
    # The scattered rows of a finished pool are gone; they are rebuilt if it has grown or a shard was lost.
    is_known = all(stats_path(scattered, name).is_file() for name in inputs)
    stages = (gather,) if is_known and not gather.undone() else (scatter, gather)
    return Plan(stages, result=lambda: _finish(out, list(inputs), list(names)))


def _finish(out: Path, inputs: list[str], names: list[str]) -> dict[str, Any]:
    """Delete the scattered rows; returns the counters."""
    scattered = scattered_folder(out)
    for name in inputs:
        scattered_path(scattered, name).unlink(missing_ok=True)
    counters, read = sum_kept(out, names, "kept"), sum_stats(scattered, inputs)
    return {**counters, **read, "drops": dict(Counter(counters["drops"]) + Counter(read["drops"]))}


def _inputs(pool: Path) -> dict[str, PoolShard]:
    return {shard.name: _captions_only(shard) for shard in list_pool(pool)}


def _captions_only(shard: PoolShard) -> PoolShard:
    if shard.captions is None or shard.images is not None:
        raise UserError(
            f"{shard.images}: a pool with images cannot be redistributed; de-duplicate it before fetching them"
        )
    return shard


def _columns(shard: PoolShard) -> list[str]:
    return next(iter_captions(shard, keep_repeated=True))[0].column_names


def _runs(shard: PoolShard, drops: Counter[str]) -> Iterator[pa.Table]:
    """Usable rows in non-empty tables of about a million; drops are counted in ``drops``."""
    pieces: list[pa.Table] = []
    for rows, dropped in iter_captions(shard, keep_repeated=True):
        drops.update(dropped)
        if len(rows):
            pieces.append(rows)
        if sum(map(len, pieces)) >= _ROWS_A_RUN:
            yield pa.concat_tables(pieces)
            pieces = []
    if pieces:
        yield pa.concat_tables(pieces)


def _number_of_shards(out: Path, inputs: dict[str, PoolShard], shards: int | None) -> int:
    """The user's number, the one chosen by an earlier run of this folder, or one that suits the pool's rows."""
    if shards is not None:
        if shards < 1:
            raise UserError(f"shards={shards}: must be at least 1")
        return shards
    if (out / SETTINGS).is_file():
        return read_json(out / SETTINGS, _Settings, cure="name another folder, or delete it").num_shards
    rows = sum(_num_rows(shard.captions) for shard in inputs.values() if shard.captions)
    return max(1, -(-rows // _ROWS_A_SHARD))


def _num_rows(path: Path) -> int:
    with open_parquet(path) as file:
        return file.metadata.num_rows


def scattered_folder(out: Path) -> Path:
    """Where the first pass writes."""
    return out / "scattered"


def scattered_path(scattered: Path, shard: str) -> Path:
    """A pool shard's rows, assigned to partitions."""
    return scattered / f"{shard}.arrow"


@dataclass(frozen=True)
class ScatterShard:
    """Assigns one shard's rows to the partitions.

    The Arrow file is a sequence of runs, each with one record batch per partition, possibly without rows: partition
    ``j`` is the batches ``j``, ``j + partitions``, ``j + 2 * partitions`` ...
    """

    scattered: Path
    partitions: int
    columns: list[str]

    def __call__(self, name: str, shard: PoolShard) -> None:
        columns = _columns(shard)
        if columns != self.columns:
            raise UserError(
                f"{shard.captions}: has columns {', '.join(columns)}, but the pool's first shard has "
                f"{', '.join(self.columns)}; all shards of a pool need the same columns"
            )
        schema = pa.schema([(column, pa.large_string()) for column in columns])
        drops: Counter[str] = Counter()
        usable = 0
        with (
            atomic_path(scattered_path(self.scattered, name)) as temporary,
            pa.ipc.new_file(temporary, schema, options=_COMPRESSED) as writer,
        ):
            for rows in _runs(shard, drops):
                usable += len(rows)
                for part in self._deal(rows):
                    writer.write_batch(part)
        stats = {"rows": usable + drops.total(), "drops": dict(drops)}
        write_json(stats_path(self.scattered, name), stats)

    def _deal(self, rows: pa.Table) -> Iterator[pa.RecordBatch]:
        partition = (hash_column(rows["key"].combine_chunks()) % np.uint64(self.partitions)).astype(np.int64)
        order = np.argsort(partition, kind="stable")
        bounds = np.searchsorted(partition[order], np.arange(self.partitions + 1))
        (dealt,) = rows.take(pa.array(order)).combine_chunks().to_batches()
        for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
            yield dealt.slice(begin, end - begin)


@dataclass(frozen=True)
class GatherShard:
    """Collects one partition and writes it without duplicates."""

    out: Path
    inputs: list[str]
    partitions: int

    def __call__(self, name: str, partition: int) -> None:
        rows = pa.Table.from_batches(list(self._batches(partition)))
        kept = distinct(rows)
        images = pc.count_distinct(kept["key"]).as_py()
        try:
            table = pa.table({column: kept[column].cast(pa.string()) for column in kept.column_names})
        except pa.ArrowInvalid:
            raise UserError(f"{self.out / name}: more than 2 GB of text in one shard; use more shards") from None
        write_table(self.out / f"{name}.parquet", table)
        drops = {Drop.CAPTION_REPEATED: len(rows) - len(kept)} if len(kept) < len(rows) else {}
        write_json(stats_path(self.out, name), {"kept": len(kept), "images": images, "drops": drops})

    def _batches(self, partition: int) -> Iterator[pa.RecordBatch]:
        for name in self.inputs:
            with pa.memory_map(str(scattered_path(scattered_folder(self.out), name))) as file:
                reader = pa.ipc.open_file(file)
                yield pa.RecordBatch.from_pylist([], reader.schema)
                for index in range(partition, reader.num_record_batches, self.partitions):
                    yield reader.get_batch(index)


def distinct(rows: pa.Table) -> pa.Table:
    """Distinct (key, text) of ``rows``, sorted, each with its first ``lang`` and the first ``source`` of its key."""
    others = [(name, "min") for name in rows.column_names if name not in ("key", "text")]
    kept = rows.group_by(["key", "text"]).aggregate(others)
    kept = kept.rename_columns([name.removesuffix("_min") for name in kept.column_names])
    kept = kept.select(rows.column_names).sort_by([("key", "ascending"), ("text", "ascending")])
    if "source" in rows.column_names:
        first = kept.group_by("key", use_threads=False).aggregate([("source", "min")])
        of_key = pc.index_in(kept["key"], first["key"])
        kept = kept.set_column(kept.schema.get_field_index("source"), "source", first["source_min"].take(of_key))
    return kept
