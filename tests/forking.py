"""Python commands forked from ``tests/fork_server.py``, with the parts of ``subprocess`` that tests need."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from tests.fork_server import MAX_REQUEST

ROOT = Path(__file__).parents[1]
IMPORT_S = 240
"""The longest wait for the server's imports, which take seconds on an idle machine."""
GRACE_S = 10
"""Time for the other ranks to end by themselves after one has failed."""


class Forked:
    """A forked process: ``subprocess.Popen`` with its output in files."""

    def __init__(self, args: Sequence[str], pid: int, report: socket.socket, out: IO[str], err: IO[str]) -> None:
        self.args = args
        self.pid = pid
        self.returncode: int | None = None
        self._report, self._out, self._err = report, out, err

    def poll(self) -> int | None:
        """Its exit code, negative for a signal, if it has ended."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its exit code.

        Raises:
            subprocess.TimeoutExpired: it is still running.
        """
        code = self._ended(timeout)
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return code

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and (code := _read_number(self._report, timeout)) is not None:
            self.returncode = code
            self._report.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for it; returns its standard output and standard error."""
        self.wait(timeout)
        texts = []
        for file in (self._out, self._err):
            file.seek(0)
            texts.append(file.read())
            file.close()
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        """Send it a signal if it is still running."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)


def _read_number(report: socket.socket, timeout: float | None) -> int | None:
    """The next message from the server; ``None`` if there is none in time."""
    messages = select.poll()  # not select.select, which refuses descriptors above 1,023
    messages.register(report, select.POLLIN)
    if not messages.poll(None if timeout is None else timeout * 1000):
        return None
    message = report.recv(64)
    if not message:
        raise RuntimeError("the fork server has ended")
    return int(message)


class ForkServer:
    """Starts Python commands in processes forked from one that has imported everything."""

    def __init__(self) -> None:
        self._log = tempfile.TemporaryFile("w+")
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fork_server", str(theirs.fileno())],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._log,
                start_new_session=True,  # Ctrl-C is for pytest, which closes the socket
            )

    def start(
        self, command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> Forked:
        """Start ``[sys.executable, ...]``; ``env`` and ``cwd`` are this process's unless given."""
        python, *arguments = map(str, command)
        assert python == sys.executable, f"{python}: the server is {sys.executable}"
        request = {
            "arguments": arguments,
            "env": dict(os.environ if env is None else env),
            "cwd": str(cwd or Path.cwd()),
        }
        if self._process.poll() is not None:
            raise RuntimeError(f"the fork server ended with exit code {self._process.returncode}\n{self._said()}")
        message = json.dumps(request).encode()
        assert len(message) <= MAX_REQUEST, f"{len(message)} bytes of arguments and environment"
        # Not pipes: a process that writes a lot must not block until the test reads.
        out, err = (tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") for _ in range(2))
        report, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, open(os.devnull) as nothing:
            files = [nothing.fileno(), out.fileno(), err.fileno(), theirs.fileno()]
            socket.send_fds(self._control, [message], files)
        pid = _read_number(report, IMPORT_S)
        if pid is None:
            raise RuntimeError(f"the fork server has not answered within {IMPORT_S} s\n{self._said()}")
        return Forked([python, *arguments], pid, report, out, err)

    def run(
        self,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 240,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command like ``subprocess.run(capture_output=True, text=True)``; kill it after ``timeout``.

        Raises:
            subprocess.TimeoutExpired: it took longer than ``timeout`` seconds.
        """
        process = self.start(command, env=env, cwd=cwd)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise subprocess.TimeoutExpired(process.args, timeout, *process.communicate(GRACE_S)) from None
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, code, *process.communicate())

    def run_ranks(
        self, num_ranks: int, arguments: Sequence[str | Path], *, timeout: float = 240
    ) -> subprocess.CompletedProcess[str]:
        """Run ``python arguments...`` as ranks on this machine; returns the exit code of the first that failed."""
        world = {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, "MASTER_PORT": free_port()}
        ranks = []
        try:
            for rank in range(num_ranks):
                facts = {**world, "RANK": rank, "LOCAL_RANK": rank}
                environment = {**os.environ, **{name: str(value) for name, value in facts.items()}}
                environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
                ranks.append(self.start([sys.executable, *arguments], env=environment))
            code = _wait_for_all(ranks, timeout)
        finally:
            for process in ranks:
                process.kill()
        texts = [process.communicate(GRACE_S) for process in ranks]
        return subprocess.CompletedProcess(ranks[0].args, code, *("".join(each) for each in zip(*texts, strict=True)))

    def _said(self) -> str:
        self._log.seek(0)
        return self._log.read()[-4000:]

    def close(self) -> None:
        """End the server; processes that it started keep running."""
        self._control.close()
        self._process.kill()  # it may still be importing
        self._process.wait()


def _wait_for_all(ranks: Sequence[Forked], timeout: float) -> int:
    """The exit code of the first rank that failed, else 0; after a failure the others have :data:`GRACE_S` left."""
    deadline, failed = time.monotonic() + timeout, 0
    while None in [process.poll() for process in ranks]:
        if failed == 0 and (failed := next((process.returncode for process in ranks if process.returncode), 0)):
            deadline = min(deadline, time.monotonic() + GRACE_S)
        if time.monotonic() > deadline:
            if failed:
                break
            raise subprocess.TimeoutExpired(ranks[0].args, timeout)
        time.sleep(0.02)
    return failed or next((process.returncode for process in ranks if process.returncode), 0)


def free_port() -> int:
    """A free port on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
