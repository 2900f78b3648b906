"""How a run ends before its last step: signals that ask for a save, and the exit codes that launchers act upon.

Nothing here imports torch, so that signals are heard from the first moment of ``mc2 train``.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SAVED = 75
"""Exit code after a signal: all there was to save is saved, start me again (sysexits.h: EX_TEMPFAIL)."""
LOST_RANK = 69
"""Exit code where another rank or the device went away: a new start may help (sysexits.h: EX_UNAVAILABLE)."""

INTERRUPTED = 130
"""Exit code after Ctrl-C where nothing was saved for it, as shells have it (128 + SIGINT)."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""A shutdown or preemption, Slurm's warning before its time limit (``--signal=USR1@120``), and Ctrl-C."""


class Stopped(Exception):
    """The run was asked to stop, and its state is saved; the message says so."""


class StopRequest:
    """Whether this process was asked to stop.

    Before :meth:`defer` there is nothing to save, and a signal ends the process at once, with exit code 75 (Ctrl-C:
    130), even where it waits inside a library. Afterwards it is noted in :attr:`requested`, once, for the training loop
    to act upon; a second Ctrl-C does not wait for that.
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
        """Hear :data:`SIGNALS` while inside; in the main thread only.

        A thread reads the numbers that Python's C handler writes into a pipe: a handler in Python would wait until a
        library call returns, which for a rendezvous with ranks that never come is the whole timeout.
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
                _say("interrupted again: leaving without another save")
                os._exit(INTERRUPTED)
            if self.requested is None:
                self.requested = number.name
        if is_interrupt and os.environ.get("RANK", "0") == "0":
            _say(f"saving because of {number.name}; another one leaves at once")


def _say(text: str) -> None:
    print(f"mc2: {text}", file=sys.stderr, flush=True)
