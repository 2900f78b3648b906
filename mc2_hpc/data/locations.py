"""Where shards are: the forms of ``data.train``, and the list of local or remote shards that it means.

============================================  =======================================================================
``data.train``                                means
============================================  =======================================================================
a folder, a file or a pattern                 local shards, see :mod:`mc2_hpc.shard_paths`
``…/{000..127}.tar``, ``…/{en,de}/*.tar``     every expansion of the braces; local or remote
``one::two``, or a list                       the shards of all of them, either all local or all remote
``s3://…``, ``gs://…``, ``hf://datasets/…``   a folder (its ``.tar`` files), a file or a glob pattern there
``http(s)://…``                               a file, a page that links to shards, or braces
an address that ends in ``.txt``              a list, one shard per line: addresses, or names beside the list
``file://…``                                  the local path
============================================  =======================================================================

Other fsspec protocols work in the same way; their packages come with ``pip install 'mc2_hpc[remote]'``. Credentials and
endpoints are read from where those packages look for them (``AWS_ENDPOINT_URL``, ``FSSPEC_S3_…``, ``~/.aws``).
"""

from pathlib import Path
from typing import Protocol

from mc2_hpc.data.index import cache_folder
from mc2_hpc.data.remote import CannotReach, ShardCache, file_system, patiently
from mc2_hpc.data.shards import PLAIN, Extras, Shard, open_shard
from mc2_hpc.data.skips import ShardError
from mc2_hpc.errors import UserError
from mc2_hpc.shard_paths import Names, expand_braces, list_shards, split_names

# Short, because at the start somebody may be watching and nothing is lost yet.
_LISTING_PATIENCE_S = 60


class ShardSet(Protocol):
    """The shards of a run in the same order on every process; picklable."""

    names: list[str]
    """Paths or addresses, for messages; the last part also seeds the order of shards."""

    def open(self, number: int) -> Shard:
        """Raises ShardError if the shard cannot be used, CannotReach if that is unknown."""
        ...

    def stamp(self, number: int) -> str:
        """Sizes and modification times, or versions, of the shard's files, which are not read.

        Raises ShardError if the shard cannot be used, CannotReach if that is unknown."""
        ...

    def expect(self, number: int) -> None:
        """Shard ``number`` will be needed soon."""
        ...


def find_shards(
    spec: Names,
    *,
    cache: str | Path | None = None,
    cache_gb: float = 100,
    patience_s: float = 600,
    extras: Extras = PLAIN,
) -> ShardSet:
    """The shards that ``spec`` means, by the module's table.

    Args:
        cache: folder for remote shards and for indexes that cannot be beside their shard; None: the user's folder.
        cache_gb: the most that remote shards may take there, in 10^9 bytes.
        patience_s: how long to retry when storage returns errors.
        extras: to read of samples.

    Raises:
        UserError: nothing is there, the storage does not answer, or its package is not installed.
    """
    folder = Path(cache) if cache is not None else cache_folder()
    parts = [name.removeprefix("file://") for name in split_names(spec)]
    num_remote = sum("://" in part for part in parts)
    if num_remote == 0:
        return LocalShards(list_shards(parts, ".tar"), folder, extras)
    if num_remote < len(parts):
        raise UserError(f"{spec}: names both local and remote shards; copy one kind to where the other is")
    try:
        names = sorted({name for part in parts for name in _list_remote(part, min(patience_s, _LISTING_PATIENCE_S))})
    except CannotReach as error:
        raise UserError(f"{spec}: {error}") from None
    if not names:
        raise UserError(f"{spec}: no *.tar shards there")
    return RemoteShards(names, ShardCache(folder / "shards", int(cache_gb * 1e9), patience_s), extras)


class LocalShards:
    """Shards in a file system of this machine."""

    def __init__(self, paths: list[Path], cache: Path, extras: Extras = PLAIN) -> None:
        self.names = [str(path) for path in paths]
        self._extras = extras
        self._cache = cache

    def open(self, number: int) -> Shard:
        return open_shard(Path(self.names[number]), cache=self._cache, extras=self._extras)

    def stamp(self, number: int) -> str:
        tar = Path(self.names[number])
        table = tar.with_suffix(".parquet")
        try:
            found = [file.stat() for file in (tar, table) if file == tar or file.exists()]
        except OSError as error:
            raise ShardError(error.strerror or str(error)) from None
        return repr([(status.st_size, status.st_mtime_ns) for status in found])

    def expect(self, number: int) -> None:
        """Nothing to do: the system reads ahead by itself."""


class RemoteShards:
    """Shards in remote storage, copied to a local folder of bounded size before they are read."""

    def __init__(self, names: list[str], cache: ShardCache, extras: Extras = PLAIN) -> None:
        self.names = names
        self._extras = extras
        self._cache = cache

    def open(self, number: int) -> Shard:
        copy = self._cache.fetch(self.names[number])
        return open_shard(copy.tar, name=self.names[number], pin=copy, extras=self._extras)

    def stamp(self, number: int) -> str:
        return self._cache.stamp(self.names[number])

    def expect(self, number: int) -> None:
        self._cache.fetch_ahead(self.names[number])


def _list_remote(spec: str, patience_s: float) -> list[str]:
    expanded = expand_braces(spec)
    return sorted({name for one in expanded for name in _list_address(one, patience_s)})


def _list_address(address: str, patience_s: float) -> list[str]:
    has_pattern = any(letter in address.partition("://")[2] for letter in "*[")
    if address.endswith(".tar") and not has_pattern:
        return [address]
    system, path = file_system(address)
    try:
        if address.endswith(".txt"):
            lines = patiently(lambda: system.cat_file(path), address, patience_s).decode("utf-8").split()
            return [line if "://" in line else f"{address.rpartition('/')[0]}/{line}" for line in lines]
        if has_pattern:
            found = patiently(lambda: system.glob(path), address, patience_s)
        else:
            found = patiently(lambda: system.ls(path, detail=False), address, patience_s)
    except FileNotFoundError:
        raise UserError(f"{address}: no such folder, file or list") from None
    except (PermissionError, UnicodeDecodeError) as error:
        raise UserError(f"{address}: cannot be listed: {error}") from None
    return [str(system.unstrip_protocol(name)) for name in found if _is_shard(name)]


def _is_shard(name: str) -> bool:
    return name.endswith(".tar") and not name.rpartition("/")[2].startswith(".")
