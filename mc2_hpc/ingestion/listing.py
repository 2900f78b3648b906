"""Which image files and captions make up which shard: a table per shard, made before anything is read.

Samples are dealt to shards by a hash of their key, so that a shard is a mixture of all folders: the samples of a batch
come from few shards at a time, and should not all be of one kind. Within a shard they are in the order of their keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mc2_hpc.draw_kernels import hash_column
from mc2_hpc.reading.parquet_file import open_parquet
from mc2_hpc.storage import write_table

SCHEMA = pa.schema(
    {
        "key": pa.large_string(),
        "image": pa.large_string(),
        "text": pa.large_binary(),
        "lang": pa.large_string(),
        "caption_file": pa.large_string(),
        "record_file": pa.large_string(),
    }
)
"""One row per caption of an image, or one with the files that hold its captions. ``text`` may not be valid UTF-8."""

Row = dict[str, Any]


def deal(listing: pa.Table, images_per_shard: int) -> Iterator[tuple[str, pa.Table]]:
    """Names of shards and their rows of ``listing``, sorted by key, image and caption."""
    encoded = listing["key"].combine_chunks().dictionary_encode()
    keys = encoded.dictionary
    count = -(-len(keys) // images_per_shard)
    places = np.empty(len(keys), np.int64)
    places[np.argsort(hash_column(keys), kind="stable")] = np.arange(len(keys))
    shard_of_row = (places * count // len(keys))[np.asarray(encoded.indices)]
    order = [(name, "ascending") for name in ("shard", "key", "image", "text", "lang")]
    rows = listing.append_column("shard", pa.array(shard_of_row)).sort_by(order)
    bounds = np.searchsorted(np.asarray(rows["shard"]), np.arange(count + 1))
    for shard in range(count):
        yield f"{shard:05d}", rows.slice(bounds[shard], bounds[shard + 1] - bounds[shard]).select(SCHEMA.names)


def write_listing(path: Path, rows: pa.Table) -> None:
    """Write the rows of a shard; the same rows give the same bytes."""
    write_table(path, rows.combine_chunks())


def read_listing(path: Path) -> Iterator[tuple[str, list[Row]]]:
    """Keys of a shard with their rows, in order.

    Raises:
        UserError: damaged.
    """
    with open_parquet(path) as file:
        rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
        for key, group in groupby(rows, key=itemgetter("key")):
            yield key, list(group)
