"""Files whose opening hangs, as on a file server that has died: regular ones, under a lease that nobody gives back."""

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def held(*paths: Path) -> Iterator[None]:
    """While the context lasts, opening one of the existing files waits: the kernel gives up on the lease's holder after
    ``/proc/sys/fs/lease-break-time``, 45 s on most machines.
    """
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # which asks for the lease back
    descriptors = [os.open(path, os.O_RDWR | os.O_CLOEXEC) for path in paths]
    try:
        for descriptor in descriptors:
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
        signal.signal(signal.SIGIO, before)
