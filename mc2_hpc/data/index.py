"""The table of contents of a shard: which samples its tar holds and where, listed once and kept in a small file.

Listing reads a header for every member, thousands of places all over the tar. The index that is kept afterwards is one
read, whatever the position that a run resumes from. It lies beside the shard as ``.<shard>.tar.index``, or where that
folder cannot be written, in a cache folder under a digest of the shard's path. It names the size and the time of the
tar it belongs to, so that a rewritten tar is listed again.
"""

import hashlib
import logging
import os
import struct
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mc2_hpc.curation.sampling import hash_keys
from mc2_hpc.data.tar import LocalFile, Member, list_members
from mc2_hpc.storage import atomic_path

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
FILES = ("image", "txt", "json")
"""The files of a sample, in the order of :attr:`ShardIndex.places`."""

_MAGIC = b"mc2idx1\n"
_HEADER = struct.Struct("<8s?3xqqqqL")  # magic, curated, size and time of the tar, samples, unsafe names, checksum
_Stamp = tuple[bytes, bool, int, int]
# A tar written so lately may be written again within the tick of its clock: such an index is used, but not kept.
_SETTLED_NS = 2_000_000_000
_unwritable_logged = False
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardIndex:
    """Samples of a tar in the order in which their keys first occur.

    Attributes:
        keys: of each sample.
        hashes: ``hash_keys(keys)``, uint64 ``(n,)``.
        places: int64 ``(n, 3, 2)``: offset and size of each of :data:`FILES`; offset -1 where there is none.
        unsafe_names: members left out because their names lead out of the shard.
        changed: an index was there, but of a tar of another size or time.
    """

    keys: list[str]
    hashes: npt.NDArray[np.uint64]
    places: npt.NDArray[np.int64]
    unsafe_names: int
    changed: bool = False


def cache_folder() -> Path:
    """The user's folder for what can be made again: ``$XDG_CACHE_HOME/mc2_hpc``, by default ``~/.cache/mc2_hpc``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mc2_hpc"


def open_index(path: Path, source: LocalFile, *, curated: bool, cache: Path) -> ShardIndex:
    """The kept index of the tar at ``path``, open as ``source``, or a new one, which is then kept.

    Args:
        curated: a key is all of a name before its last dot, and only pictures count; else it ends at the first dot of
            the file name, as WebDataset has it.
        cache: folder for indexes of tars whose own folder cannot be written.

    Raises:
        ShardError: see :func:`list_members`.
    """
    stamp = (_MAGIC, curated, source.size, source.mtime_ns)
    beside = path.with_name(f".{path.name}.index")
    elsewhere = cache / "indexes" / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.index"
    changed = False
    for kept in (beside, elsewhere):
        index, was_there = _read(kept, stamp)
        if index is not None:
            return index
        changed |= was_there
    members, unsafe = list_members(source)
    index = _build(members, unsafe, curated=curated, changed=changed)
    if time.time_ns() - source.mtime_ns > _SETTLED_NS:
        _keep(index, stamp, (beside, elsewhere))
    return index


def _build(members: list[Member], unsafe: int, *, curated: bool, changed: bool) -> ShardIndex:
    samples = _by_stem(members) if curated else _by_webdataset_key(members)
    places = np.full((len(samples), len(FILES), 2), -1, np.int64)
    for row, files in zip(places, samples.values(), strict=True):
        for column, member in files.items():
            row[column] = member.offset, member.size
    keys = list(samples)
    return ShardIndex(keys, hash_keys(keys), places, unsafe, changed)


def _by_webdataset_key(members: Iterable[Member]) -> dict[str, dict[int, Member]]:
    """Files by key and column; hidden files are left out. Of a name that occurs again the first stays, as in curation,
    and of several pictures of a key the one whose extension comes first in :data:`IMAGE_EXTENSIONS`."""
    named: dict[str, dict[str, Member]] = {}
    for member in members:
        folder, slash, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if stem and dot:
            named.setdefault(folder + slash + stem, {}).setdefault(extension.lower(), member)
    samples: dict[str, dict[int, Member]] = {}
    for key, files in named.items():
        columns = {column: files[name] for column, name in enumerate(FILES) if name in files and column}
        image = next((files[extension] for extension in IMAGE_EXTENSIONS if extension in files), None)
        if image is not None:
            columns[0] = image
        if columns:
            samples[key] = columns
    return samples


def _by_stem(members: Iterable[Member]) -> dict[str, dict[int, Member]]:
    images: dict[str, dict[int, Member]] = {}
    for member in members:
        stem, _, extension = member.name.rpartition(".")
        if extension.lower() in IMAGE_EXTENSIONS:
            images.setdefault(stem, {0: member})
    return images


def _read(path: Path, stamp: _Stamp) -> tuple[ShardIndex | None, bool]:
    """The index at ``path``, or None where it is absent, damaged, or of another tar; and whether it was of another."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None, False
    except OSError as error:
        _logger.info("%s: cannot be read, so the tar is listed again: %s", path, error)
        return None, False
    if len(data) < _HEADER.size:
        return None, False
    *found, num, unsafe, checksum = _HEADER.unpack_from(data)
    if tuple(found) != stamp:
        return None, True
    body = memoryview(data)[_HEADER.size :]
    if zlib.crc32(body) != checksum:
        return None, False  # a disk that lost part of it; the tar knows
    hashes = np.frombuffer(body, np.uint64, num)
    places = np.frombuffer(body, np.int64, num * len(FILES) * 2, offset=hashes.nbytes)
    text = bytes(body[hashes.nbytes + places.nbytes :]).decode("utf-8", "surrogateescape")
    keys = text.split("\0") if num else []
    return ShardIndex(keys, hashes, places.reshape(num, len(FILES), 2), unsafe), False


def _keep(index: ShardIndex, stamp: _Stamp, targets: Iterable[Path]) -> None:
    global _unwritable_logged
    text = "\0".join(index.keys).encode("utf-8", "surrogateescape")
    body = index.hashes.tobytes() + index.places.tobytes() + text
    header = _HEADER.pack(*stamp, len(index.keys), index.unsafe_names, zlib.crc32(body))
    error: OSError | None = None
    for path in targets:
        try:
            with atomic_path(path) as temporary:
                temporary.write_bytes(header + body)
            return
        except OSError as failure:
            error = failure
    if not _unwritable_logged:
        _unwritable_logged = True
        _logger.info("indexes of shards cannot be kept, so tars are listed at every start: %s", error)
