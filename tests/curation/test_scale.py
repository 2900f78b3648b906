"""Why worldwide matching fits in memory: small tables, mapped and shared, loaded only for languages that occur."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import curation_corpus
from mc2_hpc import jobs
from mc2_hpc.curation.match import _matcher, plan_match
from mc2_hpc.curation.matched import tables_folder
from mc2_hpc.curation.matching.matcher import Matcher
from mc2_hpc.metadata.files import write_entries


@pytest.mark.parametrize("mode", ["compat", "fixed"])
def test_tables_of_half_a_million_entries_take_at_most_120_megabytes(tmp_path, mode):
    entries = curation_corpus.english(65_536, 100, data=tmp_path / "none").entries
    # Tables are emptiest just above a power of two: the worst case for tables that double.
    largest = max(Matcher.build(entries[:count], mode).nbytes / count for count in (40_000, 53_000, 65_536))
    assert 500_000 * largest <= 120e6


def test_loaded_tables_are_maps_of_the_files(tmp_path):
    Matcher.build(["dog", "big dog", "internationalisation", "犬"]).save(tmp_path)
    for name, table in Matcher.load(tmp_path)._tables.items():
        base = table
        while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap) and Path(base.filename).stem == name


def test_only_languages_of_the_shard_are_opened(tmp_path, monkeypatch):
    langs = [f"l{number:03d}" for number in range(329)]
    for lang in langs:
        write_entries(tmp_path / "metadata" / f"{lang}.json", ["dog", lang])
    (tmp_path / "pool").mkdir()
    for shard, here in enumerate((["l007", "l300"], ["l007"], ["l299", "unknown"])):
        rows = {"key": [f"{shard}-{lang}" for lang in here], "text": ["a dog"] * len(here), "lang": here}
        pq.write_table(pa.table(rows), tmp_path / "pool" / f"{shard}.parquet")
    opened = []
    load = Matcher.load.__func__
    monkeypatch.setattr(Matcher, "load", classmethod(lambda cls, folder: opened.append(folder) or load(cls, folder)))
    _matcher.cache_clear()
    report = jobs.run(plan_match(tmp_path / "pool", tmp_path / "metadata", tmp_path / "out", "fixed"))
    assert sorted(opened) == [tables_folder(tmp_path / "out", lang) for lang in ("l007", "l299", "l300")]
    assert report["matched"] == 4 and report["drops"] == {"language_unknown": 1}
