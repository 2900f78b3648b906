"""The fault matrix: what is broken and when, and how the affected run compares with an undisturbed one.

Each row of ``rows.ROWS`` describes one or more starts of ``mc2 train``. ``tests/training/test_faults.py`` runs them
with ranks forked from one process; ``benchmarks/bench_faults.py`` runs them in fresh processes, as a user would, and
measures times.

    python -m tests.faults.matrix [RESULT.json]    writes the matrix into docs/faults.md, with the figures of the result
"""

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.faults.diary import (
    account,
    count_samples,
    kept_samples,
    largest_difference,
    losses,
    passed_over,
    skips,
    state_hashes,
)
from tests.faults.rows import DISK, EVERY, KEYS, ROWS, SHARD, SHARDS, STEPS, VICTIM, Row
from tests.faults.tiny_run import BATCH, write_config, write_pool
from tests.forking import ForkServer

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "faults.md"
RESULTS = ROOT / "benchmarks" / "results"
JOB_S = 240
"""The longest that a forked job may take, restarts included."""
BEGIN, END = "<!-- matrix -->", "<!-- end of matrix -->"
COMMAND = [sys.executable, "-m", "tests.faults.rank"]
"""Runs a job, in :data:`ROOT`."""


def prepare(folder: Path) -> Path:
    """Write images, captions, a tokenizer and the config of a small run; returns the config's path."""
    values = {"steps": STEPS, "log_every": 1, "checkpoint": {"every": EVERY, "keep": 3}}
    return write_config(folder / "run.yaml", write_pool(folder), **values)


def job(config: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """A job for ``rank.py`` that trains into ``folder / "run"``."""
    folder.mkdir(parents=True, exist_ok=True)
    overrides = [f"output={folder / 'run'}", *changes.pop("overrides", ())]
    plain = {"processes": 2, "restarts": 0, "timeout": 120, "step_seconds": 0, "stop_after": None, "faults": []}
    return {"folder": str(folder), "config": str(config), "overrides": overrides, **plain, **changes}


class CannotMount(Exception):
    """A row needs its own disk, and this user may not mount one."""


class Starter:
    """Runs jobs in fresh processes or, given a server, in processes forked from it."""

    def __init__(self, server: ForkServer | None = None) -> None:
        self._server = server

    def run(self, task: Mapping[str, Any]) -> int:
        """Run a job to its end; returns its exit code."""
        path = Path(task["folder"]) / "job.json"
        path.write_text(json.dumps(task), encoding="utf-8")
        if self._server is None:
            return subprocess.run([*COMMAND, str(path)], cwd=ROOT).returncode
        return self._server.run([*COMMAND, "--fork", path], cwd=ROOT, timeout=JOB_S).returncode


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A separate disk at ``folder``; raises CannotMount."""
    folder.mkdir(parents=True)
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    mounted = subprocess.run(["mount", *options], capture_output=True, text=True)
    if mounted.returncode:
        raise CannotMount(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def run_row(row: Row, config: Path, folder: Path, starter: Starter, undisturbed: Path) -> dict[str, Any]:
    """Run a row in ``folder``; returns its figures.

    Raises:
        AssertionError: the outcome is not as the row says, or the run differs from the undisturbed one.
        CannotMount: the row needs its own disk, which cannot be mounted.
    """
    if row.disk:
        with small_disk(folder / "run", row.disk):
            return _run_row(row, config, folder, starter, undisturbed)
    return _run_row(row, config, folder, starter, undisturbed)


def _run_row(row: Row, config: Path, folder: Path, starter: Starter, undisturbed: Path) -> dict[str, Any]:
    shards = whole = config.parent / "shards"
    overrides = row.overrides
    if row.explains is not None:
        shards = folder / "shards"
        shutil.copytree(whole, shards)
        overrides = (*overrides, f"data.train={shards}")
    keys = kept_samples(undisturbed)[20][BATCH // 2 :]
    meaning = {DISK: folder / "run", SHARD: shards / f"{VICTIM:05d}.tar", SHARDS: shards, KEYS: ", ".join(keys)}
    faults = json.loads(_fill_in(json.dumps(row.faults), meaning))
    for number, (ranks, expected) in enumerate(row.starts):
        if number == 1 and row.damage is not None:
            row.damage(folder)
        plan = {"restarts": row.restarts, "timeout": row.timeout, "faults": faults, "overrides": overrides}
        code = starter.run(job(config, folder, processes=ranks, **plan))
        assert code == expected, f"start {number} ended with exit code {code}, not {expected}\n{_log(folder)}"
    log = _log(folder)
    for words in row.says:
        assert _fill_in(words, meaning) in log, f"{_fill_in(words, meaning)!r} is not in the log\n{log}"
    assert len(list(folder.glob("fault*"))) == len(faults), "a fault did not strike"
    leftovers = [path.name for path in (folder / "run" / "checkpoints").iterdir() if path.name.startswith(".")]
    assert not leftovers, leftovers
    figures = account(folder)
    assert figures["steps_lost"] <= row.at_most, figures
    assert sorted(kept_samples(folder)) == list(range(1, STEPS + 1))
    if row.explains is None:
        figures |= _same_run(row, folder, undisturbed)
    else:
        figures |= _same_but_for_the_victim(row, folder, undisturbed, whole)
    return {"fault": row.fault, "moment": row.moment, "outcome": row.outcome, **figures}


def _fill_in(text: str, meaning: Mapping[str, object]) -> str:
    for name, value in meaning.items():
        text = text.replace(name, str(value))
    return text


def _same_run(row: Row, folder: Path, undisturbed: Path) -> dict[str, Any]:
    """Samples, losses, weights and moments equal those of the undisturbed run."""
    counts = count_samples(folder)
    assert counts["samples_lost"] == counts["samples_repeated"] == 0, counts
    assert kept_samples(folder) == kept_samples(undisturbed), "other samples"
    difference = largest_difference(losses(folder), losses(undisturbed))
    if row.same_ranks:
        assert difference == 0 and state_hashes(folder, STEPS) == state_hashes(undisturbed, STEPS), difference
    assert difference <= 1e-5, difference
    return {**counts, "samples_skipped": 0, "loss_difference": difference, "bitwise": row.same_ranks}


def _same_but_for_the_victim(row: Row, folder: Path, undisturbed: Path, whole: Path) -> dict[str, Any]:
    """Ranks took equal steps of full batches; samples of other shards occur once each and in order; the samples left
    out of the damaged shard are those that the run counted."""
    found, expected = kept_samples(folder), kept_samples(undisturbed)
    assert all(len(keys) == BATCH for keys in found.values())
    struck = min(fault["step"] for fault in row.faults)
    assert all(found[step] == expected[step] for step in range(1, struck + 1)), "other samples before the fault"
    ours, theirs = losses(folder), losses(undisturbed)
    assert all(ours[step] == theirs[step] for step in range(1, struck + 1)), "other losses before the fault"
    left_out, new = passed_over(folder, whole, VICTIM)
    skipped = skips(folder, STEPS)
    assert row.explains is not None and row.explains(left_out, new, Counter(skipped)), (left_out, new, skipped)
    return {"samples_lost": 0, "samples_repeated": 0, "samples_skipped": left_out, "skipped": skipped}


def _log(folder: Path) -> str:
    return (folder / "log").read_text(encoding="utf-8")


def run_undisturbed(config: Path, folder: Path, starter: Starter) -> Path:
    """The run on 2 ranks without faults."""
    began = time.monotonic()
    code = starter.run(job(config, folder))
    assert code == 0, f"exit code {code} after {time.monotonic() - began:.0f} s\n{_log(folder)}"
    return folder


def table(rows: list[dict[str, Any]] | None) -> str:
    """The matrix in Markdown, from measured rows or without figures."""
    if rows is None:
        lines = ["| Fault | Moment | Outcome |", "|---|---|---|"]
        return "\n".join(lines + [f"| {row.fault} | {row.moment} | {row.outcome} |" for row in ROWS])
    lines = ["| Fault | Moment | Outcome | Steps lost | Samples lost | Back after |", "|---|---|---|---|---|---|"]
    for row in rows:
        seconds = row["recovery_seconds"]
        back = "–" if seconds is None else f"{seconds:.1f} s"
        skipped = f", {row['samples_skipped']} skipped" if row["samples_skipped"] else ""
        figures = f"{row['steps_lost']} | {row['samples_lost']}{skipped} | {back}"
        lines.append(f"| {row['fault']} | {row['moment']} | {row['outcome']} | {figures} |")
    return "\n".join(lines)


def write_table(result: Path | None) -> None:
    """Write the matrix into ``docs/faults.md``, with the figures of a result of ``mc2 bench faults``."""
    rows = json.loads(result.read_text(encoding="utf-8"))["rows"] if result else None
    head, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    DOCS.write_text(f"{head}{BEGIN}\n{table(rows)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    write_table(Path(sys.argv[1]) if sys.argv[1:] else None)
