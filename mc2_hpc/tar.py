"""Tar files as lists of byte ranges: list the members once, then read any payload by itself. Also writes plain tars.

Parses headers itself because ``tarfile`` is slower and stops silently at a damaged header. Reads are positional
(``pread``), not through a memory map: if a file shrinks under a running job, a short read is an error, whereas a map
would kill the process (SIGBUS).
"""

import errno
import io
import os
import stat
import tarfile
import weakref
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

ESCAPES = r"^/|(^|/)\.\.(/|$)|\\|\x00"
""":func:`escapes` as a regular expression, for columns of names."""

_BLOCK = 512
_WINDOW = 4096
_LARGEST_EXTENSION = 1 << 20
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
_LONG_NAME, _PAX, _SPARSE = b"L", (b"x", b"X"), b"S"
_ADLER = 65521


class TarError(Exception):
    """A file is not a complete tar; the message says why, but not which file."""


class ByteSource(Protocol):
    """What tars are read from."""

    size: int

    def read(self, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes from ``offset``; OSError if there are fewer."""
        ...


class LocalFile:
    """A file opened for positional reads; closed when the object is freed.

    Args:
        pin: an object to keep alive as long as the file.

    Attributes:
        size, mtime_ns: when it was opened.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, pin: object = None) -> None:
        self._pin = pin
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a named pipe would wait for a writer
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        self.size = status.st_size
        self.mtime_ns = status.st_mtime_ns

    def read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, offset)
        if len(data) < size:
            raise OSError(f"{len(data)} of {size} bytes at {offset}")
        return data


class Member(NamedTuple):
    """A regular file inside a tar: its payload is ``size`` bytes from ``offset``."""

    name: str
    offset: int
    size: int


def list_members(source: ByteSource) -> list[Member]:
    """Regular files of a tar in order, with their names unchanged: before joining a name to a path, check that it does
    not :func:`escapes`.

    Reads ustar, GNU (long names, base-256 sizes) and pax headers. Sparse files are skipped.

    Raises:
        TarError: not a tar, damaged (every header has a checksum), or truncated. A cut between two members is detected
            by the missing end-of-archive mark.
        OSError: the file shrinks meanwhile.
    """
    members: list[Member] = []
    position = 0
    long_name: str | None = None
    fields: dict[str, str] = {}
    headers = _HeaderReader(source)
    while (header := headers.at(position)) is not None:
        kind = header[156:157]
        long_size = _pax_size(fields)
        size = long_size if long_size is not None else _number(header[124:136], position)
        data = position + _BLOCK
        if kind == _SPARSE:
            data = _after_sparse_map(source, header, data)
        has_data = kind not in _WITHOUT_DATA
        if has_data and data + size > source.size:
            raise TarError(f"cut off: a member at byte {position} ends at {data + size}, the file at {source.size}")
        is_extension = kind == _LONG_NAME or kind in _PAX
        if is_extension and size > _LARGEST_EXTENSION:
            raise TarError(f"damaged header at byte {position}")
        position = data + (-(-size // _BLOCK) * _BLOCK if has_data else 0)
        if kind == _LONG_NAME:
            long_name = _text(source.read(data, size))
        elif is_extension:
            fields = _pax_fields(source.read(data, size))
            long_name = fields.get("path", long_name)
        else:
            name = long_name if long_name is not None else _header_name(header)
            is_folder = kind == b"\0" and name.endswith("/")  # from before folders had a type of their own
            if kind in _REGULAR and not is_folder and not any(key.startswith("GNU.sparse.") for key in fields):
                members.append(Member(name, data, size))
            long_name, fields = None, {}
    if long_name is not None or fields:
        raise TarError(f"damaged header at byte {position}: a long name without its file")
    return members


def escapes(name: str) -> bool:
    """Whether this name, joined to a folder, could lead out of it."""
    return name.startswith("/") or "\\" in name or "\0" in name or (".." in name and ".." in name.split("/"))


def fits_tar_name(name: str) -> bool:
    """Whether the name fits in a ustar header, which every reader supports: 100 bytes, or 255 split at a slash."""
    header = tarfile.TarInfo(name)
    try:
        header.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")
    except ValueError:
        return False
    return True


def write_tar(path: Path, files: Iterable[tuple[str, bytes | memoryview]]) -> None:
    """Write a ustar archive of ``(name, content)`` in the given order, without this machine's times, owners or modes.

    Raises:
        ValueError: a name does not fit (:func:`fits_tar_name`).
    """
    with open(path, "wb") as stream, tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))


class _HeaderReader:
    """Headers by position; those of small members (captions) are mostly in the window already read."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._start = 0
        self._window = b""

    def at(self, position: int) -> bytes | None:
        """The header block at ``position``; None at the end-of-archive mark."""
        begin = position - self._start
        if not 0 <= begin <= len(self._window) - _BLOCK:
            available = min(_WINDOW, self._source.size - position)
            if available < _BLOCK:
                raise TarError(f"cut off at byte {position}: no end-of-archive mark" if position else "holds no files")
            self._window = self._source.read(position, available)
            self._start, begin = position, 0
        header = self._window[begin : begin + _BLOCK]
        if header[0] == 0 and not any(header):
            return None
        if not _sum_is_right(header, position):
            raise TarError(f"not a tar header at byte {position}")
        return header


def _sum_is_right(header: bytes, position: int) -> bool:
    field = header[148:156]  # summed as if it were blanks
    stored = _number(field, position)
    # The lower half of Adler-32 is the sum of the bytes plus one, modulo 65521, without a loop in Python.
    total = (zlib.adler32(header) & 0xFFFF) - 1 - sum(field) + 8 * 32
    if (total - stored) % _ADLER == 0:
        return True
    num_high = sum(byte > 127 for byte in header) - sum(byte > 127 for byte in field)
    return (total - 256 * num_high - stored) % _ADLER == 0  # some old writers summed signed bytes


def _after_sparse_map(source: ByteSource, header: bytes, data: int) -> int:
    """Where the payload of an old GNU sparse file begins: after the blocks that continue its map."""
    more = header[482]
    while more:
        if data + _BLOCK > source.size:
            raise TarError(f"cut off in a header at byte {data}")
        more = source.read(data, _BLOCK)[504]
        data += _BLOCK
    return data


def _number(field: bytes, position: int) -> int:
    if field[0] & 0x80:  # GNU base-256
        return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    digits = field.partition(b"\0")[0]
    try:
        value = int(digits, 8)
    except ValueError:
        value = -1 if digits.strip(b" ") else 0
    if value < 0:  # int() accepts a sign, and a negative size would loop forever
        raise TarError(f"damaged header at byte {position}")
    return value


def _header_name(header: bytes) -> str:
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:
        return f"{_text(header[345:500])}/{name}"
    return name


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _pax_size(fields: dict[str, str]) -> int | None:
    size = fields.get("size")
    if size is None:
        return None
    if not (size.isascii() and size.isdigit() and len(size) < 19):
        raise TarError("damaged extended header")
    return int(size)


def _pax_fields(payload: bytes) -> dict[str, str]:
    """Parse the ``length key=value\\n`` records of an extended header."""
    fields = {}
    while payload:
        length, _, _ = payload.partition(b" ")
        if not length.isdigit() or len(length) > 9 or not 0 < int(length) <= len(payload):
            raise TarError("damaged extended header")
        key, _, value = payload[len(length) + 1 : int(length) - 1].partition(b"=")
        fields[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        payload = payload[int(length) :]
    return fields
