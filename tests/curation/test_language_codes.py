"""A pool's codes become those of its metadata; unknown languages are counted by code, for a limited number of codes."""

from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mc2_hpc import jobs
from mc2_hpc.curation.match import plan_match
from mc2_hpc.curation.matched import SETTINGS
from mc2_hpc.curation.pool.language_codes import NO_CODE, OTHER_CODES, bounded, in_known_languages
from mc2_hpc.errors import UserError
from mc2_hpc.reading.json_file import ANYTHING, read_json
from mc2_hpc.storage import write_json


def rows_of(langs: list[str | None]) -> pa.Table:
    return pa.table({"key": [str(n) for n in range(len(langs))], "lang": pa.array(langs, pa.string())})


def test_rows_keep_their_order_and_get_the_codes_of_the_metadata():
    langs = ["en-US", "xx", None, "en", "DEU", "", "xx", "heb_Hebr"]
    rows, unknown = in_known_languages(rows_of(langs), {"en", "de"})
    assert rows.to_pydict() == {"key": ["0", "3", "4"], "lang": ["en", "en", "de"]}
    assert unknown == {"xx": 2, NO_CODE: 2, "heb_Hebr": 1}
    assert rows.schema == rows_of(langs).schema


@pytest.mark.parametrize("langs", [[], [None], ["en", "en"]])
def test_few_rows(langs):
    rows, unknown = in_known_languages(rows_of(langs), {"en"})
    assert rows["lang"].to_pylist() == [lang for lang in langs if lang] and unknown.total() == langs.count(None)


def test_slices_and_chunks():
    table = pa.concat_tables([rows_of(["en-US", "x"]), rows_of(["x", "EN"])])[1:]
    rows, unknown = in_known_languages(table, {"en"})
    assert rows["lang"].to_pylist() == ["en"] and unknown == {"x": 2}


def test_a_column_without_codes_is_not_counted_whole():
    rows, unknown = in_known_languages(rows_of([f"sentence number {n} " * 9 for n in range(500)] + ["x"] * 3), {"en"})
    assert len(rows) == 0 and len(unknown) == 50 and unknown.total() == 503
    assert unknown["x"] == 3 and unknown[OTHER_CODES] == 503 - 3 - 48 and max(map(len, unknown)) <= 40
    again = bounded(unknown + Counter({f"y{n}": 2 for n in range(30)}))
    assert len(again) == 50 and again.total() == 563 and again["x"] == 3


def test_match_tells_the_codes_without_metadata(tmp_path):
    write_json(tmp_path / "metadata" / "en.json", ["dog"])
    (tmp_path / "pool").mkdir()
    langs = ["en", "EN-us", "eng_Latn", "tlh", "tlh", None]
    table = pa.table({"key": list("abcdef"), "text": ["a dog"] * 6, "lang": langs})
    for shard in ("0", "1"):
        pq.write_table(table, tmp_path / "pool" / f"{shard}.parquet")
    result = jobs.run(plan_match(tmp_path / "pool", tmp_path / "metadata", tmp_path / "out"))
    assert result["matched"] == 6 and result["captions"] == {"en": 6} and result["drops"] == {"language_unknown": 6}
    assert result["unknown_languages"] == {"tlh": 4, NO_CODE: 2}
    assert set(pq.read_table(tmp_path / "out" / "0.parquet")["lang"].to_pylist()) == {"en"}


def test_a_pool_matched_by_an_older_edition_is_refused_and_compat_goes_on(tmp_path):
    write_json(tmp_path / "metadata" / "en.json", ["dog"])
    (tmp_path / "pool").mkdir()
    pq.write_table(pa.table({"key": ["a"], "text": ["a dog"], "lang": ["en"]}), tmp_path / "pool" / "0.parquet")
    for mode in ("fixed", "compat"):
        out = tmp_path / mode
        jobs.run(plan_match(tmp_path / "pool", tmp_path / "metadata", out, mode))
        settings = read_json(out / SETTINGS, ANYTHING)
        settings.pop("matching_rules", None)  # as before editions existed, with the tables of that time
        write_json(out / SETTINGS, settings)
        write_json(out / "matchers" / "en" / "matcher.json", {"format": 2, "mode": mode, "num_entries": 1})
        pq.write_table(pa.table({"key": ["b"], "text": ["dog"], "lang": ["en"]}), tmp_path / "pool" / f"{mode}.parquet")
    with pytest.raises(UserError, match="made with another matching_rules; name another folder or delete it"):
        plan_match(tmp_path / "pool", tmp_path / "metadata", tmp_path / "fixed")
    plan = plan_match(tmp_path / "pool", tmp_path / "metadata", tmp_path / "compat", "compat")
    assert jobs.run(plan)["matched"] == 3
