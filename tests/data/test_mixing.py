"""Mixed lanes: shares follow the weights, every source has each sample once per epoch, and any position resumes."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mc2_hpc.config import DataConfig
from mc2_hpc.data.mixing import BLOCK, MixPosition, SourceDraws, from_plain, in_sources, to_plain
from mc2_hpc.data.packing import write_shard
from mc2_hpc.data.pools import make_lane, make_pools, open_sources
from mc2_hpc.data.stream import Lane, Position, ShardPool
from mc2_hpc.drops import Drop, Dropped
from mc2_hpc.errors import UserError
from mc2_hpc.train_sources import TrainSource

SIZES = {"a": 60, "b": 35, "c": 21}
LANES = 3

RECORDED_DRAWS = "00010102000101020001010200201010002010100020101000201010002010100020101000201010"
RECORDED_ORDER = [11, 51, 26, 1, 17, 47, 52, 27, 32, 57, 7, 2, 42, 37, 12]
RECORDED_ORDER += [0, 5, 25, 16, 41, 11, 26, 52, 27, 12, 42, 57, 37, 2, 17]


def shares(weights: list[float], *, num: int, seed: int = 0, lanes: int = 1) -> np.ndarray:
    """Share of each source in ``num`` draws over all lanes."""
    draws = [SourceDraws(weights, seed=seed, lane=lane) for lane in range(lanes)]
    taken = [draw(number) for draw in draws for number in range(num // lanes)]
    return np.bincount(taken, minlength=len(weights)) / len(taken)


@pytest.mark.parametrize("lanes", [1, 3, 8, 100, 256, 2000])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_five_to_two_to_one_within_one_percent_over_ten_thousand_draws(seed: int, lanes: int) -> None:
    expected = np.array([5, 2, 1]) / 8
    assert np.abs(shares([5, 2, 1], num=10_000, seed=seed, lanes=lanes) / expected - 1).max() < 0.01


def test_every_batch_has_nearly_the_shares_of_the_weights() -> None:
    """One draw from each of 256 lanes; binomial noise would be 8 samples."""
    draws = [SourceDraws([5, 2, 1], seed=0, lane=lane) for lane in range(256)]
    for number in range(200):
        counts = np.bincount([draw(number) for draw in draws], minlength=3)
        assert np.abs(counts - [160, 64, 32]).max() <= 2


@pytest.mark.parametrize("weights", [[1.0], [1e-9, 1.0], [3e8, 1e8], [0.1] * 10])
def test_only_ratios_of_weights_matter(weights: list[float]) -> None:
    expected = np.array(weights) / sum(weights)
    assert np.abs(shares(weights, num=4 * BLOCK) - expected).max() < 0.002
    draws, doubled = (SourceDraws(each, seed=0, lane=0) for each in (weights, [2 * weight for weight in weights]))
    assert all(draws(number) == doubled(number) for number in range(2 * BLOCK))


def test_a_draw_depends_on_seed_lane_and_number_alone() -> None:
    def taken(seed: int, lane: int, numbers: Any) -> list[int]:
        draws = SourceDraws([5, 2, 1], seed=seed, lane=lane)
        return [draws(number) for number in numbers]

    forwards = taken(0, 0, range(3000))
    assert taken(0, 0, range(2999, -1, -1)) == forwards[::-1]
    assert [taken(0, 0, [number])[0] for number in range(1000, 1050)] == forwards[1000:1050]
    others = [taken(1, 0, range(3000)), taken(0, 1, range(3000))]
    assert forwards not in others and others[0] != others[1]
    assert forwards[:BLOCK] != forwards[BLOCK : 2 * BLOCK]


@given(st.integers(0, 5), st.integers(0, 3000), st.integers(0, 3))
def test_every_block_has_one_point_in_each_interval(seed: int, lane: int, block: int) -> None:
    """At every scale: aligned runs of 2**k draws have one point in each interval of length 2**-k."""
    draws = SourceDraws([1] * BLOCK, seed=seed, lane=lane)
    points = np.array([draws(block * BLOCK + number) for number in range(BLOCK)])
    for length in (2, 16, 128, BLOCK):
        runs = np.sort(points.reshape(-1, length) * length // BLOCK)
        assert (runs == np.arange(length)).all()


def test_the_draws_are_those_of_earlier_versions() -> None:
    """A changed sequence would repeat and lose samples in resumed runs."""
    draws = SourceDraws([5, 2, 1.1], seed=7, lane=3)
    assert "".join(str(draws(number)) for number in range(1000, 1080)) == RECORDED_DRAWS


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Three sources with shards of the same names, in which keys are ``source-number``; every ninth image is bad."""
    folder = tmp_path_factory.mktemp("sources")
    for name, size in SIZES.items():
        for shard in range(5):
            samples = [
                (f"{name}-{number}", {"jpg": b"bad" if number % 9 == 4 else b"good", "txt": b"x"})
                for number in range(shard, size, 5)
            ]
            write_shard(folder / name / f"{shard:05d}.tar", samples)
    weights = {"a": 5, "b": 2, "c": 1}
    sources = [TrainSource(name=name, path=str(folder / name), weight=weight) for name, weight in weights.items()]
    return DataConfig(train=sources, lanes=LANES)


def decode(data: Any, key_hash: np.uint64, epoch: int) -> torch.Tensor:
    if data == b"bad":
        raise Dropped(Drop.IMAGE_UNDECODABLE)
    return torch.zeros(1)


def lane_of(config: DataConfig, number: int, position: MixPosition | None = None) -> tuple[Any, list[ShardPool]]:
    """A lane, and the pools that it reads."""
    sources = open_sources(config)
    pools = make_pools(sources, lanes=config.lanes, transform=decode, reading=lambda shard: None)
    at = in_sources(position, [source.name for source in sources])
    return make_lane(sources, pools, number, at, seed=config.seed), pools


def test_every_source_has_its_own_epochs_and_each_sample_once_in_them(config: DataConfig) -> None:
    taken: Counter[tuple[str, str, int]] = Counter()
    ends: list[MixPosition] = []
    for number in range(LANES):
        lane, _ = lane_of(config, number)
        for _ in range(400):
            example = next(lane)
            assert example.pair.key.startswith(example.source + "-")
            taken[example.source, example.pair.key, lane.position.sources[example.source].epoch] += 1
        ends.append(lane.position)
        assert lane.position.draws == 400
    assert set(taken.values()) == {1}
    for name, size in SIZES.items():
        complete = min(end.sources[name].epoch for end in ends)
        good = {f"{name}-{number}" for number in range(size) if number % 9 != 4}
        assert complete >= 2
        for epoch in range(complete):
            assert {key for source, key, of in taken if (source, of) == (name, epoch)} == good
    by_source = Counter(source for source, _, _ in taken.elements())
    assert [by_source[name] / 1200 for name in "abc"] == pytest.approx([5 / 8, 2 / 8, 1 / 8], abs=0.003)


def test_sources_do_not_share_their_order(config: DataConfig) -> None:
    """Shards of the same names, as of one set of images with two sets of captions, come in other orders."""
    sources = open_sources(config)
    orders = [tuple(pool.deck.order(0)) for pool in make_pools(sources, lanes=1, transform=decode, reading=print)]
    assert len({source.seed for source in sources} | {config.seed}) == 4 and len(set(orders)) == 3


@settings(max_examples=25, deadline=None)
@given(number=st.integers(0, LANES - 1), pieces=st.lists(st.integers(1, 60), min_size=1, max_size=5))
def test_resume_at_any_position_goes_on_exactly(config: DataConfig, number: int, pieces: list[int]) -> None:
    whole, pools = lane_of(config, number)
    expected = [next(whole).pair.key for _ in range(sum(pieces))]
    found: list[str] = []
    skipped: Counter[str] = Counter()
    position = None
    for piece in pieces:
        lane, own = lane_of(config, number, position)
        found += [next(lane).pair.key for _ in range(piece)]
        for pool in own:
            skipped.update(pool.skipped)
        position = from_plain(json.loads(json.dumps(to_plain(lane.position))))
        assert position == lane.position
    assert found == expected and position == whole.position
    assert skipped == sum((pool.skipped for pool in pools), Counter())


def test_sources_that_stay_continue_and_new_ones_begin(config: DataConfig) -> None:
    lane, _ = lane_of(config, 0)
    for _ in range(100):
        next(lane)
    before = lane.position
    assert in_sources(before, ["a", "d"]) == MixPosition(100, {"a": before.sources["a"], "d": Position()})
    assert in_sources(None, ["a"]) == in_sources(Position(3, 2, 1), ["a"]) == MixPosition(0, {"a": Position()})


def test_the_order_of_a_single_source_is_that_of_earlier_versions(config: DataConfig) -> None:
    """Bit for bit: runs that began without a mix resume."""
    single = DataConfig(train=config.sources[0].path, lanes=LANES, seed=5)
    (source,) = open_sources(single)
    assert (source.name, source.seed, source.first) == ("", 5, 0)
    (pool,) = make_pools([source], lanes=LANES, transform=decode, reading=lambda shard: None)
    lane = make_lane([source], [pool], 1, Position(), seed=5)
    assert isinstance(lane, Lane)
    assert [int(next(lane).pair.key.removeprefix("a-")) for _ in range(30)] == RECORDED_ORDER


def test_a_source_without_a_good_sample_is_named(config: DataConfig, tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [(f"{n}", {"jpg": b"bad", "txt": b"x"}) for n in range(9)])
    sources = [*config.sources, TrainSource(name="rotten", path=str(tmp_path), weight=4)]
    lane, _ = lane_of(DataConfig(train=sources, lanes=LANES), 0)
    with pytest.raises(UserError, match=r"data.train: source rotten \(.*\): no sample can be used"):
        for _ in range(50):
            next(lane)


def test_a_source_smaller_than_the_lanes_is_named(config: DataConfig, tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [(f"{n}", {"jpg": b"good", "txt": b"x"}) for n in range(2)])
    sources = [*config.sources, TrainSource(name="tiny", path=str(tmp_path), weight=4)]
    with pytest.raises(UserError, match=r"source tiny \(.*\): 2 samples are too few for data.lanes=3"):
        for number in range(LANES):
            lane, _ = lane_of(DataConfig(train=sources, lanes=LANES), number)
            for _ in range(50):
                next(lane)
