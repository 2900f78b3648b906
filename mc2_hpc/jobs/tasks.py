"""A stage cut into tasks: which shards each has to do, and the record that it leaves while it does them.

Below ``<stage folder>/logs/<stage>/``, beside datatrove's own files: ``plan/work.pkl`` (what to call),
``plan/<task>.pkl`` (the shards of a task) and ``events/<task>.jsonl`` (what the task did, a line an event). The task is
what an executor marks as completed; a shard's own outputs tell whether the shard is done, so that of a task that was
killed only the unfinished shards are done again.
"""

import json
import os
import pickle
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import dill

from mc2_hpc.errors import UserError
from mc2_hpc.storage import remove_folder

HEARTBEAT_S = 10.0
Work = Callable[[str, Any], object]
IsDone = Callable[[str], bool]
Tell = Callable[..., None]
"""Called with what happened (``start``, ``done``, ``failed``, ``crashed``), the shard's name, and a message or None."""


def cut(names: Sequence[str], tasks: int) -> Iterator[Sequence[str]]:
    """The names as ``tasks`` runs of consecutive ones, as even as can be."""
    for task in range(tasks):
        yield names[len(names) * task // tasks : len(names) * (task + 1) // tasks]


@dataclass(frozen=True)
class TaskFiles:
    """The files of a stage's tasks, below its folder of logs."""

    logs: Path

    def events(self, task: int) -> Path:
        return self.logs / "events" / f"{task:05d}.jsonl"

    def completion(self, task: int) -> Path:
        """datatrove's marker of a completed task."""
        return self.logs / "completions" / f"{task:05d}"

    def _shards(self, task: int) -> Path:
        return self.logs / "plan" / f"{task:05d}.pkl"

    @property
    def _work(self) -> Path:
        return self.logs / "plan" / "work.pkl"

    def write_plan(self, slices: Mapping[int, Mapping[str, Any]], num_tasks: int) -> None:
        """Lay down the tasks that have something to do, and bring datatrove's markers in line with them.

        A marker says that a task went through its shards once; the shards may have become others since.
        """
        remove_folder(self.logs / "plan")
        remove_folder(self.logs / "events")
        self.events(0).parent.mkdir(parents=True)
        self.completion(0).parent.mkdir(exist_ok=True)
        for marker in self.completion(0).parent.iterdir():
            if not marker.name.isdigit() or int(marker.name) >= num_tasks or int(marker.name) in slices:
                marker.unlink()
        for task in range(num_tasks):
            if task not in slices:
                self.completion(task).touch()
        self._work.parent.mkdir()
        for task, shards in slices.items():
            self._shards(task).write_bytes(pickle.dumps(dict(shards)))

    def write_work(self, work: Work, is_done: IsDone) -> None:
        """Lay down what tasks in other processes call."""
        with open(self._work, "wb") as stream:
            dill.dump((work, is_done), stream, recurse=True)  # of a function's globals what it uses

    def read_work(self) -> tuple[Work, IsDone]:
        """What the driver of this run laid down with :meth:`write_work`."""
        return _load_work(self._work, self._work.stat().st_mtime_ns)

    def read_shards(self, task: int) -> dict[str, Any]:
        """The shards of a task, with their inputs; those alone that the driver saw undone."""
        return pickle.loads(self._shards(task).read_bytes())


@lru_cache(maxsize=1)
def _load_work(path: Path, changed_ns: int) -> tuple[Work, IsDone]:
    """Cached, for tasks that one process does in turn: what the work keeps open (a model) is loaded once."""
    with open(path, "rb") as stream:
        return dill.load(stream)


def do_shards(shards: Mapping[str, Any], work: Work, is_done: IsDone, tell: Tell) -> int:
    """Do every shard that is not done, and tell of each; returns how many failed.

    A shard fails with bad input, on a full disk, or for want of memory. Anything else is an error of the program.
    """
    failed = 0
    for name, value in shards.items():
        if is_done(name):
            tell("done", name)
            continue
        tell("start", name)
        try:
            work(name, value)
        except UserError as error:
            tell("failed", name, str(error))
            failed += 1
        except (OSError, MemoryError) as error:
            tell("failed", name, f"{name}: {_one_line(error)}")
            failed += 1
        except Exception:
            tell("crashed", name, traceback.format_exc())
            raise
        else:
            tell("done", name)
    return failed


def _one_line(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "out of memory; give the workers more, or use fewer of them"
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True)
class RunTask:
    """The one step of a datatrove pipeline: does the shards of the task that it is called for."""

    logs: Path
    fail: bool = False
    """Raise when a shard failed, so that what depends on the task does not start."""
    heartbeat: bool = False
    """Touch the record while working, so that another machine sees the task alive."""
    in_process: tuple[Work, IsDone, Callable[..., None]] | None = field(default=None, repr=False)
    """Work, ``is_done`` and a listener ``(task, event)``, where driver and task are one process."""

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        files = TaskFiles(self.logs)
        if self.in_process is None:
            (work, is_done), listener = files.read_work(), None
        else:
            work, is_done, listener = self.in_process
        with self._record(files.events(rank)) as write:

            def tell(what: str, name: str, message: str | None = None) -> None:
                event = {"event": what, "shard": name, "message": message}
                write(event)
                if listener:
                    listener(rank, event)

            failed = do_shards(files.read_shards(rank), work, is_done, tell)
        if failed and self.fail:
            raise RuntimeError(f"{failed} shards of task {rank} failed; {files.events(rank)} names them")

    @contextmanager
    def _record(self, path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(HEARTBEAT_S):
                os.utime(path)

        # Appended to: a task that Slurm requeues goes on in the record of its first attempt.
        with open(path, "a", encoding="utf-8", buffering=1) as stream:

            def write(event: dict[str, Any]) -> None:
                stream.write(json.dumps(event) + "\n")

            write({"event": "begin", "pid": os.getpid()})
            if self.heartbeat:
                threading.Thread(target=beat, daemon=True).start()
            try:
                yield write
            finally:
                ended.set()
            write({"event": "end"})
