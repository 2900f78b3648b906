"""De-duplication by image: exact, independent of how rows are spread over shards, and resumable."""

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mc2_hpc import jobs
from mc2_hpc.curation import deduplicate as stages
from mc2_hpc.curation.deduplicate import distinct, plan_deduplicate
from mc2_hpc.curation.pool.captions import PoolShard
from mc2_hpc.errors import UserError
from mc2_hpc.jobs import Local

COLUMNS = ("key", "text", "source")


def write_pool(folder, shards, columns=COLUMNS):
    folder.mkdir()
    for number, rows in enumerate(shards):
        table = {name: pa.array([row[index] for row in rows], pa.string()) for index, name in enumerate(columns)}
        pq.write_table(pa.table(table), folder / f"shard{number}.parquet")
    return folder


def read_shards(out):
    """Rows of each shard."""
    return [[tuple(row.values()) for row in pq.read_table(path).to_pylist()] for path in sorted(out.glob("*.parquet"))]


def contents(out):
    return {path.name: path.read_bytes() for path in out.glob("*.parquet")}


def naive(rows):
    """Sorted distinct (key, text), each with the first source of its key."""
    source = {}
    for key, _, url in rows:
        source[key] = min(source.get(key, url), url)
    return sorted({(key, text, source[key]) for key, text, _ in rows})


def random_rows(number, seed=0):
    draw = random.Random(seed)
    return [
        (f"k{draw.randrange(40)}", f"text {draw.randrange(6)}", f"http://x/{draw.randrange(9)}") for _ in range(number)
    ]


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\\/."), min_size=1, max_size=3)
texts = st.text("ab é", min_size=1, max_size=3).filter(str.strip)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(names, texts, texts), min_size=1, max_size=30))
def test_distinct_equals_a_naive_count(rows):
    columns = {
        name: pa.array(column, pa.large_string()) for name, column in zip(COLUMNS, zip(*rows, strict=True), strict=True)
    }
    assert [tuple(row.values()) for row in distinct(pa.table(columns)).to_pylist()] == naive(rows)


def test_every_key_is_in_one_shard_with_all_its_texts(tmp_path):
    rows = random_rows(1000)
    result = jobs.run(
        plan_deduplicate(write_pool(tmp_path / "pool", [rows[:300], rows[300:]]), tmp_path / "out", shards=5)
    )
    shards = read_shards(tmp_path / "out")
    assert len(shards) == 5 and sum(map(bool, shards)) > 1
    keys = [{key for key, _, _ in shard} for shard in shards]
    assert sum(map(len, keys)) == len(set().union(*keys)) == 40
    assert sorted(row for shard in shards for row in shard) == naive(rows)
    kept = sum(map(len, shards))
    assert result == {"rows": 1000, "kept": kept, "images": 40, "drops": {"caption_repeated": 1000 - kept}}


def test_spread_order_and_workers_change_nothing(tmp_path):
    rows = random_rows(600)
    shuffled = random.Random(1).sample(rows, len(rows))
    pools = {
        "one": ([rows], Local()),
        "two": ([rows[:1], rows[1:], []], Local(2)),
        "shuffled": ([shuffled[i::4] for i in range(4)], Local()),
    }
    outs = []
    for name, (shards, engine) in pools.items():
        jobs.run(plan_deduplicate(write_pool(tmp_path / name, shards), tmp_path / f"{name}-out", shards=3), engine)
        outs.append(contents(tmp_path / f"{name}-out"))
    assert outs[0] == outs[1] == outs[2]


@pytest.mark.parametrize("rows_a_run", [1, 7, 10_000])
def test_runs_of_a_shard_change_nothing(tmp_path, monkeypatch, rows_a_run):
    rows = random_rows(100)
    monkeypatch.setattr(stages, "_ROWS_A_RUN", rows_a_run)
    monkeypatch.setattr("mc2_hpc.curation.pool.captions.BATCH_ROWS", 5)
    jobs.run(plan_deduplicate(write_pool(tmp_path / "pool", [rows]), tmp_path / "out", shards=3))
    assert sorted(row for shard in read_shards(tmp_path / "out") for row in shard) == naive(rows)


def test_parts_may_be_done_first(tmp_path):
    """De-duplicating a pool in parts, then the parts together, equals doing it at once."""
    rows = random_rows(500)
    jobs.run(plan_deduplicate(write_pool(tmp_path / "all", [rows]), tmp_path / "at-once", shards=3))
    (tmp_path / "parts").mkdir()
    for name, part in (("a", rows[:200]), ("b", rows[200:])):
        jobs.run(plan_deduplicate(write_pool(tmp_path / name, [part]), tmp_path / f"{name}-out", shards=2))
        for path in (tmp_path / f"{name}-out").glob("*.parquet"):
            path.rename(tmp_path / "parts" / f"{name}-{path.name}")
    jobs.run(plan_deduplicate(tmp_path / "parts", tmp_path / "in-parts", shards=3))
    assert contents(tmp_path / "at-once") == contents(tmp_path / "in-parts")


def test_broken_off_in_either_pass(tmp_path, monkeypatch):
    pool = write_pool(tmp_path / "pool", [random_rows(200, seed) for seed in range(3)])
    expected = jobs.run(plan_deduplicate(pool, tmp_path / "whole", shards=4))

    def fail(*arguments, **keywords):
        raise KeyboardInterrupt

    for number, name in enumerate(("_runs", "distinct")):
        with monkeypatch.context() as patch:
            real, calls = getattr(stages, name), []
            patch.setattr(stages, name, lambda *a, r=real, c=calls: fail() if c.append(1) or len(c) > 1 else r(*a))
            with pytest.raises(KeyboardInterrupt):
                jobs.run(plan_deduplicate(pool, tmp_path / f"broken{number}", shards=4))
        assert jobs.run(plan_deduplicate(pool, tmp_path / f"broken{number}")) == expected
        assert contents(tmp_path / f"broken{number}") == contents(tmp_path / "whole")


def test_finished_pool_is_left_alone_and_its_scattered_rows_are_gone(tmp_path, monkeypatch):
    pool = write_pool(tmp_path / "pool", [random_rows(50)])
    result = jobs.run(plan_deduplicate(pool, tmp_path / "out", shards=2))
    assert not list((tmp_path / "out").rglob("*.arrow"))
    monkeypatch.setattr(stages, "distinct", None)
    assert jobs.run(plan_deduplicate(pool, tmp_path / "out")) == result


def test_lost_shard_is_made_again_and_a_new_one_is_added(tmp_path):
    pool = write_pool(tmp_path / "pool", [random_rows(100)])
    jobs.run(plan_deduplicate(pool, tmp_path / "out", shards=3))
    whole = contents(tmp_path / "out")
    (tmp_path / "out" / "00001.parquet").unlink()
    jobs.run(plan_deduplicate(pool, tmp_path / "out"))
    assert contents(tmp_path / "out") == whole
    rows = [("new", "text", "http://new/")]
    pq.write_table(pa.table(dict(zip(COLUMNS, zip(*rows, strict=True), strict=True))), pool / "more.parquet")
    jobs.run(plan_deduplicate(pool, tmp_path / "out"))
    assert sorted(row for shard in read_shards(tmp_path / "out") for row in shard) == naive(random_rows(100) + rows)


def test_number_of_shards_follows_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "_ROWS_A_SHARD", 30)
    pool = write_pool(tmp_path / "pool", [random_rows(50), random_rows(41)])
    jobs.run(plan_deduplicate(pool, tmp_path / "out"))
    assert len(read_shards(tmp_path / "out")) == 4


def test_lang_stays_and_bad_rows_are_counted(tmp_path):
    rows = [
        ("a", "x", None),
        ("a", "x", "en"),
        ("a", "x", "de"),
        ("", "x", "en"),
        ("../b", "x", "en"),
        ("c", " ", "en"),
    ]
    pool = write_pool(tmp_path / "pool", [rows], ("key", "text", "lang"))
    result = jobs.run(plan_deduplicate(pool, tmp_path / "out", shards=1))
    assert read_shards(tmp_path / "out") == [[("a", "x", "de")]]
    assert result["rows"] == 6
    assert result["drops"] == {"caption_repeated": 2, "key_missing": 1, "name_unsafe": 1, "caption_empty": 1}


def test_bad_pools_are_named(tmp_path):
    pool = write_pool(tmp_path / "pool", [random_rows(10)])
    with pytest.raises(UserError, match="shards=0: must be at least 1"):
        jobs.run(plan_deduplicate(pool, tmp_path / "out", shards=0))
    jobs.run(plan_deduplicate(pool, tmp_path / "out", shards=2))
    with pytest.raises(UserError, match="deduplicate.json: this folder was made with another num_shards"):
        jobs.run(plan_deduplicate(pool, tmp_path / "out", shards=3))
    (pool / "shard0.tar").touch()
    with pytest.raises(UserError, match="shard0.tar: a pool with images cannot be redistributed"):
        jobs.run(plan_deduplicate(pool, tmp_path / "out2"))
    (pool / "shard0.tar").unlink()
    (pool / "shard1.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(UserError, match="shard1.parquet: cannot be read as Parquet"):
        jobs.run(plan_deduplicate(pool, tmp_path / "out3"))
    with pytest.raises(UserError, match="1 of 2 shards failed, the others are done.*shard1.parquet"):
        jobs.run(plan_deduplicate(pool, tmp_path / "out3", shards=2))
    pq.write_table(pa.table({"key": ["a"], "text": ["b"]}), pool / "shard1.parquet")
    with pytest.raises(UserError, match="shard1.parquet: has columns key, text, but the pool's first shard has"):
        jobs.run(plan_deduplicate(pool, tmp_path / "out3", shards=2))
    (pool / "shard1.parquet").unlink()
    assert jobs.run(plan_deduplicate(pool, tmp_path / "out3", shards=2))["rows"] == 10


def test_pool_of_plain_tars_has_images(tmp_path):
    (tmp_path / "a.tar").touch()
    with pytest.raises(UserError, match="a.tar: a pool with images"):
        stages._captions_only(PoolShard("a", None, tmp_path / "a.tar"))
