"""Regular files whose opening hangs, as on a dead file server, because of a lease that is never released."""

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def held(*paths: Path) -> Iterator[None]:
    """Inside the context, opening one of the existing files blocks.

    Raises:
        AssertionError: the context lasted longer than that: the kernel takes a lease back after
            ``/proc/sys/fs/lease-break-time``, 45 s on most machines.
    """
    seconds = int(Path("/proc/sys/fs/lease-break-time").read_text(encoding="ascii"))
    asked: list[float] = []
    before = signal.signal(signal.SIGIO, lambda *_: asked.append(time.monotonic()))  # sent to ask for the lease back
    descriptors = [os.open(path, os.O_RDWR | os.O_CLOEXEC) for path in paths]
    try:
        for descriptor in descriptors:
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield
        assert not asked or time.monotonic() - asked[0] < seconds, f"files were held longer than {seconds} s"
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
        signal.signal(signal.SIGIO, before)
