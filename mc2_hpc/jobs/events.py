"""The record of a task: one JSON line per event, written by the task and read by the driver."""

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
    """``begin`` and ``end`` concern the task, the others a shard."""
    shard: str = ""
    message: str | None = None
    """Why the shard failed; for a bug in the program, the traceback."""
    pid: int = 0
    """The process that runs the task."""

    def line(self) -> str:
        return json.dumps(asdict(self)) + "\n"


def read_events(lines: bytes, path: Path) -> Iterator[Event]:
    """The events in complete ``lines`` of the record ``path``.

    Raises:
        UserError: a line is not an event.
    """
    for line in lines.splitlines():
        try:
            plain = json.loads(line)
        except ValueError:
            plain = None  # rejected below
        yield from_plain(plain, Event, str(path))
