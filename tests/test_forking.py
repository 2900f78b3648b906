"""A forked command behaves like a fresh process, which other tests rely on."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests import forking

COMMANDS = {
    "arguments, folder and environment": (
        "import os, sys; print(sys.argv, os.getcwd(), os.environ['WHO'], 'PYTEST_CURRENT_TEST' in os.environ)",
        0,
    ),
    "exit code": ("import sys; print('said'); print('cried', file=sys.stderr); sys.exit(75)", 75),
    "exit message": ("import sys; sys.exit('no such thing')", 1),
    "error": ("def f(): raise OSError('broken')\nf()", 1),
    "left by the back door": ("import os, sys; print('x', flush=True); os._exit(9)", 9),
    "killed": ("import os; os.kill(os.getpid(), 9)", -9),
    "interrupted": (
        "import os, time, signal as s; s.signal(2, s.default_int_handler); os.kill(os.getpid(), 2); time.sleep(60)",
        -2,
    ),
    "terminated": ("import os, signal, time; os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", -15),
    "what runs at exit": ("import atexit; atexit.register(print, 'at exit'); print('main')", 0),
    "standard input is empty": ("import sys; print(repr(sys.stdin.read()))", 0),
    "leads its session": ("import os; print(os.getsid(0) == os.getpid())", 0),
    "its own main module": ("x = 3\nimport __main__; print(__name__, __main__.x)", 0),
    "one thread": ("import torch; print(torch.get_num_threads())", 0),
    "no other's files": ("import os; print(sum(os.path.exists(f'/proc/self/fd/{n}') for n in range(3)))", 0),
    "spawns": ("import subprocess, sys; print(subprocess.check_output([sys.executable, '-c', 'print(1)']))", 0),
}


@pytest.mark.parametrize("code, exit_code", COMMANDS.values(), ids=COMMANDS)
def test_as_a_fresh_process(fork_server, tmp_path, code, exit_code):
    script = tmp_path / "script.py"
    script.write_text(code)
    environment = {**os.environ, "WHO": "me", "OMP_NUM_THREADS": "1"}
    for arguments in (["-c", code, "a", "--b"], [str(script), "a", "--b"]):
        command = [sys.executable, *arguments]
        forked = fork_server.run(command, env=environment, cwd=tmp_path)
        fresh = subprocess.run(
            command, env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            start_new_session=True,
        )  # fmt: skip
        assert (forked.returncode, forked.stdout) == (fresh.returncode, fresh.stdout)
        assert forked.returncode == exit_code
        assert forked.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


def test_a_module(fork_server):
    command = [sys.executable, "-m", "mc2_hpc.cli", "train", "no/such.yaml"]
    result = fork_server.run(command)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "mc2: no/such.yaml: no such config file\n")


def test_many_at_once_each_with_its_own_end(fork_server):
    processes = [fork_server.start([sys.executable, "-c", f"import sys; sys.exit({n})"]) for n in range(8)]
    assert [process.wait(60) for process in processes] == list(range(8))


def test_signals_reach_the_process(fork_server, tmp_path):
    listen = "import signal, sys, time; signal.signal(15, lambda *_: (print('asked'), sys.exit(75)))"
    code = f"{listen}; open({str(tmp_path / 'ready')!r}, 'w').close(); time.sleep(60)"
    asked = fork_server.start([sys.executable, "-c", code])
    killed = fork_server.start([sys.executable, "-c", "import time; time.sleep(60)"])
    assert os.getpgid(asked.pid) == asked.pid and asked.poll() is None
    while not (tmp_path / "ready").exists():
        assert asked.poll() is None
        time.sleep(0.01)
    asked.terminate()
    killed.kill()
    assert asked.communicate(60) == ("asked\n", "") and asked.returncode == 75
    assert killed.wait(60) == -signal.SIGKILL


def test_a_command_that_is_late_is_killed(fork_server, tmp_path):
    code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
    with pytest.raises(subprocess.TimeoutExpired) as late:
        fork_server.run([sys.executable, "-c", f"{code}; print('here', flush=True); time.sleep(60)"], timeout=2)
    assert late.value.output == "here\n"
    pid, deadline = int((tmp_path / "pid").read_text()), time.monotonic() + 60
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_rank_that_fails_ends_the_others(fork_server, monkeypatch):
    monkeypatch.setattr(forking, "GRACE_S", 1)
    code = "import os, sys, time; rank = int(os.environ['RANK']); print(rank, flush=True)\nif rank == 1: sys.exit(5)\n"
    began = time.monotonic()
    result = fork_server.run_ranks(2, ["-c", f"{code}time.sleep(100)"])
    assert result.returncode == 5 and result.stdout == "0\n1\n"
    assert time.monotonic() - began < 60
