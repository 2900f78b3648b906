"""Reading caption pools: every bad row is counted by reason, every bad file is named."""

import io
import json
import subprocess
import sys
import tarfile
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mc2_hpc.curation.pool import captions as pools
from mc2_hpc.curation.pool.captions import PoolShard, iter_captions, list_pool
from mc2_hpc.curation.pool.image_tars import TarIndex
from mc2_hpc.errors import UserError


def parquet_shard(tmp_path, **columns) -> PoolShard:
    path = tmp_path / "s.parquet"
    pq.write_table(pa.table(columns), path)
    return PoolShard("s", path, None)


def read_captions(shard: PoolShard) -> tuple[pa.Table, Counter[str]]:
    """All pieces as one table."""
    tables, drops = zip(*iter_captions(shard), strict=True)
    return pa.concat_tables(tables, promote_options="default"), sum(drops, Counter())


def test_list_pool(tmp_path):
    for name in ("b.tar", "a.parquet", "a.tar", ".hidden.tar", "notes.txt"):
        (tmp_path / name).touch()
    assert list_pool(tmp_path) == [
        PoolShard("a", tmp_path / "a.parquet", tmp_path / "a.tar"),
        PoolShard("b", None, tmp_path / "b.tar"),
    ]
    with pytest.raises(UserError, match="none: no such folder, file or pattern"):
        list_pool(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: folder has no \*.parquet or \*.tar"):
        list_pool(tmp_path / "empty")


def test_parquet_rows_and_their_drops(tmp_path):
    shard = parquet_shard(
        tmp_path,
        key=["a", "a", "a", None, "", "/etc/x", "../x", "b", "c"],
        text=["dog", "dog", "cat", "x", "x", "x", "x", " \n\u3000", None],
        lang=["en", "en", None, "en", "en", "en", "en", "en", "en"],
        unknown=[1] * 9,
    )
    rows, drops = read_captions(shard)
    assert rows.to_pylist() == [{"key": "a", "text": "dog", "lang": "en"}, {"key": "a", "text": "cat", "lang": None}]
    assert drops == {"caption_repeated": 1, "key_missing": 2, "name_unsafe": 2, "caption_empty": 2}


def test_parquet_with_invalid_utf8(tmp_path):
    broken = pa.array([b"dog", b"\xff\xfe", b"caf\xc3\xa9", None]).view(pa.string())
    rows, drops = read_captions(parquet_shard(tmp_path, key=["a", "b", "c", "d"], text=broken))
    assert rows["text"].to_pylist() == ["dog", "café"] and drops == {"caption_not_utf8": 1, "caption_empty": 1}


def test_parquet_with_other_string_types(tmp_path):
    dictionary = pa.array(["x", "y", "x"]).dictionary_encode()
    rows, drops = read_captions(
        parquet_shard(tmp_path, key=pa.array(["a", "b", "c"], pa.large_string()), text=dictionary)
    )
    assert rows["text"].to_pylist() == ["x", "y", "x"] and not drops


def test_pieces_make_the_whole(tmp_path, monkeypatch):
    """Rows, drops and first occurrences are the same however the rows are split, by us or by row groups."""
    keys = [f"k{n % 7}" for n in range(100)]
    texts = ["" if n % 9 == 0 else f"text {n % 13}" for n in range(100)]
    path = tmp_path / "s.parquet"
    pq.write_table(pa.table({"key": keys, "text": texts}), path, row_group_size=30)
    shard = PoolShard("s", path, None)
    whole, drops = read_captions(shard)
    assert whole["text"].null_count == 0 and len(whole) + drops.total() == 100 and drops["caption_repeated"] > 0
    assert len(set(zip(*whole.to_pydict().values(), strict=True))) == len(whole)
    for rows in (1, 7, 64):
        monkeypatch.setattr(pools, "BATCH_ROWS", rows)
        assert max(len(table) for table, _ in iter_captions(shard)) <= rows
        again, again_drops = read_captions(shard)
        assert again.to_pydict() == whole.to_pydict() and again_drops == drops
    kept = list(iter_captions(shard, keep_repeated=True))
    assert sum(len(table) for table, _ in kept) == 100 - drops["caption_empty"]


def test_a_large_row_group_is_not_held_whole(tmp_path):
    """A row group of 60 MB: Arrow's pool never holds half of it."""
    path = tmp_path / "s.parquet"
    table = pa.table({"key": [str(n) for n in range(60_000)], "text": [f"{n} " + "a" * 1000 for n in range(60_000)]})
    pq.write_table(table, path, row_group_size=10**6, use_dictionary=False, compression="none")
    assert pq.ParquetFile(path).num_row_groups == 1 and path.stat().st_size > 60e6
    code = (
        "import sys; import pyarrow as pa; from pathlib import Path; from mc2_hpc.curation.pool import captions\n"
        "captions.BATCH_ROWS = 2000\n"
        "rows = sum(len(t) for t, _ in captions.iter_captions(captions.PoolShard('s', Path(sys.argv[1]), None)))\n"
        "print(rows, pa.default_memory_pool().max_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=120, check=True)
    rows, most = map(int, done.stdout.split())
    assert rows == 60_000 and most < 30e6


def test_shard_without_rows(tmp_path):
    rows, drops = read_captions(parquet_shard(tmp_path, key=pa.array([], pa.string()), text=pa.array([], pa.string())))
    assert len(rows) == 0 and not drops


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"key": ["a"]}, "s.parquet: not a table of captions: no column 'text'"),
        ({"text": ["a"]}, "s.parquet: not a table of captions: no column 'key'"),
        ({"key": [1.5], "text": ["a"]}, "s.parquet: column 'key' is double, must be string"),
        ({"key": ["a"], "text": [b"a"]}, "s.parquet: column 'text' is binary, must be string"),
    ],
)
def test_wrong_columns(tmp_path, columns, message):
    with pytest.raises(UserError, match=message):
        read_captions(parquet_shard(tmp_path, **columns))


@pytest.mark.parametrize("damage", [lambda raw: b"", lambda raw: raw[:-20], lambda raw: b"PAR1" + b"x" * 100 + b"PAR1"])
def test_broken_parquet(tmp_path, damage):
    shard = parquet_shard(tmp_path, key=["a"] * 1000, text=[f"text {n}" for n in range(1000)])
    shard.captions.write_bytes(damage(shard.captions.read_bytes()))
    with pytest.raises(UserError, match="s.parquet: cannot be read as Parquet"):
        read_captions(shard)


def make_tar(path, files: dict[str, bytes]) -> PoolShard:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return PoolShard("s", None, path)


def test_tar_captions_and_their_drops(tmp_path):
    def record(value: object) -> bytes:
        return json.dumps(value).encode()

    shard = make_tar(
        tmp_path / "s.tar",
        {
            "a.jpg": b"...",
            "a.txt": b"ein Hund",
            "a.json": record({"caption": "ignored, there is a txt"}),
            "b.json": record({"caption": "from json"}),
            "c.json": b"{broken",
            "d.json": record({"title": "no caption"}),
            "e.json": record(["no object"]),
            "f.json": record({"caption": None}),
            "g.txt": b"\xff\xfe",
            "h.json": record({"caption": "\ud800"}),
            "../i.txt": b"escapes",
            "j.txt": b"  ",
            "k.json": record({"text": "ein Hund", "lang": "de"}),
            "l.json": record({"texts": [["alt", "one"], ["title", "two"]]}),
            "x.1.txt": b"dots in the name",
        },
    )
    rows, drops = read_captions(shard)
    assert rows.to_pylist() == [
        {"key": "k", "text": "ein Hund", "lang": "de"},
        {"key": "a", "text": "ein Hund", "lang": None},
        {"key": "b", "text": "from json", "lang": None},
        {"key": "l", "text": "one", "lang": None},
        {"key": "l", "text": "two", "lang": None},
        {"key": "x.1", "text": "dots in the name", "lang": None},
    ]
    assert drops == {
        "caption_not_json": 2,
        "caption_missing": 1,
        "caption_not_utf8": 2,
        "name_unsafe": 1,
        "caption_empty": 2,
    }


def test_parquet_of_another_kind_beside_a_tar(tmp_path):
    tar = make_tar(tmp_path / "s.tar", {"a.jpg": b"...", "a.txt": b"ein Hund"})
    for columns in ({"key": ["a"], "caption": ["x"], "url": ["u"]}, {"uid": ["a"], "text": ["x"]}):
        shard = parquet_shard(tmp_path, **columns)
        rows, drops = read_captions(PoolShard("s", shard.captions, tar.images))
        assert rows.to_pylist() == [{"key": "a", "text": "ein Hund"}] and not drops


def test_nested_pools(tmp_path):
    for name in ("03/a", "04/a", "04/b"):
        (tmp_path / "pool" / name).parent.mkdir(parents=True, exist_ok=True)
        make_tar(tmp_path / "pool" / f"{name}.tar", {})
    assert [shard.name for shard in list_pool(tmp_path / "pool")] == ["03/a", "04/a", "04/b"]
    assert [shard.name for shard in list_pool(f"{tmp_path}/pool/*/a.tar")] == ["03/a", "04/a"]
    assert [shard.name for shard in list_pool(tmp_path / "pool" / "04")] == ["a", "b"]
    assert [shard.name for shard in list_pool(tmp_path / "pool" / "04" / "b.tar")] == ["b"]


def test_a_tar_of_something_else(tmp_path):
    with pytest.raises(UserError, match=r"s\.tar: holds 1 \*\.npy; looked for an image"):
        read_captions(make_tar(tmp_path / "s.tar", {"a.npy": b""}))


def test_tar_without_captions(tmp_path):
    rows, drops = read_captions(make_tar(tmp_path / "s.tar", {}))
    assert len(rows) == 0 and not drops


def test_real_webdataset_tar(shared_data):
    rows, drops = read_captions(PoolShard("cc12m-32", None, shared_data / "cc12m-32.tar"))
    assert len(rows) == 32 and not drops
    with TarIndex(shared_data / "cc12m-32.tar") as index:
        assert set(index.listing.samples) == set(rows["key"].to_pylist())


def damage_header(raw: bytes) -> bytes:
    return raw[:1024] + b"\x01" * 512 + raw[1536:]


@pytest.mark.parametrize(
    "damage",
    [lambda raw: b"", lambda raw: b"no tar" * 200, lambda raw: raw[:700], lambda raw: raw[:1024], damage_header],
)
def test_broken_tar(tmp_path, damage):
    shard = make_tar(tmp_path / "s.tar", {"a.txt": b"x" * 300, "b.txt": b"y" * 300})
    shard.images.write_bytes(damage(shard.images.read_bytes()))
    with pytest.raises(UserError, match="s.tar: "):
        read_captions(shard)
