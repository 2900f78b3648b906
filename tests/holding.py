"""Regular files whose opening hangs, as on a dead file server, because of a lease that is never released."""

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def held(*paths: Path) -> Iterator[None]:
    """Inside the context, opening one of the existing files blocks, until the kernel breaks the lease after
    ``/proc/sys/fs/lease-break-time``, 45 s on most machines.
    """
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # sent to ask for the lease back
    descriptors = [os.open(path, os.O_RDWR | os.O_CLOEXEC) for path in paths]
    try:
        for descriptor in descriptors:
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
        signal.signal(signal.SIGIO, before)
