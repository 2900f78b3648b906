"""Counts are exact, additive and independent of the tree; equal counts give equal bytes on disk."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mc2_hpc.curation import counts
from mc2_hpc.curation.counts import (
    VotesFile,
    add_sparse,
    count_votes,
    dense,
    merge_tree,
    merge_votes,
    merged_path,
    write_votes,
)
from mc2_hpc.errors import UserError

ids_of_shard = st.lists(st.integers(0, 20), max_size=40).map(lambda ids: np.array(ids, np.uint32))


@settings(deadline=None)
@given(st.lists(ids_of_shard, min_size=1, max_size=5), st.randoms())
def test_sum_over_shards_in_any_order_is_the_count_of_everything(shards, random):
    everything = np.concatenate(shards)
    random.shuffle(shards)
    entries, numbers = add_sparse([count_votes(ids) for ids in shards])
    assert entries.dtype == np.uint32 and numbers.dtype == np.uint64 and (np.diff(entries.astype(int)) > 0).all()
    assert dense((entries, numbers), 21).tolist() == np.bincount(everything, minlength=21).tolist()


def test_counts_beyond_double_precision():
    votes = (np.array([0], np.uint32), np.array([2**53 + 1], np.uint64))
    assert int(add_sparse([votes, votes, votes])[1][0]) == 3 * (2**53 + 1)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.dictionaries(st.sampled_from(["en", "de", "zh.x"]), ids_of_shard), min_size=1, max_size=9))
def test_every_tree_gives_the_same_bytes(tmp_path_factory, shards):
    folder = tmp_path_factory.mktemp("tree")
    leaves = [folder / f"{number}.npz" for number in range(len(shards))]
    for path, shard in zip(leaves, shards, strict=True):
        write_votes(path, {lang: count_votes(ids) for lang, ids in shard.items()})
    roots = set()
    for fan_in in (2, 3, 100):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(counts, "FAN_IN", fan_in)
            levels = merge_tree(leaves, folder / str(fan_in))
            for level in levels:
                for name, parts in level.items():
                    assert len(parts) <= fan_in
                    merge_votes(parts, merged_path(folder / str(fan_in), name))
            assert len(levels[-1]) == 1
            root = merged_path(folder / str(fan_in), next(iter(levels[-1])))
        roots.add(root.read_bytes())
    assert len(roots) == 1
    with VotesFile(root) as file:
        assert file.langs == {lang for shard in shards for lang in shard}
        for lang in file.langs:
            everything = np.concatenate([shard[lang] for shard in shards if lang in shard])
            assert dense(file[lang], 21).tolist() == np.bincount(everything, minlength=21).tolist()


def test_tree_of_a_million_shards_has_three_levels(tmp_path):
    levels = merge_tree([tmp_path] * 10**6, tmp_path)
    assert [len(level) for level in levels] == [10_000, 100, 1]


def test_round_trip_and_equal_bytes(tmp_path):
    votes = {"en": count_votes(np.array([3, 1, 3], np.uint32)), "file": count_votes(np.zeros(0, np.uint32))}
    write_votes(tmp_path / "a.npz", votes)
    write_votes(tmp_path / "b.npz", dict(reversed(votes.items())))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with VotesFile(tmp_path / "a.npz") as read:
        assert read["en"][0].tolist() == [1, 3] and read["en"][1].tolist() == [1, 2] and len(read["file"][0]) == 0
        assert read["en"][0].dtype == np.uint32 and read["en"][1].dtype == np.uint64


def test_foreign_id_and_damaged_file(tmp_path):
    with pytest.raises(UserError, match="entry id 7 .* 5 entries"):
        dense(count_votes(np.array([7], np.uint32)), 5)
    np.save(tmp_path / "array.npy", np.zeros(3))
    whole = tmp_path / "whole.npz"
    write_votes(whole, {"en": count_votes(np.arange(100, dtype=np.uint32))})
    flipped = bytearray(whole.read_bytes())
    flipped[300] ^= 1
    for content in (b"", b"PK\x03\x04 broken", b"text", (tmp_path / "array.npy").read_bytes(), bytes(flipped)):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(UserError, match="x.npz: .*damaged counts"):
            merge_votes([whole, tmp_path / "x.npz"], tmp_path / "sum.npz")
    with pytest.raises(UserError, match="none.npz: no such file"):
        VotesFile(tmp_path / "none.npz")
    assert not (tmp_path / "sum.npz").exists()
