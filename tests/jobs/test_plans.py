"""Plans in one process and in several: failures are collected, killed workers are reported, nothing hangs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mc2_hpc import jobs
from mc2_hpc.errors import UserError
from mc2_hpc.jobs import Local, Plan, Ray, Slurm, Stage, open_folder, stats_path
from mc2_hpc.jobs.engines import num_tasks
from mc2_hpc.jobs.tasks import TaskFiles, cut, plan_tasks
from mc2_hpc.storage import exclusive_folder, write_json
from tests.killing import WAIT_S, started, wait_until

NEVER = ("never",)
"""An output that no shard has."""

# `exec(name, input)` is work that any process can import: the shard's name is the code it runs.
FAILS = "from mc2_hpc.errors import UserError; raise UserError('{}.parquet: broken')"
TOUCHES = "open(folder + '/{}', 'a').write('x')"


def run(stage, *where):
    return jobs.run(Plan((stage,), result=dict), *where)


@pytest.mark.parametrize("workers", [1, 2])
def test_failures_are_collected_and_the_others_done(tmp_path, workers):
    touch = TOUCHES.format("done")
    shards = {FAILS.format("b"): {}, touch: {"folder": str(tmp_path)}, FAILS.format("a"): {}}
    with pytest.raises(UserError, match="s: 2 of 3 shards failed, the others are done: a.parquet: broken; b.parquet"):
        run(Stage("s", tmp_path, shards, exec, NEVER), Local(workers))
    assert (tmp_path / "done").read_text() == "x"


def test_killed_worker_is_reported(tmp_path):
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(UserError, match="s: a worker was killed at 'import os.*run the same command again"):
        run(Stage("s", tmp_path, {code: {}, "pass": {}, "0": {}}, exec, NEVER), Local(2))


def test_error_of_the_program_shows_its_traceback(tmp_path):
    with pytest.raises(RuntimeError, match="s: a bug in the program at '1 / 0'(.|\n)*ZeroDivisionError"):
        run(Stage("s", tmp_path, {"1 / 0": {}, "pass": {}}, exec, NEVER), Local(2))
    with pytest.raises(ZeroDivisionError):
        run(Stage("s", tmp_path, {"1 / 0": {}}, exec, NEVER))


def test_full_disk_and_lack_of_memory_are_failures_of_the_shard(tmp_path):
    shards = {"raise OSError(28, 'No space left on device', '/out/a')": {}, "raise MemoryError": {}, "pass": {}}
    with pytest.raises(UserError, match="2 of 3 shards failed.*out of memory.*No space left on device: '/out/a'"):
        run(Stage("s", tmp_path, shards, exec, NEVER))


def test_only_some_failures_are_shown(tmp_path):
    shards = {FAILS.format(name): {} for name in "abcde"}
    with pytest.raises(UserError, match=r"5 of 5 shards failed.*a.parquet.*c.parquet: broken \(and 2 more\)"):
        run(Stage("s", tmp_path, shards, exec, NEVER))


def test_the_message_of_a_single_shard_stands_alone(tmp_path):
    with pytest.raises(UserError, match="^a.parquet: broken$"):
        run(Stage("s", tmp_path, {FAILS.format("a"): {}}, exec, NEVER))


@pytest.mark.parametrize("workers", [1, 2])
def test_done_shards_are_skipped_and_told(tmp_path, workers):
    told = []
    shards = {"raise SystemExit": {}, "pass": {}, "0": {}}
    (tmp_path / "raise SystemExit.done").touch()
    stage = Stage("s", tmp_path, shards, exec, ("{shard}.done",))
    run(stage, Local(workers), lambda *call: told.append(call))
    assert told[0] == ("s", 1, 3, "")
    assert [call[:3] for call in told[1:]] == [("s", 2, 3), ("s", 3, 3)] and {told[1][3], told[2][3]} == {"pass", "0"}


@pytest.mark.parametrize("workers", [1, 2])
def test_markers_of_tasks_never_hide_an_unfinished_shard(tmp_path, work, workers):
    """datatrove skips a task with a marker; here its shards have changed or lost their outputs."""

    def again(names: str) -> None:
        run(Stage("s", tmp_path, dict.fromkeys(names, 1), work.Touch(tmp_path), ("{shard}",)), Local(workers, tasks=2))

    again("bd")
    markers = tmp_path / "logs" / "s" / "completions"
    assert sorted(path.name for path in markers.iterdir()) == ["00000", "00001"]
    again("abcd")
    assert all((tmp_path / name).read_text() == "x" for name in "abcd")  # so b and d were not processed twice
    (tmp_path / "c").unlink()
    again("abcd")
    assert all((tmp_path / name).read_text() == "x" for name in "abcd")


def test_outputs_that_tell_by_their_content(tmp_path, work):
    source = tmp_path / "source"
    stage = Stage("s", tmp_path, {"copy": source}, work.Copy(tmp_path), ("{shard}",))
    for text in ("one", "two"):
        source.write_text(text)
        assert stage.undone() == ["copy"]
        run(stage)
        assert (tmp_path / "copy").read_text() == text and not stage.undone()


def test_what_a_task_reads_is_json(tmp_path, work):
    """A task on another machine gets names and plain values: it loads no pickles."""
    strange = "caf\udce9 犬"
    stage = Stage("s", tmp_path, {strange: 2}, work.Touch(tmp_path), ("{shard}",))
    run(stage, Local(2))
    plan = tmp_path / "logs" / "s" / "plan"
    told = json.loads((plan / "stage.json").read_text())
    assert told["work"] == {"name": f"{work.__name__}.Touch", "arguments": {"folder": str(tmp_path)}}
    assert json.loads((plan / "00000.json").read_text()) == {strange: 2} and (tmp_path / strange).read_text() == "xx"
    assert not list(tmp_path.rglob("*.pkl")) and not list(tmp_path.rglob("*.pik"))


@pytest.mark.parametrize("content, message", [("{", "not valid JSON"), ('{"name": 1}', "Expected `str`, got `int`")])
def test_a_plan_that_is_damaged_is_named(tmp_path, work, content, message):
    stage = Stage("s", tmp_path, {"a": 1}, work.Touch(tmp_path), ("{shard}",))
    plan_tasks(stage, Local(), ["a"])
    (stage.logs / "plan" / "stage.json").write_text(content)
    with pytest.raises(UserError, match=f"stage.json: .*{message}"):
        TaskFiles(stage.logs).read_stage(0)


def test_what_was_made_of_outputs_goes_before_they_change(tmp_path):
    (tmp_path / "sums").mkdir()
    (tmp_path / "report").touch()
    made = (tmp_path / "sums", tmp_path / "report", tmp_path / "none")
    run(Stage("s", tmp_path, {"pass": {}}, exec, (), invalidates=made))
    assert made[0].exists() and made[1].exists()
    run(Stage("s", tmp_path, {"pass": {}}, exec, NEVER, invalidates=made))
    assert not made[0].exists() and not made[1].exists()


def test_a_finished_shard_may_not_vanish(tmp_path):
    open_folder(tmp_path, "s.json", {"mode": 1}, ["a", "b"])
    write_json(stats_path(tmp_path, "b"), {})
    open_folder(tmp_path, "s.json", {"mode": 1}, ["b", "c"])  # a was never finished
    with pytest.raises(UserError, match="s.json: 1 finished shards are missing from the input, the first is 'b'"):
        open_folder(tmp_path, "s.json", {"mode": 1}, ["c"])
    stats_path(tmp_path, "b").unlink()
    open_folder(tmp_path, "s.json", {"mode": 1}, ["c"])


def test_two_runs_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("mc2_hpc.jobs.driver.BUSY_S", 0.2)
    with exclusive_folder(tmp_path), pytest.raises(UserError, match="still using it"):
        run(Stage("s", tmp_path, {"pass": {}}, exec, NEVER))


SLEEPS = """
import signal
import sys
from pathlib import Path
from mc2_hpc import jobs
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells make background processes ignore it
shards = {"import time; time.sleep(600)": {}, "import time; time.sleep(601)": {}}
jobs.run(jobs.Plan((jobs.Stage("s", Path(sys.argv[1]), shards, exec, ("never",)),), dict), jobs.Local(2))
"""


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_the_driver(tmp_path, kill):
    events = tmp_path / "logs" / "s" / "events"
    with started([sys.executable, "-c", SLEEPS, str(tmp_path)]) as driver:
        wait_until(lambda: sum("start" in path.read_text() for path in events.glob("*")) == 2, driver)
        group = int(subprocess.check_output(["ps", "-o", "pgid=", "-p", str(pid_of(events / "00000.jsonl"))]))
        assert group != os.getpgid(driver.pid)
        driver.send_signal(kill)
        driver.communicate(timeout=60)  # the pipe closes once no process holds it
    deadline = time.monotonic() + WAIT_S
    while subprocess.run(["pgrep", "-g", str(group)], capture_output=True).stdout:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def pid_of(events: Path) -> int:
    return json.loads(events.read_text().splitlines()[0])["pid"]


def test_tasks_are_even_slices():
    assert [list(names) for names in cut("abcdefg", 3)] == [["a", "b"], ["c", "d"], ["e", "f", "g"]]
    assert num_tasks(Local(), 50) == 1 and num_tasks(Local(2), 50) == 16 and num_tasks(Local(2), 3) == 3
    assert num_tasks(Ray(), 10**6) == 1000 and num_tasks(Ray(tasks=10**4), 10**6) == 10**4


def test_ray_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("mc2_hpc.jobs.driver.find_spec", lambda name: None)
    with pytest.raises(UserError, match="Ray is not installed: pip install"):
        jobs.run(Plan((), dict), Ray())


def test_slurm_that_cannot_be_used(monkeypatch):
    options = {"partition": "cpu", "time": "1:00:00"}
    with pytest.raises(UserError, match="no time; give --slurm partition=NAME time=HH:MM:SS"):
        Slurm({"partition": "cpu"})
    with pytest.raises(UserError, match="cpus-per-task=x: must be a whole number of at least 1"):
        Slurm({**options, "cpus_per_task": "x"})
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    with pytest.raises(UserError, match="already is a task of a Slurm array"):
        Slurm(options)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="no sbatch on this machine"):
        jobs.run(Plan((), dict), Slurm(options))
