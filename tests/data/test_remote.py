"""Remote shards: a bounded cache shared by processes, temporary and permanent faults, real S3 and HTTP servers."""

import fcntl
import importlib.util
import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mc2_hpc.config import DataConfig
from mc2_hpc.data import remote
from mc2_hpc.data.loader import DataStalled, TrainLoader
from mc2_hpc.data.locations import find_shards
from mc2_hpc.data.packing import pack_pairs, write_shard
from mc2_hpc.data.remote import CannotReach, ShardCache
from mc2_hpc.data.shards import CuratedShard, Pair
from mc2_hpc.data.skips import ShardError
from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.errors import UserError
from tests.data.remote_servers import Web, http_server

needs_http = pytest.mark.skipif(importlib.util.find_spec("aiohttp") is None, reason="aiohttp is not installed")
needs_s3 = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("s3fs", "moto", "flask")),
    reason="s3fs and moto[server] are not installed",
)


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True) if system.exists("/") else None


@pytest.fixture
def web() -> Iterator[Web]:
    with http_server() as server:
        yield server


@pytest.fixture(autouse=True)
def quick_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_PAUSE_S", 0.02)


def tar_of(folder: Path, keys: list[str], payload: bytes = b"p" * 3000) -> bytes:
    path = folder / "made.tar"
    write_shard(path, [(key, {"jpg": key.encode() + payload, "txt": b"x"}) for key in keys])
    return path.read_bytes()


def upload(memory: fsspec.AbstractFileSystem, folder: Path, number: int) -> list[str]:
    """Shards of about 20 kB."""
    addresses = [f"memory:///data/{i:03d}.tar" for i in range(number)]
    for i, address in enumerate(addresses):
        memory.pipe(address, tar_of(folder, [f"{i}-{j}" for j in range(4)]))
    return addresses


def cached(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix != ".part")


# The cache


def test_a_shard_is_copied_once(
    memory: fsspec.AbstractFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (address,) = upload(memory, tmp_path, 1)
    shards = find_shards("memory:///data", cache=tmp_path / "cache")
    assert shards.names == [address]
    shard = shards.open(0)
    assert shard.read(2, seed=0, epoch=0).image[:3] == b"0-2" and shard.name == address
    monkeypatch.setattr(type(memory), "cat_ranges", None)  # not called again
    assert shards.open(0).num_keys == 4
    copy = cached(tmp_path / "cache" / "shards")[0]
    assert sorted(path.name for path in copy.iterdir()) == [".shard.tar.index", "shard.tar"]


def test_a_stamp_tells_a_rewritten_shard_without_reading_it(
    memory: fsspec.AbstractFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (address,) = upload(memory, tmp_path, 1)
    shards = find_shards("memory:///data", cache=tmp_path / "cache")
    stamp = shards.stamp(0)
    assert find_shards(address, cache=tmp_path / "cache").stamp(0) == stamp
    memory.pipe(address, memory.cat_file(address))
    monkeypatch.setattr(type(memory), "cat_ranges", None)
    assert shards.stamp(0) != stamp
    memory.rm(address)
    with pytest.raises(ShardError, match="No such file"):
        shards.stamp(0)


def test_parquet_comes_along(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    (address,) = upload(memory, tmp_path, 1)
    pq.write_table(pa.table({"key": ["0-1"], "text": ["hello"]}), tmp_path / "p.parquet")
    memory.pipe(address.replace(".tar", ".parquet"), (tmp_path / "p.parquet").read_bytes())
    shard = find_shards(address, cache=tmp_path / "cache").open(0)
    assert isinstance(shard, CuratedShard) and shard.read(0, seed=0, epoch=0).text == "hello"


def test_a_rewritten_shard_is_copied_again(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    (address,) = upload(memory, tmp_path, 1)
    shards = find_shards(address, cache=tmp_path / "cache")
    assert shards.open(0).num_keys == 4
    memory.pipe(address, tar_of(tmp_path, ["a", "b"]))
    assert shards.open(0).num_keys == 2
    memory.rm(address)
    with pytest.raises(ShardError, match="No such file"):
        shards.open(0)


def test_copies_read_longest_ago_make_room(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    addresses = upload(memory, tmp_path, 6)
    size = memory.info(addresses[0])["size"]
    folder = tmp_path / "cache"
    cache = ShardCache(folder, 3 * size + size // 2, 5)
    for address in addresses:
        cache.fetch(address)
        used = sum(path.stat().st_size for path in folder.rglob("*.tar"))
        assert used <= 3 * size + size // 2
    assert len(cached(folder)) == 3
    kept = {path.stat().st_ino for path in folder.rglob("*.tar")}
    for address in addresses[3:]:
        assert cache.fetch(address).tar.stat().st_ino in kept


def test_a_shard_in_use_stays_and_too_little_room_is_an_error(
    memory: fsspec.AbstractFileSystem, tmp_path: Path
) -> None:
    addresses = upload(memory, tmp_path, 3)
    size = memory.info(addresses[0])["size"]
    cache = ShardCache(tmp_path / "cache", 2 * size, 5)
    held = [cache.fetch(address) for address in addresses[:2]]
    with pytest.raises(UserError, match=r"data\.cache_gb=.* is too small: .* are being read, and memory:///data/002"):
        cache.fetch(addresses[2])
    assert all(copy.tar.is_file() for copy in held)
    del held[0]
    assert cache.fetch(addresses[2]).tar.is_file()


def test_reading_ahead_takes_no_room_from_what_is_still_unread(
    memory: fsspec.AbstractFileSystem, tmp_path: Path
) -> None:
    addresses = upload(memory, tmp_path, 3)
    size = memory.info(addresses[0])["size"]
    cache = ShardCache(tmp_path / "cache", 2 * size + size // 2, 5)
    cache.fetch(addresses[0], ahead=True)
    cache.fetch(addresses[1], ahead=True)
    with pytest.raises(UserError, match="is too small"):
        cache.fetch(addresses[2], ahead=True)
    cache.fetch(addresses[0])  # read and released
    cache.fetch(addresses[2], ahead=True)
    assert len(cached(tmp_path / "cache")) == 2


def test_the_next_shard_is_fetched_in_the_background(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    upload(memory, tmp_path, 2)
    shards = find_shards("memory:///data", cache=tmp_path / "cache")
    shards.expect(1)
    deadline = time.monotonic() + 20
    while not (tmp_path / "cache" / "shards").is_dir() or not cached(tmp_path / "cache" / "shards"):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_abandoned_copy_is_taken_over(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    addresses = upload(memory, tmp_path, 2)
    cache = ShardCache(tmp_path / "cache", 10**6, 5)
    digest = cache.fetch(addresses[0]).tar.parent
    part = digest.with_suffix(".part")
    shutil.move(digest, part)
    (part / "shard.tar").write_bytes(b"half")
    assert cache.fetch(addresses[0]).tar.stat().st_size == memory.info(addresses[0])["size"]
    assert not part.exists()


def test_a_copy_that_somebody_else_makes_is_waited_for_but_not_for_ever(
    memory: fsspec.AbstractFileSystem, tmp_path: Path
) -> None:
    (address,) = upload(memory, tmp_path, 1)
    cache = ShardCache(tmp_path / "cache", 10**6, 0.3)
    part = cache.fetch(address).tar.parent.with_suffix(".part")
    shutil.rmtree(part.with_suffix(""))
    part.mkdir()
    descriptor = os.open(part, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(CannotReach, match="locked by another process"):
        cache.fetch(address)
    os.close(descriptor)
    assert cache.fetch(address).tar.is_file()


def test_a_copy_that_is_finished_between_two_looks(
    memory: fsspec.AbstractFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (address,) = upload(memory, tmp_path, 1)
    mkdir = os.mkdir

    def just_too_late(path: str | Path, *arguments: int) -> None:
        if str(path).endswith(".part"):
            monkeypatch.undo()
            ShardCache(tmp_path / "cache", 10**6, 5).fetch(address)
            raise FileExistsError(17, "File exists", str(path))
        mkdir(path, *arguments)

    monkeypatch.setattr(os, "mkdir", just_too_late)
    assert ShardCache(tmp_path / "cache", 10**6, 5).fetch(address).tar.is_file()


def _hold(folder: str, address: str, queue: "multiprocessing.Queue[int]") -> None:
    """In a separate process: fetch repeatedly, like workers of several ranks."""
    cache = ShardCache(Path(folder), 10**9, 30)
    queue.put(cache.fetch(address).tar.stat().st_ino)


@needs_http
def test_processes_share_one_copy(web: Web, tmp_path: Path) -> None:
    web.files["/0.tar"] = tar_of(tmp_path, [f"{i}" for i in range(20)])
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    arguments = (str(tmp_path / "cache"), f"{web.address}/0.tar", queue)
    processes = [context.Process(target=_hold, args=arguments, daemon=True) for _ in range(3)]
    for process in processes:
        process.start()
    inodes = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(20)
    assert len(inodes) == 1 and web.gets["/0.tar"] == 1


# Faults


@needs_http
@pytest.mark.parametrize("fault", ["drop", "busy"])
def test_faults_that_pass_cost_nothing_but_time(
    fault: str, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_BLOCK", 10_000)
    web.fault = fault
    web.files["/0.tar"] = tar_of(tmp_path, [f"{i}" for i in range(40)])
    web.faults["/0.tar"] = 3
    copy = ShardCache(tmp_path / "cache", 10**9, 30).fetch(f"{web.address}/0.tar")
    assert copy.tar.read_bytes() == web.files["/0.tar"]
    # Blocks that arrived are not requested again: 12 of them, and 3 rounds of at most 4 that failed.
    assert 15 <= web.gets["/0.tar"] <= 12 + 3 * 4


@needs_http
def test_faults_that_stay_end_in_an_error_that_names_the_shard(web: Web, tmp_path: Path) -> None:
    web.fault = "busy"
    web.files["/0.tar"] = tar_of(tmp_path, ["a"])
    web.faults["/0.tar"] = 10**9
    began = time.monotonic()
    with pytest.raises(CannotReach, match=r"/0\.tar: could not be read for 1 s: .*503") as caught:
        ShardCache(tmp_path / "cache", 10**9, 1).fetch(f"{web.address}/0.tar")
    assert time.monotonic() - began < 20 and "\n" not in str(caught.value)
    assert cached(tmp_path / "cache") == [] and not list((tmp_path / "cache").glob("*.part"))


@needs_http
def test_a_server_that_knows_no_ranges(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_BLOCK", 10_000)
    web.ranges = False
    web.files["/0.tar"] = tar_of(tmp_path, [f"{i}" for i in range(40)])
    copy = ShardCache(tmp_path / "cache", 10**9, 5).fetch(f"{web.address}/0.tar")
    assert copy.tar.read_bytes() == web.files["/0.tar"] and web.gets["/0.tar"] == 1


def test_a_shard_that_changes_while_it_is_copied(
    memory: fsspec.AbstractFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (address,) = upload(memory, tmp_path, 1)
    cat_ranges = type(memory).cat_ranges
    rewrites = [["a"], ["a", "b"]]

    def rewriting(self: object, *args: object, **kwargs: object) -> list[bytes]:
        if rewrites:
            memory.pipe(address, tar_of(tmp_path, rewrites.pop()))
        return cat_ranges(self, *args, **kwargs)

    monkeypatch.setattr(type(memory), "cat_ranges", rewriting)
    assert find_shards(address, cache=tmp_path / "cache").open(0).num_keys == 1
    rewrites += [[f"{i}" for i in range(n)] for n in range(5, 20)]
    memory.pipe(address, tar_of(tmp_path, ["x", "y", "z"]))
    with pytest.raises(ShardError, match="changed 3 times while being copied"):
        find_shards(address, cache=tmp_path / "cache2").open(0)


def test_a_full_disk_does_not_make_a_shard_bad(
    memory: fsspec.AbstractFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (address,) = upload(memory, tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardCache, "_download", full)
    with pytest.raises(OSError, match="No space left"):
        ShardCache(tmp_path / "cache", 10**9, 5).fetch(address)


# Whole runs


@pytest.fixture
def pairs(make_jpeg: Callable[..., bytes]) -> list[Pair]:
    return [Pair(f"{i:04d}", make_jpeg(24, 30, seed=i), f"image {i}", "en") for i in range(48)]


def train(spec: str, tokenizer_file: Path, cache: Path, steps: int, workers: int, **config: object) -> tuple:
    loader = TrainLoader(
        DataConfig(train=spec, lanes=4, workers=workers, cache_dir=str(cache), **config),  # type: ignore[arg-type]
        global_batch=8,
        image_size=16,
        tokenizer=Tokenizer(tokenizer_file, "xlmv"),
        rank=0,
        world_size=1,
    )
    try:
        batches = [next(loader) for _ in range(steps)]
    finally:
        loader.close()
    return [batch.keys for batch in batches], sum((Counter(batch.skipped) for batch in batches), Counter())


TRAIN_WITH_WORKERS = """
import json, sys
from mc2_hpc.config import DataConfig
from mc2_hpc.data.loader import TrainLoader
from mc2_hpc.data.tokenizer import Tokenizer

train, tokenizer, cache = sys.argv[1:]
config = DataConfig(train=train, lanes=4, workers=2, cache_dir=cache)
loader = TrainLoader(
    config, global_batch=8, image_size=16, tokenizer=Tokenizer(tokenizer, "xlmv"), rank=0, world_size=1
)
keys = [next(loader).keys for _ in range(12)]
loader.close()
print(json.dumps(keys))
"""


@needs_s3
def test_training_and_evaluation_from_s3(
    tokenizer_file: Path, pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moto.server import ThreadedMotoServer

    paths = pack_pairs(pairs, tmp_path / "shards", pairs_per_shard=8)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        system = fsspec.filesystem("s3")
        system.mkdir("images")
        for path in paths:
            system.put_file(str(path), f"images/train/{path.name}")
        local = train(str(tmp_path / "shards"), tokenizer_file, tmp_path / "cache", steps=12, workers=0)[0]
        assert train("s3://images/train", tokenizer_file, tmp_path / "cache", steps=12, workers=0) == (local, {})
        assert len({key for batch in local[:6] for key in batch}) == 48
        # Workers get the environment of the process that started the first one, so this runs in a separate process.
        arguments = ("s3://images/train", str(tokenizer_file), str(tmp_path / "cache2"))
        command = [sys.executable, "-c", TRAIN_WITH_WORKERS, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout.splitlines()[-1]) == local
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
        remote = find_shards("s3://images/train/*.tar")
        opened = [remote.open(number) for number in range(len(remote.names))]
        captions = [caption for shard in opened for n in range(shard.num_keys) for caption in shard.read_captions(n)]
        assert captions == [(pair.text, pair.lang) for pair in pairs]
        assert [shard.read_image(n) for shard in opened for n in range(shard.num_keys)] == [p.image for p in pairs]
        with pytest.raises(UserError, match="no such folder, file or list"):
            find_shards("s3://images/elsewhere")
    finally:
        server.stop()


@needs_http
def test_training_over_bad_http(web: Web, tokenizer_file: Path, pairs: list[Pair], tmp_path: Path) -> None:
    paths = pack_pairs(pairs, tmp_path / "shards", pairs_per_shard=8)
    web.files = {f"/{path.name}": path.read_bytes() for path in paths}
    web.faults = Counter(dict.fromkeys(web.files, 1))
    spec = f"{web.address}/{{00000..00006}}.tar"  # the last one does not exist
    keys, skipped = train(spec, tokenizer_file, tmp_path / "cache", steps=12, workers=1)
    assert {key for batch in keys for key in batch} == {pair.key for pair in pairs}
    assert set(skipped) == {"shard_unreadable"}


def test_missing_credentials_are_an_error_at_once() -> None:
    class NoCredentialsError(Exception):
        """Like botocore's."""

    NoCredentialsError.__module__ = "botocore.exceptions"

    def refuse() -> None:
        raise NoCredentialsError("Unable to locate credentials")

    began = time.monotonic()
    with pytest.raises(CannotReach, match="s3://x: Unable to locate credentials"):
        remote.patiently(refuse, "s3://x", 600)
    with pytest.raises(ZeroDivisionError):
        remote.patiently(lambda: 1 / 0, "s3://x", 600)
    assert time.monotonic() - began < 30


@needs_http
def test_a_server_that_stops_answering_ends_the_run(
    web: Web, tokenizer_file: Path, pairs: list[Pair], tmp_path: Path
) -> None:
    paths = pack_pairs(pairs, tmp_path / "shards", pairs_per_shard=24)
    web.files = {f"/{path.name}": path.read_bytes() for path in paths}
    web.fault, web.faults = "hang", Counter(dict.fromkeys(web.files, 1000))
    spec = f"{web.address}/{{00000..00001}}.tar"
    with pytest.raises(
        DataStalled, match=r"rank 0: .*data worker 0 \(lanes 0-3\), which has been reading http://.*\.tar for"
    ):
        train(spec, tokenizer_file, tmp_path / "cache", steps=1, workers=1, stall_seconds=4)
