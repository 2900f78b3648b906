"""The ranks of one machine as child processes, restarted if one crashes: ``mc2 train --processes N --restarts K``.

torchrun turns every failure into exit code 1, restarts whatever the reason, and after 30 seconds kills ranks that are
still saving. Here the exit codes of ``mc2_hpc.training.stop`` decide: a crash is worth a restart, bad input or a
non-finite loss is not. A signal is forwarded to the ranks; the launcher waits for them and exits with their code.
"""

import ctypes
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from mc2_hpc.training.stop import INTERRUPTED, LOST_RANK, SAVED, SIGNALS

logger = logging.getLogger(__name__)

_GRACE_S = 10
"""Time for the other ranks to notice and report that one failed; then they are killed."""
_INTERRUPTED_AGAIN_S = 2
_POLL_S = 0.05
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def launch(command: Sequence[str], *, processes: int, restarts: int, stop_s: float) -> int:
    """Run ``command`` as ``processes`` ranks; returns the exit code of the job.

    Args:
        restarts: how often to restart all ranks after some crashed.
        stop_s: longest wait for the ranks to save after SIGTERM or SIGUSR1; then they are killed.
    """
    job = _Job(command, processes, stop_s)
    with job.passing_signals_on():
        for restart in range(restarts + 1):
            codes = job.run()
            code = INTERRUPTED if job.interrupts > 1 else verdict(codes, passed_on=job.signal)
            if code is not None:
                return code
            if restart < restarts:
                logger.warning("restart %d of %d from the newest checkpoint", restart + 1, restarts)
    return LOST_RANK


def verdict(codes: Sequence[int], *, passed_on: int | None) -> int | None:
    """The job's exit code from its ranks' (negative: killed by that signal); ``None`` if a restart may help.

    Args:
        passed_on: the signal that they were sent, which kills a rank that does not handle signals yet.
    """
    gone = INTERRUPTED if passed_on == signal.SIGINT else SAVED
    codes = [gone if passed_on is not None and code == -passed_on else code for code in codes]
    final = [code for code in codes if code > 0 and code not in (SAVED, LOST_RANK)]
    if final:
        return final[0]
    if SAVED in codes:
        return SAVED
    if any(codes):
        return LOST_RANK if passed_on is not None else None
    return 0


def start_rank(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start one rank, in its own session so that it does not also get the terminal's signals directly."""
    return subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=end_with_parent)


def end_with_parent() -> None:
    """Have the kernel send this process SIGTERM, to save and exit, if its parent is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class _Job:
    def __init__(self, command: Sequence[str], processes: int, stop_s: float) -> None:
        self.signal: int | None = None
        """The latest signal passed on to the ranks."""
        self.interrupts = 0
        """How often Ctrl-C was pressed."""
        self._command = list(command)
        self._processes = processes
        self._stop_s = stop_s
        self._deadline: float | None = None
        self._ranks: list[subprocess.Popen[bytes]] = []

    @contextmanager
    def passing_signals_on(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._pass_on) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        self.interrupts += number == signal.SIGINT
        # Ranks exit at once when interrupted again; one that does not respond is not waited for.
        self._limit(self._stop_s if self.interrupts < 2 else _INTERRUPTED_AGAIN_S)
        for rank in self._ranks:
            rank.send_signal(number)

    def _limit(self, seconds: float) -> None:
        """Kill ranks that are still running after ``seconds``."""
        end = time.monotonic() + seconds
        self._deadline = end if self._deadline is None else min(self._deadline, end)

    def run(self) -> list[int]:
        """Start all ranks, wait until they have ended, and return their exit codes."""
        if self.signal is not None:
            return [SAVED]  # it came between two starts
        self._ranks, self._deadline = [], None
        port = _free_port()
        try:
            for rank in range(self._processes):
                self._ranks.append(self._start(rank, port))
            if self.signal is not None:  # it came before all were in the list
                self._pass_on(self.signal, None)
            return self._wait()
        finally:
            for rank_process in self._ranks:
                rank_process.kill()
                rank_process.wait()

    def _start(self, rank: int, port: int) -> subprocess.Popen[bytes]:
        facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self._processes, "LOCAL_WORLD_SIZE": self._processes}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        threads = {"OMP_NUM_THREADS": "1"} if self._processes > 1 else {}
        environment = {**threads, **os.environ, **meeting, **{name: str(value) for name, value in facts.items()}}
        return start_rank(self._command, environment)

    def _wait(self) -> list[int]:
        running = dict(enumerate(self._ranks))
        while running:
            time.sleep(_POLL_S)
            for number, rank in list(running.items()):
                if rank.poll() is not None:
                    del running[number]
                    self._ended(number, rank.returncode)
            if running and self._deadline is not None and time.monotonic() > self._deadline:
                logger.error("killing ranks %s, which are still running", ", ".join(map(str, running)))
                for rank in running.values():
                    rank.kill()
                self._deadline = None
        return [rank.returncode for rank in self._ranks]

    def _ended(self, number: int, code: int) -> None:
        if code < 0:
            logger.error("rank %d was killed by %s", number, signal.Signals(-code).name)
        if code not in (0, SAVED):
            self._limit(_GRACE_S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
