"""The takedown list of a run: all ranks use the same lines from the same step on, and the run's folder says which.

The first rank looks at the file in a thread of its own, so that slow storage never holds up a step. What it finds is a
vote in the all-reduce of the next step, which needs no message of its own. In that step's end all ranks receive the new
lines and restart their loaders where they are: batches that workers had prepared with the old list are discarded. So
the list holds from the next step on, exactly.
"""

import logging
import os
import threading
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mc2_hpc.config import DataConfig
from mc2_hpc.data.takedown import MOST_BYTES, Takedown, good_lines, read_list, whole_lines
from mc2_hpc.distributed import Ranks, on_first_rank
from mc2_hpc.errors import UserError
from mc2_hpc.reading.files import read_bytes
from mc2_hpc.training.progress import Progress
from mc2_hpc.training.takedown_record import LIST, TakedownRecord, describe

logger = logging.getLogger(__name__)


class TakedownWatch:
    """The list in force, and new lines as they come.

    Lines that a run has applied stay in force when it is resumed, also without ``data.takedown``.
    """

    def __init__(self, config: DataConfig, ranks: Ranks, run: Path, *, step: int) -> None:
        """Collective.

        Args:
            run: its folder.
            step: the last step that is not trained again.

        Raises:
            UserError: no such list, a line that is not an entry, or a list that no longer begins with the lines that
                the run has applied.
        """
        self._record: TakedownRecord | None = None
        self._growth: _Growth | None = None
        content: list[bytes | None] = [None]

        def read() -> None:
            self._record = TakedownRecord(run)
            content[0] = _first_content(config, self._record)
            self._record.resume(step)

        on_first_rank(ranks, read)
        dist.broadcast_object_list(content, src=0)
        self._content = content[0]
        self.takedown = Takedown.of(content[0]) if content[0] is not None else None
        """The list in force, for looking samples up; None if this start has none."""
        if ranks.is_first and config.takedown is not None and self._content is not None:
            self._growth = _Growth(Path(config.takedown), self._content, seconds=config.takedown_seconds)

    @property
    def has_grown(self) -> bool:
        """Whether there are new lines; only the first rank knows."""
        return self._growth is not None and self._growth.content is not None

    def record(self, *, step: int, progress: dict[str, Any]) -> None:
        """Record that the list is in force after ``step``; ``progress`` is that of all ranks."""
        if self._record is not None and self._content is not None:
            self._record.add(self._content, step=step, progress=progress)
            self._record.write()

    def renew(self, progress: Progress) -> Takedown | None:
        """The list with its new lines, which is in force from now on; None if there are none. Collective."""
        assert self._content is not None and self.takedown is not None
        before = self._content
        new = [self._growth.take()[len(before) :] if self._growth is not None and self.has_grown else None]
        dist.broadcast_object_list(new, src=0)
        if not new[0]:
            return None
        self._content = before + new[0]
        self.takedown = self.takedown.joined(Takedown.of(new[0]))
        self.record(step=progress.step, progress=progress.gathered())
        lines = new[0].count(b"\n")
        logger.info("takedown list: %d new lines, in force after step %d", lines, progress.step)
        return self.takedown

    def described(self) -> dict[str, Any]:
        """The list in force, in the form of ``trainer.json``."""
        if self._content is None:
            return {}
        num_bytes, lines, sha256 = describe(self._content)
        return {"takedown": {"bytes": num_bytes, "lines": lines, "sha256": sha256}}

    def close(self) -> None:
        """Stop looking."""
        if self._growth is not None:
            self._growth.close()


def _first_content(config: DataConfig, record: TakedownRecord) -> bytes | None:
    if config.takedown is None:
        return record.content or None
    content = read_list(config.takedown)
    if not content.startswith(record.content):
        num_lines = record.content.count(b"\n")
        raise UserError(
            f"data.takedown={config.takedown}: no longer begins with the {num_lines} lines that this run has applied, "
            f"which {record.folder / LIST} has: restore them, and append new lines at the end"
        )
    return content


class _Growth:
    """Looks at a growing list in a thread. Lines are used up to the first that is not an entry."""

    def __init__(self, path: Path, content: bytes, *, seconds: float) -> None:
        self.content: bytes | None = None
        """The list with new lines; None if there are none."""
        self._path = path
        self._seconds = seconds
        self._taken = content
        self._said = ""
        self._stamp: tuple[int, int] | None = None
        self._closed = threading.Event()
        # A daemon, because storage that no longer responds must not keep the process from exiting.
        threading.Thread(target=self._run, name="takedown", daemon=True).start()

    def take(self) -> bytes:
        """The list with its new lines, which are then no longer new."""
        assert self.content is not None
        self._taken, self.content = self.content, None
        return self._taken

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(self._seconds):
            if self.content is not None:
                continue  # until it is taken
            try:
                self._look()
            except (UserError, OSError) as error:
                self._say(str(error))

    def _look(self) -> None:
        status = os.stat(self._path)
        stamp = (status.st_size, status.st_mtime_ns)
        if stamp == self._stamp:
            return
        content = whole_lines(read_bytes(self._path, most=MOST_BYTES))
        before = self._taken
        num_lines = before.count(b"\n")
        if not content.startswith(before):
            raise UserError(f"{self._path}: only append to it: its first {num_lines} lines have changed")
        new, error = good_lines(content[len(before) :], self._path, first_line=num_lines + 1)
        if error is not None:
            self._say(str(error))
        self._stamp = stamp
        self.content = before + new if new else None

    def _say(self, problem: str) -> None:
        if problem != self._said:
            self._said = problem
            logger.error("takedown list: %s; the lines before stay in force", problem)
