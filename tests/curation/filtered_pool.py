"""A pool with images of given sizes, and what filtering made of it."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mc2_hpc import jobs
from mc2_hpc.curation.filter import plan_filter
from mc2_hpc.jobs.named import Named
from mc2_hpc.tar import LocalFile, list_members, write_tar

Row = tuple[str, str, str]


def write_shard(folder: Path, name: str, images: Mapping[str, bytes], rows: Iterable[Row]) -> Path:
    """A shard of image files by name, and of captions: key, text, language."""
    folder.mkdir(exist_ok=True, parents=True)
    columns = zip(*rows, strict=True)
    table = {
        column: pa.array(values, pa.string()) for column, values in zip(("key", "text", "lang"), columns, strict=True)
    }
    pq.write_table(pa.table(table), folder / f"{name}.parquet")
    write_tar(folder / f"{name}.tar", images.items())
    return folder


def run_filter(pool: Path, out: Path, *filters: Named, engine: jobs.Engine | None = None, **options) -> dict:
    """Filter a pool; the counters add up."""
    counters = jobs.run(plan_filter(pool, out, filters, **options), engine)
    assert counters is not None
    assert counters["rows"] == counters["texts"] + sum(counters["drops"].values())
    assert counters["images_read"] == counters["images"] + sum(counters["image_drops"].values())
    return counters


def in_tar(path: Path) -> dict[str, bytes]:
    """Contents by name."""
    file = LocalFile(path)
    return {member.name: file.read(member.offset, member.size) for member in list_members(file)}


def texts(out: Path, shard: str = "0") -> dict[str, list[str]]:
    """The kept captions by key."""
    found: dict[str, list[str]] = {}
    for row in pq.read_table(out / f"{shard}.parquet").to_pylist():
        found.setdefault(row["key"], []).append(row["text"])
    return found


def verdicts(out: Path, shard: str = "0") -> list[dict]:
    """The rows of the table of verdicts."""
    return pq.read_table(out / "judged" / f"{shard}.parquet").to_pylist()
