"""Evaluation's view of shards: every picture once, in order, shared out over ranks, with all of its captions."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mc2_hpc.data.evalset import EvalBatches
from mc2_hpc.data.packing import pack_pairs, write_shard
from mc2_hpc.data.shards import Pair
from mc2_hpc.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_jpeg: Callable[..., bytes]) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    pack_pairs(
        (Pair(f"{i:02d}", make_jpeg(20, 30, i), f"text {i}", "en") for i in range(23)), folder, pairs_per_shard=9
    )
    return folder


@pytest.mark.parametrize("threads", [1, 3])
def test_every_picture_once_in_order(threads: int, folder: Path) -> None:
    batches = list(EvalBatches(folder, image_size=16, batch=5, threads=threads))
    assert [len(b.keys) for b in batches] == [5, 5, 5, 5, 3]
    assert [key for b in batches for key in b.keys] == [f"{i:02d}" for i in range(23)]
    assert batches[0].images.shape == (5, 3, 16, 16) and batches[0].images.dtype == torch.uint8
    assert batches[4].texts == [["text 20"], ["text 21"], ["text 22"]] and batches[4].langs == [["en"]] * 3


def test_ranks_take_turns_by_index(folder: Path) -> None:
    ranks = [
        [k for b in EvalBatches(folder, image_size=16, batch=4, rank=r, world_size=3) for k in b.keys] for r in range(3)
    ]
    assert ranks == [[f"{i:02d}" for i in range(r, 23, 3)] for r in range(3)]
    nobody = list(EvalBatches(folder, image_size=16, batch=4, rank=29, world_size=30))
    assert nobody == []


def test_transforms_differ(folder: Path) -> None:
    shortest, squash = (
        next(iter(EvalBatches(folder, image_size=16, batch=2, transform=t))) for t in ("shortest", "squash")
    )
    assert not torch.equal(shortest.images, squash.images)


def test_curated_pictures_have_all_their_captions(tmp_path: Path, make_jpeg: Callable[..., bytes]) -> None:
    write_shard(tmp_path / "0.tar", [(key, {"jpg": make_jpeg(20, 20, i)}) for i, key in enumerate("ab")])
    rows = {"key": ["a", "b", "a"], "text": ["one", "zwei", "eins"], "lang": ["en", "de", "de"]}
    pq.write_table(pa.table(rows), tmp_path / "0.parquet")
    (batch,) = EvalBatches(tmp_path, image_size=16, batch=8)
    assert batch.keys == ["a", "b"] and batch.texts == [["one", "eins"], ["zwei"]]
    assert batch.langs == [["en", "de"], ["de"]]


def test_bad_pictures_are_skipped_and_counted(folder: Path, tmp_path: Path, make_jpeg: Callable[..., bytes]) -> None:
    write_shard(
        tmp_path / "0.tar", [("a", {"jpg": b"bad", "txt": b"x"}), ("b", {"jpg": make_jpeg(20, 20), "txt": b"y"})]
    )
    (tmp_path / "1.tar").write_bytes(b"")
    batches = EvalBatches(tmp_path, image_size=16, batch=1)
    assert [b.keys for b in batches] == [["b"]]
    assert batches.skipped == {"image_undecodable": 1, "shard_unreadable": 1}


def test_nothing_usable_is_an_error_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"")
    for rank in range(2):
        with pytest.raises(UserError, match="not one picture can be used"):
            list(EvalBatches(tmp_path, image_size=16, batch=1, rank=rank, world_size=2))
    write_shard(tmp_path / "0.tar", [("a", {"jpg": b"bad", "txt": b"x"})])
    with pytest.raises(UserError, match="image_undecodable 1"):
        list(EvalBatches(tmp_path, image_size=16, batch=1))
    with pytest.raises(UserError, match="choose shortest or squash"):
        EvalBatches(tmp_path, image_size=16, batch=1, transform="longest")
