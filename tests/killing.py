"""Commands that are killed at a known place, and that never outlive their test."""

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

WAIT_S = 240


@contextmanager
def started(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A command that runs inside the context, at the end of which it is killed and waited for."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(reached: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """
    Raises:
        AssertionError: the command ended before, or it took longer than :data:`WAIT_S`.
    """
    deadline = time.monotonic() + WAIT_S
    while not reached():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"not there after {WAIT_S} s: {process.args!r}"
        time.sleep(0.05)


def kill_when(command: Sequence[str], reached: Callable[[], bool]) -> None:
    """Run a command until something is so, then ``kill -9`` it; raises as :func:`wait_until` does."""
    with started(command) as process:
        wait_until(reached, process)
