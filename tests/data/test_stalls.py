"""No rank waits forever: dead workers, hanging storage, shards that go bad while being read."""

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch

from mc2_hpc.config import DataConfig
from mc2_hpc.data.batches import Share
from mc2_hpc.data.loader import Batch, DataStalled, TrainLoader
from mc2_hpc.data.packing import pack_pairs, write_shard
from mc2_hpc.data.shards import Pair
from mc2_hpc.data.source import Failure, ShareSource
from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.data.watch import Board, Patient
from mc2_hpc.errors import UserError
from tests.holding import held

LONG_AGO = (0, 0)


@pytest.fixture(scope="module")
def pairs(make_jpeg: Callable[..., bytes]) -> list[Pair]:
    return [Pair(f"{i:04d}", make_jpeg(24, 30, seed=i), f"image {i}", "en") for i in range(60)]


@pytest.fixture
def folder(tmp_path: Path, pairs: list[Pair]) -> Path:
    """Five shards of 12 samples."""
    for path in pack_pairs(pairs, tmp_path / "shards", pairs_per_shard=12):
        os.utime(path, LONG_AGO)
    return tmp_path / "shards"


@pytest.fixture
def make_loader(tokenizer_file: Path) -> Iterator[Callable[..., TrainLoader]]:
    made: list[TrainLoader] = []

    def make(train: Path, *, rank: int = 0, world_size: int = 1, **config: object) -> TrainLoader:
        values = {"lanes": 4, "workers": 0, "stall_seconds": 60, **config}
        made.append(
            TrainLoader(
                DataConfig(train=str(train), **values),  # type: ignore[arg-type]
                global_batch=8,
                image_size=16,
                tokenizer=Tokenizer(tokenizer_file, "xlmv"),
                rank=rank,
                world_size=world_size,
            )
        )
        return made[-1]

    yield make
    for loader in made:
        loader.close()


# Storage that hangs


@pytest.mark.parametrize("workers", [0, 2])
def test_a_read_that_never_returns_names_rank_worker_and_shard(
    workers: int, make_loader: Callable[..., TrainLoader], tmp_path: Path
) -> None:
    write_shard(tmp_path / "hangs.tar", [("a", {"jpg": b"1", "txt": b"x"})])
    loader = make_loader(tmp_path, workers=workers, rank=1, world_size=2, stall_seconds=3 if workers == 0 else 12)
    expected = (
        rf"rank 1: no samples from data worker 0 \(lanes 2-{2 if workers else 3}\), which has been reading "
        rf"{tmp_path}/hangs\.tar for \d+ s: none for \d+ s; fix it and restart the run"
    )
    began = time.monotonic()
    with held(tmp_path / "hangs.tar"), pytest.raises(DataStalled, match=expected):
        next(loader)
    assert time.monotonic() - began < 60
    loader.close()
    assert not [child for child in multiprocessing.active_children() if "DataLoader" in child.name]


def test_a_shard_that_hangs_in_mid_run(make_loader: Callable[..., TrainLoader], folder: Path) -> None:
    loader = make_loader(folder, workers=1, stall_seconds=10)
    next(loader)
    paths = sorted(folder.glob("*.tar"))
    for path in paths:
        content = path.read_bytes()
        path.unlink()  # a file the worker has open stays readable
        path.write_bytes(content)
    expected = r"worker 0 \(lanes 0-3\), which has been reading .*/0000\d\.tar for"
    with held(*paths), pytest.raises(DataStalled, match=expected):
        for _ in range(100):
            next(loader)


# Workers that die


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGBUS])
def test_a_killed_worker_is_an_error_at_once(
    sent: signal.Signals, make_loader: Callable[..., TrainLoader], folder: Path
) -> None:
    loader = make_loader(folder, workers=2, stall_seconds=600)
    next(loader)
    os.kill(loader._shares.processes[1].pid or 0, sent)
    began = time.monotonic()
    hint = {signal.SIGKILL: "out of memory", signal.SIGBUS: "is /dev/shm full"}[sent]
    with pytest.raises(DataStalled, match=rf"rank 0: .*: process \d+ died \(killed by {sent.name}; {hint}\?\)"):
        for _ in range(100):
            next(loader)
    assert time.monotonic() - began < 60


def test_a_worker_killed_while_it_sends_is_noticed(make_loader: Callable[..., TrainLoader], folder: Path) -> None:
    """A half-sent share blocks its receiver: here forever, because the receiver cannot be told to stop."""
    loader = make_loader(folder, workers=1, stall_seconds=600)
    next(loader)
    block = threading.Event()
    loader._shares._shares = Patient(iter(lambda: block.wait() and None, 1))  # type: ignore[assignment, arg-type]
    loader._shares.processes[0].kill()
    with pytest.raises(DataStalled, match="killed by SIGKILL"):
        next(loader)
    block.set()


def test_an_error_of_the_code_keeps_its_traceback(
    make_loader: Callable[..., TrainLoader], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShareSource, "_share", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        next(make_loader(folder))
    assert any(entry.name == "_next_share" for entry in caught.traceback) and caught.traceback[-1].name == "<lambda>"


def test_closing_is_quick_and_leaves_no_process(make_loader: Callable[..., TrainLoader], folder: Path) -> None:
    loader = make_loader(folder, workers=2)
    next(loader)
    workers = list(loader._shares.processes)
    loader.close()
    assert workers and not any(worker.is_alive() for worker in workers)


# Shards that change while being read


def keys(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def skipped(batches: list[Batch]) -> Counter[str]:
    return sum((Counter(batch.skipped) for batch in batches), Counter())


@pytest.mark.parametrize("fault", ["vanish", "grow", "cut", "cut to nothing", "garbage"])
def test_ranks_take_the_same_steps_whatever_becomes_of_shards(
    fault: str, make_loader: Callable[..., TrainLoader], folder: Path, pairs: list[Pair], tmp_path: Path
) -> None:
    ranks = [make_loader(folder, rank=rank, world_size=2, workers=1) for rank in range(2)]
    batches = [[next(loader)] for loader in ranks]
    victim = folder / "00002.tar"
    if fault == "vanish":
        victim.unlink()
    elif fault == "grow":
        (grown,) = pack_pairs([pair._replace(key=f"x{pair.key}") for pair in pairs[:30]], tmp_path / "grown")
        victim.write_bytes(grown.read_bytes())
        os.utime(victim, (1, 1))
    elif fault.startswith("cut"):
        os.truncate(victim, 0 if "nothing" in fault else victim.stat().st_size // 2)
    else:
        victim.write_bytes(os.urandom(victim.stat().st_size))
    for _ in range(80):  # ten epochs; a reader may find the file half written and read it an epoch later
        for taken, loader in zip(batches, ranks, strict=True):
            taken.append(next(loader))
    assert all(len(batch.keys) == 4 for taken in batches for batch in taken)
    late = Counter(keys([batch for taken in batches for batch in taken[20:]]))
    counts = sum((skipped(taken) for taken in batches), Counter())
    others = {pair.key for i, pair in enumerate(pairs) if i // 12 != 2}
    assert others <= set(late)
    if fault == "grow":
        assert {key for key in late if key.startswith("x")} == {f"x{pair.key}" for pair in pairs[:30]}
        assert counts["shard_changed"] >= 1
    else:
        assert not set(late) - others and counts["shard_unreadable"] >= 2


def test_one_shard_feeds_every_rank(make_loader: Callable[..., TrainLoader], tmp_path: Path, pairs: list[Pair]) -> None:
    (only,) = pack_pairs(pairs, tmp_path / "one", pairs_per_shard=100)
    ranks = [make_loader(only, rank=rank, world_size=4) for rank in range(4)]
    taken = [[next(loader) for _ in range(8)] for loader in ranks]
    assert {len(batch.keys) for batches in taken for batch in batches} == {2}
    first_epoch = keys([batch for batches in taken for batch in batches if batch.position])
    assert len(set(first_epoch)) == 60


def test_whoever_opens_a_rewritten_shard_first_counts_it(
    make_loader: Callable[..., TrainLoader], tmp_path: Path, pairs: list[Pair]
) -> None:
    """Here a rank that begins in the middle of the shard."""
    (only,) = pack_pairs(pairs, tmp_path / "one", pairs_per_shard=100)
    os.utime(only, LONG_AGO)
    assert not skipped([next(make_loader(only, rank=1, world_size=4))])["shard_changed"]
    (shorter,) = pack_pairs(pairs[:40], tmp_path / "shorter", pairs_per_shard=100)
    only.write_bytes(shorter.read_bytes())
    os.utime(only, (1, 1))
    counts = [skipped([next(make_loader(only, rank=rank, world_size=4))])["shard_changed"] for rank in (1, 0)]
    assert counts == [1, 0]


def test_fewer_samples_than_lanes_ends_every_rank_that_finds_out(
    make_loader: Callable[..., TrainLoader], tmp_path: Path, pairs: list[Pair]
) -> None:
    pack_pairs(pairs[:3], tmp_path / "few")
    with pytest.raises(UserError, match="3 samples are too few for data.lanes=4"):
        for rank in range(4):
            next(make_loader(tmp_path / "few", rank=rank, world_size=4))


def test_a_worker_that_found_an_error_stays_to_tell_it(
    make_loader: Callable[..., TrainLoader], tmp_path: Path, pairs: list[Pair]
) -> None:
    """Its rank may still wait for another worker, and a worker that has ended would look dead to it."""
    pack_pairs(pairs[:3], tmp_path / "few")
    shares = iter(make_loader(tmp_path / "few")._shares._source)
    told = [next(share for share in shares if isinstance(share, Failure)) for _ in range(3)]
    assert all("too few" in str(failure.error) for failure in told)


# The parts


def test_images_cross_through_shared_memory(make_loader: Callable[..., TrainLoader], folder: Path) -> None:
    loader = make_loader(folder, workers=1)
    batch = next(loader)
    assert batch.images.is_shared()
    pixels = torch.zeros((256, 3, 224, 224), dtype=torch.uint8)
    tokens = torch.zeros((256, 24), dtype=torch.int64)
    big = Share(
        pixels=pixels,
        tokens=tokens,
        lengths=[24] * 256,
        keys=["0000"] * 256,
        langs=["en"] * 256,
        sources=[""] * 256,
        position=batch.position,
    )
    through_pipe = len(ForkingPickler.dumps(big))
    assert through_pipe < 5_000 < 38_000_000 < len(pickle.dumps(pixels.numpy()))


def test_board_is_shared_and_says_how_long() -> None:
    board = Board(2)
    assert board.reading(0) is None
    copy = ForkingPickler.loads(ForkingPickler.dumps(board))
    copy.writer(1)(7)
    time.sleep(0.05)
    shard, seconds = board.reading(1) or (None, 0.0)
    assert shard == 7 and 0.05 <= seconds < 30 and board.reading(0) is None
    copy.writer(1)(None)
    assert board.reading(1) is None


def test_patient_gives_every_item_once_and_errors_as_they_are() -> None:
    gate = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        gate.wait(60)
        yield 2
        raise KeyError("of the iterator")

    patient = Patient(items())
    assert patient.next(30) == 1
    for _ in range(2):
        with pytest.raises(TimeoutError):
            patient.next(0.05)
    gate.set()
    assert patient.next(30) == 2
    with pytest.raises(KeyError, match="of the iterator"):
        patient.next(30)
    with pytest.raises(StopIteration):
        patient.next(30)
    patient.close(30)
