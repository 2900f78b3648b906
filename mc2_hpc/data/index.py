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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mc2_hpc.data.skips import ShardError
from mc2_hpc.draws import hash_keys
from mc2_hpc.errors import UserError
from mc2_hpc.reading.files import read_bytes
from mc2_hpc.storage import atomic_path
from mc2_hpc.tar import ByteSource, LocalFile, Member, TarError, escapes, list_members

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
FILES = ("image", "txt", "json")
"""The files of a sample, in the order of :attr:`ShardIndex.places`."""

_TXT, _JSON = FILES.index("txt"), FILES.index("json")
_COLUMNS = 2 + 2 * len(FILES)
_MOST_BETWEEN = 16384
"""Bytes between the files of a sample that are read along with them, rather than each file by itself."""
_MOST_BYTES = 1 << 32
_MAGIC = b"mc2idx3\n"
_HEADER = struct.Struct("<8s?3xqqqq")  # magic, curated, size and time of the tar, samples, unsafe names
_CHECKSUM = struct.Struct("<L")
"""CRC-32 of all before it, at the end."""
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
        places: int64 ``(n, 8)``: offset and size of the one read that fetches all files of a sample, then begin and end
            of each of :data:`FILES` in what it gives, begin -1 where there is none. From storage that is cold or far
            away every read costs a round trip. Where the files lie apart the size is -1, and begins and ends are
            offsets in the tar.
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
        ShardError: the tar holds no files, or is damaged (:func:`mc2_hpc.tar.list_members`).
        OSError: it cannot be read.
    """
    stamp = (_MAGIC, curated, source.size, source.mtime_ns)
    changed = False
    for kept in _places_for(path, cache):
        index, was_there = _read(kept, stamp)
        if index is not None:
            return index
        changed |= was_there
    try:
        members, unsafe = list_safe_members(source)
    except TarError as error:
        raise ShardError(str(error)) from None
    if not members and not unsafe:
        raise ShardError("holds no files")
    samples = _by_stem(members) if curated else _by_webdataset_key(members)
    _drop_idle_json(samples, source)
    keys = list(samples)
    index = ShardIndex(keys, hash_keys(keys), _places(list(samples.values())), unsafe, changed)
    if time.time_ns() - source.mtime_ns > _SETTLED_NS:
        _keep(index, stamp, _places_for(path, cache))
    return index


def list_safe_members(source: ByteSource) -> tuple[list[Member], int]:
    """Members of a tar in order, without a leading ``./``, and how many were left out for an unsafe name.

    Raises:
        TarError, OSError: see :func:`mc2_hpc.tar.list_members`.
    """
    members: list[Member] = []
    unsafe = 0
    for member in list_members(source):
        if member.name.startswith("./"):
            member = member._replace(name=member.name[2:])
        if member.name and not escapes(member.name):
            members.append(member)
        else:
            unsafe += 1
    return members, unsafe


def _places_for(path: Path, cache: Path) -> Iterator[Path]:
    """Where the index of the tar at ``path`` may be kept; the second place takes time to name, and is seldom needed."""
    yield path.with_name(f".{path.name}.index")
    yield cache / "indexes" / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.index"


def _drop_idle_json(samples: dict[str, dict[int, Member]], source: ByteSource) -> None:
    """Forget every ``.json`` beside a ``.txt`` that names no language: nobody need look into it again."""
    for files in samples.values():
        if _TXT in files and _JSON in files and b'"lang"' not in source.read(files[_JSON].offset, files[_JSON].size):
            del files[_JSON]


def _places(samples: list[dict[int, Member]]) -> npt.NDArray[np.int64]:
    """Rows of :attr:`ShardIndex.places` for samples that are files by column."""
    absent = (-1, 0)
    flat = [files[column][1:] if column in files else absent for files in samples for column in range(len(FILES))]
    offsets, sizes = np.moveaxis(np.array(flat, np.int64).reshape(-1, len(FILES), 2), 2, 0)
    missing = offsets < 0
    first = np.where(missing, np.iinfo(np.int64).max, offsets).min(axis=1, keepdims=True)
    size = (offsets + sizes).max(axis=1, keepdims=True) - first
    apart = size - sizes.sum(axis=1, keepdims=True) > _MOST_BETWEEN
    begins = np.where(missing, -1, offsets - np.where(apart, 0, first))
    places = np.stack([begins, begins + sizes], axis=2).reshape(-1, 2 * len(FILES))
    return np.hstack([first, np.where(apart, -1, size), places])


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
        if not path.exists():
            return None, False
        data = read_bytes(path, most=_MOST_BYTES)
    except (UserError, OSError) as error:
        _logger.info("%s: cannot be read, so the tar is listed again: %s", path, error)
        return None, False
    if len(data) < _HEADER.size + _CHECKSUM.size:
        return None, False
    content = memoryview(data)[: -_CHECKSUM.size]
    if _CHECKSUM.unpack(data[-_CHECKSUM.size :])[0] != zlib.crc32(content):
        return None, False  # a disk that lost part of it, or another version's; the tar knows
    *found, num, unsafe = _HEADER.unpack_from(data)
    if tuple(found) != stamp:
        return None, found[0] == _MAGIC  # else it was written by another version
    body = content[_HEADER.size :]
    hashes = np.frombuffer(body, np.uint64, num)
    places = np.frombuffer(body, np.int64, num * _COLUMNS, offset=hashes.nbytes)
    text = bytes(body[hashes.nbytes + places.nbytes :]).decode("utf-8", "surrogateescape")
    keys = text.split("\0") if num else []
    return ShardIndex(keys, hashes, places.reshape(num, _COLUMNS), unsafe), False


def _keep(index: ShardIndex, stamp: _Stamp, targets: Iterable[Path]) -> None:
    global _unwritable_logged
    text = "\0".join(index.keys).encode("utf-8", "surrogateescape")
    body = index.hashes.tobytes() + index.places.tobytes() + text
    content = _HEADER.pack(*stamp, len(index.keys), index.unsafe_names) + body
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
        _logger.info("indexes of shards cannot be kept, so tars are listed at every start: %s", error)
