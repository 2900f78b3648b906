"""The record of a task: what it did, a JSON line an event, written by the task and read by the driver."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from mc2_hpc.jobs.named import from_plain

What = Literal["begin", "start", "done", "failed", "crashed", "end"]


@dataclass(frozen=True)
class Event:
    """Something that a task did."""

    event: What
    """``begin`` and ``end`` are of the task, the others of a shard."""
    shard: str = ""
    message: str | None = None
    """Why the shard failed; the traceback where the program crashed."""
    pid: int = 0
    """The process that began the task."""

    def line(self) -> str:
        return json.dumps(asdict(self)) + "\n"


def read_events(lines: bytes, path: Path) -> Iterator[Event]:
    """The events in whole ``lines`` of the record ``path``.

    Raises:
        UserError: a line is not an event.
    """
    for line in lines.splitlines():
        try:
            plain = json.loads(line)
        except ValueError:
            plain = None  # which is no event
        yield from_plain(plain, Event, str(path))
