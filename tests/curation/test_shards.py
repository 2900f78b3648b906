"""Stages over shards in this process and in several: failures are collected, dead workers reported, nothing hangs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mc2_hpc.errors import UserError
from mc2_hpc.jobs.engines import Local, Ray, Slurm, num_tasks, slurm_options
from mc2_hpc.jobs.stages import Stage, open_stage, run_stages, stats_path
from mc2_hpc.jobs.tasks import cut
from mc2_hpc.storage import exclusive_folder, write_json

# `exec(name, input)` is work that any process can import: the shard's name is the code it runs.
FAILS = "from mc2_hpc.errors import UserError; raise UserError('{}.parquet: broken')"
TOUCHES = "open(folder + '/{}', 'a').write('x')"


def never(name: str) -> bool:
    return False


@pytest.mark.parametrize("workers", [1, 2])
def test_failures_are_collected_and_the_others_done(tmp_path, workers):
    touch = TOUCHES.format("done")
    shards = {FAILS.format("b"): {}, touch: {"folder": str(tmp_path)}, FAILS.format("a"): {}}
    with pytest.raises(UserError, match="s: 2 of 3 shards failed, the others are done: a.parquet: broken; b.parquet"):
        run_stages([Stage("s", tmp_path, shards, exec, never)], Local(workers))
    assert (tmp_path / "done").read_text() == "x"


def test_killed_worker_is_reported(tmp_path):
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(UserError, match="s: a worker was killed at 'import os.*run the same command again"):
        run_stages([Stage("s", tmp_path, {code: {}, "pass": {}, "0": {}}, exec, never)], Local(2))


def test_error_of_the_program_shows_its_traceback(tmp_path):
    with pytest.raises(RuntimeError, match="s: an error of the program at '1 / 0'(.|\n)*ZeroDivisionError"):
        run_stages([Stage("s", tmp_path, {"1 / 0": {}, "pass": {}}, exec, never)], Local(2))
    with pytest.raises(ZeroDivisionError):
        run_stages([Stage("s", tmp_path, {"1 / 0": {}}, exec, never)])


def test_full_disk_and_lack_of_memory_are_failures_of_the_shard(tmp_path):
    shards = {"raise OSError(28, 'No space left on device', '/out/a')": {}, "raise MemoryError": {}, "pass": {}}
    with pytest.raises(UserError, match="2 of 3 shards failed.*out of memory.*No space left on device: '/out/a'"):
        run_stages([Stage("s", tmp_path, shards, exec, never)])


def test_only_some_failures_are_shown(tmp_path):
    shards = {FAILS.format(name): {} for name in "abcde"}
    with pytest.raises(UserError, match=r"5 of 5 shards failed.*a.parquet.*c.parquet: broken \(and 2 more\)"):
        run_stages([Stage("s", tmp_path, shards, exec, never)])


def test_the_message_of_a_single_shard_stands_alone(tmp_path):
    with pytest.raises(UserError, match="^a.parquet: broken$"):
        run_stages([Stage("s", tmp_path, {FAILS.format("a"): {}}, exec, never)])


@pytest.mark.parametrize("workers", [1, 2])
def test_done_shards_are_skipped_and_told(tmp_path, workers):
    told = []
    shards = {"raise SystemExit": {}, "pass": {}, "0": {}}
    stage = Stage("s", tmp_path, shards, exec, lambda name: name.startswith("raise"))
    run_stages([stage], Local(workers), lambda *call: told.append(call))
    assert told[0] == ("s", 1, 3, "")
    assert [call[:3] for call in told[1:]] == [("s", 2, 3), ("s", 3, 3)] and {told[1][3], told[2][3]} == {"pass", "0"}


def is_marked(name: str) -> bool:
    return Path(name.split("'")[1]).exists()


def test_markers_of_tasks_never_hide_an_unfinished_shard(tmp_path):
    """datatrove skips a task with a marker: here its shards have become others, or have lost their outputs."""
    code = "open('{}/{}', 'a').write('x')"
    shards = {code.format(tmp_path, name): {} for name in "bd"}
    assert run_stages([Stage("s", tmp_path, shards, exec, is_marked)], Local(tasks=2))
    markers = tmp_path / "logs" / "s" / "completions"
    assert sorted(path.name for path in markers.iterdir()) == ["00000", "00001"]
    shards |= {code.format(tmp_path, name): {} for name in "ac"}
    run_stages([Stage("s", tmp_path, shards, exec, is_marked)], Local(tasks=2))
    assert all((tmp_path / name).read_text() == "x" for name in "abcd")  # and b and d were not done twice
    (tmp_path / "c").unlink()
    run_stages([Stage("s", tmp_path, shards, exec, is_marked)], Local(tasks=2))
    assert all((tmp_path / name).read_text() == "x" for name in "abcd")


def test_what_was_made_of_outputs_goes_before_they_change(tmp_path):
    (tmp_path / "sums").mkdir()
    (tmp_path / "report").touch()
    made = (tmp_path / "sums", tmp_path / "report", tmp_path / "none")
    run_stages([Stage("s", tmp_path, {"pass": {}}, exec, lambda name: True, invalidates=made)])
    assert made[0].exists() and made[1].exists()
    run_stages([Stage("s", tmp_path, {"pass": {}}, exec, never, invalidates=made)])
    assert not made[0].exists() and not made[1].exists()


def test_a_finished_shard_may_not_vanish(tmp_path):
    open_stage(tmp_path, "s.json", {"mode": 1}, ["a", "b"])
    write_json(stats_path(tmp_path, "b"), {})
    open_stage(tmp_path, "s.json", {"mode": 1}, ["b", "c"])  # a was never finished
    with pytest.raises(
        UserError, match="s.json: 1 shards that are finished have gone from the input, the first is 'b'"
    ):
        open_stage(tmp_path, "s.json", {"mode": 1}, ["c"])
    stats_path(tmp_path, "b").unlink()
    open_stage(tmp_path, "s.json", {"mode": 1}, ["c"])


def test_two_runs_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("mc2_hpc.jobs.stages.BUSY_S", 0.2)
    with exclusive_folder(tmp_path), pytest.raises(UserError, match="still working there"):
        run_stages([Stage("s", tmp_path, {"pass": {}}, exec, never)])


SLEEPS = """
import sys
from pathlib import Path
from mc2_hpc.jobs.engines import Local
from mc2_hpc.jobs.stages import Stage, run_stages
shards = {"import time; time.sleep(600)": {}, "import time; time.sleep(601)": {}}
run_stages([Stage("s", Path(sys.argv[1]), shards, exec, lambda name: False)], Local(2))
"""


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_the_driver(tmp_path, kill):
    driver = subprocess.Popen([sys.executable, "-c", SLEEPS, tmp_path], stderr=subprocess.PIPE)
    events = tmp_path / "logs" / "s" / "events"
    wait_until(lambda: events.is_dir() and sum("start" in p.read_text() for p in events.iterdir()) == 2)
    group = int(subprocess.check_output(["ps", "-o", "pgid=", "-p", str(pid_of(events / "00000.jsonl"))]))
    assert group != os.getpgid(driver.pid)
    driver.send_signal(kill)
    driver.communicate(timeout=60)  # the pipe closes: nobody holds it any more
    wait_until(lambda: not subprocess.run(["pgrep", "-g", str(group)], capture_output=True).stdout)


def pid_of(events: Path) -> int:
    return json.loads(events.read_text().splitlines()[0])["pid"]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_tasks_are_even_slices():
    assert [list(names) for names in cut("abcdefg", 3)] == [["a", "b"], ["c", "d"], ["e", "f", "g"]]
    assert num_tasks(Local(), 50) == 1 and num_tasks(Local(2), 50) == 16 and num_tasks(Local(2), 3) == 3
    assert num_tasks(Ray(), 10**6) == 1000 and num_tasks(Ray(tasks=10**4), 10**6) == 10**4


def test_ray_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("mc2_hpc.jobs.stages.find_spec", lambda name: None)
    with pytest.raises(UserError, match="Ray is not installed: pip install"):
        run_stages([], Ray())


def test_slurm_options(monkeypatch):
    options = slurm_options(["partition=cpu,time=1:00:00", "nodelist=n[1,3],mem-per-cpu-gb=4"])
    assert options == {"partition": "cpu", "time": "1:00:00", "nodelist": "n[1,3]", "mem_per_cpu_gb": "4"}
    Slurm(options)
    with pytest.raises(UserError, match="--slurm cpu: must be KEY=VALUE"):
        slurm_options(["cpu"])
    with pytest.raises(UserError, match="no time; give --slurm partition=NAME,time=HH:MM:SS"):
        Slurm({"partition": "cpu"})
    with pytest.raises(UserError, match="cpus_per_task=x: must be a whole number"):
        Slurm({**options, "cpus_per_task": "x"})
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    with pytest.raises(UserError, match="task of a Slurm array already"):
        Slurm(options)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="no sbatch on this machine"):
        run_stages([], Slurm(options))
