"""Matching and balanced sampling compared with the released code, on one core.

    mc2 bench curation [--quick] [--json FILE]

The peer is :mod:`peer_release_curation`: JSON in, pyahocorasick, JSON out, like the release. There are 500,000 entries
and 200,000 captions, two per image. Rates are captions (images, for sampling) per second of CPU time on one core, with
contenders alternating. Matches and counts of both are compared before anything is timed. ``stage 1`` includes all
files; ``matcher`` is matching alone, captions in memory; ``mc2 curate match`` is the wall time of the whole command.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import peer_release_curation as release
from benchmarks.curation_corpus import Corpus, english, spaceless
from benchmarks.harness import main, spread
from mc2_hpc.balancing.thresholds import entry_probabilities
from mc2_hpc.curation.counts import VotesFile
from mc2_hpc.curation.match import MatchShard
from mc2_hpc.curation.matched import counts_path, entries_of, read_matched, tables_folder
from mc2_hpc.curation.matching.matcher import Matcher
from mc2_hpc.curation.pool.captions import list_pool
from mc2_hpc.curation.pool.language_id import DEFAULT_IDENTIFIER
from mc2_hpc.curation.sample import select_rows
from mc2_hpc.metadata.files import write_entries

LANG = "en"
SHARD_IMAGES = 10_000
"""Images per shard, as in img2dataset."""
TEXTS_PER_IMAGE = 2
SHARD_ROWS = SHARD_IMAGES * TEXTS_PER_IMAGE
T_EN = 5
"""Sampling threshold, low enough to thin common entries in such a small pool."""
REPEATS = 5
"""How often the captions are repeated in the pool for timing whole commands."""

Call = Callable[[], object]


def run(quick: bool) -> dict[str, Any]:
    """Rows of all contenders, and the ratios."""
    num_entries, num_captions, rounds = (50_000, 20_000, 2) if quick else (500_000, 200_000, 5)
    corpus = english(num_entries, num_captions)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    with tempfile.TemporaryDirectory(prefix="bench_curation_") as name, _one_core():
        folder = Path(name)
        table_rows = measure_tables(corpus, folder)
        matching = [*measure_stage(corpus, folder, rounds), *measure_matcher(corpus, folder, rounds)]
        matching += measure_spaceless(num_entries * 2 // 3, num_captions // 8, rounds)
        sampling = measure_sampling(folder, rounds)
    with tempfile.TemporaryDirectory(prefix="bench_curation_") as name:
        workers = measure_workers(corpus, Path(name), rounds=1 if quick else 3)
    config = {"entries": num_entries, "captions": num_captions, "text": corpus.source, "shard_rows": SHARD_ROWS}
    rows = [*matching, *sampling, *workers, *table_rows]
    return {"config": config, "rows": rows, "ratios": ratios(rows)}


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Ours relative to the release's; larger is better."""
    rate = {(row["what"], row["who"]): row["median"] for row in rows if "median" in row}
    return {
        "match_vs_release": rate["stage 1", "ours"] / rate["stage 1", "release"],
        "sample_vs_release": rate["sampling", "ours"] / rate["sampling", "release"],
        "matcher_vs_pyahocorasick": rate["matcher", "ours"] / rate["matcher", "pyahocorasick"],
        "spaceless_vs_pyahocorasick": rate["spaceless matcher", "ours"] / rate["spaceless matcher", "pyahocorasick"],
    }


def measure_tables(corpus: Corpus, folder: Path) -> list[dict[str, Any]]:
    """Size of both modes' tables, and seconds to build and map them; leaves the compat tables in ``matched``."""
    rows = []
    for mode, out in (("fixed", folder / "fixed"), ("compat", folder / "matched")):
        Matcher.build(corpus.entries[:100], mode)  # compiles
        start = time.process_time()
        matcher = Matcher.build(corpus.entries, mode)
        built = time.process_time()
        matcher.save(tables_folder(out, LANG))
        saved = time.process_time()
        Matcher.load(tables_folder(out, LANG))
        row = {"what": "tables", "who": mode, "megabytes": matcher.nbytes / 1e6, "build_s": built - start}
        rows.append({**row, "save_s": saved - built, "load_s": time.process_time() - saved})
    return rows


def measure_stage(corpus: Corpus, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Stage 1 including files: the release's, and ours in both modes; leaves matched shards of both in ``folder``."""
    write_pool(corpus.captions, folder / "pool")
    write_release_pool(corpus.captions, folder / "json")
    shards = list_pool(folder / "pool")
    automata = {LANG: release.build_automaton(corpus.entries)}
    (folder / "json_out").mkdir()

    def ours(out: Path) -> Call:
        work = MatchShard(out, frozenset([LANG]), DEFAULT_IDENTIFIER)
        return lambda: [work(shard.name, shard) for shard in shards]

    def theirs() -> list[Any]:
        return [
            release.match_shard(path, path.with_suffix(".valid"), folder / "json_out" / path.name, automata)
            for path in sorted((folder / "json").glob("*.json"))
        ]

    calls: dict[str, Call] = {
        "ours": ours(folder / "matched"),
        "release": theirs,
        "ours, fixed": ours(folder / "fixed"),
    }
    calls["ours"]()
    check_equal(folder, [shard.name for shard in shards], theirs())
    matches = sum(len(row[2]) for image in read_release(folder / "json_out").values() for row in image)
    extra = {"matches_a_caption": matches / len(corpus.captions)}
    return rate_rows("stage 1", alternate(calls, rounds), len(corpus.captions), extra)


def check_equal(folder: Path, names: list[str], votes: list[dict[str, Any]]) -> None:
    """Raise unless both found the same entries in the same captions, with the same counts."""
    theirs = read_release(folder / "json_out")
    seen = 0
    for name, counted in zip(names, votes, strict=True):
        for row in read_matched(folder / "matched" / f"{name}.parquet").to_pylist():
            ids = [ids for text, _, ids in theirs[row["key"]] if text == row["text"]]
            if sorted(ids[0]) != row["entries"]:
                raise AssertionError(f"{name}: different matches in {row['text']!r}")
            seen += len(ids)
        with VotesFile(counts_path(folder / "matched", name)) as file:
            entries, counts = file[LANG]
        if dict(zip(entries.tolist(), counts.tolist(), strict=True)) != dict(counted[LANG]):
            raise AssertionError(f"{name}: different counts")
    if seen != sum(map(len, theirs.values())):
        raise AssertionError(f"{seen} captions matched, but {sum(map(len, theirs.values()))} in the release")


def measure_matcher(corpus: Corpus, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Matching alone, captions in memory."""
    column = pa.array(corpus.captions, pa.large_string())
    matcher, fixed = (Matcher.load(tables_folder(folder / name, LANG)) for name in ("matched", "fixed"))
    automaton = release.build_automaton(corpus.entries)
    calls: dict[str, Call] = {
        "ours": lambda: matcher.match(column),
        "pyahocorasick": lambda: release.match_captions(corpus.captions, automaton),
        "ours, fixed": lambda: fixed.match(column),
    }
    return rate_rows("matcher", alternate(calls, rounds), len(corpus.captions))


def measure_spaceless(num_entries: int, num_captions: int, rounds: int) -> list[dict[str, Any]]:
    """Matching alone in a language without spaces."""
    corpus = spaceless(num_entries, num_captions)
    matcher = Matcher.build(corpus.entries, "compat")
    automaton = release.build_automaton(corpus.entries)
    column = pa.array(corpus.captions, pa.large_string())
    offsets, ids = matcher.match(column)
    theirs = release.match_captions(corpus.captions, automaton)
    if ids.tolist() != [number for found in theirs for number in sorted(found)]:
        raise AssertionError("different matches in text without spaces")
    calls: dict[str, Call] = {
        "ours": lambda: matcher.match(column),
        "pyahocorasick": lambda: release.match_captions(corpus.captions, automaton),
    }
    extra = {"matches_a_caption": len(ids) / num_captions, "entries": num_entries}
    return rate_rows("spaceless matcher", alternate(calls, rounds), num_captions, extra)


def measure_sampling(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """An epoch's sample from matched images in memory: one text per image, kept or dropped by its entries."""
    tables = [read_matched(path) for path in sorted((folder / "matched").glob("*.parquet"))]
    table = pa.concat_tables(tables).combine_chunks()
    np.save(folder / "probs.npy", entry_probabilities(np.bincount(entries_of(table)[1]).astype(np.uint64), T_EN))
    probs = {LANG: np.load(folder / "probs.npy", mmap_mode="r")}
    images = read_release(folder / "json_out")
    kept: dict[str, int] = {}

    def ours() -> None:
        kept["ours"] = len(select_rows(table, probs, seed=0, epoch=0)[1])

    def theirs() -> None:
        kept["release"] = len(release.sample(images, probs, seed=0))

    seconds = alternate({"ours": ours, "release": theirs}, rounds)
    if abs(kept["ours"] - kept["release"]) > 5 * np.sqrt(len(images)):
        raise AssertionError(f"kept {kept} of {len(images)} images: the difference is larger than chance")
    rows = rate_rows("sampling", seconds, len(images))
    return [{**row, "kept": kept[row["who"]] / len(images)} for row in rows]


def measure_workers(corpus: Corpus, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Wall time of the whole command on a million captions (fewer if quick), by workers, with prebuilt tables."""
    write_pool(corpus.captions, folder / "once")
    (folder / "pool").mkdir()
    for repeat in range(REPEATS):
        for path in (folder / "once").iterdir():
            os.link(path, folder / "pool" / f"{repeat}-{path.name}")
    write_entries(folder / "metadata" / f"{LANG}.json", corpus.entries)
    Matcher.build(corpus.entries, "fixed").save(folder / "tables")
    num_captions = REPEATS * len(corpus.captions)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for workers in list(seconds) * rounds:
        out = folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(folder / "tables", tables_folder(out, LANG))
        command = [sys.executable, "-m", "mc2_hpc.cli", "curate", "match", str(folder / "pool"), "--out", str(out)]
        command += ["--metadata", str(folder / "metadata"), "--workers", str(workers)]
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, timeout=1800)
        seconds[workers].append(time.perf_counter() - start)
    names = {f"{workers} worker{'s'[: workers - 1]}, wall": values for workers, values in seconds.items()}
    return rate_rows("mc2 curate match", names, num_captions, {"captions": num_captions})


def alternate(calls: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each contender's calls, alternating (A B A B ...), after one warm-up call each."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if number:
                seconds[name].append(time.process_time() - start)
    return seconds


def rate_rows(
    what: str, seconds: Mapping[str, list[float]], items: int, extra: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """One row per contender: items per second, median and extremes."""
    rows = []
    for who, values in seconds.items():
        rates = [items / value for value in values]
        rows.append({"what": what, "who": who, "unit": "1/s", **spread(rates), "samples": rates, **(extra or {})})
    return rows


def write_pool(captions: list[str], folder: Path) -> None:
    """Captions as Parquet shards."""
    folder.mkdir()
    for shard, first in enumerate(range(0, len(captions), SHARD_ROWS)):
        texts = captions[first : first + SHARD_ROWS]
        keys = [image_key(first + row) for row in range(len(texts))]
        table = pa.table({"key": keys, "text": texts, "lang": [LANG] * len(texts)})
        pq.write_table(table, folder / f"{shard:05d}.parquet", compression="zstd")


def write_release_pool(captions: list[str], folder: Path) -> None:
    """The same shards in the release's JSON format, each with its list of valid images."""
    folder.mkdir()
    for shard, first in enumerate(range(0, len(captions), SHARD_ROWS)):
        images: dict[str, list[list[str]]] = {}
        for row, text in enumerate(captions[first : first + SHARD_ROWS], start=first):
            images.setdefault(image_key(row), []).append([text, LANG])
        path = folder / f"{shard:05d}.json"
        path.write_text(json.dumps(images), encoding="utf-8")
        path.with_suffix(".valid").write_text(json.dumps(list(images)), encoding="utf-8")


def image_key(row: int) -> str:
    """24 hexadecimal digits, like the release's hash of a URL."""
    return hashlib.sha224(str(row // TEXTS_PER_IMAGE).encode()).hexdigest()[:24]


def read_release(folder: Path) -> dict[str, list[list[Any]]]:
    """Images matched by the release."""
    images: dict[str, list[list[Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        images |= json.loads(path.read_text(encoding="utf-8"))
    return images


@contextmanager
def _one_core() -> Iterator[None]:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


if __name__ == "__main__":
    main("curation", run)
