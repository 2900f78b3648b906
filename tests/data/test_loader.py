"""The loader: the same samples for any number of ranks and workers, exact resume, bad data counted, errors raised."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mc2_hpc.config import DataConfig
from mc2_hpc.data.loader import Batch, TrainLoader
from mc2_hpc.data.packing import pack_pairs, write_shard
from mc2_hpc.data.shards import Pair
from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.errors import UserError
from mc2_hpc.storage import write_json

SIZE = 16


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return Tokenizer(tokenizer_file, "xlmv")


@pytest.fixture(scope="module")
def pairs(make_jpeg: Callable[..., bytes], captions: list[tuple[str, str]]) -> list[Pair]:
    """96 pairs with distinct images."""
    return [
        Pair(f"{i:04d}", make_jpeg(24 + i % 5, 30, seed=i), text, lang) for i, (lang, text) in enumerate(captions[:96])
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pairs: list[Pair]) -> Path:
    """Four plain shards of 24 pairs."""
    folder = tmp_path_factory.mktemp("shards")
    pack_pairs(pairs, folder, pairs_per_shard=24)
    return folder


@pytest.fixture
def make_loader(tokenizer: Tokenizer):
    """Creates loaders and stops their workers afterwards."""
    made: list[TrainLoader] = []

    def make(
        train: Path, *, global_batch: int = 12, rank: int = 0, world_size: int = 1, position: Any = None, **config: Any
    ) -> TrainLoader:
        values = {"lanes": 6, "workers": 0, **config}
        made.append(
            TrainLoader(
                DataConfig(train=str(train), **values),
                global_batch=global_batch,
                image_size=SIZE,
                tokenizer=tokenizer,
                rank=rank,
                world_size=world_size,
                position=position,
            )
        )
        return made[-1]

    yield make
    for loader in made:
        loader.close()


def take(loader: TrainLoader, steps: int) -> list[Batch]:
    return [next(loader) for _ in range(steps)]


def joined(ranks: list[list[Batch]]) -> list[tuple[list[str], torch.Tensor, list[list[int]]]]:
    """Each step's keys, images and token rows over all ranks."""
    steps = []
    for batches in zip(*ranks, strict=True):
        keys = [key for batch in batches for key in batch.keys]
        rows = [[i for i in row if i != 1] for batch in batches for row in batch.tokens.tolist()]
        steps.append((keys, torch.cat([batch.images for batch in batches]), rows))
    return steps


def assert_equal_steps(a: list[Any], b: list[Any]) -> None:
    for (keys_a, images_a, rows_a), (keys_b, images_b, rows_b) in zip(a, b, strict=True):
        assert keys_a == keys_b and rows_a == rows_b and torch.equal(images_a, images_b)


def test_a_batch_is_what_it_says(make_loader, folder: Path, pairs: list[Pair], tokenizer: Tokenizer) -> None:
    batch = next(make_loader(folder, global_batch=24))
    by_key = {pair.key: pair for pair in pairs}
    assert batch.images.shape == (24, 3, SIZE, SIZE) and batch.images.dtype == torch.uint8
    assert torch.equal(batch.tokens, tokenizer.encode([by_key[key].text for key in batch.keys]))
    assert batch.langs == [by_key[key].lang for key in batch.keys]
    assert batch.skipped == {} and batch.position == {lane: (0, 0, 4) for lane in range(6)}
    means = batch.images.float().mean((1, 2, 3))
    assert means.std() > 1  # distinct images, not one repeated


def test_an_epoch_has_every_pair_once_and_the_next_another_order(make_loader, folder: Path, pairs: list[Pair]) -> None:
    batches = take(make_loader(folder), 16)
    epochs = [[key for batch in batches[i : i + 8] for key in batch.keys] for i in (0, 8)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [pair.key for pair in pairs] and epochs[0] != epochs[1]


@pytest.mark.parametrize("world_size", [2, 3, 4, 6])
def test_ranks_share_the_same_batches(world_size: int, make_loader, folder: Path) -> None:
    whole = joined([take(make_loader(folder), 10)])
    parts = [take(make_loader(folder, rank=rank, world_size=world_size), 10) for rank in range(world_size)]
    assert_equal_steps(joined(parts), whole)


def test_worker_processes_share_the_same_batches(make_loader, folder: Path) -> None:
    bad = folder / "0099.tar"
    write_shard(bad, [("bad", {"jpg": b"nothing", "txt": b"x"})])
    try:
        alone = take(make_loader(folder), 12)
        many = take(make_loader(folder, workers=2), 12)
    finally:
        bad.unlink()
    assert_equal_steps(joined([many]), joined([alone]))
    assert [b.position for b in many] == [b.position for b in alone]
    assert [b.skipped for b in many] == [b.skipped for b in alone]
    assert sum((Counter(b.skipped) for b in alone), Counter())["image_undecodable"] >= 1


def test_resume_on_other_numbers_of_ranks_loses_and_repeats_nothing(
    make_loader, folder: Path, pairs: list[Pair]
) -> None:
    uninterrupted = joined([take(make_loader(folder), 16)])
    position, steps = None, []
    for world_size, length in ((1, 3), (2, 3), (3, 4), (1, 6)):
        loaders = [make_loader(folder, rank=r, world_size=world_size, position=position) for r in range(world_size)]
        ranks = [take(loader, length) for loader in loaders]
        steps += joined(ranks)
        everywhere = {lane: place for batches in ranks for lane, place in batches[-1].position.items()}
        position = json.loads(json.dumps(everywhere))  # as in a checkpoint
    assert_equal_steps(steps, uninterrupted)
    for epoch in (steps[:8], steps[8:]):
        assert sorted(key for keys, _, _ in epoch for key in keys) == [pair.key for pair in pairs]


def test_resume_with_worker_processes(make_loader, folder: Path) -> None:
    uninterrupted = joined([take(make_loader(folder), 6)])
    loader = make_loader(folder, workers=2)
    first = take(loader, 2)  # workers have read ahead, which must not count
    loader.close()
    rest = take(make_loader(folder, workers=1, position=first[-1].position), 4)
    assert_equal_steps(joined([first + rest]), uninterrupted)


def test_bad_positions_and_sizes(make_loader, folder: Path, tmp_path: Path) -> None:
    position = next(make_loader(folder)).position
    with pytest.raises(UserError, match="position to resume from has 6 lanes, but data.lanes=4"):
        make_loader(folder, lanes=4, position=position)
    with pytest.raises(UserError, match="has 6 lanes, but data.lanes=12"):
        make_loader(folder, lanes=12, position=position)
    with pytest.raises(UserError, match="global_batch=12 is not a multiple of data.lanes=5"):
        make_loader(folder, lanes=5)
    with pytest.raises(UserError, match="7 ranks but data.lanes=6"):
        make_loader(folder, world_size=7)
    with pytest.raises(UserError, match="no such folder, file or pattern"):
        make_loader(tmp_path / "absent")
    with pytest.raises(UserError, match=r"folder has no \*.tar shards"):
        make_loader(tmp_path)
    with pytest.raises(UserError, match=r"no balance\.json there"):
        make_loader(folder, balance=str(tmp_path))


# Bad data


@pytest.fixture
def bad_folder(tmp_path: Path, pairs: list[Pair]) -> Path:
    """One good shard, one with every kind of bad sample, and unreadable shards."""
    pack_pairs(pairs[:24], tmp_path)
    jpeg = pairs[0].image
    write_shard(
        tmp_path / "bad_samples.tar",
        [
            ("truncated", {"jpg": jpeg[: len(jpeg) // 2], "txt": b"half an image"}),
            ("latin1", {"jpg": jpeg, "txt": "caf\u00e9".encode("latin-1")}),
            ("blank", {"jpg": jpeg, "txt": b" "}),
            ("rubbish", {"jpg": b"rubbish", "txt": b"no image"}),
            ("lonely", {"jpg": jpeg}),
            ("blind", {"txt": b"words"}),
            ("good", {"jpg": jpeg, "txt": b"the last one"}),
        ],
    )
    whole = (tmp_path / "00000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "rubbish.tar").write_bytes(b"rubbish" * 1000)
    (tmp_path / "gone.tar").symlink_to(tmp_path / "nowhere")
    return tmp_path


def test_every_kind_of_bad_sample_is_skipped_and_counted(make_loader, bad_folder: Path, pairs: list[Pair]) -> None:
    loader = make_loader(bad_folder, lanes=1, global_batch=1)
    keys, skipped = [], Counter()
    for batch in loader:
        if batch.position[0].epoch == 1:
            break
        keys += batch.keys
        skipped.update(batch.skipped)
    skipped.update(batch.skipped)  # the search that ended the epoch may have started the next
    assert sorted(keys) == sorted([pair.key for pair in pairs[:24]] + ["good"])
    samples = dict.fromkeys(
        (
            "image_truncated",
            "caption_not_utf8",
            "caption_empty",
            "image_undecodable",
            "caption_missing",
            "image_missing",
        )
    )
    assert all(skipped[reason] in (1, 2) for reason in samples), skipped
    assert 4 <= skipped["shard_unreadable"] <= 8 and set(skipped) == {*samples, "shard_unreadable"}


@pytest.mark.parametrize("workers", [0, 2])
def test_when_everything_is_bad_the_run_ends_with_one_line(workers: int, make_loader, bad_folder: Path) -> None:
    for name in ("00000.tar", "bad_samples.tar"):
        (bad_folder / name).unlink()
    write_shard(bad_folder / "last.tar", [(str(i), {"jpg": b"bad", "txt": b"x"}) for i in range(20)])
    with pytest.raises(UserError) as caught:
        next(make_loader(bad_folder, workers=workers))
    message = str(caught.value)
    assert "no sample can be used; everything was skipped" in message and "\n" not in message
    assert "image_undecodable 20" in message and "shard_unreadable 4" in message and str(bad_folder) in message


def test_a_shard_that_vanishes_between_batches_costs_itself(make_loader, folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    loader = make_loader(tmp_path, lanes=2, global_batch=4)
    take(loader, 2)
    (tmp_path / "00002.tar").unlink()
    batches = take(loader, 60)
    assert {"0048"} <= {f"{i:04d}" for i in range(48, 72)} - {key for b in batches[30:] for key in b.keys}
    assert sum(b.skipped.get("shard_unreadable", 0) for b in batches) >= 2


# Curated shards, and real data


def test_online_balancing_keeps_what_the_draws_say(make_loader, pairs: list[Pair], tmp_path: Path) -> None:
    rows = [
        {"key": p.key, "text": p.text, "lang": "xx", "entries": [0] if i % 2 else [1]} for i, p in enumerate(pairs[:60])
    ]
    write_shard(tmp_path / "0.tar", [(pair.key, {"jpg": pair.image}) for pair in pairs])
    types = {"key": pa.string(), "text": pa.string(), "lang": pa.string(), "entries": pa.list_(pa.uint32())}
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(types.items())), tmp_path / "0.parquet")
    balance = tmp_path / "balance"
    write_json(balance / "balance.json", {})
    (balance / "probs").mkdir()
    np.save(balance / "probs" / "xx.npy", np.array([0.0, 1.0], np.float32))
    batches = take(make_loader(tmp_path, lanes=2, global_batch=2, balance=str(balance)), 15)
    assert sorted(key for batch in batches for key in batch.keys) == [row["key"] for row in rows[::2]]
    unbalanced = take(make_loader(tmp_path, lanes=2, global_batch=2), 30)
    assert sorted(key for batch in unbalanced for key in batch.keys) == [row["key"] for row in rows]


def test_real_web_shard(make_loader, shared_data: Path) -> None:
    batches = take(make_loader(shared_data / "cc12m-32.tar", lanes=4, global_batch=8), 4)
    keys = [key for batch in batches for key in batch.keys]
    assert len(set(keys)) == 32 and not any(batch.skipped for batch in batches)


def test_real_photographs_packed_into_shards(make_loader, shared_data: Path, tmp_path: Path) -> None:
    table = pq.ParquetFile(shared_data / "cifar10-test.parquet").read_row_group(0).slice(0, 300)
    names = {"en": "a photo of a {}", "de": "ein Foto: {}", "ja": "{}の写真"}
    made = [
        Pair(str(row["key"]), row["jpg"], form.format(row["label"]), lang)
        for row, (lang, form) in zip(table.to_pylist(), list(names.items()) * 100, strict=True)
    ]
    pack_pairs(made, tmp_path, pairs_per_shard=100)
    batches = take(make_loader(tmp_path, lanes=6, global_batch=30), 10)
    assert len({key for batch in batches for key in batch.keys}) == 300
    assert Counter(lang for batch in batches for lang in batch.langs) == dict.fromkeys(names, 100)
