"""Where the pictures of an evaluation set lie: files, members of tars, rows of a Parquet file.

A picture keeps its index whether it can be decoded or not; labels and captions refer to it.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from mc2_hpc.errors import UserError
from mc2_hpc.samples import safe_members
from mc2_hpc.tar import LocalFile, Member, TarError, list_members

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")


class Pictures(Protocol):
    """Encoded pictures by index."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a message or a report calls the picture."""
        ...

    def read(self, index: int) -> bytes:
        """The encoded picture. Raises OSError."""
        ...

    def fingerprint(self) -> str:
        """Hex digest that changes when a picture is added, removed, renamed or replaced."""
        ...


class PictureFiles:
    """Files below ``root``, in the order given."""

    def __init__(self, root: Path, files: Sequence[str | Path]) -> None:
        """
        Args:
            files: paths relative to ``root``.

        Raises:
            UserError: there are none, or one is missing; the first is named.
        """
        if not files:
            raise UserError(f"{root}: no pictures there ({', '.join(EXTENSIONS)})")
        self._root = root
        self._files = [Path(file) for file in files]
        missing = [file for file in self._files if not (root / file).is_file()]
        if missing:
            raise UserError(f"{root / missing[0]}: picture is missing ({len(missing)} of {len(files)} are)")

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return str(self._files[index])

    def read(self, index: int) -> bytes:
        return (self._root / self._files[index]).read_bytes()

    def fingerprint(self) -> str:
        stats = ((self._root / file).stat() for file in self._files)
        return _digest([[str(file), s.st_size, s.st_mtime_ns] for file, s in zip(self._files, stats, strict=True)])


class PictureMembers:
    """Members of tar files, in the order given."""

    def __init__(self, members: Sequence[tuple[Path, Member]]) -> None:
        if not members:
            raise UserError("no pictures in these tar files")
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
        return _digest([files, [[str(path), *member] for path, member in self._members]])


class PictureColumn:
    """Encoded pictures of a binary Arrow column (held in memory)."""

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
            raise OSError("no picture in this row")
        return data

    def fingerprint(self) -> str:
        digest = hashlib.sha256(_digest(list(self._names)).encode())
        for index in range(len(self)):
            digest.update(hashlib.sha256(self._column[index].as_py() or b"").digest())
        return digest.hexdigest()


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


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode("utf-8", "surrogateescape")).hexdigest()
