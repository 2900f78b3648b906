"""A stage divided into tasks: the shards of each task, and the record that it writes while it runs.

Below ``<stage folder>/logs/<stage>/``, beside datatrove's own files: ``plan/stage.json`` (the work, and the outputs
that mark a shard as done), ``plan/<task>.json`` (the shards of a task) and ``events/<task>.jsonl`` (the task's record,
one line per event). Executors mark whole tasks as completed, but a shard's own outputs decide whether it is done. So
after a task was killed, only its unfinished shards are processed again.
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
"""Names that :func:`~mc2_hpc.storage.atomic_path` gives to unfinished files."""


def plan_tasks(stage: Stage, engine: Engine, undone: Sequence[str]) -> int:
    """Prepare a stage's run: remove what it makes stale, and write the plan of its tasks, each a fixed slice of the
    sorted shards; returns the number of tasks."""
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
    """Remove temporary files that a killed run left in or below ``folder``."""
    for path in folder.rglob(".*"):
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink()


def cut(names: Sequence[str], tasks: int) -> Iterator[Sequence[str]]:
    """Split the names into ``tasks`` consecutive slices, as even as possible."""
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
    """The driver's module search path, so that a task finds the user's modules."""


@dataclass(frozen=True)
class TaskFiles:
    """The files of a stage's tasks, in its log folder."""

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
        """Write the tasks that have work to do, and update datatrove's markers accordingly.

        A marker says that a task once went through its shards, but the shards may have changed since.
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
        """The stage with only those shards of a task that the driver found unfinished."""
        stage = _read_stage(self._stage, self._stage.stat().st_mtime_ns)
        return replace(stage, inputs=read_plain(self._inputs(task), dict[str, type_of_input(stage.work)]))  # type: ignore[misc]


@lru_cache(maxsize=1)
def _read_stage(path: Path, changed_ns: int) -> Stage:
    """Cached, so that a process that runs several tasks loads the work's resources (a model) only once."""
    file: _StageFile = read_plain(path, _StageFile)
    extend_search_path(file.search_path)
    return Stage(file.name, file.folder, {}, file.work.load(), file.outputs)


def do_shards(stage: Stage, tell: Callable[[Event], None]) -> int:
    """Process every unfinished shard and report each; returns the number of failures.

    A shard may fail because of bad input, a full disk, or a lack of memory. Any other exception is a bug in the
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
        return "out of memory; give the workers more memory, or use fewer workers"
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True)
class RunTask:
    """The only step of a datatrove pipeline: processes the shards of the task that it is called for."""

    logs: Path
    fail: bool = False
    """Raise if a shard failed, so that jobs that depend on the task do not start."""
    heartbeat: bool = False
    """Touch the record while working, so that another machine can see that the task is alive."""
    listener: Callable[[int, Event], None] | None = field(default=None, repr=False)
    """Called with the task and each event, if driver and task share a process."""

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
            raise RuntimeError(f"{failed} shards of task {rank} failed; see {files.events(rank)}")

    @contextmanager
    def _record(self, path: Path) -> Iterator[Callable[[Event], None]]:
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(HEARTBEAT_S):
                os.utime(path)

        # Append, because a task that Slurm requeues continues the record of its first attempt.
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
