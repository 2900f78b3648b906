"""``mc2 status``: what a run's files say about it, while it runs, after it ended, and when some are damaged."""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from mc2_hpc.cli import main
from mc2_hpc.config import RunConfig
from mc2_hpc.distributed import Ranks
from mc2_hpc.errors import UserError
from mc2_hpc.reading.files import read_tail
from mc2_hpc.training.log_errors import last_error
from mc2_hpc.training.lost_rank import LostRankError
from mc2_hpc.training.run_folder import recorded_start
from mc2_hpc.training.run_state import begun, read_state, write_state
from mc2_hpc.training.status import read_status
from mc2_hpc.training.stop import SAVED, Stopped
from mc2_hpc.training.trainer import NonFiniteError

NAN = "loss is nan at step 6; last good checkpoint: none yet"


def row(step, **changes):
    rates = {"samples_per_second": 64.0, "steps_per_second": 2.0, "data_wait": 0.25, "checkpoint_stall_seconds": 0.0}
    values = {"step": step, "samples_seen": step * 32, "loss": 1.5, "lr": 1e-3, "skipped": {}, "new column": []}
    return json.dumps({**values, **rates, **changes}) + "\n"


def start(folder, rank=0, ranks=1, steps=100):
    """The record of a start in ``folder``, without a process group."""
    config = RunConfig(output=str(folder), steps=steps, global_batch=256)
    place = Ranks(rank=rank, world_size=ranks, local_rank=rank, device=torch.device("cpu"))
    return recorded_start(config, place)


def begin(folder):
    """What a start leaves that does not end."""
    write_state(folder, begun(folder, steps=100, global_batch=256, ranks=1))


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of 100 steps that has logged 40; it was started, and nothing more is known."""
    folder = tmp_path / "run"
    begin(folder)
    (folder / "metrics.jsonl").write_text("".join(row(step) for step in range(10, 41, 10)))
    return folder


def save(folder, step, **trainer):
    """A checkpoint with the files that are read."""
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    (checkpoint / "trainer.json").write_text(json.dumps(trainer))


def age_all(folder, seconds):
    then = time.time() - seconds
    for path in folder.rglob("*"):
        os.utime(path, (then, then))


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}


def shown(capsys, *words):
    code = main(["status", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_real_run_from_start_to_failure(module_config, fork_server, tmp_path):
    """Read by another process while it trains, after a signal, and after it has failed."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "mc2_hpc.cli", "train", str(module_config), f"output={folder}", "log_every=1"]
    process = fork_server.start([*command, "steps=100000", "checkpoint.every=4"])
    deadline = time.monotonic() + 120
    seen = []
    while not seen or seen[-1].step < 6 or seen[-1].checkpoint is None:
        assert process.poll() is None and time.monotonic() < deadline
        try:
            seen.append(read_status(folder))
        except UserError as error:
            assert "no such folder" in str(error) or "not a run" in str(error)
        time.sleep(0.02)
    before = seen[-1]
    assert before.state == "running" and before.steps == 100_000 and before.samples_seen == before.step * 32
    assert before.recent.samples_per_second > 0 and before.eta_seconds > 0 and before.checkpoint.step % 4 == 0
    assert {status.state for status in seen} <= {"starting", "running"} and not before.unreadable
    process.terminate()
    assert process.wait(60) == SAVED
    stopped = read_status(folder)
    assert stopped.state == "saved" and stopped.message.startswith(f"SIGTERM: saved after step {stopped.step} of 10")
    assert stopped.checkpoint.step == stopped.step >= before.step and stopped.error is None
    result = fork_server.run([*command, "steps=100000", "optim.lr=1e30", "optim.warmup=0"])
    assert result.returncode == 1, result.stderr
    failed = read_status(folder)
    assert (failed.state, failed.start.number, failed.start.ranks) == ("failed", 2, 1)
    assert f"mc2: {failed.error.text}" in result.stderr and not failed.error.before_this_start


def test_one_run_is_shown_in_80_columns_of_ascii(run, capsys):
    skipped = {"read_error": 1, "caption_empty": 7, "image_missing": 0}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(row(50, checkpoint_stall_seconds=40.0, skipped=skipped))
    save(run, 30)
    (run / "slurm-starts.json").write_text('{"job": "8", "newest": "step-00000030", "starts": 2}')
    error = "RuntimeError: something that takes so many words that they do not fit into one line of a terminal"
    (run / "slurm-8.log").write_text(f"0: {error}\n")
    code, out, err = shown(capsys, run)
    assert code == 0 and not err and out.isascii()
    title, *lines = out.splitlines()
    assert title == str(run) and max(map(len, lines)) <= 80
    facts = " ".join(out.split())
    for words in (
        "state running since 0:00:0",
        "progress step 50 of 100 (50.0%), 1,600 pairs seen",
        "rate 64 pairs/s, 25% of the time waiting for data, loss 1.5000",
        "ETA 0:01:15 at this rate",  # 40 steps took 20 seconds and a save of 40
        "skipped 8 samples (0.50%): caption_empty 7, read_error 1",
        "checkpoint step 30, 0:00:0",
        "starts 1, the newest 0:00:0",
        "1 rank, the first on",
        "Slurm job 8 (2 since its newest checkpoint)",
        f"last error {error}",
    ):
        assert words in facts, words


def test_several_runs_are_a_table(run, tmp_path, capsys):
    failed = tmp_path / ("a name that is too long for its column, " * 2)
    with pytest.raises(NonFiniteError), start(failed):
        raise NonFiniteError(NAN)
    code, out, err = shown(capsys, run, failed, tmp_path, tmp_path / "nowhere", "--json", tmp_path / "found.json")
    cure = "name the `output` folder of a run"
    assert code == 2
    assert err.splitlines() == [
        f"mc2: {tmp_path}: not a run: no state.json, metrics.jsonl or checkpoints in it; {cure}",
        f"mc2: {tmp_path / 'nowhere'}: no such folder; {cure}",
    ]
    head, first, second, *rest = out.splitlines()
    assert head.split() == ["RUN", "STATE", "STEP", "PAIRS/S", "ETA", "WAIT"] and len(head) == len(first) <= 80
    assert first.split()[1:] == ["running", "40/100", "64", "0:00:30", "25%"]
    assert second.startswith("...") and second.split()[-5:] == ["failed", "0/100", "-", "-", "-"]
    assert NAN in " ".join(" ".join(rest).split()) and max(map(len, rest)) <= 80
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(status["run"], status["state"]) for status in found] == [(str(run), "running"), (str(failed), "failed")]
    code, out, _ = shown(capsys, run, "--json", "-")
    assert code == 0 and json.loads(out)[0]["recent"]["samples_per_second"] == 64


def test_nothing_is_written(run, capsys):
    save(run, 30)
    before = snapshot(run)
    assert shown(capsys, run)[0] == 0
    assert snapshot(run) == before


def test_a_half_written_row_is_normal(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write(row(50) + row(60)[:40])
    status = read_status(run)
    assert (status.step, status.recent.samples_per_second, status.unreadable) == (50, 64, [])


def test_damaged_rows_are_left_out_and_named(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write("\x00\x00\n[1]\n" + row(50))
    status = read_status(run)
    assert (status.step, status.recent.samples_per_second) == (50, 64)
    (named,) = status.unreadable
    assert "metrics.jsonl" in named


def test_rates_are_those_of_the_last_rows(run):
    rows = [row(step, samples_per_second=1.0) for step in range(1, 100)]
    rows += [row(100 + 4 * i, steps_per_second=1.0, samples_per_second=32.0, data_wait=0.0) for i in range(10)]
    rows += [row(140, steps_per_second=4.0, samples_per_second=128.0, data_wait=0.5)]
    (run / "metrics.jsonl").write_text("".join(rows))
    recent = read_status(run).recent
    # Nine times 4 steps in 4 seconds, then 4 steps in one.
    assert recent.samples_per_second == pytest.approx(40 * 32 / 37)
    assert recent.data_wait == pytest.approx(0.5 / 37) and recent.step_seconds == pytest.approx(37 / 40)
    assert recent.row_seconds == pytest.approx(3.7)


def test_a_run_that_has_not_logged_yet(tmp_path, capsys):
    begin(tmp_path / "run")
    code, out, _ = shown(capsys, tmp_path / "run")
    assert code == 0 and "no step logged yet, of 100" in out and "starting since 0:00:0" in out
    assert "none yet" in out and "ETA" not in out


@pytest.mark.parametrize("seconds, row_seconds, state", [(400, 1, "running"), (800, 1, "silent"), (800, 90, "running")])
def test_a_killed_run_is_silent(run, seconds, row_seconds, state, capsys):
    rate = 10 / row_seconds
    (run / "metrics.jsonl").write_text("".join(row(step, steps_per_second=rate) for step in (10, 20)))
    save(run, 10)
    age_all(run, seconds)
    status = read_status(run)
    assert status.state == state and status.sign_of_life_age == pytest.approx(seconds, abs=30)
    if state == "silent":
        assert "nothing has changed for 0:13:2" in shown(capsys, run)[1]
        (run / "checkpoints" / ".step-00000020.partial").mkdir()
        assert read_status(run).state == "running", "it is saving"


def test_a_run_of_an_earlier_version_has_no_state(run):
    (run / "state.json").unlink()
    (run / "metrics.jsonl").write_text(row(40))
    assert dataclasses.replace(read_status(run), sign_of_life_age=0).steps is None
    save(run, 48, samples_seen=1536, skipped={"read_error": 2}, config={"steps": 96, "optim": {}})
    status = read_status(run)
    assert (status.state, status.step, status.steps, status.samples_seen) == ("running", 48, 96, 1536)
    assert status.skipped == {"read_error": 2} and status.eta_seconds == 24
    save(run, 96, samples_seen=3072, skipped={}, config={"steps": 96})
    assert read_status(run).state == "finished"


def test_damaged_files_are_named(run, capsys):
    for name in ("state.json", "slurm-starts.json"):
        (run / name).write_text("{")
    code, out, _ = shown(capsys, run)
    assert code == 0 and "step 40," in out
    text = "".join(out.split())  # a long folder name is broken anywhere to fit 80 columns
    assert "/state.json:notvalidJSON" in text and "/slurm-starts.json:notvalidJSON" in text


LOGS = {
    "by mc2": ("mc2: giving up after 5 starts of job 7\n", "giving up after 5 starts of job 7", True),
    "by a rank": ("3: mc2: loss is nan at step 3\nmc2: exit code 1: another start\n", "loss is nan at step 3", True),
    "a traceback": (
        'Traceback (most recent call last):\n  File "x.py"\ntorch.OutOfMemoryError: CUDA out\n',
        "torch.OutOfMemoryError: CUDA out",
        True,
    ),
    "a cause and what follows": ("0: ValueError: no\nsrun: error: n1: task 0: Exited\n", "ValueError: no", True),
    "only Slurm's": ("slurmstepd-n1: error: Detected 1 oom_kill event\n", "error: Detected 1 oom_kill event", True),
    "a logged one": ("12:00:01 E checkpoint x was not saved\n12:00:02 W y\n", "checkpoint x was not saved", True),
    "of an earlier start": ("mc2: no\nmc2: job 7, start 2 on n1, 2026\n", "no", False),
    "none": (
        "mc2: job 7, start 1 on n1, 2026\n0: mc2: SIGUSR1: saved after step 3\nmc2: the run is done\n",
        None,
        None,
    ),
    "control characters": ("mc2: a\x1b[31m\x07b\n", "a\\x1b[31m\\x07b", True),
}


@pytest.mark.parametrize("text, error, newest", LOGS.values(), ids=LOGS)
def test_errors_in_logs(tmp_path, text, error, newest):
    log = tmp_path / "slurm-7.log"
    log.write_bytes(b"x" * 300_000 + b"\n\xff\n" + text.encode())
    found = last_error(log)
    if error is None:
        assert found is None
    else:
        assert found[0].endswith(error) and found[1] == newest


def test_the_newest_error_counts(run):
    """The trainer's own error is more precise than a log's; but what killed a run is only in the log."""
    with pytest.raises(NonFiniteError), start(run):
        raise NonFiniteError(NAN)
    log = run / "slurm-7.log"
    log.write_text("mc2: something else\n")
    assert read_status(run).error.text == NAN
    begin(run)
    os.utime(log, (time.time() - 100,) * 2)
    error = read_status(run).error
    assert (error.text, error.before_this_start) == (NAN, True), "the log is older than this start"
    log.write_text("mc2: something else\n")
    os.utime(log, (time.time() + 1,) * 2)
    error = read_status(run).error
    assert (error.text, error.before_this_start, error.age) == ("something else", False, None)


def test_how_starts_end_is_recorded(tmp_path):
    with start(tmp_path):
        assert read_state(tmp_path).state == "running"
    assert (read_state(tmp_path).state, read_state(tmp_path).starts) == ("finished", 1)
    with pytest.raises(ZeroDivisionError), start(tmp_path):
        1 / 0  # noqa: B018
    state = read_state(tmp_path)
    assert (state.state, state.starts, state.error.text) == ("failed", 2, "ZeroDivisionError: division by zero")
    with pytest.raises(Stopped), start(tmp_path):
        raise Stopped("SIGTERM: saved")
    state = read_state(tmp_path)
    assert (state.state, state.message, state.error.text) == ("saved", "SIGTERM: saved", state.error.text)
    with start(tmp_path):
        state = read_state(tmp_path)
        assert (state.message, state.starts) == ("", 4) and state.error.text.startswith("ZeroDivision")


def test_the_rank_that_failed_first_is_recorded(tmp_path):
    """The first rank only notices that another one is gone."""
    lost = LostRankError("rank 0 lost another rank in step 3")
    with pytest.raises(LostRankError), start(tmp_path, ranks=2):
        with pytest.raises(RuntimeError), start(tmp_path, rank=1, ranks=2):
            raise RuntimeError("its device\nis gone")
        raise lost
    assert read_state(tmp_path).error.text == "rank 1: RuntimeError: its device is gone"
    with pytest.raises(LostRankError), start(tmp_path, ranks=2):
        raise lost
    assert read_state(tmp_path).error.text == "rank 0 lost another rank in step 3"


def test_a_state_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    (tmp_path / "state.json").mkdir()
    with start(tmp_path):
        pass
    assert caplog.text.count("is not up to date") == 2


def test_the_tail_of_a_file_begins_with_a_line(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"one\ntwo\nthree\n")
    tails = {most: read_tail(path, most=most) for most in (14, 100, 10, 9, 6, 5)}
    assert tails == {14: path.read_bytes(), 100: path.read_bytes(), 10: b"two\nthree\n"} | {
        9: b"three\n",
        6: b"three\n",
        5: b"",
    }
