"""The table of contents of a shard: which samples its tar contains and where, listed once and kept in a small file.

Listing reads a header for every member, at thousands of places all over the tar. The index takes one read, whatever
position a run resumes from. It is stored beside the shard as ``.<shard>.tar.index``; if that folder cannot be written,
in a cache folder under a digest of the shard's path. Runs that need every record have one of their own,
``.<shard>.tar.records.index``. An index records the tar's size and modification time, so that a rewritten tar is listed
again.
"""

import hashlib
import json
import logging
import os
import struct
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mc2_hpc.data.skips import ShardError
from mc2_hpc.draws import hash_keys
from mc2_hpc.errors import UserError
from mc2_hpc.reading.files import read_bytes
from mc2_hpc.samples import LARGEST_RECORD, Sample, list_samples, names_language
from mc2_hpc.storage import atomic_path
from mc2_hpc.tar import ByteSource, LocalFile, Member, TarError

FILES = ("image", "caption", "record")
"""The members of a sample, in the order of :attr:`ShardIndex.places`."""

_COLUMNS = 2 + 2 * len(FILES)
_MOST_BETWEEN = 16384
"""Largest gap, in bytes, between files of a sample that are read together rather than one by one."""
_MOST_BYTES = 1 << 32
_MAGIC = b"mc2idx4\n"
_HEADER = struct.Struct("<8sqqqq")  # magic, size and time of the tar, samples, bytes of drops
_CHECKSUM = struct.Struct("<L")
"""CRC-32 of everything before it, at the end."""
_Stamp = tuple[bytes, int, int]
# A tar this new may be rewritten within one clock tick, so its index is used but not kept.
_SETTLED_NS = 2_000_000_000
_unwritable_logged = False
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardIndex:
    """Samples of a tar in the order in which their keys first occur.

    Attributes:
        keys: of each sample.
        hashes: ``hash_keys(keys)``, uint64 ``(n,)``.
        places: int64 ``(n, 8)``: offset and size of the single read that fetches all files of a sample, then the begin
            and end of each of :data:`FILES` within it, with begin -1 if it is missing. On cold or remote storage every
            read costs a round trip. If the files are far apart, size is -1, and begins and ends are offsets in the tar.
        drops: members left out, by reason (:class:`mc2_hpc.drops.Drop`).
        changed: there was an index, but for a tar of another size or time.
    """

    keys: list[str]
    hashes: npt.NDArray[np.uint64]
    places: npt.NDArray[np.int64]
    drops: dict[str, int]
    changed: bool = False

    def extents(self, file: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Offset in the tar and size of each sample's ``file`` of :data:`FILES`; the offset is -1 if it has none."""
        column = 2 + 2 * FILES.index(file)
        begin, size, first, end = (self.places[:, number] for number in (0, 1, column, column + 1))
        return np.where(first < 0, -1, first + np.where(size < 0, 0, begin)), end - first

    def images_digest(self) -> int:
        """64 bits of a digest of every image's key, offset and size: equal for a copy of the tar and, but for chance,
        for no tar of other images."""
        digest = hashlib.blake2b(self.hashes.tobytes(), digest_size=8)
        for column in self.extents("image"):
            digest.update(column.tobytes())
        return int.from_bytes(digest.digest(), "little", signed=True)


def cache_folder() -> Path:
    """The user's cache folder: ``$XDG_CACHE_HOME/mc2_hpc``, by default ``~/.cache/mc2_hpc``."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "mc2_hpc"
    try:
        return Path.home() / ".cache" / "mc2_hpc"
    except RuntimeError:  # a user unknown to the system, as in some containers
        return Path(tempfile.gettempdir()) / f"mc2_hpc-{os.getuid()}"


def open_index(path: Path, source: LocalFile, *, cache: Path, records: bool = False) -> ShardIndex:
    """The stored index of the tar at ``path``, open as ``source``; or a new index, which is then stored.

    Args:
        cache: folder for indexes of tars whose own folder cannot be written.
        records: include records beside a ``.txt`` that do not name a language, which makes another index.

    Raises:
        ShardError: the tar contains no samples, or is damaged (:func:`mc2_hpc.tar.list_members`).
        OSError: it cannot be read.
    """
    stamp = (_MAGIC, source.size, source.mtime_ns)
    changed = False
    suffix = "records.index" if records else "index"
    for kept in _places_for(path, cache, suffix):
        index, was_there = _read(kept, stamp)
        if index is not None:
            return index
        changed |= was_there
    try:
        listing = list_samples(source)
    except TarError as error:
        raise ShardError(str(error)) from None
    if not listing.samples:
        raise ShardError(listing.describe_others())
    samples = list(listing.samples.values())
    _drop_idle_records(samples, source, keep=records)
    keys = [sample.key for sample in samples]
    index = ShardIndex(keys, hash_keys(keys), _places(samples), dict(listing.drops), changed)
    if time.time_ns() - source.mtime_ns > _SETTLED_NS:
        _keep(index, stamp, _places_for(path, cache, suffix))
    return index


def _places_for(path: Path, cache: Path, suffix: str) -> Iterator[Path]:
    """Where the index of the tar at ``path`` may be stored; the second place takes time to name and is rarely used."""
    yield path.with_name(f".{path.name}.{suffix}")
    yield cache / "indexes" / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.{suffix}"


def _drop_idle_records(samples: list[Sample], source: ByteSource, *, keep: bool) -> None:
    """Drop each ``.json`` beside a ``.txt`` that is too large or, unless ``keep``, names no language."""
    for sample in samples:
        record = sample.record
        if sample.caption is None or record is None:
            continue
        if record.size > LARGEST_RECORD or not (keep or names_language(source.read(record.offset, record.size))):
            sample.record = None


def _places(samples: list[Sample]) -> npt.NDArray[np.int64]:
    """Rows of :attr:`ShardIndex.places`."""
    flat = [_place(getattr(sample, file)) for sample in samples for file in FILES]
    offsets, sizes = np.moveaxis(np.array(flat, np.int64).reshape(-1, len(FILES), 2), 2, 0)
    missing = offsets < 0
    first = np.where(missing, np.iinfo(np.int64).max, offsets).min(axis=1, keepdims=True)
    size = (offsets + sizes).max(axis=1, keepdims=True) - first
    apart = size - sizes.sum(axis=1, keepdims=True) > _MOST_BETWEEN
    begins = np.where(missing, -1, offsets - np.where(apart, 0, first))
    places = np.stack([begins, begins + sizes], axis=2).reshape(-1, 2 * len(FILES))
    return np.hstack([first, np.where(apart, -1, size), places])


def _place(member: Member | None) -> tuple[int, int]:
    return (-1, 0) if member is None else (member.offset, member.size)


def _read(path: Path, stamp: _Stamp) -> tuple[ShardIndex | None, bool]:
    """The index at ``path``, or None if it is missing, damaged or for another tar; and whether it was for another."""
    try:
        if not path.exists():
            return None, False
        data = read_bytes(path, most=_MOST_BYTES)
    except (UserError, OSError) as error:
        logger.info("%s: cannot be read, so the tar is listed again: %s", path, error)
        return None, False
    if len(data) < _HEADER.size + _CHECKSUM.size:
        return None, False
    content = memoryview(data)[: -_CHECKSUM.size]
    if _CHECKSUM.unpack(data[-_CHECKSUM.size :])[0] != zlib.crc32(content):
        return None, False  # truncated on disk, or from another version; the tar is listed again
    *found, num, drops_size = _HEADER.unpack_from(data)
    if tuple(found) != stamp:
        return None, found[0] == _MAGIC  # otherwise it was written by another version
    body = content[_HEADER.size :]
    hashes = np.frombuffer(body, np.uint64, num)
    places = np.frombuffer(body, np.int64, num * _COLUMNS, offset=hashes.nbytes)
    rest = body[hashes.nbytes + places.nbytes :]
    drops = json.loads(bytes(rest[:drops_size]))
    keys = bytes(rest[drops_size:]).decode("utf-8", "surrogateescape").split("\0") if num else []
    return ShardIndex(keys, hashes, places.reshape(num, _COLUMNS), drops), False


def _keep(index: ShardIndex, stamp: _Stamp, targets: Iterable[Path]) -> None:
    global _unwritable_logged
    drops = json.dumps(index.drops).encode()
    keys = "\0".join(index.keys).encode("utf-8", "surrogateescape")
    body = index.hashes.tobytes() + index.places.tobytes() + drops + keys
    content = _HEADER.pack(*stamp, len(index.keys), len(drops)) + body
    error: OSError | None = None
    for path in targets:
        try:
            with atomic_path(path) as temporary:
                temporary.write_bytes(content + _CHECKSUM.pack(zlib.crc32(content)))
            return
        except OSError as failure:
            error = failure
    if not _unwritable_logged:
        _unwritable_logged = True
        logger.info("shard indexes cannot be stored, so tars are listed at every start: %s", error)
