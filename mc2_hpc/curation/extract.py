"""Common Crawl archives to caption pools: one shard of images and alt texts per WAT or WARC file."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mc2_hpc.curation.pool.common_crawl import ArchiveReader, list_archives
from mc2_hpc.errors import UserError
from mc2_hpc.jobs import STATS, Plan, Stage, open_folder, stats_path, sum_kept
from mc2_hpc.storage import atomic_path, write_json

SETTINGS = "extract.json"
_SETTINGS = {"key": "96 bits of SHA-224 of the canonical URL", "rules": 1}
_ROWS_AT_ONCE = 1 << 16
_SCHEMA = pa.schema({"key": pa.string(), "text": pa.string(), "source": pa.string()})


def plan_extract(archives: Sequence[str | Path], out: str | Path) -> Plan:
    """Write ``<archive>.parquet`` and ``stats/<archive>.json`` for every WAT or WARC file.

    Finished archives are skipped. Memory: one record, and 16 bytes per distinct row of the archive.

    Args:
        archives: files, or folders that are searched at any depth for ``*.wat``, ``*.warc`` and their ``.gz``.

    Returns:
        a stage, whose result is counters over all archives: ``records`` (of any type), ``pages`` (with at least one
        image), ``images`` (in them), ``rows``, and ``drops`` by reason (:data:`mc2_hpc.drops.MEANINGS`). Of records:
        ``record_too_large`` (above 64 MiB), ``caption_not_json``, ``caption_not_utf8``, ``record_not_http``. Of images:
        ``caption_empty``, ``url_missing``, ``url_not_http``, ``url_invalid``, ``caption_not_utf8`` and
        ``caption_repeated`` (the same address and text again).

    Raises:
        UserError: nothing to read, or two archives with the same name. A damaged or truncated archive raises when it is
            read, but a file truncated exactly between two records looks complete.
    """
    out = Path(out).absolute()
    if find_spec("fastwarc") is None or find_spec("resiliparse") is None:
        raise UserError("reading WAT and WARC files requires resiliparse and FastWARC: pip install resiliparse")
    shards = {name: path.absolute() for name, path in list_archives(archives).items()}
    open_folder(out, SETTINGS, _SETTINGS, list(shards))
    stage = Stage("extract", out, shards, ExtractArchive(out), ("{shard}.parquet", STATS), unit="archives")
    return Plan((stage,), result=lambda: sum_kept(out, list(shards), "rows"))


@dataclass(frozen=True)
class ExtractArchive:
    """Extracts one archive."""

    out: Path

    def __call__(self, name: str, path: Path) -> None:
        reader = ArchiveReader(path)
        with (
            atomic_path(self.out / f"{name}.parquet") as temporary,
            pq.ParquetWriter(temporary, _SCHEMA, compression="zstd") as writer,
        ):
            rows: list[tuple[str, str, str]] = []
            for row in reader.rows():
                rows.append(row)
                if len(rows) == _ROWS_AT_ONCE:
                    _write(writer, rows)
            _write(writer, rows)
        write_json(stats_path(self.out, name), {**reader.counts, "drops": dict(reader.drops)})


def _write(writer: pq.ParquetWriter, rows: list[tuple[str, str, str]]) -> None:
    """Write the rows as a row group and clear the list."""
    columns = zip(*rows, strict=True) if rows else ((), (), ())
    writer.write_table(pa.table([pa.array(column, pa.string()) for column in columns], _SCHEMA))
    rows.clear()
