"""Caption fields: drawn by probability from every place a caption can be, with the others where one is missing."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mc2_hpc.data.caption_fields import CaptionFields, FieldReader
from mc2_hpc.data.packing import write_shard
from mc2_hpc.data.shards import CuratedShard, Extras, PlainShard, Shard, ShardError, open_shard
from mc2_hpc.draws import hash_keys
from mc2_hpc.drops import Dropped
from mc2_hpc.errors import UserError

NUM = 20_000


def shares_of(probabilities: dict[str, float], there: set[str]) -> dict[str, float]:
    """Share of each field over many samples that have the fields ``there``."""

    def read(name: str) -> list[str]:
        if name not in there:
            raise Dropped("caption_missing")
        return [name]

    fields = CaptionFields(probabilities)
    drawn = Counter(fields.draw(read, key, seed=0, epoch=0)[0] for key in hash_keys([str(n) for n in range(NUM)]))
    return {name: count / NUM for name, count in drawn.items()}


@pytest.mark.parametrize(
    "probabilities, there, expected",
    [
        ({"txt": 0.85, "json.a": 0.15}, {"txt", "json.a"}, {"txt": 0.85, "json.a": 0.15}),
        ({"txt": 0.85, "json.a": 0.15}, {"txt"}, {"txt": 1}),
        ({"txt": 0.5, "json.a": 0.3, "json.b": 0.2}, {"txt", "json.b"}, {"txt": 5 / 7, "json.b": 2 / 7}),
        ({"txt": 0.5, "json.a": 0.3, "json.b": 0.2}, {"json.a", "json.b"}, {"json.a": 0.6, "json.b": 0.4}),
    ],
)
def test_shares_follow_the_probabilities_among_the_fields_that_are_there(
    probabilities: dict[str, float], there: set[str], expected: dict[str, float]
) -> None:
    assert shares_of(probabilities, there) == pytest.approx(expected, abs=0.012)  # 3.4 standard deviations


def test_the_draw_depends_on_seed_epoch_and_key_alone() -> None:
    def drawn(order: list[str], seed: int, epoch: int) -> list[str]:
        fields = CaptionFields(dict.fromkeys(order, 1 / 3))
        return [fields.draw(lambda name: [name], key, seed=seed, epoch=epoch)[0] for key in hash_keys(list("abcdefgh"))]

    first = drawn(["txt", "json.a", "json.b"], 0, 0)
    assert drawn(["json.b", "txt", "json.a"], 0, 0) == first  # the order in the config means nothing
    assert drawn(["txt", "json.a", "json.b"], 1, 0) != first != drawn(["txt", "json.a", "json.b"], 0, 1)


@pytest.mark.parametrize(
    "field, record, texts",
    [
        ("json.a", {"a": " one "}, ["one"]),
        ("json.a", {"a": ["one", "two", "one", 3]}, ["one", "two"]),
        ("json.a", {"a": [["kind", "one"]]}, ["one"]),
        ("json.a.b", {"a": {"b": "deep"}, "a.b": "flat"}, ["deep"]),
    ],
)
def test_texts_of_a_record(field: str, record: Any, texts: list[str]) -> None:
    assert FieldReader(None, json.dumps(record).encode())(field) == texts


@pytest.mark.parametrize(
    "field, record, reason",
    [
        ("json.a", b"{}", "caption_missing"),
        ("json.a", b'{"a": null}', "caption_missing"),
        ("json.a", b'{"a": 3}', "caption_missing"),
        ("json.a.b", b'{"a": "x"}', "caption_missing"),
        ("json.a", b'{"a": " "}', "caption_empty"),
        ("json.a", b"[]", "caption_not_json"),
        ("json.a", None, "caption_missing"),
        ("txt", b"{}", "caption_missing"),
        ("parquet.a", b"{}", "caption_missing"),
    ],
)
def test_a_field_without_a_caption(field: str, record: bytes | None, reason: str) -> None:
    with pytest.raises(Dropped) as error:
        FieldReader(None, record)(field)
    assert error.value.reason == reason
    with pytest.raises(Dropped) as error:
        CaptionFields({field: 1.0}).draw(FieldReader(None, record), np.uint64(3), seed=0, epoch=0)
    assert error.value.reason == reason


def read_all(shard: Shard, epochs: int = 40) -> dict[str, Counter[tuple[str, str, str]]]:
    """(field, text, language) of each key over several epochs, which draw all that ``read_texts`` returns."""
    found: dict[str, Counter[tuple[str, str, str]]] = {}
    for epoch in range(epochs):
        for row in shard.select_rows(None, seed=0, epoch=epoch).tolist():
            pair = shard.read(row, seed=0, epoch=epoch)
            found.setdefault(pair.key, Counter())[pair.field, pair.text, pair.lang] += 1
    for index, key in enumerate(dict.fromkeys(shard.row_keys)):
        assert set(shard.read_texts(index)) == {text for _, text, _ in found[key]}
    return found


FIELDS = CaptionFields({"txt": 0.5, "json.synthetic": 0.5})


def test_a_plain_shard_draws_from_text_and_record(tmp_path: Path) -> None:
    """A record beside a ``.txt`` that names no language is left out of the ordinary index, so there is another."""
    write_shard(
        tmp_path / "0.tar",
        [
            ("both", {"jpg": b"i", "txt": b"alt", "json": b'{"synthetic": ["one", "two"]}'}),
            ("text", {"jpg": b"i", "txt": b"alt", "json": b'{"lang": "de"}'}),
            ("record", {"jpg": b"i", "json": b'{"synthetic": "one", "lang": "en", "caption": "other"}'}),
        ],
    )
    plain = open_shard(tmp_path / "0.tar")
    shard = open_shard(tmp_path / "0.tar", extras=Extras(FIELDS))
    assert isinstance(shard, PlainShard)
    found = read_all(shard)
    assert set(found["both"]) == {
        ("txt", "alt", ""),
        ("json.synthetic", "one", ""),
        ("json.synthetic", "two", ""),
    }
    assert 10 < found["both"]["txt", "alt", ""] < 30
    assert set(found["text"]) == {("txt", "alt", "de")} and set(found["record"]) == {("json.synthetic", "one", "en")}
    assert {key: set(each) for key, each in read_all(plain).items()} == {
        "both": {("", "alt", "")},
        "text": {("", "alt", "de")},
        "record": {("", "other", "en")},
    }
    assert plain.read_captions(0) == shard.read_captions(0)  # evaluation does not draw


def test_both_indexes_of_a_tar_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mc2_hpc.data.index._SETTLED_NS", -1)
    write_shard(tmp_path / "0.tar", [("a", {"jpg": b"i", "txt": b"alt", "json": b'{"synthetic": "one"}'})])
    for _ in range(2):
        assert set(read_all(open_shard(tmp_path / "0.tar"))["a"]) == {("", "alt", "")}
        assert len(read_all(open_shard(tmp_path / "0.tar", extras=Extras(FIELDS)))["a"]) == 2
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".0.tar.index", ".0.tar.records.index"]


@pytest.fixture
def curated(tmp_path: Path) -> Path:
    """Two images with alt texts and synthetic ones, the second with captions in its tar only."""
    rows = [
        {"key": "a", "text": "alt one", "lang": "de", "synthetic": "syn one"},
        {"key": "a", "text": "alt two", "lang": "fr", "synthetic": "syn two"},
        {"key": "b", "text": "alt", "lang": "en", "synthetic": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "0.parquet")
    files = {"a": {"jpg": b"i"}, "b": {"jpg": b"j", "json": b'{"synthetic": "in the tar"}', "txt": b"beside"}}
    write_shard(tmp_path / "0.tar", list(files.items()))
    return tmp_path / "0.tar"


def test_a_curated_shard_draws_from_columns_of_the_drawn_row(curated: Path) -> None:
    shard = open_shard(curated, extras=Extras(CaptionFields({"parquet.text": 0.7, "parquet.synthetic": 0.3})))
    assert isinstance(shard, CuratedShard)
    found = read_all(shard)
    kinds = {"parquet.text": "alt", "parquet.synthetic": "syn"}
    expected = {(f, f"{k} {n}", lang) for f, k in kinds.items() for n, lang in (("one", "de"), ("two", "fr"))}
    assert set(found["a"]) == expected
    assert set(found["b"]) == {("parquet.text", "alt", "en")}


def test_a_curated_shard_draws_from_its_tar_too(curated: Path) -> None:
    probabilities = {"parquet.text": 0.4, "json.synthetic": 0.3, "txt": 0.3}
    found = read_all(open_shard(curated, extras=Extras(CaptionFields(probabilities))))
    assert {field for field, *_ in found["a"]} == {"parquet.text"}
    assert set(found["b"]) == {
        ("parquet.text", "alt", "en"),
        ("json.synthetic", "in the tar", "en"),
        ("txt", "beside", "en"),
    }


def test_a_column_that_is_not_there_is_named(curated: Path) -> None:
    with pytest.raises(UserError, match=r"0.tar: the .parquet beside it has no column 'nothing', only key, text, lang"):
        open_shard(curated, extras=Extras(CaptionFields({"parquet.text": 0.5, "parquet.nothing": 0.5})))


def test_a_column_that_is_not_text_makes_the_shard_unreadable(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["a"], "text": ["x"], "score": [1.0]}), tmp_path / "0.parquet")
    write_shard(tmp_path / "0.tar", [("a", {"jpg": b"i"})])
    with pytest.raises(ShardError, match="column 'score' is double, must be string"):
        open_shard(tmp_path / "0.tar", extras=Extras(CaptionFields({"parquet.score": 1.0})))


def test_addresses_are_read_where_they_are_text(tmp_path: Path) -> None:
    """A column of another kind that has that name does not make a shard unreadable."""
    write_shard(tmp_path / "0.tar", [("a", {"jpg": b"i", "json": b'{"url": "http://record/a"}'}), ("b", {"jpg": b"i"})])
    table = {"key": ["a", "b"], "text": ["x", "y"]}
    for source, expected in ((["http://table/a", None], "http://table/a"), ([1, 2], "http://record/a")):
        pq.write_table(pa.table({**table, "source": source}), tmp_path / "0.parquet")
        shard = open_shard(tmp_path / "0.tar", extras=Extras(urls=True))
        assert [shard.read(row, seed=0, epoch=0).url for row in range(2)] == [expected, ""]


def test_a_record_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    record = b'{"synthetic": "x", "more": "' + bytes(2 << 20) + b'"}'
    write_shard(tmp_path / "0.tar", [("a", {"jpg": b"i", "txt": b"alt", "json": record})])
    assert set(read_all(open_shard(tmp_path / "0.tar", extras=Extras(FIELDS)))["a"]) == {("txt", "alt", "")}
    pq.write_table(pa.table({"key": ["a"], "text": ["table"]}), tmp_path / "0.parquet")
    fields = CaptionFields({"parquet.text": 0.5, "json.synthetic": 0.5})
    assert set(read_all(open_shard(tmp_path / "0.tar", extras=Extras(fields)))["a"]) == {("parquet.text", "table", "")}
