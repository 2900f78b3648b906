"""Ten million captions in 200 languages through the real pipeline: memory must stay flat, and time must be linear.

    python -m benchmarks.scale_curation [--quick] [--json FILE]

Generates metadata and a pool, then runs ``mc2 curate match``, ``balance`` and ``sample`` as a user would, in separate
processes that are monitored from here. A row is recorded whenever another twentieth of the shards is finished: seconds
since the stage began, and the largest worker memory so far (resident, and without the pages of mapped tables that
workers share). Everything is deleted afterwards; the full run needs about 5 GB below ``$TMPDIR``.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.curation_corpus import IDEOGRAPHS, LETTERS, generated_words
from benchmarks.harness import main
from mc2_hpc.curation.pool.language_id import FastLangdetect
from mc2_hpc.metadata.files import write_entries

NUM_LANGUAGES = 200
ENTRIES = 20_000
"""Entries per language; English has ten times as many."""
SHARD_ROWS = 100_000
WORDS = 8
"""Words per caption; one in four is not an entry."""
ALPHABETS = (
    LETTERS,
    "аеиостнрвлкмдпуяыбзгчйхжшюцщэфё",
    "اليمونترعبدفقكحسهجشصطخثضذغظ",
    "करनतसमपयलवदहजगबचटडथधभ",
    IDEOGRAPHS,
)
EXTRAPOLATED = 10_000_000_000
TASKS = 1000
POLL_S = 0.25
TIMEOUT_S = 4 * 3600


def run(quick: bool) -> dict[str, Any]:
    """Rows of every stage, and ratios for linear time and flat memory."""
    num_captions, entries = (200_000, 2_000) if quick else (10_000_000, ENTRIES)
    shard_rows = SHARD_ROWS // 10 if quick else SHARD_ROWS
    workers = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="scale_curation_") as name:
        folder = Path(name)
        vocabularies = write_metadata(folder / "metadata", entries)
        write_pool(folder / "pool", vocabularies, num_captions, shard_rows)
        metadata = ["--metadata", str(folder / "metadata")]
        matched, balance, sample = (folder / part for part in ("matched", "balance", "sample"))
        stages = {
            "match": (matched, [str(folder / "pool"), *metadata]),
            "balance": (balance, [str(matched), *metadata, "--t-en", str(max(1, num_captions // 10_000))]),
            "sample": (sample, [str(matched), "--balance", str(balance)]),
        }
        rows = []
        for stage, (out, arguments) in stages.items():
            command = [stage, *arguments, "--out", str(out), "--workers", str(workers)]
            rows += watch(stage, command, out, num_captions // shard_rows, shard_rows)
        rows.append(language_id_row(folder / "pool"))
    config = {"captions": num_captions, "languages": NUM_LANGUAGES, "entries": entries, "workers": workers}
    config["shard_rows"] = shard_rows
    return {"config": config, "rows": rows + extrapolate(rows, workers), "ratios": ratios(rows)}


def write_metadata(folder: Path, entries: int) -> dict[str, pa.Array]:
    """Write every language's metadata; returns its words, most frequent first, a quarter of which are not entries."""
    vocabularies = {}
    for number in range(NUM_LANGUAGES):
        rng = np.random.default_rng(number)
        lang = "en" if number == 0 else f"l{number:03d}"
        alphabet = ALPHABETS[number % len(ALPHABETS)]
        lengths = (1, 4) if alphabet is IDEOGRAPHS else (2, 12)
        words = generated_words(rng, (10 if number == 0 else 1) * entries * 4 // 3, alphabet, *lengths)
        write_entries(folder / f"{lang}.json", [word for place, word in enumerate(words) if place % 4 != 3])
        vocabularies[lang] = pa.array(words)
    return vocabularies


def write_pool(folder: Path, vocabularies: dict[str, pa.Array], num_captions: int, shard_rows: int) -> None:
    """Write captions in shards, each with Zipf proportions of the languages and two texts per image."""
    folder.mkdir()
    langs = list(vocabularies)
    shares = 1 / np.arange(1, len(langs) + 1)
    for shard in range(num_captions // shard_rows):
        rng = np.random.default_rng(shard)
        of_langs = rng.multinomial(shard_rows, shares / shares.sum())
        texts = [draw_captions(rng, vocabularies[lang], count) for lang, count in zip(langs, of_langs, strict=True)]
        table = pa.table(
            {
                "key": [f"{shard:06d}{row // 2:06d}" for row in range(shard_rows)],
                "text": pa.concat_arrays(texts),
                "lang": np.repeat(langs, of_langs),
            }
        )
        pq.write_table(table, folder / f"{shard:06d}.parquet", compression="zstd")


def draw_captions(rng: np.random.Generator, words: pa.Array, count: int) -> pa.Array:
    """Captions of words with Zipf frequencies, without spaces between ideographs."""
    # Inverse of the continuous Zipf distribution: fast, and close enough to the discrete one.
    ranks = np.minimum(len(words) ** rng.random(count * WORDS), len(words) - 1).astype(np.int64)
    offsets: npt.NDArray[np.int64] = np.arange(0, count * WORDS + 1, WORDS)
    rows = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), words.take(pa.array(ranks)))
    return pc.binary_join(rows, "" if words[0].as_py()[0] in IDEOGRAPHS else " ")


def watch(stage: str, command: list[str], out: Path, num_shards: int, shard_rows: int) -> list[dict[str, Any]]:
    """Run ``mc2 curate`` with this command; returns a row for each further twentieth of its shards that is finished."""
    rows: list[dict[str, Any]] = []
    largest = {"resident_mb": 0.0, "private_mb": 0.0}
    reached = 0
    start = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mc2_hpc.cli", "curate", *command], stdout=log, stderr=subprocess.STDOUT
        )
        try:
            ended = False
            while not ended:
                ended = process.poll() is not None
                seconds = time.perf_counter() - start
                if seconds > TIMEOUT_S:
                    raise RuntimeError(f"mc2 curate {stage} did not finish within {TIMEOUT_S} s")
                for name, megabytes in memory(process.pid).items():
                    largest[name] = max(largest[name], megabytes)
                # Balancing has no output per shard, so it only counts once it ends.
                done = len(list((out / "stats").glob("*.json"))) if stage != "balance" else num_shards * ended
                if done > reached and (done >= reached + num_shards / 20 or done == num_shards):
                    reached = done
                    rows.append({"stage": stage, "captions": done * shard_rows, "seconds": seconds, **largest})
                time.sleep(0 if ended else POLL_S)
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"mc2 curate {stage} failed: {log.read().decode()[-2000:]}")
    return rows


def memory(pid: int) -> dict[str, float]:
    """Megabytes of the largest process below ``pid``: resident, and without memory shared with others."""
    largest = {"resident_mb": 0.0, "private_mb": 0.0}
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return largest
    for process in family:
        try:
            used = process.memory_full_info()
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue  # exited since it was listed
        largest["resident_mb"] = max(largest["resident_mb"], used.rss / 1e6)
        largest["private_mb"] = max(largest["private_mb"], used.uss / 1e6)
    return largest


def language_id_row(pool: Path) -> dict[str, Any]:
    """Time of the default language identification on one core, for pools without a language column."""
    texts = pq.read_table(next(pool.iterdir()), columns=["text"])["text"].to_pylist()[::10]
    identifier = FastLangdetect()
    identifier.identify(texts[:10])
    start = time.process_time()
    identifier.identify(texts)
    return {"stage": "language id", "captions": len(texts), "seconds": time.process_time() - start}


def extrapolate(rows: list[dict[str, Any]], workers: int) -> list[dict[str, Any]]:
    """The time for ten billion captions if every core were as fast as here.

    For a stage with several rows, the first counts as its start: before it, workers import and tables are built.
    """
    result = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        of_stage = [row for row in rows if row["stage"] == stage]
        first, last = of_stage[0] if len(of_stage) > 1 else {"captions": 0, "seconds": 0.0}, of_stage[-1]
        core_seconds = (last["seconds"] - first["seconds"]) * (1 if stage == "language id" else workers)
        hours = core_seconds / (last["captions"] - first["captions"]) * EXTRAPOLATED / 3600
        row = {"extrapolated": stage, "captions": EXTRAPOLATED, "core_hours": hours}
        result.append({**row, f"hours_on_{TASKS}_tasks": hours / TASKS})
    return result


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The second half of matching relative to the first: near 1 if time is linear and memory flat."""
    match = [row for row in rows if row["stage"] == "match"]
    middle, last = match[len(match) // 2], match[-1]
    second = (last["captions"] - middle["captions"]) / (last["seconds"] - middle["seconds"])
    first = (middle["captions"] - match[0]["captions"]) / (middle["seconds"] - match[0]["seconds"])
    return {
        "second_half_vs_first_half": second / first,
        "end_vs_middle_memory": last["private_mb"] / middle["private_mb"],
    }


if __name__ == "__main__":
    main("scale_curation", run)
