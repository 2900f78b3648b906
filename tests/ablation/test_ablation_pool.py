"""The ablations' pool, made from real images and labels, and the format of committed results."""

import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks import ablation_pool, ablations
from benchmarks.plot import PLOTS
from mc2_hpc.ablation.addresses import content
from mc2_hpc.ablation.tables import table_row
from mc2_hpc.evaluation.sets import READERS
from mc2_hpc.evaluation.suite import load_suite
from mc2_hpc.quickstart.captions import NOISE


@pytest.fixture
def pool(shared_data, tmp_path):
    captions = ablation_pool.make(shared_data, tmp_path / "data", images=600, test=100, shards=2)
    shards = sorted((tmp_path / "data" / "pool").glob("*.parquet"))
    rows = [row for path in shards for row in pq.read_table(path).to_pylist()]
    assert len(rows) == captions
    return tmp_path / "data", rows


def test_the_pool_is_as_uneven_as_the_web(pool):
    folder, rows = pool
    entries = {path.stem: json.loads(path.read_text()) for path in (folder / "metadata").glob("*.json")}
    share = {lang: sum(row["lang"] == lang for row in rows) / len(rows) for lang in entries}
    assert len(entries) >= 10 and max(share, key=share.get) == "en" and min(share.values()) > 0
    named = [[entry for entry in entries[row["lang"]] if entry in row["text"]] for row in rows]
    assert 0.05 < sum(not found for found in named) / len(rows) < 0.25  # noise and loans from English
    assert 1 < len(rows) / len({row["key"] for row in rows}) < 2.5
    counts = sorted((sum(e in row["text"] for row in rows if row["lang"] == "en") for e in entries["en"]), reverse=True)
    assert counts[0] > 10 * max(counts[-1], 1)
    assert len({row["text"] for row in rows}) > len(rows) / 2


def test_every_caption_is_of_its_image(pool, shared_data):
    folder, rows = pool
    names, _ = ablation_pool.read_languages(shared_data)
    table = pq.read_table(shared_data / "cifar10-train.parquet")
    label_of = dict(zip(table["jpg"].to_pylist(), table["label"].to_pylist(), strict=True))
    labels = {}
    for path in (folder / "pool").glob("*.tar"):
        with tarfile.open(path) as tar:
            labels |= {Path(member.name).stem: label_of[tar.extractfile(member).read()] for member in tar}
    assert len(labels) == 600
    silent = [
        row["text"]
        for row in rows
        if not any(name in row["text"] for lang in ("en", row["lang"]) for name in names[lang][labels[row["key"]]])
    ]
    noise = {form.partition("{}")[0] for _, form in NOISE} | {"IMG_"}
    assert 0.05 < len(silent) / len(rows) < 0.15
    assert all(any(text.startswith(start) for start in noise) for text in silent)


def test_the_suite_shows_all_classes_in_every_language(pool):
    folder, _ = pool
    suite = load_suite(folder / "suite.yaml")
    for config in suite.sets.values():
        task = READERS[config.reader].read(Path(suite.root) / config.path, **config.options)
        assert len(task.languages) >= 10 and len(task.images) == 100
        for texts in task.languages.values():
            assert len(set(texts.names)) == 10 and len(texts.templates) >= 3
    common, rare = (config.options["names"]["en"] for config in suite.sets.values())
    assert common != rare and len(common) == len(rare)


def test_the_same_seed_makes_the_same_pool(pool, shared_data, tmp_path):
    ablation_pool.make(shared_data, tmp_path / "again", images=600, test=100, shards=2)
    for name in ("pool", "metadata", "test.parquet"):
        assert content(tmp_path / "again" / name) == content(pool[0] / name)


def test_a_result_is_written_and_drawn(tmp_path):
    rows = [table_row("a|b", [0, 1], [{"English": 0.5}, {"English": 0.6}], {"ImageNet": 67.5})]
    facts = {"pairs": 100, "english_share": 0.4}
    about = {"title": "T", "mirrors": "table 1", "finding": "F."}
    tables = [{"name": name, **about, "rows": [{**facts, **row} for row in rows]} for name in ("one", "two", "three")]
    result = ablations.as_result(tables, "mc2 ablate")
    ablations.write_result(result, tmp_path / "result.json")
    again = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert [table["rows"][0]["columns"] for table in ablations.as_tables(again)] == [rows[0]["columns"]] * 3
    assert "| a/b | 100 | 40 | 55.0 ± 7.1 | 67.5 |" in (tmp_path / "result.md").read_text(encoding="utf-8")
    PLOTS[again["name"]](again, tmp_path / "result.png")
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
