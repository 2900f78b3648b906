"""How a run ends before its last step: signals that ask for a save, and the exit codes that launchers act on.

Nothing here imports torch, so that ``mc2 train`` handles signals from the very start.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SAVED = 75
"""Exit code after a signal: the state is saved and the run can be restarted (sysexits.h: EX_TEMPFAIL)."""
LOST_RANK = 69
"""Exit code if another rank or the device is lost: a restart may help (sysexits.h: EX_UNAVAILABLE)."""

INTERRUPTED = 130
"""Exit code after Ctrl-C without a save, by the convention of shells (128 + SIGINT)."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Shutdown or preemption, Slurm's warning before its time limit (``--signal=USR1@120``), and Ctrl-C."""


class Stopped(Exception):
    """The run was asked to stop and its state is saved; the message says so."""


class StopRequest:
    """Whether this process was asked to stop.

    Before :meth:`defer` there is nothing to save, and a signal ends the process at once, with exit code 75 (Ctrl-C:
    130), even while it waits inside a library. Afterwards the first signal is stored in :attr:`requested` for the
    training loop to act on; a second Ctrl-C does not wait for that.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        """Name of the first signal since :meth:`defer`."""
        self._deferred = False
        self._interrupts = 0
        self._lock = threading.Lock()

    def defer(self) -> None:
        """From here on there is something to save."""
        with self._lock:
            self._deferred = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle :data:`SIGNALS` inside the context; call it in the main thread only.

        A thread reads the numbers that Python's C handler writes to a pipe. A handler in Python would wait until a
        library call returns, which can be the full timeout if other ranks never join the rendezvous.
        """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        fd_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        thread = threading.Thread(target=self._read, args=(reader,), name="signals", daemon=True)
        thread.start()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(fd_before)
            os.close(writer)
            thread.join()
            os.close(reader)

    def _read(self, reader: int) -> None:
        while numbers := os.read(reader, 64):
            for number in numbers:
                if number in SIGNALS:
                    self._heard(signal.Signals(number))

    def _heard(self, number: signal.Signals) -> None:
        is_interrupt = number == signal.SIGINT
        with self._lock:
            if not self._deferred:
                _say(f"{number.name} before the first step: nothing to save")
                os._exit(INTERRUPTED if is_interrupt else SAVED)
            self._interrupts += is_interrupt
            if self._interrupts > 1:
                _say("interrupted again: exiting without another save")
                os._exit(INTERRUPTED)
            if self.requested is None:
                self.requested = number.name
        if is_interrupt and os.environ.get("RANK", "0") == "0":
            _say(f"saving because of {number.name}; press Ctrl-C again to exit at once")


def _say(text: str) -> None:
    print(f"mc2: {text}", file=sys.stderr, flush=True)
