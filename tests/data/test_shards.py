"""Both kinds of shards as tables of pairs, and errors for bad ones."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mc2_hpc.balancing.folder import BalanceFolder
from mc2_hpc.balancing.selection import select
from mc2_hpc.data.packing import pack_pairs, write_shard
from mc2_hpc.data.shards import CuratedShard, Pair, PlainShard, open_shard
from mc2_hpc.data.skips import ShardError
from mc2_hpc.draws import hash_keys
from mc2_hpc.drops import Dropped
from mc2_hpc.errors import UserError
from mc2_hpc.storage import write_json


def reason(call: Callable[[], object]) -> str:
    with pytest.raises(Dropped) as caught:
        call()
    return caught.value.reason


def curated(folder: Path, rows: list[dict[str, object]], images: list[str], **fields: pa.DataType) -> Path:
    path = folder / "00000.tar"
    write_shard(path, [(key, {"jpg": b"image of " + key.encode()}) for key in images])
    types = {"key": pa.string(), "text": pa.string(), "lang": pa.string(), "entries": pa.list_(pa.uint32())} | fields
    schema = pa.schema([(name, types[name]) for name in rows[0]])
    pq.write_table(pa.Table.from_pylist(rows, schema), path.with_suffix(".parquet"))
    return path


def plain(folder: Path, files: dict[str, dict[str, bytes]]) -> PlainShard:
    write_shard(folder / "plain.tar", files.items())
    shard = open_shard(folder / "plain.tar")
    assert isinstance(shard, PlainShard)
    return shard


def test_packed_pairs_come_back(tmp_path: Path) -> None:
    pairs = [Pair(f"set/{i:03d}", b"\xff\xd8%d" % i, f"Zahl {i} ä", "de" if i % 2 else "") for i in range(25)]
    paths = pack_pairs(pairs, tmp_path, pairs_per_shard=10)
    assert [path.name for path in paths] == ["00000.tar", "00001.tar", "00002.tar"]
    shards = [open_shard(path) for path in paths]
    assert [shard.read(row, seed=0, epoch=0) for shard in shards for row in range(shard.num_keys)] == pairs
    with pytest.raises(ValueError, match="end a key at its first dot"):
        pack_pairs([Pair("a.b", b"", "x")], tmp_path / "dots")


def test_write_shard_is_deterministic_and_readable_by_tarfile(tmp_path: Path) -> None:
    samples = [("a/000", {"jpg": b"1", "txt": "ä".encode()}), ("001", {"jpg": b"2" * 700})]
    for name in ("x.tar", "y.tar"):
        write_shard(tmp_path / name, samples)
    assert (tmp_path / "x.tar").read_bytes() == (tmp_path / "y.tar").read_bytes()
    with tarfile.open(tmp_path / "x.tar") as archive:
        assert archive.getnames() == ["a/000.jpg", "a/000.txt", "001.jpg"]
    with pytest.raises(ValueError, match="not a safe member name"):
        write_shard(tmp_path / "z.tar", [("../evil", {"jpg": b""})])
    assert not (tmp_path / "z.tar").exists()


def test_plain_captions(tmp_path: Path) -> None:
    def js(value: object) -> bytes:
        return json.dumps(value).encode()

    files = {
        "txt": {"jpg": b"1", "txt": b" a dog\n"},
        "both": {"png": b"2", "txt": b"from txt", "json": js({"caption": "from json", "lang": "en"})},
        "caption": {"webp": b"3", "json": js({"caption": "légende", "text": "other"})},
        "text": {"JPEG": b"4", "json": js({"text": "テキスト", "lang": "ja"})},
        "no_text": {"jpg": b"5"},
        "no_image": {"txt": b"words"},
        "number": {"jpg": b"6", "json": js({"caption": 7})},
        "list": {"jpg": b"7", "json": js([1])},
        "broken": {"jpg": b"8", "json": b"{"},
        "blank": {"jpg": b"9", "txt": b" \n "},
        "latin1": {"jpg": b"10", "txt": "dejà".encode("latin-1")},
        "surrogate": {"jpg": b"11", "json": b'{"text": "half \\ud800"}'},
    }
    shard = plain(tmp_path, files)
    rows = dict(zip(files, range(shard.num_keys), strict=True))
    assert shard.read(rows["txt"], seed=0, epoch=0) == Pair("txt", b"1", "a dog", "")
    assert shard.read(rows["both"], seed=0, epoch=0) == Pair("both", b"2", "from txt", "en")
    assert shard.read(rows["caption"], seed=0, epoch=0) == Pair("caption", b"3", "légende", "")
    assert shard.read(rows["text"], seed=0, epoch=0) == Pair("text", b"4", "テキスト", "ja")
    found = {key: reason(lambda key=key: shard.read(rows[key], seed=0, epoch=0)) for key in list(files)[4:]}
    assert found == {
        "no_text": "caption_missing",
        "no_image": "image_missing",
        "number": "caption_missing",
        "list": "caption_not_json",
        "broken": "caption_not_json",
        "blank": "caption_empty",
        "latin1": "caption_not_utf8",
        "surrogate": "caption_not_utf8",
    }


def test_files_that_are_no_samples_are_passed_over(tmp_path: Path) -> None:
    shard = plain(tmp_path, {"a/b": {"jpg": b"1", "txt": b"x"}, "._a": {"jpg": b"2"}, "c": {"npy": b"3"}})
    assert shard.num_keys == 1 and shard.read(0, seed=0, epoch=0).key == "a/b"
    with pytest.raises(ShardError, match=r"holds 1 \*\.npy; looked for an image .*\.txt or \.json"):
        plain(tmp_path, {"c": {"npy": b"3"}})


def test_real_shard(shared_data: Path) -> None:
    shard = open_shard(shared_data / "cc12m-32.tar")
    pairs = [shard.read(row, seed=0, epoch=0) for row in range(shard.num_keys)]
    assert len(pairs) == 32 and pairs[3].text == "Woman exercising by skipping a rope"
    assert all(bytes(pair.image[:2]) == b"\xff\xd8" for pair in pairs)


def test_curated_shard_has_all_texts_of_a_image(tmp_path: Path) -> None:
    rows = [
        {"key": "a.1", "text": "one", "lang": "en"},
        {"key": "b", "text": "zwei", "lang": None},
        {"key": "a.1", "text": "eins", "lang": "de"},
        {"key": "gone", "text": "nothing to see", "lang": "en"},
        {"key": "b", "text": None, "lang": "en"},
    ]
    shard = open_shard(curated(tmp_path, rows, ["a.1", "b", "unmatched"]))
    assert isinstance(shard, CuratedShard) and shard.num_keys == 3
    assert shard.read(2, seed=0, epoch=0) == Pair("a.1", b"image of a.1", "eins", "de")
    assert shard.read_captions(0) == [("one", "en"), ("eins", "de")] and shard.read_image(0) == b"image of a.1"
    assert shard.read(1, seed=0, epoch=0).lang == ""
    assert reason(lambda: shard.read(3, seed=0, epoch=0)) == "image_missing"
    assert reason(lambda: shard.read(4, seed=0, epoch=0)) == "caption_missing"
    for epoch in range(3):
        chosen = shard.select_rows(None, seed=0, epoch=epoch)
        assert len(chosen) == 3 and chosen[np.argsort(chosen)].tolist() == chosen.tolist()
    assert {tuple(shard.select_rows(None, seed=0, epoch=epoch)) for epoch in range(20)} != {(0, 1, 3)}


def test_keys_pair_in_any_unicode_form_and_numbers_by_value(tmp_path: Path) -> None:
    rows = [
        {"key": "caf\u00e9", "text": "composed"},
        {"key": "12", "text": "a number"},
        {"key": "7", "text": "two files"},
    ]
    shard = open_shard(curated(tmp_path, rows, ["cafe\u0301", "000012", "07", "007"]))
    assert shard.read(0, seed=0, epoch=0).image == "image of cafe\u0301".encode()
    assert shard.read(1, seed=0, epoch=0).image == b"image of 000012"
    assert reason(lambda: shard.read(2, seed=0, epoch=0)) == "image_missing"


def test_whole_numbers_as_keys(tmp_path: Path) -> None:
    path = curated(tmp_path, [{"key": "1", "text": "one"}], ["00001"])
    pq.write_table(pa.table({"key": [1], "text": ["one"]}), path.with_suffix(".parquet"))
    assert open_shard(path).read(0, seed=0, epoch=0) == Pair("1", b"image of 00001", "one", "")


def test_one_of_several_captions_of_a_record_is_drawn(tmp_path: Path) -> None:
    texts = ["a cat", "ein Hund", "un oiseau"]
    shard = plain(tmp_path, {"k": {"jpg": b"1", "json": json.dumps({"captions": texts}).encode()}})
    drawn = [shard.read(0, seed=0, epoch=epoch).text for epoch in range(30)]
    assert set(drawn) == set(texts)
    assert drawn == [shard.read(0, seed=0, epoch=epoch).text for epoch in range(30)], "a pure function of the epoch"
    assert [text for text, _ in shard.read_captions(0)] == texts


@pytest.mark.parametrize("record", [b'{"lang": "de"', b'["lang"]'])
def test_a_bad_record_does_not_cost_the_caption_beside_it(tmp_path: Path, record: bytes) -> None:
    shard = plain(tmp_path, {"k": {"jpg": b"1", "txt": b"a cat", "json": record}})
    assert shard.read(0, seed=0, epoch=0) == Pair("k", b"1", "a cat", "")
    assert shard.read_captions(0) == [("a cat", "")]


def test_a_bad_caption_in_parquet_costs_itself_alone(tmp_path: Path) -> None:
    rows = [{"key": "a", "text": b"good"}, {"key": "b", "text": b"bad \xff"}]
    path = curated(tmp_path, rows, ["a", "b"], text=pa.binary())
    # A string column with the bytes of a broken writer.
    table = pq.read_table(path.with_suffix(".parquet"))
    text = pa.StringArray.from_buffers(2, *table["text"].chunk(0).buffers()[1:])
    pq.write_table(table.set_column(1, "text", text), path.with_suffix(".parquet"))
    shard = open_shard(path)
    assert sorted(shard.select_rows(None, seed=0, epoch=0)) == [0, 1]
    assert shard.read(0, seed=0, epoch=0).text == "good"
    assert reason(lambda: shard.read(1, seed=0, epoch=0)) == "caption_not_utf8"


def test_parquet_of_img2dataset_does_not_make_a_shard_curated(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [("a", {"jpg": b"1", "txt": b"x"})])
    pq.write_table(pa.table({"key": ["a"], "caption": ["x"], "url": ["u"]}), tmp_path / "0.parquet")
    assert isinstance(open_shard(tmp_path / "0.tar"), PlainShard)


def test_unreadable_shards(tmp_path: Path) -> None:
    path = curated(tmp_path, [{"key": "a", "text": "x"}], ["a"])
    whole = path.with_suffix(".parquet").read_bytes()
    for content in (b"", b"PAR1 no", whole[: len(whole) // 2]):
        path.with_suffix(".parquet").write_bytes(content)
        with pytest.raises(ShardError, match=r"00000\.parquet"):
            open_shard(path)
    pq.write_table(pa.table({"key": ["a", None], "text": ["x", "y"]}), path.with_suffix(".parquet"))
    with pytest.raises(ShardError, match="a row without a key"):
        open_shard(path)
    pq.write_table(pa.table({"key": ["a"], "text": [[1]]}), path.with_suffix(".parquet"))
    with pytest.raises(ShardError, match=r"00000\.parquet: column 'text' is list.*must be string"):
        open_shard(path)
    path.with_suffix(".parquet").unlink()
    path.write_bytes(path.read_bytes()[:520])
    with pytest.raises(ShardError, match="cut off"):
        open_shard(path)
    with pytest.raises(ShardError, match="No such file"):
        open_shard(tmp_path / "absent.tar")


def balance_folder(folder: Path, probs: dict[str, list[float]]) -> BalanceFolder:
    write_json(folder / "balance.json", {"t_en": 1})
    (folder / "probs").mkdir(parents=True)
    for lang, values in probs.items():
        np.save(folder / "probs" / f"{lang}.npy", np.array(values, np.float32))
    return BalanceFolder(folder)


def test_balanced_rows_are_curations_selection(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {
            "key": f"k{i // 2}",
            "text": f"caption {i}",
            "lang": ("en", "de")[i % 2],
            "entries": sorted(rng.choice(20, size=rng.integers(1, 4), replace=False).tolist()),
        }
        for i in range(400)
    ]
    shard = open_shard(curated(tmp_path, rows, [f"k{i}" for i in range(200)]))
    probs = balance_folder(tmp_path / "balance", {"en": [0.05] * 20, "de": [0.3] * 20})
    offsets = np.cumsum([0] + [len(row["entries"]) for row in rows])
    ids = np.concatenate([row["entries"] for row in rows]).astype(np.uint32)
    arrays = [hash_keys([row[name] for row in rows]) for name in ("key", "text")]
    langs = [row["lang"] for row in rows]
    kept = shard.select_rows(probs, seed=1, epoch=2)
    assert kept.tolist() == select(*arrays, offsets, ids, langs, dict(probs), seed=1, epoch=2).tolist()
    assert 0 < len(kept) < 120


def test_balance_that_does_not_fit(tmp_path: Path) -> None:
    probs = balance_folder(tmp_path / "balance", {"en": [0.5]})
    row = {"key": "a", "text": "x", "lang": "fr", "entries": [0]}
    with pytest.raises(UserError, match=r"00000\.tar: no balancing probabilities for language 'fr'"):
        open_shard(curated(tmp_path, [row], ["a"])).select_rows(probs, seed=0, epoch=0)
    with pytest.raises(UserError, match="entry id 9"):
        open_shard(curated(tmp_path, [row | {"lang": "en", "entries": [9]}], ["a"])).select_rows(probs, seed=0, epoch=0)
    del row["entries"]
    with pytest.raises(UserError, match="no entries column"):
        open_shard(curated(tmp_path, [row], ["a"])).select_rows(probs, seed=0, epoch=0)
    with pytest.raises(UserError, match="data.balance is set, but this is not a curated shard"):
        plain(tmp_path, {"a": {"jpg": b"1", "txt": b"x"}}).select_rows(probs, seed=0, epoch=0)


def test_balance_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no balance\.json there"):
        BalanceFolder(tmp_path)
    write_json(tmp_path / "balance.json", {})
    with pytest.raises(UserError, match=r"no probs/<lang>\.npy there"):
        BalanceFolder(tmp_path)
    (tmp_path / "probs").mkdir()
    (tmp_path / "probs" / "en.npy").write_bytes(b"rubbish")
    np.save(tmp_path / "probs" / "de.npy", np.zeros((2, 2)))
    for lang in ("en", "de"):
        with pytest.raises(UserError, match=rf"{lang}\.npy"):
            BalanceFolder(tmp_path)[lang]
    assert "../probs/en" not in BalanceFolder(tmp_path)
