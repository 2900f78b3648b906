"""Too little data is reported at the start: a batch larger than the data, few shards, fewer samples than lanes."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from mc2_hpc.data.enough import check_enough
from mc2_hpc.data.locations import LocalShards, find_shards
from mc2_hpc.data.packing import pack_pairs, write_shard
from mc2_hpc.data.shards import Pair
from mc2_hpc.errors import UserError
from tests.holding import held


@pytest.fixture
def folder(make_jpeg: Callable[..., bytes], tmp_path: Path) -> Path:
    """Three shards of 10 samples, and one that cannot be read."""
    image = make_jpeg(24, 30)
    pack_pairs([Pair(f"{i:04d}", image, "x") for i in range(30)], tmp_path, pairs_per_shard=10)
    (tmp_path / "zz.tar").write_bytes(b"rubbish")
    return tmp_path


def said(caplog: pytest.LogCaptureFixture, folder: Path, *, batch: int, lanes: int, readers: int = 1) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        check_enough(find_shards(folder), name="data.train=x", global_batch=batch, lanes=lanes, num_readers=readers)
    return [record.getMessage() for record in caplog.records]


def test_enough_is_not_mentioned(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert said(caplog, folder, batch=30, lanes=6) == []


def test_a_batch_larger_than_the_data(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (line,) = said(caplog, folder, batch=32, lanes=8)
    assert line.startswith("data.train=x: global_batch=32 is larger than the data (30 samples)")
    assert "more than once in a batch" in line and line.endswith("set global_batch to 24 or less")


def test_fewer_samples_than_lanes(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match="data.train=x: 30 samples are too few for data.lanes=31: set fewer lanes"):
        said(caplog, folder, batch=31, lanes=31)


def test_fewer_shards_than_readers(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (line,) = said(caplog, folder, batch=8, lanes=8, readers=5)
    assert "fewer shards (4) than reading processes (5)" in line


def test_shards_are_opened_only_until_there_is_enough(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    plain_open = LocalShards.open
    monkeypatch.setattr(LocalShards, "open", lambda self, number: opened.append(number) or plain_open(self, number))
    check_enough(find_shards(folder), name="", global_batch=12, lanes=4, num_readers=1)
    assert opened == [0, 1]


def test_storage_that_hangs_does_not_hold_up_the_start(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(folder / "hangs.tar", [])
    monkeypatch.setattr("mc2_hpc.data.enough._LOOK_S", 0.5)
    with held(folder / "hangs.tar"):
        assert said(caplog, folder, batch=64, lanes=4) == []


def test_nothing_usable_is_left_to_the_loader(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_shard(tmp_path / "0.tar", [])
    assert said(caplog, tmp_path, batch=4, lanes=2) == []


def test_a_source_that_is_small_for_its_weight(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def said_of(share: float) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            check_enough(find_shards(folder), name="x", global_batch=64, lanes=8, num_readers=1, share=share)
        return [record.getMessage() for record in caplog.records]

    assert said_of(0.25) == []
    (line,) = said_of(0.75)
    assert line.startswith("x: a batch takes about 48 samples of this source, but it has only 30: each occurs more")
