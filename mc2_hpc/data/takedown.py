"""Takedown lists: which samples must not be trained on, named by key, by the hash of the image, or by its address.

A list is a file of JSON lines, each with one of three names and, if wanted, a note:

    {"key": "000123"}
    {"sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08", "note": "request 17"}
    {"url": "https://example.com/photos/*"}

A key is compared by its 64-bit hash, in Unicode NFC and NFD and in every source. A hash is that of the image file as
the shard stores it. In an address, ``*`` stands for any characters, and upper and lower case are the same; the address
of a sample is ``url`` in its record, or ``source`` in the table of a curated shard. A last line without a line break is
not read yet: somebody may be writing it.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from mc2_hpc.data.crop import Encoded
from mc2_hpc.draws import hash_keys
from mc2_hpc.errors import UserError
from mc2_hpc.reading.files import read_bytes, shown
from mc2_hpc.reading.json_file import File, Sha256, parse_json

MOST_BYTES = 1 << 30
"""Largest list, and record of a run's list, that is read."""
_CURE = 'write one of {"key": "..."}, {"sha256": "..."} and {"url": "..."} per line'
_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=1 << 16)]


class Entry(File):
    """One line of a list."""

    key: _Text | None = None
    sha256: Sha256 | None = None
    """Of the image file, in lower-case hexadecimal digits."""
    url: _Text | None = None
    note: str = ""

    def __str__(self) -> str:
        kind = next(kind for kind in ("key", "sha256", "url") if getattr(self, kind) is not None)
        return f"{kind} {shown(getattr(self, kind))}"


def whole_lines(data: bytes) -> bytes:
    """``data`` without a last line that has no line break yet."""
    return data[: data.rfind(b"\n") + 1]


def read_list(path: str | Path) -> bytes:
    """The whole lines of a list.

    Raises:
        UserError: no such file, or a line is not an entry.
    """
    content = whole_lines(read_bytes(path, most=MOST_BYTES))
    for _ in entries_of(content, path):
        pass
    return content


def entries_of(content: bytes, path: str | Path, *, first_line: int = 1) -> Iterator[Entry]:
    """The entries in whole lines of a list, whose first line has number ``first_line``; empty lines are skipped.

    Raises:
        UserError: a line is not an entry; the message has its number.
    """
    for number, line in enumerate(content.split(b"\n")[:-1], start=first_line):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        entry = parse_json(line, Entry, where, cure=_CURE)
        if sum(name is not None for name in (entry.key, entry.sha256, entry.url)) != 1:
            raise UserError(f"{shown(where)}: {_CURE}")
        yield entry


def good_lines(content: bytes, path: str | Path, *, first_line: int) -> tuple[bytes, UserError | None]:
    """The lines before the first that is not an entry, and what is wrong with that one."""
    end = 0
    for number, line in enumerate(content.split(b"\n")[:-1], start=first_line):
        try:
            list(entries_of(line + b"\n", path, first_line=number))
        except UserError as error:
            return content[:end], error
        end += len(line) + 1
    return content, None


@dataclass(frozen=True, eq=False)
class Takedown:
    """What a list names, for looking samples up: smaller than the list, and made once per rank for all its workers."""

    key_hashes: npt.NDArray[np.uint64]
    """Sorted :func:`~mc2_hpc.draws.hash_keys` of the listed keys, in each of their spellings."""
    digests: frozenset[bytes]
    """SHA-256 of the listed images."""
    addresses: frozenset[str]
    """The listed addresses without ``*``, in lower case: looking one up takes as long however many there are."""
    patterns: re.Pattern[str] | None
    """Matches the addresses that those with ``*`` stand for, in lower case."""

    @classmethod
    def of(cls, content: bytes) -> "Takedown":
        """From the lines of a list, which have been checked."""
        keys: list[str] = []
        digests: list[bytes] = []
        addresses: list[str] = []
        patterns: list[str] = []
        for entry in entries_of(content, "takedown list"):
            if entry.key is not None:
                keys.append(entry.key)
            elif entry.sha256 is not None:
                digests.append(bytes.fromhex(entry.sha256))
            elif entry.url is not None and "*" in entry.url:
                patterns.append(".*".join(map(re.escape, entry.url.lower().split("*"))))
            elif entry.url is not None:
                addresses.append(entry.url.lower())
        spelled = keys + [unicodedata.normalize(form, key) for form in ("NFC", "NFD") for key in keys]
        return cls(
            key_hashes=np.unique(hash_keys(spelled)),
            digests=frozenset(digests),
            addresses=frozenset(addresses),
            patterns=_any_of(patterns),
        )

    def joined(self, other: "Takedown") -> "Takedown":
        """What either names."""
        patterns = [each.patterns.pattern for each in (self, other) if each.patterns is not None]
        return Takedown(
            key_hashes=np.union1d(self.key_hashes, other.key_hashes),
            digests=self.digests | other.digests,
            addresses=self.addresses | other.addresses,
            patterns=_any_of(patterns),
        )

    @property
    def looks_inside(self) -> bool:
        """Whether it has entries other than keys, for which a sample must be read."""
        return bool(self.digests or self.addresses) or self.patterns is not None

    def lists_key(self, key_hash: np.uint64) -> bool:
        """Whether a key with this hash is listed."""
        place = int(np.searchsorted(self.key_hashes, key_hash))
        return place < len(self.key_hashes) and bool(self.key_hashes[place] == key_hash)

    def lists_content(self, image: Encoded, url: str) -> bool:
        """Whether an image with these bytes, or from this address, is listed."""
        if url and self._lists_address(url.lower()):
            return True
        return bool(self.digests) and hashlib.sha256(image).digest() in self.digests

    def _lists_address(self, url: str) -> bool:
        return url in self.addresses or (self.patterns is not None and self.patterns.fullmatch(url) is not None)


def _any_of(patterns: Sequence[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(patterns), re.DOTALL) if patterns else None
