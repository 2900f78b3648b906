"""Atomic writes, completion markers and folder locks.

Nothing here imports torch; curation and training share it.
"""

import csv
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mc2_hpc.errors import UserError
from mc2_hpc.reading.files import open_regular

if TYPE_CHECKING:
    import numpy.typing as npt
    import pyarrow as pa

logger = logging.getLogger(__name__)

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""Errors of ``flock`` on a file system without locks, as Lustre and NFS are often mounted."""

_COMPLETE = ".complete"
# Reading the umask sets it for a moment, which other threads would see, so it is read only once, here.
_UMASK = os.umask(0o077)
os.umask(_UMASK)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; on success fsync it and rename it to ``path``.

    On an exception the temporary file is removed and ``path`` is left as it was. The temporary name starts with a dot
    and keeps the suffix, so writers that look at the suffix (``np.save``) work and shard listing ignores it.

    Raises:
        UserError: there is a folder of that name.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder, and a file of that name is to be written; move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp creates 0600; give the result the permissions of any other new file.
        temporary.chmod(0o666 & ~_UMASK)
        fsync_file(temporary)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Yield a hidden folder beside ``out``; on success rename it to ``out``, which has all files or does not exist.

    On an exception the hidden folder is removed.

    Raises:
        UserError: ``out`` exists and is not an empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an empty folder; choose another --out or remove it")
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.absolute().name}.", dir=parent))
    try:
        yield partial
        partial.chmod(0o777 & ~_UMASK)  # mkdtemp creates 0700
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
        fsync_folder(parent)
    except BaseException:
        remove_folder(partial)
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented UTF-8 JSON with sorted keys, atomically: the same value gives the same bytes."""
    write_text(path, to_json_text(value))


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_array(path: str | Path, array: "npt.NDArray[Any]") -> None:
    """Write an NPY file atomically."""
    import numpy as np

    with atomic_path(path) as temporary:
        np.save(temporary, array, allow_pickle=False)


def write_table(path: str | Path, table: "pa.Table") -> None:
    """Write a table as Parquet atomically; the same rows give the same bytes."""
    import pyarrow.parquet as pq

    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def write_csv(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file atomically. Names of files that are not UTF-8 keep their bytes."""
    with (
        atomic_path(path) as temporary,
        open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def to_json_text(value: Any) -> str:
    """What :func:`write_json` writes."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def fsync_file(path: Path) -> None:
    """Force the file's bytes to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Force the folder's entries (renames, new names) to the disk."""
    fsync_file(path)


def mark_complete(folder: Path) -> None:
    """Write the marker that says that every file of ``folder`` has been written."""
    with atomic_path(folder / _COMPLETE) as temporary:
        temporary.write_text("")


def is_complete(folder: Path) -> bool:
    """Whether :func:`mark_complete` was called for ``folder``."""
    return (folder / _COMPLETE).is_file()


def remove_folder(folder: Path) -> None:
    """Remove ``folder`` and everything in it, if it exists."""
    if folder.exists():
        shutil.rmtree(folder)


@contextmanager
def exclusive_folder(folder: Path, *, wait_s: float = 30) -> Iterator[None]:
    """Lock ``folder`` against other processes that do the same; the lock ends with the process, however it ends.

    On a file system without locks this logs a warning and locks nothing.

    Raises:
        UserError: another process still holds the lock after ``wait_s`` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_s
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise UserError(
                        f"{folder}: {file.read().strip() or 'another process'} is still using it after "
                        f"{wait_s:.0f} s; stop it, or choose another output"
                    ) from None
                time.sleep(0.1)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                logger.warning(
                    "%s: its file system has no locks (%s): make sure yourself that no other job uses this folder",
                    folder,
                    error.strerror,
                )
                break
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


def fingerprint(paths: Iterable[Path | None]) -> str:
    """Hex digest of the sizes and modification times of files, whose contents are not read; it changes when one of them
    is written again, appears or disappears."""
    stamps = "".join(f"{_stamp(path)}\n" for path in paths)
    return hashlib.sha256(stamps.encode()).hexdigest()


def _stamp(path: Path | None) -> str:
    try:
        status = path.stat() if path is not None else None
    except (OSError, ValueError, RuntimeError):  # a null byte in the name; a circle of links
        return "unreadable"
    return "none" if status is None else f"{status.st_size} {status.st_mtime_ns}"


def file_sha256(path: str | Path) -> str:
    """Hex SHA-256 of a regular file's bytes.

    Raises:
        UserError: not a regular file, or it cannot be opened.
    """
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
