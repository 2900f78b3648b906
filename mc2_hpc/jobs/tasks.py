"""A stage cut into tasks: which shards each has to do, and the record that it leaves while it does them.

Below ``<stage folder>/logs/<stage>/``, beside datatrove's own files: ``plan/stage.json`` (what to call, and which
outputs say that a shard is done), ``plan/<task>.json`` (the shards of a task) and ``events/<task>.jsonl`` (what the
task did, a line an event). The task is what an executor marks as completed; a shard's own outputs tell whether the
shard is done, so that of a task that was killed only the unfinished shards are done again.
"""

import os
import re
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from mc2_hpc.errors import UserError
from mc2_hpc.jobs.engines import Engine, num_tasks
from mc2_hpc.jobs.events import Event
from mc2_hpc.jobs.named import (
    Named,
    extend_search_path,
    read_plain,
    search_path,
    type_of_input,
    write_plain,
)
from mc2_hpc.jobs.stages import Stage
from mc2_hpc.storage import remove_folder

HEARTBEAT_S = 10.0
_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}(\.\w+)?")
"""Names that :func:`~mc2_hpc.storage.atomic_path` gives to files that are being written."""


def plan_tasks(stage: Stage, engine: Engine, undone: Sequence[str]) -> int:
    """Make ready for a stage's work: clear away what it makes stale, and lay down the plan of its tasks, each a fixed
    slice of the sorted shards; returns their number."""
    stage.invalidate()
    _remove_unfinished(stage.folder)
    tasks, wanted = num_tasks(engine, len(stage.inputs)), set(undone)
    slices = {}
    for task, names in enumerate(cut(sorted(stage.inputs), tasks)):
        if slice_ := [name for name in names if name in wanted]:
            slices[task] = slice_
    TaskFiles(stage.logs).write_plan(stage, slices, tasks)
    return tasks


def _remove_unfinished(folder: Path) -> None:
    """Remove the temporary files that a killed run left in ``folder`` and below."""
    for path in folder.rglob(".*"):
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink()


def cut(names: Sequence[str], tasks: int) -> Iterator[Sequence[str]]:
    """The names as ``tasks`` runs of consecutive ones, as even as can be."""
    for task in range(tasks):
        yield names[len(names) * task // tasks : len(names) * (task + 1) // tasks]


@dataclass(frozen=True)
class _StageFile:
    """``plan/stage.json``: a stage without its inputs."""

    name: str
    folder: Path
    work: Named
    outputs: tuple[str, ...]
    search_path: list[str]
    """Where the driver finds modules, so that a task finds the user's."""


@dataclass(frozen=True)
class TaskFiles:
    """The files of a stage's tasks, below its folder of logs."""

    logs: Path

    def events(self, task: int) -> Path:
        return self.logs / "events" / f"{task:05d}.jsonl"

    def completion(self, task: int) -> Path:
        """datatrove's marker of a completed task."""
        return self.logs / "completions" / f"{task:05d}"

    def _inputs(self, task: int) -> Path:
        return self.logs / "plan" / f"{task:05d}.json"

    @property
    def _stage(self) -> Path:
        return self.logs / "plan" / "stage.json"

    def write_plan(self, stage: Stage, slices: dict[int, list[str]], num_tasks: int) -> None:
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
        write_plain(
            self._stage,
            _StageFile(stage.name, stage.folder.absolute(), Named.of(stage.work), stage.outputs, search_path()),
        )
        for task, names in slices.items():
            write_plain(self._inputs(task), {name: stage.inputs[name] for name in names})

    def read_stage(self, task: int) -> Stage:
        """The stage with the shards of a task; those alone that the driver saw undone."""
        stage = _read_stage(self._stage, self._stage.stat().st_mtime_ns)
        return replace(stage, inputs=read_plain(self._inputs(task), dict[str, type_of_input(stage.work)]))  # type: ignore[misc]


@lru_cache(maxsize=1)
def _read_stage(path: Path, changed_ns: int) -> Stage:
    """Cached, for tasks that one process does in turn: what the work keeps open (a model) is loaded once."""
    file: _StageFile = read_plain(path, _StageFile)
    extend_search_path(file.search_path)
    return Stage(file.name, file.folder, {}, file.work.load(), file.outputs)


def do_shards(stage: Stage, tell: Callable[[Event], None]) -> int:
    """Do every shard that is not done, and tell of each; returns how many failed.

    A shard fails with bad input, on a full disk, or because of a lack of memory. Anything else is an error of the
    program.
    """
    failed = 0
    for name, value in stage.inputs.items():
        if stage.is_done(name):
            tell(Event("done", name))
            continue
        tell(Event("start", name))
        try:
            stage.work(name, value)
        except UserError as error:
            tell(Event("failed", name, str(error)))
            failed += 1
        except (OSError, MemoryError) as error:
            tell(Event("failed", name, f"{name}: {_one_line(error)}"))
            failed += 1
        except Exception:
            tell(Event("crashed", name, traceback.format_exc()))
            raise
        else:
            tell(Event("done", name))
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
    listener: Callable[[int, Event], None] | None = field(default=None, repr=False)
    """Told of the task and each event, where driver and task are one process."""

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        files = TaskFiles(self.logs)
        stage = files.read_stage(rank)
        with self._record(files.events(rank)) as write:

            def tell(event: Event) -> None:
                write(event)
                if self.listener:
                    self.listener(rank, event)

            failed = do_shards(stage, tell)
        if failed and self.fail:
            raise RuntimeError(f"{failed} shards of task {rank} failed; {files.events(rank)} names them")

    @contextmanager
    def _record(self, path: Path) -> Iterator[Callable[[Event], None]]:
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(HEARTBEAT_S):
                os.utime(path)

        # Appended to: a task that Slurm requeues continues in the record of its first attempt.
        with open(path, "a", encoding="utf-8", buffering=1) as stream:

            def write(event: Event) -> None:
                stream.write(event.line())

            write(Event("begin", pid=os.getpid()))
            if self.heartbeat:
                threading.Thread(target=beat, daemon=True).start()
            try:
                yield write
            finally:
                ended.set()
            write(Event("end"))
