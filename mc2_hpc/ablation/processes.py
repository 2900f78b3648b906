"""Several runs at a time, each a chain of single-threaded processes; after a failure, the others finish first."""

import os
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence

from mc2_hpc.ablation.training_runs import TrainingRun
from mc2_hpc.errors import UserError
from mc2_hpc.training.launch import end_with_parent
from mc2_hpc.training.stop import SAVED

_POLL_S = 0.1
_STOP_S = 60
"""Time for stopped processes to save; then they are killed."""

Report = Callable[[int, int, str], None]
"""Called with (runs done, total runs, title of the run just done)."""


def run_all(runs: Sequence[TrainingRun], jobs: int, report: Report) -> None:
    """Execute all runs, ``jobs`` at a time.

    After a failure no new run starts, and the active ones finish. An exception (Ctrl-C) stops them; training saves
    before it ends, so the next call resumes from there.

    Raises:
        UserError: a run failed; the message names its log.
    """
    waiting, done = deque(runs), 0
    active: list[_Chain] = []
    failed: list[str] = []
    try:
        while active or (waiting and not failed):
            while waiting and not failed and len(active) < jobs:
                active.append(_Chain(waiting.popleft()))
            time.sleep(_POLL_S)
            for chain in list(active):
                if not chain.ended():
                    continue
                active.remove(chain)
                if chain.failure:
                    failed.append(chain.failure)
                else:
                    done += 1
                    report(done, len(runs), chain.run.title)
    finally:
        for chain in active:
            chain.process.terminate()
        deadline = time.monotonic() + _STOP_S
        for chain in active:
            chain.wait(deadline)
    if failed:
        others = f" ({len(failed) - 1} more failed)" if len(failed) > 1 else ""
        raise UserError(f"{failed[0]}{others}; run the same command to resume")


class _Chain:
    """The processes of one run, one after the other."""

    def __init__(self, run: TrainingRun) -> None:
        self.run = run
        self.failure = ""
        self._left = deque(run.commands)
        self._start()

    def _start(self) -> None:
        self._command = self._left.popleft()
        # One thread each, because the runs are parallel.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
        with open(self._command.log, "ab") as log:
            self.process = subprocess.Popen(
                self._command.words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches only this process, which asks them to save
                preexec_fn=end_with_parent,
            )

    def ended(self) -> bool:
        """Start the next process if the current one has ended; returns whether none is left or one failed."""
        code = self.process.poll()
        if code is None:
            return False
        if code:
            stopped = ", stopped by a signal" if code == SAVED else ""
            self.failure = f"{self.run.title}: exit code {code}{stopped}; see {self._command.log}"
            return True
        if self._left:
            self._start()
            return False
        return True

    def wait(self, deadline: float) -> None:
        """Wait until the process has ended; kill it at the deadline."""
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
