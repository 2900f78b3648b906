"""Regular files, opened without blocking and read up to a size limit."""

import os
import resource
import stat
from io import BufferedReader
from pathlib import Path

from mc2_hpc.errors import UserError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

_UNSIZED = 1 << 20


def open_regular(path: str | Path) -> BufferedReader:
    """Open a regular file for reading; a pipe without a writer does not block.

    Raises:
        UserError: there is no such file, it is not readable, or it is a folder, pipe, socket or device.
    """
    try:
        descriptor = _open(path)
    except (OSError, ValueError) as error:
        raise UserError(_why_not(path, error)) from None
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise UserError(f"{shown(path)}: is {_KINDS.get(kind, 'not a regular file')}; name a file")
    return os.fdopen(descriptor, "rb")


def _open(path: str | Path) -> int:
    # O_NONBLOCK, because opening a pipe waits for a writer.
    flags = os.O_RDONLY | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_NONBLOCK)
    except BlockingIOError:
        # Another process has a lease on the file, as file servers do: the kernel takes it away within a bounded time.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise
        return os.open(path, flags)


def check_regular(path: str | Path) -> int:
    """Size in bytes of a readable regular file, for libraries that open files by name themselves.

    Raises:
        UserError: see :func:`open_regular`.
    """
    with open_regular(path) as stream:
        return os.fstat(stream.fileno()).st_size


def read_bytes(path: str | Path, *, most: int) -> bytes:
    """The content of a regular file of at most ``most`` bytes.

    Raises:
        UserError: see :func:`open_regular`, or it is larger.
    """
    with open_regular(path) as stream:
        try:
            size = os.fstat(stream.fileno()).st_size
            # read() allocates the requested size, so request no more than the file has. Files in /proc report 0.
            data = b"" if size > most else stream.read(min(most, size or _UNSIZED) + 1)
        except OSError as error:
            raise UserError(f"{shown(path)}: cannot be read: {error.strerror}") from None
    if size > most or len(data) > most:
        raise UserError(f"{shown(path)}: larger than {most:,} bytes, the limit for this kind of file")
    return data


def read_tail(path: str | Path, *, most: int) -> bytes:
    """The last lines of a regular file that another process may be writing, in at most ``most`` bytes.

    Begins at the start of a line (or of the file); the last line may be incomplete.

    Raises:
        UserError: see :func:`open_regular`, or it cannot be read.
    """
    with open_regular(path) as stream:
        try:
            size = os.fstat(stream.fileno()).st_size
            if size <= most:
                return stream.read(most)
            stream.seek(size - most - 1)
            data = stream.read(most + 1)
        except OSError as error:
            raise UserError(f"{shown(path)}: cannot be read: {error.strerror}") from None
    return data.partition(b"\n")[2]


def read_text(path: str | Path, *, most: int) -> str:
    """The text of a UTF-8 file of at most ``most`` bytes, without a byte order mark.

    Raises:
        UserError: see :func:`read_bytes`, or it is not UTF-8 (the message has the line of the first bad byte).
    """
    return decode(read_bytes(path, most=most), path)


def decode(data: bytes, path: str | Path) -> str:
    """UTF-8 ``data`` of ``path`` as text, without a byte order mark.

    Raises:
        UserError: not UTF-8; the message has the line of the first bad byte.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{shown(path)}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None


def raise_open_files() -> int:
    """Raise the open file limit of this process and its children to the hard limit; returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= hard > 0:
        return soft if soft != resource.RLIM_INFINITY else 1 << 62
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):  # a hard limit that the system does not accept
        return soft
    return hard if hard != resource.RLIM_INFINITY else 1 << 62


def shown(path: str | Path) -> str:
    """A path for a message: always one line, whatever bytes it contains."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(path))


def _why_not(path: str | Path, error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        if os.path.islink(path):
            return f"{shown(path)}: links to {shown(os.readlink(path))}, which does not exist"
        return f"{shown(path)}: no such file"
    reason = error.strerror if isinstance(error, OSError) else error  # ValueError: a null byte in the name
    return f"{shown(path)}: cannot be opened: {reason}"
