"""Takedown lists that grow during a run: from the recorded step on no listed sample is seen, on any rank."""

import json
from pathlib import Path
from typing import Any

import pytest

from mc2_hpc.training.stop import SAVED
from mc2_hpc.training.takedown_proof import prove
from mc2_hpc.training.takedown_record import TakedownRecord
from tests.faults import matrix
from tests.faults.diary import kept_samples, losses, saved_trainer
from tests.faults.tiny_run import BATCH, SAMPLES, write_config

STEPS, EVERY = 36, 10
FIRST = {f"{number:06d}" for number in range(3, SAMPLES, 50)}
SECOND = {f"{number:06d}" for number in range(7, SAMPLES, 20)}


@pytest.fixture(scope="module")
def config(tiny_pool, tmp_path_factory) -> Path:
    values = {"steps": STEPS, "log_every": 1, "checkpoint": {"every": EVERY, "keep": 9}}
    return write_config(tmp_path_factory.mktemp("config") / "run.yaml", tiny_pool, **values)


def lines(keys: set[str]) -> str:
    return "".join(json.dumps({"key": key}) + "\n" for key in sorted(keys))


def write_list(folder: Path, text: str) -> None:
    (folder / "list.jsonl").write_text(text, encoding="utf-8")


def job_of(config: Path, folder: Path, *, processes: int, workers: int = 0, **changes: Any) -> dict[str, Any]:
    """A run with the list ``folder / "list.jsonl"``, looked at every 20 ms."""
    overrides = [f"data.takedown={folder / 'list.jsonl'}", "data.takedown_seconds=0.02", f"data.workers={workers}"]
    overrides += changes.pop("overrides", ())
    return matrix.job(config, folder, processes=processes, overrides=overrides, **changes)


def growing(folder: Path, text: str, *, step: int) -> dict[str, Any]:
    """What makes the list of a run grow by ``text`` in a step: the first rank itself appends it. Steps are long enough
    for the list to be looked at in each."""
    (folder / "list.jsonl.more").write_text(text, encoding="utf-8")
    fault = {"at": "mid-step", "step": step, "rank": 0, "do": [f"grow:{folder / 'list.jsonl'}"]}
    return {"faults": [fault], "step_seconds": 0.05}


def versions(folder: Path) -> list[tuple[int, int]]:
    """Step and number of lines of each version in the record."""
    return [(version.step, version.lines) for version in TakedownRecord(folder / "run").versions]


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
    write_list(tmp_path, lines(FIRST))
    growth = growing(tmp_path, lines(SECOND), step=9)
    assert starter.run(job_of(config, tmp_path, processes=processes, workers=workers, **growth)) == 0
    (_, first), (step, second) = versions(tmp_path)
    assert (first, second) == (len(FIRST), len(FIRST) + len(SECOND)) and 9 <= step < STEPS
    check_against_record(tmp_path)
    taken = kept_samples(tmp_path)
    seen_before = {key for done, keys in taken.items() if done <= step for key in keys}
    assert not FIRST & seen_before and SECOND & seen_before
    assert f"{len(SECOND)} new lines, in force after step {step}" in (tmp_path / "log").read_text()
    saved = saved_trainer(tmp_path, STEPS)
    assert saved["takedown"]["lines"] == second
    assert saved["skipped"]["taken_down"] > 2 * len(FIRST)
    assert (tmp_path / "run" / "takedown" / "list.jsonl").read_bytes() == (tmp_path / "list.jsonl").read_bytes()


@pytest.mark.slow
def test_a_list_that_names_nothing_leaves_the_run_as_it_was(config, starter, tmp_path):
    plain, listed = tmp_path / "plain", tmp_path / "listed"
    assert starter.run(matrix.job(config, plain, overrides=["steps=12"])) == 0
    listed.mkdir()
    write_list(listed, lines({"nobody"}))
    growth = growing(listed, lines({"no one"}), step=4)
    assert starter.run(job_of(config, listed, processes=2, overrides=["steps=12"], **growth)) == 0
    assert [number for _, number in versions(listed)] == [1, 2]
    assert kept_samples(listed) == kept_samples(plain)
    assert losses(listed) == losses(plain)


@pytest.mark.slow
def test_kill_and_resume_keep_every_line_in_force(config, starter, tmp_path):
    """The list grows in step 22; the run is killed in step 29 and resumes from step 20, all lines in force."""
    write_list(tmp_path, lines(FIRST))
    growth = growing(tmp_path, lines(SECOND), step=22)
    growth["faults"].append({"at": "mid-step", "step": 29, "rank": 1, "do": ["KILL"]})
    job = job_of(config, tmp_path, processes=2, **growth)
    assert starter.run(job) != 0
    assert f"{len(SECOND)} new lines, in force after step 2" in (tmp_path / "log").read_text()
    assert starter.run({**job, "processes": 3}) == 0
    assert versions(tmp_path) == [(0, len(FIRST)), (20, len(FIRST) + len(SECOND))]
    check_against_record(tmp_path)


def test_without_the_setting_what_was_applied_stays_in_force(config, starter, tmp_path):
    write_list(tmp_path, lines(FIRST))
    job = job_of(config, tmp_path, processes=1)
    assert starter.run({**job, "stop_after": 5}) == SAVED
    assert starter.run({**job, "overrides": [*job["overrides"][:1], "steps=20"]}) == 0
    log = (tmp_path / "log").read_text()
    assert "not as in step-00000005: data.takedown" in log
    assert not FIRST & {key for keys in kept_samples(tmp_path).values() for key in keys}


@pytest.mark.slow
def test_damaged_lines_do_not_end_a_run_and_are_said_once(config, starter, tmp_path):
    write_list(tmp_path, lines(FIRST))
    growth = growing(tmp_path, lines(SECOND) + "rubbish\n" + lines({"000000"}), step=9)
    assert starter.run(job_of(config, tmp_path, processes=1, **growth)) == 0
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
        (lambda path: path.write_text(path.read_text() + "rubbish\n"), "list.jsonl, line 12: not valid JSON"),
    ],
    ids=["gone", "rewritten", "damaged"],
)
def test_a_start_with_a_bad_list_is_refused(config, starter, tmp_path, change, words):
    write_list(tmp_path, lines(FIRST))
    job = job_of(config, tmp_path, processes=1)
    assert starter.run({**job, "stop_after": 2}) == SAVED
    change(tmp_path / "list.jsonl")
    assert starter.run(job) == 2
    assert words in (tmp_path / "log").read_text()
