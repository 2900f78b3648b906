"""Lanes: every sample once per epoch, resume anywhere, bad data skipped and counted, never an endless search."""

import itertools
import os
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mc2_hpc.data.locations import LocalShards
from mc2_hpc.data.packing import write_shard
from mc2_hpc.data.stream import Deck, Lane, Position, ShardPool
from mc2_hpc.drops import Dropped
from mc2_hpc.errors import UserError


def decode(data: bytes, key_hash: np.uint64, epoch: int) -> torch.Tensor:
    if data == b"bad":
        raise Dropped("image_undecodable")
    return torch.zeros(1)


def write(folder: Path, sizes: list[int], bad: set[str] = frozenset()) -> list[Path]:
    """Shards of the given sizes; keys are ``shard-index``."""
    paths = []
    for number, size in enumerate(sizes):
        keys = [f"{number}-{index}" for index in range(size)]
        paths.append(folder / f"{number:04d}.tar")
        write_shard(paths[-1], [(key, {"jpg": b"bad" if key in bad else b"good", "txt": b"x"}) for key in keys])
    return paths


def pool(paths: list[Path], lanes: int, seed: int = 0) -> ShardPool:
    shards = LocalShards(paths, paths[0].parent / "cache")
    return ShardPool(shards, lanes=lanes, seed=seed, probs=None, transform=decode, name="test data")


class EpochOver(Exception):
    """The lane has reached the end of the epoch."""


class OneEpoch(Lane):
    def _finish_epoch(self) -> None:
        raise EpochOver


def epoch_of(shards: ShardPool, lane: int, epoch: int) -> list[str]:
    """The keys of a lane in one epoch; the pool has counted only that epoch's skips."""
    keys = []
    with pytest.raises(EpochOver):
        for example in OneEpoch(shards, lane, Position(epoch)):
            keys.append(example.pair.key)
    return keys


SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=9)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(1, 12), st.integers(0, 3), st.integers(0, 2))
def test_every_good_sample_of_an_epoch_comes_once(sizes: list[int], lanes: int, seed: int, epoch: int) -> None:
    lanes = min(lanes, sum(sizes))
    names = [f"{number}-{index}" for number, size in enumerate(sizes) for index in range(size)]
    bad = set(names[1::5])
    with tempfile.TemporaryDirectory() as folder:
        shards = pool(write(Path(folder), sizes, bad), lanes, seed)
        found = [key for lane in range(lanes) for key in epoch_of(shards, lane, epoch)]
    assert sorted(found) == sorted(set(names) - bad)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 9))
def test_hands_make_up_every_shard_once_in_equal_lengths(num_shards: int, lanes: int, epoch: int) -> None:
    deck = Deck([f"{i:05d}.tar" for i in range(num_shards)], lanes=lanes, seed=1)
    hands = [deck.hand(epoch, lane) for lane in range(lanes)]
    assert {sum(part.end - part.begin for part in hand) for hand in hands} == {num_shards}
    spans: dict[int, list[tuple[int, int]]] = {}
    for part in itertools.chain(*hands):
        assert part.begin < part.end <= part.of == lanes
        spans.setdefault(part.shard, []).append((part.begin, part.end))
    assert sorted(spans) == list(range(num_shards))
    for of_shard in spans.values():
        edges = [0, *(end for _, end in sorted(of_shard))]
        assert sorted(of_shard) == list(itertools.pairwise(edges)) and edges[-1] == lanes


def test_order_changes_with_epoch_and_seed(tmp_path: Path) -> None:
    paths = write(tmp_path, [30, 30, 30])
    orders = {tuple(epoch_of(pool(paths, 1, seed), 0, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    first = epoch_of(pool(paths, 1), 0, 0)
    assert first == epoch_of(pool(paths, 1), 0, 0)
    # Shards are read one after another, each in its own order.
    shard_order = [key for key, _ in itertools.groupby(key.split("-")[0] for key in first)]
    assert sorted(shard_order) == ["0", "1", "2"]
    inside = [[int(key.split("-")[1]) for key in first if key.startswith(f"{n}-")] for n in range(3)]
    assert inside[0] != sorted(inside[0]) and inside[0] != inside[1]


@settings(max_examples=30, deadline=None)
@given(SIZES, st.integers(1, 5), st.lists(st.integers(1, 7), min_size=1, max_size=8))
def test_resume_at_any_position_goes_on_exactly(sizes: list[int], lanes: int, pieces: list[int]) -> None:
    lanes = min(lanes, sum(sizes))
    names = [f"{number}-{index}" for number, size in enumerate(sizes) for index in range(size)]
    with tempfile.TemporaryDirectory() as folder:
        paths = write(Path(folder), sizes, set(names[1::4]))
        whole = Lane(pool(paths, lanes), lanes - 1, Position())
        expected = [next(whole).pair.key for _ in range(sum(pieces))]
        position, found = Position(), []
        for length in pieces:
            part = Lane(pool(paths, lanes), lanes - 1, position)  # like a new process
            found += [next(part).pair.key for _ in range(length)]
            position = part.position
    assert found == expected and position == whole.position


def test_bad_samples_and_shards_are_counted_once(tmp_path: Path) -> None:
    paths = write(tmp_path, [10, 10, 10], bad={"0-3", "1-7"})
    paths[2].write_bytes(b"")
    for lanes in (1, 2, 7):  # fewer and more lanes than shards
        shards = pool(paths, lanes)
        found = [key for lane in range(lanes) for key in epoch_of(shards, lane, 0)]
        assert len(found) == len(set(found)) == 18
        assert shards.skipped == Counter(image_undecodable=2, shard_unreadable=1), lanes


def test_a_lane_without_anything_good_waits_for_the_next_epoch(tmp_path: Path) -> None:
    paths = write(tmp_path, [6, 6])
    paths[0].unlink()
    shards = pool(paths, 2)
    for lane in (0, 1):
        stream = Lane(shards, lane, Position())
        assert all(next(stream).pair.key.startswith("1-") for _ in range(20))


@pytest.mark.parametrize("kind", ["images", "shards", "gone"])
def test_nothing_good_at_all_is_an_error(kind: str, tmp_path: Path) -> None:
    paths = write(tmp_path, [5, 5], bad={f"{n}-{i}" for n in range(2) for i in range(5)})
    for path in paths:
        if kind == "shards":
            path.write_bytes(path.read_bytes()[:700])
        elif kind == "gone":
            path.unlink()
    expected = {"images": "image_undecodable 10", "shards": "shard_unreadable 2", "gone": "shard_unreadable 2"}[kind]
    for lanes in (1, 2, 5):
        with pytest.raises(UserError, match=f"test data: no sample can be used; .*: {expected}"):
            next(Lane(pool(paths, lanes), lanes - 1, Position()))


def test_data_that_vanish_during_a_run_end_it(tmp_path: Path) -> None:
    paths = write(tmp_path, [5, 5])
    shards = pool(paths, 1)
    stream = Lane(shards, 0, Position())
    for _ in range(12):
        next(stream)
    for path in paths:
        path.unlink()
    with pytest.raises(UserError, match="shard_unreadable 2"):
        for _ in range(50):
            next(stream)


def test_one_shard_that_vanishes_is_skipped_from_the_next_epoch_on(tmp_path: Path) -> None:
    paths = write(tmp_path, [5, 5])
    shards = pool(paths, 1)
    stream = Lane(shards, 0, Position())
    next(stream)
    os.unlink(paths[0])
    later = [next(stream).pair.key for _ in range(40)]
    assert set(later[10:]) == {f"1-{index}" for index in range(5)} and shards.skipped["shard_unreadable"] >= 5


def test_fewer_samples_than_lanes_is_an_error(tmp_path: Path) -> None:
    paths = write(tmp_path, [3, 2])
    with pytest.raises(UserError, match="5 samples are too few for data.lanes=6"):
        for lane in range(6):
            epoch_of(pool(paths, 6), lane, 0)
    assert sum(len(epoch_of(pool(paths, 5), lane, 0)) for lane in range(5)) == 5


def test_position_beyond_a_shard_that_shrank_goes_on(tmp_path: Path) -> None:
    paths = write(tmp_path, [4, 4])
    shards = pool(paths, 1)
    beyond_shard = Lane(shards, 0, Position(0, 0, 99))
    assert len({next(beyond_shard).pair.key for _ in range(4)}) == 4 and beyond_shard.position == Position(0, 1, 4)
    beyond_hand = Lane(shards, 0, Position(0, 7, 0))
    next(beyond_hand)
    assert beyond_hand.position == Position(1, 0, 1)
