"""Parse HTML pages in a separate process, which ends if a page takes too much time or memory.

The cost of parsing HTML is not bounded by the size of the page: distinct attributes of one tag, formatting elements
that are never closed and the like cost the square of their number. The limit is on processor time, so that busy and
idle machines give up on the same pages.
"""

import os
import resource
import select
import signal
import struct
import subprocess
import sys
from typing import IO

import msgspec

from mc2_hpc.curation.pool.page_images import PageImages, images_of_html

PAGE_CPU_S = 10
"""A normal page takes milliseconds; a page that takes this long was made to."""
PAGE_BYTES = 1 << 30
"""Memory that parsing may take."""
_WAIT_S = 3600
_LENGTH = struct.Struct("<Q")
_Page = tuple[bytes, str | None, str]


class HeavyPage(Exception):
    """Parsing the page takes more than :data:`PAGE_CPU_S` or :data:`PAGE_BYTES`."""


class PageWorker:
    """The process: starts with the first page, and again after a page ended it: ``with PageWorker() as worker``."""

    def __init__(self, cpu_s: float = PAGE_CPU_S) -> None:
        self._cpu_s = cpu_s
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "PageWorker":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._end(self._process)

    def images_of_html(self, body: bytes, charset: str | None, page: str) -> PageImages:
        """Like :func:`mc2_hpc.curation.pool.page_images.images_of_html`.

        Raises:
            HeavyPage: parsing was abandoned.
        """
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            _send(process.stdin, msgspec.msgpack.encode((body, charset, page)))
            # Not select.select, which refuses descriptors above 1,023.
            answers = select.poll()
            answers.register(process.stdout, select.POLLIN)
            if answers.poll(_WAIT_S * 1000) and (answer := _receive(process.stdout)) is not None:
                base, images = msgspec.msgpack.decode(answer, type=tuple[str, list[tuple[str, str]]])
                return PageImages(base, images)
        except BrokenPipeError:
            pass
        self._end(process)
        raise HeavyPage

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "mc2_hpc.curation.pool.page_worker", str(self._cpu_s)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self._process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        self._process = None
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:  # it did not read the page to the end
                pass


def _send(stream: IO[bytes], message: bytes) -> None:
    stream.write(_LENGTH.pack(len(message)))
    stream.write(message)
    stream.flush()


def _receive(stream: IO[bytes]) -> bytes | None:
    """A message; None if the other side has ended."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    message = stream.read(length)
    return message if len(message) == length else None


def _serve(cpu_s: float) -> None:
    """Parse pages until the other side ends; a page that is too heavy ends this process."""
    from resiliparse.parse.html import HTMLTree  # noqa: F401  before the memory is counted

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the other side, and then this one
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keep a library's prints out of the answers
    in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + PAGE_BYTES, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while (message := _receive(sys.stdin.buffer)) is not None:
        body, charset, page = msgspec.msgpack.decode(message, type=_Page)
        signal.setitimer(signal.ITIMER_VIRTUAL, cpu_s)  # its signal ends the process at any point
        found = images_of_html(body, charset, page)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        _send(answers, msgspec.msgpack.encode((found.base, found.images)))


if __name__ == "__main__":
    try:
        _serve(float(sys.argv[1]))
    except (MemoryError, BrokenPipeError):
        os._exit(1)
