"""Killed runs of ``mc2 curate``: a rerun does only the unfinished work, and the bytes are equal."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mc2_hpc import jobs
from mc2_hpc.curation.run import plan_run
from tests.holding import held
from tests.killing import WAIT_S, started, wait_until


@pytest.fixture
def pool(make_pool) -> Path:
    return make_pool(6)


def command(pool: Path, out: Path) -> list[str]:
    words = ["curate", "run", pool, "--metadata", pool.parent / "metadata", "--t-en", "30", "--out", out]
    return [sys.executable, "-m", "mc2_hpc.cli", *map(str, words), "--workers", "2"]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("victim", ["driver", "worker"])
def test_killed_run_is_continued(pool, tmp_path, victim, outputs):
    """A shard that cannot be opened yet holds a worker at a known place until it is killed."""
    jobs.run(plan_run(pool, pool.parent / "metadata", tmp_path / "whole", t_en=30))
    whole, out = outputs(tmp_path / "whole"), tmp_path / "out"
    stats = out / "matched" / "stats"
    with held(pool / "4.parquet"), started(command(pool, out)) as driver:
        wait_until(lambda: len(list(stats.glob("[0-9].json"))) == 5, driver)
        record = out / "matched" / "logs" / "match" / "events" / "00004.jsonl"
        worker = json.loads(record.read_text().splitlines()[0])["pid"]
        os.kill(driver.pid if victim == "driver" else worker, signal.SIGKILL)
        _, message = driver.communicate(timeout=WAIT_S)
        if victim == "worker":
            assert driver.returncode == 2
            assert "match: a worker was killed at '4'" in message and "run the same command again" in message
        deadline = time.monotonic() + WAIT_S
        while not gone(worker):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    before = {path: path.stat().st_mtime_ns for path in (out / "matched").glob("[0-9].parquet")}
    assert len(before) == 5 and list((out / "matched").glob(".4.*"))
    subprocess.run(command(pool, out), check=True, capture_output=True, timeout=WAIT_S)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {name: content for name, content in outputs(out).items() if not name.startswith("report/")} == whole
    assert not list((out / "matched").glob(".4.*")), "what the killed worker was writing is still there"


def test_killed_merge_and_balance_are_continued(pool, tmp_path, outputs):
    """Every file of balancing is removed in turn, as a kill may leave it: a rerun restores it."""

    def again() -> None:
        jobs.run(plan_run(pool, pool.parent / "metadata", tmp_path / "out", t_en=30))

    again()
    whole = outputs(tmp_path / "out")
    for name in whole:
        if name.startswith(("balance/", "matched/merged/")) and not name.startswith(
            ("balance/counts", "balance/probs")
        ):
            (tmp_path / "out" / name).unlink()
            again()
            assert outputs(tmp_path / "out") == whole, name
