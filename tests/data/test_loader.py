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
from mc2_hpc.data.mixing import to_plain
from mc2_hpc.data.packing import pack_pairs, write_shard
from mc2_hpc.data.shards import Pair
from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.errors import UserError
from mc2_hpc.storage import write_json
from mc2_hpc.train_sources import TrainSource

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
        train: Path | list[TrainSource],
        *,
        global_batch: int = 12,
        rank: int = 0,
        world_size: int = 1,
        position: Any = None,
        **config: Any,
    ) -> TrainLoader:
        values = {"lanes": 6, "workers": 0, **config}
        made.append(
            TrainLoader(
                DataConfig(train=train if isinstance(train, list) else str(train), **values),
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


# Several sources


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory, pairs: list[Pair]) -> list[TrainSource]:
    """Sources of 60, 24 and 12 pairs, weighted 5:2:1; the last has shards of other names and a bad one."""
    folder = tmp_path_factory.mktemp("mix")
    parts = {"alt": pairs[:60], "books": pairs[60:84], "maps": pairs[84:]}
    for name, part in parts.items():
        pack_pairs(part, folder / name, pairs_per_shard=12)
    (folder / "maps" / "rubbish.tar").write_bytes(b"rubbish" * 1000)
    weights = {"alt": 5, "books": 2, "maps": 1}
    return [TrainSource(name=name, path=str(folder / name), weight=weights[name]) for name in parts]


def test_a_mixed_batch_says_where_its_samples_are_from(make_loader, mix: list[TrainSource], pairs: list[Pair]) -> None:
    places = {pair.key: number for number, pair in enumerate(pairs)}
    batches = take(make_loader(mix, lanes=6, global_batch=48), 20)
    for batch in batches:
        for key, source in zip(batch.keys, batch.sources, strict=True):
            assert source == ("alt" if places[key] < 60 else "books" if places[key] < 84 else "maps")
    counts = Counter(source for batch in batches for source in batch.sources)
    assert counts.total() == 960 and abs(counts["alt"] - 600) < 10 and abs(counts["maps"] - 120) < 10


@pytest.mark.parametrize("world_size, workers", [(1, 2), (2, 0), (3, 0), (3, 2)])
def test_a_mix_is_the_same_on_any_ranks_and_workers(
    world_size: int, workers: int, make_loader, mix: list[TrainSource]
) -> None:
    whole = take(make_loader(mix), 20)
    ranks = [
        take(make_loader(mix, rank=rank, world_size=world_size, workers=workers), 20) for rank in range(world_size)
    ]
    assert_equal_steps(joined(ranks), joined([whole]))
    for step, batch in enumerate(whole):
        parts = [batches[step] for batches in ranks]
        assert batch.position == {lane: place for part in parts for lane, place in part.position.items()}
        assert batch.sources == [source for part in parts for source in part.sources]
        assert Counter(batch.skipped) == sum((Counter(part.skipped) for part in parts), Counter())
    assert sum((Counter(batch.skipped) for batch in whole), Counter())["shard_unreadable"] > 1


def test_a_mix_resumes_on_other_numbers_of_ranks(make_loader, mix: list[TrainSource], pairs: list[Pair]) -> None:
    uninterrupted = joined([take(make_loader(mix), 24)])
    position, steps = None, []
    for world_size, length in ((1, 5), (2, 7), (3, 8), (1, 4)):
        loaders = [make_loader(mix, rank=r, world_size=world_size, position=position) for r in range(world_size)]
        ranks = [take(loader, length) for loader in loaders]
        steps += joined(ranks)
        everywhere = {lane: to_plain(place) for batches in ranks for lane, place in batches[-1].position.items()}
        position = json.loads(json.dumps(everywhere))  # as in a checkpoint
    assert_equal_steps(steps, uninterrupted)


def test_a_source_goes_on_when_others_come_and_go(make_loader, mix: list[TrainSource], pairs: list[Pair]) -> None:
    """Over both starts, each pair of a source comes once in its epoch."""
    alt, books, maps = mix
    first = take(make_loader([alt, maps]), 4)
    position = {lane: to_plain(place) for lane, place in first[-1].position.items()}
    second = take(make_loader([books, alt], position=position), 20)
    taken = [key for batch in first + second for key, of in zip(batch.keys, batch.sources, strict=True) if of == "alt"]
    assert len(set(taken[:48])) == 48  # lanes are not all equally far, but none repeats before its part is over
    started = [key for batch in second for key, of in zip(batch.keys, batch.sources, strict=True) if of == "books"]
    assert len(set(started[:18])) == 18


def test_a_single_source_may_become_a_mix_and_the_reverse(make_loader, mix: list[TrainSource]) -> None:
    alone = take(make_loader(Path(mix[0].path)), 3)
    position = {lane: to_plain(place) for lane, place in alone[-1].position.items()}
    assert_equal_steps(joined([take(make_loader(mix, position=position), 4)]), joined([take(make_loader(mix), 4)]))
    mixed = take(make_loader(mix), 3)
    position = {lane: to_plain(place) for lane, place in mixed[-1].position.items()}
    assert_equal_steps(joined([take(make_loader(Path(mix[0].path), position=position), 3)]), joined([alone]))


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


def test_a_bad_source_of_a_mix_is_named(make_loader, folder: Path, bad_folder: Path) -> None:
    for name in ("00000.tar", "bad_samples.tar"):
        (bad_folder / name).unlink()
    mix = [TrainSource(name="good", path=str(folder)), TrainSource(name="bad", path=str(bad_folder))]
    with pytest.raises(UserError, match=r"data.train: source bad \(.*\): no sample can be used"):
        take(make_loader(mix, workers=1), 5)


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
