"""Remote shards as files in a local folder of bounded size.

A shard (its tar and, if there is one, its Parquet file) is copied whole into its own folder, named by a digest of its
address, sizes and version, so a shard that is rewritten remotely is copied again. All processes of a machine share the
cache without a server: locks on the folders (``flock``, which is released however its holder ends) show which copy is
being written and which are being read. The least recently read copies make room for new ones.

There are two kinds of storage errors. Permanent ones (no such object, no permission) cost only the shard. All others
(dropped connections, 5xx, time-outs) are retried with growing pauses until patience runs out. That ends the run,
because it is unknown whether the data is bad; the run can be resumed.
"""

import fcntl
import gc
import hashlib
import logging
import os
import queue
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from mc2_hpc.data.skips import ShardError
from mc2_hpc.errors import UserError, first_line
from mc2_hpc.storage import NO_LOCKS

_BLOCK = 8 << 20
_BLOCKS_AT_ONCE = 4
_MOST_REWRITES = 3
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 30.0
_LOCK_POLL_S = 0.05
_REFUSALS = set(range(400, 500)) - {408, 425, 429}
# Connection errors are OSErrors or have one of these bases; others, such as missing credentials, are permanent.
_PASSING = {"ClientError", "HTTPClientError", "HttpError"}
_CLIENTS = ("aiohttp", "botocore", "aiobotocore", "gcsfs", "google.auth", "huggingface_hub")
_UNREAD = ".unread"
_VERSION_FIELDS = (
    "ETag",
    "etag",
    "version_id",
    "generation",
    "sha256",
    "LastModified",
    "Last-Modified",
    "mtime",
    "created",
)
_T = TypeVar("_T")
logger = logging.getLogger(__name__)


class CannotReach(RuntimeError):
    """Storage kept returning errors until patience ran out, or has no room; the message is one line."""


def file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system of ``address``, and the path in it.

    Raises:
        UserError: the protocol is unknown, or its package is not installed.
    """
    protocol = address.partition("://")[0]
    try:
        system = _file_system(protocol)
    except (ImportError, ValueError) as error:
        raise UserError(f"{address}: {error}; try pip install 'mc2_hpc[remote]'") from None
    return system, system._strip_protocol(address)


@lru_cache(maxsize=16)
def _file_system(protocol: str) -> Any:
    # Listings are requested once; a cached one would hide that a shard has changed.
    return fsspec.filesystem(protocol, use_listings_cache=False)


def patiently(call: Callable[[], _T], address: str, patience_s: float) -> _T:
    """``call()``, retried while it fails for reasons that may be temporary.

    Raises:
        FileNotFoundError, PermissionError: the error is permanent.
        CannotReach: ``patience_s`` seconds have passed, or waiting is useless (credentials are missing).
    """
    deadline = time.monotonic() + patience_s
    pause = _FIRST_PAUSE_S
    while True:
        try:
            return call()
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except Exception as error:  # every package behind fsspec has its own errors
            reason = first_line(error)
            if (status := getattr(error, "status", None)) in _REFUSALS:
                raise PermissionError(f"{address}: HTTP status {status}") from None
            if not _may_pass(error):
                if type(error).__module__.startswith(_CLIENTS):
                    raise CannotReach(f"{address}: {reason}") from error
                raise  # a bug in the program
            if time.monotonic() + pause > deadline:
                raise CannotReach(f"{address}: could not be read for {patience_s:.0f} s: {reason}") from error
            logger.warning("%s: retrying in %.2g s: %s", address, pause, reason)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def _may_pass(error: Exception) -> bool:
    return isinstance(error, OSError) or any(base.__name__ in _PASSING for base in type(error).__mro__)


@dataclass(frozen=True)
class _Remote:
    """One file of a shard as the storage describes it."""

    address: str
    size: int
    version: str


class Copy:
    """A shard in the cache, which stays there as long as this object lives."""

    def __init__(self, folder: Path, descriptor: int) -> None:
        weakref.finalize(self, os.close, descriptor)  # which releases the lock
        self.tar = folder / "shard.tar"


class ShardCache:
    """Copies of remote shards in ``folder``, at most ``limit`` bytes; picklable and shared by processes."""

    def __init__(self, folder: Path, limit: int, patience_s: float) -> None:
        self._folder = folder
        self._limit = limit
        self._patience_s = patience_s
        self._ahead: _Ahead | None = None

    def fetch(self, address: str, *, ahead: bool = False) -> Copy:
        """The shard at ``address``, copied unless it is already in the cache.

        Args:
            ahead: it is not needed yet, so unread copies must not make room for it.

        Raises:
            ShardError: there is no such shard, or reading it is not permitted.
            CannotReach: the storage does not answer.
            UserError: copies that are being read leave no room.
        """
        for _ in range(_MOST_REWRITES):
            files = self._describe(address)
            folder = self._folder / hashlib.sha256(repr(files).encode()).hexdigest()[:32]
            copy = self._open(folder, ahead) or self._make(folder, files, ahead)
            if copy is not None:
                return copy
        raise ShardError(f"changed {_MOST_REWRITES} times while being copied")

    def stamp(self, address: str) -> str:
        """Sizes and versions of the files of the shard at ``address``; errors as of :meth:`fetch`."""
        return repr([(file.size, file.version) for file in self._describe(address)])

    def fetch_ahead(self, address: str) -> None:
        """Copy the shard in the background if there is room; errors are left for :meth:`fetch` to report."""
        if self._ahead is None:
            self._ahead = _Ahead(self)
        self._ahead.wanted.put(address)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ahead": None}

    def _describe(self, address: str) -> list[_Remote]:
        """The tar, and the Parquet file if there is one."""
        tar = self._info(address)
        if tar is None:
            raise ShardError("No such file")
        pairs = self._info(address.removesuffix(".tar") + ".parquet")
        return [tar] if pairs is None else [tar, pairs]

    def _info(self, address: str) -> _Remote | None:
        system, path = file_system(address)
        try:
            info = patiently(lambda: system.info(path), address, self._patience_s)
        except FileNotFoundError:
            return None
        except PermissionError as error:
            raise ShardError(str(error)) from None
        if info.get("type") == "directory" or not isinstance(info.get("size"), int):
            raise ShardError(f"{address}: not a file of known size")
        return _Remote(address, info["size"], "/".join(str(info[name]) for name in _VERSION_FIELDS if name in info))

    def _open(self, folder: Path, ahead: bool) -> Copy | None:
        """The copy in ``folder``, or None if there is none."""
        descriptor = _lock(folder, fcntl.LOCK_SH, self._patience_s)
        if descriptor is None:
            return None
        if not ahead:
            (folder / _UNREAD).unlink(missing_ok=True)
            os.utime(folder)
        return Copy(folder, descriptor)

    def _make(self, folder: Path, files: list[_Remote], ahead: bool) -> Copy | None:
        """Copy ``files`` to ``folder``; None if they changed meanwhile, or another process was faster."""
        part = folder.with_suffix(".part")
        self._folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):  # exist_ok would check again, after its writer may have renamed it
            part.mkdir()
        descriptor = _lock(part, fcntl.LOCK_EX, self._patience_s)
        if descriptor is None or folder.exists():
            if descriptor is not None:
                os.close(descriptor)
            return self._open(folder, ahead)
        try:
            self._reserve(part, files, ahead)
            for file in files:
                self._download(file, part / f"shard{file.address[file.address.rindex('.') :]}")
            if self._describe(files[0].address) != files:
                raise _Changed
            os.rename(part, folder)
        except BaseException as error:
            shutil.rmtree(part, ignore_errors=True)
            os.close(descriptor)
            if isinstance(error, _Changed):
                return None
            raise
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return Copy(folder, descriptor)

    def _reserve(self, part: Path, files: list[_Remote], ahead: bool) -> None:
        """Make room, and reserve it with files of the final size, which other processes count."""
        needed = sum(file.size for file in files)
        holder = _lock(self._folder, fcntl.LOCK_EX, self._patience_s)
        assert holder is not None
        try:
            for _ in range(2):
                others = sorted(_age_and_size(path) + (path,) for path in self._folder.iterdir() if path != part)
                used = sum(size for _, size, _ in others)
                for _, size, path in others:
                    if used + needed <= self._limit:
                        break
                    if not (ahead and (path / _UNREAD).exists()) and _remove(path):
                        used -= size
                if used + needed <= self._limit:
                    break
                gc.collect()  # shards that an old traceback keeps alive
            if used + needed > self._limit:
                raise UserError(
                    f"data.cache_gb={self._limit / 1e9:g} is too small: {used / 1e9:.3g} GB in {self._folder} are "
                    f"being read, and {files[0].address} needs {needed / 1e9:.3g} GB: raise it"
                )
            for file in files:
                with open(part / f"shard{file.address[file.address.rindex('.') :]}", "wb") as target:
                    target.truncate(file.size)
            if ahead:
                (part / _UNREAD).touch()
        finally:
            os.close(holder)

    def _download(self, file: _Remote, target: Path) -> None:
        """Copy a file in blocks; a dropped connection costs one round of blocks.

        Raises:
            _Changed: it has changed or is gone.
            ShardError: reading it is not permitted.
        """
        system, path = file_system(file.address)

        def read(starts: range) -> list[bytes]:
            ends = [min(start + _BLOCK, file.size) for start in starts]
            blocks = system.cat_ranges([path] * len(starts), list(starts), ends, on_error="return")
            for start, end, block in zip(starts, ends, blocks, strict=True):
                if isinstance(block, BaseException):
                    raise block
                if len(block) != end - start:
                    if len(block) == file.size:  # a server without range requests
                        return [block]
                    if self._info(file.address) != file:
                        raise _Changed
                    raise OSError(f"{len(block)} of {end - start} bytes at {start}")
            return blocks

        with open(target, "r+b") as out:
            num = 1  # until the server is known to support ranges
            while (done := out.tell()) < file.size:
                starts = range(done, min(done + num * _BLOCK, file.size), _BLOCK)
                try:
                    out.writelines(patiently(partial(read, starts), file.address, self._patience_s))
                except FileNotFoundError:
                    raise _Changed from None
                except PermissionError as error:
                    raise ShardError(str(error)) from None
                num = _BLOCKS_AT_ONCE
        # The folder's name has the version. An old modification time lets the copy's index be stored immediately.
        os.utime(target, (0, 0))


class _Changed(Exception):
    """A remote file has changed since copying it began."""


class _Ahead:
    """A thread that fetches shards in advance."""

    def __init__(self, cache: ShardCache) -> None:
        self.wanted: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._cache = cache
        threading.Thread(target=self._run, name="shards ahead", daemon=True).start()

    def _run(self) -> None:
        while True:
            address = self.wanted.get()
            try:
                self._cache.fetch(address, ahead=True)
            except (ShardError, CannotReach, UserError, OSError) as error:
                logger.info("%s: not prefetched: %s", address, error)


def _lock(folder: Path, kind: int, patience_s: float) -> int | None:
    """A descriptor of ``folder`` that holds the lock; None if the folder does not exist or is removed meanwhile.

    Raises:
        CannotReach: another process holds it for longer than ``patience_s``.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            if folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat()):
                return descriptor
        except BlockingIOError:
            pass
        except FileNotFoundError:  # removed in between
            pass
        except OSError as error:
            os.close(descriptor)
            if error.errno in NO_LOCKS:
                raise UserError(
                    f"{folder}: its file system does not support locks ({error.strerror}), which a shared cache needs: "
                    f"set data.cache_dir to a folder on a local disk"
                ) from None
            raise
        os.close(descriptor)
        if time.monotonic() > deadline:
            raise CannotReach(f"{folder}: locked by another process for {patience_s:.0f} s")
        time.sleep(_LOCK_POLL_S)


def _remove(folder: Path) -> bool:
    """Remove a copy unless it is being read or written; returns whether it is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def _age_and_size(folder: Path) -> tuple[int, int]:
    """When a copy was last opened, and its size; tolerates a writer that renames or removes it meanwhile."""
    since, total = 0, 0
    with suppress(FileNotFoundError, NotADirectoryError):
        since = folder.stat().st_mtime_ns
        for path in folder.iterdir():
            total += path.stat().st_size
    return since, total
