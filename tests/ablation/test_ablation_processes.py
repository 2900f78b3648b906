"""Runs as processes: how many at a time, failures, and that no process outlives an interruption."""

import os
import sys
import time

import pytest

from mc2_hpc.ablation.processes import run_all
from mc2_hpc.ablation.training_runs import Command, TrainingRun
from mc2_hpc.errors import UserError


@pytest.fixture
def run(tmp_path):
    """``run(name, *scripts)``: a run with one Python process per script."""

    def make(name, *scripts):
        commands = [Command([sys.executable, "-c", s], tmp_path / f"{name}{i}.log") for i, s in enumerate(scripts)]
        return TrainingRun(title=name, folder=tmp_path, results=tmp_path / name, commands=commands, pairs=1)

    return make


def meet(folder, own, other):
    """A script that succeeds only if it runs at the same time as the other one."""
    return (
        f"import time, pathlib; pathlib.Path({str(folder / own)!r}).touch(); deadline = time.time() + 60\n"
        f"while not pathlib.Path({str(folder / other)!r}).exists():\n"
        "    assert time.time() < deadline; time.sleep(0.02)"
    )


def test_as_many_at_a_time_as_asked_each_on_one_thread(run, tmp_path):
    done = []
    threads = "import os; assert os.environ['OMP_NUM_THREADS'] == '1'; print('said')"
    runs = [run("a", meet(tmp_path, "x", "y"), threads), run("b", meet(tmp_path, "y", "x"))]
    run_all(runs, 2, lambda *numbers: done.append(numbers))
    assert [numbers[:2] for numbers in done] == [(1, 2), (2, 2)] and {numbers[2] for numbers in done} == {"a", "b"}
    assert (tmp_path / "a1.log").read_text() == "said\n"


def test_one_at_a_time_in_order(run, tmp_path):
    append = "open({!r}, 'a').write({!r})"
    path = str(tmp_path / "order")
    runs = [run(name, append.format(path, name), append.format(path, name.upper())) for name in "abc"]
    run_all(runs, 1, lambda *_: None)
    assert (tmp_path / "order").read_text() == "aAbBcC"


def test_a_failure_names_its_log_and_begins_nothing_more(run, tmp_path):
    done = []
    runs = [
        run("bad", "raise SystemExit(3)", "open('never', 'w')"),
        run("good", "import time; time.sleep(0.5)"),
        run("late", "pass"),
    ]
    with pytest.raises(UserError, match=r"bad: exit code 3; see .*bad0\.log; run the same command to resume"):
        run_all(runs, 2, lambda done_, total, title: done.append(title))
    assert done == ["good"]  # it was already running, so it was finished


def test_an_interruption_asks_what_runs_to_save_and_leaves_no_process(run, tmp_path):
    waits = (
        "import os, signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (open({str(tmp_path / 'saved')!r}, 'w'), sys.exit(75)))\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "time.sleep(600)"
    )

    def interrupt(*_):
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.02)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all([run("quick", "pass"), run("slow", waits)], 2, interrupt)
    assert (tmp_path / "saved").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
