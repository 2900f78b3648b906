"""Files of hashed images, one set per shard: their codes by each kind of hash, and facts by which copies are ranked."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from mc2_hpc.curation.copies.linking import CHECK_BITS, ENTRY, Entries
from mc2_hpc.errors import UserError, first_line
from mc2_hpc.reading.arrays import map_array
from mc2_hpc.reading.files import check_regular
from mc2_hpc.reading.json_file import Count, Foreign
from mc2_hpc.storage import atomic_path, write_array

IMAGES, CODES = "images/{shard}.arrow", "codes/{hash}/{shard}.npy"
"""Files of a shard; :func:`read_images` and :func:`map_codes` read them."""
PROJECTIONS = "projections/{shard}.npy"
"""Projections of a shard's features, int32, in the order of its images that have codes."""

PHASH, FEATURES = "phash", "features"
"""Names of the kinds of codes."""

MAX_DISTANCE, MAX_CHECK = 6, 40
"""Defaults of pHash: bits of 64 and of 192 in which codes of planted copies hardly ever differ (docs/images.md)."""
FEATURE_DISTANCE, FEATURE_CHECK = 10, 46
"""Defaults of features, chosen likewise, with SSCD."""
_LARGEST_DISTANCE = 16
"""A search beyond it compares almost all pairs."""

_CURE = "delete it and run the same command again"
_COLUMNS = pa.schema(
    [("key", pa.large_string()), ("pixels", pa.int64()), ("bytes", pa.int64()), ("reason", pa.large_string())]
)


class HashStats(Foreign):
    """``stats/<shard>.json`` of hashed images."""

    images_read: Count
    made_of: str = ""
    """:func:`~mc2_hpc.storage.fingerprint` of the tar when it was hashed."""


@dataclass(frozen=True)
class Hash:
    """A kind of code, and how similar two codes of it must be."""

    name: str
    max_distance: int
    """Bits in which the 64-bit hashes of two copies may differ."""
    max_check: int
    """Bits in which the other 192 may."""


def checked_hash(kind: Hash) -> Hash:
    """The argument.

    Raises:
        UserError: limits out of range.
    """
    if not 0 <= kind.max_distance <= _LARGEST_DISTANCE:
        raise UserError(f"{kind.name}: max_distance={kind.max_distance} must be 0 to {_LARGEST_DISTANCE} of 64 bits")
    if not 0 <= kind.max_check <= CHECK_BITS:
        raise UserError(f"{kind.name}: max_check={kind.max_check} must be 0 to {CHECK_BITS} bits")
    return kind


def write_images(folder: Path, shard: str, images: pa.Table) -> None:
    """Write a row per image of a shard, in the order of its tar.

    Args:
        images: ``key``; ``pixels`` and ``bytes``, 0 if ``reason`` says why the image has no codes.
    """
    with (
        atomic_path(folder / IMAGES.format(shard=shard)) as temporary,
        pa.ipc.new_file(temporary, _COLUMNS, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer,
    ):
        writer.write_table(images.cast(_COLUMNS))


def read_images(folder: Path, shard: str) -> pa.Table:
    """What :func:`write_images` wrote.

    Raises:
        UserError: missing or damaged.
    """
    path = folder / IMAGES.format(shard=shard)
    check_regular(path)
    try:
        with pa.ipc.open_file(str(path)) as reader:
            table = reader.read_all()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not readable ({first_line(error)}); {_CURE}") from None
    if table.schema != _COLUMNS:
        raise UserError(f"{path}: has columns {', '.join(table.column_names)}; {_CURE}")
    return table


def write_codes(folder: Path, shard: str, kind: str, entries: list[Entries]) -> None:
    """Write the codes of a shard's images, whose numbers are their rows in :func:`read_images`."""
    write_array(folder / CODES.format(hash=kind, shard=shard), np.concatenate([np.zeros(0, ENTRY), *entries]))


def map_codes(folder: Path, shard: str, kind: str) -> Entries:
    """What :func:`write_codes` wrote, memory-mapped.

    Raises:
        UserError: missing or damaged.
    """
    return map_array(folder / CODES.format(hash=kind, shard=shard), ENTRY, cure=_CURE)
