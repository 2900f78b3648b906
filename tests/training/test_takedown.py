"""Takedown lists that grow during a run: from the recorded step on no listed sample is seen, on any rank."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mc2_hpc.training.stop import SAVED
from mc2_hpc.training.takedown_proof import prove
from mc2_hpc.training.takedown_record import TakedownRecord
from tests.faults import matrix
from tests.faults.diary import kept_samples, losses, read_diary
from tests.faults.tiny_run import BATCH, SAMPLES, write_config

STEPS, EVERY = 36, 10
EPOCH = SAMPLES // BATCH
FIRST = {f"{number:06d}" for number in range(3, SAMPLES, 50)}
SECOND = {f"{number:06d}" for number in range(7, SAMPLES, 20)}


@pytest.fixture(scope="module")
def starter(fork_server):
    return matrix.Starter(fork_server)


@pytest.fixture(scope="module")
def config(tiny_pool, tmp_path_factory) -> Path:
    values = {"steps": STEPS, "log_every": 1, "checkpoint": {"every": EVERY, "keep": 9}}
    return write_config(tmp_path_factory.mktemp("config") / "run.yaml", tiny_pool, **values)


def lines(keys: set[str]) -> str:
    return "".join(json.dumps({"key": key}) + "\n" for key in sorted(keys))


def grow(path: Path, text: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


def job_of(config: Path, folder: Path, *, processes: int, workers: int = 0, **changes: Any) -> dict[str, Any]:
    """A run with the list ``folder / "list.jsonl"``, looked at every 20 ms."""
    overrides = [f"data.takedown={folder / 'list.jsonl'}", "data.takedown_seconds=0.02", f"data.workers={workers}"]
    return matrix.job(config, folder, processes=processes, overrides=overrides, **changes)


def run_and(starter: matrix.Starter, job: dict[str, Any], *, after: int, do: Callable[[], None]) -> int:
    """Run a job, and ``do`` something once its first rank has completed step ``after``; returns its exit code."""
    folder = Path(job["folder"])

    def wait() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if any(after in attempt.keys for attempt in read_diary(folder)):
                return do()
            time.sleep(0.02)

    thread = threading.Thread(target=wait)
    thread.start()
    code = starter.run({**job, "step_seconds": 0.05})
    thread.join()
    return code


def versions(folder: Path) -> list[tuple[int, int]]:
    """Step and number of lines of each version in the record."""
    return [(version.step, version.lines) for version in TakedownRecord(folder / "run").versions]


def trainer(folder: Path, step: int) -> dict[str, Any]:
    return json.loads((folder / "run" / "checkpoints" / f"step-{step:08d}" / "trainer.json").read_text())


def check_against_record(folder: Path) -> None:
    """After each version's step none of its keys was trained on, and what a run skipped is what it met."""
    taken = kept_samples(folder)
    record = TakedownRecord(folder / "run")
    for version in record.versions:
        listed = {json.loads(line)["key"] for line in record.content[: version.bytes].splitlines()}
        late = {step: listed & set(keys) for step, keys in taken.items() if step > version.step}
        assert not any(late.values()), (version.step, late)
    assert all(len(keys) == BATCH for keys in taken.values())
    assert prove(folder / "run").problems == []


@pytest.mark.parametrize(
    "processes, workers", [(2, 1), *(pytest.param(n, w, marks=pytest.mark.slow) for n, w in ((1, 0), (2, 2), (3, 0)))]
)
def test_a_list_that_grows_holds_from_the_recorded_step_on(config, starter, tmp_path, processes, workers):
    grow(tmp_path / "list.jsonl", lines(FIRST))
    job = job_of(config, tmp_path, processes=processes, workers=workers)
    assert run_and(starter, job, after=8, do=lambda: grow(tmp_path / "list.jsonl", lines(SECOND))) == 0
    (_, first), (step, second) = versions(tmp_path)
    assert (first, second) == (len(FIRST), len(FIRST) + len(SECOND)) and 8 <= step < STEPS
    check_against_record(tmp_path)
    taken = kept_samples(tmp_path)
    seen_before = {key for done, keys in taken.items() if done <= step for key in keys}
    assert not FIRST & seen_before and SECOND & seen_before
    assert f"{len(SECOND)} new lines, in force after step {step}" in (tmp_path / "log").read_text()
    saved = trainer(tmp_path, STEPS)
    assert saved["takedown"]["lines"] == second
    assert saved["skipped"]["taken_down"] > 2 * len(FIRST)
    assert (tmp_path / "run" / "takedown" / "list.jsonl").read_bytes() == (tmp_path / "list.jsonl").read_bytes()


@pytest.mark.slow
def test_a_list_that_names_nothing_leaves_the_run_as_it_was(config, starter, tmp_path):
    assert starter.run(matrix.job(config, tmp_path / "plain", overrides=["steps=12"])) == 0
    (tmp_path / "listed").mkdir()
    job = job_of(config, tmp_path / "listed", processes=2)
    job["overrides"].append("steps=12")

    def name_nothing() -> None:
        grow(tmp_path / "listed" / "list.jsonl", '{"key": "nobody"}\n')

    name_nothing()
    assert run_and(starter, job, after=4, do=name_nothing) == 0
    assert len(versions(tmp_path / "listed")) == 2
    assert kept_samples(tmp_path / "listed") == kept_samples(tmp_path / "plain")
    assert losses(tmp_path / "listed") == losses(tmp_path / "plain")


@pytest.mark.slow
def test_kill_and_resume_keep_every_line_in_force(config, starter, tmp_path):
    """The list grows after step 21; the run is killed in step 29 and resumes from step 20, all lines in force."""
    grow(tmp_path / "list.jsonl", lines(FIRST))
    fault = {"at": "mid-step", "step": 29, "rank": 1, "do": ["KILL"]}
    job = job_of(config, tmp_path, processes=2, faults=[fault])
    assert run_and(starter, job, after=21, do=lambda: grow(tmp_path / "list.jsonl", lines(SECOND))) != 0
    assert starter.run({**job, "processes": 3}) == 0
    assert versions(tmp_path) == [(0, len(FIRST)), (20, len(FIRST) + len(SECOND))]
    check_against_record(tmp_path)


def test_without_the_setting_what_was_applied_stays_in_force(config, starter, tmp_path):
    grow(tmp_path / "list.jsonl", lines(FIRST))
    job = job_of(config, tmp_path, processes=1)
    assert starter.run({**job, "stop_after": 5}) == SAVED
    assert starter.run({**job, "overrides": [*job["overrides"][:1], "steps=20"]}) == 0
    log = (tmp_path / "log").read_text()
    assert "not as in step-00000005: data.takedown" in log
    assert not FIRST & {key for keys in kept_samples(tmp_path).values() for key in keys}


@pytest.mark.slow
def test_damaged_lines_do_not_end_a_run_and_are_said_once(config, starter, tmp_path):
    grow(tmp_path / "list.jsonl", lines(FIRST))
    job = job_of(config, tmp_path, processes=1)
    text = lines(SECOND) + "rubbish\n" + lines({"000000"})
    assert run_and(starter, job, after=8, do=lambda: grow(tmp_path / "list.jsonl", text)) == 0
    assert versions(tmp_path)[-1][1] == len(FIRST) + len(SECOND)
    log = (tmp_path / "log").read_text()
    number = len(FIRST) + len(SECOND) + 1
    assert log.count(f"list.jsonl, line {number}: not valid JSON") == 1 and "the lines before stay in force" in log
    check_against_record(tmp_path)


@pytest.mark.parametrize(
    "change, words",
    [
        (Path.unlink, "list.jsonl: no such file"),
        (lambda path: path.write_text(lines(SECOND)), "no longer begins with the 11 lines that this run has applied"),
        (lambda path: grow(path, "rubbish\n"), "list.jsonl, line 12: not valid JSON"),
    ],
    ids=["gone", "rewritten", "damaged"],
)
def test_a_start_with_a_bad_list_is_refused(config, starter, tmp_path, change, words):
    grow(tmp_path / "list.jsonl", lines(FIRST))
    job = job_of(config, tmp_path, processes=1)
    assert starter.run({**job, "stop_after": 2}) == SAVED
    change(tmp_path / "list.jsonl")
    assert starter.run(job) == 2
    assert words in (tmp_path / "log").read_text()
