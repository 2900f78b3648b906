"""Signals and exit codes: what ranks do when asked to stop, and how the launcher reacts."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mc2_hpc.cli import main
from mc2_hpc.training.launch import launch, verdict
from mc2_hpc.training.lost_rank import LostRankError, naming_the_wait
from mc2_hpc.training.stop import INTERRUPTED, LOST_RANK, SAVED, StopRequest

VERDICTS = {
    "all done": ([0, 0], None, 0),
    "all saved": ([SAVED, SAVED], None, SAVED),
    "one left before the first step, the other noticed": ([SAVED, LOST_RANK], None, SAVED),
    "one killed": ([-9, LOST_RANK], None, None),
    "one out of memory, the other hangs and is killed": ([-9, -9], None, None),
    "bad input": ([2, 2], None, 2),
    "not a number": ([1, 1], None, 1),
    "a bug in one": ([1, LOST_RANK], None, 1),
    "a bug in one, the other killed": ([-9, 1], None, 1),
    "a signal before they listened": ([-15, -15], 15, SAVED),
    "a signal before one listened": ([-10, SAVED], 10, SAVED),
    "Ctrl-C before they listened": ([-2, -2], 2, INTERRUPTED),
    "Ctrl-C before the first step of one": ([INTERRUPTED, LOST_RANK], 2, INTERRUPTED),
    "Ctrl-C, and they saved": ([SAVED, SAVED], 2, SAVED),
    "a signal, but they did not save in time": ([-9, -9], 15, LOST_RANK),
}


@pytest.mark.parametrize("codes, passed_on, expected", VERDICTS.values(), ids=VERDICTS)
def test_verdict(codes, passed_on, expected):
    assert verdict(codes, passed_on=passed_on) == expected
    assert verdict(codes[::-1], passed_on=passed_on) == expected


def rank(code):
    """A rank's command, for the launcher."""
    return [sys.executable, "-c", f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{code}"]


def test_restarts_until_it_works(tmp_path):
    """Rank 1 is killed in the first start; rank 0 would wait forever and is killed by the launcher."""
    code = f"""
path = {str(tmp_path)!r} + f"/{{rank}}"
with open(path, "a") as file:
    file.write("x")
if os.path.getsize(path) == 1:
    os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(100)
"""
    assert launch(rank(code), processes=2, restarts=2, stop_s=5) == 0
    assert [(tmp_path / name).read_text() for name in "01"] == ["xx", "xx"]


def test_restarts_are_bounded_and_only_for_deaths(tmp_path):
    count = f"open({str(tmp_path / 'starts')!r}, 'a').write('x')"
    assert launch(rank(f"{count}; os.kill(os.getpid(), 9)"), processes=1, restarts=2, stop_s=5) == LOST_RANK
    assert (tmp_path / "starts").read_text() == "xxx"
    assert launch(rank(f"{count}; sys.exit(2)"), processes=1, restarts=2, stop_s=5) == 2
    assert (tmp_path / "starts").read_text() == "xxxx"


LAUNCHER = "import sys; from mc2_hpc.training.launch import launch; sys.exit(launch(sys.argv[1:], processes=2, {}))"


def launcher(code, options):
    command = [sys.executable, "-c", LAUNCHER.format(options), *rank(code)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_are_passed_on_and_waited_for(number):
    code = f"""
signal.signal({int(number)}, lambda *_: (time.sleep(0.5), sys.exit(75)))
os.write(1, b"ready\\n")  # at once: print may part the line from its end
time.sleep(100)
"""
    process = launcher(code, "restarts=3, stop_s=60")
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.send_signal(number)
    assert process.wait(60) == SAVED


def test_a_second_ctrl_c_does_not_wait_for_ranks_that_save():
    code = "signal.signal(2, lambda *_: os.write(1, b'saving\\n'))\nos.write(1, b'ready\\n')\nwhile 1: time.sleep(100)"
    process = launcher(code, "restarts=3, stop_s=600")
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.send_signal(signal.SIGINT)
    assert [process.stdout.readline() for _ in range(2)] == ["saving\n"] * 2
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == INTERRUPTED


def test_ranks_that_do_not_save_in_time_are_killed():
    code = "signal.signal(15, signal.SIG_IGN); os.write(1, b'ready\\n'); time.sleep(100)"
    process = launcher(code, "restarts=3, stop_s=0.5")
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.terminate()
    assert process.wait(60) == LOST_RANK
    assert "killing ranks 0, 1" in process.stderr.read()


def test_ranks_are_asked_to_save_when_the_launcher_is_killed():
    code = """
signal.signal(15, lambda *_: (os.write(1, b"saved\\n"), sys.exit(75)))
os.write(1, b"ready\\n")  # at once: print may part the line from its end
time.sleep(100)
"""
    process = launcher(code, "restarts=0, stop_s=60")
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.kill()
    assert sorted(process.stdout.read().split()) == ["saved", "saved"]


def listen(code):
    script = f"""
import signal, time
from mc2_hpc.training.stop import StopRequest
stop = StopRequest()
with stop.listening():
{code}
"""
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_before_the_first_step_a_signal_ends_a_rank_that_waits_for_others(number):
    """The rendezvous waits inside a library, where a handler written in Python would not run for a minute."""
    code = """
    from datetime import timedelta
    import torch.distributed as dist
    print("ready", flush=True)
    dist.init_process_group(
        "gloo", init_method="tcp://127.0.0.1:9", rank=1, world_size=2, timeout=timedelta(seconds=300)
    )
"""
    process = listen(code)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    process.send_signal(number)
    assert process.wait(60) == (INTERRUPTED if number == signal.SIGINT else SAVED)
    assert f"{number.name} before the first step: nothing to save" in process.stderr.read()


def test_later_signals_are_noted_once():
    code = """
    stop.defer()
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        signal.raise_signal(number)
        while stop.requested is None:
            time.sleep(0.01)
    time.sleep(0.1)
    print(stop.requested)
signal.signal(signal.SIGTERM, signal.SIG_DFL) == signal.SIG_DFL or exit(3)
"""
    process = listen(code)
    assert process.stdout.read() == "SIGUSR1\n" and process.wait(60) == 0


def test_the_first_ctrl_c_asks_for_a_save_and_the_second_leaves():
    code = """
    stop.defer()
    signal.raise_signal(signal.SIGINT)
    while stop.requested is None:
        time.sleep(0.01)
    print(stop.requested, flush=True)
    time.sleep(100)
"""
    process = listen(code)
    assert process.stdout.readline() == "SIGINT\n" and process.poll() is None
    assert process.stderr.readline() == "mc2: saving because of SIGINT; press Ctrl-C again to exit at once\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == INTERRUPTED
    assert process.stderr.read() == "mc2: interrupted again: exiting without another save\n"


def test_nobody_asks_by_default():
    assert StopRequest().requested is None


def test_only_lost_ranks_are_called_so():
    with pytest.raises(LostRankError, match=r"^rank 3 lost another rank in step 7: .*Connection closed by peer"):
        with naming_the_wait(3, lambda: "in step 7"):
            raise RuntimeError("[/x/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer\nmore")
    with pytest.raises(RuntimeError, match="shapes") as other:
        with naming_the_wait(3, lambda: "in step 7"):
            raise RuntimeError("shapes cannot be multiplied")
    assert not isinstance(other.value, LostRankError)


BAD = {
    "no process": (["--processes", "0"], "--processes 0: must be at least 1"),
    "negative restarts": (["--processes", "2", "--restarts", "-1"], "--restarts -1: must be at least 0"),
    "restarts without processes": (["--restarts", "2"], "--restarts needs --processes"),
    "restarts from scratch": (["--processes", "2", "--restarts", "2", "checkpoint.resume=false"], "from scratch"),
}


@pytest.mark.parametrize("words, expected", BAD.values(), ids=BAD)
def test_bad_launches_are_one_line(module_config, capsys, words, expected):
    assert main(["train", str(module_config), *words]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
