"""Counts are exact, additive, and equal bytes on disk for equal counts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mc2_hpc.curation.counts import add_votes, count_votes, read_votes, write_votes
from mc2_hpc.errors import UserError

ids_of_shard = st.lists(st.integers(0, 20), max_size=40).map(lambda ids: np.array(ids, np.uint32))


@given(st.lists(ids_of_shard, max_size=5), st.randoms())
def test_sum_over_shards_in_any_order_is_the_count_of_everything(shards, random):
    everything = np.concatenate([np.zeros(0, np.uint32), *shards])
    random.shuffle(shards)
    total = np.zeros(21, np.uint64)
    for ids in shards:
        add_votes(total, count_votes(ids))
    assert total.tolist() == np.bincount(everything, minlength=21).tolist()


def test_counts_beyond_32_bits():
    total = np.zeros(1, np.uint64)
    for _ in range(2):
        add_votes(total, (np.array([0], np.uint32), np.array([2**40 + 1], np.uint64)))
    assert int(total[0]) == 2**41 + 2


def test_round_trip_and_equal_bytes(tmp_path):
    votes = {"en": count_votes(np.array([3, 1, 3], np.uint32)), "file": count_votes(np.zeros(0, np.uint32))}
    write_votes(tmp_path / "a.npz", votes)
    write_votes(tmp_path / "b.npz", dict(reversed(votes.items())))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    read = read_votes(tmp_path / "a.npz")
    assert read["en"][0].tolist() == [1, 3] and read["en"][1].tolist() == [1, 2] and len(read["file"][0]) == 0
    assert read["en"][0].dtype == np.uint32 and read["en"][1].dtype == np.uint64


def test_foreign_id_and_damaged_file(tmp_path):
    with pytest.raises(UserError, match="entry id 7 .* 5 entries"):
        add_votes(np.zeros(5, np.uint64), count_votes(np.array([7], np.uint32)))
    np.save(tmp_path / "array.npy", np.zeros(3))
    for content in (b"", b"PK\x03\x04 broken", b"text", (tmp_path / "array.npy").read_bytes()):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(UserError, match="x.npz: damaged counts"):
            read_votes(tmp_path / "x.npz")
