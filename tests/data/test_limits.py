"""The machine's limits are checked at the start: open files, shared memory, locks."""

import errno
import fcntl
import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mc2_hpc.config import DataConfig
from mc2_hpc.data import shards
from mc2_hpc.data.index import cache_folder
from mc2_hpc.data.limits import check_memory, check_open_files, check_shared_memory
from mc2_hpc.data.loader import DataStalled, TrainLoader
from mc2_hpc.data.packing import pack_pairs
from mc2_hpc.data.remote import _lock
from mc2_hpc.data.shards import Pair, open_shard
from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.errors import UserError

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def folder(make_jpeg: Callable[..., bytes], tmp_path: Path) -> Path:
    image = make_jpeg(24, 30)
    pack_pairs([Pair(f"{i:04d}", image, "words") for i in range(40)], tmp_path / "shards", pairs_per_shard=10)
    return tmp_path / "shards"


@pytest.fixture
def make_loader(tokenizer_file: Path, folder: Path) -> Iterator[Callable[..., TrainLoader]]:
    made: list[TrainLoader] = []

    def make(**config: object) -> TrainLoader:
        values = DataConfig(train=str(folder), lanes=4, **config)  # type: ignore[arg-type]
        tokenizer = Tokenizer(tokenizer_file, "xlmv")
        made.append(TrainLoader(values, global_batch=8, image_size=16, tokenizer=tokenizer, rank=0, world_size=1))
        return made[-1]

    yield make
    for loader in made:
        loader.close()


@pytest.fixture
def few_files(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], list[tuple[int, int]]]:
    """``few_files(soft, hard)`` sets the limits; returns those that are requested."""

    def limit(soft: int, hard: int) -> list[tuple[int, int]]:
        asked: list[tuple[int, int]] = []
        monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
        monkeypatch.setattr(resource, "setrlimit", lambda kind, values: asked.append(values))
        return asked

    return limit


def test_the_limit_of_files_is_raised_as_far_as_it_goes(few_files: Callable[..., list[tuple[int, int]]]) -> None:
    asked = few_files(256, 4096)
    check_open_files(shards=256, workers=6, prefetch=2, world_size=8)
    assert asked == [(4096, 4096)]


def test_too_few_files_are_one_line(few_files: Callable[..., object], make_loader: Callable[..., TrainLoader]) -> None:
    few_files(64, 64)
    with pytest.raises(UserError, match=r"^at most 64 files may be open .* needs up to 91: .*`ulimit -n 1024`"):
        make_loader(workers=2)
    make_loader(workers=0)


def test_a_shard_for_which_there_is_no_file_left_is_not_skipped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(shards, "LocalFile", refuse)
    with pytest.raises(UserError, match=r"00000.tar: Too many open files: raise the limit \(`ulimit -n`\)"):
        open_shard(folder / "00000.tar")


def test_shared_memory_that_is_too_small(
    make_loader: Callable[..., TrainLoader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10_000, 0, 10_000))
    share = 2 * 2 * 3 * 16 * 16  # two lanes of two images
    message = rf"^/dev/shm has 0.0 MB, .* take up to {share * 2 * 4 / 1e6:.1f} MB: make it larger .*data.workers=0"
    with pytest.raises(UserError, match=message):
        make_loader(workers=2, prefetch=3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(UserError, match=r"/dev/shm has"):
        make_loader(workers=1, prefetch=1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    check_shared_memory(0, workers=2, prefetch=2)
    next(make_loader(workers=0))


def test_a_batch_larger_than_the_memory_is_one_line(make_loader: Callable[..., TrainLoader]) -> None:
    with pytest.raises(UserError, match="the images of one batch take .* GB of it: set a smaller global_batch"):
        check_memory(1 << 60)
    next(make_loader(workers=0))


def test_shared_memory_that_fills_up_is_named(
    make_loader: Callable[..., TrainLoader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a worker, where torch would report it in a thread without a listener."""

    def full(self: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    loader = make_loader(workers=0)
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    monkeypatch.setattr("mc2_hpc.data.source.get_worker_info", lambda: namedtuple("Info", "id num_workers")(0, 1))
    with pytest.raises(DataStalled, match=r"/dev/shm is full \(unable to allocate .*\): make it larger"):
        next(loader)


def test_a_cache_needs_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="does not support locks .*: set data.cache_dir to a folder on a local disk"):
        _lock(tmp_path, fcntl.LOCK_EX, 1)


def test_a_user_without_a_home_has_a_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    assert cache_folder().name == f"mc2_hpc-{os.getuid()}"


def test_warnings_of_pillow_stay_out_of_the_log(make_jpeg: Callable[..., bytes], tmp_path: Path) -> None:
    """In a separate process, because pytest has its own filters."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + bytes([0, 2, 2, 0, 232, 3, 0, 0, 136, 19, 0, 0])
    (tmp_path / "damaged.jpg").write_bytes(make_jpeg(24, 30, mode="CMYK", exif=exif))
    code = """
import sys
from PIL import Image
Image.open(sys.argv[1]).getexif()
print("warned so far", file=sys.stderr)
from mc2_hpc.data.decode import EvalTransform
EvalTransform(16)(open(sys.argv[1], "rb").read())
"""
    command = [sys.executable, "-W", "always", "-c", code, str(tmp_path / "damaged.jpg")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    before, after = result.stderr.split("warned so far")
    assert result.returncode == 0 and "UserWarning" in before and "UserWarning" not in after, result.stderr
