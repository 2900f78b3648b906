"""Following the tasks of a stage through their records: progress, failures, and killed workers."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from mc2_hpc.errors import UserError
from mc2_hpc.jobs.events import Event, read_events

Progress = Callable[[str, int, int, str], None]
"""Called with (stage, shards done, total shards, name of the shard just done or "" for those done before)."""

_SHOWN = 3


class Watch:
    """Follows the records of a stage's tasks."""

    def __init__(self, stage: str, unit: str, total: int, done: int, progress: Progress | None):
        self.stage = stage
        self.unit = unit
        self.total = total
        self.failures: dict[str, str] = {}
        """Why a shard failed, by shard."""
        self.crashes: dict[str, str] = {}
        """Traceback of a bug in the program, by shard."""
        self.at_work: dict[int, str] = {}
        """The shard that each task has started and not finished."""
        self._pids: dict[int, int] = {}
        self._open_tasks: set[int] = set()
        self._finished: set[str] = set()
        self._done_before = done
        self._progress = progress
        self._offsets: dict[str, int] = {}
        self._touched: dict[str, tuple[float, float]] = {}
        self.last_event = time.monotonic()
        if progress and done:
            progress(stage, done, total, "")

    def tell(self, task: int, event: Event) -> None:
        """Process one event of a task."""
        self.last_event = time.monotonic()
        what, shard = event.event, event.shard
        if what == "begin":
            self._pids[task] = event.pid
            self._open_tasks.add(task)
            self.at_work.pop(task, None)
        elif what == "end":
            self._open_tasks.discard(task)
        elif what == "start":
            self.at_work[task] = shard
        else:
            self.at_work.pop(task, None)
            # A restarted task may succeed where it failed before.
            self.failures.pop(shard, None)
            self.crashes.pop(shard, None)
            if what == "failed":
                self.failures[shard] = event.message or ""
            elif what == "crashed":
                self.crashes[shard] = event.message or ""
            if shard not in self._finished:
                self._finished.add(shard)
                if self._progress:
                    self._progress(self.stage, self._done_before + len(self._finished), self.total, shard)

    def read(self, events: Path) -> None:
        """Process the events that the tasks wrote to the folder ``events`` since the last call."""
        for entry in os.scandir(events):
            status = entry.stat()
            touched = self._touched.get(entry.name)
            if touched is None or touched[0] != status.st_mtime:
                self._touched[entry.name] = (status.st_mtime, time.monotonic())
            offset = self._offsets.get(entry.name, 0)
            if status.st_size <= offset:
                continue
            with open(entry.path, "rb") as stream:
                stream.seek(offset)
                lines = stream.read()
            whole = lines.rfind(b"\n") + 1
            self._offsets[entry.name] = offset + whole
            for event in read_events(lines[:whole], Path(entry.path)):
                self.tell(int(entry.name.partition(".")[0]), event)

    def lost_here(self, events: Path) -> set[int]:
        """Unfinished tasks whose process on this machine is gone."""
        gone = {task for task in self._open_tasks if not _is_alive(self._pids[task])}
        if gone:  # a task may have ended after its record was last read
            self.read(events)
        return gone & self._open_tasks

    def silent(self, seconds: float) -> set[int]:
        """Unfinished tasks whose record was not touched for ``seconds`` (see ``RunTask.heartbeat``)."""
        now = time.monotonic()
        quiet = {int(name.partition(".")[0]) for name, (_, seen) in self._touched.items() if now - seen > seconds}
        return quiet & self._open_tasks

    def killed(self, tasks: Iterable[int], log: Path) -> UserError:
        """The error for killed tasks; it names the shards that they were processing."""
        shards = sorted(self.at_work[task] for task in tasks if task in self.at_work)
        more = f" and {len(shards) - _SHOWN} more" if len(shards) > _SHOWN else ""
        where = f"at {', '.join(map(repr, shards[:_SHOWN]))}{more}" if shards else "between two shards"
        return UserError(
            f"{self.stage}: a worker was killed {where}, most often because of a lack of memory (see {log}); finished "
            "shards are kept: run the same command again, with fewer workers or more memory"
        )

    def raise_crash(self) -> None:
        """Raise the first bug that a task ran into, if any."""
        if self.crashes:
            shard, trace = min(self.crashes.items())
            raise RuntimeError(f"{self.stage}: a bug in the program at {shard!r}:\n{trace}")

    def raise_failures(self) -> None:
        """Raise a :class:`UserError` that names the failed shards, if any."""
        if not self.failures:
            return
        messages = [message for _, message in sorted(self.failures.items())]
        if self.total == 1:
            raise UserError(messages[0])
        shown = "; ".join(messages[:_SHOWN])
        more = f" (and {len(messages) - _SHOWN} more)" if len(messages) > _SHOWN else ""
        raise UserError(
            f"{self.stage}: {len(messages)} of {self.total} {self.unit} failed, the others are done: {shown}{more}; "
            "fix or remove them and run the same command again"
        )


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, PermissionError):  # gone, or the id now belongs to another user's process
        return False
    return True
