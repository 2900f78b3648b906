"""Sampling offline writes the rows that the loader keeps, whatever the shards, workers and interruptions."""

import io
import json
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mc2_hpc import jobs
from mc2_hpc.curation.balance import plan_balance
from mc2_hpc.curation.counts import VotesFile
from mc2_hpc.curation.match import plan_match
from mc2_hpc.curation.matched import counts_path, read_matched
from mc2_hpc.curation.pack import plan_pack
from mc2_hpc.curation.sample import plan_sample
from mc2_hpc.errors import UserError
from mc2_hpc.jobs import Local
from mc2_hpc.reading.json_file import ANYTHING, read_json
from mc2_hpc.shard_paths import list_shards
from mc2_hpc.storage import write_json

WORDS = {
    "en": ["dog", "cat", "zebra", "photo", "red"],
    "de": ["Hund", "Katze", "Zebra", "Foto"],
    "ja": ["犬", "猫", "カメラ"],
}
WEIGHTS = [0.62, 0.2, 0.1, 0.05, 0.03]


def make_rows(images: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """One to three captions per image, mostly English, with entry frequencies as uneven as on the web."""
    rng = np.random.default_rng(seed)
    rows = []
    for image in range(images):
        for text in range(rng.integers(1, 4)):
            lang = rng.choice(["en", "de", "ja"], p=[0.6, 0.3, 0.1])
            weights = np.array(WEIGHTS[: len(WORDS[lang])])
            words = rng.choice(WORDS[lang], size=2, p=weights / weights.sum())
            rows.append((f"image-{image:05d}", f"{words[0]} {words[1]} {text}", str(lang)))
    return rows


def write_pool(pool: Path, rows: list[tuple[str, str, str]], shards: int, *, images: bool = False) -> Path:
    """Distribute the images over shards."""
    pool.mkdir()
    for shard in range(shards):
        own = [row for row in rows if int(row[0][-5:]) % shards == shard]
        key, text, lang = zip(*own, strict=True)
        pq.write_table(pa.table({"key": key, "text": text, "lang": lang}), pool / f"part-{shard:02d}.parquet")
        if images:
            with tarfile.open(pool / f"part-{shard:02d}.tar", "w") as tar:
                for name in dict.fromkeys(key):
                    member = tarfile.TarInfo(f"{name}.jpg")
                    member.size = 3
                    tar.addfile(member, io.BytesIO(b"jpg"))
    return pool


def curate(folder: Path, rows: list[tuple[str, str, str]], shards: int, *, images: bool = False) -> tuple[Path, Path]:
    """Matched and balance folders of a pool."""
    for lang, entries in WORDS.items():
        write_json(folder / "metadata" / f"{lang}.json", entries)
    pool = write_pool(folder / "pool", rows, shards, images=images)
    jobs.run(plan_match(pool, folder / "metadata", folder / "matched"))
    jobs.run(plan_balance(folder / "matched", folder / "metadata", folder / "balance", 40))
    return folder / "matched", folder / "balance"


def rows_in(folder: Path) -> list[tuple[str, str, str, tuple[int, ...]]]:
    rows = [row for path in list_shards(folder, ".parquet") for row in read_matched(path).to_pylist()]
    return sorted((row["key"], row["text"], row["lang"], tuple(row["entries"])) for row in rows)


def tree(folder: Path) -> dict[str, bytes]:
    """Every result file; logs contain times."""
    files = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".") and "logs" not in p.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def curated(tmp_path_factory) -> tuple[Path, Path]:
    return curate(tmp_path_factory.mktemp("curated"), make_rows(600), 3, images=True)


def test_equals_what_the_loader_keeps_of_the_packed_shards(curated, tmp_path):
    from mc2_hpc.balancing.folder import BalanceFolder
    from mc2_hpc.data.shards import open_shard

    matched, balanced = curated
    jobs.run(plan_pack(matched.parent / "pool", matched, tmp_path / "shards"))
    for seed, epoch in ((0, 0), (0, 1), (7, 0)):
        out = tmp_path / f"sample-{seed}-{epoch}"
        jobs.run(plan_sample(matched, balanced, out, seed=seed, epoch=epoch))
        online = []
        for path in list_shards(tmp_path / "shards", ".tar"):
            shard = open_shard(path)
            for row in shard.select_rows(BalanceFolder(balanced), seed=seed, epoch=epoch).tolist():
                pair = shard.read(row, seed=0, epoch=0)
                online.append((pair.key, pair.text, pair.lang))
        assert sorted(online) == [row[:3] for row in rows_in(out)]
        assert 100 < len(online) < 600


def test_seed_and_epoch_matter(curated, tmp_path):
    samples = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        jobs.run(plan_sample(*curated, tmp_path / f"{seed}{epoch}", seed=seed, epoch=epoch))
        samples.append(rows_in(tmp_path / f"{seed}{epoch}"))
    assert samples[0] != samples[1] and samples[0] != samples[2] and samples[1] != samples[2]


@pytest.mark.parametrize(("shards", "workers"), [(1, 1), (7, 2)])
def test_shards_and_workers_change_nothing(curated, tmp_path, shards, workers):
    jobs.run(plan_sample(*curated, tmp_path / "three"))
    other = curate(tmp_path, make_rows(600), shards)
    jobs.run(plan_sample(*other, tmp_path / "other"), Local(workers))
    assert rows_in(tmp_path / "other") == rows_in(tmp_path / "three")


def test_report_and_statistics(curated, tmp_path):
    matched, balanced = curated
    report = jobs.run(plan_sample(matched, balanced, tmp_path / "out"))
    before, after = rows_in(matched), rows_in(tmp_path / "out")
    assert set(after) <= set(before)
    assert len({row[0] for row in after}) == len(after) == report["images"] == report["matched"]
    assert report["rows"] == len(before) == sum(report["captions"].values())
    assert report["captions"]["de"] == sum(row[2] == "de" for row in before)
    assert report["drops"]["not_drawn"] == len(before) - 600
    assert report["drops"]["balanced"] == 600 - len(after)
    assert report["keys_in_several_shards"] == {"checked": 600, "found": 0}
    for lang in WORDS:
        texts = [row for row in after if row[2] == lang]
        matches = sum(len(row[3]) for row in texts)
        assert report["languages"][lang] == {"texts": len(texts), "images": len(texts), "matches": matches}
    votes = np.zeros(len(WORDS["en"]), int)
    for name in read_json(tmp_path / "out" / "match.json", ANYTHING)["shards"]:
        with VotesFile(counts_path(tmp_path / "out", name)) as file:
            entries, counts = file["en"]
        votes[entries] += counts.astype(int)
    assert votes.tolist() == [sum(n in row[3] for row in after if row[2] == "en") for n in range(len(WORDS["en"]))]


def test_sizes_are_those_balancing_expects(tmp_path):
    """One text per image: kept texts match the expectation within five standard deviations, for each language."""
    rows = [(f"image-{n:05d}", text, lang) for n, (_, text, lang) in enumerate(make_rows(2000))]
    matched, balanced = curate(tmp_path, rows, 2)
    kept = jobs.run(plan_sample(matched, balanced, tmp_path / "out"))["languages"]
    for lang, expected in read_json(balanced / "balance.json", ANYTHING)["languages"].items():
        assert abs(kept[lang]["texts"] - expected["expected_texts"]) < 5 * np.sqrt(expected["expected_texts"])


def test_a_sample_is_a_matched_pool(curated, tmp_path):
    matched, balanced = curated
    jobs.run(plan_sample(matched, balanced, tmp_path / "out"))
    packed = jobs.run(plan_pack(matched.parent / "pool", tmp_path / "out", tmp_path / "shards"))
    assert packed["texts"] == packed["images"] == len(rows_in(tmp_path / "out"))
    again = jobs.run(plan_balance(tmp_path / "out", matched.parent / "metadata", tmp_path / "balance", 40))
    assert again["totals"]["matched"] == packed["texts"]
    origin = read_json(tmp_path / "out" / "match.json", ANYTHING)["sample"]
    assert (origin["seed"], origin["epoch"]) == (0, 0)
    with pytest.raises(UserError, match="is already a sample"):
        jobs.run(plan_sample(tmp_path / "out", balanced, tmp_path / "again"))


def test_a_killed_run_continues_to_the_same_bytes(curated, tmp_path):
    matched, balanced = curated
    jobs.run(plan_sample(matched, balanced, tmp_path / "whole"))
    code = (
        "import os, signal, sys\n"
        "from mc2_hpc import jobs\n"
        "from mc2_hpc.curation.sample import plan_sample\n"
        "def stop(stage, done, total, name):\n"
        "    if done == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "jobs.run(plan_sample(*sys.argv[1:]), None, stop)\n"
    )
    arguments = [str(path) for path in (matched, balanced, tmp_path / "killed")]
    killed = subprocess.run([sys.executable, "-c", code, *arguments], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "stats").iterdir()}
    assert len(done) == 2
    jobs.run(plan_sample(matched, balanced, tmp_path / "killed"))
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


def test_keys_in_several_shards_are_told(tmp_path, caplog):
    matched, balanced = curate(tmp_path, make_rows(100), 2)
    first, second = list_shards(matched, ".parquet")
    pq.write_table(pa.concat_tables([pq.read_table(first), pq.read_table(second).slice(0, 1)]), first)
    report = jobs.run(plan_sample(matched, balanced, tmp_path / "out"))
    assert report["keys_in_several_shards"] == {"checked": 100, "found": 1}
    assert "1 of 100 checked image keys" in caplog.text


def test_other_settings_are_refused(curated, tmp_path):
    jobs.run(plan_sample(*curated, tmp_path / "out"))
    with pytest.raises(UserError, match="another sample; name another folder"):
        jobs.run(plan_sample(*curated, tmp_path / "out", epoch=1))


def test_a_foreign_balance_is_refused(curated, tmp_path):
    matched, balanced = curated
    report = read_json(balanced / "balance.json", ANYTHING)
    write_json(tmp_path / "balance" / "balance.json", {**report, "mode": "compat"})
    (tmp_path / "balance" / "probs").symlink_to(balanced / "probs")
    with pytest.raises(UserError, match="the metadata or mode it was balanced with differs"):
        jobs.run(plan_sample(matched, tmp_path / "balance", tmp_path / "out"))


def test_a_shard_without_rows(tmp_path):
    rows = [row for row in make_rows(50) if row[2] == "en"]
    matched, balanced = curate(tmp_path, rows, 2)
    empty = list_shards(matched, ".parquet")[0]
    pq.write_table(pq.read_table(empty).slice(0, 0), empty)
    report = jobs.run(plan_sample(matched, balanced, tmp_path / "out"))
    assert report["rows"] == len(rows_in(matched)) and report["images"] > 0


def test_a_damaged_shard_is_named_and_the_others_done(curated, tmp_path):
    matched, balanced = curate(tmp_path, make_rows(60), 3)
    broken = list_shards(matched, ".parquet")[1]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:100])
    with pytest.raises(UserError, match=f"1 of 3 shards failed.*{broken.name}"):
        jobs.run(plan_sample(matched, balanced, tmp_path / "out"))
    assert len(list((tmp_path / "out" / "stats").iterdir())) == 2
    broken.write_bytes(whole)
    assert jobs.run(plan_sample(matched, balanced, tmp_path / "out"))["rows"] == len(rows_in(matched))


def test_command(curated, tmp_path, capsys):
    from mc2_hpc.cli import main

    matched, balanced = map(str, curated)
    out = str(tmp_path / "out")
    assert main(["curate", "sample", matched, "--balance", balanced, "--out", out, "--epoch", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] > 0
    assert main(["curate", "sample", matched, "--balance", out, "--out", out]) == 2
    assert "name the folder that `mc2 curate balance` wrote" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["key", "text", "lang", "entries", "entries of a row"])
def test_missing_values_of_a_matched_pool_are_refused(tmp_path, name):
    columns = {"key": ["a", "b"], "text": ["x", "y"], "lang": ["en", "en"], "entries": [[0], [1]]}
    if name == "entries of a row":
        name, columns["entries"] = "entries", [[0], [None]]
    else:
        columns[name] = [columns[name][0], None]
    types = {"entries": pa.list_(pa.uint32())}
    table = pa.table({name: pa.array(column, types.get(name, pa.string())) for name, column in columns.items()})
    pq.write_table(table, tmp_path / "0.parquet")
    with pytest.raises(UserError, match=f"0.parquet: nulls in column '{name}': 1, but"):
        read_matched(tmp_path / "0.parquet")
