"""Stages over shards: finished shards are skipped, broken ones are named at the end, the rest is done.

A shard's outputs are files of their own, each written atomically; its ``stats/<shard>.json`` is written last and so
marks it as finished. A stage's settings lie beside them, and other settings are refused rather than mixed in.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mc2_hpc.errors import UserError
from mc2_hpc.jobs.engines import Engine, Local, Ray, Slurm, num_tasks
from mc2_hpc.jobs.watch import Progress, Watch
from mc2_hpc.reading.json_file import Count, as_type, read_fields, read_json
from mc2_hpc.storage import exclusive_folder, remove_folder, write_json

__all__ = ["REDO", "Counters", "Progress", "Stage", "open_stage", "run_stages", "stats_path", "sum_stats"]

JOB = "job.json"
"""Among a stage's logs: the Slurm job that it was submitted as."""
BUSY_S = 10.0
"""How long to wait for another process that works in the same folder, before that is an error."""
_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}(\.\w+)?")
"""Names that :func:`~mc2_hpc.storage.atomic_path` gives to files that are being written."""


@dataclass(frozen=True)
class Stage:
    """Work on every shard of a list, on any engine."""

    name: str
    folder: Path
    """Where the stage writes; its logs and its executor's markers go to ``logs/<name>/`` below."""
    shards: Mapping[str, Any]
    """Input of each shard by name, picklable."""
    work: Callable[[str, Any], object]
    """Called with name and input, in any process or on any machine, so it is picklable; raises :class:`UserError` for
    a shard that it cannot do."""
    is_done: Callable[[str], bool]
    """Whether all outputs of a shard are there; picklable too."""
    unit: str = "shards"
    """What the shards of this stage are, in the plural."""
    invalidates: tuple[Path, ...] = ()
    """Files and folders made from this stage's outputs: removed before it does anything."""

    @property
    def logs(self) -> Path:
        """Folder of the stage's logs, plan and markers."""
        return self.folder / "logs" / self.name.replace(" ", "-")

    def undone(self) -> list[str]:
        """Names of the shards that are not done, in order."""
        return [name for name in self.shards if not self.is_done(name)]

    def invalidate(self) -> None:
        """Remove what was made from outputs that are about to change."""
        for path in self.invalidates:
            if path.is_dir():
                remove_folder(path)
            else:
                path.unlink(missing_ok=True)


REDO = "delete the file, and its shard is done again"
"""How to get another file that marks a finished shard."""


def stats_path(out: Path, shard: str) -> Path:
    """The file that marks a shard of the stage in ``out`` as finished and holds its counters."""
    return out / "stats" / f"{shard}.json"


Counters = dict[str, Count | dict[str, Count | dict[str, Count]]]
"""The schema of any shard's counters: numbers by name, or by name within a name."""


def sum_stats(out: Path, shards: Sequence[str], kind: Any = Counters) -> dict[str, Any]:
    """Add up the counters of finished shards, nested dictionaries key by key, keys sorted; one shard in memory.

    Args:
        kind: their schema; where it names counters, all have them.

    Raises:
        UserError: a shard's counters are missing or damaged.
    """
    total: dict[str, Any] = {}
    for name in shards:
        path = stats_path(out, name)
        try:
            _add(total, read_fields(path, kind, cure=REDO))
        except (TypeError, AttributeError):  # a number here, numbers by name there
            raise UserError(f"{path}: other counters than the shards before it; {REDO}") from None
    return total


def _add(total: dict[str, Any], more: dict[str, Any]) -> None:
    for key in sorted(more):
        if isinstance(more[key], dict):
            _add(total.setdefault(key, {}), more[key])
        else:
            total[key] = total.get(key, 0) + more[key]


def open_stage(out: Path, file: str, settings: Mapping[str, Any], shards: Sequence[str]) -> None:
    """Record ``settings`` and the shards in ``out/file``, or check that they are those recorded before.

    Shards may be added; one that was finished may not vanish.

    Raises:
        UserError: the folder was made with other settings, or a finished shard is no longer among ``shards``.
    """
    path = out / file
    if path.is_file():
        before = read_json(path, dict[str, Any], cure="delete the folder, or name another")
        names = as_type(before.get("shards"), list[str], f"{path}: $.shards")
        changed = [key for key in settings if before.get(key) != settings[key]]
        if changed:
            raise UserError(
                f"{path}: this folder was made with another {', '.join(changed)}; name another folder or delete it"
            )
        listed = set(shards)
        gone = [name for name in names if name not in listed and stats_path(out, name).is_file()]
        if gone:
            raise UserError(
                f"{path}: {len(gone)} shards that are finished have gone from the input, the first is {gone[0]!r}; "
                f"put them back, or delete {stats_path(out, gone[0])} and {out / gone[0]}.* to go on without"
            )
    write_json(path, {**settings, "shards": list(shards)})


def run_stages(stages: Sequence[Stage], engine: Engine | None = None, progress: Progress | None = None) -> bool:
    """Do every shard that is not done of every stage, each stage after the one before.

    Args:
        engine: where; one worker of this machine by default.

    Returns:
        whether all is done; not, where the stages were only submitted to Slurm

    Raises:
        UserError: some shards could not be done (every other one of that stage is), or a worker died.
    """
    engine = engine or Local()
    if isinstance(engine, Slurm):
        from mc2_hpc.jobs.slurm import run_on_slurm

        return run_on_slurm(stages, engine, progress)
    if isinstance(engine, Ray) and find_spec("ray") is None:
        raise UserError("--executor ray: Ray is not installed: pip install 'mc2_hpc[ray]'")
    for stage in stages:
        _run_here(stage, engine, progress)
    return True


def _run_here(stage: Stage, engine: Local | Ray, progress: Progress | None) -> None:
    """One stage in this process, in processes of this machine, or on Ray."""
    with exclusive_folder(stage.folder, wait_s=BUSY_S):
        if (stage.logs / JOB).is_file():
            from mc2_hpc.jobs.slurm import refuse_live_job

            refuse_live_job(stage)
        undone = stage.undone()
        watch = Watch(stage.name, stage.unit, len(stage.shards), len(stage.shards) - len(undone), progress)
        if not undone:
            return
        tasks = plan_tasks(stage, engine, undone)
        from mc2_hpc.jobs import executors  # loads datatrove: when there is something to do

        if isinstance(engine, Local) and (engine.workers == 1 or len(undone) == 1):
            executors.run_in_process(stage.logs, tasks, stage.work, stage.is_done, watch)
        else:
            executors.run_in_processes(stage.logs, tasks, stage.work, stage.is_done, engine, watch)
        watch.raise_failures()


def _remove_unfinished(folder: Path) -> None:
    """Remove the temporary files that a killed run left in ``folder`` and the folders in it."""
    for path in [*folder.iterdir(), *folder.glob("*/.*")]:
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink()


def plan_tasks(stage: Stage, engine: Engine, undone: Sequence[str]) -> int:
    """Make ready for a stage's work: clear away what it makes stale, and lay down the plan of its tasks, each a fixed
    slice of the sorted shards; returns their number."""
    from mc2_hpc.jobs.tasks import TaskFiles, cut

    stage.invalidate()
    _remove_unfinished(stage.folder)
    tasks, wanted = num_tasks(engine, len(stage.shards)), set(undone)
    slices = {}
    for task, names in enumerate(cut(sorted(stage.shards), tasks)):
        if slice_ := {name: stage.shards[name] for name in names if name in wanted}:
            slices[task] = slice_
    TaskFiles(stage.logs).write_plan(slices, tasks)
    return tasks
