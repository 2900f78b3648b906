"""The images of an evaluation set: files, members of tars, rows of a Parquet file, training shards.

An image keeps its index whether or not it can be decoded; labels and captions refer to it.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from mc2_hpc.data.crop import Encoded
from mc2_hpc.data.locations import ShardSet
from mc2_hpc.data.remote import CannotReach
from mc2_hpc.data.skips import ShardError
from mc2_hpc.drops import Drop, Dropped
from mc2_hpc.errors import UserError
from mc2_hpc.images import read_image_file
from mc2_hpc.samples import IMAGE_EXTENSIONS, safe_members
from mc2_hpc.tar import LocalFile, Member, TarError, list_members

_OPEN_SHARDS = 64


class Images(Protocol):
    """Encoded images by index."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The image's name in messages and reports."""
        ...

    def read(self, index: int) -> Encoded:
        """The encoded image. Raises OSError, or Dropped with the reason."""
        ...

    def fingerprint(self) -> str:
        """Hex digest that changes when an image is added, removed, renamed or replaced."""
        ...


class ImageFiles:
    """Files below ``root``, in the order given."""

    def __init__(self, root: Path, files: Sequence[str | Path]) -> None:
        """
        Args:
            files: paths relative to ``root``.

        Raises:
            UserError: there are none, or some are missing; the first is named.
        """
        if not files:
            raise UserError(f"{root}: no images (.{', .'.join(IMAGE_EXTENSIONS)})")
        self._root = root
        self._files = [Path(file) for file in files]
        missing = [file for file in self._files if not (root / file).is_file()]
        if missing:
            raise UserError(f"{root / missing[0]}: image is missing ({len(missing)} of {len(files)} are missing)")

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return str(self._files[index])

    def read(self, index: int) -> bytes:
        try:
            return read_image_file(self._root / self._files[index])
        except UserError as error:  # changed since it was listed
            raise Dropped(Drop.READ_ERROR, str(error)) from None

    def fingerprint(self) -> str:
        stats = ((self._root / file).stat() for file in self._files)
        return digest([[str(file), s.st_size, s.st_mtime_ns] for file, s in zip(self._files, stats, strict=True)])


class ImageMembers:
    """Members of tar files, in the order given."""

    def __init__(self, members: Sequence[tuple[Path, Member]]) -> None:
        if not members:
            raise UserError("no images in these tar files")
        self._members = members
        self._open: dict[Path, LocalFile] = {}

    def __len__(self) -> int:
        return len(self._members)

    def name(self, index: int) -> str:
        path, member = self._members[index]
        return f"{path.name}/{member.name}"

    def read(self, index: int) -> bytes:
        path, member = self._members[index]
        if path not in self._open:
            self._open[path] = LocalFile(path)
        return self._open[path].read(member.offset, member.size)

    def fingerprint(self) -> str:
        stats = {str(path): path.stat() for path, _ in self._members}
        files = [[path, s.st_size, s.st_mtime_ns] for path, s in sorted(stats.items())]
        return digest([files, [[str(path), *member] for path, member in self._members]])


class ImageColumn:
    """Encoded images in a binary Arrow column (held in memory)."""

    def __init__(self, column: pa.ChunkedArray, names: Sequence[str]) -> None:
        self._column = column
        self._names = names

    def __len__(self) -> int:
        return len(self._column)

    def name(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> bytes:
        data = self._column[index].as_py()
        if data is None:
            raise OSError("no image in this row")
        return data

    def fingerprint(self) -> str:
        whole = hashlib.sha256(digest(list(self._names)).encode())
        for index in range(len(self)):
            whole.update(hashlib.sha256(self._column[index].as_py() or b"").digest())
        return whole.hexdigest()


class ShardImages:
    """Images of training shards, local or remote, in the order given."""

    def __init__(self, shards: ShardSet, places: Sequence[tuple[int, int]], fingerprint: str) -> None:
        """
        Args:
            places: the shard's number, and the image's number in it.
            fingerprint: returned by :meth:`fingerprint`.
        """
        self._shards = shards
        self._places = places
        self._fingerprint = fingerprint
        # A few at a time: every open shard holds a file descriptor and, if remote, a copy in the cache.
        self._open = lru_cache(_OPEN_SHARDS)(shards.open)

    def __len__(self) -> int:
        return len(self._places)

    def name(self, index: int) -> str:
        number, place = self._places[index]
        return f"{self._shards.names[number]}, image {place}"

    def read(self, index: int) -> Encoded:
        number, place = self._places[index]
        try:
            return self._open(number).read_image(place)
        except ShardError as error:
            raise Dropped(Drop.SHARD_UNREADABLE, str(error)) from None
        except CannotReach as error:
            raise UserError(f"{self._shards.names[number]}: {error}") from None

    def fingerprint(self) -> str:
        return self._fingerprint


def tar_samples(path: Path) -> dict[str, dict[str, Member]]:
    """Members of a WebDataset tar by key (the name up to its first dot), then by lower-case extension.

    Raises:
        UserError: not a readable tar.
    """
    try:
        members = list(safe_members(list_members(LocalFile(path)), Counter()))
    except (TarError, OSError) as error:
        raise UserError(f"{path}: {error}") from None
    samples: dict[str, dict[str, Member]] = {}
    for member in members:
        folder, _, file = member.name.rpartition("/")
        stem, _, extension = file.partition(".")
        samples.setdefault(f"{folder}/{stem}" if folder else stem, {})[extension.lower()] = member
    return samples


def digest(value: object) -> str:
    """Hex digest of a JSON value."""
    return hashlib.sha256(json.dumps(value).encode("utf-8", "surrogateescape")).hexdigest()
